// PyTorch's numbers for dtypes and devices against DLPack's. They are asked for once, as they are not part of PyTorch's ABI.
//
//   numbering.from_torch(dtype)      numbering.to_torch(view.dtype_)      numbering.device(type, index)
#pragma once

#include <jitk/abi.h>  // DLDataType, DLDevice

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

struct Numbering {
  static constexpr int32_t kCount = 64;
  jitk::DLDataType dlpack[kCount] = {};
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();

  Numbering() {
    add(aoti_torch_dtype_bool(), jitk::kDLBool, 8);
    add(aoti_torch_dtype_uint8(), jitk::kDLUInt, 8);
    add(aoti_torch_dtype_uint16(), jitk::kDLUInt, 16);
    add(aoti_torch_dtype_uint32(), jitk::kDLUInt, 32);
    add(aoti_torch_dtype_uint64(), jitk::kDLUInt, 64);
    add(aoti_torch_dtype_int8(), jitk::kDLInt, 8);
    add(aoti_torch_dtype_int16(), jitk::kDLInt, 16);
    add(aoti_torch_dtype_int32(), jitk::kDLInt, 32);
    add(aoti_torch_dtype_int64(), jitk::kDLInt, 64);
    add(aoti_torch_dtype_float16(), jitk::kDLFloat, 16);
    add(aoti_torch_dtype_bfloat16(), jitk::kDLBfloat, 16);
    add(aoti_torch_dtype_float32(), jitk::kDLFloat, 32);
    add(aoti_torch_dtype_float64(), jitk::kDLFloat, 64);
    add(aoti_torch_dtype_complex32(), jitk::kDLComplex, 32);
    add(aoti_torch_dtype_complex64(), jitk::kDLComplex, 64);
    add(aoti_torch_dtype_complex128(), jitk::kDLComplex, 128);
    add(aoti_torch_dtype_float8_e4m3fn(), jitk::kDLFloat8_e4m3fn, 8);
    add(aoti_torch_dtype_float8_e4m3fnuz(), jitk::kDLFloat8_e4m3fnuz, 8);
    add(aoti_torch_dtype_float8_e5m2(), jitk::kDLFloat8_e5m2, 8);
    add(aoti_torch_dtype_float8_e5m2fnuz(), jitk::kDLFloat8_e5m2fnuz, 8);
    add(torch_dtype_float8_e8m0fnu(), jitk::kDLFloat8_e8m0fnu, 8);
  }

  void add(int32_t torch, uint8_t code, uint8_t bits) {
    if (torch >= 0 && torch < kCount) dlpack[torch] = {code, bits, 1};
  }

  jitk::DLDataType from_torch(int32_t dtype) const {
    return dtype >= 0 && dtype < kCount ? dlpack[dtype] : jitk::DLDataType{255, 0, 0};
  }

  jitk::DLDevice device(int32_t type, int32_t index) const {
    if (type == cuda) return {jitk::kDLCUDA, index};
    if (type == cpu) return {jitk::kDLCPU, 0};
    return {jitk::kDLExtDev, index};
  }

  int32_t to_torch(jitk::DLDataType dtype) const {
    for (int32_t i = 0; i < kCount; ++i) {
      if (dlpack[i] == dtype && dlpack[i].bits != 0) return i;
    }
    throw std::runtime_error("PyTorch has no dtype for DLPack code " + std::to_string(dtype.code) + " with " +
                             std::to_string(dtype.bits) + " bits");
  }
};

const Numbering numbering;

}  // namespace

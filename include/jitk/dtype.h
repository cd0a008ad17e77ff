// Element types by one name on both sides: fp32_t, fp16_t, bf16_t and, with <jitk/fp8.cuh>, the 8-bit floats.
//
//   dtype_of<bf16_t>()        the DLDataType that a tensor of it carries
//   to_float(x), from_float<bf16_t>(y)       host conversions, rounding to nearest even
//
// Under nvcc the half types are CUDA's own; under a host compiler alone they are 16 bits of storage with conversions.
// Left out: device casts and packed types (dtype.cuh), whole rows of conversions (simd.h).
#pragma once

#include <jitk/abi.h>  // DLDataType

#include <cstring>  // memcpy, to look at the bits of a float
#if defined(__CUDACC__)
#include <cuda_bf16.h>  // __nv_bfloat16
#include <cuda_fp16.h>  // __half
#endif

namespace jitk {

using fp32_t = float;
using fp64_t = double;

#if defined(__CUDACC__)
using fp16_t = __half;
using bf16_t = __nv_bfloat16;
#else
struct fp16_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};
#endif

template <typename T>
struct DTypeOf;  // no definition: T is no element type

#define JITK_DTYPE(T, CODE, BITS) \
  template <>                     \
  struct DTypeOf<T> {             \
    static constexpr DLDataType value{CODE, BITS, 1}; \
  }
JITK_DTYPE(bool, kDLBool, 8);
JITK_DTYPE(int8_t, kDLInt, 8);
JITK_DTYPE(int16_t, kDLInt, 16);
JITK_DTYPE(int32_t, kDLInt, 32);
JITK_DTYPE(int64_t, kDLInt, 64);
JITK_DTYPE(uint8_t, kDLUInt, 8);
JITK_DTYPE(uint16_t, kDLUInt, 16);
JITK_DTYPE(uint32_t, kDLUInt, 32);
JITK_DTYPE(uint64_t, kDLUInt, 64);
JITK_DTYPE(fp16_t, kDLFloat, 16);
JITK_DTYPE(bf16_t, kDLBfloat, 16);
JITK_DTYPE(fp32_t, kDLFloat, 32);
JITK_DTYPE(fp64_t, kDLFloat, 64);

template <typename T>
constexpr DLDataType dtype_of() {
  return DTypeOf<T>::value;
}

}  // namespace jitk

// What both backends of scale_shift accept, said once.
//
//   const ScaleShift<T> call = match<T, kGroup>(input, scale, shift, out);
//
// Left out: the arithmetic (csrc/scale.cu, csrc/scale.cpp).
#pragma once

#include <jitk/rows.h>  // Rows, TensorMatcher

#include <optional>  // shift

namespace mylib {

using namespace jitk;

// A call as the kernels read it. Rows are `stride` elements apart, and dense.
template <typename T>
struct ScaleShift {
  const T* input;
  const T* scale;
  const T* shift;  // or null
  T* out;
  int64_t input_stride;
  int64_t out_stride;
  int64_t tokens;
  int64_t hidden;
  DLDevice device;
};

template <typename T, int32_t kGroup>
ScaleShift<T> match(TensorView input, TensorView scale, std::optional<TensorView> shift, TensorView out) {
  static_assert(kGroup > 0, "group must be positive");
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize groups{"groups"};
  SymbolicDevice device;  // CUDA where nvcc compiles this, the CPU where g++ does
  Rows from, to;
  TensorMatcher({tokens, kGroup * groups}).with_rows(from).with_dtype<T>().with_device(device).verify(input);
  TensorMatcher({groups}).with_dtype<T>().with_device(device).verify(scale);
  if (shift) TensorMatcher({groups}).with_dtype<T>().with_device(device).verify(*shift);
  TensorMatcher({tokens, kGroup * groups}).with_rows(to).with_dtype<T>().with_device(device).verify(out);
  return {static_cast<const T*>(input.data_ptr()),
          static_cast<const T*>(scale.data_ptr()),
          shift ? static_cast<const T*>(shift->data_ptr()) : nullptr,
          static_cast<T*>(out.data_ptr()),
          from.stride,
          to.stride,
          from.count,
          from.width,
          device.unwrap()};
}

}  // namespace mylib

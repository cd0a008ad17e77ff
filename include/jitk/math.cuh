// The fast functions that activations are made of, and arithmetic by one name for every element type.
//
//   y = x * math::sigmoid_fast(x);
//   const bf16x2_t largest = math::max(a, b);              whatever DTypeTrait has for the type
//
// A kernel that calls a _fast function says what its error does to the result. max and min pass over a NaN.
// Left out: what CUDA's math library has under a name of its own (expf, sqrtf), division by a launch-time integer
// (fast_divisor.h).
#pragma once

#include <jitk/dtype.cuh>  // DTypeTrait

namespace jitk::device {

// Rounds up. Both operands are the same type, so that a 64-bit division is there to be seen.
template <typename T>
JITK_DEVICE constexpr T div_ceil(T a, T b) {
  static_assert(std::is_integral_v<T>, "only integers are divided");
  return a / b + (a % b != 0);
}

namespace math {

inline constexpr float log2e = 1.44269504088896340736f;

template <typename T>
JITK_DEVICE T max(T a, T b) {
  return DTypeTrait<T>::max(a, b);
}
template <typename T>
JITK_DEVICE T min(T a, T b) {
  return DTypeTrait<T>::min(a, b);
}
template <typename T>
JITK_DEVICE T abs(T a) {
  return DTypeTrait<T>::abs(a);
}
template <typename T>
JITK_DEVICE T rsqrt(T a) {
  return DTypeTrait<T>::rsqrt(a);
}

// One instruction each, within 2 ulp. Subnormal operands and results are taken for 0; CUDA's own functions, which keep them,
// take 3 to 10.
JITK_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
JITK_DEVICE float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1 / (1 + 2^-x). Both terms of the sum are taken 1/16 as large, or the reciprocal would be subnormal, and so 0, where the sigmoid is not.
JITK_DEVICE float logistic2_fast(float x) { return 0.0625f * reciprocal_fast(0.0625f + exp2_fast(-4.0f - x)); }
JITK_DEVICE float sigmoid_fast(float x) { return logistic2_fast(x * log2e); }

}  // namespace math
}  // namespace jitk::device

// Arithmetic by one name for every element type, and the functions that activations are made of.
//
//   const float scale = math::rsqrt(sum / width + eps);
//   const bf16x2_t largest = math::max(a, b);              whatever DTypeTrait has for the type
//   y = x * math::sigmoid_fast(x);
//
// max and min pass over a NaN. The plain functions are those of CUDA's math library; sigmoid and silu are written in them. The
// _fast ones use the hardware's exponential, whose error grows with |x| (__expf: 2 + |1.173 x| ulp by CUDA's guide): a kernel
// that calls them says what that does to its result. Only float has functions such as exp: for the halves, cast and say so.
// Left out: division by a launch-time integer (fast_divisor.h).
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

inline constexpr float log2e = 1.44269504088896340736f;   // log2(e)
inline constexpr float loge2 = 0.693147180559945309417f;  // ln(2)

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
JITK_DEVICE T sqrt(T a) {
  return DTypeTrait<T>::sqrt(a);
}
template <typename T>
JITK_DEVICE T rsqrt(T a) {
  return DTypeTrait<T>::rsqrt(a);
}
template <typename T>
JITK_DEVICE T exp(T a) {
  return DTypeTrait<T>::exp(a);
}
template <typename T>
JITK_DEVICE T exp2(T a) {
  return DTypeTrait<T>::exp2(a);
}
template <typename T>
JITK_DEVICE T log(T a) {
  return DTypeTrait<T>::log(a);
}
template <typename T>
JITK_DEVICE T tanh(T a) {
  return DTypeTrait<T>::tanh(a);
}
template <typename T>
JITK_DEVICE T sin(T a) {
  return DTypeTrait<T>::sin(a);
}
template <typename T>
JITK_DEVICE T cos(T a) {
  return DTypeTrait<T>::cos(a);
}

// e^-x is infinite below -88, where 1 / (1 + e^-x) is 0: right, without a branch.
JITK_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
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
JITK_DEVICE float silu(float x) { return x * sigmoid(x); }
JITK_DEVICE float silu_fast(float x) { return x * sigmoid_fast(x); }
// log(1 + e^x), which above 20 is x to the last bit of a float.
JITK_DEVICE float softplus_fast(float x) { return x > 20.0f ? x : log1pf(__expf(x)); }

}  // namespace math
}  // namespace jitk::device

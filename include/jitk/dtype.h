// Element types by one name on both sides: fp32_t, fp16_t, bf16_t and the 8-bit floats fp8_e4m3_t, fp8_e5m2_t and fp8_e8m0_t, of
// which the first two come with <jitk/fp8.cuh> under nvcc.
//
//   dtype_of<bf16_t>()        the DLDataType that a tensor of it carries
//   to_float(x), from_float<bf16_t>(y)       host conversions, rounding to nearest even; to 8 bits they saturate, as cast does
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
struct fp8_e4m3_t {
  uint8_t bits;
};
struct fp8_e5m2_t {
  uint8_t bits;
};
#endif
// A power of two, 2^(bits - 127), or NaN: what blocks of small floats are scaled by.
struct fp8_e8m0_t {
  uint8_t bits;
};

template <typename T>
struct DTypeOf;  // no definition: T is no element type

#define JITK_DTYPE(T, CODE, BITS)                     \
  template <>                                         \
  struct DTypeOf<T> {                                 \
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
JITK_DTYPE(fp8_e8m0_t, kDLFloat8_e8m0fnu, 8);
#if !defined(__CUDACC__)
JITK_DTYPE(fp8_e4m3_t, kDLFloat8_e4m3fn, 8);
JITK_DTYPE(fp8_e5m2_t, kDLFloat8_e5m2, 8);
#endif

template <typename T>
constexpr DLDataType dtype_of() {
  return DTypeOf<T>::value;
}

#if !defined(__CUDACC__)
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The roundings, written once for a float with a uint32_t and for simd.h's vectors of them: every branch is a select.
namespace rounding {

// In the low 16 bits of `half`, above them zeros.
template <typename Float, typename Word>
inline Float fp16_to_fp32(Word half) {
  const Word magnitude = (half & 0x7fffu) << 13;
  // A subnormal gets the exponent of 2^-14 and the implicit one that goes with it, and loses both again: exact, and right also
  // where the thread flushes fp32 subnormals to zero.
  const Float subnormal = bits_as<Float>(magnitude + (113u << 23)) - 0x1p-14f;
  const Word finite = magnitude < (1u << 23) ? bits_as<Word>(subnormal) : magnitude + (112u << 23);
  const Word all = magnitude < (31u << 23) ? finite : magnitude | 0x7f800000u;
  return bits_as<Float>(all | (half & 0x8000u) << 16);
}

template <typename Word, typename Float>
inline Word fp32_to_fp16(Float x) {
  const Word bits = bits_as<Word>(x);
  const Word magnitude = bits & 0x7fffffffu;
  const Word normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 leaves a multiple of 2^-24, rounded by the adder itself.
  const Word subnormal = bits_as<Word>(bits_as<Float>(magnitude) + 0.5f) - (126u << 23);
  const Word finite = magnitude < (113u << 23) ? subnormal : normal;
  const Word not_finite = 0x7c00u | (magnitude > 0x7f800000u ? (magnitude >> 13 & 0x3ffu) | 0x200u : magnitude & 0u);
  return (magnitude < (143u << 23) ? finite : not_finite) | (bits >> 16 & 0x8000u);
}

// In the high 16 bits of the result, below them what was cut off.
template <typename Word, typename Float>
inline Word fp32_to_bf16(Float x) {
  const Word bits = bits_as<Word>(x);
  return x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x00400000u;
}

// To 8 bits with kMantissa of them behind the point, of which kLargest is the largest finite value. Infinities saturate.
template <int32_t kMantissa, uint32_t kLargest, uint32_t kNaN>
inline uint8_t fp32_to_fp8(float x) {
  constexpr int32_t kCut = 23 - kMantissa;
  constexpr uint32_t kMinExponent = 127 - (kMantissa == 3 ? 6 : 14);  // of the smallest normal number, as fp32 has it
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(kNaN | (bits >> 24 & 0x80u));
  uint32_t small = 0;
  if (magnitude >= kMinExponent << 23) {
    const uint32_t half = (1u << (kCut - 1)) - 1 + (magnitude >> kCut & 1u);
    small = (magnitude + half - ((kMinExponent - 1) << 23)) >> kCut;
  } else {
    // Adding a number whose last bit is the smallest subnormal leaves a multiple of that, rounded by the adder itself.
    const float step = bits_as<float>((kMinExponent + static_cast<uint32_t>(kCut)) << 23);
    small = bits_as<uint32_t>(bits_as<float>(magnitude) + step) - bits_as<uint32_t>(step);
  }
  if (small > kLargest) small = kLargest;
  return static_cast<uint8_t>(small | (bits >> 24 & 0x80u));
}

}  // namespace rounding

inline float to_float(fp32_t x) { return x; }
inline float to_float(fp16_t x) { return rounding::fp16_to_fp32<float>(uint32_t{x.bits}); }
inline float to_float(bf16_t x) { return bits_as<float>(uint32_t{x.bits} << 16); }
// e5m2 is the upper half of an fp16. e4m3 has one exponent more than its format needs, where others have infinities.
inline float to_float(fp8_e5m2_t x) { return rounding::fp16_to_fp32<float>(uint32_t{x.bits} << 8); }
inline float to_float(fp8_e4m3_t x) {
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_as<float>(0x7fc00000u | uint32_t{x.bits} >> 7 << 31);
  const float size =
      magnitude < 8u ? static_cast<float>(magnitude) * 0x1p-9f : bits_as<float>((magnitude << 20) + (120u << 23));
  return x.bits < 0x80u ? size : -size;
}
inline float to_float(fp8_e8m0_t x) {
  if (x.bits == 0xffu) return bits_as<float>(0x7fc00000u);
  return bits_as<float>(x.bits == 0 ? 0x00400000u : uint32_t{x.bits} << 23);
}

// Rounds to nearest even, overflows to infinity, keeps NaN.
template <typename T>
T from_float(float x);
template <>
inline fp32_t from_float<fp32_t>(float x) {
  return x;
}
template <>
inline fp16_t from_float<fp16_t>(float x) {
  return {static_cast<uint16_t>(rounding::fp32_to_fp16<uint32_t>(x))};
}
template <>
inline bf16_t from_float<bf16_t>(float x) {
  return {static_cast<uint16_t>(rounding::fp32_to_bf16<uint32_t>(x) >> 16)};
}
template <>
inline fp8_e4m3_t from_float<fp8_e4m3_t>(float x) {
  return {rounding::fp32_to_fp8<3, 0x7e, 0x7f>(x)};
}
template <>
inline fp8_e5m2_t from_float<fp8_e5m2_t>(float x) {
  return {rounding::fp32_to_fp8<2, 0x7b, 0x7e>(x)};
}
#endif

}  // namespace jitk

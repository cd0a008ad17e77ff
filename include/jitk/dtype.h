// Element types by one name on both sides: fp32_t, fp64_t, fp16_t, bf16_t, fp8_e4m3_t, fp8_e5m2_t, fp8_e8m0_t, bool and the
// integers of <cstdint>.
//
//   dtype_of<bf16_t>()        the DLDataType that a tensor of it carries
//   to_float(x), from_float<bf16_t>(y)       host conversions, rounding to nearest even, to the bit what PyTorch's .to gives
//
// Under nvcc the halves and the 8-bit floats are CUDA's own, these with <jitk/fp8.cuh>; under a host compiler alone they are
// storage with conversions. fp8_e8m0_t, a power of two that scales a block of others, is ours on both sides.
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
struct fp8_e8m0_t {
  uint8_t bits;  // the exponent of a float; 255 is NaN
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

// The value sits in the low 16 bits of `half`; the high bits are zero.
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

// The value sits in the low 8 bits.
template <typename Float, typename Word>
inline Float e4m3_to_fp32(Word code) {
  const Word magnitude = (code & 0x7fu) << 20;
  // As above: a subnormal gets the exponent of 2^-6.
  const Float subnormal = bits_as<Float>(magnitude + (121u << 23)) - 0x1p-6f;
  const Word finite = magnitude < (1u << 23) ? bits_as<Word>(subnormal) : magnitude + (120u << 23);
  const Word all = magnitude < (0x7fu << 20) ? finite : magnitude | 0x7ff00000u;
  return bits_as<Float>(all | (code & 0x80u) << 24);
}

// To 7 bits below the sign. kShift: bits of an fp32's mantissa that are cut off; kBias: between the exponents; kOverflow: what is too
// large becomes, infinity or, where there is none, the largest number.
template <uint32_t kShift, uint32_t kBias, uint32_t kOverflow, typename Word, typename Float>
inline Word fp32_to_fp8(Float x) {
  const Word bits = bits_as<Word>(x);
  const Word magnitude = bits & 0x7fffffffu;
  const Word normal = (magnitude + ((1u << (kShift - 1)) - 1) + (magnitude >> kShift & 1u) - (kBias << 23)) >> kShift;
  // Adding a number whose last bit is the smallest subnormal leaves a multiple of that, rounded by the adder itself.
  constexpr uint32_t kStep = (kShift + kBias + 1) << 23;
  const Word subnormal = bits_as<Word>(bits_as<Float>(magnitude) + bits_as<float>(kStep)) - kStep;
  const Word finite = magnitude < ((kBias + 1) << 23) ? subnormal : normal;
  const Word not_finite = (magnitude & 0u) | (magnitude > 0x7f800000u ? 0x7fu : kOverflow);
  return (finite < kOverflow ? finite : not_finite) | (bits >> 24 & 0x80u);
}

// The sign is lost, and zero becomes the smallest power, 2^-127.
template <typename Word, typename Float>
inline Word fp32_to_e8m0(Float x) {
  const Word magnitude = bits_as<Word>(x) & 0x7fffffffu;
  // Up from the middle of two powers, but for the smallest, which stands for 0 too and is even.
  const Word exponent = (magnitude >> 23) + (magnitude > 0x00400000u ? magnitude >> 22 & 1u : magnitude & 0u);
  return magnitude < 0x7f800000u ? exponent : (magnitude & 0u) | 0xffu;
}

}  // namespace rounding

inline float to_float(fp32_t x) { return x; }
inline float to_float(fp16_t x) { return rounding::fp16_to_fp32<float>(uint32_t{x.bits}); }
inline float to_float(bf16_t x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp8_e4m3_t x) { return rounding::e4m3_to_fp32<float>(uint32_t{x.bits}); }
inline float to_float(fp8_e5m2_t x) { return rounding::fp16_to_fp32<float>(uint32_t{x.bits} << 8); }  // its upper half
inline float to_float(fp8_e8m0_t x) {
  return bits_as<float>(x.bits == 0 ? 0x00400000u : x.bits == 0xff ? 0x7fc00000u : uint32_t{x.bits} << 23);
}

// Rounds to nearest even, and keeps NaN. What is too large becomes infinity; in e4m3, which has none, the largest number, as in
// PyTorch from 2.13 on (2.11 made NaN of it). e8m0 rounds to a power of two and ignores the sign; its middles go up.
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
  return {static_cast<uint8_t>(rounding::fp32_to_fp8<20, 120, 0x7e, uint32_t>(x))};
}
template <>
inline fp8_e5m2_t from_float<fp8_e5m2_t>(float x) {
  return {static_cast<uint8_t>(rounding::fp32_to_fp8<21, 112, 0x7c, uint32_t>(x))};
}
template <>
inline fp8_e8m0_t from_float<fp8_e8m0_t>(float x) {
  return {static_cast<uint8_t>(rounding::fp32_to_e8m0<uint32_t>(x))};
}
#endif

}  // namespace jitk

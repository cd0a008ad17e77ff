// Element types on the device: conversions, the packed pairs that halve the instructions, and their arithmetic.
//
//   const fp32x2_t x = cast<fp32x2_t>(pair);            bf16x2_t -> two floats
//   pair = cast<bf16x2_t>(fp32x2_t{x.x * s, x.y * s});  and back
//   packed_t<bf16_t>                                    bf16x2_t
//   DTypeTrait<fp16_t>::max(a, b), DTypeTrait<fp16_t>::kFloatMax
//
// cast rounds once, to nearest, ties to even, from whatever type it comes; to an integer it truncates, as C++ does. All of it
// works without the compiler's half operators, which PyTorch's flags switch off.
// Left out: the 8-bit floats (fp8.cuh) and the names that a kernel calls (math.cuh).
#pragma once

#include <jitk/arch.cuh>  // JITK_DEVICE
#include <jitk/dtype.h>   // fp16_t, bf16_t, fp32_t

#include <type_traits>  // which conversion

namespace jitk {

using fp16x2_t = __half2;
using bf16x2_t = __nv_bfloat162;
using fp32x2_t = float2;
using fp32x4_t = float4;

// What is known about a type: packed_t is the next larger pack or void, unpacked_t and kVecSize are what it is made of. Beside
// these, round() takes a wider type to this one, widen() takes this one to wider_t without loss, and the rest is the arithmetic
// that the hardware has for it. max and min of floats pass over a NaN: they return the other operand. PyTorch's amax does not.
template <typename T, typename = void>
struct DTypeTrait;  // no definition: T is no element type

template <typename T>
using packed_t = typename DTypeTrait<T>::packed_t;

namespace details {

// The integer that an intrinsic takes for S.
template <typename S, typename Small = std::conditional_t<std::is_signed_v<S>, int, unsigned>,
          typename Large = std::conditional_t<std::is_signed_v<S>, long long, unsigned long long>>
using intrinsic_integer_t = std::conditional_t<(sizeof(S) > 4), Large, Small>;

template <typename To, typename From>
JITK_DEVICE To convert(const From& x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_arithmetic_v<To> && std::is_arithmetic_v<From>) {
    return static_cast<To>(x);
  } else if constexpr (!std::is_void_v<typename DTypeTrait<From>::wider_t>) {
    return convert<To>(DTypeTrait<From>::widen(x));
  } else if constexpr (std::is_integral_v<From>) {
    return DTypeTrait<To>::round(static_cast<intrinsic_integer_t<From>>(x));  // not by way of a float: that could round twice
  } else {
    return DTypeTrait<To>::round(x);
  }
}

template <typename Self, typename Packed, typename Unpacked, uint32_t kCount, typename Wider = void>
struct TypeFacts {
  using self_t = Self;
  using packed_t = Packed;
  using unpacked_t = Unpacked;
  using wider_t = Wider;
  static constexpr uint32_t kVecSize = kCount;

  template <typename S>
  JITK_DEVICE static Self from(const S& x) {
    return convert<Self>(x);
  }
};

}  // namespace details

template <typename T>
struct DTypeTrait<T, std::enable_if_t<std::is_integral_v<T>>> : details::TypeFacts<T, void, T, 1> {
  JITK_DEVICE static T abs(T x) {
    if constexpr (std::is_unsigned_v<T>) {
      return x;
    } else {
      return x < 0 ? static_cast<T>(-x) : x;
    }
  }
  JITK_DEVICE static T max(T x, T y) { return x < y ? y : x; }
  JITK_DEVICE static T min(T x, T y) { return y < x ? y : x; }
};

template <>
struct DTypeTrait<fp32_t> : details::TypeFacts<fp32_t, fp32x2_t, fp32_t, 1> {
  static constexpr float kFloatMax = 3.402823466e+38f;

  JITK_DEVICE static fp32_t abs(fp32_t x) { return fabsf(x); }
  JITK_DEVICE static fp32_t max(fp32_t x, fp32_t y) { return fmaxf(x, y); }
  JITK_DEVICE static fp32_t min(fp32_t x, fp32_t y) { return fminf(x, y); }
  JITK_DEVICE static fp32_t rsqrt(fp32_t x) { return rsqrtf(x); }
};

template <>
struct DTypeTrait<fp64_t> : details::TypeFacts<fp64_t, void, fp64_t, 1> {
  JITK_DEVICE static fp64_t abs(fp64_t x) { return ::fabs(x); }
  JITK_DEVICE static fp64_t max(fp64_t x, fp64_t y) { return ::fmax(x, y); }
  JITK_DEVICE static fp64_t min(fp64_t x, fp64_t y) { return ::fmin(x, y); }
  JITK_DEVICE static fp64_t rsqrt(fp64_t x) { return ::rsqrt(x); }
};

template <>
struct DTypeTrait<fp16_t> : details::TypeFacts<fp16_t, fp16x2_t, fp16_t, 1, fp32_t> {
  static constexpr float kFloatMax = 65504.0f;

  JITK_DEVICE static fp16_t round(fp32_t x) { return __float2half_rn(x); }
  JITK_DEVICE static fp16_t round(fp64_t x) { return __double2half(x); }
  JITK_DEVICE static fp16_t round(int x) { return __int2half_rn(x); }
  JITK_DEVICE static fp16_t round(unsigned x) { return __uint2half_rn(x); }
  JITK_DEVICE static fp16_t round(long long x) { return __ll2half_rn(x); }
  JITK_DEVICE static fp16_t round(unsigned long long x) { return __ull2half_rn(x); }
  JITK_DEVICE static fp32_t widen(fp16_t x) { return __half2float(x); }
  JITK_DEVICE static fp16_t abs(fp16_t x) { return __habs(x); }
  JITK_DEVICE static fp16_t add(fp16_t x, fp16_t y) { return __hadd(x, y); }
  JITK_DEVICE static fp16_t max(fp16_t x, fp16_t y) { return __hmax(x, y); }
  JITK_DEVICE static fp16_t min(fp16_t x, fp16_t y) { return __hmin(x, y); }
};

template <>
struct DTypeTrait<bf16_t> : details::TypeFacts<bf16_t, bf16x2_t, bf16_t, 1, fp32_t> {
  static constexpr float kFloatMax = 3.38953139e38f;

  JITK_DEVICE static bf16_t round(fp32_t x) { return __float2bfloat16_rn(x); }
  JITK_DEVICE static bf16_t round(fp64_t x) { return __double2bfloat16(x); }
  JITK_DEVICE static bf16_t round(int x) { return __int2bfloat16_rn(x); }
  JITK_DEVICE static bf16_t round(unsigned x) { return __uint2bfloat16_rn(x); }
  JITK_DEVICE static bf16_t round(long long x) { return __ll2bfloat16_rn(x); }
  JITK_DEVICE static bf16_t round(unsigned long long x) { return __ull2bfloat16_rn(x); }
  JITK_DEVICE static fp32_t widen(bf16_t x) { return __bfloat162float(x); }
  JITK_DEVICE static bf16_t abs(bf16_t x) { return __habs(x); }
  JITK_DEVICE static bf16_t add(bf16_t x, bf16_t y) { return __hadd(x, y); }
  JITK_DEVICE static bf16_t max(bf16_t x, bf16_t y) { return __hmax(x, y); }
  JITK_DEVICE static bf16_t min(bf16_t x, bf16_t y) { return __hmin(x, y); }
};

template <>
struct DTypeTrait<fp32x2_t> : details::TypeFacts<fp32x2_t, fp32x4_t, fp32_t, 2> {};

template <>
struct DTypeTrait<fp32x4_t> : details::TypeFacts<fp32x4_t, void, fp32_t, 4> {};

template <>
struct DTypeTrait<fp16x2_t> : details::TypeFacts<fp16x2_t, void, fp16_t, 2, fp32x2_t> {
  JITK_DEVICE static fp16x2_t round(fp32x2_t x) { return __float22half2_rn(x); }
  JITK_DEVICE static fp32x2_t widen(fp16x2_t x) { return __half22float2(x); }
  JITK_DEVICE static fp16x2_t abs(fp16x2_t x) { return __habs2(x); }
  JITK_DEVICE static fp16x2_t add(fp16x2_t x, fp16x2_t y) { return __hadd2(x, y); }
  JITK_DEVICE static fp16x2_t max(fp16x2_t x, fp16x2_t y) { return __hmax2(x, y); }
  JITK_DEVICE static fp16x2_t min(fp16x2_t x, fp16x2_t y) { return __hmin2(x, y); }
};

template <>
struct DTypeTrait<bf16x2_t> : details::TypeFacts<bf16x2_t, void, bf16_t, 2, fp32x2_t> {
  JITK_DEVICE static bf16x2_t round(fp32x2_t x) { return __float22bfloat162_rn(x); }
  // A bf16 is the upper half of a float: a shift and a mask, where the intrinsic takes the halves apart first.
  JITK_DEVICE static fp32x2_t widen(bf16x2_t x) {
    const uint32_t bits = reinterpret_cast<const uint32_t&>(x);
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  JITK_DEVICE static bf16x2_t abs(bf16x2_t x) { return __habs2(x); }
  JITK_DEVICE static bf16x2_t add(bf16x2_t x, bf16x2_t y) { return __hadd2(x, y); }
  JITK_DEVICE static bf16x2_t max(bf16x2_t x, bf16x2_t y) { return __hmax2(x, y); }
  JITK_DEVICE static bf16x2_t min(bf16x2_t x, bf16x2_t y) { return __hmin2(x, y); }
};

namespace device {

template <typename To, typename From>
JITK_DEVICE To cast(const From& value) {
  return details::convert<To>(value);
}

// The elements of a packed value, to read or to write: unpack(pair)[1] = x.
template <typename T>
JITK_DEVICE auto& unpack(T& value) {
  using Trait = DTypeTrait<std::remove_const_t<T>>;
  using Element = std::conditional_t<std::is_const_v<T>, const typename Trait::unpacked_t, typename Trait::unpacked_t>;
  static_assert(sizeof(T) == sizeof(Element) * Trait::kVecSize, "a packed type is its elements and nothing else");
  return reinterpret_cast<Element(&)[Trait::kVecSize]>(value);
}

}  // namespace device
}  // namespace jitk

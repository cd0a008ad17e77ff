// What a vector of a row becomes on its way into a KV cache and out of it: the same bytes, or 8-bit floats and wider ones
// again.
//
//   using Kind = Cast<bf16_t, 8>;
//   const Kind::Factor factor(scale);
//   Kind::Slot x = Kind::store(token, Stored::kE4m3, factor);         token / scale.value, saturated
//   Kind::Token y = Kind::load(x, Stored::kE4m3, factor);             times scale.value
//
// Left out: which vectors (move_rows.cuh), scales that are not one for a tensor.
#pragma once

#include <jitk/cache_dtype.h>  // Stored

#include <jitk/fp8.cuh>  // cast to and from 8-bit floats
#include <jitk/vec.cuh>  // AlignedVector, to_floats

namespace jitk {
namespace moves {

constexpr uint32_t kWideBytes = 16;

struct Scale {
  float value;
  bool given;
};

// The same bytes.
template <uint32_t kBytes>
struct Copy {
  static constexpr bool kScales = false;
  using Factor = Scale;
  static constexpr uint32_t kTokenBytes = kBytes;
  static constexpr uint32_t kSlotBytes = kBytes;
  using Token = device::AlignedVector<uint8_t, kBytes>;
  using Slot = Token;

  JITK_DEVICE static Slot store(const Token& x, Stored, const Factor&) { return x; }
  JITK_DEVICE static Token load(const Slot& x, Stored, const Factor&) { return x; }
  JITK_DEVICE static Token zeros() {
    Token out;
    out.fill(0);
    return out;
  }
};

// Elements of T in the tensors of tokens, 8-bit floats in slots.
template <typename T, uint32_t kVec>
struct Cast {
  static constexpr bool kScales = true;
  // Once for all vectors of a thread: to make it is to wait for the scale, and to divide.
  struct Factor {
    Scale scale;
    device::Fp8Scale<T> divisor;
    JITK_DEVICE Factor(Scale given) : scale(given), divisor(given.value) {}
  };
  static constexpr uint32_t kTokenBytes = kVec * sizeof(T);
  static constexpr uint32_t kSlotBytes = kVec;
  using Token = device::AlignedVector<T, kVec>;
  using Slot = device::AlignedVector<uint8_t, kVec>;

  template <typename Fp8, typename Fp8x2>
  JITK_DEVICE static Slot narrow(const float (&values)[kVec]) {
    Slot out;
    if constexpr (kVec == 1) {
      out[0] = device::cast<Fp8>(values[0]).__x;
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kVec; i += 2) {
        const uint16_t pair = device::cast<Fp8x2>(fp32x2_t{values[i], values[i + 1]}).__x;
        out[i] = static_cast<uint8_t>(pair);
        out[i + 1] = static_cast<uint8_t>(pair >> 8);
      }
    }
    return out;
  }

  JITK_DEVICE static Slot store(const Token& x, Stored stored, const Factor& factor) {
    float values[kVec];
    to_floats(x, values);
    if (factor.scale.given) factor.divisor.divide(values);
    return stored == Stored::kE4m3 ? narrow<fp8_e4m3_t, fp8x2_e4m3_t>(values) : narrow<fp8_e5m2_t, fp8x2_e5m2_t>(values);
  }

  template <typename Fp8, typename Fp8x2>
  JITK_DEVICE static void widen(const Slot& x, float (&values)[kVec]) {
    if constexpr (kVec == 1) {
      Fp8 one;
      one.__x = x[0];
      values[0] = device::cast<float>(one);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kVec; i += 2) {
        Fp8x2 pair;
        pair.__x = static_cast<uint16_t>(x[i] | x[i + 1] << 8);
        const fp32x2_t wide = device::cast<fp32x2_t>(pair);
        values[i] = wide.x;
        values[i + 1] = wide.y;
      }
    }
  }

  JITK_DEVICE static Token load(const Slot& x, Stored stored, const Factor& factor) {
    float values[kVec];
    stored == Stored::kE4m3 ? widen<fp8_e4m3_t, fp8x2_e4m3_t>(x, values) : widen<fp8_e5m2_t, fp8x2_e5m2_t>(x, values);
    if (factor.scale.given) {
#pragma unroll
      for (uint32_t i = 0; i < kVec; ++i) values[i] *= factor.scale.value;
    }
    Token out;
    from_floats(values, out);
    return out;
  }
  JITK_DEVICE static Token zeros() {
    Token out;
    out.fill(device::cast<T>(0.0f));
    return out;
  }
};

}  // namespace moves
}  // namespace jitk

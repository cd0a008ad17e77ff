// The 8-bit floats, apart from dtype.cuh because few kernels use them and they take time to compile: about 4 percent of a small
// kernel's, most of it in CUDA's header (nvcc 13.0, 2026-11).
//
//   out = cast<fp8x2_e4m3_t>(fp32x2_t{x.x * inverse, x.y * inverse});
//   cast<fp32x2_t>(out), cast<bf16x2_t>(out)
//   DTypeTrait<fp8_e4m3_t>::kFloatMax                   448, also math::FP8_E4M3_MAX
//   const Fp8Scale<bf16_t> scale(*place);
//   scale.divide(values);                               floats that were bf16_t, and shall be 8-bit floats
//
// A cast to them rounds once, to nearest, ties to even, and saturates: what is too large, infinities included, becomes the
// largest finite value, and NaN stays NaN. PyTorch makes infinity of what is too large for e5m2, and up to 2.11 NaN for e4m3.
// fp8_e8m0_t (dtype.h), a power of two, is cast from and to floats; it rounds as PyTorch does, and ignores the sign.
// Left out: block-scaled formats, arithmetic in 8 bits.
#pragma once

#include <jitk/dtype.cuh>  // DTypeTrait, cast

#include <cuda_fp8.h>  // the types, and their instructions from sm_89 on

namespace jitk {

using fp8_e4m3_t = __nv_fp8_e4m3;
using fp8_e5m2_t = __nv_fp8_e5m2;
using fp8x2_e4m3_t = __nv_fp8x2_e4m3;
using fp8x2_e5m2_t = __nv_fp8x2_e5m2;
using fp8x4_e4m3_t = __nv_fp8x4_e4m3;
using fp8x4_e5m2_t = __nv_fp8x4_e5m2;

JITK_DTYPE(fp8_e4m3_t, kDLFloat8_e4m3fn, 8);
JITK_DTYPE(fp8_e5m2_t, kDLFloat8_e5m2, 8);

namespace details {

// Both formats fit into fp16_t, which is what the hardware widens them to.
template <typename Self, typename Packed, typename Unpacked, uint32_t kCount, typename Wider>
struct Fp8Facts : TypeFacts<Self, Packed, Unpacked, kCount, Wider> {
  // Integers too: one that fp32_t cannot hold is far beyond the largest 8-bit value.
  template <typename S>
  JITK_DEVICE static Self round(const S& x) {
    if constexpr (std::is_integral_v<S>) {
      return static_cast<Self>(static_cast<fp32_t>(x));
    } else {
      return static_cast<Self>(x);
    }
  }
  JITK_DEVICE static Wider widen(const Self& x) { return static_cast<Wider>(x); }
};

}  // namespace details

template <>
struct DTypeTrait<fp8_e4m3_t> : details::Fp8Facts<fp8_e4m3_t, fp8x2_e4m3_t, fp8_e4m3_t, 1, fp16_t> {
  static constexpr float kFloatMax = 448.0f;
};
template <>
struct DTypeTrait<fp8_e5m2_t> : details::Fp8Facts<fp8_e5m2_t, fp8x2_e5m2_t, fp8_e5m2_t, 1, fp16_t> {
  static constexpr float kFloatMax = 57344.0f;
};
template <>
struct DTypeTrait<fp8_e8m0_t> : details::TypeFacts<fp8_e8m0_t, void, fp8_e8m0_t, 1, fp32_t> {
  JITK_DEVICE static fp8_e8m0_t round(fp32_t x) {
    const uint32_t magnitude = __float_as_uint(x) & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return {0xff};
    // Up from the middle of two powers, but for the smallest, which stands for 0 too.
    return {static_cast<uint8_t>((magnitude >> 23) + (magnitude > 0x00400000u ? magnitude >> 22 & 1u : 0u))};
  }
  JITK_DEVICE static fp32_t widen(fp8_e8m0_t x) {
    return __uint_as_float(x.bits == 0 ? 0x00400000u : x.bits == 0xff ? 0x7fc00000u : uint32_t{x.bits} << 23);
  }
};
template <>
struct DTypeTrait<fp8x2_e4m3_t> : details::Fp8Facts<fp8x2_e4m3_t, fp8x4_e4m3_t, fp8_e4m3_t, 2, fp16x2_t> {};
template <>
struct DTypeTrait<fp8x2_e5m2_t> : details::Fp8Facts<fp8x2_e5m2_t, fp8x4_e5m2_t, fp8_e5m2_t, 2, fp16x2_t> {};
template <>
struct DTypeTrait<fp8x4_e4m3_t> : details::Fp8Facts<fp8x4_e4m3_t, void, fp8_e4m3_t, 4, fp32x4_t> {};
template <>
struct DTypeTrait<fp8x4_e5m2_t> : details::Fp8Facts<fp8x4_e5m2_t, void, fp8_e5m2_t, 4, fp32x4_t> {};

namespace device {

// A number by which many values of T are divided, to be cast to 8-bit floats then: the bits are those of a division in fp32.
//
// A product with the reciprocal alone would end in another 8-bit float where it meets a tie. One step of Newton's makes it the
// rounded quotient: it is, for each half over each fp32 whose mantissas differ, which a loop over all of them has shown. Where
// it would overflow on the way, or T is wide, the division is the compiler's, which costs twice as many instructions.
template <typename T>
class Fp8Scale {
 public:
  JITK_DEVICE explicit Fp8Scale(float scale) : scale_(scale), reciprocal_(1.0f / scale) {}

  template <uint32_t kVec>
  JITK_DEVICE void divide(float (&values)[kVec]) const {
    if (sizeof(T) == 2 && scale_ >= 0x1p-60f && scale_ <= 0x1p60f) {
#pragma unroll
      for (uint32_t i = 0; i < kVec; ++i) values[i] = divided(values[i]);
    } else {
#pragma unroll
      for (uint32_t i = 0; i < kVec; ++i) values[i] = __fdiv_rn(values[i], scale_);
    }
  }

 private:
  static constexpr float kBeyond = 0x1p20f;  // more than the formats hold, so that infinity needs no case of its own

  JITK_DEVICE float divided(float x) const {
    const float quotient = fmaxf(fminf(x * reciprocal_, kBeyond), -kBeyond);
    const float excess = fmaf(quotient, scale_, -x);  // this way about, the quotient of -0 is -0; that of NaN is NaN again
    return fmaf(-excess, reciprocal_, quotient);
  }

  float scale_;
  float reciprocal_;
};

}  // namespace device

namespace device::math {

inline constexpr float FP8_E4M3_MAX = DTypeTrait<fp8_e4m3_t>::kFloatMax;

}  // namespace device::math
}  // namespace jitk

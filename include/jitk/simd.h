// fp32 arithmetic over rows of fp32_t, fp16_t or bf16_t, as wide as the CPU's registers: element by element, and sums.
//
//   const float square = simd::sum(width, [](simd::Floats x) { return x * x; }, x_row);
//   simd::transform(width, out_row, [](simd::Floats x, simd::Floats y) { return x * simd::sigmoid(y); }, x_row, y_row);
//
// Floats is a vector in the compiler's own extension: + - * / and ?: act on each lane, at any optimisation level and without
// intrinsics. Loops over scalars would leave the same to the auto-vectoriser, which has no fp16 conversion (gcc 12) and spends
// eight mask instructions on two nested selects for AVX-512. <immintrin.h> stays out because it alone compiles in 0.3 s.
//
// Errors are the largest against fp64, in units in the last place of the fp32 result, over every float between 2^-13 and 2^7 in
// magnitude and every 61st other: with FMA (AVX2 and AVX-512 agree to the bit) / without it (SSE2). NaN and infinity are exact.
//
// Rows of one call may differ in element type. Left out: reductions other than sums, prefix sums, fp64.
#pragma once

#include <jitk/dtype.h>  // fp32_t, fp16_t, bf16_t, rounding::

#include <cstring>  // memcpy, the unaligned load and store
#include <utility>  // integer_sequence, the indices of a shuffle

namespace jitk {
namespace host {
namespace simd {

#if defined(__AVX512F__)
constexpr int32_t kLanes = 16;
constexpr int16_t kAllLanes = -1;  // a mask that masks nothing
#elif defined(__AVX2__)
constexpr int32_t kLanes = 8;
#else
constexpr int32_t kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

// What one load or store moves. Two vectors, because as many 16-bit values fill one: then bf16 is split by a shift and a mask,
// where widening it in order takes shuffles across the register.
struct Block {
  Floats first, second;
};
constexpr int32_t kBlock = 2 * kLanes;

// Whether load puts the elements with even indices first. Otherwise they are in order.
template <typename T>
constexpr bool kEvenFirst = false;
template <>
inline constexpr bool kEvenFirst<bf16_t> = true;

inline Floats filled(float value) { return Floats{} + value; }

// The larger, or the smaller, of the two; NaN where x is NaN. Every compiler gets the selects right, but gcc (seen in 12) does
// not find the instruction in them, and silu loses an eighth of its speed to the masks (Zen 4, AVX-512, November 2026).
#if !defined(__SSE2__) || defined(__clang__)
inline Floats at_least(Floats x, float low) { return x < low ? filled(low) : x; }
inline Floats at_most(Floats x, float high) { return x > high ? filled(high) : x; }
#elif defined(__AVX512F__)
inline Floats at_least(Floats x, float low) { return __builtin_ia32_maxps512_mask(filled(low), x, x, kAllLanes, 4); }
inline Floats at_most(Floats x, float high) { return __builtin_ia32_minps512_mask(filled(high), x, x, kAllLanes, 4); }
#elif defined(__AVX2__)
inline Floats at_least(Floats x, float low) { return __builtin_ia32_maxps256(filled(low), x); }
inline Floats at_most(Floats x, float high) { return __builtin_ia32_minps256(filled(high), x); }
#else
inline Floats at_least(Floats x, float low) { return __builtin_ia32_maxps(filled(low), x); }
inline Floats at_most(Floats x, float high) { return __builtin_ia32_minps(filled(high), x); }
#endif

// x itself, which a compiler may then not compute together with what uses it: no FMA of x * y and a sum, whose rest is not that
// of the rounded product.
inline Floats rounded(Floats x) {
#if defined(__SSE2__)
  __asm__("" : "+x"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// One vector at a time: gcc copies a whole Block through the stack, which makes fp32 rows 4 times slower (gcc 12, AVX2).
template <typename Vector>
inline Vector read(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <typename Vector>
inline void write(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline Block load(const fp32_t* from) { return {read<Floats>(from), read<Floats>(from + kLanes)}; }
inline void store(fp32_t* to, Block block) {
  write(to, block.first);
  write(to + kLanes, block.second);
}

inline Block load(const bf16_t* from) {
  const Words pairs = read<Words>(from);
  return {bits_as<Floats>(pairs << 16), bits_as<Floats>(pairs & 0xffff0000u)};
}
inline void store(bf16_t* to, Block block) {
  const Words first = rounding::fp32_to_bf16<Words>(block.first);
  const Words second = rounding::fp32_to_bf16<Words>(block.second);
  write(to, first >> 16 | (second & 0xffff0000u));
}

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__F16C__))
using Halves = int16_t __attribute__((vector_size(2 * kLanes)));

inline Floats widen(Halves halves) {
#if defined(__AVX512F__)
  return __builtin_ia32_vcvtph2ps512_mask(halves, Floats{}, kAllLanes, 4);
#else
  return __builtin_ia32_vcvtph2ps256(halves);
#endif
}
inline Halves narrow(Floats x) {
  constexpr int32_t kNearestEven = 0;
#if defined(__AVX512F__)
  return __builtin_ia32_vcvtps2ph512_mask(x, kNearestEven, Halves{}, kAllLanes);
#else
  return __builtin_ia32_vcvtps2ph256(x, kNearestEven);
#endif
}

inline Block load(const fp16_t* from) { return {widen(read<Halves>(from)), widen(read<Halves>(from + kLanes))}; }
inline void store(fp16_t* to, Block block) {
  write(to, narrow(block.first));
  write(to + kLanes, narrow(block.second));
}
#else
template <>
inline constexpr bool kEvenFirst<fp16_t> = true;

inline Block load(const fp16_t* from) {
  const Words pairs = read<Words>(from);
  return {rounding::fp16_to_fp32<Floats>(pairs & 0xffffu), rounding::fp16_to_fp32<Floats>(pairs >> 16)};
}
inline void store(fp16_t* to, Block block) {
  write(to, rounding::fp32_to_fp16<Words>(block.first) | rounding::fp32_to_fp16<Words>(block.second) << 16);
}
#endif

// exp(x) is 2^n * exp(r) with |r| <= ln(2) / 2.
struct Reduced {
  Floats n;
  Floats r;
  Words bits;  // n + 254 in the lowest nine
};

inline Reduced reduce(Floats x) {
  constexpr float kRound = 0x1.8p23f + 254.f;  // the sum has no bits left for a fraction
  constexpr float kLn2High = 0.693359375f;     // few enough bits that n * kLn2High is exact, also without FMA
  constexpr float kLn2Low = -2.12194440e-4f;
  const Floats rounded = x * 1.44269504f + kRound;
  const Floats n = rounded - kRound;
  return {n, x - n * kLn2High - n * kLn2Low, bits_as<Words>(rounded)};
}

// For n from -250 to 128; the result overflows to infinity and underflows through the subnormals to zero.
inline Floats exp(Reduced x) {
  const Floats r = x.r;
  // Minimax for the relative error of exp(r), 3.1e-9 before rounding.
  Floats p = 0x1.6a225ap-10f * r + 0x1.123b02p-7f;
  p = p * r + 0x1.5558f8p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = r * r * p + r + 1.f;
#if defined(__AVX512F__)
  return __builtin_ia32_scalefps512_mask(p, x.n, p, kAllLanes, 4);
#else
  // 2^n as two factors, because n may pass the exponents of finite floats at both ends.
  const Words half = x.bits >> 1;
  return p * bits_as<Floats>((x.bits - half) << 23) * bits_as<Floats>(half << 23);
#endif
}

// Error 1.02 / 0.99.
inline Floats exp(Floats x) { return exp(reduce(at_most(at_least(x, -104.f), 89.f))); }

// Error 2.5 / 2.5 down to -88.72; below, exp(-x) overflows and the result is 0, as PyTorch's is.
inline Floats sigmoid(Floats x) { return 1.f / (1.f + exp(-x)); }

// 0.5 * (1 + erf(x / sqrt(2))), without the cancellation of this form for x < 0. Error 6.2 / 7.6, where x < 0.
inline Floats gaussian_cdf(Floats x) {
  const Floats t = at_most(bits_as<Floats>(bits_as<Words>(x) & 0x7fffffffu), 15.f);
  // -t^2 / 2 in two parts, of which the first is exact: exp turns an absolute error of its argument into a relative one.
  const Floats head = bits_as<Floats>(bits_as<Words>(t) & 0xfffff000u);
  const Floats half = -0.5f * head;
  Reduced square = reduce(half * head);
  square.r += (t - head) * (half - 0.5f * t);
  // (1 - cdf(t)) / exp(-t^2 / 2), minimax on [0, 14.3] for the relative error, 8.6e-9 before rounding.
  Floats p = 0x1.6a4786p-8f * t + 0x1.bf8ca8p-5f;
  p = p * t + 0x1.f8fe2ap-3f;
  p = p * t + 0x1.2e33d2p-1f;
  p = p * t + 0x1.591236p-1f;
  Floats q = 0x1.c60b60p-7f * t + 0x1.187a6cp-3f;
  q = q * t + 0x1.437262p-1f;
  q = q * t + 0x1.9e834ep+0f;
  q = q * t + 0x1.20c3c6p+1f;
  q = q * t + 0x1.591236p+0f;
  const Floats tail = exp(square) * p / q;
  return x < 0.f ? tail : 1.f - tail;
}

template <int32_t... kFirst, int32_t... kSecond>
inline Block shuffled(Block in, std::integer_sequence<int32_t, kFirst...>, std::integer_sequence<int32_t, kSecond...>) {
#if defined(__clang__)
  return {__builtin_shufflevector(in.first, in.second, kFirst...), __builtin_shufflevector(in.first, in.second, kSecond...)};
#else
  using Indices = int32_t __attribute__((vector_size(4 * kLanes)));
  return {__builtin_shuffle(in.first, in.second, Indices{kFirst...}),
          __builtin_shuffle(in.first, in.second, Indices{kSecond...})};
#endif
}

template <int32_t... I>
inline Block even_first(Block in, std::integer_sequence<int32_t, I...>) {
  return shuffled(in, std::integer_sequence<int32_t, 2 * I...>{}, std::integer_sequence<int32_t, 2 * I + 1 ...>{});
}
template <int32_t... I>
inline Block in_order(Block in, std::integer_sequence<int32_t, I...>) {
  return shuffled(in, std::integer_sequence<int32_t, I / 2 + I % 2 * kLanes...>{},
                  std::integer_sequence<int32_t, (I + kLanes) / 2 + I % 2 * kLanes...>{});
}

// The elements in the order in which a block of `Like` has them.
template <typename Like, typename T>
inline Block load_like(const T* from) {
  using Lanes = std::make_integer_sequence<int32_t, kLanes>;
  if constexpr (kEvenFirst<Like> == kEvenFirst<T>) {
    return load(from);
  } else if constexpr (kEvenFirst<Like>) {
    return even_first(load(from), Lanes{});
  } else {
    return in_order(load(from), Lanes{});
  }
}

// The first n of a block; the rest is zero.
template <typename Like, typename T>
inline Block load_like(const T* from, int64_t n) {
  T block[kBlock] = {};
  std::memcpy(block, from, n * sizeof(T));
  return load_like<Like>(block);
}

template <typename T>
inline void store(T* to, Block block, int64_t n) {
  T whole[kBlock];
  store(whole, block);
  std::memcpy(to, whole, n * sizeof(T));
}

template <typename Op, typename... Blocks>
inline Block apply(const Op& op, Blocks... in) {
  return {op(in.first...), op(in.second...)};
}

// out[i] = op(in[i]...) for i in [0, n). `out` may be one of the inputs.
template <typename T, typename Op, typename... In>
inline void transform(int64_t n, T* out, const Op& op, const In*... in) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) store(out + i, apply(op, load_like<T>(in + i)...));
  if (i < n) store(out + i, apply(op, load_like<T>(in + i, n - i)...), n - i);
}

inline float sum_of_lanes(Floats x) {
  float lanes[kLanes];
  write(lanes, x);
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The sum of op(in[i]...) over i in [0, n).
//
// In short runs, whose sums are then added: of 65536 elements fewer than 200 follow each other in one chain of additions. The
// order depends on n, the element types and the width of the registers alone.
template <typename Op, typename T, typename... In>
inline float sum(int64_t n, const Op& op, const T* in, const In*... more) {
  constexpr int64_t kRun = 64 * kBlock;
  Floats total{};
  int64_t i = 0;
  while (i + 2 * kBlock <= n) {
    // Four sums, because an addition waits for the one before it for as long as four take that do not.
    Floats a{}, b{}, c{}, d{};
    for (const int64_t end = i + kRun; i < end && i + 2 * kBlock <= n; i += 2 * kBlock) {
      const Block one = apply(op, load(in + i), load_like<T>(more + i)...);
      const Block two = apply(op, load(in + i + kBlock), load_like<T>(more + i + kBlock)...);
      a += one.first, b += one.second, c += two.first, d += two.second;
    }
    total += (a + b) + (c + d);
  }
  for (; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    Block rest = apply(op, load_like<T>(in + i, count), load_like<T>(more + i, count)...);
    float ones[kBlock];
    for (float& one : ones) one = 1.f;
    const Block inside = load_like<T>(ones, count);
    total += (inside.first > 0.f ? rest.first : Floats{}) + (inside.second > 0.f ? rest.second : Floats{});
  }
  return sum_of_lanes(total);
}

}  // namespace simd
}  // namespace host
}  // namespace jitk

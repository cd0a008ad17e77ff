// Sums, maxima, minima and running sums over the lanes of a warp, or of each group of lanes in it.
//
//   warp::reduce_sum(x)            over 32 lanes, and every lane gets the result
//   warp::reduce_max<8>(x)         over each 8 neighbours
//   warp::reduce_sum<32, 8>(x)     over the 4 lanes that have the same place in their group of 8
//   warp::inclusive_sum(x)         over the lanes up to this one
//
// Every lane of the group takes part, in the same call: masks name them where a warp is not whole. A sum adds in one fixed
// order, so it is the same in every lane and in every run. A maximum or minimum passes over NaN, unless all are NaN. Types:
// integers, floats and halves, their packs (each element by itself), anything with a trait in dtype.cuh.
// Left out: whole blocks (cta.cuh).
#pragma once

#include <jitk/dtype.cuh>  // DTypeTrait

#include <cstring>  // memcpy, to shuffle a value as words

namespace jitk {
namespace device {

enum class ReductionOp : uint8_t { SUM, MAX, MIN };

}  // namespace device

namespace details {

// Whether the hardware adds, or compares, the type as a whole; else it is taken apart.
template <typename T, typename = void>
struct HasAdd : std::false_type {};
template <typename T>
struct HasAdd<T, std::void_t<decltype(&DTypeTrait<T>::add)>> : std::true_type {};
template <typename T, typename = void>
struct HasMax : std::false_type {};
template <typename T>
struct HasMax<T, std::void_t<decltype(&DTypeTrait<T>::max)>> : std::true_type {};

}  // namespace details

namespace device {

template <ReductionOp kOp, typename T>
struct ReductionTrait {
  JITK_DEVICE static T reduce(const T& x, const T& y) {
    using Trait = DTypeTrait<T>;
    if constexpr (kOp == ReductionOp::SUM && std::is_arithmetic_v<T>) {
      return static_cast<T>(x + y);
    } else if constexpr (kOp == ReductionOp::SUM && details::HasAdd<T>::value) {
      return Trait::add(x, y);
    } else if constexpr (kOp == ReductionOp::MAX && details::HasMax<T>::value) {
      return Trait::max(x, y);
    } else if constexpr (kOp == ReductionOp::MIN && details::HasMax<T>::value) {
      return Trait::min(x, y);
    } else {
      static_assert(Trait::kVecSize > 1, "the type has no such operation");
      T result;
#pragma unroll
      for (uint32_t i = 0; i < Trait::kVecSize; ++i) {
        unpack(result)[i] = ReductionTrait<kOp, typename Trait::unpacked_t>::reduce(unpack(x)[i], unpack(y)[i]);
      }
      return result;
    }
  }
};

namespace warp {

inline constexpr uint32_t kFullMask = 0xffffffffu;

// shuffle(word) for each 32-bit word of a value: the compiler's own shuffles know neither float2 nor the 8-bit floats.
template <typename T, typename Shuffle>
JITK_DEVICE T shuffle_words(const T& value, Shuffle shuffle) {
  constexpr uint32_t kWords = (sizeof(T) + 3) / 4;
  uint32_t words[kWords] = {};
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// Over the lanes whose numbers differ only in the bits from log2(kFinish) up to log2(kStart).
template <ReductionOp kOp, uint32_t kStart = kWarpThreads, uint32_t kFinish = 1, typename T>
JITK_DEVICE T reduce(T value, uint32_t active_mask = kFullMask) {
  static_assert(kStart <= kWarpThreads && kFinish >= 1 && kFinish <= kStart, "reduce<kOp, 32, 1> is the whole warp");
  static_assert((kStart & (kStart - 1)) == 0 && (kFinish & (kFinish - 1)) == 0, "a group is a power of two of lanes");
  constexpr bool kWhole = kStart == kWarpThreads && kFinish == 1;
  if constexpr (kWhole && kHasWarpReduceInteger && std::is_integral_v<T> && sizeof(T) <= 4) {
    if constexpr (kOp == ReductionOp::SUM) return static_cast<T>(__reduce_add_sync(active_mask, value));
    if constexpr (kOp == ReductionOp::MAX) return static_cast<T>(__reduce_max_sync(active_mask, value));
    if constexpr (kOp == ReductionOp::MIN) return static_cast<T>(__reduce_min_sync(active_mask, value));
#if JITK_HAS_REDUX_F32
  } else if constexpr (kWhole && std::is_same_v<T, fp32_t> && kOp != ReductionOp::SUM) {
    if constexpr (kOp == ReductionOp::MAX) {
      asm volatile("redux.sync.max.f32 %0, %0, %1;" : "+f"(value) : "r"(active_mask));
    } else {
      asm volatile("redux.sync.min.f32 %0, %0, %1;" : "+f"(value) : "r"(active_mask));
    }
    return value;
#endif
  } else {
#pragma unroll
    for (uint32_t distance = kStart / 2; distance >= kFinish; distance /= 2) {
      const T other = shuffle_words(value, [=](uint32_t word) { return __shfl_xor_sync(active_mask, word, distance); });
      value = ReductionTrait<kOp, T>::reduce(value, other);
    }
    return value;
  }
}

template <uint32_t kStart = kWarpThreads, uint32_t kFinish = 1, typename T>
JITK_DEVICE T reduce_sum(T value, uint32_t active_mask = kFullMask) {
  return reduce<ReductionOp::SUM, kStart, kFinish>(value, active_mask);
}
template <uint32_t kStart = kWarpThreads, uint32_t kFinish = 1, typename T>
JITK_DEVICE T reduce_max(T value, uint32_t active_mask = kFullMask) {
  return reduce<ReductionOp::MAX, kStart, kFinish>(value, active_mask);
}
template <uint32_t kStart = kWarpThreads, uint32_t kFinish = 1, typename T>
JITK_DEVICE T reduce_min(T value, uint32_t active_mask = kFullMask) {
  return reduce<ReductionOp::MIN, kStart, kFinish>(value, active_mask);
}

// Each lane gets the result over the lanes of its group up to itself. `lane` is counted within the warp or within the group.
template <ReductionOp kOp, uint32_t kWidth = kWarpThreads, typename T>
JITK_DEVICE T inclusive_reduce(T value, uint32_t lane = get_lane_id<kWidth>(), uint32_t active_mask = kFullMask) {
  static_assert(kWidth >= 1 && kWidth <= kWarpThreads && (kWidth & (kWidth - 1)) == 0, "a group is a power of two of lanes");
#pragma unroll
  for (uint32_t distance = 1; distance < kWidth; distance *= 2) {
    const T before = shuffle_words(value, [=](uint32_t word) { return __shfl_up_sync(active_mask, word, distance, kWidth); });
    if (lane % kWidth >= distance) value = ReductionTrait<kOp, T>::reduce(before, value);
  }
  return value;
}

template <uint32_t kWidth = kWarpThreads, typename T>
JITK_DEVICE T inclusive_sum(T value, uint32_t lane = get_lane_id<kWidth>(), uint32_t active_mask = kFullMask) {
  return inclusive_reduce<ReductionOp::SUM, kWidth>(value, lane, active_mask);
}

}  // namespace warp
}  // namespace device
}  // namespace jitk

// The kernel of all rotations: of queries and keys, in place or into results, normed before or not, stored into slots or not.
//
// A team of some lanes of a warp has heads of one token and one side: queries, keys or values. Each lane has the same kItems
// units (rope_angles.cuh) of all of them, so it loads their angles and weights once; kHeads heads are in flight at a time. What
// is behind the pairs of a head are units, too, that do not turn. kItems = 0 stands for heads that no team holds, or without a
// place for 16-byte vectors: they are read again for each use, and one at a time.
#pragma once

#include "rope_angles.cuh"  // Place, Runs

#include <jitk/fp8.cuh>      // caches of 8-bit floats
#include <jitk/overlap.cuh>  // Trigger
#include <jitk/vec.cuh>      // AlignedVector
#include <jitk/warp.cuh>     // kFullMask

#include <jitk/fast_divisor.h>

#include <type_traits>  // what a form has

namespace jitk::rotary {

inline constexpr uint32_t kBlock = 128;

// What a kernel does. `Stored` is the dtype of caches, or void.
template <typename Element, typename AnglesOf, bool kNorms, typename StoredAs, bool kWritesInPlace>
struct Form {
  using T = Element;
  using Angles = AnglesOf;
  using Stored = StoredAs;
  static constexpr bool kNorm = kNorms;
  static constexpr bool kStores = !std::is_void_v<StoredAs>;
  static constexpr bool kInPlace = kWritesInPlace;
};

// Queries, keys or values. Strides count elements.
struct Side {
  const void* from;
  void* to;
  int64_t from_batch, from_token, from_head;
  int64_t to_batch, to_token, to_head;
  void* cache;
  int64_t cache_block, cache_slot, cache_head;
  const float* scale;  // of a cache of 8-bit floats, or null
  const void* weight;  // of the norm, or null
  float inverse_width;
  uint32_t width;   // elements of a head
  uint32_t heads;   // of a token
  uint32_t teams;   // of a token
  uint32_t turned;  // units of a head that turn; they are the first ones
  uint32_t units;   // that are looked at
};

template <typename F>
struct Call {
  Side sides[3];
  typename F::Angles angles;
  FastDivisor teams;       // of a token
  FastDivisor batch_size;  // tokens of a batch
  FastDivisor block_size;  // slots of a block
  int64_t first_token;
  const void* indices;
  int64_t index_stride;
  device::Bounds slots;
  int64_t slot_count;
  uint32_t tokens;  // of this launch
  uint32_t rounds;  // in which a team has all of its heads
  uint32_t lanes_log2;
  uint32_t half;  // elements from a pair's first to its second
  float eps;
  float one_plus;
  Kind weight_kind;
  bool is_batched;
  bool are_indices_wide;
  Trigger trigger;
};

// Which units of a head a lane has.
template <bool kNeox, uint32_t kVec, uint32_t kItems>
struct Units {
  uint32_t lane, lanes, turned, count, half, width;
  Place held[kItems > 0 ? kItems : 1] = {};

  // Ahead of a wait what would be computed behind it.
  JITK_DEVICE void settle() {
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      held[i] = find(lane + i * lanes);
      device::keep_in_register(held[i].first);
      device::keep_in_register(held[i].second);
    }
    device::keep_in_register(turned);
    device::keep_in_register(count);
    device::keep_in_register(width);
  }
  JITK_DEVICE Place place(uint32_t i, uint32_t u) const { return kItems > 0 ? held[i] : find(u); }
  JITK_DEVICE Place find(uint32_t u) const {
    if (u >= turned) {
      const uint32_t first = (turned + u) * kVec;
      return {first, first + (count - turned) * kVec};
    }
    if (!kNeox && kVec == 1) return {2 * u, 2 * u + 1};
    return {u * kVec, half + u * kVec};
  }
  // A last vector that is no unit's first has no second.
  JITK_DEVICE bool has_second(Place place) const { return place.second < width; }

  template <typename Body>
  JITK_DEVICE void each(const Body& body) const {
    if constexpr (kItems > 0) {
#pragma unroll
      for (uint32_t i = 0; i < kItems; ++i) {
        const uint32_t u = lane + i * lanes;
        if (u < count) body(i, u);
      }
    } else {
      for (uint32_t u = lane; u < count; u += lanes) body(0, u);
    }
  }
};

// N floats as elements of another type, in vectors of at most 16 bytes.
template <typename To, uint32_t kCount>
JITK_DEVICE void store_converted(const float (&values)[kCount], To* to) {
  constexpr uint32_t kPart = kCount * sizeof(To) <= 16 ? kCount : 16 / sizeof(To);
#pragma unroll
  for (uint32_t i = 0; i < kCount; i += kPart) {
    float part[kPart];
#pragma unroll
    for (uint32_t e = 0; e < kPart; ++e) part[e] = values[i + e];
    device::AlignedVector<To, kPart> vector;
    if constexpr (sizeof(To) == 1) {
#pragma unroll
      for (uint32_t e = 0; e + 1 < kPart; e += 2) {
        *reinterpret_cast<packed_t<To>*>(vector.data() + e) = device::cast<packed_t<To>>(fp32x2_t{part[e], part[e + 1]});
      }
      if constexpr (kPart == 1) vector[0] = device::cast<To>(part[0]);
    } else {
      device::from_floats(part, vector);
    }
    vector.store(to + i);
  }
}

// How many blocks an SM shall hold: as many as registers allow with hardly one spilled, which the compiler finds only if told.
// Measured on an H200: up to 13 percent.
template <typename F, uint32_t kItems, bool kAhead>
inline constexpr uint32_t kLeastBlocks = kItems != 1                          ? 1
                                         : kAhead && !F::kNorm && !F::kStores ? 5
                                                                              : 4;

template <typename F, uint32_t kVec, uint32_t kItems, uint32_t kHeads, bool kAhead>
__global__ void __launch_bounds__(kBlock, (kLeastBlocks<F, kItems, kAhead>)) rope_kernel(const __grid_constant__ Call<F> call) {
  using namespace device;
  using T = typename F::T;
  using Angles = typename F::Angles;
  using Vector = AlignedVector<T, kVec>;
  constexpr bool kHolds = kItems > 0;
  constexpr uint32_t kHeld = kHolds ? kItems : 1;

  const uint32_t lanes = 1u << call.lanes_log2;
  const uint32_t lane = get_lane_id() & (lanes - 1);
  const uint32_t team = blockIdx.x * (kBlock >> call.lanes_log2) + (threadIdx.x >> call.lanes_log2);
  const auto at = call.teams.divide(team);
  const bool has_token = at.quotient < call.tokens;
  const uint32_t q_teams = call.sides[0].teams, k_teams = call.sides[1].teams;
  const uint32_t which = at.remainder < q_teams ? 0 : at.remainder < q_teams + k_teams ? 1 : 2;
  const uint32_t member = at.remainder - (which == 0 ? 0 : which == 1 ? q_teams : q_teams + k_teams);
  const Side& side = call.sides[which];

  int64_t token = call.first_token + at.quotient;
  uint32_t batch = 0;
  if constexpr (Angles::kBatches) {
    if (call.is_batched) {
      const auto in_batch = call.batch_size.divide(static_cast<uint64_t>(token));
      batch = static_cast<uint32_t>(in_batch.quotient);
      token = static_cast<int64_t>(in_batch.remainder);
    }
  }
  // Of the team's first head, and from each of its heads to the next.
  const T* from =
      static_cast<const T*>(side.from) + batch * side.from_batch + token * side.from_token + member * side.from_head;
  T* to = static_cast<T*>(side.to);
  if constexpr (!F::kInPlace) to += batch * side.to_batch + token * side.to_token + member * side.to_head;
  int64_t from_step = side.from_head * side.teams, to_step = side.to_head * side.teams;
  uint32_t teams = side.teams;
  uint32_t left = side.heads - member;  // heads from the team's first one on
  Units<Angles::kNeox, kVec, kItems> units{lane, lanes, side.turned, side.units, call.half, side.width};
  const L2Policy policy = L2Policy::evict_unchanged();
  const bool turns = side.turned > 0;
  const bool is_normed = F::kNorm && side.weight != nullptr;

  keep_in_register(from);
  keep_in_register(to);
  keep_in_register(from_step);
  keep_in_register(teams);
  keep_in_register(left);
  units.settle();
  typename Angles::Row row = call.angles.find(batch, token);
  const uint32_t* slot_place = nullptr;
  if constexpr (F::kStores) {
    slot_place = find_index(call.indices, call.are_indices_wide, token * call.index_stride);
    compute_here(slot_place);
  }
  wait_and_trigger<true>(call.trigger);
  if (!F::kNorm && !has_token) return;  // lanes without a token still take part in the sums of their warp

  if (has_token && turns) call.angles.ask(row);
  Asked asked_slot;
  if constexpr (F::kStores) {
    if (has_token && which > 0) asked_slot = Asked(slot_place, call.are_indices_wide);
  }
  int64_t slot = -1;
  typename Angles::template Unit<kVec> angles[kHeld];
  float weights[F::kNorm ? kHeld : 1][2 * kVec];
  typename F::Stored* cache = nullptr;
  const int64_t cache_step = side.cache_head * side.teams;
  float divisor = 1.0f;
  bool is_live = has_token;

  // What does not depend on the head. Called while the first heads are on their way.
  const auto load_shared = [&](uint32_t i, uint32_t u) {
    const Place place = units.place(i, u);
    if (u < units.turned) call.angles.load(row, u, place, angles[i]);
    if (is_normed) {
      with_kind(call.weight_kind, [&](auto element) {
        Runs<pointee_t<decltype(element)>, kVec, 2> both;
        both.load(0, side.weight, place.first);
        both.load(1, side.weight, units.has_second(place) ? place.second : place.first);
        both.to_floats(weights[F::kNorm ? i : 0]);
      });
#pragma unroll
      for (uint32_t e = 0; e < 2 * kVec; ++e) weights[F::kNorm ? i : 0][e] += call.one_plus;
    }
  };
  const auto prepare = [&] {
    if (has_token && turns) call.angles.arrive(row);
    if constexpr (kHolds) {
      if (has_token) units.each(load_shared);
    }
    if (has_token && turns) is_live = call.angles.admit(row, lane == 0);
    if constexpr (F::kStores) {
      asked_slot.arrive();
      slot = asked_slot.value(call.are_indices_wide);
      const bool fits = static_cast<uint64_t>(slot) < static_cast<uint64_t>(call.slot_count);
      if (__builtin_expect(!fits && slot != -1, 0)) {
        if (lane == 0) call.slots.refuse(slot, token, "jitk: indices of a KV cache");
        slot = -1;
      }
      if (slot >= 0) {
        const auto in_block = call.block_size.divide(static_cast<uint64_t>(slot));
        cache = static_cast<typename F::Stored*>(side.cache) + static_cast<int64_t>(in_block.quotient) * side.cache_block +
                static_cast<int64_t>(in_block.remainder) * side.cache_slot + member * side.cache_head;
        if (sizeof(typename F::Stored) == 1 && side.scale != nullptr) divisor = *side.scale;
      }
    }
  };

  Vector x[kHeads][kHeld][2];
  Vector next[kAhead ? kHeads : 1][kHeld][2];
  const auto load = [&](Vector(&into)[2], const T* head, Place place) {
    into[0].load_streaming(head + place.first, 0, policy);
    if (units.has_second(place)) {
      into[1].load_streaming(head + place.second, 0, policy);
    } else {
      into[1].fill(cast<T>(0.0f));
    }
  };
  // The heads of a round, of which `there` are left.
  const auto load_round = [&](auto& into, const T* head, uint32_t there) {
#pragma unroll
    for (uint32_t j = 0; j < kHeads; ++j) {
      if (has_token && j * teams < there) {
        units.each([&](uint32_t i, uint32_t u) { load(into[j][i], head + j * from_step, units.place(i, u)); });
      }
    }
  };

  if constexpr (kAhead) load_round(x, from, left);
  for (uint32_t round = 0; round < call.rounds; ++round) {
    const auto has_head = [&](uint32_t j) { return j * teams < left; };
    const uint32_t left_then = left > kHeads * teams ? left - kHeads * teams : 0;
    if constexpr (kAhead) {
      if (round + 1 < call.rounds) load_round(next, from + kHeads * from_step, left_then);
    } else if constexpr (kHolds) {
      load_round(x, from, left);
    }
    if (round == 0) prepare();

    float scales[kHeads];
    if constexpr (F::kNorm) {
#pragma unroll
      for (uint32_t j = 0; j < kHeads; ++j) {
        scales[j] = 0.0f;
        if (is_live && has_head(j)) {
          units.each([&](uint32_t i, uint32_t u) {
            if constexpr (!kHolds) load(x[j][i], from + j * from_step, units.place(i, u));
            float first[kVec], second[kVec];
            to_floats(x[j][i][0], first);
            to_floats(x[j][i][1], second);
#pragma unroll
            for (uint32_t e = 0; e < kVec; ++e) scales[j] += first[e] * first[e] + second[e] * second[e];
          });
        }
      }
      for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (uint32_t j = 0; j < kHeads; ++j) scales[j] += __shfl_xor_sync(warp::kFullMask, scales[j], distance);
      }
#pragma unroll
      for (uint32_t j = 0; j < kHeads; ++j) scales[j] = rsqrtf(scales[j] * side.inverse_width + call.eps);
    }

#pragma unroll
    for (uint32_t j = 0; j < kHeads; ++j) {
      if (!is_live || !has_head(j)) continue;
      T* const head = F::kInPlace ? const_cast<T*>(from) + j * from_step : to + j * to_step;
      units.each([&](uint32_t i, uint32_t u) {
        const Place place = units.place(i, u);
        if constexpr (!kHolds) {
          load(x[j][i], from + j * from_step, place);
          load_shared(i, u);
        }
        float values[2][kVec];
        to_floats(x[j][i][0], values[0]);
        to_floats(x[j][i][1], values[1]);
        if (is_normed) {
#pragma unroll
          for (uint32_t e = 0; e < 2 * kVec; ++e) {
            float& value = values[e / kVec][e % kVec];
            value = value * scales[j] * weights[F::kNorm ? i : 0][e];  // scale * weight may be infinite
          }
        }
        if (u < units.turned) Angles::turn(angles[i], values[0], values[1]);
        // Values, and what neither turns nor is normed, are what they were.
        const bool is_new = !F::kInPlace || u < units.turned || is_normed;
#pragma unroll
        for (uint32_t v = 0; v < 2; ++v) {
          if (v == 1 && !units.has_second(place)) continue;
          const uint32_t offset = v == 0 ? place.first : place.second;
          if (is_new) {
            from_floats(values[v], x[j][i][v]);
            x[j][i][v].store(head + offset, 0, policy);
          }
          if constexpr (F::kStores) {
            if (slot < 0) continue;
            auto* const stored = cache + j * cache_step + offset;
            if constexpr (std::is_same_v<T, typename F::Stored>) {
              x[j][i][v].store(stored);
            } else {
              to_floats(x[j][i][v], values[v]);  // as they are rounded in place
              if constexpr (sizeof(typename F::Stored) == 1) {
                if (side.scale != nullptr) Fp8Scale<T>(divisor).divide(values[v]);
              }
              store_converted(values[v], stored);
            }
          }
        }
      });
    }
    // The team's next heads.
    from += kHeads * from_step;
    if constexpr (!F::kInPlace) to += kHeads * to_step;
    if constexpr (F::kStores) cache += kHeads * cache_step;
    left = left_then;
    if constexpr (kAhead) {
#pragma unroll
      for (uint32_t j = 0; j < kHeads; ++j) {
#pragma unroll
        for (uint32_t i = 0; i < kHeld; ++i) {
          x[j][i][0] = next[j][i][0];
          x[j][i][1] = next[j][i][1];
        }
      }
    }
  }
  PDLTriggerSecondary<true>();
}

}  // namespace jitk::rotary

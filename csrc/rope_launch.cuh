// Launches a rotation: how wide vectors are, how many lanes have a head, and how many heads a lane has.
//
//   Call<F> call = ...;                         where everything is; its plan is made here
//   launch<F>(call, tokens, rope_dim, places, device);
#pragma once

#include "rope_kernel.cuh"

#include <jitk/launch.cuh>
#include <jitk/overlap.cuh>  // choose_trigger

namespace jitk::rotary {

inline constexpr uint32_t kVectorBytes = 16;
inline constexpr uint32_t kMostUnits = 64;  // of a head that a team holds: two to a lane
inline constexpr int64_t kFewLanes = 1024;  // of an SM: up to here each head has a team of its own

inline constexpr int64_t kLanesAtOnce = 640;  // of an SM: so many it holds where nothing is loaded ahead

// How many heads of 32 units a lane has in flight, where tokens are many. What has to be asked for before a head can turn, a
// position and then its angles, is spread over more of them by rounds. Measured on an H200: `bench kernels`.
template <typename F>
inline constexpr uint32_t kHeadsInFlight = F::Angles::kBatches ? 4 : 2;

// The most rounds, of 4, 2 and 1, that leave the GPU enough threads, and few lanes without a head.
template <typename F>
uint32_t choose_rounds(const Call<F>& call, int64_t tokens, int64_t lanes, uint32_t heads_in_flight, int64_t sms) {
  if (F::Angles::kBatches) return 1;
  for (uint32_t rounds = 4; rounds > 1; rounds /= 2) {
    const uint32_t at_most = heads_in_flight * rounds;
    int64_t teams = 0, heads = 0;
    for (const Side& side : call.sides) {
      teams += host::div_ceil(side.heads, at_most);
      heads += side.heads;
    }
    const int64_t threads_of_sm = F::kNorm ? 300 : rounds == 4 ? 2048 : 512;
    if (tokens * teams * lanes >= sms * threads_of_sm && 10 * heads >= 7 * teams * at_most) return rounds;
  }
  return 1;
}

// Which kernel, and how its lanes are used.
struct Choice {
  bool few;        // tokens have the GPU to themselves
  uint32_t items;  // units of a lane; 0: as many as there are
  uint32_t heads;  // of a team that are in flight
  uint32_t rounds;
  bool ahead;  // the heads of a round are loaded while those of the one before turn
};

inline uint32_t log2_ceil(uint32_t n) {
  uint32_t log2 = 0;
  while (uint32_t{1} << log2 < n) ++log2;
  return log2;
}

// Whether vectors of `vec` elements have a place everywhere.
template <typename F>
bool fits(const Call<F>& call, uint32_t vec, Kind angles, uint64_t angle_places) {
  using T = typename F::T;
  if (vec == 1) return true;
  uint64_t places = host::strides_of<T>(int64_t{call.half});
  uint64_t stored = 0, weights = 0;
  for (const Side& side : call.sides) {
    places |=
        host::places(side.from, side.to) | host::strides_of<T>(side.from_batch, side.from_token, side.from_head, side.to_batch,
                                                               side.to_token, side.to_head, int64_t{side.width});
    weights |= host::place(side.weight);
    if constexpr (F::kStores) {
      stored |=
          host::place(side.cache) | host::strides_of<typename F::Stored>(side.cache_block, side.cache_slot, side.cache_head);
    }
  }
  if (places % (vec * sizeof(T)) != 0) return false;
  if (weights % floats_alignment(call.weight_kind, vec) != 0) return false;
  if (angle_places % floats_alignment(angles, F::Angles::run(vec)) != 0) return false;
  if constexpr (F::kStores) {
    const uint64_t bytes = vec * sizeof(typename F::Stored);
    if (stored % (bytes < 16 ? bytes : 16) != 0) return false;
  }
  return true;
}

template <typename F>
auto kernel_for(uint32_t vec, const Choice& choice) -> void (*)(Call<F>) {
  constexpr uint32_t kWide = kVectorBytes / sizeof(typename F::T), kPair = 4 / sizeof(typename F::T);
  constexpr uint32_t kHeads = kHeadsInFlight<F>;
  if (vec == kWide && choice.items > 0) {
    if (choice.few && choice.items == 1) return rope_kernel<F, kWide, 1, 1, false>;
    if constexpr (F::Angles::kBatches) {
      return choice.items == 1 ? rope_kernel<F, kWide, 1, kHeads, false> : rope_kernel<F, kWide, 2, kHeads / 2, false>;
    } else {
      if (choice.items == 2) return rope_kernel<F, kWide, 2, kHeads / 2, true>;
      if constexpr (!F::kNorm) {
        if (!choice.ahead) return rope_kernel<F, kWide, 1, kHeads, false>;
      }
      return rope_kernel<F, kWide, 1, kHeads, true>;
    }
  }
  if (vec == kPair) return rope_kernel<F, kPair, 0, 1, false>;
  return rope_kernel<F, 1, 0, 1, false>;
}

// Of a head of `width` elements, of which those that turn, 2 * half, come first: how many units are looked at.
inline uint32_t units_of(uint32_t width, uint32_t half, uint32_t vec, bool rest) {
  const uint32_t turned = half / vec;
  return rest ? turned + host::div_ceil(width / vec - 2 * turned, 2u) : turned;
}

template <typename F>
void launch(Call<F> call, int64_t tokens, Kind angles, uint64_t angle_places, DLDevice device) {
  using namespace host;
  constexpr uint32_t kWide = kVectorBytes / sizeof(typename F::T), kPair = 4 / sizeof(typename F::T);
  uint32_t vec = fits(call, kWide, angles, angle_places) ? kWide : fits(call, kPair, angles, angle_places) ? kPair : 1;
  const auto count_units = [&] {
    uint32_t most = 0;
    for (int32_t i = 0; i < 3; ++i) {
      Side& side = call.sides[i];
      const bool turns = i < 2;
      // What neither turns nor is normed stays where it is, but in results and in slots it has to get.
      const bool rest = F::kNorm || !F::kInPlace || (F::kStores && i > 0);
      side.turned = turns ? call.half / vec : 0;
      side.units = side.heads == 0 ? 0 : units_of(side.width, turns ? call.half : 0, vec, rest);
      most = max(most, side.units);
    }
    return most;
  };
  uint32_t units = count_units();
  if (vec == kWide && vec > kPair && units > kMostUnits) {
    vec = kPair;
    units = count_units();
  }
  const int64_t heads = int64_t{call.sides[0].heads} + call.sides[1].heads + call.sides[2].heads;
  if (tokens == 0 || heads == 0 || units == 0) return;

  const int64_t sms = runtime::get_sm_count(device.device_id);
  Choice choice{true, 0, 1, 1, false};
  if (vec == kWide && units <= kMostUnits) {
    const int64_t width = int64_t{1} << log2_ceil(min(units, 32u));
    choice.few = tokens * heads * width <= sms * kFewLanes;
    choice.items = units > 32 ? 2 : 1;
    if (!choice.few || choice.items == 2) {
      choice.heads = kHeadsInFlight<F> / choice.items;
      choice.rounds = choose_rounds(call, tokens, width, choice.heads, sms);
    }
  }
  const uint32_t lanes = choice.items == 0 ? min(units, 32u) : div_ceil(units, choice.items);
  call.lanes_log2 = log2_ceil(lanes);
  call.rounds = choice.rounds;
  int64_t teams = 0;
  for (Side& side : call.sides) {
    side.teams = div_ceil(side.heads, choice.heads * choice.rounds);
    teams += side.teams;
  }
  choice.ahead = choice.rounds > 1 && (tokens * teams << call.lanes_log2) > sms * kLanesAtOnce;
  call.teams = FastDivisor(static_cast<uint64_t>(teams));

  // Teams are counted in 32 bits.
  const int64_t tokens_per_launch = max((int64_t{1} << 30) / teams, int64_t{1});
  for (int64_t done = 0; done < tokens; done += tokens_per_launch) {
    call.first_token = done;
    call.tokens = static_cast<uint32_t>(min(tokens - done, tokens_per_launch));
    const int64_t grid = div_ceil(call.tokens * teams, int64_t{kBlock >> call.lanes_log2});
    // Of many tokens' blocks the next kernel's are held up by none.
    call.trigger = choice.few ? choose_trigger(grid * kBlock, kBlock, sms) : Trigger::kBeforeWait;
    LaunchKernel(grid, kBlock, device).enable_pdl()(kernel_for<F>(vec, choice), call);
  }
}

}  // namespace jitk::rotary

// Which vectors of a row a thread of the row's team has.
//
//   const auto member = team::join<kTeam>(lanes_log2);
//   const Share<kTeam, 4> share(member, width / kVec);                           four vectors a thread, held in registers
//   AlignedVector<T, kVec> x[4];
//   share.each([&](uint32_t i, uint32_t at) { x[i].load(row, at); });            this thread's i-th vector, the row's `at`
//
// Share<kTeam, 0> is for rows of any length, whose vectors a thread does not hold: i is always 0, and `at` has 64 bits.
// Left out: the choice of the team and of the number (spread.cuh).
#pragma once

#include <jitk/team.cuh>  // Team, Member

#include <type_traits>  // conditional

namespace jitk::device {

template <Team kTeam, uint32_t kItems>
struct Share {
  static constexpr bool kHolds = kItems > 0;
  using Index = std::conditional_t<kHolds, uint32_t, int64_t>;

  uint32_t lane;
  uint32_t lanes;
  Index vectors;  // in the row; 0 for a team without one
  uint32_t neighbours;
  uint32_t first;

  JITK_DEVICE Share(const team::Member<kTeam>& member, Index vectors)
      : lane(member.lane), lanes(member.lanes), vectors(vectors), neighbours(kTeam == Team::kLanes ? lanes : kWarpThreads) {
    // A warp's vectors are next to each other, which memory likes better than the same place in each kItems-th of the row.
    const uint32_t near = lane & (neighbours - 1);
    first = (member.part * lanes + lane - near) * kItems + near;
  }

  template <typename Body>
  JITK_DEVICE void each(const Body& body) const {
    if constexpr (kHolds) {
#pragma unroll
      for (uint32_t i = 0; i < kItems; ++i) {
        const uint32_t at = first + i * neighbours;
        if (at < vectors) body(i, at);
      }
    } else {
      for (Index at = lane; at < vectors; at += lanes) body(0, at);
    }
  }
};

}  // namespace jitk::device

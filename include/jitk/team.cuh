// A team: the threads that reduce together. Some lanes of a warp, a warp, a block, or a cluster of blocks.
//
//   template <Team kTeam>
//   __global__ void row_kernel(const __grid_constant__ Params params) {
//     __shared__ team::Buffer<kTeam, float> buffer;
//     const auto member = team::join<kTeam>(params.lanes_log2);
//     const int64_t row = member.team();                          one team a row
//     for (uint32_t i = member.rank(); i < count; i += member.size()) largest = fmaxf(largest, fabsf(x[i]));
//     largest = team::max<kTeam>(member, largest, buffer);        for each thread of the team
//
// Which team a row gets is the launcher's choice; the kernel is written once. Every thread of the block joins, and takes part in
// each reduction, also where its team has no row. A buffer serves one reduction; a second one needs another, or a barrier before.
//
// A reduction combines in one fixed order, so its bits are the same in every thread and every run. A maximum passes over NaN.
// Clusters are there from Hopper on (kClusterSupported): before, a launcher does not choose them, and a kernel does not compile
// for them.
// Left out: scans (warp.cuh), minima.
#pragma once

#include <jitk/cluster.cuh>  // Team::kCluster
#include <jitk/cta.cuh>      // Team::kBlock
#include <jitk/warp.cuh>     // Team::kWarp, Team::kLanes

namespace jitk::device {

enum class Team : uint8_t { kLanes, kWarp, kBlock, kCluster };

namespace team {

// What a reduction needs of shared memory: lanes of one warp need none.
template <Team kTeam, typename T>
struct Buffer {};
template <typename T>
struct Buffer<Team::kBlock, T> {
  T warps[cta::kMaxWarps];
};
template <typename T>
struct Buffer<Team::kCluster, T> {
  T warps[cta::kMaxWarps];
  T blocks[cluster::kMaxSize];
};

// One thread's place in its team.
template <Team kTeam>
struct Member {
  uint32_t lane;        // among the threads of the team in this block
  uint32_t lanes;       // how many those are
  uint32_t part;        // of a cluster: which block this is
  uint32_t lanes_log2;  // of Team::kLanes

  JITK_DEVICE uint32_t rank() const { return part * lanes + lane; }
  JITK_DEVICE uint32_t size() const {
#if JITK_ARCH_HOPPER_OR_GREATER
    if constexpr (kTeam == Team::kCluster) return lanes * cluster::size();
#endif
    return lanes;
  }
  // The place of this thread's team in its block, and the number of teams there.
  JITK_DEVICE uint32_t team_of_block() const {
    if constexpr (kTeam == Team::kLanes) return threadIdx.x >> lanes_log2;
    return kTeam == Team::kWarp ? threadIdx.x / kWarpThreads : 0;
  }
  JITK_DEVICE uint32_t teams_of_block() const {
    if constexpr (kTeam == Team::kLanes) return blockDim.x >> lanes_log2;
    return kTeam == Team::kWarp ? blockDim.x / kWarpThreads : 1;
  }
  // The place of this thread's team in the grid.
  JITK_DEVICE int64_t team() const {
    int64_t block = blockIdx.x;
#if JITK_ARCH_HOPPER_OR_GREATER
    if constexpr (kTeam == Team::kCluster) block = blockIdx.x / cluster::size();
#endif
    return block * teams_of_block() + team_of_block();
  }
};

// Called once, at the kernel's start: the other blocks of a cluster learn that this one runs. `lanes_log2` is that of
// Team::kLanes, which are a power of two of neighbours.
template <Team kTeam>
JITK_DEVICE Member<kTeam> join(uint32_t lanes_log2 = 5) {
  static_assert(kTeam != Team::kCluster || kClusterSupported, "clusters are there from Hopper on: see kClusterSupported");
  if constexpr (kTeam == Team::kLanes) {
    const uint32_t lanes = 1u << lanes_log2;
    return {get_lane_id() & (lanes - 1), lanes, 0, lanes_log2};
  } else if constexpr (kTeam == Team::kWarp) {
    return {get_lane_id(), kWarpThreads, 0, lanes_log2};
  }
  uint32_t part = 0;
#if JITK_ARCH_HOPPER_OR_GREATER
  if constexpr (kTeam == Team::kCluster) {
    cluster::arrive();
    part = cluster::rank();
  }
#endif
  return {threadIdx.x, blockDim.x, part, lanes_log2};
}

// Called once, before the first reduction and as late as can be: all blocks of the cluster run, so one may write to another.
template <Team kTeam>
JITK_DEVICE void meet() {
#if JITK_ARCH_HOPPER_OR_GREATER
  if constexpr (kTeam == Team::kCluster) cluster::wait();
#endif
}

template <ReductionOp kOp, Team kTeam, typename T>
JITK_DEVICE T reduce(const Member<kTeam>& member, T value, Buffer<kTeam, T>& buffer) {
  if constexpr (kTeam == Team::kLanes) {
    const uint32_t lanes = 1u << member.lanes_log2;
#pragma unroll
    for (uint32_t distance = 1; distance < kWarpThreads; distance *= 2) {
      const T other =
          warp::shuffle_words(value, [=](uint32_t word) { return __shfl_xor_sync(warp::kFullMask, word, distance); });
      if (distance < lanes) value = ReductionTrait<kOp, T>::reduce(value, other);
    }
  } else if constexpr (kTeam == Team::kWarp) {
    value = warp::reduce<kOp>(value);
  } else {
    value = cta::reduce<kOp, cta::kBlockDim, cta::Buffer::kFresh>(value, buffer.warps);
#if JITK_ARCH_HOPPER_OR_GREATER
    if constexpr (kTeam == Team::kCluster) value = cluster::reduce<kOp>(value, buffer.blocks);
#endif
  }
  return value;
}

template <Team kTeam, typename T>
JITK_DEVICE T sum(const Member<kTeam>& member, T value, Buffer<kTeam, T>& buffer) {
  return reduce<ReductionOp::SUM>(member, value, buffer);
}
template <Team kTeam, typename T>
JITK_DEVICE T max(const Member<kTeam>& member, T value, Buffer<kTeam, T>& buffer) {
  return reduce<ReductionOp::MAX>(member, value, buffer);
}

}  // namespace team
}  // namespace jitk::device

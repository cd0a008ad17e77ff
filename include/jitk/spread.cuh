// How the rows of a launch are spread over threads: what a table of choices holds, and the grid that follows from a line of it.
//
//   inline constexpr Spread kSpreads[] = {{Team::kLanes, 2, 128},       two vectors a thread, blocks of 128
//                                         {Team::kBlock, 4, 0}};        four, as many warps as hold the row
//   const RowGrid grid = host::row_grid(spread, rows, vectors);
//
// A kernel is a template of team and number of vectors. It is found by a walk through the table, so that exactly the kernels
// which the table names are compiled, and a new line needs no other change:
//
//   template <uint32_t kLine = 0>
//   auto kernel_of(const Spread& spread) -> void (*)(Params) {
//     if (spread.same_kernel(kSpreads[kLine])) return row_kernel<kSpreads[kLine].team, kSpreads[kLine].items>;
//     if constexpr (kLine + 1 < lines_of(kSpreads)) return kernel_of<kLine + 1>(spread);
//     return nullptr;
//   }
//
// Left out: the table, which stands beside its kernel with what was measured; a thread's vectors (share.cuh).
#pragma once

#include <jitk/check.h>  // div_ceil

#include <jitk/team.cuh>  // Team

namespace jitk {

struct Spread {
  device::Team team;
  uint32_t items;       // vectors of a thread; 0 for any number, read again for each use
  uint32_t threads;     // of a block; 0 for as many warps as hold a row
  uint32_t blocks = 1;  // of a cluster

  // Whether both are launches of the same kernel.
  constexpr bool same_kernel(const Spread& other) const { return team == other.team && items == other.items; }
};

// A grid with a team for each row.
struct RowGrid {
  int64_t blocks;
  uint32_t threads;     // of a block
  uint32_t lanes_log2;  // of a team of lanes, for team::join
};

namespace host {

// Of a block.
constexpr uint32_t threads_of(const Spread& spread, int64_t vectors) {
  if (spread.threads != 0) return spread.threads;
  constexpr int64_t kWarp = device::kWarpThreads;
  return static_cast<uint32_t>(div_ceil(vectors, kWarp * spread.items * spread.blocks) * kWarp);
}

constexpr RowGrid row_grid(const Spread& spread, int64_t rows, int64_t vectors) {
  const uint32_t threads = threads_of(spread, vectors);
  if (spread.team == device::Team::kWarp) return {div_ceil(rows, int64_t{threads / device::kWarpThreads}), threads, 0};
  if (spread.team != device::Team::kLanes) return {rows * spread.blocks, threads, 0};
  const int64_t lanes = spread.items == 0 ? vectors : div_ceil(vectors, int64_t{spread.items});
  uint32_t lanes_log2 = 0;
  while (lanes_log2 < 5 && int64_t{1} << lanes_log2 < lanes) ++lanes_log2;
  return {div_ceil(rows, int64_t{threads >> lanes_log2}), threads, lanes_log2};
}

template <typename Line, uint32_t kLines>
constexpr uint32_t lines_of(const Line (&)[kLines]) {
  return kLines;
}

// Whether a row of `vectors` finds a place in a team of blocks of at most `max_threads`.
constexpr bool holds(const Spread& spread, int64_t vectors, uint32_t max_threads) {
  const bool is_of_warp = spread.team == device::Team::kLanes || spread.team == device::Team::kWarp;
  const uint32_t threads = is_of_warp ? device::kWarpThreads : spread.threads != 0 ? spread.threads : max_threads;
  return spread.items == 0 || vectors <= int64_t{threads} * spread.blocks * spread.items;
}

}  // namespace host
}  // namespace jitk

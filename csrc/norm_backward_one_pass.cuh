// One pass over memory, for rows that a team holds: blocks stay, and deal the rows out among their teams.
#pragma once

#include "norm_backward_part.cuh"  // Part
#include "norm_backward_row.cuh"   // Params, row_statistics

#include <jitk/launch.cuh>
#include <jitk/spread.cuh>  // Spread, row_grid
#include <jitk/team.cuh>

namespace jitk::norm_backward {

template <typename T, typename W, bool kCenters, Team kTeam, uint32_t kItems>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  extern __shared__ float warp_sums[];
  __shared__ team::Buffer<kTeam, float2> buffers[2][2];

  const team::Member<kTeam> member = team::join<kTeam>();
  const int64_t step = int64_t{gridDim.x} * member.teams_of_block();
  int64_t row = member.team();
  Part<T, W, kCenters, kTeam, kItems> part(params, member);

  PDLWaitPrimary<true>();
  if (row < params.rows) part.load(row, part.held);
  part.load_weights();
  for (uint32_t turn = 0; row < params.rows; row += step, turn ^= 1) {
    if (row + step < params.rows) part.load(row + step, part.next);
    const auto each = [&](const auto& body) { part.each_element(body); };
    part.write(row, row_statistics<kCenters>(member, each, params.inverse_width, params.eps, buffers[turn]));
    part.advance();
  }

  float* mine = params.sums + int64_t{blockIdx.x} * (kCenters ? 2 : 1) * params.width;
  part.write_sums(part.sums_w, mine, warp_sums);
  if constexpr (kCenters) part.write_sums(part.sums_b, mine + params.width, warp_sums);
  PDLTriggerSecondary<true>();
}

// A choice for rows of at most so many 16-byte vectors: a team for each row, and how many blocks an SM gets of those that share
// the rows.
struct Choice {
  int64_t vectors;
  Spread spread;
  uint32_t blocks_per_sm;
};

// The first line that fits is taken; a longer row finds no place in registers beside its sums. The microseconds are those of one
// shape in bf16, whose vectors are 8 elements (H200, 2026-11-20, docs/benchmarks.md).
inline constexpr Choice kRows[] = {
    {32, {Team::kWarp, 1, 256}, 4},   // not measured
    {64, {Team::kWarp, 2, 256}, 4},   // rmsnorm_backward (32768, 512): 30.95
    {256, {Team::kBlock, 1, 0}, 4},   // not measured
    {512, {Team::kBlock, 1, 0}, 2},   // rmsnorm_backward (4096, 4096): 29.67
    {1024, {Team::kBlock, 2, 0}, 1},  // rmsnorm_backward (16384, 8192): 200.55
    {2048, {Team::kBlock, 4, 0}, 1},  // not measured
};

constexpr bool all_hold() {
  for (const Choice& line : kRows)
    if (!host::holds(line.spread, line.vectors, kMaxThreads)) return false;
  return true;
}
static_assert(all_hold(), "a line's threads hold its rows");

// Null if no team holds a row.
inline const Choice* choose(int64_t vectors) {
  for (const Choice& line : kRows)
    if (vectors <= line.vectors) return &line;
  return nullptr;
}

inline int64_t blocks_of(const Choice& choice, int64_t rows, int64_t vectors, int64_t sms) {
  return min(sms * choice.blocks_per_sm, host::row_grid(choice.spread, rows, vectors).blocks);
}

template <typename T, typename W, bool kCenters, uint32_t kLine = 0>
auto kernel_of(const Spread& spread) -> void (*)(Params<T, W>) {
  constexpr Spread kSpread = kRows[kLine].spread;
  if (spread.same_kernel(kSpread)) return backward_kernel<T, W, kCenters, kSpread.team, kSpread.items>;
  if constexpr (kLine + 1 < host::lines_of(kRows)) return kernel_of<T, W, kCenters, kLine + 1>(spread);
  return nullptr;
}

template <typename T, typename W, bool kCenters>
void run_in_one_pass(const Params<T, W>& params, const Spread& spread, int64_t blocks, cudaStream_t stream) {
  const uint32_t threads = host::threads_of(spread, params.width / kWide<T>);
  // A block of warps adds up the sums of its rows.
  const size_t shared =
      spread.team == Team::kWarp ? threads / device::kWarpThreads * static_cast<size_t>(params.width) * sizeof(float) : 0;
  host::LaunchKernel(blocks, threads, stream, shared).enable_pdl()(kernel_of<T, W, kCenters>(spread), params);
}

}  // namespace jitk::norm_backward

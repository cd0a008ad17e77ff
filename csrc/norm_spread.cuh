// How the rows of a norm are spread over threads, as tables: a line for each case, and beside it what was measured.
//
//   const Spread spread = choose<Norm>(kWideRows, rows, vectors, sms);
//
// Some lanes of a warp take a row where rows are short, so that a block has many of them; else a block, or for long rows a
// cluster of blocks. Two vectors a thread stream best; four where a smaller block waits less for its others.
#pragma once

#include "norm_kernel.cuh"  // kMaxBlock

#include <jitk/spread.cuh>  // Spread

namespace jitk::norm {

// Few rows have the GPU to themselves, and take it.
enum class Count : uint8_t { kAny, kFew };
enum class Of : uint8_t { kAny, kAddition, kNoAddition, kCentred };

// A choice for rows of at most so many vectors.
struct Choice {
  Count rows;
  Of of;
  int64_t vectors;
  Spread spread;
};

using device::Team;
inline constexpr int64_t kShort = 128;
inline constexpr int64_t kAnyLength = INT64_MAX;

// The first line that fits is taken. The microseconds are those of one shape in bf16, whose vectors are 8 elements, and of a copy
// of its bytes (H200, 2026-11-20, docs/benchmarks.md).
// Rows of 16-byte vectors:
inline constexpr Choice kWideRows[] = {
    {Count::kFew, Of::kAny, 32, {Team::kLanes, 1, 128}},               // qknorm (128, 32 + 8, 128): 1.91
    {Count::kAny, Of::kAny, 64, {Team::kLanes, 2, 128}},               // rmsnorm (32768, 512): 17.38, copy 17.71
    {Count::kAny, Of::kAny, kShort, {Team::kLanes, 4, 64}},            // qknorm (300, 4 + 1, 1024): 3.10
    {Count::kFew, Of::kAny, 1024, {Team::kBlock, 2, 0}},               // rmsnorm (1, 8192): 1.34, copy 1.09
    {Count::kFew, Of::kAny, 4096, {Team::kCluster, 2, 0, 8}},          // rmsnorm (1, 16384): 1.55, copy 1.12
    {Count::kFew, Of::kAny, 32768, {Team::kCluster, 4, 0, 8}},         // rmsnorm (1, 65536): 2.24, copy 1.81
    {Count::kFew, Of::kNoAddition, 65536, {Team::kCluster, 8, 0, 8}},  // not measured
    {Count::kFew, Of::kAny, 2048, {Team::kBlock, 2, 0}},               // before Hopper: not measured
    {Count::kAny, Of::kAddition, 512, {Team::kBlock, 4, 0}},           // fused_add_rmsnorm (1024, 4096): 9.37, copy 9.94
    {Count::kAny, Of::kAny, 512, {Team::kBlock, 2, 0}},                // layernorm (1024, 4096): 7.31, copy 5.96
    {Count::kAny, Of::kCentred, 4096, {Team::kBlock, 4, 0}},           // layernorm (4096, 14336): 65.84, copy 57.13
    {Count::kAny, Of::kAny, 2048, {Team::kBlock, 2, 0}},               // rmsnorm (4096, 8192): 34.07, copy 33.46
    {Count::kAny, Of::kAny, 4096, {Team::kBlock, 4, 0}},               // not measured
    {Count::kAny, Of::kNoAddition, 8192, {Team::kBlock, 8, 0}},        // rmsnorm (300, 65536): 28.84, copy 20.49
    {Count::kAny, Of::kAddition, 8192, {Team::kCluster, 4, 0, 2}},     // fused_add_rmsnorm (300, 65536): 45.64, copy 38.89
    {Count::kAny, Of::kAddition, 16384, {Team::kCluster, 4, 0, 4}},    // not measured
    {Count::kAny, Of::kAddition, 32768, {Team::kCluster, 4, 0, 8}},    // not measured
    {Count::kAny, Of::kNoAddition, 16384, {Team::kCluster, 8, 0, 2}},  // not measured
    {Count::kAny, Of::kNoAddition, 32768, {Team::kCluster, 8, 0, 4}},  // not measured
    {Count::kAny, Of::kNoAddition, 65536, {Team::kCluster, 8, 0, 8}},  // not measured
    {Count::kAny, Of::kAny, kAnyLength, {Team::kBlock, 0, kMaxBlock}},
};
// Rows without a place for such vectors, read element by element or in pairs of halves:
inline constexpr Choice kNarrowRows[] = {
    {Count::kAny, Of::kAny, kShort, {Team::kLanes, 0, 128}},
    {Count::kAny, Of::kAny, 512, {Team::kBlock, 0, 128}},
    {Count::kAny, Of::kAny, 4096, {Team::kBlock, 0, 256}},
    {Count::kAny, Of::kAny, kAnyLength, {Team::kBlock, 0, kMaxBlock}},
};

template <size_t kLines>
constexpr bool all_hold(const Choice (&table)[kLines]) {
  for (const Choice& line : table)
    if (!host::holds(line.spread, line.vectors, kMaxBlock)) return false;
  return table[kLines - 1].vectors == kAnyLength;
}
static_assert(all_hold(kWideRows) && all_hold(kNarrowRows), "a line's threads hold its rows, and the last line is for all");

// Whether a line is for this norm on this GPU.
template <typename Norm>
constexpr bool is_for(const Choice& line) {
  if (line.spread.team == Team::kCluster && !device::kClusterSupported) return false;
  return line.of == Of::kAny || line.of == (Norm::kAdds ? Of::kAddition : Of::kNoAddition) ||
         (line.of == Of::kCentred && Norm::kCenters);
}

template <typename Norm, size_t kLines>
Spread choose(const Choice (&table)[kLines], int64_t rows, int64_t vectors, int64_t sms) {
  const bool few = vectors <= kShort ? rows * vectors <= sms * 1024 : rows * device::cluster::kMaxSize <= sms;
  for (const Choice& line : table) {
    if (is_for<Norm>(line) && vectors <= line.vectors && (few || line.rows == Count::kAny)) return line.spread;
  }
  return table[kLines - 1].spread;
}

}  // namespace jitk::norm

// Consecutive elements for consecutive threads, which is how a warp reads memory in whole lines.
//
//   const auto memory = tile::Memory<AlignedVector<bf16_t, 8>>::cta(kThreads);
//   for (int64_t tile = 0; memory.in_bound(count, tile); ++tile) memory.store(output, memory.load(input, tile), tile);
//
// Tile t of a group of n threads is the elements n * t to n * t + n - 1; element count and tiles are 64-bit, and there is no
// division. T is a type that moves in one instruction: an AlignedVector, a packed or a plain type.
// Left out: two-dimensional tiles, shared memory layouts.
#pragma once

#include <jitk/arch.cuh>  // get_lane_id

namespace jitk::device::tile {

template <typename T>
class Memory {
 public:
  JITK_DEVICE constexpr Memory(uint32_t thread, uint32_t threads) : thread_(thread), threads_(threads) {}

  JITK_DEVICE static constexpr Memory thread() { return {0, 1}; }
  JITK_DEVICE static Memory warp() { return {get_lane_id(), kWarpThreads}; }
  // A part of a warp: a power of two of lanes.
  JITK_DEVICE static Memory warp(uint32_t lanes) { return {get_lane_id() & (lanes - 1), lanes}; }
  // A constant number of threads saves a multiplication per access.
  JITK_DEVICE static Memory cta(uint32_t threads) { return {threadIdx.x, threads}; }
  JITK_DEVICE static Memory cta() { return cta(blockDim.x); }

  JITK_DEVICE T load(const void* data, int64_t tile = 0) const { return static_cast<const T*>(data)[index(tile)]; }
  JITK_DEVICE void store(void* data, T value, int64_t tile = 0) const { static_cast<T*>(data)[index(tile)] = value; }
  // Whether this thread's element of the tile is one of `count` elements.
  JITK_DEVICE bool in_bound(int64_t count, int64_t tile = 0) const { return index(tile) < count; }

 private:
  JITK_DEVICE int64_t index(int64_t tile) const { return tile * threads_ + thread_; }

  uint32_t thread_;
  uint32_t threads_;
};

}  // namespace jitk::device::tile

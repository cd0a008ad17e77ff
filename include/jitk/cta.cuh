// Sums and maxima over the threads of a block.
//
//   __shared__ float buffer[cta::kMaxWarps];
//   const float sum = cta::reduce_sum<256>(x, buffer);
//   const float largest = cta::reduce_max<256>(y, buffer);       the same buffer again
//
// The block is one-dimensional, of kNumThreads threads: a multiple of 32 up to 1024, or cta::kBlockDim for whatever blockDim.x
// is. Every thread of it makes the call, and every thread gets the result. The buffer has an element for each warp.
//
// What is synchronised: a call writes to the buffer only after all threads have arrived, so nothing that one of them still
// reads there is lost. That takes two barriers; the first use of a buffer in a kernel may say Buffer::kFresh and takes one.
// After a call threads go on at once, while others still read: whoever else writes to the buffer needs a barrier first.
// Order, NaN and types are those of warp.cuh. SGLang's reduce_max leaves its result in the buffer; here it is returned.
// Left out: clusters, scans.
#pragma once

#include <jitk/warp.cuh>  // reductions of the parts

namespace jitk::device::cta {

inline constexpr uint32_t kMaxWarps = 32;
inline constexpr uint32_t kBlockDim = 0;

enum class Buffer : uint8_t { kReused, kFresh };

template <ReductionOp kOp, uint32_t kNumThreads, Buffer kBuffer = Buffer::kReused, typename T>
[[nodiscard]] JITK_DEVICE T reduce(T value, T* buffer) {
  static_assert(kNumThreads % kWarpThreads == 0 && kNumThreads <= kMaxWarps * kWarpThreads,
                "a block is whole warps, at most 32");
  value = warp::reduce<kOp>(value);
  if (kNumThreads == kWarpThreads) return value;

  const uint32_t warps = (kNumThreads == kBlockDim ? blockDim.x : kNumThreads) / kWarpThreads;
  // One result per warp, reduced again in every warp over the next power of two of lanes.
  constexpr uint32_t kParts = kNumThreads == kBlockDim          ? 32
                              : kNumThreads > 16 * kWarpThreads ? 32
                              : kNumThreads > 8 * kWarpThreads  ? 16
                              : kNumThreads > 4 * kWarpThreads  ? 8
                              : kNumThreads > 2 * kWarpThreads  ? 4
                                                                : 2;
  const uint32_t lane = get_lane_id();
  if constexpr (kBuffer == Buffer::kReused) __syncthreads();
  if (lane == 0) buffer[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  const uint32_t part = lane % kParts;
  if constexpr (kOp == ReductionOp::SUM) {
    value = part < warps ? buffer[part] : T{};
  } else {
    value = buffer[part < warps ? part : 0];  // once more, instead of a value that stands for none
  }
  return warp::reduce<kOp, kParts>(value);
}

template <uint32_t kNumThreads, Buffer kBuffer = Buffer::kReused, typename T>
[[nodiscard]] JITK_DEVICE T reduce_sum(T value, T* buffer) {
  return reduce<ReductionOp::SUM, kNumThreads, kBuffer>(value, buffer);
}
template <uint32_t kNumThreads, Buffer kBuffer = Buffer::kReused, typename T>
[[nodiscard]] JITK_DEVICE T reduce_max(T value, T* buffer) {
  return reduce<ReductionOp::MAX, kNumThreads, kBuffer>(value, buffer);
}
template <uint32_t kNumThreads, Buffer kBuffer = Buffer::kReused, typename T>
[[nodiscard]] JITK_DEVICE T reduce_min(T value, T* buffer) {
  return reduce<ReductionOp::MIN, kNumThreads, kBuffer>(value, buffer);
}

}  // namespace jitk::device::cta

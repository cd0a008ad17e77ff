// The blocks of a cluster: who they are, how they wait for each other, and sums and maxima over all their threads.
//
//   LaunchKernel(rows * 4, 512, stream).enable_pdl().enable_cluster({4, 1, 1})(kernel, params);       the launcher
//
//   __shared__ float parts[cluster::kMaxSize];                                                        the kernel
//   cluster::arrive();                                         early: this block runs, its shared memory can be written to
//   ...
//   cluster::wait();
//   const float sum = cluster::reduce_sum(cta_sum, parts);     every thread of the block passes the sum of the block
//
// Hopper and later; a kernel that asks before is not compiled (kClusterSupported). A kernel launched without a cluster is one
// of one block. Clusters are one-dimensional here.
// Left out: multicast, barriers in shared memory.
#pragma once

#include <jitk/arch.cuh>  // JITK_ARCH_HOPPER_OR_GREATER
#include <jitk/warp.cuh>  // ReductionTrait

#include <cstring>  // memcpy, to store a value as words

namespace jitk::device {

inline constexpr bool kClusterSupported = JITK_ARCH_HOPPER_OR_GREATER;

namespace cluster {

inline constexpr uint32_t kMaxSize = 8;  // that every GPU with clusters grants

#if JITK_ARCH_HOPPER_OR_GREATER
JITK_DEVICE uint32_t size() {
  uint32_t value;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(value));
  return value;
}
JITK_DEVICE uint32_t rank() {
  uint32_t value;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return value;
}

// A barrier in two halves. What was written to shared memory before the first is seen behind the second.
JITK_DEVICE void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
JITK_DEVICE void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Writes to where `place`, in this block's shared memory, is in that of the block `rank`.
template <typename T>
JITK_DEVICE void store(T* place, uint32_t rank, const T& value) {
  static_assert(sizeof(T) % 4 == 0, "values are whole words");
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t there, words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
#pragma unroll
  for (uint32_t i = 0; i < sizeof(T) / 4; ++i) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there + 4 * i), "r"(words[i]) : "memory");
  }
}

// The blocks' values combined in the order of their ranks, for every thread. A buffer serves once: a second reduction needs
// another, or a barrier before it.
template <ReductionOp kOp, typename T>
JITK_DEVICE T reduce(T value, T (&parts)[kMaxSize]) {
  if (threadIdx.x < size()) store(&parts[rank()], threadIdx.x, value);
  __syncwarp();
  arrive();
  wait();
  T result = parts[0];
  for (uint32_t i = 1; i < size(); ++i) result = ReductionTrait<kOp, T>::reduce(result, parts[i]);
  return result;
}

template <typename T>
JITK_DEVICE T reduce_sum(T value, T (&parts)[kMaxSize]) {
  return reduce<ReductionOp::SUM>(value, parts);
}
template <typename T>
JITK_DEVICE T reduce_max(T value, T (&parts)[kMaxSize]) {
  return reduce<ReductionOp::MAX>(value, parts);
}
#endif

}  // namespace cluster
}  // namespace jitk::device

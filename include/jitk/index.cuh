// Indices that a kernel follows into another tensor, checked where they are read.
//
//   const host::CheckedIndices checked(indices, slots, device, Skip::kMinusOne);                        the launcher
//   LaunchKernel(grid, block, device)(kernel, ..., checked.bounds());
//   checked.report();
//
//   const int64_t slot = indices[token];                                                                the kernel
//   if (!bounds.admit(slot, token, "jitk::store_kv_cache: indices")) return;
//
// An index out of range is not followed. It ends the kernel, as those of PyTorch's own kernels do: with a line that names the
// value and its position on the program's output, and the error "device-side assert triggered" at the next synchronisation,
// also of a graph that is replayed. With CUDA_LAUNCH_BLOCKING=1, and in debug builds, the launcher waits for the kernel, and
// the call itself raises an error that names both; the program can go on after it.
#pragma once

#include <jitk/index.h>  // refuse_index

#include <jitk/arch.cuh>
#include <jitk/launch.cuh>  // RuntimeDeviceCheck

#include <cassert>  // __assert_fail
#include <cstdio>   // printf
#include <cstdlib>  // getenv

namespace jitk {
namespace device {

class Bounds {
 public:
  Bounds() = default;
  JITK_HOST_DEVICE Bounds(int64_t end, Skip skip, unsigned long long* first)
      : end_(end), first_(first), low_(skip == Skip::kMinusOne ? -1 : 0) {}

  // Whether the index is to be followed. `what` names it in the line that is printed: a literal in the kernel.
  JITK_DEVICE bool admit(int64_t index, int64_t position, const char* what) const {
    if (__builtin_expect(static_cast<uint64_t>(index) < static_cast<uint64_t>(end_), 1)) return true;
    if (index != low_ || low_ == 0) refuse(index, position, what);
    return false;
  }

  // Where the caller has found that it is out of range.
  __device__ __noinline__ void refuse(int64_t index, int64_t position, const char* what) const {
    if (first_ != nullptr) {
      atomicMin_system(first_, static_cast<unsigned long long>(position));
      return;
    }
    printf("%s: out of range: %lld at position %lld, expected below %lld\n", what, static_cast<long long>(index),
           static_cast<long long>(position), static_cast<long long>(end_));
    __assert_fail("an index is in range", what, 0, "admit");
  }

 private:
  int64_t end_;
  unsigned long long* first_;  // the first position that is out of range; null where nobody waits for it
  int32_t low_;
};

}  // namespace device

namespace host {

// Whether launches are waited for, so that errors show where they arise. Read once, as CUDA does.
inline bool launches_block() {
#ifdef JITK_DEBUG
  return true;
#else
  static const bool blocks = [] {
    const char* chosen = std::getenv("CUDA_LAUNCH_BLOCKING");
    return chosen != nullptr && chosen[0] == '1';
  }();
  return blocks;
#endif
}

class CheckedIndices {
 public:
  CheckedIndices(const TensorView& indices, int64_t end, DLDevice device, Skip skip = Skip::kNothing)
      : indices_(indices), end_(end), skip_(skip) {
    if (__builtin_expect(launches_block(), 0)) prepare(device);
  }

  device::Bounds bounds() const { return {end_, skip_, first_}; }

  // Behind the launch.
  void report(DebugInfo where = {}) const {
    if (__builtin_expect(first_ != nullptr, 0)) wait_and_report(where);
  }

 private:
  static constexpr unsigned long long kNone = ~0ull;
  static constexpr uint32_t kLists = 8;  // of one launch, which is waited for before the next

  JITK_COLD void prepare(DLDevice device) {
    stream_ = LaunchKernel::resolve_device(device);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    RuntimeDeviceCheck(cudaStreamIsCapturing(stream_, &capturing));
    if (capturing != cudaStreamCaptureStatusNone) return;  // the graph's launches are not waited for
    thread_local unsigned long long* const shared = [] {
      void* memory = nullptr;
      RuntimeDeviceCheck(
          cudaHostAlloc(&memory, kLists * sizeof(unsigned long long), cudaHostAllocPortable | cudaHostAllocMapped));
      return static_cast<unsigned long long*>(memory);
    }();
    thread_local uint32_t taken = 0;
    first_ = shared + taken++ % kLists;
    *first_ = kNone;
  }

  JITK_COLD void wait_and_report(DebugInfo where) const {
    RuntimeDeviceCheck(cudaStreamSynchronize(stream_), where);
    if (*first_ == kNone) return;
    const int64_t position = static_cast<int64_t>(*first_);
    const int32_t bytes = indices_.dtype().bits / 8;
    int64_t wide = 0;
    int32_t narrow = 0;
    const char* from = static_cast<const char*>(indices_.data_ptr()) + offset_of(indices_, position) * bytes;
    RuntimeDeviceCheck(
        cudaMemcpy(bytes == 8 ? static_cast<void*>(&wide) : &narrow, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost),
        where);
    refuse_index(indices_.name(), position, bytes == 8 ? wide : narrow, end_, skip_, where);
  }

  const TensorView& indices_;
  int64_t end_;
  Skip skip_;
  cudaStream_t stream_ = nullptr;
  unsigned long long* first_ = nullptr;
};

}  // namespace host
}  // namespace jitk

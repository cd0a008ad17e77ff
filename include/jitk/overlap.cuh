// When the next kernel may start its blocks, so that its launch overlaps the end of this one.
//
//   params.trigger = choose_trigger(threads, block, sms);            the launcher: threads of the whole grid
//
//   wait_and_trigger<true>(params.trigger);                          the kernel, before it touches memory
//   ...
//   PDLTriggerSecondary<true>();                                     behind its last store
//
// The rule. Blocks that start early only wait, in wait_and_trigger, for the end of this kernel: that is worth it where they take
// nothing that this kernel needs. Where this kernel leaves room on the SMs, they start at once; elsewhere they would be in the
// way of its own blocks, and start as its blocks end (10 and 2 percent of an activation, H200, 2026-11-20). Where it is a
// handful of blocks, they start even before this kernel's own wait; with more, the blocks of three kernels crowd each other.
// Left out: the instructions (arch.cuh), the launch attribute (launch.cuh).
#pragma once

#include <jitk/arch.cuh>  // PDLWaitPrimary, PDLTriggerSecondary

namespace jitk {

enum class Trigger : uint8_t { kAtEnd, kAfterWait, kBeforeWait };

namespace host {

// An SM holds 2048 threads, from Volta to Blackwell but for the smaller GPUs of a family, which hold fewer: there the rule is
// only less sharp.
inline constexpr int64_t kThreadsThatFit = 2048;

// For a grid of `threads` on a GPU of `sms` multiprocessors.
inline Trigger choose_trigger(int64_t threads, int64_t sms) {
  return threads <= sms * kThreadsThatFit ? Trigger::kAfterWait : Trigger::kAtEnd;
}

// For a kernel that has work to do before it waits: a handful is at most a warp for each SM, in blocks of at most 256.
inline Trigger choose_trigger(int64_t threads, uint32_t block, int64_t sms) {
  return threads <= sms * 32 && block <= 256 ? Trigger::kBeforeWait : choose_trigger(threads, sms);
}

}  // namespace host

namespace device {

// kWorksBefore is false for a kernel that does nothing before it waits: its launcher never chooses kBeforeWait.
template <bool kWorksBefore>
JITK_DEVICE void wait_and_trigger(Trigger trigger) {
  if constexpr (kWorksBefore) {
    if (trigger == Trigger::kBeforeWait) PDLTriggerSecondary<true>();
  }
  PDLWaitPrimary<true>();
  if (kWorksBefore ? trigger == Trigger::kAfterWait : trigger != Trigger::kAtEnd) PDLTriggerSecondary<true>();
}

}  // namespace device
}  // namespace jitk

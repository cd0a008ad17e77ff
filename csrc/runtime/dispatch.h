// One call of an op, from PyTorch's stack to the kernel and back.
#pragma once

#include "call.h"
#include "device_guard.h"
#include "host_api.h"
#include "reference.h"
#include "results.h"
#include "slot.h"

namespace {

// The entry for a key that a call has for the first time; null where the op's reference serves it. dispatch.cpp asks Python,
// standalone.cpp looks into its folder.
jitk::Entry on_miss(Slot& slot, const int64_t* key);

void dispatch(StableIValue* stack, int32_t number) {
  Slot& slot = *slots[number].load(std::memory_order_acquire);
  StableIValue made[kMaxResults];
  {
    Call call(slot, stack);
    call.read();
    if (slot.writes) call.count_as_changed();
    const DeviceGuard guard(call.device_id());
    const Variant* variant = slot.find(call.key());
    const jitk::Entry entry = __builtin_expect(variant != nullptr, 1) ? variant->entry : on_miss(slot, call.key());
    if (__builtin_expect(entry != nullptr, 1)) {
      Value results[kMaxResults];
      for (size_t i = 0; i < slot.results.size(); ++i) results[i].kind = ValueKind::kNone;
      if (__builtin_expect(entry(&host, call.values(), slot.passed, results) != 0, 0)) {
        free_results(slot, results);
        throw std::runtime_error(slot.name + ": " + reported_error);
      }
      take_results(slot, results, made);
      call.hand_over(made + slot.results.size());
    } else {
      Returned returned(slot, stack, made + slot.results.size());
      call.abandon();
      run_reference(slot, stack, made);
      returned.keep();
    }
  }
  memcpy(stack, made, sizeof(StableIValue) * (slot.results.size() + static_cast<size_t>(slot.returned)));
}

}  // namespace

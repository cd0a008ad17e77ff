// The dispatcher runtime: one boxed kernel that serves every op on every backend, and the only C++ here that knows PyTorch.
//
//   op call -> trampoline of a slot -> read arguments -> key -> table -> Entry of the variant
//                                                            \ miss: jitk::_build, a Python op, compiles or loads the variant
//
// It is written against PyTorch's stable C ABI. No CUDA header: what it needs of CUDA it asks of PyTorch. A hit takes no lock and
// runs no Python. Each header here has one part of it:
//
//   numbering.h cells.h          PyTorch's numbers and cells
//   slot.h plan.h key_rule.h     what is known of an op, and its table of variants
//   call.h refuse_overlap.h      the arguments of a call          results.h    what the kernel made
//   dispatch.h device_guard.h    a call                           reference.h  a call that no kernel serves
//   host_api.h                   what kernels may ask for
//   trampolines.h registration.h how PyTorch finds all this
//
// standalone.cpp is the same for programs without Python; autograd.cpp stands alone.
#include "registration.h"

#include <string>

namespace {

jitk::Entry address_in(const std::string& text) { return reinterpret_cast<jitk::Entry>(std::stoull(text)); }

// Python compiles or loads the variant, and answers
//   entry ADDRESS    for this key from now on; 0 is the reference
//   once ADDRESS     for this call alone
//   reference        for this call alone: the kernel is being built further down this thread's stack, under a signal handler
//   error TEXT
// One string, because torch_call_dispatcher mixes up results of different types (PyTorch 2.11 to 2.13).
jitk::Entry on_miss(Slot& slot, const int64_t* key) {
  const uint64_t forgotten = slot.forgotten.load(std::memory_order_acquire);
  StableIValue stack[2] = {from_int(slot.asks), from_ints(key, slot.key_size())};
  if (torch_call_dispatcher("jitk::_build", "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(slot.name + ": the op jitk::_build failed. It needs Python with torch_jit_ops imported");
  }
  const std::string answer = take_string(stack[0]);
  const size_t space = answer.find(' ');
  const std::string what = answer.substr(0, space);
  if (what == "reference") return nullptr;
  const std::string rest = answer.substr(space + 1);
  if (what == "once") return address_in(rest);
  if (what != "entry") fail(rest);
  return slot.add(key, address_in(rest), forgotten);
}

// The slot of a number that was registered.
Slot& slot_of(int32_t number) {
  Slot* slot = number < 0 || number >= kMaxSlots ? nullptr : slots[number].load(std::memory_order_acquire);
  if (slot == nullptr) throw std::runtime_error("there is no slot " + std::to_string(number));
  return *slot;
}

// 0, or else `error` holds the reason.
template <typename Body>
int guarded(char* error, size_t capacity, const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& problem) {
    strncpy(error, problem.what(), capacity - 1);
    error[capacity - 1] = '\0';
    return 1;
  }
}

}  // namespace

#define JITK_RUNTIME extern "C" __attribute__((visibility("default")))

// `register_slot`.
JITK_RUNTIME int jitk_register(int32_t number, const char* who, const char* ns, const char* overload, const char* dispatch_key,
                               const char* reference, const char* plan, char* error, size_t capacity) {
  return guarded(error, capacity, [&] { register_slot(number, who, ns, overload, dispatch_key, reference, plan); });
}

// Serves an overload that was declared again, by the trampoline that it has. `asks`: what jitk::_build is called with, which no
// slot has had: a call of the old overload that is under way still asks for that one.
JITK_RUNTIME int jitk_replace(int32_t number, int64_t asks, const char* who, const char* reference, const char* plan,
                              char* error, size_t capacity) {
  return guarded(error, capacity, [&] { store_slot(number, asks, slot_of(number).on_cuda, who, reference, plan); });
}

// Has every key of the slot asked for again.
JITK_RUNTIME int jitk_forget(int32_t number, char* error, size_t capacity) {
  return guarded(error, capacity, [&] { slot_of(number).forget(); });
}

// `raise`: throws what Python has kept of this thread's failure.
JITK_RUNTIME void jitk_set_raise(void (*raise)()) { raise_kept.store(raise, std::memory_order_release); }

JITK_RUNTIME void jitk_set_several_devices(int several) { several_devices = several != 0; }

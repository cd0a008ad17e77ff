// Registers slots with PyTorch: from then on their trampolines serve the op.
#pragma once

#include "cells.h"
#include "plan.h"
#include "slot.h"
#include "trampolines.h"

#include <torch/headeronly/version.h>

#include <pthread.h>  // fork

#include <map>
#include <stdexcept>
#include <string>

namespace {

// A whole slot is stored at once: a call under way goes on with the one that it found.
void store_slot(int32_t number, int64_t asks, bool on_cuda, const char* who, const char* reference, const char* plan) {
  auto* slot = new Slot;
  slot->asks = asks;
  slot->name = who;
  slot->reference = reference;
  slot->on_cuda = on_cuda;
  read_plan(plan, *slot);
  slots[number].store(slot, std::memory_order_release);
}

// Serves `overload` ("silu_and_mul.out") of `ns` on the dispatch key "CPU" or "CUDA" from now on. Called once for each
// `number`. `who` stands in the texts of errors.
void register_slot(int32_t number, const char* who, const char* ns, const char* overload, const char* dispatch_key,
                   const char* reference, const char* plan) {
  if (number < 0 || number >= kMaxSlots)
    throw std::runtime_error("a process has at most " + std::to_string(kMaxSlots) + " op overloads");
  store_slot(number, number, strcmp(dispatch_key, "CUDA") == 0, who, reference, plan);

  static const int forks = pthread_atfork([] { changes.lock(); }, [] { changes.unlock(); }, [] { changes.unlock(); });
  if (forks != 0) throw std::runtime_error("pthread_atfork failed");
  static std::map<std::string, TorchLibraryHandle> libraries;  // kept for good: dropping one takes its kernels away
  const std::lock_guard<std::mutex> lock(changes);
  TorchLibraryHandle& library = libraries[std::string(ns) + "/" + dispatch_key];
  if (library == nullptr)
    check(aoti_torch_library_init_impl(ns, dispatch_key, __FILE__, __LINE__, &library), "open an op library");
  check(torch_library_impl(library, overload, trampoline_of(number), TORCH_ABI_VERSION), "register a kernel");
}

}  // namespace

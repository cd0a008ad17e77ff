// Takes what a kernel made: as cells for PyTorch, or frees it where the call failed.
#pragma once

#include <jitk/abi.h>  // Value

#include "cells.h"
#include "slot.h"

#include <stdexcept>

namespace {

void free_results(const Slot& slot, const jitk::Value* results) {
  for (size_t i = 0; i < slot.results.size(); ++i) {
    if (results[i].kind == jitk::ValueKind::kOwnedTensor)
      aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(results[i].handle));
    if (results[i].kind == jitk::ValueKind::kOwnedList) free_tensors(static_cast<StableListHandle>(results[i].handle));
  }
}

// Lists, None, and what is missing; apart, so that the usual way stays short.
__attribute__((noinline)) void take_unusual(const Slot& slot, const jitk::Value* results, StableIValue* made) {
  for (size_t i = 0; i < slot.results.size(); ++i) {
    const Result& wanted = slot.results[i];
    if (wanted.kind != 'T' || wanted.optional || results[i].kind == jitk::ValueKind::kOwnedTensor) continue;
    free_results(slot, results);
    throw std::runtime_error(slot.name + ": the kernel made no '" + wanted.name + "'");
  }
  for (size_t i = 0; i < slot.results.size(); ++i) {
    const Result& wanted = slot.results[i];
    const bool is_made = results[i].kind != jitk::ValueKind::kNone;
    made[i] = is_made ? reinterpret_cast<StableIValue>(results[i].handle) : 0;
    // A list to which nothing was added is empty, and None where it may be.
    if (!is_made && !wanted.optional) made[i] = from_ints(nullptr, 0);
    if (is_made && wanted.optional) made[i] = reinterpret_cast<StableIValue>(new StableIValue(made[i]));
  }
}

inline void take_results(const Slot& slot, const jitk::Value* results, StableIValue* made) {
  bool usual = true;
  for (size_t i = 0; i < slot.results.size(); ++i) {
    usual = usual && slot.results[i].is_plain() && results[i].kind == jitk::ValueKind::kOwnedTensor;
    made[i] = reinterpret_cast<StableIValue>(results[i].handle);
  }
  if (__builtin_expect(!usual, 0)) take_unusual(slot, results, made);
}

}  // namespace

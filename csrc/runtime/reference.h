// Calls an op's reference in Python, for a key that no kernel serves.
#pragma once

#include "cells.h"
#include "slot.h"

#include <torch/headeronly/version.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace {

// Raises in Python what jitk::_build or a reference failed with: torch_call_dispatcher loses the exception. autograd.cpp lends
// the function; until it does, callers get a RuntimeError of the same text.
using Raise = void (*)();
std::atomic<Raise> raise_kept{nullptr};

[[noreturn]] void fail(const std::string& text) {
  if (const Raise raise = raise_kept.load(std::memory_order_acquire)) raise();
  throw std::runtime_error(text);
}

// The one tensor of a list.
StableIValue take_only(StableListHandle list) {
  StableIValue cell = 0;
  check(torch_list_get_item(list, 0, &cell), "read a list");
  torch_delete_list(list);
  return cell;
}

// The reference takes over the stack, and returns each result as an optional. Where one is a list all are, a tensor as one of
// one: torch_call_dispatcher mixes up results of different types (PyTorch 2.11 to 2.13). If it failed, Python has kept the text.
void run_reference(const Slot& slot, StableIValue* stack, StableIValue* made) {
  bool has_list = false;
  for (const Result& result : slot.results) has_list = has_list || result.kind == 'L';
  StableIValue cells[kMaxArguments + kMaxResults];
  memcpy(cells, stack, sizeof(StableIValue) * slot.arguments.size());
  if (torch_call_dispatcher(slot.reference.c_str(), "", cells, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(slot.name + ": the op's reference failed");
  }
  StableIValue error[1];
  check(torch_call_dispatcher("jitk::_take_error", "", error, TORCH_ABI_VERSION), "tell an error");
  const std::string text = take_string(error[0]);
  for (size_t i = 0; i < slot.results.size(); ++i) {
    made[i] = cells[i];
    auto* cell = reinterpret_cast<StableIValue*>(cells[i]);
    if (cell == nullptr) continue;
    if (has_list && slot.results[i].kind == 'T') *cell = take_only(reinterpret_cast<StableListHandle>(*cell));
    if (slot.results[i].optional) continue;
    made[i] = *cell;
    delete cell;
  }
  if (!text.empty()) fail(text);
}

// Handles of their own to the outputs that the schema returns, as the reference frees the ones that it gets.
class Returned {
 public:
  Returned(const Slot& slot, const StableIValue* stack, StableIValue* made) : made_(made) {
    for (size_t i = 0; i < slot.arguments.size(); ++i) {
      if (!slot.arguments[i].returned) continue;
      AtenTensorHandle handle = nullptr;
      check(aoti_torch_new_tensor_handle(reinterpret_cast<AtenTensorHandle>(stack[i]), &handle), "hold a tensor");
      made_[count_++] = reinterpret_cast<StableIValue>(handle);
    }
  }
  Returned(const Returned&) = delete;
  Returned& operator=(const Returned&) = delete;
  ~Returned() {
    for (int32_t i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(made_[i]));
  }
  void keep() { count_ = 0; }

 private:
  StableIValue* made_;
  int32_t count_ = 0;
};

}  // namespace

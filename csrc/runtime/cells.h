// The cells of PyTorch's stable ABI: what a StableIValue holds, for the few kinds that are made and taken here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace {

void check(AOTITorchError status, const char* what) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("PyTorch failed to ") + what);
}

StableIValue from_int(int64_t value) {
  StableIValue cell;
  memcpy(&cell, &value, sizeof(cell));
  return cell;
}

StableIValue from_ints(const int64_t* values, int64_t count) {
  StableListHandle list;
  check(torch_new_list_reserve_size(static_cast<size_t>(count), &list), "make a list");
  for (int64_t i = 0; i < count; ++i) check(torch_list_push_back(list, from_int(values[i])), "fill a list");
  return reinterpret_cast<StableIValue>(list);
}

std::string take_string(StableIValue cell) {
  const auto handle = reinterpret_cast<StringHandle>(cell);
  const char* text = nullptr;
  size_t length = 0;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &text);
  std::string result(text, length);
  torch_delete_string(handle);
  return result;
}

// A list owns its cells, and not what they hold.
void free_tensors(StableListHandle list) {
  size_t size = 0;
  torch_list_size(list, &size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue cell;
    if (torch_list_get_item(list, i, &cell) == AOTI_TORCH_SUCCESS)
      aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(cell));
  }
  torch_delete_list(list);
}

}  // namespace

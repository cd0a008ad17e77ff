// Reads the arguments of one call off PyTorch's stack, and frees what the stack owns, read or not.
#pragma once

#include <jitk/abi.h>  // Value

#include "cells.h"
#include "numbering.h"
#include "refuse_overlap.h"
#include "slot.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// What the stable ABI has no function for: a written tensor counts as changed. PyTorch has exported both for years; null in one
// that does not.
namespace at {
class Tensor;
}
namespace c10 {
struct InferenceMode {
  __attribute__((weak)) static bool is_enabled();
};
}  // namespace c10
namespace torch::autograd::impl {
__attribute__((weak)) void bump_version(const at::Tensor& tensor);
}

namespace {

using jitk::Value;
using jitk::ValueKind;

void view_of(AtenTensorHandle tensor, jitk::TensorView* view) {
  int64_t ndim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  if (aoti_torch_get_dim(tensor, &ndim) != 0 || aoti_torch_get_sizes(tensor, &sizes) != 0 ||
      aoti_torch_get_strides(tensor, &strides) != 0 || aoti_torch_get_dtype(tensor, &dtype) != 0 ||
      aoti_torch_get_device_type(tensor, &device_type) != 0 || aoti_torch_get_device_index(tensor, &device_index) != 0) {
    throw std::runtime_error("PyTorch could not describe a tensor: it may be sparse or have no storage");
  }
  view->sizes_ = sizes;
  view->strides_ = strides;
  view->ndim_ = static_cast<int32_t>(ndim);
  view->dtype_ = numbering.from_torch(dtype);
  view->device_ = numbering.device(device_type, device_index);
}

class Call {
 public:
  Call(const Slot& slot, StableIValue* stack) : slot_(slot), stack_(stack) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (size_t i = 0; owns_stack_ && i < slot_.arguments.size(); ++i) free(static_cast<int32_t>(i));
  }

  // Apart from the constructor, so that what was read is freed when reading throws.
  void read() {
    key_[0] = -1;
    const auto count = static_cast<int32_t>(slot_.arguments.size());
    for (int32_t i = 0; i < count; ++i) read(i);
    for (int32_t i = 0; i < slot_.outputs; ++i) {
      Value& value = values_[slot_.passed - slot_.outputs + i];
      value.kind = ValueKind::kNone;
      value.name = slot_.results[static_cast<size_t>(i)].name.c_str();
    }
    for (size_t i = 0; i < slot_.key.size(); ++i) key_[i + 1] = key_part(slot_.key[i]);
    if (slot_.writes) refuse_overlap(slot_, [this](size_t i) { return tensors(i); });
  }

  // Inference mode leaves out what bumps versions elsewhere, which is autograd.cpp or autograd.py. Its own tensors have none.
  void count_as_changed() const {
    if (&torch::autograd::impl::bump_version == nullptr || &c10::InferenceMode::is_enabled == nullptr) return;
    if (!c10::InferenceMode::is_enabled()) return;
    for (size_t i = 0; i < slot_.arguments.size(); ++i) {
      if (!slot_.arguments[i].written || tensors(i).size() == 0) continue;
      const StableIValue cell = inner(static_cast<int32_t>(i));
      if (slot_.arguments[i].kind != 'L') {
        count_as_changed(cell);
        continue;
      }
      for (int64_t at = 0; at < tensors(i).size(); ++at) {
        StableIValue item;
        check(torch_list_get_item(reinterpret_cast<StableListHandle>(cell), static_cast<size_t>(at), &item), "read a list");
        count_as_changed(item);
      }
    }
  }

  const int64_t* key() const { return key_; }
  const Value* values() const { return values_; }
  int32_t device_id() const { return device_id_; }
  // From here on somebody else frees the stack.
  void abandon() { owns_stack_ = false; }

  // The outputs that the schema returns are the caller's own: what was theirs on the stack becomes the result.
  void hand_over(StableIValue* made) {
    for (size_t i = 0; slot_.returned > 0 && i < slot_.arguments.size(); ++i) {
      if (slot_.arguments[i].returned) *made++ = stack_[i];
    }
    handed_over_ = true;
  }

 private:
  static void count_as_changed(StableIValue tensor) {
    torch::autograd::impl::bump_version(*reinterpret_cast<const at::Tensor*>(tensor));
  }

  StableIValue inner(int32_t i) const {
    return slot_.arguments[static_cast<size_t>(i)].optional ? *reinterpret_cast<StableIValue*>(stack_[i]) : stack_[i];
  }

  void read(int32_t i) {
    const Argument& argument = slot_.arguments[static_cast<size_t>(i)];
    Value& value = values_[argument.place];
    value.length = 0;
    value.integer = 0;
    if (argument.optional && stack_[i] == 0) {
      value.kind = ValueKind::kNone;
      return;
    }
    const StableIValue cell = inner(i);
    switch (argument.kind) {
      case 'T':
      case 'O':
        read_tensor(argument, argument.name.c_str(), reinterpret_cast<AtenTensorHandle>(cell), views_[i]);
        value.kind = ValueKind::kTensor;
        value.tensor = &views_[i];
        break;
      case 'i':
        value.kind = ValueKind::kInt;
        memcpy(&value.integer, &cell, sizeof(value.integer));
        break;
      case 'f':
        value.kind = ValueKind::kFloat;
        memcpy(&value.number, &cell, sizeof(value.number));
        break;
      case 'b':
        value.kind = ValueKind::kBool;
        memcpy(&value.boolean, &cell, sizeof(value.boolean));
        break;
      case 's': read_string(argument, reinterpret_cast<StringHandle>(cell), value); break;
      case 'd': read_dtype(argument, cell, value); break;
      case 'D': read_device(cell, value); break;
      case 'F':
        value.kind = ValueKind::kFloatList;
        value.numbers = read_list<double>(cell, value);
        break;
      case 'L':
        value.kind = ValueKind::kTensorList;
        value.tensors = read_tensors(argument, cell, value);
        break;
      default:
        value.kind = ValueKind::kIntList;
        value.list = read_list<int64_t>(cell, value);
        break;
    }
  }

  void read_tensor(const Argument& argument, const char* name, AtenTensorHandle tensor, jitk::TensorView& view) {
    view_of(tensor, &view);
    view.name_ = name;
    // A read must not materialise a copy-on-write tensor.
    const AOTITorchError status = argument.written ? torch_get_mutable_data_ptr(tensor, &view.data_)
                                                   : torch_get_const_data_ptr(tensor, const_cast<const void**>(&view.data_));
    if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error(slot_.name + ": argument '" + name + "' has no storage");
    if (slot_.on_cuda && device_id_ < 0 && view.device_.device_type == jitk::kDLCUDA) {
      key_[0] = device_id_ = view.device_.device_id;
    }
  }

  // Those of an argument: none, one, or a list.
  jitk::TensorList tensors(size_t i) const {
    const Value& value = values_[slot_.arguments[i].place];
    if (value.kind == ValueKind::kTensor) return {value.tensor, 1};
    if (value.kind == ValueKind::kTensorList) return {value.tensors, value.length};
    return {nullptr, 0};
  }

  void read_string(const Argument& argument, StringHandle string, Value& value) {
    const char* text = nullptr;
    size_t length = 0;
    check(torch_string_length(string, &length), "read a string");
    check(torch_string_c_str(string, &text), "read a string");
    value.kind = ValueKind::kString;
    value.text = text;
    value.length = static_cast<int32_t>(length);
    if (argument.words.empty()) return;
    std::string all;
    for (const std::string& choice : argument.words) {
      if (choice.size() == length && memcmp(choice.data(), text, length) == 0) return;
      all += (all.empty() ? "'" : ", '") + choice + "'";
    }
    throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' must be one of " + all + ", got '" +
                             std::string(text, length) + "'");
  }

  void read_dtype(const Argument& argument, StableIValue cell, Value& value) {
    value.kind = ValueKind::kDType;
    value.dtype = numbering.from_torch(static_cast<int32_t>(cell));
    if (value.dtype.bits == 0)
      throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' is a dtype that kernels do not know");
  }

  // The type in the upper half, the index in the lower: -1 for the current one, which is told here.
  void read_device(StableIValue cell, Value& value) {
    int32_t index = static_cast<int32_t>(cell & 0xffffffffu);
    const auto type = static_cast<int32_t>(cell >> 32);
    if (type == numbering.cuda && index < 0) aoti_torch_get_current_device_index(&index);
    value.kind = ValueKind::kDevice;
    value.device = numbering.device(type, index);
  }

  template <typename T>
  T* read_list(StableIValue cell, Value& value) {
    const auto list = reinterpret_cast<StableListHandle>(cell);
    size_t size = 0;
    check(torch_list_size(list, &size), "read a list");
    T* const items = room_for<T>(size);
    for (size_t at = 0; at < size; ++at) {
      StableIValue item;
      check(torch_list_get_item(list, at, &item), "read a list");
      memcpy(items + at, &item, sizeof(item));
    }
    value.length = static_cast<int32_t>(size);
    return items;
  }

  const jitk::TensorView* read_tensors(const Argument& argument, StableIValue cell, Value& value) {
    const AtenTensorHandle* const handles = read_list<AtenTensorHandle>(cell, value);
    const auto size = static_cast<size_t>(value.length);
    auto* const views = room_for<jitk::TensorView>(size);
    for (size_t at = 0; at < size; ++at) read_tensor(argument, argument.item_name(at), handles[at], views[at]);
    return views;
  }

  // Until the call is over.
  template <typename T>
  T* room_for(size_t count) {
    static_assert(alignof(T) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__, "");
    return reinterpret_cast<T*>(room_.emplace_back(new char[sizeof(T) * (count + 1)]).get());
  }

  int64_t key_part(const KeyPart& part) const {
    const Argument& argument = slot_.arguments[static_cast<size_t>(part.argument)];
    const Value& value = values_[argument.place];
    if (value.kind == ValueKind::kNone) return INT64_MIN;
    int64_t word = fact(part, argument, value);
    for (int32_t i = 0; i < part.rules; ++i) word = slot_.rules[static_cast<size_t>(part.first_rule + i)](word);
    return word;
  }

  int64_t fact(const KeyPart& part, const Argument& argument, const Value& value) const {
    switch (part.what) {
      case KeyPart::kDType: {
        const jitk::DLDataType dtype = value.kind == ValueKind::kDType ? value.dtype : value.tensor->dtype_;
        return dtype.code << 8 | dtype.bits;
      }
      case KeyPart::kSize: {
        const int32_t ndim = value.tensor->ndim_;
        const int64_t dim = part.dim < 0 ? part.dim + ndim : part.dim;
        if (dim < 0 || dim >= ndim) {
          throw std::runtime_error(slot_.name + ": argument '" + argument.name + "' has " + std::to_string(ndim) +
                                   " dimensions; dimension " + std::to_string(part.dim) + " is needed to choose the kernel");
        }
        return value.tensor->sizes_[dim];
      }
      case KeyPart::kDim: return value.tensor->ndim_;
      case KeyPart::kValue: break;
    }
    if (value.kind == ValueKind::kBool) return value.boolean ? 1 : 0;
    if (value.kind == ValueKind::kInt) return value.integer;
    for (size_t i = 0; i < argument.words.size(); ++i) {
      const std::string& choice = argument.words[i];
      if (choice.size() == static_cast<size_t>(value.length) && memcmp(choice.data(), value.text, choice.size()) == 0) {
        return static_cast<int64_t>(i);
      }
    }
    return -1;
  }

  void free(int32_t i) {
    const Argument& argument = slot_.arguments[static_cast<size_t>(i)];
    if ((argument.optional && stack_[i] == 0) || (argument.returned && handed_over_)) return;
    const StableIValue cell = inner(i);
    switch (argument.kind) {
      case 'T':
      case 'O': aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(cell)); break;
      case 's': torch_delete_string(reinterpret_cast<StringHandle>(cell)); break;
      case 'l':
      case 'F': torch_delete_list(reinterpret_cast<StableListHandle>(cell)); break;
      case 'L': free_tensors(reinterpret_cast<StableListHandle>(cell)); break;
      default: break;
    }
    if (argument.optional) delete reinterpret_cast<StableIValue*>(stack_[i]);
  }

  const Slot& slot_;
  StableIValue* stack_;
  bool owns_stack_ = true;
  bool handed_over_ = false;
  int32_t device_id_ = -1;
  int64_t key_[kMaxKeyParts + 1];
  Value values_[kMaxArguments + kMaxResults];
  jitk::TensorView views_[kMaxArguments];
  std::vector<std::unique_ptr<char[]>> room_;
};

}  // namespace

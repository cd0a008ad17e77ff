// What variants may ask for: `host` is the HostApi that each call hands to them.
#pragma once

#include <jitk/abi.h>  // HostApi

#include "cells.h"
#include "numbering.h"

#include <torch/headeronly/version.h>

#include <dlfcn.h>  // symbols that only a CUDA build of PyTorch has

#include <string>

namespace {

// Why a function of the HostApi, or a kernel, failed in this thread.
thread_local std::string reported_error;

void report_error(const char* text, size_t length) { reported_error.assign(text, length); }

using CurrentStream = AOTITorchError (*)(int32_t, void**);

CurrentStream find_current_stream() {
  // Loaded privately by PyTorch, so invisible to a plain dlsym, and absent from a CPU build.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

int current_stream(int32_t device_id, void** stream) {
  static const CurrentStream ask = find_current_stream();
  if (ask != nullptr && ask(device_id, stream) == AOTI_TORCH_SUCCESS) return 0;
  reported_error = ask == nullptr ? "this build of PyTorch has no CUDA" : "PyTorch could not tell the current CUDA stream";
  return 1;
}

// The reason for a failed allocation does not pass the C ABI. Python tries the same and keeps the text.
std::string explain_allocation(const int64_t* sizes, int32_t ndim, jitk::DLDataType dtype, jitk::DLDevice device) {
  const int32_t cuda_index = device.device_type == jitk::kDLCUDA ? device.device_id : -1;
  StableIValue stack[3] = {from_ints(sizes, ndim), from_int(dtype.code << 8 | dtype.bits), from_int(cuda_index)};
  if (torch_call_dispatcher("jitk::_explain_allocation", "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    return "PyTorch could not allocate the output";
  }
  return take_string(stack[0]);
}

int allocate(const int64_t* sizes, int32_t ndim, jitk::DLDataType dtype, jitk::DLDevice device, void** handle,
             jitk::TensorView* view) {
  try {
    int64_t strides[64];
    if (ndim > 64) throw std::runtime_error("a tensor has at most 64 dimensions");
    int64_t step = 1;
    for (int32_t i = ndim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= sizes[i] > 1 ? sizes[i] : 1;
    }
    const int32_t torch_dtype = numbering.to_torch(dtype);
    const int32_t device_type = device.device_type == jitk::kDLCUDA ? numbering.cuda : numbering.cpu;
    AtenTensorHandle tensor = nullptr;
    if (aoti_torch_empty_strided(ndim, sizes, strides, torch_dtype, device_type, device.device_id, &tensor) !=
        AOTI_TORCH_SUCCESS) {
      reported_error = explain_allocation(sizes, ndim, dtype, device);
      return 1;
    }
    *handle = tensor;
    int64_t* tensor_sizes = nullptr;
    int64_t* tensor_strides = nullptr;
    check(aoti_torch_get_sizes(tensor, &tensor_sizes), "give the sizes of a tensor");
    check(aoti_torch_get_strides(tensor, &tensor_strides), "give the strides of a tensor");
    check(torch_get_mutable_data_ptr(tensor, &view->data_), "give the memory of a tensor");
    view->sizes_ = tensor_sizes;
    view->strides_ = tensor_strides;
    view->ndim_ = ndim;
    view->dtype_ = dtype;
    view->device_ = device;
    view->name_ = nullptr;
    return 0;
  } catch (const std::exception& error) {
    reported_error = error.what();
    return 1;
  }
}

void release(void* handle) { aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle)); }

int parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  struct Work {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } work{body, context};
  const auto run = [](int64_t begin, int64_t end, void* data) {
    const Work& mine = *static_cast<const Work*>(data);
    mine.body(mine.context, begin, end);
  };
  if (torch_parallel_for(0, count, grain < 1 ? 1 : grain, run, &work) == AOTI_TORCH_SUCCESS) return 0;
  reported_error = "PyTorch's parallel_for failed";
  return 1;
}

int append(const int64_t* sizes, int32_t ndim, jitk::DLDataType dtype, jitk::DLDevice device, void** list,
           jitk::TensorView* view) {
  auto* tensors = static_cast<StableListHandle>(*list);
  if (tensors == nullptr && torch_new_list_reserve_size(8, &tensors) != AOTI_TORCH_SUCCESS) {
    reported_error = "PyTorch failed to make a list";
    return 1;
  }
  *list = tensors;
  void* tensor = nullptr;
  if (allocate(sizes, ndim, dtype, device, &tensor, view) != 0) return 1;
  if (torch_list_push_back(tensors, reinterpret_cast<StableIValue>(tensor)) == AOTI_TORCH_SUCCESS) return 0;
  release(tensor);
  reported_error = "PyTorch failed to fill a list";
  return 1;
}

const jitk::HostApi host{jitk::kAbiVersion, 0, report_error, current_stream, allocate, release, parallel_for, append};

}  // namespace

// Makes the tensors' device current, as a kernel's launch, allocation and occupancy queries expect.
#pragma once

#include "cells.h"

namespace {

// Unless there is only one GPU, which Python knows.
bool several_devices = true;

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id) {
    if (device_id < 0 || !several_devices) return;
    int32_t current = -1;
    check(aoti_torch_get_current_device_index(&current), "tell the current device");
    if (current != device_id) check(aoti_torch_create_device_guard(device_id, &guard_), "change the device");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
  }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace

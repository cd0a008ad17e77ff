// The atomic maximum and minimum that CUDA has for integers but not for floats.
//
//   atomic::max(&largest, x);       largest in global or shared memory, started at -INFINITY or 0; the old value is returned
//
// Floats of one sign are ordered as their bits are, up for positive and down for negative ones, so the integer atomics do. The
// sign is read from its bit, which tells -0 from 0. A NaN argument changes nothing; the memory must not hold one.
// Left out: sums, which CUDA has; waiting between blocks.
#pragma once

#include <jitk/arch.cuh>  // JITK_DEVICE

namespace jitk::device::atomic {

JITK_DEVICE float max(float* place, float value) {
  if (value != value) return *static_cast<volatile float*>(place);
  const int32_t bits = __float_as_int(value);
  return bits >= 0 ? __int_as_float(atomicMax(reinterpret_cast<int32_t*>(place), bits))
                   : __uint_as_float(atomicMin(reinterpret_cast<uint32_t*>(place), static_cast<uint32_t>(bits)));
}

JITK_DEVICE float min(float* place, float value) {
  if (value != value) return *static_cast<volatile float*>(place);
  const int32_t bits = __float_as_int(value);
  return bits >= 0 ? __int_as_float(atomicMin(reinterpret_cast<int32_t*>(place), bits))
                   : __uint_as_float(atomicMax(reinterpret_cast<uint32_t*>(place), static_cast<uint32_t>(bits)));
}

}  // namespace jitk::device::atomic

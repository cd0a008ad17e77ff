// Reading, writing and moving void pointers, whose element type a kernel knows and its parameters do not.
//
//   const bf16_t x = load_as<bf16_t>(pointer::offset<bf16_t>(input, row * stride), column);
//   store_as<bf16_t>(output, x, column);
//
// Offsets count elements and are 64-bit: a product of two 32-bit numbers has overflowed before it gets here, so widen a factor.
// pointer::offset also works on the host, where a launcher moves to its part of a tensor.
// Left out: vectors (vec.cuh).
#pragma once

#include <jitk/arch.cuh>  // JITK_DEVICE

namespace jitk {
namespace details {

template <typename T>
struct Stated {  // a parameter of this type is not deduced from, so the caller states T
  using type = T;
};

}  // namespace details

namespace device {

template <typename T>
JITK_DEVICE T load_as(const void* data, int64_t offset = 0) {
  return static_cast<const T*>(data)[offset];
}

template <typename T>
JITK_DEVICE void store_as(void* data, typename details::Stated<T>::type value, int64_t offset = 0) {
  static_cast<T*>(data)[offset] = value;
}

}  // namespace device

namespace pointer {

// Bytes, unless T says otherwise.
template <typename T = char, typename... Offsets>
JITK_HOST_DEVICE void* offset(void* data, Offsets... offsets) {
  return static_cast<T*>(data) + (int64_t{0} + ... + static_cast<int64_t>(offsets));
}
template <typename T = char, typename... Offsets>
JITK_HOST_DEVICE const void* offset(const void* data, Offsets... offsets) {
  return static_cast<const T*>(data) + (int64_t{0} + ... + static_cast<int64_t>(offsets));
}

}  // namespace pointer

namespace host {
namespace pointer = jitk::pointer;
}  // namespace host
namespace device {
namespace pointer = jitk::pointer;
}  // namespace device
}  // namespace jitk

// Indices that a kernel follows into another tensor: each must be below that tensor's size, or the call is an error.
//
//   check_indices<int64_t>(indices, slots, Skip::kMinusOne);            the host code of a CPU kernel, before it writes
//
// A GPU checks them as it goes and ends with the same text: index.cuh.
#pragma once

#include <jitk/check.h>   // panic
#include <jitk/tensor.h>  // TensorView

namespace jitk {

// Whether -1 is an index: that of a row which is not to be touched.
enum class Skip : bool { kNothing, kMinusOne };

namespace host {

[[noreturn]] JITK_COLD inline void refuse_index(const char* name, int64_t position, int64_t index, int64_t end, Skip skip,
                                                DebugInfo where = {}) {
  Message expected;
  if (end > 0) {
    expected << "0 to " << end - 1;
  } else {
    expected << "none, for there is nothing to index";
  }
  panic(where, "argument '", name, "' holds an index out of range\n  expected  ", expected,
        skip == Skip::kMinusOne ? ", or -1 to skip" : "", "\n  got       ", index, " at position ", position);
}

// Where in memory the element is that comes at this position when the tensor is read row by row.
inline int64_t offset_of(const TensorView& view, int64_t position) {
  if (view.dim() == 1) return position * view.stride(0);
  int64_t offset = 0;
  for (int32_t dim = view.dim() - 1; dim >= 0; --dim) {
    offset += position % view.size(dim) * view.stride(dim);
    position /= view.size(dim);
  }
  return offset;
}

template <typename Index>
void check_indices(TensorView indices, int64_t end, Skip skip = Skip::kNothing, DebugInfo where = {}) {
  const auto* data = static_cast<const Index*>(indices.data_ptr());
  const int64_t count = indices.numel();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = data[offset_of(indices, i)];
    const bool fits = (index >= 0 && index < end) || (skip == Skip::kMinusOne && index == -1);
    if (__builtin_expect(!fits, 0)) refuse_index(indices.name(), i, index, end, skip, where);
  }
}

}  // namespace host
}  // namespace jitk

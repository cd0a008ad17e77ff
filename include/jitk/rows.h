// A tensor seen as rows: the leading dimensions collapsed into one count and one stride over a dense last dimension.
//
//   Rows rows;
//   TensorMatcher({batch, hidden}).with_rows(rows).with_dtype<T>().verify(input);
//   for (int64_t r = 0; r < rows.count; ++r) read(data + r * rows.stride, rows.width);
//
// Left out: layouts that need a stride for every dimension. They are errors whose text says .contiguous().
#pragma once

#include <jitk/tensor.h>  // TensorMatcher::with_rows

namespace jitk {
namespace host {

struct Rows {
  int64_t count = 0;
  int64_t width = 0;
  int64_t stride = 0;  // elements from one row to the next

  bool empty() const { return count == 0 || width == 0; }
  bool dense() const { return stride == width || count <= 1; }
  // Dense rows are one long row. Kernels that treat elements alike then never meet the end of a short or odd row.
  Rows flat() const { return dense() ? Rows{1, count * width, count * width} : *this; }
};

// False if no single row stride describes the tensor.
[[gnu::noinline]] inline bool collapse(const TensorView& view, Rows* rows) {
  const int32_t leading = view.dim() - 1;
  *rows = {1, view.dim() == 0 ? 1 : view.sizes_[leading], 0};
  for (int32_t i = 0; i < leading; ++i) rows->count *= view.sizes_[i];
  rows->stride = rows->width;
  if (rows->empty()) return true;
  if (rows->width != 1 && view.strides_[leading] != 1) return false;
  int64_t expected = -1;  // of the next dimension outwards, once a first one has set the step
  for (int32_t i = leading - 1; i >= 0; --i) {
    if (view.sizes_[i] == 1) continue;
    if (expected < 0) {
      rows->stride = view.strides_[i];
    } else if (view.strides_[i] != expected) {
      return false;
    }
    expected = view.strides_[i] * view.sizes_[i];
  }
  return true;
}

}  // namespace host
}  // namespace jitk

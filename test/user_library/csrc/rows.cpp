// Kernels for the test library: plain loops over rows, any row stride.
#include <jitk/dtype.h>   // to_float, from_float
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows

#include <userlib/direction.h>  // straight, reverse

#include <optional>

namespace userlib {

using namespace jitk;
using namespace jitk::host;

template <typename T>
T* row_of(TensorView view, const Rows& rows, int64_t row) {
  return static_cast<T*>(view.data_ptr()) + row * rows.stride;
}

template <typename T>
void scale_rows(TensorView input, TensorView weight) {
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows rows;
  TensorMatcher({tokens, hidden}).with_rows(rows).with_dtype<T>().verify(input);
  TensorMatcher({hidden}).with_dtype<T>().verify(weight);
  const T* scale = static_cast<const T*>(weight.data_ptr());
  for (int64_t row = 0; row < rows.count; ++row) {
    T* data = row_of<T>(input, rows, row);
    for (int64_t i = 0; i < rows.width; ++i) data[i] = from_float<T>(to_float(data[i]) * to_float(scale[i]));
  }
}

template <typename T>
void accumulate(TensorView total, TensorView x, Output& largest) {
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows sums, added;
  TensorMatcher({tokens, hidden}).with_rows(sums).with_dtype<T>().verify(total);
  TensorMatcher({tokens, hidden}).with_rows(added).with_dtype<T>().verify(x);
  RuntimeCheck(sums.width > 0, "argument 'total' must have columns: the largest of none is undefined");
  const IntList sizes = total.shape();
  const TensorView made = largest.empty({sizes.data, sizes.count - 1}, total.dtype(), total.device());
  T* result = static_cast<T*>(made.data_ptr());
  for (int64_t row = 0; row < sums.count; ++row) {
    T* data = row_of<T>(total, sums, row);
    const T* more = row_of<T>(x, added, row);
    for (int64_t i = 0; i < sums.width; ++i) {
      data[i] += more[i];
      if (i == 0 || data[i] > result[row] || data[i] != data[i]) result[row] = data[i];  // a NaN stays, as in PyTorch
    }
  }
}

template <typename T>
void split_sign(TensorView x, Output& positive_out, Output& negative_out) {
  const TensorView positive = positive_out.empty_like(x);
  const TensorView negative = negative_out.empty(x.shape(), dtype_of<bool>(), x.device());
  SymbolicDims shape{"shape"};
  Rows from, to, signs;
  TensorMatcher({shape}).with_rows(from).with_dtype<T>().verify(x);
  TensorMatcher({shape}).with_rows(to).with_dtype<T>().verify(positive);
  TensorMatcher({shape}).with_rows(signs).with_dtype<bool>().verify(negative);
  for (int64_t row = 0; row < from.count; ++row) {
    const T* data = row_of<T>(x, from, row);
    for (int64_t i = 0; i < from.width; ++i) {
      row_of<bool>(negative, signs, row)[i] = data[i] < 0;
      row_of<T>(positive, to, row)[i] = data[i] < 0 ? 0 : data[i];
    }
  }
}

template <typename T, Direction kDirection>
void affine(TensorView x, TensorView weight, std::optional<TensorView> bias, double factor, Output& output) {
  const TensorView out = output.empty_like(x);
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows from, to;
  TensorMatcher({tokens, hidden}).with_rows(from).with_dtype<T>().verify(x);
  TensorMatcher({hidden}).with_dtype<T>().verify(weight);
  if (bias) TensorMatcher({hidden}).with_dtype<T>().verify(*bias);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().verify(out);
  const T* scale = static_cast<const T*>(weight.data_ptr());
  const T* shift = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
  for (int64_t row = 0; row < from.count; ++row) {
    const T* data = row_of<T>(x, from, row);
    T* result = row_of<T>(out, to, row);
    for (int64_t i = 0; i < from.width; ++i) {
      const T product = static_cast<T>(factor) * data[i] * scale[kDirection == straight ? i : from.width - 1 - i];
      result[i] = shift != nullptr ? product + shift[i] : product;
    }
  }
}

template <typename T>
void swap(TensorView x, Output& output) {
  Shape shape(x.shape());
  if (x.dim() > 1) shape[-1] = x.size(-2), shape[-2] = x.size(-1);
  const TensorView out = output.empty(shape, x.dtype(), x.device());
  SymbolicDims matrices{"matrices"};
  SymbolicSize rows{"rows"}, columns{"columns"};
  if (x.dim() > 1) {
    TensorMatcher({matrices, rows, columns}).with_dtype<T>().verify(x);
    TensorMatcher({matrices, columns, rows}).with_dtype<T>().verify(out);
  } else {
    TensorMatcher({matrices}).with_dtype<T>().verify(x).verify(out);
    rows.set_value(1);
    columns.set_value(x.numel());
  }
  const T* from = static_cast<const T*>(x.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  const int64_t size = rows.unwrap() * columns.unwrap();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const int64_t row = i % size / columns.unwrap(), column = i % columns.unwrap();
    to[i / size * size + column * rows.unwrap() + row] = from[i];
  }
}

}  // namespace userlib

// The half of the header library that needs no GPU, open to Python for test_headers_host.py.
//
// Patterns and types of a TensorMatcher are C++, so each function below is one matcher; what it is shown comes from Python.
#include <jitk/check.h>
#include <jitk/dtype.h>
#include <jitk/fast_divisor.h>
#include <jitk/rows.h>
#include <jitk/tensor.h>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace jitk;
using namespace jitk::host;

using Int64s = std::vector<int64_t>;

// What a kernel would be given, without a tensor behind it.
struct Argument {
  Int64s sizes;
  Int64s strides;
  DLDataType dtype;
  DLDevice device;
  std::string name;
  uint64_t address;

  operator TensorView() const {
    TensorView view = {};
    view.data_ = reinterpret_cast<void*>(address);
    view.sizes_ = sizes.data();
    view.strides_ = strides.data();
    view.ndim_ = static_cast<int32_t>(sizes.size());
    view.dtype_ = dtype;
    view.device_ = device;
    view.name_ = name.c_str();
    return view;
  }
};

Argument make_argument(Int64s sizes, Int64s strides, std::pair<int, int> dtype, std::pair<int, int> device, std::string name,
                       uint64_t address) {
  return {std::move(sizes),
          std::move(strides),
          DLDataType{static_cast<uint8_t>(dtype.first), static_cast<uint8_t>(dtype.second), 1},
          DLDevice{static_cast<DLDeviceType>(device.first), device.second},
          std::move(name),
          address};
}

Int64s match_norm(const Argument& input, const Argument& residual, const Argument& weight) {
  SymbolicSize tokens{"tokens"}, hidden{"hidden"};
  SymbolicDType dtype;
  SymbolicDevice device;
  TensorMatcher({tokens, hidden}).with_dtype<fp16_t, bf16_t>(dtype).with_device<kDLCUDA>(device).verify(input).verify(residual);
  TensorMatcher({hidden}).with_dtype<fp32_t>().with_device(device).verify(weight);
  return {tokens.unwrap(), hidden.unwrap(), dtype.is_type<bf16_t>(), device.unwrap().device_id};
}

void match_any_by_8(const Argument& x) {
  constexpr uint32_t kWidth = 8;  // a kernel's constants are unsigned more often than not
  TensorMatcher({-1, kWidth}).verify(x);
}

Int64s match_halves(const Argument& input, const Argument& out) {
  SymbolicSize tokens{"tokens"}, d{"d"};
  TensorMatcher({tokens, 2 * d}).verify(input);
  TensorMatcher({tokens, d}).verify(out);
  return {tokens.unwrap(), d.unwrap()};
}

int64_t match_row_stride(const Argument& x, const Argument& y) {
  SymbolicSize stride{"row stride"};
  TensorMatcher({-1, -1}).with_strides({stride, 1}).verify(x).verify(y);
  return stride.unwrap();
}

void match_fixed_strides(const Argument& x) { TensorMatcher({-1, 4}).with_strides({16, 1}).verify(x); }

void match_even_stride(const Argument& x) {
  SymbolicSize half{"half"};
  TensorMatcher({-1, -1}).with_strides({2 * half, 1}).verify(x);
}

// The options are the symbols' own; passing the symbols by reference must not lose them.
void match_symbols_with_options(const Argument& x) {
  SymbolicDType dtype;
  dtype.set_options<int32_t, int64_t>();
  SymbolicDevice device;
  device.set_options<kDLCUDA>();
  TensorMatcher({-1}).with_dtype(dtype).with_device(device).verify(x);
}

void match_bool(const Argument& x) { TensorMatcher({-1}).with_dtype<bool>().verify(x); }

void match_like(const Argument& x, const Argument& y) {
  TensorMatcher({-1}).with_dtype(static_cast<TensorView>(x).dtype()).with_device(static_cast<TensorView>(x).device()).verify(y);
}

Int64s match_leading(const Argument& x, const Argument& y) {
  SymbolicDims batch{"batch"};
  SymbolicSize hidden{"hidden"};
  TensorMatcher({batch, hidden}).verify(x).verify(y);
  const IntList sizes = batch.value();
  return Int64s(sizes.begin(), sizes.end());
}

Int64s match_rows(const Argument& x) {
  SymbolicDims batch{"batch"};
  SymbolicSize hidden{"hidden"};
  Rows rows;
  TensorMatcher({batch, hidden}).with_rows(rows).verify(x);
  return {rows.count, rows.width, rows.stride};
}

int64_t match_ten(const Argument& x) {
  SymbolicSize last{"last"};
  TensorMatcher({-1, -1, -1, -1, -1, -1, -1, -1, -1, last}).verify(x);
  return last.unwrap();
}

void match_strides_of_another_rank() { TensorMatcher({1, 1}).with_strides({1}); }

void match_aligned(const Argument& x) { TensorMatcher({-1, -1}).with_strides({-1, 1}).ensure_alignment(16).verify(x); }

int64_t unwrap_unbound() {
  SymbolicSize hidden{"hidden"};
  return hidden.unwrap();
}

void unwrap_unbound_dtype() {
  SymbolicDType dtype;
  (void)dtype.unwrap();
}

void check_values(int64_t integer, double number, bool boolean, const std::string& text, const Int64s& list) {
  RuntimeCheck(false, integer, ' ', number, ' ', boolean, ' ', text.c_str(), ' ',
               IntList{list.data(), static_cast<int64_t>(list.size())});
}

void check_limits() {
  RuntimeCheck(false, INT64_MIN, ' ', INT64_MAX, ' ', UINT64_MAX, ' ', int8_t{-128}, ' ', static_cast<const char*>(nullptr));
}

void check_long(const std::string& text) { RuntimeCheck(false, text.c_str()); }

void check_without_text(bool failed) { RuntimeCheck(!failed); }

void panic_with_values(int64_t value) { Panic("unsupported head_dim ", value); }

Int64s count(int64_t begin, int64_t end) {
  Int64s seen;
  for (int64_t i : irange(begin, end)) seen.push_back(i);
  return seen;
}

Int64s count_to(int64_t end) {
  Int64s seen;
  for (int64_t i : irange(end)) seen.push_back(i);
  return seen;
}

template <typename N>
std::vector<std::pair<N, N>> divide(uint64_t divisor, const std::vector<N>& numerators) {
  const FastDivisor fast(divisor);
  std::vector<std::pair<N, N>> results;
  for (N n : numerators) {
    const auto result = fast.divide(n);
    if (result.quotient != n / fast || result.remainder != n % fast)
      throw std::runtime_error("the operators differ from divide");
    results.emplace_back(result.quotient, result.remainder);
  }
  return results;
}

PYBIND11_MODULE(host_tests, m) {
  py::class_<Argument>(m, "Argument").def(py::init(&make_argument));
  m.def("match_norm", &match_norm);
  m.def("match_any_by_8", &match_any_by_8);
  m.def("match_halves", &match_halves);
  m.def("match_row_stride", &match_row_stride);
  m.def("match_fixed_strides", &match_fixed_strides);
  m.def("match_even_stride", &match_even_stride);
  m.def("match_symbols_with_options", &match_symbols_with_options);
  m.def("match_bool", &match_bool);
  m.def("match_like", &match_like);
  m.def("match_leading", &match_leading);
  m.def("match_rows", &match_rows);
  m.def("match_ten", &match_ten);
  m.def("match_strides_of_another_rank", &match_strides_of_another_rank);
  m.def("match_aligned", &match_aligned);
  m.def("unwrap_unbound", &unwrap_unbound);
  m.def("unwrap_unbound_dtype", &unwrap_unbound_dtype);
  m.def("check_values", &check_values);
  m.def("check_limits", &check_limits);
  m.def("check_long", &check_long);
  m.def("check_without_text", &check_without_text);
  m.def("panic_with_values", &panic_with_values);
  m.def("count", &count);
  m.def("count_to", &count_to);
  m.def("div_ceil", &div_ceil<int64_t, int64_t>);
  m.def("divide_u64", &divide<uint64_t>);
  m.def("divide_i64", &divide<int64_t>);
  m.def("divide_u32", &divide<uint32_t>);
  m.def("divide_i32", &divide<int32_t>);
  m.def("divide_u8", &divide<uint8_t>);
}

// Reads a kernel's tensor arguments like a type signature, and says precisely what does not fit.
//
//   SymbolicSize tokens{"tokens"}, hidden{"hidden"};
//   SymbolicDevice device;
//   TensorMatcher({tokens, hidden}).with_dtype<fp16_t, bf16_t>().with_device<kDLCUDA>(device).verify(input).verify(residual);
//   TensorMatcher({2 * hidden}).with_dtype<float>().with_device(device).verify(weight);
//   int64_t rows = tokens.unwrap();
//
// A symbol takes the value of the first tensor that it meets; later tensors must agree. -1 matches any size or stride. Without
// with_strides a tensor must be contiguous; without with_device it must be where the file's code runs. A dimension of size 1
// has no stride to check, nor has a tensor without elements. SymbolicDims stands for any number of leading dimensions. A
// matcher is one
// expression and not to be kept in a variable: its patterns end with the expression.
// Left out: making tensors (result.h), collapsing dimensions into rows (rows.h).
#pragma once

#include <jitk/abi.h>    // TensorView
#include <jitk/check.h>  // panic, DebugInfo
#include <jitk/dtype.h>  // dtype_of

#include <initializer_list>  // TensorMatcher({N, D})

namespace jitk {
namespace host {

// A size or stride that several tensors share.
class SymbolicSize {
 public:
  SymbolicSize(const char* name = "size") : name_(name) {}
  SymbolicSize(const SymbolicSize&) = delete;
  SymbolicSize& operator=(const SymbolicSize&) = delete;

  const char* get_name() const { return name_; }
  bool has_value() const { return bound_by_ != nullptr; }
  const char* bound_by() const { return bound_by_; }
  void set_value(int64_t value, const char* bound_by = "the caller") {
    value_ = value;
    bound_by_ = bound_by;
  }
  int64_t unwrap(DebugInfo where = {}) const {
    RuntimeCheck(where, has_value(), "the size '", name_, "' was read before a tensor gave it a value");
    return value_;
  }
  int64_t value() const { return value_; }

 private:
  const char* name_;
  const char* bound_by_ = nullptr;
  int64_t value_ = 0;
};

// Any number of leading dimensions, also none, that several tensors share.
class SymbolicDims {
 public:
  SymbolicDims(const char* name = "batch") : name_(name) {}
  SymbolicDims(const SymbolicDims&) = delete;
  SymbolicDims& operator=(const SymbolicDims&) = delete;

  const char* get_name() const { return name_; }
  bool has_value() const { return bound_by_ != nullptr; }
  const char* bound_by() const { return bound_by_; }
  void set_value(IntList sizes, const char* bound_by) {
    sizes_ = sizes;
    bound_by_ = bound_by;
  }
  IntList value() const { return sizes_; }

 private:
  const char* name_;
  const char* bound_by_ = nullptr;
  IntList sizes_{nullptr, 0};
};

namespace details {

template <typename... Ts>
struct DTypeOptions {
  static constexpr DLDataType value[sizeof...(Ts)] = {dtype_of<Ts>()...};
};
template <DLDeviceType... kTypes>
struct DeviceOptions {
  static constexpr DLDevice value[sizeof...(kTypes)] = {{kTypes, -1}...};
};

inline bool accepts(DLDataType option, DLDataType actual) { return option == actual; }
inline bool accepts(DLDevice option, DLDevice actual) {
  return option.device_type == actual.device_type && (option.device_id < 0 || option.device_id == actual.device_id);
}

// A set of allowed values in static memory; empty means any.
template <typename T>
struct Options {
  const T* data = nullptr;
  int32_t count = 0;

  bool allow(T value) const {
    for (int32_t i = 0; i < count; ++i) {
      if (accepts(data[i], value)) return true;
    }
    return count == 0;
  }
};

template <typename T>
Message& operator<<(Message& message, Options<T> options) {
  for (int32_t i = 0; i < options.count; ++i) message << (i > 0 ? "|" : "") << options.data[i];
  return options.count == 0 ? message << "any" : message;
}

// What SymbolicDType and SymbolicDevice have in common. Options belong to the symbol for good: a matcher narrows them for its
// own tensors and never takes them away.
template <typename T>
class Symbol {
 public:
  Symbol() = default;
  Symbol(const Symbol&) = delete;
  Symbol& operator=(const Symbol&) = delete;

  bool has_value() const { return bound_by_ != nullptr; }
  const char* bound_by() const { return bound_by_; }
  void set_value(T value, const char* bound_by = "the caller") {
    value_ = value;
    bound_by_ = bound_by;
  }
  T unwrap(DebugInfo where = {}) const {
    RuntimeCheck(where, has_value(), "a symbol was read before a tensor gave it a value");
    return value_;
  }
  T value() const { return value_; }
  Options<T> options() const { return options_; }

 protected:
  Options<T> options_;

 private:
  T value_{};
  const char* bound_by_ = nullptr;
};

}  // namespace details

class SymbolicDType : public details::Symbol<DLDataType> {
 public:
  template <typename... Ts>
  void set_options() {
    options_ = {details::DTypeOptions<Ts...>::value, sizeof...(Ts)};
  }
  template <typename T>
  bool is_type() const {
    return has_value() && value() == dtype_of<T>();
  }
};

class SymbolicDevice : public details::Symbol<DLDevice> {
 public:
  template <DLDeviceType... kTypes>
  void set_options() {
    options_ = {details::DeviceOptions<kTypes...>::value, sizeof...(kTypes)};
  }
};

template <typename T>
bool is_type(DLDataType dtype) {
  return dtype == dtype_of<T>();
}

inline size_t dtype_bytes(DLDataType dtype) { return dtype.bits / 8; }

// One entry of a shape or stride pattern: a number, -1, a symbol, a multiple of a symbol, or leading dimensions.
struct SizePattern {
  int64_t number = -1;  // without a symbol: the value, or -1 for any; with one: the factor
  SymbolicSize* symbol = nullptr;
  SymbolicDims* dims = nullptr;

  SizePattern() = default;
  template <typename Int, typename std::enable_if<std::is_integral<Int>::value, int>::type = 0>
  SizePattern(Int value) : number(static_cast<int64_t>(value)) {}
  SizePattern(SymbolicSize& size, int64_t factor = 1) : number(factor), symbol(&size) {}
  SizePattern(SymbolicDims& leading) : dims(&leading) {}
};

inline SizePattern operator*(int64_t factor, SymbolicSize& size) { return SizePattern(size, factor); }

struct Rows;
bool collapse(const TensorView& view, Rows* rows);  // rows.h

class TensorMatcher {
 public:
  explicit TensorMatcher(std::initializer_list<SizePattern> shape) {
    shape_ = shape.begin();
    shape_count_ = static_cast<int32_t>(shape.size());
  }
  TensorMatcher(const TensorMatcher&) = delete;
  TensorMatcher& operator=(const TensorMatcher&) = delete;

  TensorMatcher&& with_strides(std::initializer_list<SizePattern> strides, DebugInfo where = {}) && {
    RuntimeCheck(where, static_cast<int32_t>(strides.size()) == shape_count_, "with_strides gives ", strides.size(),
                 " strides for ", shape_count_, " dimensions");
    strides_ = strides.begin();
    strides_count_ = shape_count_;
    return static_cast<TensorMatcher&&>(*this);
  }

  // Any strides whose leading dimensions walk in equal steps over dense last dimensions; `rows` says how.
  TensorMatcher&& with_rows(Rows& rows) && {
    rows_ = &rows;
    collapse_ = &collapse;
    return static_cast<TensorMatcher&&>(*this);
  }

  template <typename... Ts>
  TensorMatcher&& with_dtype(SymbolicDType& symbol) && {
    dtype_ = &symbol;
    return static_cast<TensorMatcher&&>(*this).template with_dtype<Ts...>();
  }
  template <typename... Ts>
  TensorMatcher&& with_dtype() && {
    if constexpr (sizeof...(Ts) > 0) dtype_options_ = {details::DTypeOptions<Ts...>::value, sizeof...(Ts)};
    return static_cast<TensorMatcher&&>(*this);
  }
  TensorMatcher&& with_dtype(const DLDataType& dtype) && {
    dtype_options_ = {&dtype, 1};
    return static_cast<TensorMatcher&&>(*this);
  }

  template <DLDeviceType... kTypes>
  TensorMatcher&& with_device(SymbolicDevice& symbol) && {
    device_ = &symbol;
    return static_cast<TensorMatcher&&>(*this).template with_device<kTypes...>();
  }
  template <DLDeviceType... kTypes>
  TensorMatcher&& with_device() && {
    if constexpr (sizeof...(kTypes) > 0) {
      device_options_ = {details::DeviceOptions<kTypes...>::value, sizeof...(kTypes)};
    } else if (device_ != nullptr && (device_->has_value() || device_->options().count > 0)) {
      device_options_ = {};  // the symbol's own value or options hold
    }
    return static_cast<TensorMatcher&&>(*this);
  }
  TensorMatcher&& with_device(const DLDevice& device) && {
    device_options_ = {&device, 1};
    return static_cast<TensorMatcher&&>(*this);
  }

  // The data and every stride but the last are multiples of `bytes`.
  TensorMatcher&& ensure_alignment(int64_t bytes) && {
    alignment_ = bytes;
    return static_cast<TensorMatcher&&>(*this);
  }

  TensorMatcher&& verify(const TensorView& view, DebugInfo where = {}) && {
    Problem problem = match(view);
    if (__builtin_expect(problem.kind != Problem::kNone, 0)) fail(view, problem, where);
    return static_cast<TensorMatcher&&>(*this);
  }

 private:
  struct Problem {
    enum Kind { kNone, kRank, kSize, kMultiple, kDims, kStride, kContiguous, kRows, kDType, kDevice, kAlignment };
    Kind kind = kNone;
    int32_t dim = 0;
  };

#if defined(__CUDACC__)
  using DefaultDevice = details::DeviceOptions<kDLCUDA>;
#else
  using DefaultDevice = details::DeviceOptions<kDLCPU>;
#endif

  static bool fits(SizePattern pattern, int64_t value, const char* who) {
    if (pattern.symbol == nullptr) return pattern.number < 0 || pattern.number == value;
    if (pattern.symbol->has_value()) return pattern.symbol->value() * pattern.number == value;
    if (value % pattern.number != 0) return false;
    pattern.symbol->set_value(value / pattern.number, who);
    return true;
  }

  bool has_leading() const { return shape_count_ > 0 && shape_[0].dims != nullptr; }

  [[gnu::noinline]] Problem match(const TensorView& view) const {
    const int32_t fixed = shape_count_ - (has_leading() ? 1 : 0);
    const int32_t leading = view.dim() - fixed;
    if (leading < 0 || (leading > 0 && !has_leading())) return {Problem::kRank, 0};
    if (has_leading()) {
      SymbolicDims& dims = *shape_[0].dims;
      if (!dims.has_value()) dims.set_value({view.sizes_, leading}, view.name());
      if (dims.value().size() != leading) return {Problem::kDims, 0};
      for (int32_t i = 0; i < leading; ++i) {
        if (dims.value()[i] != view.sizes_[i]) return {Problem::kDims, i};
      }
    }
    for (int32_t i = 0; i < fixed; ++i) {
      const SizePattern pattern = shape_[shape_count_ - fixed + i];
      if (!fits(pattern, view.sizes_[leading + i], view.name())) {
        const bool bound = pattern.symbol == nullptr || pattern.symbol->has_value();
        return {bound ? Problem::kSize : Problem::kMultiple, leading + i};
      }
    }
    if (rows_ != nullptr) {
      if (!collapse_(view, rows_)) return {Problem::kRows, 0};
    } else if (strides_count_ == 0) {
      if (!view.is_contiguous()) return {Problem::kContiguous, 0};
    } else {
      const bool empty = view.numel() == 0;
      for (int32_t i = 0; i < fixed; ++i) {
        const SizePattern pattern = strides_[shape_count_ - fixed + i];
        const bool free = empty || view.sizes_[leading + i] == 1;
        const bool unbound = pattern.symbol != nullptr && !pattern.symbol->has_value();
        if ((!free || unbound) && !fits(pattern, view.strides_[leading + i], view.name()))
          return {Problem::kStride, leading + i};
      }
    }
    if (!dtype_options_.allow(view.dtype())) return {Problem::kDType, 0};
    if (dtype_ != nullptr) {
      if (!dtype_->options().allow(view.dtype())) return {Problem::kDType, 0};
      if (!dtype_->has_value()) dtype_->set_value(view.dtype(), view.name());
      if (dtype_->value() != view.dtype()) return {Problem::kDType, 0};
    }
    if (!device_options_.allow(view.device())) return {Problem::kDevice, 0};
    if (device_ != nullptr) {
      if (!device_->options().allow(view.device())) return {Problem::kDevice, 0};
      if (!device_->has_value()) device_->set_value(view.device(), view.name());
      if (device_->value() != view.device()) return {Problem::kDevice, 0};
    }
    if (alignment_ > 1 && !aligned(view)) return {Problem::kAlignment, 0};
    return {};
  }

  bool aligned(const TensorView& view) const {
    if (reinterpret_cast<uintptr_t>(view.data_ptr()) % static_cast<uintptr_t>(alignment_) != 0) return false;
    for (int32_t i = 0; i + 1 < view.dim(); ++i) {
      if (view.sizes_[i] != 1 && view.strides_[i] * view.dtype().bits / 8 % alignment_ != 0) return false;
    }
    return true;
  }

  JITK_COLD static void print(Message& to, SizePattern pattern) {
    if (pattern.dims != nullptr) {
      if (!pattern.dims->has_value()) {
        to << pattern.dims->get_name() << "...";
        return;
      }
      const IntList sizes = pattern.dims->value();
      if (sizes.size() == 1) to << pattern.dims->get_name() << '=';
      for (int64_t i = 0; i < sizes.size(); ++i) to << (i > 0 ? ", " : "") << sizes[i];
    } else if (pattern.symbol == nullptr) {
      pattern.number < 0 ? to << '*' : to << pattern.number;
    } else {
      if (pattern.number != 1) to << pattern.number << '*';
      to << pattern.symbol->get_name();
      if (pattern.symbol->has_value()) to << '=' << pattern.symbol->value() * pattern.number;
    }
  }

  JITK_COLD static void print(Message& to, const SizePattern* patterns, int32_t count) {
    to << '[';
    for (int32_t i = 0; i < count; ++i) {
      const bool nothing =
          patterns[i].dims != nullptr && patterns[i].dims->has_value() && patterns[i].dims->value().size() == 0;
      if (nothing) continue;
      if (to.text()[to.size() - 1] != '[') to << ", ";
      print(to, patterns[i]);
    }
    to << ']';
  }

  [[noreturn]] JITK_COLD void fail(const TensorView& view, Problem problem, DebugInfo where) const {
    Message expected_shape, expected_dtype, expected_device, got_dtype, got_device, got_shape, text;
    print(expected_shape, shape_, shape_count_);
    got_shape << view.shape();
    if (dtype_ != nullptr && dtype_->has_value()) {
      expected_dtype << dtype_->value();
    } else {
      expected_dtype << (dtype_options_.count > 0 || dtype_ == nullptr ? dtype_options_ : dtype_->options());
    }
    if (device_ != nullptr && device_->has_value()) {
      expected_device << device_->value();
    } else {
      expected_device << (device_options_.count > 0 || device_ == nullptr ? device_options_ : device_->options());
    }
    got_dtype << view.dtype();
    got_device << view.device();
    const size_t shape_width = expected_shape.size() > got_shape.size() ? expected_shape.size() : got_shape.size();
    const size_t dtype_width = expected_dtype.size() > got_dtype.size() ? expected_dtype.size() : got_dtype.size();

    text << "argument '" << view.name() << "' does not match";
    size_t start = text.size() + 1;
    text << "\n  expected  " << expected_shape;
    text.pad_to(14 + shape_width, start) << expected_dtype;
    text.pad_to(16 + shape_width + dtype_width, start) << expected_device;
    if (strides_count_ > 0) {
      text << "  strides ";
      print(text, strides_, strides_count_);
    } else {
      text << (rows_ != nullptr ? "  row stride free" : "  contiguous");
    }
    start = text.size() + 1;
    text << "\n  got       " << got_shape;
    text.pad_to(14 + shape_width, start) << got_dtype;
    text.pad_to(16 + shape_width + dtype_width, start) << got_device;
    if (!view.is_contiguous()) text << "  strides " << view.strides();
    text << "\n  ";
    explain(text, view, problem);
    panic_with(text, where);
  }

  JITK_COLD void explain(Message& text, const TensorView& view, Problem problem) const {
    const int32_t fixed = shape_count_ - (has_leading() ? 1 : 0);
    const int32_t at = problem.dim - (view.dim() - fixed) + shape_count_ - fixed;
    switch (problem.kind) {
      case Problem::kNone: break;
      case Problem::kRank:
        text << "it has " << view.dim() << " dimensions, expected " << (has_leading() ? "at least " : "") << fixed;
        break;
      case Problem::kSize:
        text << "dimension " << problem.dim << ": ";
        if (shape_[at].symbol != nullptr) {
          const SymbolicSize& size = *shape_[at].symbol;
          text << size.get_name() << " was bound to " << size.value() << " by '" << size.bound_by() << '\'';
        } else {
          text << "expected " << shape_[at].number;
        }
        break;
      case Problem::kMultiple:
        text << "dimension " << problem.dim << ": " << view.sizes_[problem.dim] << " is not a multiple of "
             << shape_[at].number;
        break;
      case Problem::kDims:
        text << "leading dimensions: " << shape_[0].dims->get_name() << " was bound to " << shape_[0].dims->value() << " by '"
             << shape_[0].dims->bound_by() << '\'';
        break;
      case Problem::kStride:
        text << "stride of dimension " << problem.dim << " is " << view.strides_[problem.dim] << ", expected ";
        if (strides_[at].symbol != nullptr && !strides_[at].symbol->has_value()) {
          text << "a multiple of " << strides_[at].number;
        } else if (strides_[at].symbol != nullptr) {
          const SymbolicSize& size = *strides_[at].symbol;
          text << size.value() * strides_[at].number << " (" << size.get_name() << " was bound by '" << size.bound_by() << "')";
        } else {
          text << strides_[at].number << "; pass " << view.name() << ".contiguous()";
        }
        break;
      case Problem::kContiguous: text << "it is not contiguous; pass " << view.name() << ".contiguous()"; break;
      case Problem::kRows:
        text << "its strides do not walk over dense rows in equal steps; pass " << view.name() << ".contiguous()";
        break;
      case Problem::kDType:
        if (dtype_ != nullptr && dtype_->has_value() && dtype_->value() != view.dtype()) {
          text << "dtype was bound to " << dtype_->value() << " by '" << dtype_->bound_by() << '\'';
        } else {
          text << "dtype " << view.dtype() << " is not among those expected";
        }
        break;
      case Problem::kDevice:
        if (device_ != nullptr && device_->has_value() && device_->value() != view.device()) {
          text << "device was bound to " << device_->value() << " by '" << device_->bound_by() << '\'';
        } else {
          text << "device " << view.device() << " is not among those expected";
        }
        break;
      case Problem::kAlignment: text << "its data or a stride is not aligned to " << alignment_ << " bytes"; break;
    }
  }

  [[noreturn]] JITK_COLD static void panic_with(Message& text, DebugInfo where) {
    text << "\n  at " << where;
    throw PanicError(text);
  }

  const SizePattern* shape_ = nullptr;
  const SizePattern* strides_ = nullptr;
  int32_t shape_count_ = 0;
  int32_t strides_count_ = 0;
  details::Options<DLDataType> dtype_options_;
  details::Options<DLDevice> device_options_{DefaultDevice::value, 1};
  SymbolicDType* dtype_ = nullptr;
  SymbolicDevice* device_ = nullptr;
  Rows* rows_ = nullptr;
  bool (*collapse_)(const TensorView&, Rows*) = nullptr;
  int64_t alignment_ = 1;
};

}  // namespace host
}  // namespace jitk

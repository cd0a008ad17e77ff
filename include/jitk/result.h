// Tensors that an op makes, allocated by the runtime in PyTorch's allocator.
//
//   void silu_and_mul(TensorView input, Output& out) {
//     Shape shape(input.shape());
//     shape[-1] /= 2;
//     TensorView to = out.empty(shape, input.dtype(), input.device());
//
// An Output is a result of the op. `torch.ops.jitk.silu_and_mul(x)` has it made here; `silu_and_mul.out(x, out=y)` has passed `y`,
// which it then is, of whatever shape: the matcher verifies it. A Tensor is one that the host code keeps to itself, for scratch,
// or the result of a function of load_jit.
// Left out: every operation on tensors. A kernel works on views.
#pragma once

#include <jitk/abi.h>    // HostApi, TensorView
#include <jitk/check.h>  // PanicError

namespace jitk {

// The runtime that called into this variant. Set before any exported function runs.
inline const HostApi* host_api = nullptr;

namespace host {

// The runtime has already recorded why a call of the HostApi failed.
struct ReportedError {};

class Shape {
 public:
  static constexpr int32_t kMaxDims = 64;  // PyTorch's own limit

  explicit Shape(IntList sizes) : ndim_(static_cast<int32_t>(sizes.size())) {
    RuntimeCheck(ndim_ <= kMaxDims, "a tensor has at most ", kMaxDims, " dimensions, got ", ndim_);
    for (int32_t i = 0; i < ndim_; ++i) sizes_[i] = sizes[i];
  }
  int64_t& operator[](int32_t i) {
    const int32_t at = i < 0 ? i + ndim_ : i;
    RuntimeCheck(at >= 0 && at < ndim_, "dimension ", i, " of a tensor with ", ndim_, " dimensions");
    return sizes_[at];
  }
  operator IntList() const { return {sizes_, ndim_}; }

 private:
  int64_t sizes_[kMaxDims];
  int32_t ndim_;
};

}  // namespace host

class Tensor {
 public:
  Tensor(void* handle, TensorView view) : handle_(handle), view_(view) {}
  Tensor(Tensor&& other) noexcept : handle_(other.handle_), view_(other.view_) { other.handle_ = nullptr; }
  Tensor& operator=(Tensor&& other) noexcept {
    void* mine = handle_;
    handle_ = other.handle_;
    view_ = other.view_;
    other.handle_ = mine;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) host_api->release(handle_);
  }

  operator TensorView() const { return view_; }
  TensorView view() const { return view_; }
  void* data_ptr() const { return view_.data_ptr(); }
  // Gives up ownership.
  void* release() {
    void* handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  void* handle_;
  TensorView view_;
};

namespace host {

inline Tensor empty(IntList shape, DLDataType dtype, DLDevice device, const char* name = "out") {
  void* handle = nullptr;
  TensorView view;
  if (host_api->allocate(shape.data, static_cast<int32_t>(shape.count), dtype, device, &handle, &view) != 0)
    throw ReportedError{};
  view.name_ = name;
  return Tensor(handle, view);
}

// Contiguous, whatever the strides of `like`.
inline Tensor empty_like(TensorView like, const char* name = "out") {
  return empty(like.shape(), like.dtype(), like.device(), name);
}

}  // namespace host

// A result of an op: a tensor of the caller's, or one to be made. Without either it is None, which only `Tensor | None` may be.
class Output {
 public:
  // As the runtime passes it. A tensor that is made is the runtime's from then on.
  Output(const Value& passed, Value* result)
      : given_(passed.kind == ValueKind::kTensor ? passed.tensor : nullptr),
        name_(given_ != nullptr ? given_->name_ : passed.name),
        result_(result) {}
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  // The caller's tensor as it is; else a contiguous one, uninitialised.
  TensorView empty(IntList shape, DLDataType dtype, DLDevice device) {
    if (given_ != nullptr) return *given_;
    host::RuntimeCheck(result_->kind == ValueKind::kNone, "the output '", name_, "' is made a second time");
    TensorView view;
    void* handle = nullptr;
    if (host_api->allocate(shape.data, static_cast<int32_t>(shape.count), dtype, device, &handle, &view) != 0)
      throw host::ReportedError{};
    result_->kind = ValueKind::kOwnedTensor;
    result_->handle = handle;
    view.name_ = name_;
    return view;
  }
  TensorView empty_like(const TensorView& like) { return empty(like.shape(), like.dtype(), like.device()); }

  // Whether it is the caller's.
  bool is_given() const { return given_ != nullptr; }
  const char* name() const { return name_; }

 private:
  const TensorView* given_;
  const char* name_;
  Value* result_;
};

// A result that is a list of tensors, each made when it is added.
class OutputList {
 public:
  OutputList(const Value& passed, Value* result) : name_(passed.name), result_(result) { result->handle = nullptr; }
  OutputList(const OutputList&) = delete;
  OutputList& operator=(const OutputList&) = delete;

  // Contiguous and uninitialised.
  TensorView add(IntList shape, DLDataType dtype, DLDevice device) {
    TensorView view;
    void* list = result_->handle;
    const int failed = host_api->append(shape.data, static_cast<int32_t>(shape.count), dtype, device, &list, &view);
    result_->handle = list;
    if (list != nullptr) result_->kind = ValueKind::kOwnedList;
    if (failed != 0) throw host::ReportedError{};
    view.name_ = name_;
    return view;
  }
  TensorView add_like(const TensorView& like) { return add(like.shape(), like.dtype(), like.device()); }

 private:
  const char* name_;
  Value* result_;
};

namespace host {

// body(begin, end) over [0, count) in PyTorch's thread pool, in pieces of at least `grain`. What a body throws first is thrown again
// here, by its text: an exception does not pass the pool, which is C.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  struct Work {
    const Body& body;
    int32_t failed;
    Message text;
  } work{body, 0, {}};
  const auto run = [](void* context, int64_t begin, int64_t end) {
    Work& mine = *static_cast<Work*>(context);
    try {
      mine.body(begin, end);
    } catch (const std::exception& error) {
      if (__atomic_exchange_n(&mine.failed, 1, __ATOMIC_RELAXED) == 0) mine.text << error.what();
    }
  };
  if (host_api->parallel_for(count, grain, run, &work) != 0) throw ReportedError{};
  if (work.failed != 0) throw PanicError(work.text);
}

}  // namespace host
}  // namespace jitk

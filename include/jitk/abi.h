// The plain-C contract between a compiled variant and the runtime that calls it.
//
//   JITK_EXPORT(...)                      a variant exports Entry functions            (jitk/export.h)
//   csrc/runtime/dispatch.cpp             calls them and serves HostApi                (the only C++ that knows PyTorch)
//
// A variant includes neither PyTorch nor DLPack: it is compiled in about a second and outlives an upgrade of PyTorch. Every
// struct here is read by code that was compiled at another time: change a layout and kAbiVersion together.
// Left out: checking (check.h, tensor.h) and launching (launch.cuh).
#pragma once

#include <jitk/debug.h>  // JITK_CHECKED_INDEX

#include <cstddef>  // size_t
#include <cstdint>  // int64_t and friends

namespace jitk {

constexpr uint32_t kAbiVersion = 2;

// Names and values are DLPack's, so that kernels written against it keep their spelling.
enum DLDeviceType : int32_t {
  kDLCPU = 1,
  kDLCUDA = 2,
  kDLCUDAHost = 3,
  kDLMetal = 8,
  kDLROCM = 10,
  kDLOneAPI = 14,
  kDLExtDev = 12
};

constexpr DLDeviceType kDLGPU = kDLCUDA;
constexpr DLDeviceType kDLGPUHost = kDLCUDAHost;

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

enum DLDataTypeCode : uint8_t {
  kDLInt = 0,
  kDLUInt = 1,
  kDLFloat = 2,
  kDLBfloat = 4,
  kDLComplex = 5,
  kDLBool = 6,
  kDLFloat8_e4m3fn = 10,
  kDLFloat8_e4m3fnuz = 11,
  kDLFloat8_e5m2 = 12,
  kDLFloat8_e5m2fnuz = 13,
  kDLFloat8_e8m0fnu = 14,
  kDLFloat4_e2m1fn = 17,
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

constexpr bool operator==(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
constexpr bool operator!=(DLDataType a, DLDataType b) { return !(a == b); }
constexpr bool operator==(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }
constexpr bool operator!=(DLDevice a, DLDevice b) { return !(a == b); }

// A list of integers that somebody else owns: sizes, strides, an int[] argument.
struct IntList {
  const int64_t* data;
  int64_t count;

  constexpr int64_t size() const { return count; }
  constexpr int64_t operator[](int64_t i) const { return data[JITK_CHECKED_INDEX(i, count, "element", "a list")]; }
  constexpr const int64_t* begin() const { return data; }
  constexpr const int64_t* end() const { return data + count; }
};

// A tensor that the caller keeps alive for the duration of the call. Sizes and strides count elements.
struct TensorView {
  void* data_;
  const int64_t* sizes_;
  const int64_t* strides_;
  int32_t ndim_;
  DLDataType dtype_;
  DLDevice device_;
  const char* name_;  // of the argument, for errors; may be null

  void* data_ptr() const { return data_; }
  int32_t dim() const { return ndim_; }
  int32_t ndim() const { return ndim_; }
  int64_t size(int64_t i) const { return sizes_[JITK_CHECKED_INDEX(i < 0 ? i + ndim_ : i, ndim_, "dimension", name())]; }
  int64_t stride(int64_t i) const { return strides_[JITK_CHECKED_INDEX(i < 0 ? i + ndim_ : i, ndim_, "dimension", name())]; }
  IntList shape() const { return {sizes_, ndim_}; }
  IntList strides() const { return {strides_, ndim_}; }
  DLDataType dtype() const { return dtype_; }
  DLDevice device() const { return device_; }
  const char* name() const { return name_ != nullptr ? name_ : "tensor"; }
  int64_t numel() const {
    int64_t product = 1;
    for (int32_t i = 0; i < ndim_; ++i) product *= sizes_[i];
    return product;
  }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int32_t i = ndim_ - 1; i >= 0; --i) {
      if (sizes_[i] != 1 && strides_[i] != expected) return false;
      expected *= sizes_[i];
    }
    return true;
  }
};

// Lists of floats and of tensors that somebody else owns: float[] and Tensor[] arguments.
struct FloatList {
  const double* data;
  int64_t count;

  constexpr int64_t size() const { return count; }
  constexpr double operator[](int64_t i) const { return data[i]; }
  constexpr const double* begin() const { return data; }
  constexpr const double* end() const { return data + count; }
};

struct TensorList {
  const TensorView* data;
  int64_t count;

  constexpr int64_t size() const { return count; }
  constexpr const TensorView& operator[](int64_t i) const { return data[i]; }
  constexpr const TensorView* begin() const { return data; }
  constexpr const TensorView* end() const { return data + count; }
};

enum class ValueKind : int32_t {
  kNone = 0,
  kTensor = 1,
  kInt = 2,
  kFloat = 3,
  kBool = 4,
  kString = 5,
  kIntList = 6,
  kOwnedTensor = 7,
  kTensorList = 8,
  kFloatList = 9,
  kDType = 10,
  kDevice = 11,
  kOwnedList = 12
};

// One argument or result. A null optional is kNone. So is an output that the kernel has to make: its name is `name`.
struct Value {
  ValueKind kind;
  int32_t length;  // of a string or a list
  union {
    const TensorView* tensor;
    int64_t integer;
    double number;
    bool boolean;
    const char* text;  // not terminated
    const int64_t* list;
    const double* numbers;
    const TensorView* tensors;
    DLDataType dtype;
    DLDevice device;
    const char* name;
    void* handle;  // an owned tensor or list of tensors, made by HostApi::allocate or append
  };
};
static_assert(sizeof(Value) == 16, "the runtime and the variants must agree");
static_assert(sizeof(TensorView) == 48, "the runtime and the variants must agree");

// What the runtime lends to a variant. Functions that return int return 0, or else have reported an error.
struct HostApi {
  uint32_t abi_version;
  uint32_t reserved;
  // Sets the text of the exception that the caller of the op will see.
  void (*report_error)(const char* text, size_t length);
  // PyTorch's current stream (cudaStream_t) of the CUDA device.
  int (*current_stream)(int32_t device_id, void** stream);
  // An uninitialised tensor with contiguous strides. `handle` owns it; `view` is valid for as long.
  int (*allocate)(const int64_t* sizes, int32_t ndim, DLDataType dtype, DLDevice device, void** handle, TensorView* view);
  void (*release)(void* handle);
  // body(context, begin, end) over [0, count) in PyTorch's thread pool, in pieces of at least `grain`.
  int (*parallel_for)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  // A tensor as `allocate` makes it, at the end of a list that owns it. A null list is made first.
  int (*append)(const int64_t* sizes, int32_t ndim, DLDataType dtype, DLDevice device, void** list, TensorView* view);
};

// An exported function: reads `nargs` arguments, writes its results, each of which is kNone when it begins. 0, or else an error
// was reported; what it has written by then the runtime frees.
using Entry = int (*)(const HostApi* host, const Value* args, int32_t nargs, Value* results);

}  // namespace jitk

// Exports a C++ function to the runtime. Its own signature says how arguments are read and results returned.
//
//   #include <jitk/export.h>
//   #include "activation.cu"
//   JITK_EXPORT(silu_and_mul, jitk::silu_and_mul<jitk::bf16_t>)
//
// Arguments: TensorView, any integer or enum-free number type, bool, Text, IntList, FloatList, TensorList, DLDataType, DLDevice,
// and std::optional of each. Results are parameters behind them, Output& or OutputList&; a function of load_jit may return
// Tensor or std::tuple of Tensors instead. Generated translation units end in these lines; a kernel's source does not use them.
// Left out: everything else. A signature that is not listed does not compile, with a message that says so.
#pragma once

#include <jitk/abi.h>     // Value, Entry
#include <jitk/check.h>   // PanicError
#include <jitk/result.h>  // Output, Tensor, host_api

#include <type_traits>  // which kind of argument a parameter is
#include <utility>      // index_sequence, std::get of the results

namespace jitk {

// A str argument. Not terminated.
struct Text {
  const char* data;
  int32_t length;
};

namespace details {

template <typename T>
constexpr bool kNotSupported = false;

// One parameter: `code` in the signature text, `read` from a Value.
template <typename T, typename = void>
struct Argument {
  static_assert(
      kNotSupported<T>,
      "an exported function takes TensorView, integers, floats, bool, Text, IntList, FloatList, TensorList, DLDataType, "
      "DLDevice or std::optional of them, and Output& or OutputList& for its results");
};

template <>
struct Argument<TensorView> {
  static constexpr char code = 'T';
  static TensorView read(const Value& value) { return *value.tensor; }
};

template <>
struct Argument<bool> {
  static constexpr char code = 'b';
  static bool read(const Value& value) { return value.boolean; }
};

template <typename T>
struct Argument<T, typename std::enable_if<std::is_integral<T>::value>::type> {
  static constexpr char code = 'i';
  static T read(const Value& value) {
    const T narrow = static_cast<T>(value.integer);
    host::RuntimeCheck(static_cast<int64_t>(narrow) == value.integer && (std::is_signed<T>::value || value.integer >= 0),
                       "the integer argument ", value.integer, " does not fit into ", static_cast<int32_t>(sizeof(T)),
                       " bytes");
    return narrow;
  }
};

template <typename T>
struct Argument<T, typename std::enable_if<std::is_floating_point<T>::value>::type> {
  static constexpr char code = 'f';
  static T read(const Value& value) { return static_cast<T>(value.number); }
};

template <>
struct Argument<Text> {
  static constexpr char code = 's';
  static Text read(const Value& value) { return {value.text, value.length}; }
};

template <>
struct Argument<IntList> {
  static constexpr char code = 'l';
  static IntList read(const Value& value) { return {value.list, value.length}; }
};

template <>
struct Argument<FloatList> {
  static constexpr char code = 'F';
  static FloatList read(const Value& value) { return {value.numbers, value.length}; }
};

template <>
struct Argument<TensorList> {
  static constexpr char code = 'L';
  static TensorList read(const Value& value) { return {value.tensors, value.length}; }
};

template <>
struct Argument<DLDataType> {
  static constexpr char code = 'd';
  static DLDataType read(const Value& value) { return value.dtype; }
};

template <>
struct Argument<DLDevice> {
  static constexpr char code = 'D';
  static DLDevice read(const Value& value) { return value.device; }
};

template <>
struct Argument<Output> {
  static constexpr char code = 'O';
};

template <>
struct Argument<OutputList> {
  static constexpr char code = 'P';
};

// Any template of the form of std::optional: <optional> costs compile time that most kernels need not pay.
template <template <typename> class Optional, typename T>
struct Argument<Optional<T>, void> {
  static constexpr char code = static_cast<char>(Argument<T>::code ^ 0x80);
  static Optional<T> read(const Value& value) {
    return value.kind == ValueKind::kNone ? Optional<T>() : Optional<T>(Argument<T>::read(value));
  }
};

template <typename T>
struct Result {
  static_assert(kNotSupported<T>, "an exported function returns void, Tensor or std::tuple of Tensors");
};

template <>
struct Result<void> {
  static constexpr int32_t count = 0;
};

template <>
struct Result<Tensor> {
  static constexpr int32_t count = 1;
  static void write(Tensor& tensor, Value* results) {
    results->kind = ValueKind::kOwnedTensor;
    results->handle = tensor.release();
  }
};

template <template <typename...> class Tuple, typename... Tensors>
struct Result<Tuple<Tensors...>> {
  static constexpr int32_t count = sizeof...(Tensors);
  static void write(Tuple<Tensors...>& tensors, Value* results) {
    write(tensors, results, std::index_sequence_for<Tensors...>{});
  }
  template <size_t... I>
  static void write(Tuple<Tensors...>& tensors, Value* results, std::index_sequence<I...>) {
    using std::get;
    (Result<Tensors>::write(get<I>(tensors), results + I), ...);
  }
};

template <typename T>
using Plain = typename std::remove_cv<typename std::remove_reference<T>::type>::type;

template <typename T>
constexpr bool kIsOutput = std::is_same<T, Output>::value || std::is_same<T, OutputList>::value;

// How many of the first `count` parameters are outputs.
template <typename... Args>
constexpr int32_t outputs_among(size_t count) {
  const bool is_output[] = {kIsOutput<Plain<Args>>..., false};
  int32_t outputs = 0;
  for (size_t i = 0; i < count; ++i) outputs += is_output[i] ? 1 : 0;
  return outputs;
}

// The signature as text: a code for each argument (lower bits) with '?' behind an optional one, '>' and the number of results.
template <typename R, typename... Args>
struct Signature {
  static constexpr size_t kSize = 2 * sizeof...(Args) + 3;
  char text[kSize] = {};

  constexpr Signature() {
    size_t at = 0;
    const char codes[] = {Argument<Plain<Args>>::code..., 0};
    for (size_t i = 0; i < sizeof...(Args); ++i) {
      text[at++] = static_cast<char>(codes[i] & 0x7f);
      if ((codes[i] & 0x80) != 0) text[at++] = '?';
    }
    text[at++] = '>';
    text[at++] = static_cast<char>('0' + Result<R>::count);
  }
};

template <typename R, typename... Args>
constexpr Signature<R, Args...> signature_of(R (*)(Args...)) {
  return {};
}

template <typename Arg>
Plain<Arg> read(const Value& value, Value* result) {
  (void)result;
  if constexpr (kIsOutput<Plain<Arg>>) {
    static_assert(std::is_same<Arg, Plain<Arg>&>::value, "a result is taken as Output& or OutputList&");
    return Plain<Arg>(value, result);
  } else {
    return Argument<Plain<Arg>>::read(value);
  }
}

// So that a parameter may be a reference: the temporary lives until the function returns.
template <typename T>
T& kept(T&& value) {
  return value;
}

template <typename R, typename... Args, size_t... I>
void unpack(R (*function)(Args...), const Value* args, Value* results, std::index_sequence<I...>) {
  (void)args, (void)results;
  if constexpr (std::is_void<R>::value) {
    function(kept(read<Args>(args[I], results + outputs_among<Args...>(I)))...);
  } else {
    static_assert(outputs_among<Args...>(sizeof...(Args)) == 0, "a function with Output& parameters returns void");
    R result = function(kept(read<Args>(args[I], results))...);
    Result<R>::write(result, results);
  }
}

inline int report(const char* text) {
  size_t length = 0;
  while (text[length] != '\0') ++length;
  host_api->report_error(text, length);
  return 1;
}

template <typename R, typename... Args>
int call(R (*function)(Args...), const HostApi* host, const Value* args, int32_t nargs, Value* results) {
  host_api = host;
  if (nargs != static_cast<int32_t>(sizeof...(Args)))
    return report("the C++ function takes another number of arguments than the op");
  try {
    unpack(function, args, results, std::index_sequence_for<Args...>{});
    return 0;
  } catch (const host::ReportedError&) {
    return 1;
  } catch (const std::exception& error) {
    return report(error.what());
  } catch (...) {
    return report("the kernel's host code threw something that is not a std::exception");
  }
}

}  // namespace details
}  // namespace jitk

#define JITK_PUBLIC extern "C" __attribute__((visibility("default")))

#define JITK_EXPORT(NAME, ...)                                                                                                 \
  JITK_PUBLIC int jitk_entry_##NAME(const jitk::HostApi* host, const jitk::Value* args, int32_t nargs, jitk::Value* results) { \
    return jitk::details::call(&__VA_ARGS__, host, args, nargs, results);                                                      \
  }                                                                                                                            \
  JITK_PUBLIC const char* jitk_signature_##NAME() {                                                                            \
    static constexpr auto signature = jitk::details::signature_of(&__VA_ARGS__);                                               \
    return signature.text;                                                                                                     \
  }

// Read by the loader before it calls anything else of the file.
JITK_PUBLIC inline __attribute__((used)) uint32_t jitk_abi_version() { return jitk::kAbiVersion; }

#if defined(__CUDACC__)
#include <cuda_runtime.h>

// CUDA loads each kernel on its first launch, which must not happen while a graph is captured. The loader links with
// -Wl,--wrap=__cudaRegisterFunction, so this library knows all of its kernels and can have them loaded before.
namespace jitk {
namespace details {

constexpr int32_t kMaxKernels = 1024;  // beyond it a kernel is loaded on its first launch, as without this
inline const void* kernels[kMaxKernels];
inline int32_t kernel_count = 0;

}  // namespace details
}  // namespace jitk

// Without --wrap there is none, and nobody calls the function below.
extern "C" __attribute__((weak)) void __real___cudaRegisterFunction(void** binary, const char* function, char* device_function,
                                                                    const char* name, int thread_limit, uint3* tid, uint3* bid,
                                                                    dim3* block, dim3* grid, int* warp_size);

extern "C" inline __attribute__((used)) void __wrap___cudaRegisterFunction(void** binary, const char* function,
                                                                           char* device_function, const char* name,
                                                                           int thread_limit, uint3* tid, uint3* bid,
                                                                           dim3* block, dim3* grid, int* warp_size) {
  using namespace jitk::details;
  if (kernel_count < kMaxKernels) kernels[kernel_count++] = function;
  __real___cudaRegisterFunction(binary, function, device_function, name, thread_limit, tid, bid, block, grid, warp_size);
}

// Loads all kernels of this library on the device, and returns how many there are. One that cannot be loaded is not
// reported: its launch fails with the reason.
JITK_PUBLIC inline __attribute__((used)) int32_t jitk_load_kernels(int32_t device) {
  using namespace jitk::details;
  int before = device;
  (void)cudaGetDevice(&before);
  if (before != device) (void)cudaSetDevice(device);
  // Another thread may be capturing; what is loaded here is none of its graph's work.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  for (int32_t i = 0; i < kernel_count; ++i) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernels[i]) != cudaSuccess) (void)cudaGetLastError();
  }
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  if (before != device) (void)cudaSetDevice(before);
  return kernel_count;
}
#endif

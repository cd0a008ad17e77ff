// x @ weight.T + bias by cuBLASLt: host code alone. The library brings the kernels, and adds the bias in their epilogue.
#include <jitk/result.h>  // Output, and empty for the workspace
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/launch.cuh>  // the current stream

#include <cublasLt.h>

namespace cublaslt {

using namespace jitk;

inline void check(cublasStatus_t status, host::DebugInfo where = {}) {
  host::RuntimeCheck(where, status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", cublasLtGetStatusString(status));
}

// One handle for each device, made on the device's first call and then kept: to make one takes milliseconds.
inline cublasLtHandle_t handle_of(int32_t device) {
  constexpr int32_t kDevices = 64;
  static cublasLtHandle_t handles[kDevices];
  host::RuntimeCheck(device < kDevices, "device ", device, ": there are handles for ", kDevices, " devices");
  cublasLtHandle_t handle = __atomic_load_n(&handles[device], __ATOMIC_ACQUIRE);
  if (handle != nullptr) return handle;
  check(cublasLtCreate(&handle));
  cublasLtHandle_t first = nullptr;
  if (__atomic_compare_exchange_n(&handles[device], &first, handle, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return handle;
  check(cublasLtDestroy(handle));  // another thread was faster
  return first;
}

// A descriptor that ends with its scope.
template <typename T, cublasStatus_t (*kDestroy)(T)>
struct Owned {
  T value = nullptr;
  ~Owned() { (void)kDestroy(value); }
  operator T() const { return value; }
};
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

template <typename Value>
void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
  check(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof(value)));
}

template <typename T>
void linear(TensorView x, TensorView weight, TensorView bias, Output& out) {
  using namespace host;
  constexpr cudaDataType_t kType = std::is_same_v<T, bf16_t> ? CUDA_R_16BF : CUDA_R_16F;
  // 1. Match.
  SymbolicSize tokens{"tokens"}, inputs{"inputs"}, outputs{"outputs"};
  SymbolicDevice device;
  TensorMatcher({tokens, inputs}).with_strides({-1, 1}).with_device<kDLCUDA>(device).with_dtype<T>().verify(x);
  TensorMatcher({outputs, inputs}).with_device(device).with_dtype<T>().verify(weight);
  TensorMatcher({outputs}).with_device(device).with_dtype<T>().verify(bias);
  const int64_t m = tokens.unwrap(), n = outputs.unwrap(), k = inputs.unwrap();
  const int64_t shape[] = {m, n};
  const TensorView to = out.empty({shape, 2}, x.dtype(), x.device());
  TensorMatcher({tokens, outputs}).with_device(device).with_dtype<T>().verify(to);

  // 2. Plan. Its matrices are stored by columns: out.T = weight @ x.T, where weight is stored as its transpose.
  if (m == 0 || n == 0) return;
  Operation operation;
  check(cublasLtMatmulDescCreate(&operation.value, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  set(operation, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(bias.data_ptr()));
  Layout a, b, d;
  check(cublasLtMatrixLayoutCreate(&a.value, kType, k, n, k));
  check(cublasLtMatrixLayoutCreate(&b.value, kType, k, m, m == 1 ? k : x.stride(0)));
  check(cublasLtMatrixLayoutCreate(&d.value, kType, n, m, n));
  Preference preference;
  const uint64_t workspace_bytes = 32 << 20;  // what cuBLAS recommends for Hopper
  check(cublasLtMatmulPreferenceCreate(&preference.value));
  check(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                             sizeof(workspace_bytes)));
  const cublasLtHandle_t handle = handle_of(x.device().device_id);
  cublasLtMatmulHeuristicResult_t best;
  int found = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, operation, a, b, d, d, preference, 1, &best, &found));
  RuntimeCheck(found > 0, "cuBLASLt has no algorithm for [", m, ", ", k, "] @ [", k, ", ", n, "]");

  // 3. Launch. PyTorch's allocator gives the workspace, and keeps it for this stream's work when it is freed.
  const int64_t needed = static_cast<int64_t>(best.workspaceSize);
  const Tensor workspace = empty(IntList{&needed, 1}, dtype_of<uint8_t>(), x.device(), "workspace");
  const float one = 1.0f, zero = 0.0f;
  check(cublasLtMatmul(handle, operation, &one, weight.data_ptr(), a, x.data_ptr(), b, &zero, to.data_ptr(), d, to.data_ptr(),
                       d, &best.algo, workspace.data_ptr(), static_cast<size_t>(needed),
                       LaunchKernel::resolve_device(x.device())));
}

}  // namespace cublaslt

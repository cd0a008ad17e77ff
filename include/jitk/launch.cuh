// Launches kernels on PyTorch's current stream and checks that they were launched.
//
//   LaunchKernel(div_ceil(n, 256), 256, device).enable_pdl()(my_kernel<T>, params);
//   LaunchKernel(grid, block, LaunchKernel::resolve_device(device), smem_bytes)(my_kernel<T>, a, b);
//
// A grid without blocks launches nothing. Dynamic shared memory over 48 KB is opted in. The runtime has made the tensors'
// device current before a kernel's host code runs, so no guard is needed here.
// Also: RuntimeDeviceCheck for CUDA status codes; runtime::get_sm_count and get_blocks_per_sm, cached per device.
// Left out: choosing grids and blocks.
#pragma once

#include <jitk/abi.h>     // DLDevice
#include <jitk/check.h>   // panic, DebugInfo
#include <jitk/result.h>  // host_api, for the stream

#include <jitk/arch.cuh>  // kPDLSupported

#include <cuda_runtime.h>

namespace jitk {
namespace host {

inline void RuntimeDeviceCheck(cudaError_t status, DebugInfo where = {}) {
  if (__builtin_expect(status != cudaSuccess, 0)) {
    (void)cudaGetLastError();  // or the next check would report this error again
    panic(where, "CUDA error: ", cudaGetErrorName(status), ": ", cudaGetErrorString(status));
  }
}
inline void RuntimeDeviceCheck(DebugInfo where = {}) { RuntimeDeviceCheck(cudaGetLastError(), where); }

// The first extent of a grid, from any integer: what does not fit into 31 bits is an error, not another grid.
struct GridSize {
  dim3 extent;

  GridSize(dim3 grid) : extent(grid) {}
  template <typename Int, typename std::enable_if<std::is_integral<Int>::value, int>::type = 0>
  GridSize(Int blocks, DebugInfo where = {}) : extent(static_cast<uint32_t>(blocks)) {
    // A negative number is a huge one here.
    RuntimeCheck(where, static_cast<uint64_t>(blocks) <= 0x7fffffffu, "a grid has at most 2147483647 blocks, got ", blocks);
  }
};

class LaunchKernel {
 public:
  explicit LaunchKernel(GridSize grid, dim3 block, cudaStream_t stream, size_t dynamic_smem_bytes = 0, DebugInfo where = {})
      : where_(where) {
    config_.gridDim = grid.extent;
    config_.blockDim = block;
    config_.dynamicSmemBytes = dynamic_smem_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = 0;
  }
  explicit LaunchKernel(GridSize grid, dim3 block, DLDevice device, size_t dynamic_smem_bytes = 0, DebugInfo where = {})
      : LaunchKernel(grid, block, resolve_device(device), dynamic_smem_bytes, where) {}
  LaunchKernel(const LaunchKernel&) = delete;
  LaunchKernel& operator=(const LaunchKernel&) = delete;

  // PyTorch's current stream on the device.
  static cudaStream_t resolve_device(DLDevice device) {
    void* stream = nullptr;
    if (host_api->current_stream(device.device_id, &stream) != 0) throw ReportedError{};
    return static_cast<cudaStream_t>(stream);
  }

  // Lets the kernel start while the one before it drains. The kernel must call PDLWaitPrimary before it touches memory.
  LaunchKernel& enable_pdl(bool enabled = true) {
    if (enabled && device::kPDLSupported) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    return *this;
  }

  LaunchKernel& enable_cluster(dim3 cluster) {
    cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster.x;
    attribute.val.clusterDim.y = cluster.y;
    attribute.val.clusterDim.z = cluster.z;
    return *this;
  }

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), Args&&... args) {
    const dim3 grid = config_.gridDim;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (config_.dynamicSmemBytes > kDefaultSmemBytes) {
      RuntimeDeviceCheck(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config_.dynamicSmemBytes)),
          where_);
    }
    const cudaError_t status = cudaLaunchKernelEx(&config_, kernel, static_cast<Args&&>(args)...);
    if (__builtin_expect(status != cudaSuccess, 0)) fail(status, reinterpret_cast<const void*>(kernel));
  }

 private:
  static constexpr size_t kDefaultSmemBytes = 48 * 1024;

  [[noreturn]] JITK_COLD void fail(cudaError_t status, const void* kernel) const {
    (void)cudaGetLastError();
    const char* name = nullptr;
#if CUDART_VERSION >= 12030
    if (cudaFuncGetName(&name, kernel) != cudaSuccess) (void)cudaGetLastError();
#endif
    const dim3 grid = config_.gridDim;
    const dim3 block = config_.blockDim;
    panic(where_, "the launch of ", name != nullptr ? name : "a kernel", " failed: ", cudaGetErrorName(status), ": ",
          cudaGetErrorString(status), "\n  grid [", grid.x, ", ", grid.y, ", ", grid.z, "]  block [", block.x, ", ", block.y,
          ", ", block.z, "]  dynamic shared memory ", config_.dynamicSmemBytes, " bytes");
  }

  cudaLaunchConfig_t config_;
  cudaLaunchAttribute attributes_[2];
  DebugInfo where_;
};

namespace runtime {

// One number per device, asked for once. Devices beyond the table are asked every time.
class DeviceCache {
 public:
  template <typename Ask>
  int32_t get(int32_t device_id, const Ask& ask) {
    const bool known = device_id >= 0 && device_id < kDevices;
    if (known) {
      const int32_t value = __atomic_load_n(&values_[device_id], __ATOMIC_RELAXED);
      if (value != 0) return value - 1;
    }
    const int32_t value = ask(device_id);
    if (known) __atomic_store_n(&values_[device_id], value + 1, __ATOMIC_RELAXED);
    return value;
  }

 private:
  static constexpr int32_t kDevices = 64;
  int32_t values_[kDevices] = {};
};

inline int32_t get_attribute(cudaDeviceAttr attribute, int32_t device_id) {
  int value = 0;
  RuntimeDeviceCheck(cudaDeviceGetAttribute(&value, attribute, device_id));
  return value;
}

inline DeviceCache sm_counts;
inline uint32_t get_sm_count(int32_t device_id) {
  return static_cast<uint32_t>(
      sm_counts.get(device_id, [](int32_t id) { return get_attribute(cudaDevAttrMultiProcessorCount, id); }));
}

// Bytes of shared memory that one block may opt in to.
inline DeviceCache smem_limits;
inline uint32_t get_max_smem_per_block(int32_t device_id) {
  return static_cast<uint32_t>(
      smem_limits.get(device_id, [](int32_t id) { return get_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, id); }));
}

// Blocks of the kernel that one SM of the current device holds at a time. A kernel that launches with it keeps it in a
// DeviceCache.
template <typename Kernel>
uint32_t get_blocks_per_sm(Kernel kernel, int32_t block_dim, size_t dynamic_smem_bytes = 0) {
  int blocks = 0;
  RuntimeDeviceCheck(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block_dim, dynamic_smem_bytes));
  return static_cast<uint32_t>(blocks);
}

}  // namespace runtime
}  // namespace host
}  // namespace jitk

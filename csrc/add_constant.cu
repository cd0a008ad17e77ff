// The tutorial op: adds a constant that is known when the kernel is compiled. docs/tutorial.md walks through it.
#include <jitk/result.h>  // Output
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/launch.cuh>

namespace jitk {

template <int32_t kConstant>
__global__ void add_constant_kernel(int32_t* __restrict__ dst, const int32_t* __restrict__ src, int64_t count) {
  device::PDLWaitPrimary<true>();
  device::PDLTriggerSecondary<true>();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) dst[i] = static_cast<int32_t>(static_cast<uint32_t>(src[i]) + static_cast<uint32_t>(kConstant));
}

template <int32_t kConstant>
void add_constant(TensorView src, Output& out) {
  using namespace host;
  const TensorView result = out.empty_like(src);
  // 1. Match.
  SymbolicDims shape{"shape"};
  SymbolicDevice device;
  TensorMatcher({shape}).with_dtype<int32_t>().with_device<kDLCUDA>(device).verify(src).verify(result);
  // 2. Plan.
  const int64_t count = src.numel();
  constexpr int32_t kThreads = 256;
  // 3. Launch.
  LaunchKernel(div_ceil(count, kThreads), kThreads, device.unwrap())
      .enable_pdl()(add_constant_kernel<kConstant>, static_cast<int32_t*>(result.data_ptr()),
                    static_cast<const int32_t*>(src.data_ptr()), count);
}

}  // namespace jitk

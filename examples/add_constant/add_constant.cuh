// Adds a constant that is known when the kernel is compiled. add_constant.py calls it; docs/tutorial.md walks through it.
#include <jitk/tensor.h>  // TensorMatcher, TensorView

#include <jitk/launch.cuh>  // LaunchKernel

constexpr int32_t kThreads = 256;

template <int32_t kConstant>
__global__ void add_constant_kernel(int32_t* __restrict__ dst, const int32_t* __restrict__ src, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) dst[i] = src[i] + kConstant;
}

template <int32_t kConstant>
void add_constant(jitk::TensorView dst, jitk::TensorView src) {
  using namespace jitk::host;
  // 1. Match: both tensors are dense, of one length, int32, on one CUDA device.
  SymbolicSize count{"count"};
  SymbolicDevice device;
  TensorMatcher({count}).with_dtype<int32_t>().with_device<jitk::kDLCUDA>(device).verify(dst).verify(src);

  // 2. Plan: a thread for each element.
  const int64_t blocks = div_ceil(count.unwrap(), kThreads);

  // 3. Launch, on PyTorch's current stream. No blocks, no launch: an empty tensor needs no special case.
  LaunchKernel(blocks, kThreads, device.unwrap())(add_constant_kernel<kConstant>, static_cast<int32_t*>(dst.data_ptr()),
                                                  static_cast<const int32_t*>(src.data_ptr()), count.unwrap());
}

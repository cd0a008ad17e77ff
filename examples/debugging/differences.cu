#include <jitk/check.h>   // RuntimeCheck
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/launch.cuh>

namespace debugging {

using namespace jitk;

// `count` is how many differences there are.
__global__ void differences_kernel(float* __restrict__ out, const float* __restrict__ input, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i <= count) out[i] = input[i + 1] - input[i];
}

inline void differences(TensorView input, TensorView out) {
  using namespace host;
  SymbolicSize sizes{"sizes"}, count{"count"};
  SymbolicDevice device;
  TensorMatcher({sizes}).with_dtype<fp32_t>().with_device<kDLCUDA>(device).verify(input);
  TensorMatcher({count}).with_dtype<fp32_t>().with_device(device).verify(out);
  RuntimeCheck(sizes.unwrap() == count.unwrap() + 1, "'input' must have one element more than 'out'");
  LaunchKernel(div_ceil(sizes.unwrap(), 256), 256, device.unwrap())(
      differences_kernel, static_cast<float*>(out.data_ptr()), static_cast<const float*>(input.data_ptr()), count.unwrap());
}

}  // namespace debugging

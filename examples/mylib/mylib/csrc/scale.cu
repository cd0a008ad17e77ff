// scale_shift on CUDA: a block for each row, whose threads walk over the columns side by side.
#include <mylib/scale_shift.h>

#include <jitk/result.h>  // Output

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>

namespace mylib {

template <typename T, int32_t kGroup>
__global__ void scale_shift_kernel(const __grid_constant__ ScaleShift<T> call) {
  using device::cast;
  const T* input = call.input + blockIdx.x * call.input_stride;
  T* out = call.out + blockIdx.x * call.out_stride;
  for (int64_t column = threadIdx.x; column < call.hidden; column += blockDim.x) {
    const int64_t group = column / kGroup;  // by a constant: no division is left
    const float shift = call.shift != nullptr ? cast<fp32_t>(call.shift[group]) : 0.0f;
    out[column] = cast<T>(fmaf(cast<fp32_t>(input[column]), cast<fp32_t>(call.scale[group]), shift));
  }
}

template <typename T, int32_t kGroup>
void scale_shift(TensorView input, TensorView scale, std::optional<TensorView> shift, Output& out) {
  const ScaleShift<T> call = match<T, kGroup>(input, scale, shift, out.empty_like(input));
  host::LaunchKernel(call.tokens, 256, call.device)(scale_shift_kernel<T, kGroup>, call);
}

}  // namespace mylib

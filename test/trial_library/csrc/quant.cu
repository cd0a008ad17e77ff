// Quantises each row to fp8 with a scale of its own. A warp is a row.
#include <jitk/fp8.cuh>     // fp8_e4m3_t, cast
#include <jitk/launch.cuh>  // LaunchKernel
#include <jitk/result.h>    // Output
#include <jitk/rows.h>      // Rows

namespace trial {

using namespace jitk;

constexpr uint32_t kWarps = 4;

template <typename T>
__global__ void quant_kernel(const T* __restrict__ input, int64_t input_stride, fp8_e4m3_t* __restrict__ out,
                             int64_t out_stride, float* __restrict__ scale, int64_t scale_stride, int64_t rows, int64_t width) {
  using namespace device;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const T* x = input + row * input_stride;
  // As bits, magnitudes have the order of integers, and NaN is above infinity: it makes a scale of NaN, and so a row of them.
  uint32_t largest = __float_as_uint(1e-10f);
  for (int64_t i = threadIdx.x; i < width; i += 32) largest = max(largest, __float_as_uint(fabsf(cast<float>(x[i]))));
  for (uint32_t step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const float step = __fdiv_rn(__uint_as_float(largest), 448.0f);
  for (int64_t i = threadIdx.x; i < width; i += 32) {
    out[row * out_stride + i] = cast<fp8_e4m3_t>(__fdiv_rn(cast<float>(x[i]), step));
  }
  if (threadIdx.x == 0) scale[row * scale_stride] = step;
}

template <typename T>
void quant_fp8_per_token(TensorView input, Output& quantised, Output& step_of) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  SymbolicDevice device;
  Rows from, to, scales;
  TensorMatcher({tokens, hidden}).with_rows(from).with_dtype<T>().with_device(device).verify(input);
  const TensorView out = quantised.empty(input.shape(), dtype_of<fp8_e4m3_t>(), input.device());
  Shape one(input.shape());
  one[-1] = 1;
  const TensorView scale = step_of.empty(one, dtype_of<float>(), input.device());
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<fp8_e4m3_t>().with_device(device).verify(out);
  TensorMatcher({tokens, 1}).with_rows(scales).with_dtype<float>().with_device(device).verify(scale);
  RuntimeCheck(from.width > 0, "argument 'input' must have columns, got ", input.shape());

  LaunchKernel(div_ceil(from.count, int64_t{kWarps}), dim3(32, kWarps), device.unwrap())(
      quant_kernel<T>, static_cast<const T*>(input.data_ptr()), from.stride, static_cast<fp8_e4m3_t*>(out.data_ptr()),
      to.stride, static_cast<float*>(scale.data_ptr()), scales.stride, from.count, from.width);
}

}  // namespace trial

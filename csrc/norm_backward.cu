// Gradients of rmsnorm and layernorm: of the input, row by row, and of weight and bias, summed over all rows.
//
//   g = grad * weight,  n = (x - mean) * scale:     grad_input  = scale * (g - mean(g) - n * mean(g * n))
//                                                   grad_weight = sum(grad * n),  grad_bias = sum(grad)
//
// without the means of x and g for rmsnorm. One pass over memory: the rows are dealt out to teams, a warp or a block each, in
// turn. A team computes the statistics of its rows again, and keeps the sums over them in registers, a few columns to a thread; a
// second kernel adds the sums of all blocks in a fixed order. Rows that have no place for 16-byte vectors, or are too long for
// the sums to stay in registers, take three kernels, and are read again for the sums over rows.
//
// Here calls are matched, and the way of their rows is chosen: norm_backward_one_pass.cuh or norm_backward_any_row.cuh.
#include "norm_backward_any_row.cuh"   // run_in_passes, chunks_of
#include "norm_backward_columns.cuh"   // finish
#include "norm_backward_one_pass.cuh"  // run_in_one_pass, choose
#include "norm_backward_row.cuh"       // Params

#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/launch.cuh>
#include <jitk/vec.cuh>  // widest_vector

namespace jitk {
namespace {

// What the kernels need of the tensors. They lack memory for the sums.
template <typename T, typename W>
norm_backward::Params<T, W> match(TensorView grad, TensorView input, TensorView weight, double eps, TensorView grad_input,
                                  TensorView grad_weight, const TensorView* grad_bias, host::SymbolicDevice& symbol) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows ys, xs, to;
  TensorMatcher({tokens, hidden}).with_rows(ys).with_dtype<T>().with_device(symbol).verify(grad);
  TensorMatcher({tokens, hidden}).with_rows(xs).with_dtype<T>().with_device(symbol).verify(input);
  TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(weight);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().with_device(symbol).verify(grad_input);
  TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(grad_weight);
  if (grad_bias != nullptr) TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(*grad_bias);
  if (xs.count <= 1) xs.stride = ys.stride = to.stride = 0;

  norm_backward::Params<T, W> params{};
  params.grad = static_cast<const T*>(grad.data_ptr());
  params.input = static_cast<const T*>(input.data_ptr());
  params.weight = static_cast<const W*>(weight.data_ptr());
  params.grad_input = static_cast<T*>(grad_input.data_ptr());
  params.grad_stride = ys.stride;
  params.input_stride = xs.stride;
  params.grad_input_stride = to.stride;
  params.rows = xs.count;
  params.width = xs.width;
  params.inverse_width = 1.0f / static_cast<float>(xs.width);
  params.eps = static_cast<float>(eps);
  return params;
}

template <typename T, typename W, bool kCenters>
void backward(TensorView grad, TensorView input, TensorView weight, double eps, TensorView grad_input, TensorView grad_weight,
              const TensorView* grad_bias) {
  using namespace host;
  using namespace norm_backward;
  SymbolicDevice symbol;
  Params<T, W> params = match<T, W>(grad, input, weight, eps, grad_input, grad_weight, grad_bias, symbol);
  const int64_t rows = params.rows, width = params.width;
  if (width == 0) return;

  const DLDevice device = symbol.unwrap();
  const int64_t sms = runtime::get_sm_count(device.device_id);
  const uint64_t starts = places(params.grad, params.input, params.weight, params.grad_input,
                                 strides_of<T>(params.grad_stride, params.input_stride, params.grad_input_stride));
  const uint32_t vec = widest_vector<T, device::kPolicyVecBytes>(starts, strides_of<T>(width));
  const Choice* held = vec == kWide<T> ? choose(width / vec) : nullptr;
  const int64_t parts = held != nullptr ? blocks_of(*held, rows, width / vec, sms) : chunks_of(rows);
  const Tensor sums = scratch(parts * (kCenters ? 2 : 1) * width, device);
  params.sums = static_cast<float*>(sums.data_ptr());

  const cudaStream_t stream = LaunchKernel::resolve_device(device);
  if (rows > 0 && held != nullptr) run_in_one_pass<T, W, kCenters>(params, held->spread, parts, stream);
  if (rows > 0 && held == nullptr) run_in_passes<T, W, kCenters>(params, parts, stream, device);
  W* to_weight = static_cast<W*>(grad_weight.data_ptr());
  W* to_bias = static_cast<W*>(grad_bias != nullptr ? grad_bias->data_ptr() : nullptr);
  finish<W, kCenters>(params.sums, parts, width, to_weight, to_bias, stream);
}

}  // namespace

template <typename T, typename W>
void rmsnorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                      Output& grad_weight) {
  backward<T, W, false>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight), nullptr);
}

template <typename T, typename W>
void layernorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                        Output& grad_weight, Output& grad_bias) {
  const TensorView bias = grad_bias.empty_like(weight);
  backward<T, W, true>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight), &bias);
}

}  // namespace jitk

// Rows of any length and place, in several passes: gradients and statistics of each row, then the sums of each column.
#pragma once

#include "norm_backward_columns.cuh"  // sum_columns
#include "norm_backward_row.cuh"      // Params, row_statistics, product

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>
#include <jitk/team.cuh>

namespace jitk::norm_backward {

// The input's gradients and the rows' statistics, of which either may be null.
template <typename T, typename W, bool kCenters>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  __shared__ team::Buffer<Team::kBlock, float2> buffers[2];
  const int64_t row = blockIdx.x;
  const T* x = params.input + row * params.input_stride;
  const T* y = params.grad + row * params.grad_stride;
  T* out = params.grad_input + row * params.grad_input_stride;
  PDLWaitPrimary<true>();
  const auto each = [&](const auto& body) {
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < params.width; at += blockDim.x) {
      body(cast<fp32_t>(x[at]), product(cast<fp32_t>(y[at]), cast<fp32_t>(params.weight[at])));
    }
  };
  const RowStatistics of =
      row_statistics<kCenters>(team::join<Team::kBlock>(), each, params.inverse_width, params.eps, buffers);
  for (int64_t at = threadIdx.x; at < params.width && params.grad_input != nullptr; at += blockDim.x) {
    const float g = product(cast<fp32_t>(y[at]), cast<fp32_t>(params.weight[at]));
    out[at] = cast<T>(of.scale * (g - of.mean_g - (cast<fp32_t>(x[at]) - of.mean) * of.slope));
  }
  if (threadIdx.x == 0 && params.statistics != nullptr) params.statistics[row] = {of.mean, of.scale};
  PDLTriggerSecondary<true>();
}

// Chunks of rows that are summed by themselves.
inline int64_t chunks_of(int64_t rows) { return min(host::div_ceil(rows, int64_t{128}), int64_t{256}); }

template <typename T, typename W, bool kCenters>
void run_in_passes(Params<T, W> params, int64_t chunks, cudaStream_t stream, DLDevice device) {
  using namespace host;
  Tensor statistics = scratch(params.rows * 2, device);
  params.statistics = static_cast<float2*>(statistics.data_ptr());
  const auto rows_kernel = [&](const Params<T, W>& of) {
    const uint32_t threads = params.width <= 1024 ? 128 : kMaxThreads;
    LaunchKernel(params.rows, threads, stream).enable_pdl()(backward_rows_kernel<T, W, kCenters>, of);
  };
  // In the place of what the sums are made of, the gradients come last.
  const bool in_place = params.grad_input == params.grad || params.grad_input == params.input;
  Params<T, W> first = params, last = params;
  if (in_place) first.grad_input = nullptr, last.statistics = nullptr;
  rows_kernel(first);
  sum_columns<T, W, kCenters>(params, chunks, stream);
  if (in_place) rows_kernel(last);
}

}  // namespace jitk::norm_backward

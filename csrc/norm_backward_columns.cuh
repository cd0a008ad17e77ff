// The sums over rows of each column, that is the gradients of weight and bias: over chunks of rows, and of such partial sums.
#pragma once

#include "norm_backward_row.cuh"  // Params

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>

namespace jitk::norm_backward {

inline constexpr uint32_t kColumns = 32;  // of a block that sums over rows
inline constexpr uint32_t kParts = 16;    // its threads to a column

// The threads' sums of a column added in order, for the first of them.
JITK_DEVICE float2 sum_of_column(float2 value, float2 (&buffer)[kParts][kColumns]) {
  const uint32_t column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  buffer[part][column] = value;
  __syncthreads();
  float2 sum{0.0f, 0.0f};
  if (part == 0) {
    for (uint32_t i = 0; i < kParts; ++i) sum = sum + buffer[i][column];
  }
  return sum;
}

// The sums over a chunk of rows, one for each blockIdx.y, from the rows' statistics.
template <typename T, typename W, bool kCenters>
__global__ void __launch_bounds__(kColumns* kParts)
    column_sums_kernel(const __grid_constant__ Params<T, W> params, int64_t rows_per_chunk) {
  using namespace device;
  __shared__ float2 buffer[kParts][kColumns];
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  const int64_t first = blockIdx.y * rows_per_chunk;
  const int64_t last = first + rows_per_chunk < params.rows ? first + rows_per_chunk : params.rows;
  PDLWaitPrimary<true>();
  float2 sums{0.0f, 0.0f};
  if (column < params.width) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.x / kColumns; row < last; row += kParts) {
      const float2 of = params.statistics[row];
      const float y = cast<fp32_t>(params.grad[row * params.grad_stride + column]);
      const float x = cast<fp32_t>(params.input[row * params.input_stride + column]);
      sums = sums + float2{y * ((x - of.x) * of.y), y};
    }
  }
  sums = sum_of_column(sums, buffer);
  if (column < params.width && threadIdx.x < kColumns) {
    float* to = params.sums + int64_t{blockIdx.y} * (kCenters ? 2 : 1) * params.width + column;
    to[0] = sums.x;
    if constexpr (kCenters) to[params.width] = sums.y;
  }
  PDLTriggerSecondary<true>();
}

// Adds up `count` partial sums of each column.
template <typename W, bool kCenters>
__global__ void __launch_bounds__(kColumns* kParts)
    finish_kernel(const float* sums, int64_t count, int64_t width, W* grad_weight, W* grad_bias) {
  using namespace device;
  __shared__ float2 buffer[kParts][kColumns];
  const int64_t column = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  PDLWaitPrimary<true>();
  float2 sum{0.0f, 0.0f};
  if (column < width) {
#pragma unroll 8
    for (int64_t i = threadIdx.x / kColumns; i < count; i += kParts) {
      const float* from = sums + i * (kCenters ? 2 : 1) * width + column;
      sum = sum + float2{from[0], kCenters ? from[width] : 0.0f};
    }
  }
  sum = sum_of_column(sum, buffer);
  if (column < width && threadIdx.x < kColumns) {
    grad_weight[column] = cast<W>(sum.x);
    if constexpr (kCenters) grad_bias[column] = cast<W>(sum.y);
  }
  PDLTriggerSecondary<true>();
}

// Launches the first: partial sums over `chunks` of the rows, into params.sums.
template <typename T, typename W, bool kCenters>
void sum_columns(const Params<T, W>& params, int64_t chunks, cudaStream_t stream) {
  using namespace host;
  const dim3 grid(static_cast<uint32_t>(div_ceil(params.width, int64_t{kColumns})), static_cast<uint32_t>(chunks));
  LaunchKernel(grid, kColumns * kParts, stream)
      .enable_pdl()(column_sums_kernel<T, W, kCenters>, params, div_ceil(params.rows, chunks));
}

// Launches the second: the gradients, from `count` partial sums.
template <typename W, bool kCenters>
void finish(const float* sums, int64_t count, int64_t width, W* grad_weight, W* grad_bias, cudaStream_t stream) {
  using namespace host;
  LaunchKernel(div_ceil(width, int64_t{kColumns}), kColumns * kParts, stream)
      .enable_pdl()(finish_kernel<W, kCenters>, sums, count, width, grad_weight, grad_bias);
}

}  // namespace jitk::norm_backward

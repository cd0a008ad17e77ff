// Where rows and their gradients are, and the statistics of a row that its gradients are made of.
#pragma once

#include "norm_scale.cuh"  // scale_of, tells_deviation

#include <jitk/result.h>  // Tensor, empty

#include <jitk/team.cuh>  // sum
#include <jitk/vec.cuh>   // kPolicyVecBytes

namespace jitk::norm_backward {

using device::Team;

// Of a block, so that a thread may have 128 registers.
inline constexpr uint32_t kMaxThreads = 512;

// Elements of a vector of a row that has a place for wide ones.
template <typename T>
inline constexpr uint32_t kWide = device::kPolicyVecBytes / sizeof(T);

template <typename T, typename W>
struct Params {
  const T* grad;
  const T* input;
  const W* weight;
  T* grad_input;
  float* sums;         // [blocks, 1 or 2, width]: of grad_weight, and of grad_bias
  float2* statistics;  // [rows]: mean and scale; for rows that are read again
  int64_t grad_stride;
  int64_t input_stride;
  int64_t grad_input_stride;
  int64_t rows;
  int64_t width;
  float inverse_width;
  float eps;
};

// Memory for the sums, and for the statistics.
inline Tensor scratch(int64_t floats, DLDevice device) {
  const int64_t sizes[1] = {floats};
  return host::empty({sizes, 1}, dtype_of<fp32_t>(), device);
}

// What a row's elements have in common.
struct RowStatistics {
  float mean;
  float scale;
  float mean_g;
  float slope;  // scale^2 * mean(g * (x - mean)): grad_input = scale * (g - mean_g - (x - mean) * slope)
};

// Rounded also where it is used, without FMA: where all products of a row are equal, each less their mean must be 0, as the scale
// of such a row makes any rest large.
JITK_DEVICE float product(float g, float weight) { return __fmul_rn(g, weight); }

JITK_DEVICE float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

// each(body) calls body(x, g) for each element that the thread has of the row: x as stored, g = grad * weight. Buffers serve
// every other row, so that the barriers between two uses are enough.
template <bool kCenters, Team kTeam, typename Each>
JITK_DEVICE RowStatistics row_statistics(const device::team::Member<kTeam>& member, const Each& each, float inverse_width,
                                         float eps, device::team::Buffer<kTeam, float2> (&buffers)[2]) {
  RowStatistics row{};
  float2 sums{0.0f, 0.0f};
  if constexpr (kCenters) {
    each([&](float x, float g) { sums = sums + float2{x, g}; });
    sums = device::team::sum(member, sums, buffers[0]);
    row.mean = sums.x * inverse_width;
    row.mean_g = sums.y * inverse_width;
    sums = {0.0f, 0.0f};
  }
  each([&](float x, float g) { sums = sums + float2{(x - row.mean) * (x - row.mean), g * (x - row.mean)}; });
  sums = device::team::sum(member, sums, buffers[1]);
  if (kCenters && !norm::tells_deviation(sums.x)) sums.x = __builtin_nanf("");
  row.scale = norm::scale_of(sums.x, inverse_width, eps);
  row.slope = row.scale * row.scale * (sums.y * inverse_width);
  return row;
}

}  // namespace jitk::norm_backward

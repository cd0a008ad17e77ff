// Launches a norm of rows that are at a place of norm_rows.cuh.
//
//   launch_rows<T, W, Rms>(Tokens<T, W>{...}, rows, width, eps, device);
#pragma once

#include "norm_kernel.cuh"  // norm_kernel, Plan
#include "norm_spread.cuh"  // kWideRows, kNarrowRows, choose

#include <jitk/launch.cuh>
#include <jitk/overlap.cuh>  // choose_trigger
#include <jitk/spread.cuh>   // row_grid
#include <jitk/vec.cuh>      // widest_vector

namespace jitk::norm {

template <typename T, typename W, typename Norm, typename Place, uint32_t kVec, const auto& kTable, uint32_t kLine = 0>
auto kernel_of(const Spread& spread) -> void (*)(Place, Plan) {
  constexpr Spread kSpread = kTable[kLine].spread;
  if constexpr (is_for<Norm>(kTable[kLine])) {
    if (spread.same_kernel(kSpread)) return norm_kernel<T, W, Norm, Place, kSpread.team, kVec, kSpread.items>;
  }
  if constexpr (kLine + 1 < host::lines_of(kTable)) return kernel_of<T, W, Norm, Place, kVec, kTable, kLine + 1>(spread);
  return nullptr;
}

template <typename T, typename W, typename Norm, typename Place>
void launch_rows(const Place& place, int64_t rows, int64_t width, double eps, DLDevice device) {
  using namespace host;
  if (rows == 0 || width == 0) return;
  constexpr uint32_t kWide = device::kPolicyVecBytes / sizeof(T);
  constexpr uint32_t kPair = 4 / sizeof(T);
  const int64_t sms = runtime::get_sm_count(device.device_id);
  const uint32_t vec = widest_vector<T, device::kPolicyVecBytes>(place.starts(), strides_of<T>(width));
  const int64_t vectors = width / vec;
  const Spread spread =
      vec == kWide ? choose<Norm>(kWideRows, rows, vectors, sms) : choose<Norm>(kNarrowRows, rows, vectors, sms);
  const auto kernel = vec == kWide   ? kernel_of<T, W, Norm, Place, kWide, kWideRows>(spread)
                      : vec == kPair ? kernel_of<T, W, Norm, Place, kPair, kNarrowRows>(spread)
                                     : kernel_of<T, W, Norm, Place, 1, kNarrowRows>(spread);

  const RowGrid grid = row_grid(spread, rows, vectors);
  const Trigger trigger = choose_trigger(grid.blocks * grid.threads, grid.threads, sms);
  const Plan plan{rows, width, grid.lanes_log2, 1.0f / static_cast<float>(width), static_cast<float>(eps), trigger};
  LaunchKernel launch(grid.blocks, grid.threads, device);
  launch.enable_pdl();
  if (spread.blocks > 1) launch.enable_cluster({spread.blocks, 1, 1});
  launch(kernel, place, plan);
}

}  // namespace jitk::norm

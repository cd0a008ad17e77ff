// The kernel of all norms: a row belongs to a team of threads, each of which holds kItems vectors of it from its sums to its output.
#pragma once

#include "norm_part.cuh"        // Part
#include "norm_rows.cuh"        // Row
#include "norm_statistics.cuh"  // statistics

#include <jitk/overlap.cuh>  // Trigger
#include <jitk/share.cuh>
#include <jitk/team.cuh>

namespace jitk::norm {

struct Plan {
  int64_t rows;
  int64_t width;        // elements in a row
  uint32_t lanes_log2;  // of a team of lanes
  float inverse_width;
  float eps;
  Trigger trigger;
};

inline constexpr uint32_t kMaxBlock = 1024;
inline constexpr uint32_t kMaxLanesBlock = 128;

template <typename T, typename W, typename Norm, typename Place, device::Team kTeam, uint32_t kVec, uint32_t kItems>
__global__ void __launch_bounds__(kTeam == device::Team::kLanes ? kMaxLanesBlock : kMaxBlock)
    norm_kernel(const __grid_constant__ Place place, const __grid_constant__ Plan plan) {
  using namespace device;
  using Index = typename Share<kTeam, kItems>::Index;
  __shared__ team::Buffer<kTeam, float> buffer;
  __shared__ team::Buffer<kTeam, fp32x2_t> centred_buffer;

  const team::Member<kTeam> member = team::join<kTeam>(plan.lanes_log2);
  const int64_t index = member.team();
  // Lanes without a row still take part in the sums of their warp.
  const bool has_row = kTeam != Team::kLanes || index < plan.rows;
  const Row<T, W> row = place.row(has_row ? index : 0);
  const Share<kTeam, kItems> share(member, has_row ? static_cast<Index>(plan.width / kVec) : 0);
  Part<T, W, Norm, kTeam, kVec, kItems> part(row, share);

  compute_here(row.input);
  compute_here(row.out);
  compute_here(row.weight);
  if constexpr (Norm::kAdds) compute_here(row.residual);
  compute_here(share.vectors);
  compute_here(plan.inverse_width);
  compute_here(plan.eps);
  wait_and_trigger<true>(plan.trigger);

  part.load_held();
  part.write(statistics<Norm>(member, part, plan, buffer, centred_buffer));
  PDLTriggerSecondary<true>();
}

}  // namespace jitk::norm

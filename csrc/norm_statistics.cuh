// The statistics of a row: sums over the parts of its team's threads.
#pragma once

#include "norm_part.cuh"   // Statistics
#include "norm_scale.cuh"  // scale_of, unless_overflown

#include <jitk/team.cuh>  // sum, meet

namespace jitk::norm {

// Called by all threads of the block, once: it meets the other blocks of a cluster. `part` has loaded what it holds; `plan` has the
// row's inverse_width, and eps.
template <typename Norm, device::Team kTeam, typename Part, typename Plan>
JITK_DEVICE Statistics statistics(const device::team::Member<kTeam>& member, Part& part, const Plan& plan,
                                  device::team::Buffer<kTeam, float>& buffer,
                                  device::team::Buffer<kTeam, fp32x2_t>& centred_buffer) {
  Statistics of{0.0f, 0.0f, 0.0f};
  float sum = part.sum();
  device::team::meet<kTeam>();
  sum = device::team::sum(member, sum, buffer);
  if constexpr (Norm::kCenters) {
    // The mean of large numbers, rounded, is too far from theirs. The distances from it are small: their mean is what is missing.
    of.mean = sum * plan.inverse_width;
    const fp32x2_t sums = device::team::sum(member, part.centred_sums(of.mean), centred_buffer);
    of.rest = sums.x * plan.inverse_width;
    sum = tells_deviation(sums.y) ? fmaxf(sums.y - sums.x * of.rest, 0.0f) : __builtin_nanf("");
  }
  of.scale = scale_of(sum, plan.inverse_width, plan.eps);
  return of;
}

}  // namespace jitk::norm

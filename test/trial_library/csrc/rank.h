// Experts in the order in which a router chooses them, as one integer each: larger logits first, NaN before all, and of equals
// the one that comes first.
#pragma once

#include <cstdint>  // uint64_t
#include <cstring>  // memcpy, to look at the bits of a float

#if defined(__CUDACC__)
#define TRIAL_BOTH __host__ __device__
#else
#define TRIAL_BOTH
#endif

namespace trial {

// 0 is below every expert.
TRIAL_BOTH inline uint64_t rank_of(float logit, uint32_t expert) {
  const float value = logit + 0.0f;  // -0 equals 0
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t order = value != value ? 0xffffffffu : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | ~expert;
}

TRIAL_BOTH inline uint32_t expert_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

}  // namespace trial

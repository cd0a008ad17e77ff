// A thread's part of a row that is normalised, from loading it to storing the norm.
//
//   Part<T, W, Rms, kTeam, kVec, kItems> part(row, share);
//   part.load_held();
//   const Statistics of = statistics<Rms>(member, part, plan, ...);                  norm_statistics.cuh
//   part.write(of);                                                       or each_normal(of, body), to store something else
//
// kItems = 0 stands for a row that no team holds, or that has no place for wide vectors: it is read again for each use.
#pragma once

#include "norm_rows.cuh"  // Row

#include <jitk/share.cuh>  // a thread's vectors of a row
#include <jitk/vec.cuh>    // AlignedVector, AlignedVectors, L2Policy

namespace jitk::norm {

struct Rms {
  static constexpr bool kCenters = false;
  static constexpr bool kAdds = false;
  static constexpr bool kOnePlus = false;  // the weight that is stored
};
struct GemmaRms : Rms {
  static constexpr bool kOnePlus = true;
};
struct AddRms : Rms {
  static constexpr bool kAdds = true;
};
struct GemmaAddRms : AddRms {
  static constexpr bool kOnePlus = true;
};
struct Layer : Rms {
  static constexpr bool kCenters = true;
};

// What a row's elements have in common. Their centre is the mean as first computed, and what is missing from it.
struct Statistics {
  float mean;
  float rest;
  float scale;
};

template <typename T, typename W, typename Norm, device::Team kTeam, uint32_t kVec, uint32_t kItems>
struct Part {
  using Vector = device::AlignedVector<T, kVec>;
  using Index = typename device::Share<kTeam, kItems>::Index;
  static constexpr bool kWide = kVec * sizeof(T) == device::kPolicyVecBytes;
  static constexpr bool kHolds = kItems > 0;
  // Weights that are asked for with the row are there with it; many would take the registers that hide memory's latency.
  static constexpr bool kEarlyWeights = kHolds && kItems * kVec * sizeof(W) <= 64;
  using WeightVector = device::AlignedVectors<W, kVec, kWide ? device::kPolicyVecBytes : sizeof(W)>;

  const Row<T, W>& row;
  const device::Share<kTeam, kItems>& share;
  const device::L2Policy policy = device::L2Policy::evict_unchanged();
  Vector x[kHolds ? kItems : 1];
  Vector residual[kHolds ? kItems : 1];
  WeightVector weights[kEarlyWeights ? kItems : 1];
  WeightVector biases[kEarlyWeights && Norm::kCenters ? kItems : 1];

  JITK_DEVICE Part(const Row<T, W>& row, const device::Share<kTeam, kItems>& share) : row(row), share(share) {}

  JITK_DEVICE bool has_bias() const { return Norm::kCenters && row.bias != nullptr; }
  JITK_DEVICE void load(uint32_t i, Index at) {
    x[i].load_streaming(row.input, at, policy);
    if constexpr (Norm::kAdds) residual[i].load_streaming(row.residual, at, policy);
  }
  JITK_DEVICE void load_again(uint32_t i, Index at) { x[i].load(Norm::kAdds ? row.residual : row.input, at); }

  // What is held, and the weights that are early.
  JITK_DEVICE void load_held() {
    if constexpr (kHolds) share.each([&](uint32_t i, Index at) { load(i, at); });
    if constexpr (kEarlyWeights) share.each([&](uint32_t i, Index at) { weights[i].load_ordered(row.weight + at * kVec); });
    if constexpr (kEarlyWeights && Norm::kCenters) {
      if (has_bias()) share.each([&](uint32_t i, Index at) { biases[i].load_ordered(row.bias + at * kVec); });
    }
  }

  // Of squares, or of values if these are to be centred. The residual is added to and stored here.
  JITK_DEVICE float sum() {
    float sum = 0.0f;
    share.each([&](uint32_t i, Index at) {
      if constexpr (!kHolds) load(i, at);
      float values[kVec];
      to_floats(x[i], values);
      if constexpr (Norm::kAdds) {
        float others[kVec];
        to_floats(residual[i], others);
#pragma unroll
        for (uint32_t e = 0; e < kVec; ++e) values[e] += others[e];
        from_floats(values, x[i]);
        x[i].store(row.residual, at, policy);
        to_floats(x[i], values);
      }
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) sum += Norm::kCenters ? values[e] : values[e] * values[e];
    });
    return sum;
  }

  // Of the distances from the mean, and of their squares.
  JITK_DEVICE fp32x2_t centred_sums(float mean) {
    fp32x2_t sums{0.0f, 0.0f};
    share.each([&](uint32_t i, Index at) {
      if constexpr (!kHolds) load_again(i, at);
      float values[kVec];
      to_floats(x[i], values);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) {
        const float distance = values[e] - mean;
        sums.x += distance;
        sums.y += distance * distance;
      }
    });
    return sums;
  }

  // body(i, at, values) for the norm's floats of each vector.
  template <typename Body>
  JITK_DEVICE void each_normal(const Statistics& of, const Body& body) {
    const bool biased = has_bias();
    share.each([&](uint32_t i, Index at) {
      if constexpr (!kHolds) load_again(i, at);
      const uint32_t kept = kEarlyWeights ? i : 0;
      if constexpr (!kEarlyWeights) weights[0].load(row.weight + at * kVec);
      float values[kVec], factors[kVec];
      to_floats(x[i], values);
      weights[kept].to_floats(factors);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) {
        if constexpr (Norm::kOnePlus) factors[e] += 1.0f;
        values[e] = (values[e] - of.mean - of.rest) * of.scale * factors[e];
      }
      if (biased) {
        if constexpr (!kEarlyWeights) biases[0].load(row.bias + at * kVec);
        biases[Norm::kCenters ? kept : 0].to_floats(factors);
#pragma unroll
        for (uint32_t e = 0; e < kVec; ++e) values[e] += factors[e];
      }
      body(i, at, values);
    });
  }

  JITK_DEVICE void write(const Statistics& of) {
    each_normal(of, [&](uint32_t i, Index at, const float (&values)[kVec]) {
      from_floats(values, x[i]);
      x[i].store(row.out, at, policy);
    });
  }
};

}  // namespace jitk::norm

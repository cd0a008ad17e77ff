// A thread's part of the rows that its team takes in turn, from loading one to storing the sums over all of them.
#pragma once

#include "norm_backward_row.cuh"  // Params, RowStatistics, product

#include <jitk/team.cuh>  // Member
#include <jitk/vec.cuh>   // AlignedVector, AlignedVectors, L2Policy

namespace jitk::norm_backward {

// What a thread has of a row that it holds: vectors of x and of grad, and of the weight.
template <typename T, typename W, bool kCenters, Team kTeam, uint32_t kItems>
struct Part {
  static constexpr uint32_t kVec = kWide<T>;
  using Vector = device::AlignedVector<T, kVec>;
  struct Held {
    Vector x[kItems];
    Vector y[kItems];
  };

  const Params<T, W>& params;
  const device::team::Member<kTeam>& member;
  const uint32_t vectors = static_cast<uint32_t>(params.width / kVec);
  const device::L2Policy policy = device::L2Policy::evict_unchanged();
  Held held, next;
  device::AlignedVectors<W, kVec, device::kPolicyVecBytes> weights[kItems];
  float sums_w[kItems][kVec] = {}, sums_b[kItems][kVec] = {};

  JITK_DEVICE Part(const Params<T, W>& params, const device::team::Member<kTeam>& member) : params(params), member(member) {}

  // Not as Share deals them out: here a thread's vectors lie apart by the whole team.
  template <typename Body>
  JITK_DEVICE void each_vector(const Body& body) const {
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      const uint32_t at = i * member.lanes + member.lane;
      if (at < vectors) body(i, at);
    }
  }

  JITK_DEVICE void load(int64_t row, Held& to) const {
    const T* x = params.input + row * params.input_stride;
    const T* y = params.grad + row * params.grad_stride;
    each_vector([&](uint32_t i, uint32_t at) {
      to.x[i].load_streaming(x, at, policy);
      to.y[i].load_streaming(y, at, policy);
    });
  }
  JITK_DEVICE void load_weights() {
    each_vector([&](uint32_t i, uint32_t at) { weights[i].load(params.weight + at * kVec); });
  }
  JITK_DEVICE void advance() {
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      held.x[i] = next.x[i];
      held.y[i] = next.y[i];
    }
  }

  // body(i, at, xs, ys, gs) for the floats of each vector.
  template <typename Body>
  JITK_DEVICE void each_floats(const Body& body) const {
    each_vector([&](uint32_t i, uint32_t at) {
      float xs[kVec], ys[kVec], gs[kVec];
      to_floats(held.x[i], xs);
      to_floats(held.y[i], ys);
      weights[i].to_floats(gs);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) gs[e] = product(gs[e], ys[e]);
      body(i, at, xs, ys, gs);
    });
  }
  template <typename Body>
  JITK_DEVICE void each_element(const Body& body) const {
    each_floats([&](uint32_t, uint32_t, const float (&xs)[kVec], const float (&)[kVec], const float (&gs)[kVec]) {
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) body(xs[e], gs[e]);
    });
  }

  // Writes the row's gradients, and adds to the sums over rows.
  JITK_DEVICE void write(int64_t row, const RowStatistics& of) {
    T* to = params.grad_input + row * params.grad_input_stride;
    each_floats([&](uint32_t i, uint32_t at, const float (&xs)[kVec], const float (&ys)[kVec], const float (&gs)[kVec]) {
      float grads[kVec];
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) {
        const float distance = xs[e] - of.mean;
        sums_w[i][e] += ys[e] * (distance * of.scale);
        if constexpr (kCenters) sums_b[i][e] += ys[e];
        grads[e] = of.scale * (gs[e] - of.mean_g - distance * of.slope);
      }
      Vector out;
      from_floats(grads, out);
      out.store(to, at, policy);
    });
  }

  // The sums of a block's rows. `shared` is [warps, width], for rows that are a warp's.
  JITK_DEVICE void write_sums(const float (&sums)[kItems][kVec], float* to, float* shared) const {
    float* place = kTeam == Team::kWarp ? shared + member.team_of_block() * params.width : to;
    each_vector([&](uint32_t i, uint32_t at) {
#pragma unroll
      for (uint32_t e = 0; e < kVec; e += 4) {
        *reinterpret_cast<float4*>(place + at * kVec + e) = {sums[i][e], sums[i][e + 1], sums[i][e + 2], sums[i][e + 3]};
      }
    });
    if constexpr (kTeam == Team::kWarp) {
      __syncthreads();
      for (uint32_t column = threadIdx.x; column < params.width; column += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < member.teams_of_block(); ++i) sum += shared[i * params.width + column];
        to[column] = sum;
      }
      __syncthreads();
    }
  }
};

}  // namespace jitk::norm_backward

// Norms in one pass over memory: a row stays in registers between its sums and its output.
//
// One kernel serves every op here. A row belongs to a team of threads: some lanes of a warp where rows are short, so that a
// block has many of them; else a block, or for long rows a cluster of blocks. Each thread holds kItems vectors of the row.
// kItems = 0 stands for a row that no team holds, or that has no place for 16-byte vectors: it is read again for each use.
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/cluster.cuh>  // rows over several blocks
#include <jitk/cta.cuh>      // reduce_sum
#include <jitk/launch.cuh>
#include <jitk/vec.cuh>  // AlignedVector, to_floats

#include <jitk/fast_divisor.h>

#include <optional>  // the bias

namespace jitk {
namespace {

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

// Where the parts of a row are.
template <typename T, typename W>
struct Row {
  const T* input;
  T* residual;  // the input is added to it
  T* out;
  const W* weight;
  const W* bias;  // or null
};

// The rows of tensors. Strides count elements.
template <typename T, typename W>
struct Tokens {
  Row<T, W> first;
  int64_t input_stride;
  int64_t residual_stride;
  int64_t out_stride;

  JITK_DEVICE Row<T, W> row(int64_t i) const {
    return {first.input + i * input_stride, first.residual + i * residual_stride, first.out + i * out_stride, first.weight,
            first.bias};
  }
};

// The heads of queries and keys: each token's queries, then its keys.
template <typename T, typename W>
struct Heads {
  struct Side {
    T* data;
    const W* weight;
    int64_t token_stride;
    int64_t head_stride;
  };
  Side q;
  Side k;
  uint32_t q_heads;
  FastDivisor heads;

  JITK_DEVICE Row<T, W> row(int64_t i) const {
    const auto at = heads.divide(static_cast<uint32_t>(i));
    const bool is_q = at.remainder < q_heads;
    const uint32_t head = is_q ? at.remainder : at.remainder - q_heads;
    T* data = (is_q ? q.data : k.data) + at.quotient * (is_q ? q.token_stride : k.token_stride) +
              head * (is_q ? q.head_stride : k.head_stride);
    return {data, nullptr, data, is_q ? q.weight : k.weight, nullptr};
  }
};

enum class Team : uint8_t { kLanes, kBlock, kCluster };

// When the next kernel may move its blocks in, to wait there for the end of this one. Where this one leaves room that is early;
// elsewhere they would be in the way, and come in behind each block's last store. Before its own wait only a handful of blocks
// says so: with more, the blocks of three kernels crowd each other (H200, 2026-11-20).
enum class Trigger : uint8_t { kAtEnd, kAfterWait, kBeforeWait };

struct Plan {
  int64_t rows;
  int64_t width;        // elements in a row
  uint32_t lanes_log2;  // of a team of lanes
  float inverse_width;
  float eps;
  Trigger trigger;
};

constexpr uint32_t kWideBytes = 16;
constexpr uint32_t kMaxBlock = 1024;
constexpr uint32_t kMaxLanesBlock = 128;

template <typename Value>
struct Buffer {
  Value warps[device::cta::kMaxWarps];
  Value blocks[device::cluster::kMaxSize];
};

// The sum over a team, for each of its threads. A buffer serves once.
template <Team kTeam, typename Value>
JITK_DEVICE Value sum_of_team(Value value, uint32_t lanes_log2, Buffer<Value>& buffer) {
  using namespace device;
  if constexpr (kTeam == Team::kLanes) {
    const uint32_t lanes = 1u << lanes_log2;
#pragma unroll
    for (uint32_t distance = 1; distance < kWarpThreads; distance *= 2) {
      const Value other =
          warp::shuffle_words(value, [=](uint32_t word) { return __shfl_xor_sync(warp::kFullMask, word, distance); });
      if (distance < lanes) value = ReductionTrait<ReductionOp::SUM, Value>::reduce(value, other);
    }
  } else {
    value = cta::reduce_sum<cta::kBlockDim, cta::Buffer::kFresh>(value, buffer.warps);
#if JITK_ARCH_HOPPER_OR_GREATER
    if constexpr (kTeam == Team::kCluster) value = cluster::reduce_sum(value, buffer.blocks);
#endif
  }
  return value;
}

template <typename T, typename W, typename Norm, typename Place, Team kTeam, uint32_t kVec, uint32_t kItems>
__global__ void __launch_bounds__(kTeam == Team::kLanes ? kMaxLanesBlock : kMaxBlock)
    norm_kernel(const __grid_constant__ Place place, const __grid_constant__ Plan plan) {
  using namespace device;
  using Vector = AlignedVector<T, kVec>;
  constexpr bool kWide = kVec * sizeof(T) == kWideBytes;
  constexpr bool kHolds = kItems > 0;  // the row, in registers
  constexpr uint32_t kHeld = kHolds ? kItems : 1;
  // Weights that are asked for with the row are there with it; many would take the registers that hide memory's latency.
  constexpr bool kEarlyWeights = kHolds && kItems * kVec * sizeof(W) <= 64;
  using Index = std::conditional_t<kHolds, uint32_t, int64_t>;  // of vectors in a row
  __shared__ Buffer<float> buffer;
  __shared__ Buffer<fp32x2_t> centered_buffer;

  uint32_t lane = threadIdx.x;
  uint32_t lanes = blockDim.x;
  uint32_t part = 0;  // of the row, that this block of a cluster has
  int64_t index = blockIdx.x;
  if constexpr (kTeam == Team::kLanes) {
    lanes = 1u << plan.lanes_log2;
    lane = get_lane_id() & (lanes - 1);
    index = index * (blockDim.x >> plan.lanes_log2) + (threadIdx.x >> plan.lanes_log2);
#if JITK_ARCH_HOPPER_OR_GREATER
  } else if constexpr (kTeam == Team::kCluster) {
    cluster::arrive();
    part = cluster::rank();
    index = blockIdx.x / cluster::size();
#endif
  }
  // Lanes without a row still take part in the sums of their warp.
  const bool has_row = kTeam != Team::kLanes || index < plan.rows;
  const Row<T, W> row = place.row(has_row ? index : 0);
  const Index vectors = has_row ? static_cast<Index>(plan.width / kVec) : 0;
  // A warp's vectors are next to each other, which memory likes better than the same place in each kItems-th of the row.
  const uint32_t neighbours = kTeam == Team::kLanes ? lanes : kWarpThreads;
  const uint32_t near = lane & (neighbours - 1);
  const uint32_t first = (part * lanes + lane - near) * kItems + near;
  const auto each = [&](const auto& body) {
    if constexpr (kHolds) {
#pragma unroll
      for (uint32_t i = 0; i < kItems; ++i) {
        const uint32_t at = first + i * neighbours;
        if (at < vectors) body(i, at);
      }
    } else {
      for (Index at = lane; at < vectors; at += lanes) body(0, at);
    }
  };
  const L2Policy policy = L2Policy::evict_unchanged();
  const auto store = [&](const Vector& x, T* to, Index at) {
    if constexpr (kWide) {
      x.store(to, at, policy);
    } else {
      x.store(to, at);
    }
  };

  compute_here(row.input);
  compute_here(row.out);
  compute_here(row.weight);
  if constexpr (Norm::kAdds) compute_here(row.residual);
  compute_here(vectors);
  compute_here(plan.inverse_width);
  compute_here(plan.eps);
  if (plan.trigger == Trigger::kBeforeWait) PDLTriggerSecondary<true>();
  PDLWaitPrimary<true>();
  if (plan.trigger == Trigger::kAfterWait) PDLTriggerSecondary<true>();

  Vector x[kHeld];
  Vector residual[kHeld];
  using WeightVector = AlignedVectors<W, kVec, kWide ? kWideBytes : sizeof(W)>;
  WeightVector weights[kEarlyWeights ? kItems : 1];
  WeightVector biases[kEarlyWeights && Norm::kCenters ? kItems : 1];
  const auto load = [&](uint32_t i, Index at) {
    if constexpr (kWide) {
      x[i].load_streaming(row.input, at, policy);
      if constexpr (Norm::kAdds) residual[i].load_streaming(row.residual, at, policy);
    } else {
      x[i].load(row.input, at);
      if constexpr (Norm::kAdds) residual[i].load(row.residual, at);
    }
  };
  if constexpr (kHolds) each(load);
  if constexpr (kEarlyWeights) each([&](uint32_t i, Index at) { weights[i].load_ordered(row.weight + at * kVec); });
  const bool has_bias = Norm::kCenters && row.bias != nullptr;
  if constexpr (kEarlyWeights && Norm::kCenters) {
    if (has_bias) each([&](uint32_t i, Index at) { biases[i].load_ordered(row.bias + at * kVec); });
  }

  float sum = 0.0f;
  each([&](uint32_t i, Index at) {
    if constexpr (!kHolds) load(i, at);
    float values[kVec];
    to_floats(x[i], values);
    if constexpr (Norm::kAdds) {
      float others[kVec];
      to_floats(residual[i], others);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) values[e] += others[e];
      from_floats(values, x[i]);
      store(x[i], row.residual, at);
      to_floats(x[i], values);
    }
#pragma unroll
    for (uint32_t e = 0; e < kVec; ++e) sum += Norm::kCenters ? values[e] : values[e] * values[e];
  });
#if JITK_ARCH_HOPPER_OR_GREATER
  if constexpr (kTeam == Team::kCluster) cluster::wait();
#endif
  sum = sum_of_team<kTeam>(sum, plan.lanes_log2, buffer);

  const T* again = Norm::kAdds ? row.residual : row.input;
  float mean = 0.0f, rest = 0.0f;
  if constexpr (Norm::kCenters) {
    // The mean of large numbers, rounded, is too far from theirs. The distances from it are small: their mean is what is missing.
    mean = sum * plan.inverse_width;
    fp32x2_t sums{0.0f, 0.0f};
    each([&](uint32_t i, Index at) {
      if constexpr (!kHolds) x[i].load(again, at);
      float values[kVec];
      to_floats(x[i], values);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) {
        const float distance = values[e] - mean;
        sums.x += distance;
        sums.y += distance * distance;
      }
    });
    sums = sum_of_team<kTeam>(sums, plan.lanes_log2, centered_buffer);
    rest = sums.x * plan.inverse_width;
    // A sum of squares that overflows tells nothing of the deviation. NaN, as in PyTorch: infinity would make the norm zero.
    sum = sums.y < __builtin_inff() ? fmaxf(sums.y - sums.x * rest, 0.0f) : __builtin_nanf("");
  }

  const float scale = rsqrtf(sum * plan.inverse_width + plan.eps);
  each([&](uint32_t i, Index at) {
    if constexpr (!kHolds) x[i].load(again, at);
    const uint32_t kept = kEarlyWeights ? i : 0;
    if constexpr (!kEarlyWeights) weights[0].load(row.weight + at * kVec);
    float values[kVec], factors[kVec];
    to_floats(x[i], values);
    weights[kept].to_floats(factors);
#pragma unroll
    for (uint32_t e = 0; e < kVec; ++e) {
      if constexpr (Norm::kOnePlus) factors[e] += 1.0f;
      values[e] = (values[e] - mean - rest) * scale * factors[e];
    }
    if (has_bias) {
      if constexpr (!kEarlyWeights) biases[0].load(row.bias + at * kVec);
      biases[Norm::kCenters ? kept : 0].to_floats(factors);
#pragma unroll
      for (uint32_t e = 0; e < kVec; ++e) values[e] += factors[e];
    }
    from_floats(values, x[i]);
    store(x[i], row.out, at);
  });
  PDLTriggerSecondary<true>();
}

// How rows are spread over threads.
struct Spread {
  Team team;
  uint32_t items;    // vectors of a thread; 0 for any number
  uint32_t threads;  // of a block
  uint32_t blocks;   // of a cluster
};

// The numbers are measured (H200, bf16, 2026-11-20): two vectors a thread stream best, but four of the short rows of an addition,
// and of the long rows of two sums, for which a smaller block waits less. A few rows have the GPU to themselves, and take it.
template <typename Norm>
Spread spread_wide(int64_t rows, int64_t vectors, int64_t sms) {
  if (vectors <= 128) {
    const bool few = rows * vectors <= sms * 1024;
    const uint32_t items = vectors > 64 ? 4 : vectors > 32 || !few ? 2 : 1;
    return {Team::kLanes, items, vectors > 64 ? 64u : 128u, 1};
  }
  constexpr uint32_t kMostItems = Norm::kAdds ? 4 : 8;  // without spilling
  const bool few = rows * device::cluster::kMaxSize <= sms;
  uint32_t items = 2, blocks = 1;
  if (few) {
    if (vectors > 1024 && device::kClusterSupported) items = vectors > 4096 ? 4 : 2, blocks = device::cluster::kMaxSize;
  } else if (Norm::kAdds ? vectors <= 512 : Norm::kCenters && vectors > 512) {
    items = 4;
  }
  while (items < kMostItems && items * kMaxBlock * blocks < vectors) items *= 2;
  while (device::kClusterSupported && blocks < device::cluster::kMaxSize && items * kMaxBlock * blocks < vectors) blocks *= 2;
  if (items * kMaxBlock * blocks < vectors) return {Team::kBlock, 0, kMaxBlock, 1};
  const uint32_t warps = static_cast<uint32_t>(host::div_ceil(vectors, int64_t{32} * items * blocks));
  return {blocks > 1 ? Team::kCluster : Team::kBlock, items, warps * 32, blocks};
}

// Rows without a place for wide vectors are read element by element, or in pairs of halves.
inline Spread spread_any(int64_t vectors) {
  if (vectors <= 128) return {Team::kLanes, 0, 128, 1};
  return {Team::kBlock, 0, vectors <= 512 ? 128u : vectors <= 4096 ? 256u : kMaxBlock, 1};
}

template <typename T, typename W, typename Norm, typename Place>
auto kernel_for(const Spread& spread, uint32_t vec) {
  constexpr uint32_t kWide = kWideBytes / sizeof(T);
  constexpr uint32_t kPair = 4 / sizeof(T);
  constexpr uint32_t kMost = Norm::kAdds ? 4 : 8;
  if (spread.team == Team::kLanes) {
    return spread.items == 1   ? norm_kernel<T, W, Norm, Place, Team::kLanes, kWide, 1>
           : spread.items == 2 ? norm_kernel<T, W, Norm, Place, Team::kLanes, kWide, 2>
           : spread.items == 4 ? norm_kernel<T, W, Norm, Place, Team::kLanes, kWide, 4>
           : vec == kPair      ? norm_kernel<T, W, Norm, Place, Team::kLanes, kPair, 0>
                               : norm_kernel<T, W, Norm, Place, Team::kLanes, 1, 0>;
  }
  if (device::kClusterSupported && spread.team == Team::kCluster) {
    constexpr Team kTeam = device::kClusterSupported ? Team::kCluster : Team::kBlock;  // else it would not compile
    return spread.items == 2   ? norm_kernel<T, W, Norm, Place, kTeam, kWide, 2>
           : spread.items == 4 ? norm_kernel<T, W, Norm, Place, kTeam, kWide, 4>
                               : norm_kernel<T, W, Norm, Place, kTeam, kWide, kMost>;
  }
  return spread.items == 2   ? norm_kernel<T, W, Norm, Place, Team::kBlock, kWide, 2>
         : spread.items == 4 ? norm_kernel<T, W, Norm, Place, Team::kBlock, kWide, 4>
         : spread.items == 8 ? norm_kernel<T, W, Norm, Place, Team::kBlock, kWide, kMost>
         : vec == kWide      ? norm_kernel<T, W, Norm, Place, Team::kBlock, kWide, 0>
         : vec == kPair      ? norm_kernel<T, W, Norm, Place, Team::kBlock, kPair, 0>
                             : norm_kernel<T, W, Norm, Place, Team::kBlock, 1, 0>;
}

// `places`: all addresses and distances in bytes that rows start at, one on top of the other.
template <typename T, typename W, typename Norm, typename Place>
void run(const Place& place, uint64_t places, int64_t rows, int64_t width, double eps, DLDevice device) {
  using namespace host;
  if (rows == 0 || width == 0) return;
  const int64_t sms = runtime::get_sm_count(device.device_id);
  places |= static_cast<uint64_t>(width) * sizeof(T);
  const uint32_t vec = (places % kWideBytes == 0 ? kWideBytes : places % 4 == 0 ? 4 : sizeof(T)) / sizeof(T);
  const int64_t vectors = width / vec;
  const Spread spread = vec * sizeof(T) == kWideBytes ? spread_wide<Norm>(rows, vectors, sms) : spread_any(vectors);

  Plan plan{rows, width, 0, 1.0f / static_cast<float>(width), static_cast<float>(eps), Trigger::kAtEnd};
  int64_t grid = rows * spread.blocks;
  if (spread.team == Team::kLanes) {
    const int64_t team = spread.items == 0 ? vectors : div_ceil(vectors, static_cast<int64_t>(spread.items));
    while (plan.lanes_log2 < 5 && int64_t{1} << plan.lanes_log2 < team) ++plan.lanes_log2;
    grid = div_ceil(rows, static_cast<int64_t>(spread.threads >> plan.lanes_log2));
  }
  if (grid * spread.threads <= sms * 2048)
    plan.trigger = grid * spread.threads <= sms * 32 && spread.threads <= 256 ? Trigger::kBeforeWait : Trigger::kAfterWait;

  LaunchKernel launch(grid, spread.threads, device);
  launch.enable_pdl();
  if (spread.blocks > 1) launch.enable_cluster({spread.blocks, 1, 1});
  launch(kernel_for<T, W, Norm, Place>(spread, vec), place, plan);
}

inline uint64_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

template <typename T, typename W, typename Norm>
void norm(TensorView input, const TensorView* residual, TensorView weight, const TensorView* bias, double eps, TensorView out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  SymbolicDevice device;
  Rows in, added, to;
  TensorMatcher({tokens, hidden}).with_rows(in).with_dtype<T>().with_device(device).verify(input);
  if (residual != nullptr)
    TensorMatcher({tokens, hidden}).with_rows(added).with_dtype<T>().with_device(device).verify(*residual);
  TensorMatcher({hidden}).with_dtype<W>().with_device(device).verify(weight);
  if (bias != nullptr) TensorMatcher({hidden}).with_dtype<W>().with_device(device).verify(*bias);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().with_device(device).verify(out);
  if (in.count == 1) in.stride = added.stride = to.stride = 0;

  const auto data = [](const TensorView* view) { return view != nullptr ? view->data_ptr() : nullptr; };
  const Row<T, W> first{static_cast<const T*>(input.data_ptr()), static_cast<T*>(data(residual)),
                        static_cast<T*>(out.data_ptr()), static_cast<const W*>(weight.data_ptr()),
                        static_cast<const W*>(data(bias))};
  const uint64_t places = address(first.input) | address(first.residual) | address(first.out) | address(first.weight) |
                          address(first.bias) | sizeof(T) * static_cast<uint64_t>(in.stride | added.stride | to.stride);
  run<T, W, Norm>(Tokens<T, W>{first, in.stride, added.stride, to.stride}, places, in.count, in.width, eps, device.unwrap());
}

}  // namespace

template <typename T, typename W>
void rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  norm<T, W, Rms>(input, nullptr, weight, nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void gemma_rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  norm<T, W, GemmaRms>(input, nullptr, weight, nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void layernorm(TensorView input, TensorView weight, std::optional<TensorView> bias, double eps, Output& out) {
  norm<T, W, Layer>(input, nullptr, weight, bias ? &*bias : nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  norm<T, W, AddRms>(input, &residual, weight, nullptr, eps, input);
}

template <typename T, typename W>
void gemma_fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  norm<T, W, GemmaAddRms>(input, &residual, weight, nullptr, eps, input);
}

template <typename T, typename W>
void fused_qknorm(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight, double eps) {
  using namespace host;
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, head_dim{"head_dim"};
  SymbolicDevice device;
  TensorMatcher({tokens, q_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(q);
  TensorMatcher({tokens, k_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(k);
  TensorMatcher({head_dim}).with_dtype<W>().with_device(device).verify(q_weight);
  TensorMatcher({head_dim}).with_dtype<W>().with_device(device).verify(k_weight);

  using Side = typename Heads<T, W>::Side;
  const auto side = [](const TensorView& x, const TensorView& weight) {
    return Side{static_cast<T*>(x.data_ptr()), static_cast<const W*>(weight.data_ptr()), x.sizes_[0] > 1 ? x.strides_[0] : 0,
                x.sizes_[1] > 1 ? x.strides_[1] : 0};
  };
  const auto places = [](const Side& x) {
    return address(x.data) | address(x.weight) | sizeof(T) * static_cast<uint64_t>(x.token_stride | x.head_stride);
  };
  const int64_t heads = q_heads.unwrap() + k_heads.unwrap();
  Heads<T, W> place{side(q, q_weight), side(k, k_weight), static_cast<uint32_t>(q_heads.unwrap()),
                    FastDivisor(static_cast<uint64_t>(heads))};
  // Heads are counted in 32 bits.
  const int64_t tokens_per_launch = (int64_t{1} << 31) / max(heads, int64_t{1});
  for (int64_t done = 0; done < tokens.unwrap(); done += tokens_per_launch) {
    run<T, W, Rms>(place, places(place.q) | places(place.k), min(tokens.unwrap() - done, tokens_per_launch) * heads,
                   head_dim.unwrap(), eps, device.unwrap());
    place.q.data += tokens_per_launch * place.q.token_stride;
    place.k.data += tokens_per_launch * place.k.token_stride;
  }
}

}  // namespace jitk

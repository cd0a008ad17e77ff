// Norms in one pass over memory: a row stays in registers between its sums and its output.
//
// One kernel serves every op here. A row belongs to a team of threads: some lanes of a warp where rows are short, so that a
// block has many of them; else a block, or for long rows a cluster of blocks. Each thread holds kItems vectors of the row.
// kItems = 0 stands for a row that no team holds, or that has no place for 16-byte vectors: it is read again for each use.
// From top to bottom: the norms, where rows are, what a thread does with its part of a row, the kernel, the choice of a team.
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/launch.cuh>
#include <jitk/overlap.cuh>  // Trigger
#include <jitk/share.cuh>    // a thread's vectors of a row
#include <jitk/team.cuh>     // who reduces a row
#include <jitk/vec.cuh>      // AlignedVector, to_floats, widest_vector

#include <jitk/fast_divisor.h>

#include <optional>  // the bias

namespace jitk {
namespace {

using device::Team;

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

// Where a row's numbers are centred: the mean as first computed, and what is missing from it.
struct Center {
  float mean;
  float rest;
};

// A thread's part of a row, from loading it to storing the norm.
template <typename T, typename W, typename Norm, Team kTeam, uint32_t kVec, uint32_t kItems>
struct Part {
  using Vector = device::AlignedVector<T, kVec>;
  using Index = typename device::Share<kTeam, kItems>::Index;
  static constexpr bool kWide = kVec * sizeof(T) == kWideBytes;
  static constexpr bool kHolds = kItems > 0;
  // Weights that are asked for with the row are there with it; many would take the registers that hide memory's latency.
  static constexpr bool kEarlyWeights = kHolds && kItems * kVec * sizeof(W) <= 64;
  using WeightVector = device::AlignedVectors<W, kVec, kWide ? kWideBytes : sizeof(W)>;

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
  JITK_DEVICE fp32x2_t centered_sums(float mean) {
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

  JITK_DEVICE void write(Center center, float scale) {
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
        values[e] = (values[e] - center.mean - center.rest) * scale * factors[e];
      }
      if (biased) {
        if constexpr (!kEarlyWeights) biases[0].load(row.bias + at * kVec);
        biases[Norm::kCenters ? kept : 0].to_floats(factors);
#pragma unroll
        for (uint32_t e = 0; e < kVec; ++e) values[e] += factors[e];
      }
      from_floats(values, x[i]);
      x[i].store(row.out, at, policy);
    });
  }
};

template <typename T, typename W, typename Norm, typename Place, Team kTeam, uint32_t kVec, uint32_t kItems>
__global__ void __launch_bounds__(kTeam == Team::kLanes ? kMaxLanesBlock : kMaxBlock)
    norm_kernel(const __grid_constant__ Place place, const __grid_constant__ Plan plan) {
  using namespace device;
  using Index = typename device::Share<kTeam, kItems>::Index;
  __shared__ team::Buffer<kTeam, float> buffer;
  __shared__ team::Buffer<kTeam, fp32x2_t> centered_buffer;

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
  float sum = part.sum();
  team::meet<kTeam>();
  sum = team::sum(member, sum, buffer);
  Center center{0.0f, 0.0f};
  if constexpr (Norm::kCenters) {
    // The mean of large numbers, rounded, is too far from theirs. The distances from it are small: their mean is what is missing.
    center.mean = sum * plan.inverse_width;
    const fp32x2_t sums = team::sum(member, part.centered_sums(center.mean), centered_buffer);
    center.rest = sums.x * plan.inverse_width;
    // A sum of squares that overflows tells nothing of the deviation. NaN, as in PyTorch: infinity would make the norm zero.
    sum = sums.y < __builtin_inff() ? fmaxf(sums.y - sums.x * center.rest, 0.0f) : __builtin_nanf("");
  }
  part.write(center, rsqrtf(sum * plan.inverse_width + plan.eps));
  PDLTriggerSecondary<true>();
}

// How rows are spread over threads.
struct Spread {
  Team team;
  uint32_t items;    // vectors of a thread; 0 for any number, read again for each use
  uint32_t threads;  // of a block; 0 for as many warps as hold a row
  uint32_t blocks;   // of a cluster
};

// A choice for rows of at most `vectors` 16-byte vectors. Few rows have the GPU to themselves, and take it.
enum class Count : uint8_t { kAny, kFew };
enum class Of : uint8_t { kAny, kAddition, kNoAddition, kCentered };
struct Choice {
  Count rows;
  Of of;
  int64_t vectors;
  Spread spread;
};

// The first line that fits is taken; clusters only where there are any. Beside each the microseconds of one shape in bf16, whose
// vectors are 8 elements, and of a copy of its bytes (H200, 2026-11-20, docs/benchmarks.md). Two vectors a thread stream best;
// four where a smaller block waits less for its others.
constexpr int64_t kShort = 128;
constexpr Choice kShortRows[] = {
    {Count::kFew, Of::kAny, 32, {Team::kLanes, 1, 128, 1}},     // qknorm (128, 32 + 8, 128): 1.91
    {Count::kAny, Of::kAny, 64, {Team::kLanes, 2, 128, 1}},     // rmsnorm (32768, 512): 17.38, copy 17.71
    {Count::kAny, Of::kAny, kShort, {Team::kLanes, 4, 64, 1}},  // qknorm (300, 4 + 1, 1024): 3.10
};
constexpr Choice kLongRows[] = {
    {Count::kFew, Of::kAny, 1024, {Team::kBlock, 2, 0, 1}},            // rmsnorm (1, 8192): 1.34, copy 1.09
    {Count::kFew, Of::kAny, 4096, {Team::kCluster, 2, 0, 8}},          // rmsnorm (1, 16384): 1.55, copy 1.12
    {Count::kFew, Of::kAny, 32768, {Team::kCluster, 4, 0, 8}},         // rmsnorm (1, 65536): 2.24, copy 1.81
    {Count::kFew, Of::kNoAddition, 65536, {Team::kCluster, 8, 0, 8}},  // not measured
    {Count::kFew, Of::kAny, 2048, {Team::kBlock, 2, 0, 1}},            // before Hopper: not measured
    {Count::kAny, Of::kAddition, 512, {Team::kBlock, 4, 0, 1}},        // fused_add_rmsnorm (1024, 4096): 9.37, copy 9.94
    {Count::kAny, Of::kAny, 512, {Team::kBlock, 2, 0, 1}},             // layernorm (1024, 4096): 7.31, copy 5.96
    {Count::kAny, Of::kCentered, 4096, {Team::kBlock, 4, 0, 1}},       // layernorm (4096, 14336): 65.84, copy 57.13
    {Count::kAny, Of::kAny, 2048, {Team::kBlock, 2, 0, 1}},            // rmsnorm (4096, 8192): 34.07, copy 33.46
    {Count::kAny, Of::kAny, 4096, {Team::kBlock, 4, 0, 1}},            // not measured
    {Count::kAny, Of::kNoAddition, 8192, {Team::kBlock, 8, 0, 1}},     // rmsnorm (300, 65536): 28.84, copy 20.49
    {Count::kAny, Of::kAddition, 8192, {Team::kCluster, 4, 0, 2}},     // fused_add_rmsnorm (300, 65536): 45.64, copy 38.89
    {Count::kAny, Of::kAddition, 16384, {Team::kCluster, 4, 0, 4}},    // not measured
    {Count::kAny, Of::kAddition, 32768, {Team::kCluster, 4, 0, 8}},    // not measured
    {Count::kAny, Of::kNoAddition, 16384, {Team::kCluster, 8, 0, 2}},  // not measured
    {Count::kAny, Of::kNoAddition, 32768, {Team::kCluster, 8, 0, 4}},  // not measured
    {Count::kAny, Of::kNoAddition, 65536, {Team::kCluster, 8, 0, 8}},  // not measured
};

template <typename Norm, size_t kCount>
Spread choose(const Choice (&table)[kCount], int64_t vectors, bool few) {
  for (const Choice& choice : table) {
    if (vectors > choice.vectors || (choice.rows == Count::kFew && !few)) continue;
    if (choice.of == (Norm::kAdds ? Of::kNoAddition : Of::kAddition) || (choice.of == Of::kCentered && !Norm::kCenters))
      continue;
    if (choice.spread.team == Team::kCluster && !device::kClusterSupported) continue;
    return choice.spread;
  }
  return {Team::kBlock, 0, kMaxBlock, 1};
}

template <typename Norm>
Spread spread_wide(int64_t rows, int64_t vectors, int64_t sms) {
  if (vectors <= kShort) return choose<Norm>(kShortRows, vectors, rows * vectors <= sms * 1024);
  Spread spread = choose<Norm>(kLongRows, vectors, rows * device::cluster::kMaxSize <= sms);
  if (spread.threads == 0)
    spread.threads = static_cast<uint32_t>(host::div_ceil(vectors, int64_t{32} * spread.items * spread.blocks)) * 32;
  return spread;
}

// Rows without a place for wide vectors are read element by element, or in pairs of halves.
inline Spread spread_any(int64_t vectors) {
  if (vectors <= kShort) return {Team::kLanes, 0, 128, 1};
  return {Team::kBlock, 0, vectors <= 512 ? 128u : vectors <= 4096 ? 256u : kMaxBlock, 1};
}

// A team that holds its rows takes wide vectors, one that reads them again any.
template <typename T, typename W, typename Norm, typename Place, Team kTeam>
auto kernel_of_team(uint32_t items, uint32_t vec) {
  constexpr uint32_t kWide = kWideBytes / sizeof(T);
  constexpr uint32_t kPair = 4 / sizeof(T);
  constexpr uint32_t kLeast = kTeam == Team::kLanes ? 1 : 2;
  constexpr uint32_t kMost = kTeam == Team::kLanes || Norm::kAdds ? 4 : 8;  // without spilling
  if (items == kLeast) return norm_kernel<T, W, Norm, Place, kTeam, kWide, kLeast>;
  if (items == 2) return norm_kernel<T, W, Norm, Place, kTeam, kWide, 2>;
  if (items == 4) return norm_kernel<T, W, Norm, Place, kTeam, kWide, 4>;
  if constexpr (kTeam != Team::kCluster) {
    if (items == 0 && vec == kPair) return norm_kernel<T, W, Norm, Place, kTeam, kPair, 0>;
    if (items == 0 && vec == 1) return norm_kernel<T, W, Norm, Place, kTeam, 1, 0>;
  }
  if constexpr (kTeam == Team::kBlock) {
    if (items == 0) return norm_kernel<T, W, Norm, Place, kTeam, kWide, 0>;
  }
  return norm_kernel<T, W, Norm, Place, kTeam, kWide, kMost>;
}

template <typename T, typename W, typename Norm, typename Place>
auto kernel_for(const Spread& spread, uint32_t vec) {
  if (spread.team == Team::kLanes) return kernel_of_team<T, W, Norm, Place, Team::kLanes>(spread.items, vec);
  if constexpr (device::kClusterSupported) {
    if (spread.team == Team::kCluster) return kernel_of_team<T, W, Norm, Place, Team::kCluster>(spread.items, vec);
  }
  return kernel_of_team<T, W, Norm, Place, Team::kBlock>(spread.items, vec);
}

// `places`: all that rows start at (vec.cuh).
template <typename T, typename W, typename Norm, typename Place>
void run(const Place& place, uint64_t places, int64_t rows, int64_t width, double eps, DLDevice device) {
  using namespace host;
  if (rows == 0 || width == 0) return;
  const int64_t sms = runtime::get_sm_count(device.device_id);
  const uint32_t vec = widest_vector<T, kWideBytes>(places, strides_of<T>(width));
  const int64_t vectors = width / vec;
  const Spread spread = vec * sizeof(T) == kWideBytes ? spread_wide<Norm>(rows, vectors, sms) : spread_any(vectors);

  Plan plan{rows, width, 0, 1.0f / static_cast<float>(width), static_cast<float>(eps), Trigger::kAtEnd};
  int64_t grid = rows * spread.blocks;
  if (spread.team == Team::kLanes) {
    const int64_t team = spread.items == 0 ? vectors : div_ceil(vectors, static_cast<int64_t>(spread.items));
    while (plan.lanes_log2 < 5 && int64_t{1} << plan.lanes_log2 < team) ++plan.lanes_log2;
    grid = div_ceil(rows, static_cast<int64_t>(spread.threads >> plan.lanes_log2));
  }
  plan.trigger = choose_trigger(grid * spread.threads, spread.threads, sms);

  LaunchKernel launch(grid, spread.threads, device);
  launch.enable_pdl();
  if (spread.blocks > 1) launch.enable_cluster({spread.blocks, 1, 1});
  launch(kernel_for<T, W, Norm, Place>(spread, vec), place, plan);
}

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
  const uint64_t starts = places(first.input, first.residual, first.out, first.weight, first.bias,
                                 strides_of<T>(in.stride, added.stride, to.stride));
  run<T, W, Norm>(Tokens<T, W>{first, in.stride, added.stride, to.stride}, starts, in.count, in.width, eps, device.unwrap());
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
  const auto starts = [](const Side& x) { return places(x.data, x.weight, strides_of<T>(x.token_stride, x.head_stride)); };
  const int64_t heads = q_heads.unwrap() + k_heads.unwrap();
  Heads<T, W> place{side(q, q_weight), side(k, k_weight), static_cast<uint32_t>(q_heads.unwrap()),
                    FastDivisor(static_cast<uint64_t>(heads))};
  // Heads are counted in 32 bits.
  const int64_t tokens_per_launch = (int64_t{1} << 31) / max(heads, int64_t{1});
  for (int64_t done = 0; done < tokens.unwrap(); done += tokens_per_launch) {
    run<T, W, Rms>(place, starts(place.q) | starts(place.k), min(tokens.unwrap() - done, tokens_per_launch) * heads,
                   head_dim.unwrap(), eps, device.unwrap());
    place.q.data += tokens_per_launch * place.q.token_stride;
    place.k.data += tokens_per_launch * place.k.token_stride;
  }
}

}  // namespace jitk

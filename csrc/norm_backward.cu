// Gradients of rmsnorm and layernorm: of the input, row by row, and of weight and bias, summed over all rows.
//
//   g = grad * weight,  n = (x - mean) * scale:     grad_input  = scale * (g - mean(g) - n * mean(g * n))
//                                                   grad_weight = sum(grad * n),  grad_bias = sum(grad)
//
// without the means of x and g for rmsnorm. One pass over memory: the rows are dealt out to teams, a warp or a block each, in
// turn. A team computes the statistics of its rows again, and keeps the sums over them in registers, a few columns to a thread; a
// second kernel adds the sums of all blocks in a fixed order. Rows that have no place for 16-byte vectors, or are too long for
// the sums to stay in registers, take three kernels, and are read again for the sums over rows.
#include <jitk/result.h>  // Output, Tensor, empty
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>
#include <jitk/team.cuh>  // who reduces a row
#include <jitk/vec.cuh>   // AlignedVector, AlignedVectors, widest_vector

namespace jitk {
namespace {

using device::Team;

constexpr uint32_t kWideBytes = 16;
constexpr uint32_t kMaxThreads = 512;  // so that a thread may have 128 registers

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
  if (kCenters && !(sums.x < __builtin_inff())) sums.x = __builtin_nanf("");  // as in norm.cu
  row.scale = rsqrtf(sums.x * inverse_width + eps);
  row.slope = row.scale * row.scale * (sums.y * inverse_width);
  return row;
}

// What a thread has of a row that it holds: vectors of x and of grad, and of the weight.
template <typename T, typename W, bool kCenters, Team kTeam, uint32_t kItems>
struct Part {
  static constexpr uint32_t kVec = kWideBytes / sizeof(T);
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
  device::AlignedVectors<W, kVec, kWideBytes> weights[kItems];
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

template <typename T, typename W, bool kCenters, Team kTeam, uint32_t kItems>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  extern __shared__ float warp_sums[];
  __shared__ team::Buffer<kTeam, float2> buffers[2][2];

  const team::Member<kTeam> member = team::join<kTeam>();
  const int64_t step = int64_t{gridDim.x} * member.teams_of_block();
  int64_t row = member.team();
  Part<T, W, kCenters, kTeam, kItems> part(params, member);

  PDLWaitPrimary<true>();
  if (row < params.rows) part.load(row, part.held);
  part.load_weights();
  for (uint32_t turn = 0; row < params.rows; row += step, turn ^= 1) {
    if (row + step < params.rows) part.load(row + step, part.next);
    const auto each = [&](const auto& body) { part.each_element(body); };
    part.write(row, row_statistics<kCenters>(member, each, params.inverse_width, params.eps, buffers[turn]));
    part.advance();
  }

  float* mine = params.sums + int64_t{blockIdx.x} * (kCenters ? 2 : 1) * params.width;
  part.write_sums(part.sums_w, mine, warp_sums);
  if constexpr (kCenters) part.write_sums(part.sums_b, mine + params.width, warp_sums);
  PDLTriggerSecondary<true>();
}

// Rows of any length and place: the input's gradients and the rows' statistics, of which either may be null.
template <typename T, typename W, bool kCenters>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  __shared__ team::Buffer<Team::kBlock, float2> buffers[2];
  const int64_t row = blockIdx.x;
  const T* x = params.input + row * params.input_stride;
  const T* y = params.grad + row * params.grad_stride;
  T* out = params.grad_input + row * params.grad_input_stride;
  PDLWaitPrimary<true>();
  const auto each = [&](const auto& body) {
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < params.width; at += blockDim.x) {
      body(cast<fp32_t>(x[at]), product(cast<fp32_t>(y[at]), cast<fp32_t>(params.weight[at])));
    }
  };
  const RowStatistics of =
      row_statistics<kCenters>(team::join<Team::kBlock>(), each, params.inverse_width, params.eps, buffers);
  for (int64_t at = threadIdx.x; at < params.width && params.grad_input != nullptr; at += blockDim.x) {
    const float g = product(cast<fp32_t>(y[at]), cast<fp32_t>(params.weight[at]));
    out[at] = cast<T>(of.scale * (g - of.mean_g - (cast<fp32_t>(x[at]) - of.mean) * of.slope));
  }
  if (threadIdx.x == 0 && params.statistics != nullptr) params.statistics[row] = {of.mean, of.scale};
  PDLTriggerSecondary<true>();
}

constexpr uint32_t kColumns = 32;  // of a block that sums over rows
constexpr uint32_t kParts = 16;    // its threads to a column

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

// How rows are dealt out. `parts` are the partial sums of a column: of blocks that take rows in turn, or of chunks of rows.
struct Spread {
  bool holds;  // a row in registers, with the sums over rows
  bool by_warps;
  uint32_t items;
  uint32_t threads;
  int64_t parts;
};

constexpr uint32_t kWarps = 8;  // of a block whose rows are a warp's

inline Spread spread_rows(int64_t rows, int64_t vectors, bool wide, int64_t sms) {
  using namespace host;
  if (!wide || vectors > 4 * kMaxThreads) return {false, false, 0, 0, min(div_ceil(rows, int64_t{128}), int64_t{256})};
  const bool by_warps = vectors <= 2 * device::kWarpThreads;
  const uint32_t items = vectors > 2 * kMaxThreads ? 4 : vectors > (by_warps ? device::kWarpThreads : kMaxThreads) ? 2 : 1;
  const uint32_t threads =
      by_warps ? kWarps * device::kWarpThreads : static_cast<uint32_t>(div_ceil(vectors, int64_t{32} * items)) * 32;
  const int64_t blocks = sms * (threads <= 256 ? 4 : items == 1 ? 2 : 1);
  return {true, by_warps, items, threads, min(blocks, by_warps ? div_ceil(rows, int64_t{kWarps}) : rows)};
}

// One pass: blocks stay, and deal the rows out among them.
template <typename T, typename W, bool kCenters>
void run_held(const Params<T, W>& params, const Spread& spread, cudaStream_t stream) {
  const auto kernel = spread.by_warps     ? (spread.items == 1 ? backward_kernel<T, W, kCenters, Team::kWarp, 1>
                                                               : backward_kernel<T, W, kCenters, Team::kWarp, 2>)
                      : spread.items == 1 ? backward_kernel<T, W, kCenters, Team::kBlock, 1>
                      : spread.items == 2 ? backward_kernel<T, W, kCenters, Team::kBlock, 2>
                                          : backward_kernel<T, W, kCenters, Team::kBlock, 4>;
  const size_t shared = spread.by_warps ? kWarps * static_cast<size_t>(params.width) * sizeof(float) : 0;
  host::LaunchKernel(spread.parts, spread.threads, stream, shared).enable_pdl()(kernel, params);
}

inline Tensor scratch(int64_t floats, DLDevice device) {
  const int64_t sizes[1] = {floats};
  return host::empty({sizes, 1}, dtype_of<fp32_t>(), device);
}

// Rows of any length and place: gradients and statistics of each row, then the sums of each column.
template <typename T, typename W, bool kCenters>
void run_any(Params<T, W> params, int64_t parts, cudaStream_t stream, DLDevice device) {
  using namespace host;
  Tensor statistics = scratch(params.rows * 2, device);
  params.statistics = static_cast<float2*>(statistics.data_ptr());
  const auto rows_kernel = [&](const Params<T, W>& of) {
    const uint32_t threads = params.width <= 1024 ? 128 : kMaxThreads;
    LaunchKernel(params.rows, threads, stream).enable_pdl()(backward_rows_kernel<T, W, kCenters>, of);
  };
  // In the place of what the sums are made of, the gradients come last.
  const bool in_place = params.grad_input == params.grad || params.grad_input == params.input;
  Params<T, W> first = params, last = params;
  if (in_place) first.grad_input = nullptr, last.statistics = nullptr;
  rows_kernel(first);
  const dim3 grid(static_cast<uint32_t>(div_ceil(params.width, int64_t{kColumns})), static_cast<uint32_t>(parts));
  LaunchKernel(grid, kColumns * kParts, stream)
      .enable_pdl()(column_sums_kernel<T, W, kCenters>, params, div_ceil(params.rows, parts));
  if (in_place) rows_kernel(last);
}

template <typename T, typename W, bool kCenters>
void backward(TensorView grad, TensorView input, TensorView weight, double eps, TensorView grad_input, TensorView grad_weight,
              const TensorView* grad_bias) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  SymbolicDevice symbol;
  Rows ys, xs, to;
  TensorMatcher({tokens, hidden}).with_rows(ys).with_dtype<T>().with_device(symbol).verify(grad);
  TensorMatcher({tokens, hidden}).with_rows(xs).with_dtype<T>().with_device(symbol).verify(input);
  TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(weight);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().with_device(symbol).verify(grad_input);
  TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(grad_weight);
  if (grad_bias != nullptr) TensorMatcher({hidden}).with_dtype<W>().with_device(symbol).verify(*grad_bias);
  const DLDevice device = symbol.unwrap();
  const int64_t rows = xs.count, width = xs.width;
  if (width == 0) return;
  if (rows <= 1) xs.stride = ys.stride = to.stride = 0;

  Params<T, W> params{};
  params.grad = static_cast<const T*>(grad.data_ptr());
  params.input = static_cast<const T*>(input.data_ptr());
  params.weight = static_cast<const W*>(weight.data_ptr());
  params.grad_input = static_cast<T*>(grad_input.data_ptr());
  params.grad_stride = ys.stride;
  params.input_stride = xs.stride;
  params.grad_input_stride = to.stride;
  params.rows = rows;
  params.width = width;
  params.inverse_width = 1.0f / static_cast<float>(width);
  params.eps = static_cast<float>(eps);

  constexpr uint32_t kVec = kWideBytes / sizeof(T);
  const bool wide = widest_vector<T, kWideBytes>(params.grad, params.input, params.weight, params.grad_input,
                                                 strides_of<T>(xs.stride, ys.stride, to.stride, width)) == kVec;
  const Spread spread = spread_rows(rows, width / kVec, wide, runtime::get_sm_count(device.device_id));
  Tensor sums = scratch(spread.parts * (kCenters ? 2 : 1) * width, device);
  params.sums = static_cast<float*>(sums.data_ptr());

  const cudaStream_t stream = LaunchKernel::resolve_device(device);
  if (rows > 0 && spread.holds) run_held<T, W, kCenters>(params, spread, stream);
  if (rows > 0 && !spread.holds) run_any<T, W, kCenters>(params, spread.parts, stream, device);
  LaunchKernel(div_ceil(width, int64_t{kColumns}), kColumns * kParts, stream)
      .enable_pdl()(finish_kernel<W, kCenters>, static_cast<const float*>(params.sums), spread.parts, width,
                    static_cast<W*>(grad_weight.data_ptr()),
                    static_cast<W*>(grad_bias != nullptr ? grad_bias->data_ptr() : nullptr));
}

}  // namespace

template <typename T, typename W>
void rmsnorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                      Output& grad_weight) {
  backward<T, W, false>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight), nullptr);
}

template <typename T, typename W>
void layernorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                        Output& grad_weight, Output& grad_bias) {
  const TensorView bias = grad_bias.empty_like(weight);
  backward<T, W, true>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight), &bias);
}

}  // namespace jitk

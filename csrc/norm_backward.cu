// Gradients of rmsnorm and layernorm: of the input, row by row, and of weight and bias, summed over all rows.
//
//   g = grad * weight,  n = (x - mean) * scale:     grad_input  = scale * (g - mean(g) - n * mean(g * n))
//                                                   grad_weight = sum(grad * n),  grad_bias = sum(grad)
//
// without the means of x and g for rmsnorm. One pass over memory: a block takes every so-manieth row, computes its statistics
// again, and keeps the sums over its rows in registers, a few columns to a thread; a second kernel adds the sums of all blocks in
// a fixed order. Rows that have no place for 16-byte vectors, or are too long for the sums to stay in registers, take three
// kernels, and are read again for the sums over rows.
#include <jitk/result.h>  // Output, Tensor, empty
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/cta.cuh>    // reduce_sum
#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>
#include <jitk/vec.cuh>  // AlignedVector, AlignedVectors

namespace jitk {
namespace {

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

// Whether a row is a warp's or a block's.
enum class Team : uint8_t { kWarp, kBlock };

template <Team kTeam>
JITK_DEVICE float2 sum_of_team(float2 value, float2 (&buffer)[device::cta::kMaxWarps]) {
  if constexpr (kTeam == Team::kWarp) return device::warp::reduce_sum(value);
  return device::cta::reduce_sum<device::cta::kBlockDim, device::cta::Buffer::kFresh>(value, buffer);
}

// each(body) calls body(x, g) for each element that the thread has of the row: x as stored, g = grad * weight. A buffer is used
// by every other row, so that one barrier is enough (cta.cuh).
template <bool kCenters, Team kTeam, typename Each>
JITK_DEVICE RowStatistics row_statistics(const Each& each, float inverse_width, float eps,
                                         float2 (&buffers)[2][device::cta::kMaxWarps]) {
  RowStatistics row{};
  float2 sums{0.0f, 0.0f};
  if constexpr (kCenters) {
    each([&](float x, float g) { sums = sums + float2{x, g}; });
    sums = sum_of_team<kTeam>(sums, buffers[0]);
    row.mean = sums.x * inverse_width;
    row.mean_g = sums.y * inverse_width;
    sums = {0.0f, 0.0f};
  }
  each([&](float x, float g) { sums = sums + float2{(x - row.mean) * (x - row.mean), g * (x - row.mean)}; });
  sums = sum_of_team<kTeam>(sums, buffers[1]);
  if (kCenters && !(sums.x < __builtin_inff())) sums.x = __builtin_nanf("");  // as in norm.cu
  row.scale = rsqrtf(sums.x * inverse_width + eps);
  row.slope = row.scale * row.scale * (sums.y * inverse_width);
  return row;
}

template <typename T, typename W, bool kCenters, Team kTeam, uint32_t kItems>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  constexpr uint32_t kVec = kWideBytes / sizeof(T);
  using Vector = AlignedVector<T, kVec>;
  extern __shared__ float warp_sums[];  // [warps, width], for rows that are a warp's
  __shared__ float2 buffers[2][2][cta::kMaxWarps];

  const uint32_t lanes = kTeam == Team::kWarp ? kWarpThreads : blockDim.x;
  const uint32_t lane = kTeam == Team::kWarp ? get_lane_id() : threadIdx.x;
  const uint32_t teams = kTeam == Team::kWarp ? blockDim.x / kWarpThreads : 1;
  const uint32_t team = kTeam == Team::kWarp ? threadIdx.x / kWarpThreads : 0;
  const uint32_t vectors = static_cast<uint32_t>(params.width / kVec);
  const int64_t step = int64_t{gridDim.x} * teams;
  int64_t row = int64_t{blockIdx.x} * teams + team;

  const L2Policy policy = L2Policy::evict_unchanged();

  PDLWaitPrimary<true>();
  Vector x[kItems], y[kItems], next_x[kItems], next_y[kItems];
  AlignedVectors<W, kVec, kWideBytes> weights[kItems];
  float sums_w[kItems][kVec] = {}, sums_b[kItems][kVec] = {};
  const auto load = [&](int64_t of, Vector(&x)[kItems], Vector(&y)[kItems]) {
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      const uint32_t at = i * lanes + lane;
      if (at < vectors) {
        x[i].load_streaming(params.input + of * params.input_stride, at, policy);
        y[i].load_streaming(params.grad + of * params.grad_stride, at, policy);
      }
    }
  };
  if (row < params.rows) load(row, x, y);
#pragma unroll
  for (uint32_t i = 0; i < kItems; ++i) {
    const uint32_t at = i * lanes + lane;
    if (at < vectors) weights[i].load(params.weight + at * kVec);
  }

  for (uint32_t turn = 0; row < params.rows; row += step, turn ^= 1) {
    if (row + step < params.rows) load(row + step, next_x, next_y);
    const auto each_vector = [&](const auto& body) {
#pragma unroll
      for (uint32_t i = 0; i < kItems; ++i) {
        const uint32_t at = i * lanes + lane;
        if (at < vectors) {
          float xs[kVec], ys[kVec], gs[kVec];
          to_floats(x[i], xs);
          to_floats(y[i], ys);
          weights[i].to_floats(gs);
#pragma unroll
          for (uint32_t e = 0; e < kVec; ++e) gs[e] = product(gs[e], ys[e]);
          body(i, at, xs, ys, gs);
        }
      }
    };
    const auto each = [&](const auto& body) {
      each_vector([&](uint32_t, uint32_t, const float (&xs)[kVec], const float (&)[kVec], const float (&gs)[kVec]) {
#pragma unroll
        for (uint32_t e = 0; e < kVec; ++e) body(xs[e], gs[e]);
      });
    };
    const RowStatistics of = row_statistics<kCenters, kTeam>(each, params.inverse_width, params.eps, buffers[turn]);
    each_vector([&](uint32_t i, uint32_t at, const float (&xs)[kVec], const float (&ys)[kVec], const float (&gs)[kVec]) {
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
      out.store(params.grad_input + row * params.grad_input_stride, at, policy);
    });
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      x[i] = next_x[i];
      y[i] = next_y[i];
    }
  }

  constexpr uint32_t kSums = kCenters ? 2 : 1;
  float* mine = params.sums + int64_t{blockIdx.x} * kSums * params.width;
  const auto write = [&](const float (&sums)[kItems][kVec], float* to) {
    float* place = kTeam == Team::kWarp ? warp_sums + team * params.width : to;
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      const uint32_t at = i * lanes + lane;
      if (at < vectors) {
#pragma unroll
        for (uint32_t e = 0; e < kVec; e += 4) {
          *reinterpret_cast<float4*>(place + at * kVec + e) = {sums[i][e], sums[i][e + 1], sums[i][e + 2], sums[i][e + 3]};
        }
      }
    }
    if constexpr (kTeam == Team::kWarp) {
      __syncthreads();
      for (uint32_t column = threadIdx.x; column < params.width; column += blockDim.x) {
        float sum = 0.0f;
        for (uint32_t i = 0; i < teams; ++i) sum += warp_sums[i * params.width + column];
        to[column] = sum;
      }
      __syncthreads();
    }
  };
  write(sums_w, mine);
  if constexpr (kCenters) write(sums_b, mine + params.width);
  PDLTriggerSecondary<true>();
}

// Rows of any length and place: the input's gradients and the rows' statistics, of which either may be null.
template <typename T, typename W, bool kCenters>
__global__ void __launch_bounds__(kMaxThreads) backward_rows_kernel(const __grid_constant__ Params<T, W> params) {
  using namespace device;
  __shared__ float2 buffers[2][cta::kMaxWarps];
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
  const RowStatistics of = row_statistics<kCenters, Team::kBlock>(each, params.inverse_width, params.eps, buffers);
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

inline uint64_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

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

  constexpr uint32_t kVec = kWideBytes / sizeof(T);
  constexpr int64_t kSums = kCenters ? 2 : 1;
  const int64_t sms = runtime::get_sm_count(device.device_id);
  Params<T, W> params{static_cast<const T*>(grad.data_ptr()),
                      static_cast<const T*>(input.data_ptr()),
                      static_cast<const W*>(weight.data_ptr()),
                      static_cast<T*>(grad_input.data_ptr()),
                      nullptr,
                      nullptr,
                      ys.stride,
                      xs.stride,
                      to.stride,
                      rows,
                      width,
                      1.0f / static_cast<float>(width),
                      static_cast<float>(eps)};
  const uint64_t places = address(params.grad) | address(params.input) | address(params.weight) | address(params.grad_input) |
                          sizeof(T) * static_cast<uint64_t>(xs.stride | ys.stride | to.stride | width);
  const int64_t vectors = width / kVec;
  const bool holds = places % kWideBytes == 0 && vectors <= 4 * kMaxThreads;
  const bool by_warps = vectors <= 2 * device::kWarpThreads;
  constexpr uint32_t kWarps = 8;

  // Blocks that stay, or chunks of rows: as many partial sums.
  int64_t parts = 0;
  uint32_t items = 1;
  uint32_t threads = kWarps * device::kWarpThreads;
  if (holds) {
    items = vectors > 2 * kMaxThreads ? 4 : vectors > (by_warps ? device::kWarpThreads : kMaxThreads) ? 2 : 1;
    if (!by_warps) threads = static_cast<uint32_t>(div_ceil(vectors, int64_t{32} * items)) * 32;
    parts = min(sms * (threads <= 256 ? 4 : items == 1 ? 2 : 1), by_warps ? div_ceil(rows, int64_t{kWarps}) : rows);
  } else {
    parts = min(div_ceil(rows, int64_t{128}), int64_t{256});
  }
  const auto scratch = [&](int64_t floats) {
    const int64_t sizes[1] = {floats};
    return empty({sizes, 1}, dtype_of<fp32_t>(), device);
  };
  Tensor sums = scratch(parts * kSums * width);
  params.sums = static_cast<float*>(sums.data_ptr());

  const cudaStream_t stream = LaunchKernel::resolve_device(device);
  if (rows > 0 && holds) {
    const auto kernel =
        by_warps
            ? (items == 1 ? backward_kernel<T, W, kCenters, Team::kWarp, 1> : backward_kernel<T, W, kCenters, Team::kWarp, 2>)
        : items == 1 ? backward_kernel<T, W, kCenters, Team::kBlock, 1>
        : items == 2 ? backward_kernel<T, W, kCenters, Team::kBlock, 2>
                     : backward_kernel<T, W, kCenters, Team::kBlock, 4>;
    const size_t shared = by_warps ? kWarps * static_cast<size_t>(width) * sizeof(float) : 0;
    LaunchKernel(parts, threads, stream, shared).enable_pdl()(kernel, params);
  } else if (rows > 0) {
    Tensor statistics = scratch(rows * 2);
    params.statistics = static_cast<float2*>(statistics.data_ptr());
    const uint32_t row_threads = width <= 1024 ? 128 : kMaxThreads;
    const auto rows_kernel = [&](const Params<T, W>& of) {
      LaunchKernel(rows, row_threads, stream).enable_pdl()(backward_rows_kernel<T, W, kCenters>, of);
    };
    // In the place of what the sums are made of, the gradients come last.
    const bool in_place = params.grad_input == params.grad || params.grad_input == params.input;
    Params<T, W> first = params, last = params;
    if (in_place) first.grad_input = nullptr, last.statistics = nullptr;
    rows_kernel(first);
    const dim3 grid(static_cast<uint32_t>(div_ceil(width, int64_t{kColumns})), static_cast<uint32_t>(parts));
    LaunchKernel(grid, kColumns * kParts, stream)
        .enable_pdl()(column_sums_kernel<T, W, kCenters>, params, div_ceil(rows, parts));
    if (in_place) rows_kernel(last);
  }
  LaunchKernel(div_ceil(width, int64_t{kColumns}), kColumns * kParts, stream)
      .enable_pdl()(finish_kernel<W, kCenters>, static_cast<const float*>(params.sums), parts, width,
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

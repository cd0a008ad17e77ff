// Activations in one pass over memory: each element is read once and written once, whatever is computed in between.
//
// A gated activation is a function of two tensors that happen to lie side by side: gate and up are the halves of a row. So one
// kernel serves every op here: out[r][c] = op(a[r][c], b[r][c]), with a stride between rows for each. It is bound by memory: what
// matters is 16-byte accesses, enough of them in flight, and that the launch overlaps the end of the kernel before it (PDL).
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <jitk/dtype.cuh>  // cast
#include <jitk/launch.cuh>
#include <jitk/math.cuh>
#include <jitk/overlap.cuh>  // Trigger
#include <jitk/vec.cuh>      // AlignedVector, to_floats, widest_vector

#include <jitk/fast_divisor.h>

namespace jitk {
namespace {

// 32-bit indices within a launch: a larger tensor takes several.
constexpr int64_t kMaxItems = int64_t{1} << 30;

// Half types are rounded to 8 or 11 bits in the end, so the hardware's exponential and reciprocal do: the largest error of an
// op against float64 stays that of PyTorch's own op in the same type (test_ops.py compares them). fp32 takes the accurate
// functions.
template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

// x * Phi(x), Phi being the normal distribution's cumulative function.
template <typename T>
JITK_DEVICE float times_normal_cdf(float x) {
  if constexpr (kIsHalf<T>) {
    // Phi(-|x|) = exp(-x^2 / 2) p(t), t = 1 / (1 + 0.38 |x|), relative error below 3.6e-5 down to -14, where it leaves the
    // range of a float. erff would make the kernel compute-bound.
    const float t = device::math::reciprocal_fast(fmaf(0.38f, fabsf(x), 1.0f));
    float p = fmaf(t, -0.089929727f, 0.188878994f);
    p = fmaf(t, p, 0.091978476f);
    p = fmaf(t, p, 0.157829516f);
    p = fmaf(t, p, 0.151225193f);
    const float tail = device::math::exp2_fast(x * x * (-0.5f * device::math::log2e)) * (t * p);
    return x * (x > 0.0f ? 1.0f - tail : tail);
  }
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f));
}

struct SiluAndMul {
  static constexpr bool kBinary = true;
  template <typename T>
  JITK_DEVICE static float apply(float gate, float up) {
    if constexpr (kIsHalf<T>) return gate * device::math::sigmoid_fast(gate) * up;
    return gate / (1.0f + expf(-gate)) * up;
  }
};

struct GeluAndMul {
  static constexpr bool kBinary = true;
  template <typename T>
  JITK_DEVICE static float apply(float gate, float up) {
    return times_normal_cdf<T>(gate) * up;
  }
};

struct GeluTanhAndMul {
  static constexpr bool kBinary = true;
  template <typename T>
  JITK_DEVICE static float apply(float gate, float up) {
    // 0.5 (1 + tanh(u)) is sigmoid(2 u), which costs less and does not cancel where tanh(u) is near -1.
    constexpr float kTwoSqrt2OverPi = 1.59576912160573071176f;
    if constexpr (kIsHalf<T>) {
      constexpr float kLinear = kTwoSqrt2OverPi * device::math::log2e;
      return gate * device::math::logistic2_fast(gate * (kLinear + 0.044715f * kLinear * gate * gate)) * up;
    }
    const float minus_2u = -kTwoSqrt2OverPi * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + expf(minus_2u)) * up;
  }
};

struct Relu2 {
  static constexpr bool kBinary = false;
  template <typename T>
  JITK_DEVICE static float apply(float x, float) {
    const float positive = x < 0.0f ? 0.0f : x;  // a NaN stays one, as in PyTorch
    return positive * positive;
  }
};

struct AddRelu {
  static constexpr bool kBinary = true;
  template <typename T>
  JITK_DEVICE static float apply(float x, float y) {
    const float sum = x + y;
    return sum < 0.0f ? 0.0f : sum;
  }
};

constexpr uint32_t kMaxThreads = 256;

// Strides between rows count vectors, and no offset within a launch passes 32 bits: at sizes that just fill the GPU the kernel
// waits for its own address arithmetic.
struct Params {
  const void* a;
  const void* b;
  void* out;
  uint32_t a_stride;
  uint32_t b_stride;
  uint32_t out_stride;
  FastDivisor vectors_per_row;
  uint32_t vectors;
  uint32_t tail;  // elements behind the last vector; only a single row has them
  Trigger trigger;
};

template <typename T, typename Op, uint32_t kVec>
__global__ void __launch_bounds__(kMaxThreads) rows_kernel(const __grid_constant__ Params params) {
  using namespace device;
  using Vector = AlignedVector<T, kVec>;
  wait_and_trigger<false>(params.trigger);

  const uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item < params.vectors) {
    const auto at = params.vectors_per_row.divide(item);
    const uint32_t row = at.quotient;
    const uint32_t column = at.remainder;
    Vector x, y, result;
    x.load(params.a, row * params.a_stride + column);
    if constexpr (Op::kBinary) y.load(params.b, row * params.b_stride + column);
    float xs[kVec], ys[kVec] = {};
    to_floats(x, xs);
    if constexpr (Op::kBinary) to_floats(y, ys);
#pragma unroll
    for (uint32_t i = 0; i < kVec; ++i) xs[i] = Op::template apply<T>(xs[i], ys[i]);
    from_floats(xs, result);
    result.store(params.out, row * params.out_stride + column);
  } else if (item - params.vectors < params.tail) {
    const uint32_t i = params.vectors * kVec + (item - params.vectors);
    const T* a = static_cast<const T*>(params.a);
    const T* b = static_cast<const T*>(params.b);
    T* out = static_cast<T*>(params.out);
    out[i] = cast<T>(Op::template apply<T>(cast<fp32_t>(a[i]), Op::kBinary ? cast<fp32_t>(b[i]) : 0.0f));
  }
  PDLTriggerSecondary<true>();
}

// Rows at a place in memory; `stride` counts elements.
struct Span {
  void* data;
  int64_t stride;

  template <typename T>
  void* at(int64_t row, int64_t column) const {
    return static_cast<T*>(data) + row * stride + column;
  }
};

// out = op(a, b) over rows of `width` elements of T, with the widest access that every row of every tensor allows.
template <typename T, typename Op>
void run(Span a, Span b, Span out, int64_t rows, int64_t width, DLDevice device) {
  using namespace host;
  if (rows == 0 || width == 0) return;
  if (rows == 1) a.stride = b.stride = out.stride = 0;
  constexpr uint32_t kWide = device::kMaxVecBytes / sizeof(T);
  constexpr uint32_t kPair = 4 / sizeof(T);
  const uint32_t vec =
      widest_vector<T>(a.data, b.data, out.data, strides_of<T>(a.stride, b.stride, out.stride, rows == 1 ? 0 : width));
  const auto kernel = vec == kWide   ? rows_kernel<T, Op, kWide>
                      : vec == kPair ? rows_kernel<T, Op, kPair>
                                     : rows_kernel<T, Op, 1>;
  const int32_t shift = __builtin_ctz(vec);  // a launch takes 3 us, and a 64-bit division 1 percent of that

  const cudaStream_t stream = LaunchKernel::resolve_device(device);
  const int64_t sms = runtime::get_sm_count(device.device_id);
  const int64_t columns_per_launch = kMaxItems << shift;
  const int64_t longest = max(max(a.stride, b.stride), max(out.stride, min(width, columns_per_launch))) >> shift;
  const int64_t rows_per_launch = rows * longest <= kMaxItems ? rows : max(kMaxItems / longest, int64_t{1});
  for (int64_t column = 0; column < width; column += columns_per_launch) {
    const int64_t columns = min(width - column, columns_per_launch);
    for (int64_t row = 0; row < rows; row += rows_per_launch) {
      const int64_t vectors = min(rows - row, rows_per_launch) * (columns >> shift);
      const int64_t tail = columns - (columns >> shift << shift);
      // One vector a thread: two were slower at every size. A few vectors finish sooner in small blocks, spread over the SMs.
      const bool small = vectors + tail <= sms * 128;
      const Params params{a.at<T>(row, column),
                          b.at<T>(row, column),
                          out.at<T>(row, column),
                          static_cast<uint32_t>(a.stride >> shift),
                          static_cast<uint32_t>(b.stride >> shift),
                          static_cast<uint32_t>(out.stride >> shift),
                          FastDivisor(static_cast<uint64_t>(columns >> shift)),
                          static_cast<uint32_t>(vectors),
                          static_cast<uint32_t>(tail),
                          choose_trigger(vectors + tail, sms)};
      const uint32_t threads = small ? kMaxThreads / 2 : kMaxThreads;
      LaunchKernel(div_ceil(static_cast<uint32_t>(vectors + tail), threads), threads, stream).enable_pdl()(kernel, params);
    }
  }
}

template <typename T, typename Op>
void gated(TensorView input, Output& out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize d{"d"};
  SymbolicDevice device;
  Rows in, to;
  TensorMatcher({tokens, 2 * d}).with_rows(in).with_dtype<T>().with_device(device).verify(input);
  Shape shape(input.shape());
  shape[-1] = d.unwrap();
  const TensorView result = out.empty(shape, input.dtype(), input.device());
  TensorMatcher({tokens, d}).with_rows(to).with_dtype<T>().with_device(device).verify(result);
  if (to.empty()) return;

  const Span gate{input.data_ptr(), in.stride};
  const Span up{gate.at<T>(0, d.unwrap()), in.stride};
  run<T, Op>(gate, up, {result.data_ptr(), to.stride}, to.count, to.width, device.unwrap());
}

template <typename T, typename Op>
void pointwise(TensorView x, TensorView y, Output& out) {
  using namespace host;
  SymbolicDims shape{"shape"};
  SymbolicDevice device;
  Rows xs, ys, to;
  TensorMatcher({shape}).with_rows(xs).with_dtype<T>().with_device(device).verify(x);
  TensorMatcher({shape}).with_rows(ys).with_dtype<T>().with_device(device).verify(y);
  const TensorView result = out.empty_like(x);
  TensorMatcher({shape}).with_rows(to).with_dtype<T>().with_device(device).verify(result);
  if (xs.dense() && ys.dense() && to.dense()) xs = xs.flat(), ys = ys.flat(), to = to.flat();

  run<T, Op>({x.data_ptr(), xs.stride}, {y.data_ptr(), ys.stride}, {result.data_ptr(), to.stride}, to.count, to.width,
             device.unwrap());
}

}  // namespace

// The ops, as ops/activation.py names them.

template <typename T>
void silu_and_mul(TensorView input, Output& out) {
  gated<T, SiluAndMul>(input, out);
}

template <typename T>
void gelu_and_mul(TensorView input, Output& out) {
  gated<T, GeluAndMul>(input, out);
}

template <typename T>
void gelu_tanh_and_mul(TensorView input, Output& out) {
  gated<T, GeluTanhAndMul>(input, out);
}

template <typename T>
void silu_mul(TensorView gate, TensorView up, Output& out) {
  pointwise<T, SiluAndMul>(gate, up, out);
}

template <typename T>
void gelu_mul(TensorView gate, TensorView up, Output& out) {
  pointwise<T, GeluAndMul>(gate, up, out);
}

template <typename T>
void gelu_tanh_mul(TensorView gate, TensorView up, Output& out) {
  pointwise<T, GeluTanhAndMul>(gate, up, out);
}

template <typename T>
void relu2(TensorView input, Output& out) {
  pointwise<T, Relu2>(input, input, out);
}

template <typename T>
void fused_add_relu(TensorView x, TensorView y, Output& out) {
  pointwise<T, AddRelu>(x, y, out);
}

}  // namespace jitk

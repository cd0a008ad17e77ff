// Activations in one pass over memory: each element is read once and written once, whatever is computed in between.
//
// As in activation.cu, one function serves every op: out[r][c] = op(a[r][c], b[r][c]), with a stride between rows for each;
// gate and up are the halves of a row. The arithmetic is fp32 and rounds to T once. Infinities and NaN come out as they do from
// PyTorch in float64, silu(-inf) = NaN included.
#include <jitk/result.h>  // Output, parallel_for
#include <jitk/rows.h>    // Rows, TensorMatcher
#include <jitk/simd.h>    // Floats, transform

namespace jitk {
namespace {

using host::simd::Floats;

// kGrain: elements for each thread, at least. One that is awake starts in 1 us, in which an exponential is computed for 2000
// elements and a relu for 10000 (Zen 4, November 2026).

struct SiluAndMul {
  static constexpr int64_t kGrain = 4096;
  Floats operator()(Floats gate, Floats up) const { return gate / (1.0f + host::simd::exp(-gate)) * up; }
};

struct GeluAndMul {
  static constexpr int64_t kGrain = 4096;
  Floats operator()(Floats gate, Floats up) const { return gate * host::simd::gaussian_cdf(gate) * up; }
};

struct GeluTanhAndMul {
  static constexpr int64_t kGrain = 4096;
  Floats operator()(Floats gate, Floats up) const {
    // 0.5 (1 + tanh(u)) is sigmoid(2 u), which costs less and does not cancel where tanh(u) is near -1.
    constexpr float kTwoSqrt2OverPi = 1.59576912160573071176f;
    const Floats minus_2u = gate * (-kTwoSqrt2OverPi - 0.044715f * kTwoSqrt2OverPi * gate * gate);
    return gate / (1.0f + host::simd::exp(minus_2u)) * up;
  }
};

struct Relu2 {
  static constexpr int64_t kGrain = 32768;
  Floats operator()(Floats x, Floats) const {
    const Floats positive = host::simd::at_least(x, 0.0f);
    return positive * positive;
  }
};

struct AddRelu {
  static constexpr int64_t kGrain = 32768;
  Floats operator()(Floats x, Floats y) const { return host::simd::at_least(x + y, 0.0f); }
};

// A row is cut into pieces, so that a single wide one keeps all threads busy.
constexpr int64_t kPiece = 1024;

// Rows of T at a place in memory.
template <typename T>
struct Span {
  T* data;
  int64_t stride;
};

template <typename T, typename Op>
void run(Span<const T> a, Span<const T> b, Span<T> out, int64_t rows, int64_t width) {
  if (rows == 0 || width == 0) return;
  const int64_t pieces = host::div_ceil(width, kPiece);
  const int64_t grain = host::div_ceil(Op::kGrain, width < kPiece ? width : kPiece);
  host::parallel_for(rows * pieces, grain, [=](int64_t begin, int64_t end) {
    int64_t row = begin / pieces;
    int64_t column = begin % pieces * kPiece;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = width - column < kPiece ? width - column : kPiece;
      host::simd::transform(count, out.data + row * out.stride + column, Op{}, a.data + row * a.stride + column,
                            b.data + row * b.stride + column);
      column += kPiece;
      if (column >= width) column = 0, ++row;
    }
  });
}

template <typename T, typename Op>
void gated(TensorView input, Output& out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize d{"d"};
  Rows in, to;
  TensorMatcher({tokens, 2 * d}).with_rows(in).with_dtype<T>().verify(input);
  Shape shape(input.shape());
  shape[-1] = d.unwrap();
  const TensorView result = out.empty(shape, input.dtype(), input.device());
  TensorMatcher({tokens, d}).with_rows(to).with_dtype<T>().verify(result);
  if (to.empty()) return;

  const T* gate = static_cast<const T*>(input.data_ptr());
  run<T, Op>({gate, in.stride}, {gate + d.unwrap(), in.stride}, {static_cast<T*>(result.data_ptr()), to.stride}, to.count,
             to.width);
}

template <typename T, typename Op>
void pointwise(TensorView x, TensorView y, Output& out) {
  using namespace host;
  SymbolicDims shape{"shape"};
  Rows xs, ys, to;
  TensorMatcher({shape}).with_rows(xs).with_dtype<T>().verify(x);
  TensorMatcher({shape}).with_rows(ys).with_dtype<T>().verify(y);
  const TensorView result = out.empty_like(x);
  TensorMatcher({shape}).with_rows(to).with_dtype<T>().verify(result);
  if (xs.dense() && ys.dense() && to.dense()) xs = xs.flat(), ys = ys.flat(), to = to.flat();

  run<T, Op>({static_cast<const T*>(x.data_ptr()), xs.stride}, {static_cast<const T*>(y.data_ptr()), ys.stride},
             {static_cast<T*>(result.data_ptr()), to.stride}, to.count, to.width);
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

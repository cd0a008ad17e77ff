// Normalisation of rows. A row stays in the cache between the passes that find its statistics and the one that writes it.
//
// Statistics and arithmetic are fp32, and a result is rounded once. A row is the work of one thread, also a single long one: to
// share it, threads would have to wait for each other's sums. All sums are added in an order that the shapes alone decide, so
// the number of threads changes no bit.
#include <jitk/result.h>  // Output, empty, parallel_for
#include <jitk/rows.h>    // Rows, TensorMatcher
#include <jitk/simd.h>    // Floats, sum, transform

#include <cstring>   // memset
#include <optional>  // a bias

namespace jitk {
namespace {

using host::Rows;
using host::simd::Floats;

// Elements for each thread, at least. One that is awake starts in 1 us, in which 8000 that are in the cache are normalised.
constexpr int64_t kGrain = 16384;

int64_t grain_of(int64_t width) { return host::div_ceil(kGrain, width > 0 ? width : 1); }

template <typename T>
T* row_of(TensorView view, const Rows& rows, int64_t row) {
  return static_cast<T*>(view.data_ptr()) + row * rows.stride;
}

// --- statistics of a row --------------------------------------------------------------------------

inline float inverse_root(float mean_square, double eps) {
  return 1.0f / __builtin_sqrtf(mean_square + static_cast<float>(eps));
}

struct RootMeanSquare {
  static constexpr bool kCentred = false;
  float scale;

  template <typename T>
  RootMeanSquare(const T* row, int64_t width, double eps) {
    const float square = host::simd::sum(width, [](Floats x) { return x * x; }, row);
    scale = inverse_root(square / static_cast<float>(width), eps);
  }
  Floats normal(Floats x) const { return x * scale; }
};

// The mean is kept in two parts. One float cannot hold enough of a mean that is large against the deviation: 1000 is good to
// 6e-5, which would be an error of every x - mean.
struct MeanAndVariance {
  static constexpr bool kCentred = true;
  float about;  // the mean
  float rest;   // of the mean
  float scale;

  template <typename T>
  MeanAndVariance(const T* row, int64_t width, double eps) {
    const float count = static_cast<float>(width);
    about = host::simd::sum(width, [](Floats x) { return x; }, row) / count;
    rest = host::simd::sum(width, [this](Floats x) { return x - about; }, row) / count;
    const float square = host::simd::sum(width, [this](Floats x) { return centred(x) * centred(x); }, row);
    // A sum of squares that overflows tells nothing of the deviation. NaN, as in PyTorch: infinity would make the norm zero.
    scale = square < __builtin_inff() ? inverse_root(square / count, eps) : __builtin_nanf("");
  }
  Floats centred(Floats x) const { return x - about - rest; }
  Floats normal(Floats x) const { return centred(x) * scale; }
};

// --- forward --------------------------------------------------------------------------------------

// What a stored weight means.
struct Itself {
  Floats operator()(Floats weight) const { return weight; }
};
struct PlusOne {
  Floats operator()(Floats weight) const { return weight + 1.0f; }
};

template <typename Statistics, typename Meaning, typename T, typename W>
void normalize(T* out, const T* in, const W* weight, const W* bias, int64_t width, double eps) {
  const Statistics row(in, width, eps);
  if (bias == nullptr) {
    const auto scaled = [=](Floats x, Floats w) { return row.normal(x) * Meaning{}(w); };
    host::simd::transform(width, out, scaled, in, weight);
  } else {
    const auto shifted = [=](Floats x, Floats w, Floats b) { return row.normal(x) * Meaning{}(w) + b; };
    host::simd::transform(width, out, shifted, in, weight, bias);
  }
}

template <typename Statistics, typename Meaning, typename T, typename W>
void forward(TensorView input, TensorView weight, std::optional<TensorView> bias, double eps, TensorView out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows in, to;
  TensorMatcher({tokens, hidden}).with_rows(in).with_dtype<T>().verify(input);
  TensorMatcher({hidden}).with_dtype<W>().verify(weight);
  if (bias) TensorMatcher({hidden}).with_dtype<W>().verify(*bias);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().verify(out);

  const W* weights = static_cast<const W*>(weight.data_ptr());
  const W* biases = bias ? static_cast<const W*>(bias->data_ptr()) : nullptr;
  parallel_for(in.count, grain_of(in.width), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      normalize<Statistics, Meaning>(row_of<T>(out, to, i), row_of<const T>(input, in, i), weights, biases, in.width, eps);
  });
}

template <typename Meaning, typename T, typename W>
void add_and_normalize(TensorView input, TensorView residual, TensorView weight, double eps) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows in, sums;
  TensorMatcher({tokens, hidden}).with_rows(in).with_dtype<T>().verify(input);
  TensorMatcher({tokens, hidden}).with_rows(sums).with_dtype<T>().verify(residual);
  TensorMatcher({hidden}).with_dtype<W>().verify(weight);

  const W* weights = static_cast<const W*>(weight.data_ptr());
  parallel_for(in.count, grain_of(in.width), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* const x = row_of<T>(input, in, i);
      T* const sum = row_of<T>(residual, sums, i);
      simd::transform(in.width, sum, [](Floats a, Floats b) { return a + b; }, sum, x);
      normalize<RootMeanSquare, Meaning, T, W>(x, sum, weights, nullptr, in.width, eps);
    }
  });
}

// --- queries and keys -----------------------------------------------------------------------------

template <typename T, typename W>
struct Heads {
  T* data;
  int64_t count;  // of each token
  int64_t token_stride;
  int64_t head_stride;
  const W* weight;

  Heads(TensorView heads, TensorView weight)
      : data(static_cast<T*>(heads.data_ptr())),
        count(heads.size(1)),
        token_stride(heads.stride(0)),
        head_stride(heads.stride(1)),
        weight(static_cast<const W*>(weight.data_ptr())) {}

  T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// --- gradients ------------------------------------------------------------------------------------

// The sum over all rows of each column is made of sums over chunks of consecutive rows, which threads add up independently.
struct Chunks {
  int64_t count;
  int64_t length;

  // As many chunks as rows in each make for the fewest additions one after the other, so for the smallest error. But no fewer
  // than a large machine has threads, as far as there are rows.
  explicit Chunks(int64_t rows) {
    constexpr int64_t kThreads = 64;
    const int64_t root = static_cast<int64_t>(__builtin_sqrt(static_cast<double>(rows)));
    length = host::div_ceil(rows > 0 ? rows : 1, root > kThreads ? root : kThreads);
    count = host::div_ceil(rows, length);
  }
};

// out[c] = the sum of the chunks' [c]. In pairs, pairs of pairs and so on, so that errors grow with the logarithm of their number.
// Overwrites the chunks.
template <typename W>
void add_up(float* sums, int64_t chunks, int64_t stride, int64_t width, W* out) {
  using namespace host;
  constexpr int64_t kPiece = 1024;
  const int64_t grain = div_ceil(kGrain, kPiece * (chunks > 0 ? chunks : 1));
  parallel_for(div_ceil(width, kPiece), grain, [=](int64_t begin, int64_t end) {
    for (int64_t column = begin * kPiece; column < width && column < end * kPiece; column += kPiece) {
      const int64_t count = width - column < kPiece ? width - column : kPiece;
      for (int64_t step = 1; step < chunks; step *= 2) {
        for (int64_t chunk = 0; chunk + step < chunks; chunk += 2 * step) {
          float* const sum = sums + chunk * stride + column;
          simd::transform(count, sum, [](Floats a, Floats b) { return a + b; }, sum, sum + step * stride);
        }
      }
      if (chunks > 0) {
        simd::transform(count, out + column, [](Floats x) { return x; }, sums + column);
      } else {
        std::memset(out + column, 0, count * sizeof(W));  // no rows
      }
    }
  });
}

template <typename Statistics, typename T, typename W>
void backward(TensorView grad, TensorView input, TensorView weight, double eps, TensorView grad_input, TensorView grad_weight,
              std::optional<TensorView> grad_bias = {}) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows grads, in, to;
  TensorMatcher({tokens, hidden}).with_rows(grads).with_dtype<T>().verify(grad);
  TensorMatcher({tokens, hidden}).with_rows(in).with_dtype<T>().verify(input);
  TensorMatcher({hidden}).with_dtype<W>().verify(weight);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().verify(grad_input);
  TensorMatcher({hidden}).with_dtype<W>().verify(grad_weight);
  if (grad_bias) TensorMatcher({hidden}).with_dtype<W>().verify(*grad_bias);

  const int64_t width = in.width;
  if (width == 0) return;
  const float inverse_count = 1.0f / static_cast<float>(width);
  const W* w_row = static_cast<const W*>(weight.data_ptr());
  const Chunks chunks(in.count);
  const int64_t sizes[] = {chunks.count, Statistics::kCentred ? 2 : 1, width};
  const int64_t stride = sizes[1] * width;
  const Tensor scratch = empty({sizes, 3}, dtype_of<float>(), input.device(), "sums");
  float* const sums = static_cast<float*>(scratch.data_ptr());

  parallel_for(chunks.count, div_ceil(grain_of(width), chunks.length), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const weight_sums = sums + chunk * stride;
      float* const bias_sums = weight_sums + width;
      std::memset(weight_sums, 0, stride * sizeof(float));
      const int64_t last = (chunk + 1) * chunks.length;
      for (int64_t i = chunk * chunks.length; i < last && i < in.count; ++i) {
        const T* const x_row = row_of<const T>(input, in, i);
        const T* const g_row = row_of<const T>(grad, grads, i);
        const Statistics row(x_row, width, eps);
        const auto add = [=](Floats sum, Floats g, Floats x) { return sum + g * row.normal(x); };
        simd::transform(width, weight_sums, add, weight_sums, g_row, x_row);
        const auto product = [=](Floats g, Floats x, Floats w) { return g * w * row.normal(x); };
        const float slope = simd::sum(width, product, g_row, x_row, w_row) * inverse_count;
        float mean = 0.0f;
        if constexpr (Statistics::kCentred) {
          simd::transform(width, bias_sums, [](Floats sum, Floats g) { return sum + g; }, bias_sums, g_row);
          mean = simd::sum(width, [](Floats g, Floats w) { return simd::rounded(g * w); }, g_row, w_row) * inverse_count;
        }
        // The products are those whose mean was taken, to the bit: where all are equal, what is left must be 0, as the scale of
        // such a row makes any rest large.
        const auto back = [=](Floats g, Floats x, Floats w) {
          return row.scale * (simd::rounded(g * w) - mean - row.normal(x) * slope);
        };
        simd::transform(width, row_of<T>(grad_input, to, i), back, g_row, x_row, w_row);
      }
    }
  });
  add_up(sums, chunks.count, stride, width, static_cast<W*>(grad_weight.data_ptr()));
  float* const bias_sums = chunks.count > 0 ? sums + width : nullptr;  // no rows, no memory
  if (grad_bias) add_up(bias_sums, chunks.count, stride, width, static_cast<W*>(grad_bias->data_ptr()));
}

}  // namespace

// The ops, as ops/norm.py names them.

template <typename T, typename W>
void rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  forward<RootMeanSquare, Itself, T, W>(input, weight, {}, eps, out.empty_like(input));
}

template <typename T, typename W>
void gemma_rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  forward<RootMeanSquare, PlusOne, T, W>(input, weight, {}, eps, out.empty_like(input));
}

template <typename T, typename W>
void layernorm(TensorView input, TensorView weight, std::optional<TensorView> bias, double eps, Output& out) {
  forward<MeanAndVariance, Itself, T, W>(input, weight, bias, eps, out.empty_like(input));
}

template <typename T, typename W>
void fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  add_and_normalize<Itself, T, W>(input, residual, weight, eps);
}

template <typename T, typename W>
void gemma_fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  add_and_normalize<PlusOne, T, W>(input, residual, weight, eps);
}

template <typename T, typename W>
void fused_qknorm(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight, double eps) {
  using namespace host;
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, head_dim{"head_dim"};
  TensorMatcher({tokens, q_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().verify(q);
  TensorMatcher({tokens, k_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().verify(k);
  TensorMatcher({head_dim}).with_dtype<W>().verify(q_weight).verify(k_weight);

  const Heads<T, W> queries(q, q_weight), keys(k, k_weight);
  const int64_t width = head_dim.unwrap();
  if (width == 0) return;
  const int64_t heads = queries.count + keys.count;
  parallel_for(tokens.unwrap() * heads, grain_of(width), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / heads;
      const int64_t head = i % heads;
      const bool is_query = head < queries.count;
      T* const row = is_query ? queries.at(token, head) : keys.at(token, head - queries.count);
      const W* const weight = is_query ? queries.weight : keys.weight;
      normalize<RootMeanSquare, Itself, T, W>(row, row, weight, nullptr, width, eps);
    }
  });
}

template <typename T, typename W>
void rmsnorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                      Output& grad_weight) {
  backward<RootMeanSquare, T, W>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight));
}

template <typename T, typename W>
void layernorm_backward(TensorView grad, TensorView input, TensorView weight, double eps, Output& grad_input,
                        Output& grad_weight, Output& grad_bias) {
  backward<MeanAndVariance, T, W>(grad, input, weight, eps, grad_input.empty_like(input), grad_weight.empty_like(weight),
                                  grad_bias.empty_like(weight));
}

}  // namespace jitk

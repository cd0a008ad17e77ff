// Rotary position embedding on the CPU: a token's angles are prepared once, in fp32, and then all of its heads turn.
#include "rope_arguments.h"

#include <jitk/cache_dtype.h>  // scale_of, only_fp8_has
#include <jitk/index.h>        // check_indices
#include <jitk/result.h>       // Output, parallel_for
#include <jitk/simd.h>         // Floats, sum, transform

#include <cstring>      // memcpy
#include <optional>     // sections, scales
#include <type_traits>  // is_same

namespace jitk {
namespace {

using namespace rotary;
using host::simd::Floats;
using host::simd::rounded;

// Elements for each thread, at least.
constexpr int64_t kGrain = 16384;
// Pairs whose angles are in the cache at a time. Heads with more are turned part by part.
constexpr int64_t kPart = 256;

// An element is x * cos + partner * sin. Of a part of `count` pairs: neox has the firsts of the pairs and then the seconds,
// neighbours are in the order of a head.
struct Angles {
  float cos[2 * kPart];
  float sin[2 * kPart];  // negative for the first of a pair
};

Floats itself(Floats x) { return x; }

void to_floats(Kind kind, const void* from, int64_t offset, int64_t count, float* to) {
  using host::simd::transform;
  if (kind == Kind::kFp32) transform(count, to, itself, static_cast<const fp32_t*>(from) + offset);
  if (kind == Kind::kFp16) transform(count, to, itself, static_cast<const fp16_t*>(from) + offset);
  if (kind == Kind::kBf16) transform(count, to, itself, static_cast<const bf16_t*>(from) + offset);
}

// --- angles ---------------------------------------------------------------------------------------

struct OfPositions {
  PositionRows rows;
  bool is_neox;

  int64_t pairs() const { return rows.pairs; }

  int64_t position(int64_t axis, int64_t token) const {
    const int64_t at = axis * rows.axis_stride + token * rows.position_stride;
    return rows.is_wide ? static_cast<const int64_t*>(rows.positions)[at] : static_cast<const int32_t*>(rows.positions)[at];
  }
  // The position that a pair goes by, and in `end` where others begin to.
  int64_t axis_of(int64_t pair, int64_t* end) const {
    *end = pair + 1;
    if (rows.sections == Sections::kInTurns) {
      const int64_t turn = pair % 3;
      return (turn == 1 && pair < rows.height) || (turn == 2 && pair < rows.width) ? turn : 0;
    }
    const int64_t axis = pair < rows.height ? 0 : pair < rows.width ? 1 : 2;
    *end = axis == 0 ? rows.height : axis == 1 ? rows.width : rows.pairs;
    return axis;
  }

  void prepare(int64_t, int64_t token, int64_t begin, int64_t count, Angles& to) const {
    float cos[kPart], sin[kPart];
    for (int64_t pair = begin, end; pair < begin + count; pair = end) {
      const int64_t axis = axis_of(pair, &end);
      if (end > begin + count) end = begin + count;
      const int64_t row = position(axis, token) * rows.row_stride;
      to_floats(rows.kind, rows.cache, row + pair, end - pair, cos + pair - begin);
      to_floats(rows.kind, rows.cache, row + rows.pairs + pair, end - pair, sin + pair - begin);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = is_neox ? i : 2 * i, second = is_neox ? count + i : 2 * i + 1;
      to.cos[first] = to.cos[second] = cos[i];
      to.sin[first] = -sin[i];
      to.sin[second] = sin[i];
    }
  }
};

struct OfTokens {
  TokenRows rows;
  bool is_neox;
  bool is_adjoint;

  int64_t pairs() const { return rows.rope_dim / 2; }

  void prepare(int64_t batch, int64_t token, int64_t begin, int64_t count, Angles& to) const {
    const auto load = [=](const void* from, int64_t row, float* values) {
      to_floats(rows.kind, from, row + (is_neox ? begin : 2 * begin), is_neox ? count : 2 * count, values);
      if (is_neox) to_floats(rows.kind, from, row + pairs() + begin, count, values + count);
    };
    load(rows.cos, batch * rows.cos_batch_stride + token * rows.cos_token_stride, to.cos);
    load(rows.sin, batch * rows.sin_batch_stride + token * rows.sin_token_stride, to.sin);
    for (int64_t i = 0; i < count; ++i) {
      float& first = to.sin[is_neox ? i : 2 * i];
      float& second = to.sin[is_neox ? count + i : 2 * i + 1];
      if (!is_adjoint) {
        first = -first;
      } else {  // what turned the one by the other goes back
        const float before = first;
        first = second;
        second = -before;
      }
    }
  }
};

// --- heads ----------------------------------------------------------------------------------------

// What a head is multiplied by before it turns: nothing, or its norm.
struct Scale {
  bool is_norm;
  float scale;
  const void* weight;
  Kind kind;
  float one_plus;

  // Elements [begin, begin + count) of the head, scaled.
  template <typename T>
  void load(const T* head, int64_t begin, int64_t count, float* to) const {
    using host::simd::transform;
    if (!is_norm) {
      transform(count, to, itself, head + begin);
      return;
    }
    for (int64_t done = 0; done < count; done += kPart) {
      float weights[kPart];
      const int64_t some = count - done < kPart ? count - done : kPart;
      to_floats(kind, weight, begin + done, some, weights);
      const auto normed = [=](Floats x, Floats w) { return x * scale * (w + one_plus); };
      transform(some, to + done, normed, head + begin + done, static_cast<const float*>(weights));
    }
  }
};

// Turns a part of a head. Both products are rounded, as in PyTorch: an FMA would leave the rest of one where they cancel.
template <typename T>
void turn(const T* from, T* to, const Scale& scale, const Angles& angles, bool is_neox, int64_t pairs, int64_t begin,
          int64_t count) {
  using host::simd::transform;
  const auto turned = [](Floats x, Floats partner, Floats cos, Floats sin) {
    return rounded(x * cos) + rounded(partner * sin);
  };
  float x[2 * kPart], partner[2 * kPart];
  const float *const cos = angles.cos, *const sin = angles.sin;
  const float *const first = x, *const second = is_neox ? x + count : partner;
  if (is_neox) {
    scale.load(from, begin, count, x);
    scale.load(from, pairs + begin, count, x + count);
    transform(count, to + begin, turned, first, second, cos, sin);
    transform(count, to + pairs + begin, turned, second, first, cos + count, sin + count);
  } else {
    scale.load(from, 2 * begin, 2 * count, x);
    for (int64_t i = 0; i < count; ++i) partner[2 * i] = x[2 * i + 1], partner[2 * i + 1] = x[2 * i];
    transform(2 * count, to + 2 * begin, turned, first, second, cos, sin);
  }
}

// What is behind the pairs.
template <typename T>
void pass(const T* from, T* to, const Scale& scale, int64_t begin, int64_t width) {
  for (int64_t i = begin; scale.is_norm && i < width; i += kPart) {
    float values[kPart];
    const int64_t count = width - i < kPart ? width - i : kPart;
    scale.load(from, i, count, values);
    host::simd::transform(count, to + i, itself, static_cast<const float*>(values));
  }
  if (!scale.is_norm && from != to && begin < width) std::memcpy(to + begin, from + begin, (width - begin) * sizeof(T));
}

template <typename T>
T* row_of(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

struct Weights {
  const void* data = nullptr;
  Kind kind = Kind::kFp32;
  double eps = 0;
  bool one_plus = false;
};

// All heads of a token.
template <typename T, typename Source>
void turn_heads(const Heads& from, const Heads& to, const Weights& weights, const Source& source, int64_t batch, int64_t token,
                Angles& angles) {
  const int64_t pairs = source.pairs();
  const bool at_once = pairs <= kPart;  // else the angles are prepared again for each head
  for (int64_t head = 0; head < from.count; ++head) {
    const T* const x = row_of<const T>(from, batch, token, head);
    T* const y = row_of<T>(to, batch, token, head);
    Scale scale{weights.data != nullptr, 1.0f, weights.data, weights.kind, weights.one_plus ? 1.0f : 0.0f};
    if (scale.is_norm) {
      const float square = host::simd::sum(from.width, [](Floats v) { return v * v; }, x);
      const float mean = square / static_cast<float>(from.width);
      scale.scale = 1.0f / __builtin_sqrtf(mean + static_cast<float>(weights.eps));
    }
    for (int64_t begin = 0; begin < pairs; begin += kPart) {
      const int64_t count = pairs - begin < kPart ? pairs - begin : kPart;
      if (!at_once) source.prepare(batch, token, begin, count, angles);
      turn(x, y, scale, angles, source.is_neox, pairs, begin, count);
    }
    pass(x, y, scale, 2 * pairs, from.width);
  }
}

// --- slots ----------------------------------------------------------------------------------------

template <typename T, typename Stored>
void convert(const T* from, void* to, int64_t count, const float* scale) {
  constexpr bool kNarrow = sizeof(Stored) == 1;
  const float largest = kNarrow ? (std::is_same_v<Stored, fp8_e4m3_t> ? 448.0f : 57344.0f) : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    float x = to_float(from[i]);
    if (kNarrow && scale != nullptr) x /= *scale;
    if (kNarrow) x = x > largest ? largest : x < -largest ? -largest : x;  // NaN stays
    static_cast<Stored*>(to)[i] = from_float<Stored>(x);
  }
}

template <typename T>
void store_row(const T* from, void* to, int64_t count, DLDataType dtype, const float* scale) {
  if (dtype == dtype_of<T>()) {  // no 8-bit float, which alone has a scale
    std::memcpy(to, from, count * sizeof(T));
  } else if (dtype == dtype_of<fp32_t>()) {
    convert<T, fp32_t>(from, to, count, scale);
  } else if (dtype == dtype_of<fp16_t>()) {
    convert<T, fp16_t>(from, to, count, scale);
  } else if (dtype == dtype_of<bf16_t>()) {
    convert<T, bf16_t>(from, to, count, scale);
  } else if (dtype == dtype_of<fp8_e4m3_t>()) {
    convert<T, fp8_e4m3_t>(from, to, count, scale);
  } else {
    convert<T, fp8_e5m2_t>(from, to, count, scale);
  }
}

struct Stores {
  Slots slots;
  DLDataType dtype;
  const float* scale;

  template <typename T>
  void store(const Heads& x, int64_t token, int64_t slot) const {
    const int64_t bytes = dtype.bits / 8;
    const int64_t place = slot / slots.block_size * slots.block_stride + slot % slots.block_size * slots.slot_stride;
    for (int64_t head = 0; head < x.count; ++head) {
      char* const to = static_cast<char*>(slots.data) + (place + head * slots.head_stride) * bytes;
      store_row(row_of<const T>(x, 0, token, head), to, x.width, dtype, scale);
    }
  }
};

// --- ops on positions -----------------------------------------------------------------------------

int64_t index_of(const TensorView& indices, int64_t i) {
  const int64_t at = i * indices.stride(0);
  return indices.dtype().bits == 64 ? static_cast<const int64_t*>(indices.data_ptr())[at]
                                    : static_cast<const int32_t*>(indices.data_ptr())[at];
}

void check(const TensorView& indices, int64_t end, Skip skip) {
  if (indices.dtype().bits == 64) {
    host::check_indices<int64_t>(indices, end, skip);
  } else {
    host::check_indices<int32_t>(indices, end, skip);
  }
}

// What all ops on positions are given.
struct Options {
  bool is_neox;
  int64_t head_dim;
  std::optional<IntList> section;
  bool interleaved;
};

struct Call {
  const TensorView& cache;
  const TensorView& positions;
  const Options& options;
  host::SymbolicSize tokens{"tokens"};
  host::SymbolicDevice device;

  int64_t flat_dim() const {
    host::RuntimeCheck(cache.dim() == 2, "argument 'cos_sin_cache' must be [max_position, rope_dim], got ", cache.shape());
    return options.head_dim > 0 ? options.head_dim : cache.size(1);
  }
  template <typename T>
  Heads heads(const TensorView& x, host::SymbolicSize& count) {
    host::SymbolicSize width{"head_dim"};
    return heads_of<T>(x, options.head_dim, flat_dim(), tokens, count, width, device);
  }
  OfPositions angles() {
    return {rows_of_positions(cache, positions, options.section, options.interleaved, tokens, device), options.is_neox};
  }
};

Weights weights_of(const TensorView& weight, const Heads& x, double eps, bool gemma, host::SymbolicDType& dtype,
                   host::SymbolicDevice& device) {
  using namespace host;
  SymbolicSize width{"head_dim"};
  width.set_value(x.width);
  TensorMatcher({width}).with_dtype<fp32_t, fp16_t, bf16_t>(dtype).with_device(device).verify(weight);
  return {weight.data_ptr(), kind_of(weight.dtype()), eps, gemma};
}

// body(token, angles) for each token, the angles prepared where all pairs of a head fit.
template <typename Source, typename Body>
void each_token(const Source& source, int64_t batch, int64_t tokens, int64_t elements, const Body& body) {
  const int64_t grain = host::div_ceil(kGrain, elements > 0 ? elements : 1);
  host::parallel_for(batch * tokens, grain, [&](int64_t begin, int64_t end) {
    Angles angles;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, token = i % tokens;
      if (source.pairs() <= kPart) source.prepare(b, token, 0, source.pairs(), angles);
      body(b, token, angles);
    }
  });
}

template <typename T>
void rope_in_place(Call& call, const TensorView& q, const TensorView& k, const TensorView* q_weight, const TensorView* k_weight,
                   double eps, bool gemma) {
  host::SymbolicSize q_heads{"q_heads"}, k_heads{"k_heads"};
  host::SymbolicDType weight_dtype;
  const Heads qs = call.heads<T>(q, q_heads), ks = call.heads<T>(k, k_heads);
  Weights qw, kw;
  if (q_weight != nullptr) {
    qw = weights_of(*q_weight, qs, eps, gemma, weight_dtype, call.device);
    kw = weights_of(*k_weight, ks, eps, gemma, weight_dtype, call.device);
  }
  const OfPositions source = call.angles();
  check_rope_dim(source.rows.rope_dim(), qs.width);
  check_rope_dim(source.rows.rope_dim(), ks.width);
  check(call.positions, source.rows.max_position, Skip::kNothing);
  const int64_t elements = qs.count * qs.width + ks.count * ks.width;
  each_token(source, 1, call.tokens.unwrap(), elements, [&](int64_t batch, int64_t token, Angles& angles) {
    turn_heads<T>(qs, qs, qw, source, batch, token, angles);
    turn_heads<T>(ks, ks, kw, source, batch, token, angles);
  });
}

struct StoreArguments {
  const TensorView& v;
  const TensorView& k_cache;
  const TensorView& v_cache;
  const TensorView& indices;
  const std::optional<TensorView>& k_scale;
  const std::optional<TensorView>& v_scale;
};

template <typename T>
void rope_and_store(Call& call, const TensorView& q, const TensorView& k, const TensorView* q_weight,
                    const TensorView* k_weight, double eps, bool gemma, const StoreArguments& to) {
  using namespace host;
  SymbolicSize q_heads{"q_heads"}, k_heads{"k_heads"}, blocks{"blocks"}, block_size{"slots"};
  SymbolicDType weight_dtype, stored;
  const Heads qs = call.heads<T>(q, q_heads), ks = call.heads<T>(k, k_heads), vs = call.heads<T>(to.v, k_heads);
  const auto stores_of = [&](const TensorView& cache, const Heads& x, const std::optional<TensorView>& scale) {
    const Slots slots =
        slots_of<fp32_t, fp16_t, bf16_t, fp8_e4m3_t, fp8_e5m2_t>(cache, x, blocks, block_size, stored, call.device);
    host::only_fp8_has(scale, cache);
    return Stores{slots, cache.dtype(), host::scale_of(scale, call.device)};
  };
  const Stores k_stores = stores_of(to.k_cache, ks, to.k_scale);
  const Stores v_stores = stores_of(to.v_cache, vs, to.v_scale);
  TensorMatcher({call.tokens}).with_strides({-1}).with_dtype<int32_t, int64_t>().with_device(call.device).verify(to.indices);
  check(to.indices, blocks.unwrap() * block_size.unwrap(), Skip::kMinusOne);
  rope_in_place<T>(call, q, k, q_weight, k_weight, eps, gemma);

  const int64_t elements = ks.count * (ks.width + vs.width);
  parallel_for(call.tokens.unwrap(), div_ceil(kGrain, elements > 0 ? elements : 1), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = index_of(to.indices, token);
      if (slot < 0) continue;
      k_stores.store<T>(ks, token, slot);
      v_stores.store<T>(vs, token, slot);
    }
  });
}

template <typename T>
void turn_qk(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin, bool is_neox,
             int64_t heads_dim, bool is_adjoint, Output& q_out, Output& k_out) {
  using namespace host;
  RuntimeCheck(heads_dim == 1 || heads_dim == 2, "unsqueeze_dim must be 1 or 2, got ", heads_dim);
  SymbolicSize batch{"batch"}, tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, width{"head_dim"};
  SymbolicDevice device;
  const Heads qs = heads_of_batch<T>(q, heads_dim, batch, tokens, q_heads, width, device);
  const Heads ks = heads_of_batch<T>(k, heads_dim, batch, tokens, k_heads, width, device);
  const OfTokens source{rows_of_tokens(cos, sin, batch.unwrap(), tokens, device), is_neox, is_adjoint};
  check_rope_dim(source.rows.rope_dim, width.unwrap());
  const Heads qs_out = heads_of_batch<T>(q_out.empty_like(q), heads_dim, batch, tokens, q_heads, width, device);
  const Heads ks_out = heads_of_batch<T>(k_out.empty_like(k), heads_dim, batch, tokens, k_heads, width, device);
  const int64_t elements = (qs.count + ks.count) * width.unwrap();
  each_token(source, batch.unwrap(), tokens.unwrap(), elements, [&](int64_t b, int64_t token, Angles& angles) {
    turn_heads<T>(qs, qs_out, {}, source, b, token, angles);
    turn_heads<T>(ks, ks_out, {}, source, b, token, angles);
  });
}

}  // namespace

// The ops, as ops/rope.py names them.

template <typename T>
void apply_rope(TensorView q, TensorView k, TensorView cos_sin_cache, TensorView positions, bool is_neox, int64_t head_dim,
                std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{is_neox, head_dim, mrope_section, mrope_interleaved};
  Call call{cos_sin_cache, positions, options};
  rope_in_place<T>(call, q, k, nullptr, nullptr, 0, false);
}

template <typename T>
void rope(TensorView input, TensorView cos_sin_cache, TensorView positions, bool is_neox, int64_t head_dim,
          std::optional<IntList> mrope_section, bool mrope_interleaved, Output& out) {
  const Options options{is_neox, head_dim, mrope_section, mrope_interleaved};
  Call call{cos_sin_cache, positions, options};
  host::SymbolicSize heads{"heads"};
  const Heads from = call.heads<T>(input, heads);
  const OfPositions source = call.angles();
  check_rope_dim(source.rows.rope_dim(), from.width);
  check(positions, source.rows.max_position, Skip::kNothing);
  const TensorView result = out.empty_like(input);
  host::SymbolicDims shape{"shape"};
  host::TensorMatcher({shape}).with_strides({-1}).with_dtype<T>().verify(input).verify(result);
  const Heads to = call.heads<T>(result, heads);
  each_token(source, 1, call.tokens.unwrap(), from.count * from.width,
             [&](int64_t batch, int64_t token, Angles& angles) { turn_heads<T>(from, to, {}, source, batch, token, angles); });
}

template <typename T>
void fused_qknorm_rope(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight, TensorView cos_sin_cache,
                       TensorView positions, double eps, bool gemma, bool is_neox, int64_t head_dim,
                       std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{is_neox, head_dim, mrope_section, mrope_interleaved};
  Call call{cos_sin_cache, positions, options};
  rope_in_place<T>(call, q, k, &q_weight, &k_weight, eps, gemma);
}

template <typename T>
void apply_rope_store_kv(TensorView q, TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                         TensorView cos_sin_cache, TensorView positions, TensorView indices, std::optional<TensorView> k_scale,
                         std::optional<TensorView> v_scale, bool is_neox, int64_t head_dim,
                         std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{is_neox, head_dim, mrope_section, mrope_interleaved};
  Call call{cos_sin_cache, positions, options};
  rope_and_store<T>(call, q, k, nullptr, nullptr, 0, false, {v, k_cache, v_cache, indices, k_scale, v_scale});
}

template <typename T>
void fused_qknorm_rope_store_kv(TensorView q, TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                                TensorView q_weight, TensorView k_weight, TensorView cos_sin_cache, TensorView positions,
                                TensorView indices, double eps, std::optional<TensorView> k_scale,
                                std::optional<TensorView> v_scale, bool gemma, bool is_neox, int64_t head_dim,
                                std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{is_neox, head_dim, mrope_section, mrope_interleaved};
  Call call{cos_sin_cache, positions, options};
  rope_and_store<T>(call, q, k, &q_weight, &k_weight, eps, gemma, {v, k_cache, v_cache, indices, k_scale, v_scale});
}

template <typename T>
void rope_qk(TensorView q, TensorView k, TensorView cos, TensorView sin, bool is_neox, int64_t unsqueeze_dim, Output& q_out,
             Output& k_out) {
  turn_qk<T>(q, k, cos, sin, is_neox, unsqueeze_dim, false, q_out, k_out);
}

template <typename T>
void rope_qk_backward(TensorView grad_q, TensorView grad_k, TensorView cos, TensorView sin, bool is_neox, int64_t unsqueeze_dim,
                      Output& q_grad, Output& k_grad) {
  turn_qk<T>(grad_q, grad_k, cos, sin, is_neox, unsqueeze_dim, true, q_grad, k_grad);
}

}  // namespace jitk

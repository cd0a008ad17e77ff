// What the ops of rope.cpp and rope.cu are given, matched: one text of errors for both, and plain numbers for their loops.
//
//   SymbolicSize tokens{"tokens"}, heads{"q_heads"}, width{"head_dim"};
//   const Heads q = heads_of<T>(view, 0, 64, tokens, heads, width, device);       [tokens, heads, head_dim], or heads side by side
//   const PositionRows angles = rows_of_positions(cache, positions, section, false, tokens, device);
//
// Strides count elements. That of a dimension of size 1, which nothing may be asked of, is 0.
#pragma once

#include <jitk/abi.h>     // TensorView, IntList
#include <jitk/check.h>   // RuntimeCheck
#include <jitk/tensor.h>  // TensorMatcher

#include <optional>  // sections, scales

namespace jitk::rotary {

// The dtype of floats that are converted as they are read, so that it is no template argument.
enum class Kind : uint8_t { kFp32, kFp16, kBf16 };

struct Heads {
  void* data;
  int64_t count;
  int64_t width;
  int64_t batch_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// Slots of a cache, in blocks of as many.
struct Slots {
  void* data;
  int64_t blocks;
  int64_t block_size;
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
};

// Which of a token's positions a pair goes by: the first of them always, or the sections' own, one after the other or in turns.
enum class Sections : uint8_t { kNone, kInOrder, kInTurns };

// Cosines and sines of positions: pairs of them in each row of a cache.
struct PositionRows {
  const void* cache;
  Kind kind;
  int64_t row_stride;
  int64_t max_position;
  int64_t pairs;
  const void* positions;
  bool is_wide;  // int64_t, else int32_t
  int64_t axis_stride;
  int64_t position_stride;
  Sections sections;
  // Pairs below `height` go by the first position, those from there below `width` by the second; in turns, where the pairs end
  // that go by the second and the third.
  int64_t height;
  int64_t width;

  int64_t rope_dim() const { return 2 * pairs; }
};

// Cosines and sines of each token, an entry for each element.
struct TokenRows {
  const void* cos;
  const void* sin;
  Kind kind;
  int64_t rope_dim;
  int64_t cos_batch_stride;
  int64_t cos_token_stride;
  int64_t sin_batch_stride;
  int64_t sin_token_stride;
};

inline Kind kind_of(DLDataType dtype) {
  return dtype == dtype_of<fp32_t>() ? Kind::kFp32 : dtype == dtype_of<fp16_t>() ? Kind::kFp16 : Kind::kBf16;
}

inline int64_t stride_of(const TensorView& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

// A view with other sizes and strides, which it holds itself.
template <int32_t kDims>
struct Reshaped {
  int64_t sizes[kDims];
  int64_t strides[kDims];

  TensorView of(TensorView x) const {
    x.sizes_ = sizes;
    x.strides_ = strides;
    x.ndim_ = kDims;
    return x;
  }
};

inline void check_rope_dim(int64_t rope_dim, int64_t head_dim) {
  host::RuntimeCheck(rope_dim % 2 == 0 && rope_dim <= head_dim, "rope_dim must be even and at most head_dim, ", head_dim,
                     ", got ", rope_dim);
}

// [tokens, heads, head_dim]; or [tokens, heads * flat_dim]. `head_dim` is what it must be, or 0.
template <typename T>
Heads heads_of(const TensorView& x, int64_t head_dim, int64_t flat_dim, host::SymbolicSize& tokens, host::SymbolicSize& heads,
               host::SymbolicSize& width, host::SymbolicDevice& device) {
  using namespace host;
  if (head_dim > 0 && !width.has_value()) width.set_value(head_dim, "head_dim");
  Reshaped<3> apart{};
  TensorView view = x;
  if (x.dim() == 2) {
    RuntimeCheck(flat_dim > 0 && x.size(1) % flat_dim == 0, "argument '", x.name(), "' has rows of ", x.size(1),
                 " elements, which are no heads of ", flat_dim);
    apart = {{x.size(0), x.size(1) / flat_dim, flat_dim}, {x.stride(0), flat_dim * x.stride(1), x.stride(1)}};
    view = apart.of(x);
  }
  TensorMatcher({tokens, heads, width}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(view);
  return {x.data_ptr(), heads.unwrap(), width.unwrap(), 0, stride_of(view, 0), stride_of(view, 1)};
}

// [batch, heads, tokens, head_dim], or with heads behind tokens.
template <typename T>
Heads heads_of_batch(const TensorView& x, int64_t heads_dim, host::SymbolicSize& batch, host::SymbolicSize& tokens,
                     host::SymbolicSize& heads, host::SymbolicSize& width, host::SymbolicDevice& device) {
  using namespace host;
  SymbolicSize& second = heads_dim == 1 ? heads : tokens;
  SymbolicSize& third = heads_dim == 1 ? tokens : heads;
  TensorMatcher({batch, second, third, width}).with_strides({-1, -1, -1, 1}).with_dtype<T>().with_device(device).verify(x);
  return {x.data_ptr(), heads.unwrap(), width.unwrap(), stride_of(x, 0), stride_of(x, 3 - heads_dim), stride_of(x, heads_dim)};
}

inline PositionRows rows_of_positions(const TensorView& cache, const TensorView& positions, std::optional<IntList> section,
                                      bool interleaved, host::SymbolicSize& tokens, host::SymbolicDevice& device) {
  using namespace host;
  SymbolicSize max_position{"max_position"}, rope_dim{"rope_dim"};
  TensorMatcher({max_position, rope_dim})
      .with_strides({-1, 1})
      .with_dtype<fp32_t, fp16_t, bf16_t>()
      .with_device(device)
      .verify(cache);
  RuntimeCheck(rope_dim.unwrap() % 2 == 0,
               "argument 'cos_sin_cache' must be [max_position, rope_dim] with an even rope_dim, got ", cache.shape());
  const int64_t pairs = rope_dim.unwrap() / 2;
  PositionRows rows{cache.data_ptr(),
                    kind_of(cache.dtype()),
                    stride_of(cache, 0),
                    max_position.unwrap(),
                    pairs,
                    positions.data_ptr(),
                    positions.dtype().bits == 64,
                    0,
                    0,
                    Sections::kNone,
                    pairs,
                    pairs};
  if (section) {
    TensorMatcher({3, tokens}).with_strides({-1, -1}).with_dtype<int32_t, int64_t>().with_device(device).verify(positions);
    bool fits = section->size() == 3;
    int64_t sum = 0;
    for (const int64_t part : *section) fits = fits && part >= 0 && (sum += part) <= pairs;
    RuntimeCheck(fits && sum == pairs, "mrope_section must be 3 numbers whose sum is rope_dim / 2, ", pairs, ", got ",
                 *section);
    const IntList parts = *section;
    rows.axis_stride = positions.stride(0);
    rows.sections = interleaved ? Sections::kInTurns : Sections::kInOrder;
    rows.height = interleaved ? 3 * parts[1] : parts[0];
    rows.width = interleaved ? 3 * parts[2] : parts[0] + parts[1];
  } else {
    TensorMatcher({tokens}).with_strides({-1}).with_dtype<int32_t, int64_t>().with_device(device).verify(positions);
  }
  rows.position_stride = stride_of(positions, positions.dim() - 1);
  return rows;
}

inline TokenRows rows_of_tokens(const TensorView& cos, const TensorView& sin, int64_t batch, host::SymbolicSize& tokens,
                                host::SymbolicDevice& device) {
  using namespace host;
  SymbolicSize rope_dim{"rope_dim"};
  SymbolicDType dtype;
  TensorMatcher({-1, tokens, rope_dim})
      .with_strides({-1, -1, 1})
      .with_dtype<fp32_t, fp16_t, bf16_t>(dtype)
      .with_device(device)
      .verify(cos);
  TensorMatcher({-1, tokens, rope_dim}).with_strides({-1, -1, 1}).with_dtype(dtype).with_device(device).verify(sin);
  for (const TensorView* x : {&cos, &sin}) {
    RuntimeCheck(x->size(0) == 1 || x->size(0) == batch, "argument '", x->name(), "' must be for a batch of 1 or ", batch,
                 ", got ", x->size(0));
  }
  return {cos.data_ptr(),    sin.data_ptr(),    kind_of(cos.dtype()), rope_dim.unwrap(),
          stride_of(cos, 0), stride_of(cos, 1), stride_of(sin, 0),    stride_of(sin, 1)};
}

// [slots, heads, head_dim], [slots, heads * head_dim] or [blocks, slots, heads, head_dim], for rows of `x`.
template <typename... Ts>
Slots slots_of(const TensorView& cache, const Heads& x, host::SymbolicSize& blocks, host::SymbolicSize& block_size,
               host::SymbolicDType& dtype, host::SymbolicDevice& device) {
  using namespace host;
  Reshaped<4> apart{};
  TensorView view = cache;
  if (cache.dim() == 2) {
    RuntimeCheck(cache.size(1) == x.count * x.width, "argument '", cache.name(), "' has rows of ", cache.size(1),
                 " elements, expected ", x.count, " heads of ", x.width);
    apart = {{1, cache.size(0), x.count, x.width}, {0, cache.stride(0), x.width * cache.stride(1), cache.stride(1)}};
    view = apart.of(cache);
  } else if (cache.dim() == 3) {
    apart = {{1, cache.size(0), cache.size(1), cache.size(2)}, {0, cache.stride(0), cache.stride(1), cache.stride(2)}};
    view = apart.of(cache);
  }
  SymbolicSize heads{"heads"}, width{"head_dim"};
  heads.set_value(x.count);
  width.set_value(x.width);
  TensorMatcher({blocks, block_size, heads, width})
      .with_strides({-1, -1, -1, 1})
      .with_dtype<Ts...>(dtype)
      .with_device(device)
      .verify(view);
  return {cache.data_ptr(), blocks.unwrap(), block_size.unwrap(), stride_of(view, 0), stride_of(view, 1), stride_of(view, 2)};
}

}  // namespace jitk::rotary

// The rows of tokens, and a KV cache seen as slots that hold them, whatever the layouts.
//
//   const TokenRows rows = tokens_of(k);                     [tokens, width] or [tokens, heads, head_dim]
//   const Slots slots = slots_of(k_cache, k);                [slots, ...row] or [blocks, block_size, ...row]
//   const Segments part = join(rows.heads, slots.heads);     what is dense in both
//   from + token * rows.stride + i * part.first_stride   ->   to + slots.place(slot) + i * part.second_stride
//
// A row has the same elements in both, in order: heads may be a dimension of the one and not of the other. Only the last
// dimension must be dense: a cache may be a view of a larger tensor (K and V in one, heads before slots), every other stride
// is free. Strides and places count elements.
// Left out: dtypes (cache_dtype.h), indices (index.h), and what is done with a row.
#pragma once

#include <jitk/tensor.h>  // TensorView, RuntimeCheck

namespace jitk {
namespace host {

// A row as its heads. One that is not divided into heads is one head.
struct Heads {
  int64_t count = 1;
  int64_t width = 0;
  int64_t stride = 0;
  bool divided = false;  // the tensor has a dimension of heads

  int64_t elements() const { return count * width; }
};

// The heads of a tensor with `leading` dimensions before its rows, which have one dimension or two.
inline Heads heads_of(const TensorView& x, int32_t leading) {
  if (x.dim() - leading == 1) return {1, x.sizes_[leading], 0, false};
  return {x.sizes_[leading], x.sizes_[leading + 1], x.sizes_[leading] > 1 ? x.strides_[leading] : 0, true};
}

// --- tokens ---------------------------------------------------------------------------------------

struct TokenRows {
  int64_t tokens = 0;
  int64_t stride = 0;
  Heads heads;
};

inline TokenRows tokens_of(const TensorView& x, DebugInfo where = {}) {
  RuntimeCheck(where, x.dim() == 2 || x.dim() == 3, "argument '", x.name(),
               "' must be [tokens, width] or [tokens, heads, head_dim], got ", x.shape());
  return {x.sizes_[0], x.sizes_[0] > 1 ? x.strides_[0] : 0, heads_of(x, 1)};
}

// Of the same tokens as another.
inline TokenRows tokens_of(const TensorView& x, const TensorView& other, DebugInfo where = {}) {
  const TokenRows rows = tokens_of(x, where);
  RuntimeCheck(where, rows.tokens == other.sizes_[0], "argument '", x.name(), "' must have the ", other.sizes_[0],
               " tokens of '", other.name(), "', got ", x.shape());
  return rows;
}

// What all heads share, as the latent of MLA: [tokens, width] or [tokens, 1, width].
inline TokenRows tokens_of_one_head(const TensorView& x, DebugInfo where = {}) {
  RuntimeCheck(where, x.dim() == 2 || (x.dim() == 3 && x.sizes_[1] == 1), "argument '", x.name(),
               "' must be [tokens, width] or [tokens, 1, width], got ", x.shape());
  return tokens_of(x, where);
}

inline void one_for_each_token(const TensorView& indices, const TensorView& x, DebugInfo where = {}) {
  RuntimeCheck(where, indices.sizes_[0] == x.sizes_[0], "argument '", indices.name(), "' must have one for each of the ",
               x.sizes_[0], " tokens of '", x.name(), "', got ", indices.shape());
}

// --- slots ----------------------------------------------------------------------------------------

struct Slots {
  int64_t count = 0;
  int64_t stride = 0;
  int64_t block_size = 1;
  int64_t block_gap = 0;  // from the end of a block to the next; 0 where slots lie in equal steps
  Heads heads;

  // Where slot `first + i * step` was, i now is, from `first` on; of slots in equal steps.
  Slots every(int64_t step, int64_t first) const {
    Slots some = *this;
    some.count = first < count ? (count - first - 1) / step + 1 : 0;
    some.stride = some.count > 1 ? stride * step : 0;
    return some;
  }

  int64_t place(int64_t slot) const { return slot * stride + (block_gap != 0 ? slot / block_size * block_gap : 0); }
};

// The slots of a cache with `leading` dimensions before its rows: one of slots, or blocks and the slots of each.
inline Slots slots_of(const TensorView& cache, int32_t leading) {
  Slots slots{cache.sizes_[0], cache.sizes_[0] > 1 ? cache.strides_[0] : 0, 1, 0, heads_of(cache, leading)};
  if (leading == 1 || cache.sizes_[1] == 1) return slots;
  const int64_t blocks = slots.count, block_stride = slots.stride;
  slots.count *= cache.sizes_[1];
  slots.stride = cache.strides_[1];
  slots.block_size = cache.sizes_[1];
  if (blocks > 1) slots.block_gap = block_stride - slots.block_size * slots.stride;
  return slots;
}

// The row of a tensor of tokens behind other dimensions, for errors.
struct RowBehind {
  const char* dimensions;
  const TensorView& x;
};
JITK_COLD inline Message& operator<<(Message& message, RowBehind row) {
  message << '[' << row.dimensions;
  for (int32_t i = 1; i < row.x.dim(); ++i) message << ", " << row.x.sizes_[i];
  return message << ']';
}

// The slots of a cache for the rows of `x`. Where two ways to read a cache of three dimensions fit, they are the same.
inline Slots slots_of(const TensorView& cache, const TensorView& x, DebugInfo where = {}) {
  const int32_t row = x.dim() - 1;
  const int32_t same = cache.dim() - row;
  if (same == 1 || same == 2) {
    bool fits = true;
    for (int32_t i = 0; i < row; ++i) fits = fits && cache.sizes_[same + i] == x.sizes_[1 + i];
    if (fits) return slots_of(cache, same);
  }
  const int32_t other = cache.dim() - (3 - row);  // heads are a dimension here, and not there
  if (other == 1 || other == 2) {
    const Slots slots = slots_of(cache, other);
    if (slots.heads.elements() == heads_of(x, 1).elements()) return slots;
  }
  panic(where, "argument '", cache.name(), "' has no slots for the rows of '", x.name(), "'\n  expected  ",
        RowBehind{"slots", x}, " or ", RowBehind{"blocks, block_size", x}, "\n  got       ", cache.shape());
}

// The same of a tensor without blocks, as a destination is that is counted in rows.
inline Slots slots_in_rows(const TensorView& out, const TensorView& x, DebugInfo where = {}) {
  const int32_t leading = out.dim() - x.dim() + 1;
  bool fits = leading == 1;
  for (int32_t i = 1; fits && i < x.dim(); ++i) fits = out.sizes_[i] == x.sizes_[i];
  if (!fits)
    panic(where, "argument '", out.name(), "' has no place for the rows of '", x.name(), "'\n  expected  ",
          RowBehind{"rows", x}, "\n  got       ", out.shape());
  return slots_of(out, 1);
}

inline void as_many_slots(const TensorView& cache, const Slots& slots, const TensorView& other, const Slots& others,
                          DebugInfo where = {}) {
  RuntimeCheck(where, slots.count == others.count, "argument '", cache.name(), "' must have the ", others.count, " slots of '",
               other.name(), "', got ", slots.count);
}

// The slots of a cache whose rows are those of `first` and then those of `second`: [slots, width], or with blocks and the slots
// of each in the place of the slots, or with a head before the width in addition.
inline Slots slots_of_both(const TensorView& cache, const TensorView& first, const TensorView& second, DebugInfo where = {}) {
  const int64_t width = heads_of(first, 1).elements() + heads_of(second, 1).elements();
  const bool fits = cache.dim() >= 2 && cache.dim() <= 4 && cache.sizes_[cache.dim() - 1] == width &&
                    (cache.dim() < 4 || cache.sizes_[2] == 1);
  if (!fits)
    panic(where, "argument '", cache.name(), "' has no slots for the rows of '", first.name(), "' and '", second.name(),
          "'\n  expected  [slots, ", width, "] or [blocks, block_size, ", width, "], or with 1 before ", width,
          "\n  got       ", cache.shape());
  return slots_of(cache, cache.dim() == 2 ? 1 : 2);
}

// The slots of a cache alone, whose number of dimensions says what they are: [slots, width], [slots, heads, head_dim] or
// [blocks, block_size, heads, head_dim].
inline Slots slots_of(const TensorView& cache, DebugInfo where = {}) {
  RuntimeCheck(where, cache.dim() >= 2 && cache.dim() <= 4, "argument '", cache.name(),
               "' must be [slots, width], [slots, heads, head_dim] or [blocks, block_size, heads, head_dim], got ",
               cache.shape());
  return slots_of(cache, cache.dim() == 4 ? 2 : 1);
}

// How many pages of `page_size` slots there are, one behind the other.
inline int64_t pages_of(const TensorView& cache, const Slots& slots, int64_t page_size, DebugInfo where = {}) {
  RuntimeCheck(where, page_size >= 1, "page_size must be at least 1, got ", page_size);
  RuntimeCheck(where, slots.count % page_size == 0, "page_size must divide the ", slots.count, " slots of '", cache.name(),
               "', got ", page_size);
  return slots.count / page_size;
}

// Equal pieces that are dense in both of two rows with the same elements.
struct Segments {
  int64_t count;
  int64_t width;
  int64_t first_stride;
  int64_t second_stride;
};

inline Segments join(Heads first, Heads second) {
  if (!first.divided && second.divided) first = {second.count, second.width, second.width, true};
  if (!second.divided && first.divided) second = {first.count, first.width, first.width, true};
  const bool dense = first.stride == first.width && second.stride == second.width;
  if (dense || first.count <= 1) return {1, first.elements(), 0, 0};
  return {first.count, first.width, first.stride, second.stride};
}

// The rows of one tensor of tokens, and their places in a cache.
struct CachedRows {
  TensorView tokens;
  TensorView cache;
  TokenRows rows;
  Slots slots;
  const float* scale;
  int64_t column = 0;  // of the cache, in elements, where the first slot's row begins

  int64_t width() const { return rows.heads.elements(); }
  // Strides of the tokens, and of the slots. A slot may be wider than the part of it that these tokens have.
  Segments segments() const {
    if (slots.heads.elements() != width()) return {1, width(), 0, 0};
    return join(rows.heads, slots.heads);
  }
};

}  // namespace host
}  // namespace jitk

// What an index along the first dimension of a tensor names, as bytes to be copied: a row, or a page of rows.
//
//   const ItemCopy copy = match_items("dst", dst, "src", src);          lists of tensors, one for each layer, all of one layout
//   for (int64_t r = 0; r < copy.rows; ++r) memcpy(to + copy.dst.place(i, r), from + copy.src.place(j, r), copy.width);
//
// An item is `rows` dense pieces of `width` bytes in equal steps. So one loop serves rows of [slots, heads, head_dim], pages of
// [pages, page_size, heads, head_dim], and either of them where the layers lie between: its strides say which it is.
// Left out: what the indices are (index.h), and where the bytes may be.
#pragma once

#include <jitk/abi.h>    // TensorView, TensorList
#include <jitk/check.h>  // RuntimeCheck, panic

namespace jitk {
namespace host {

// The items of a tensor. Strides and widths count bytes.
struct Items {
  int64_t count = 0;
  int64_t stride = 0;  // 0 where nothing is stepped over
  int64_t rows = 1;
  int64_t row_stride = 0;
  int64_t width = 0;

  int64_t place(int64_t item, int64_t row) const { return item * stride + row * row_stride; }
};

// A copy of items: what the tensors of both sides have in common, and how each of them lies.
struct ItemCopy {
  Items dst, src;
  int64_t rows = 1;   // of an item
  int64_t width = 0;  // of a row

  bool empty() const { return rows == 0 || width == 0; }
};

namespace details {

// The items of one tensor with as long rows as its strides allow. False if no single step leads from row to row.
[[gnu::noinline]] inline bool find_items(const TensorView& view, Items* items) {
  *items = {view.size(0), 0, 1, 0, view.dtype().bits / 8};
  const int64_t bytes = items->width;
  if (items->count > 1) items->stride = view.stride(0) * bytes;
  for (int32_t i = 1; i < view.dim(); ++i) {
    if (view.size(i) == 0) {
      items->rows = 0;
      return true;
    }
  }
  int32_t i = view.dim() - 1;
  for (; i > 0; --i) {
    if (view.size(i) == 1) continue;
    if (view.stride(i) * bytes != items->width) break;
    items->width *= view.size(i);
  }
  for (; i > 0; --i) {
    if (view.size(i) == 1) continue;
    const int64_t step = view.stride(i) * bytes;
    if (items->rows == 1) {
      items->row_stride = step;
    } else if (step != items->row_stride * items->rows) {
      return false;
    }
    items->rows *= view.size(i);
  }
  return true;
}

// Rows of another width, as the other side has them. False if that takes two steps, within a row and from row to row.
inline bool split_rows(Items* items, int64_t width) {
  if (items->width == width) return true;
  if (items->rows != 1) return false;
  items->rows = items->width / width;
  items->row_stride = width;
  items->width = width;
  return true;
}

JITK_COLD inline void describe(Message& text, const char* label, const TensorView& view, bool count) {
  text << "\n  " << label << '[';
  count ? text << view.size(0) : text << '*';
  for (int32_t i = 1; i < view.dim(); ++i) text << ", " << view.size(i);
  text << "]  " << view.dtype();
}

[[noreturn]] JITK_COLD inline void refuse_items(const TensorView& view, const TensorView& like, bool count, DebugInfo where) {
  Message expected, got;
  describe(expected, "expected  ", like, count);
  describe(got, "got       ", view, true);
  panic(where, "argument '", view.name(), "' does not match", expected, got, "\n  ", count ? "layers" : "items",
        " are those of '", like.name(), '\'');
}

[[noreturn]] JITK_COLD inline void refuse_layout(const TensorView& view, const char* why, DebugInfo where) {
  Message got;
  describe(got, "got       ", view, true);
  panic(where, "argument '", view.name(), "' does not match\n  expected  items of dense rows in equal steps", got, "  strides ",
        view.strides(), "\n  ", why, "; pass ", view.name(), ".contiguous()");
}

inline bool same_items(const TensorView& a, const TensorView& b, int32_t from) {
  bool same = a.dim() == b.dim() && a.dtype() == b.dtype();
  for (int32_t i = from; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

// The items of each layer, which lies as the first one does.
inline Items find_items(const TensorList& layers, DebugInfo where) {
  const TensorView& first = layers[0];
  RuntimeCheck(where, first.dim() > 0, "argument '", first.name(), "' must have a dimension of items, got a scalar");
  Items items;
  if (!find_items(first, &items)) refuse_layout(first, "its strides do not walk over dense rows in equal steps", where);
  for (int64_t layer = 1; layer < layers.size(); ++layer) {
    const TensorView& view = layers[layer];
    if (!same_items(view, first, 0)) refuse_items(view, first, true, where);
    Items other;
    const bool regular = find_items(view, &other);
    const bool alike = regular && other.stride == items.stride && other.row_stride == items.row_stride &&
                       other.rows == items.rows && other.width == items.width;
    if (!alike) refuse_layout(view, "its strides are not those of the first layer", where);
  }
  return items;
}

}  // namespace details

// How items of `src` are copied to items of `dst`, each a tensor for every layer.
inline ItemCopy match_items(const char* dst_name, const TensorList& dst, const char* src_name, const TensorList& src,
                            DebugInfo where = {}) {
  RuntimeCheck(where, src.size() == dst.size(), "argument '", src_name, "' must have as many layers as '", dst_name, "', got ",
               src.size(), " and ", dst.size());
  ItemCopy copy;
  if (dst.size() == 0) return copy;
  copy.dst = details::find_items(dst, where);
  if (!details::same_items(src[0], dst[0], 1)) details::refuse_items(src[0], dst[0], false, where);
  copy.src = details::find_items(src, where);
  if (copy.dst.rows == 0) {
    copy.rows = 0;
    return copy;
  }
  copy.width = copy.dst.width < copy.src.width ? copy.dst.width : copy.src.width;
  const char* const why = "the rows of the other side end within its rows";
  if (!details::split_rows(&copy.dst, copy.width)) details::refuse_layout(dst[0], why, where);
  if (!details::split_rows(&copy.src, copy.width)) details::refuse_layout(src[0], why, where);
  copy.rows = copy.dst.rows;
  return copy;
}

// Of the keys and the values of a cache. There are no values, or as many layers and items of them as of keys.
struct KVCopy {
  ItemCopy k, v;
};

inline KVCopy match_kv(const TensorList& k_dst, const TensorList& v_dst, const TensorList& k_src, const TensorList& v_src,
                       DebugInfo where = {}) {
  const KVCopy copy{match_items("k_dst", k_dst, "k_src", k_src, where), match_items("v_dst", v_dst, "v_src", v_src, where)};
  if (v_dst.size() == 0) return copy;
  RuntimeCheck(where, v_dst.size() == k_dst.size(), "argument 'v_dst' must have as many layers as 'k_dst', or none, got ",
               v_dst.size(), " and ", k_dst.size());
  RuntimeCheck(where, copy.v.dst.count == copy.k.dst.count, "argument 'v_dst' must have as many items as 'k_dst', got ",
               copy.v.dst.count, " and ", copy.k.dst.count);
  RuntimeCheck(where, copy.v.src.count == copy.k.src.count, "argument 'v_src' must have as many items as 'k_src', got ",
               copy.v.src.count, " and ", copy.k.src.count);
  return copy;
}

}  // namespace host
}  // namespace jitk

// Rows of tokens into the slots of a KV cache and out of it. A row is copied by its bytes, or cast to 8-bit floats and back.
#include <jitk/cache_dtype.h>  // stored_as, scale_of
#include <jitk/index.h>        // check_indices
#include <jitk/result.h>       // Output, parallel_for
#include <jitk/slots.h>        // tokens_of, slots_of, join

#include <cstring>   // memcpy, memset
#include <optional>  // scales

namespace jitk {
namespace {

using namespace host;

constexpr int64_t kGrain = 32768;  // elements for each thread, at least: a thread that is awake starts in 1 us

int64_t grain_of(int64_t width) { return div_ceil(kGrain, width > 0 ? width : 1); }

// --- a run of elements ----------------------------------------------------------------------------

constexpr int64_t kRun = 512;  // floats on the stack, between two dtypes

template <typename T>
void read(const void* from, int64_t place, float* values, int64_t count) {
  const T* x = static_cast<const T*>(from) + place;
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[i]);
}
template <typename T>
void write(const float* values, void* to, int64_t place, int64_t count) {
  T* x = static_cast<T*>(to) + place;
  for (int64_t i = 0; i < count; ++i) x[i] = from_float<T>(values[i]);
}

using Read = void (*)(const void* from, int64_t place, float* values, int64_t count);
using Write = void (*)(const float* values, void* to, int64_t place, int64_t count);

Read read_of(DLDataType dtype) {
  if (is_fp8(dtype)) return dtype == kE4m3 ? read<fp8_e4m3_t> : read<fp8_e5m2_t>;
  return dtype == dtype_of<fp16_t>() ? read<fp16_t> : dtype == dtype_of<bf16_t>() ? read<bf16_t> : read<fp32_t>;
}
Write write_of(DLDataType dtype) {
  if (is_fp8(dtype)) return dtype == kE4m3 ? write<fp8_e4m3_t> : write<fp8_e5m2_t>;
  return dtype == dtype_of<fp16_t>() ? write<fp16_t> : dtype == dtype_of<bf16_t>() ? write<bf16_t> : write<fp32_t>;
}

// How elements get from one place to another: by their bytes, or through fp32.
struct Conversion {
  int64_t bytes = 0;  // of an element that is copied; else 0
  Read read = nullptr;
  Write write = nullptr;
  float divisor = 1.0f;
  float factor = 1.0f;
  float largest = 0.0f;  // that the target can hold; else 0

  static Conversion copy(int64_t bytes) {
    Conversion made;
    made.bytes = bytes;
    return made;
  }
  static Conversion narrowing(DLDataType from, DLDataType to, const float* scale) {
    return {0, read_of(from), write_of(to), scale != nullptr ? *scale : 1.0f, 1.0f, to == kE4m3 ? 448.0f : 57344.0f};
  }
  static Conversion widening(DLDataType from, DLDataType to, const float* scale) {
    return {0, read_of(from), write_of(to), 1.0f, scale != nullptr ? *scale : 1.0f, 0.0f};
  }

  // Places count elements.
  void run(const void* from, int64_t source, void* to, int64_t target, int64_t count) const {
    if (bytes > 0) {
      std::memcpy(static_cast<char*>(to) + target * bytes, static_cast<const char*>(from) + source * bytes,
                  static_cast<size_t>(count * bytes));
      return;
    }
    for (int64_t done = 0; done < count; done += kRun) {
      const int64_t some = count - done < kRun ? count - done : kRun;
      float values[kRun];
      read(from, source + done, values, some);
      for (int64_t i = 0; i < some; ++i) {
        float value = values[i] / divisor * factor;
        if (largest > 0.0f) {  // NaN stays
          value = value > largest ? largest : value;
          value = value < -largest ? -largest : value;
        }
        values[i] = value;
      }
      write(values, to, target + done, some);
    }
  }
};

// --- rows -----------------------------------------------------------------------------------------

// Rows of tokens, the slots that are their places in a cache, and which way they go.
struct Part {
  const void* from;
  void* to;
  TokenRows rows;
  Slots slots;
  Conversion conversion;
  int64_t column = 0;  // of the cache, in elements, where the first slot's row begins

  void store(int64_t token, int64_t slot) const {
    // A slot may be wider than this part of it.
    const Segments segments = slots.heads.elements() == rows.heads.elements() ? join(rows.heads, slots.heads)
                                                                              : Segments{1, rows.heads.elements(), 0, 0};
    const int64_t source = token * rows.stride, target = slots.place(slot) + column;
    for (int64_t i = 0; i < segments.count; ++i) {
      conversion.run(from, source + i * segments.first_stride, to, target + i * segments.second_stride, segments.width);
    }
  }
  void load(int64_t token, int64_t slot) const {
    const Segments segments = join(slots.heads, rows.heads);
    const int64_t source = slots.place(slot), target = token * rows.stride;
    for (int64_t i = 0; i < segments.count; ++i) {
      conversion.run(from, source + i * segments.first_stride, to, target + i * segments.second_stride, segments.width);
    }
  }
};

template <typename Index>
void store(const Part& first, const Part& second, TensorView indices) {
  check_indices<Index>(indices, first.slots.count, Skip::kMinusOne);
  const Index* slot_of = static_cast<const Index*>(indices.data_ptr());
  const int64_t step = indices.stride(0), width = first.rows.heads.elements() + second.rows.heads.elements();
  parallel_for(first.rows.tokens, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slot_of[token * step];
      if (slot < 0) continue;
      first.store(token, slot);
      second.store(token, slot);
    }
  });
}

Conversion stored(const TensorView& x, const TensorView& cache, const float* scale, DebugInfo where = {}) {
  if (stored_as(x, cache, where) == Stored::kCopy) return Conversion::copy(bytes_of(x));
  return Conversion::narrowing(x.dtype(), cache.dtype(), scale);
}

}  // namespace

template <typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices,
                    std::optional<TensorView> k_scale, std::optional<TensorView> v_scale) {
  SymbolicDims k_shape{"k_shape"}, v_shape{"v_shape"}, k_cache_shape{"k_cache_shape"}, v_cache_shape{"v_cache_shape"};
  SymbolicDType dtype, cache_dtype;
  SymbolicDevice device;
  TensorMatcher({k_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(k);
  TensorMatcher({v_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(v);
  TensorMatcher({k_cache_shape, -1}).with_strides({-1, 1}).with_dtype(cache_dtype).with_device(device).verify(k_cache);
  TensorMatcher({v_cache_shape, -1}).with_strides({-1, 1}).with_dtype(cache_dtype).with_device(device).verify(v_cache);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices);
  const float* k_step = scale_of(k_scale, device);
  const float* v_step = scale_of(v_scale, device);
  const TokenRows k_rows = tokens_of(k), v_rows = tokens_of(v, k);
  one_for_each_token(indices, k);
  const Slots k_slots = slots_of(k_cache, k), v_slots = slots_of(v_cache, v);
  as_many_slots(v_cache, v_slots, k_cache, k_slots);
  const Conversion k_stored = stored(k, k_cache, k_step), v_stored = stored(v, v_cache, v_step);
  only_fp8_has(k_scale, k_cache);
  only_fp8_has(v_scale, v_cache);

  store<Index>({k.data_ptr(), k_cache.data_ptr(), k_rows, k_slots, k_stored},
               {v.data_ptr(), v_cache.data_ptr(), v_rows, v_slots, v_stored}, indices);
}

template <typename Index>
void store_mla_cache(TensorView latent, TensorView rope, TensorView cache, TensorView indices,
                     std::optional<TensorView> scale) {
  SymbolicDims latent_shape{"latent_shape"}, rope_shape{"rope_shape"}, cache_shape{"cache_shape"};
  SymbolicDType dtype;
  SymbolicDevice device;
  TensorMatcher({latent_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(latent);
  TensorMatcher({rope_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(rope);
  TensorMatcher({cache_shape, -1}).with_strides({-1, 1}).with_device(device).verify(cache);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices);
  const float* step = scale_of(scale, device);
  const TokenRows first = tokens_of_one_head(latent), second = tokens_of_one_head(rope);
  (void)tokens_of(rope, latent);
  one_for_each_token(indices, latent);
  const Slots slots = slots_of_both(cache, latent, rope);
  const Conversion conversion = stored(latent, cache, step);
  only_fp8_has(scale, cache);

  store<Index>({latent.data_ptr(), cache.data_ptr(), first, slots, conversion},
               {rope.data_ptr(), cache.data_ptr(), second, slots, conversion, first.heads.width}, indices);
}

template <typename Index>
void downcast_fp8(TensorView k, TensorView v, TensorView k_out, TensorView v_out, TensorView k_scale, TensorView v_scale,
                  TensorView loc, int64_t mult, int64_t offset) {
  SymbolicDims k_shape{"k_shape"}, v_shape{"v_shape"}, k_out_shape{"k_out_shape"}, v_out_shape{"v_out_shape"};
  SymbolicDType dtype, out_dtype;
  SymbolicDevice device;
  TensorMatcher({k_shape, -1}).with_strides({-1, 1}).with_dtype<fp16_t, bf16_t, fp32_t>(dtype).with_device(device).verify(k);
  TensorMatcher({v_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(v);
  TensorMatcher({k_out_shape, -1})
      .with_strides({-1, 1})
      .with_dtype<fp8_e4m3_t, fp8_e5m2_t, uint8_t>(out_dtype)
      .with_device(device)
      .verify(k_out);
  TensorMatcher({v_out_shape, -1}).with_strides({-1, 1}).with_dtype(out_dtype).with_device(device).verify(v_out);
  const float* k_step = scale_of(k_scale, device);
  const float* v_step = scale_of(v_scale, device);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(loc);
  const TokenRows k_rows = tokens_of(k), v_rows = tokens_of(v, k);
  one_for_each_token(loc, k);
  const Slots k_slots = slots_in_rows(k_out, k), v_slots = slots_in_rows(v_out, v);
  as_many_slots(v_out, v_slots, k_out, k_slots);
  RuntimeCheck(mult >= 1, "mult must be at least 1, got ", mult);
  RuntimeCheck(offset >= 0, "offset must be at least 0, got ", offset);
  const Slots k_some = k_slots.every(mult, offset), v_some = v_slots.every(mult, offset);
  const DLDataType to = fp8_of(k_out.dtype());

  const Conversion k_stored = Conversion::narrowing(k.dtype(), to, k_step),
                   v_stored = Conversion::narrowing(v.dtype(), to, v_step);
  store<Index>({k.data_ptr(), k_out.data_ptr(), k_rows, k_some, k_stored, offset * k_slots.stride},
               {v.data_ptr(), v_out.data_ptr(), v_rows, v_some, v_stored, offset * v_slots.stride}, loc);
}

template <typename Index>
void gather_kv_cache(TensorView cache, TensorView indices, std::optional<TensorView> scale, int64_t page_size,
                     std::optional<DLDataType> dtype, Output& out) {
  SymbolicDims cache_shape{"cache_shape"};
  SymbolicDevice device;
  TensorMatcher({cache_shape, -1}).with_strides({-1, 1}).with_device(device).verify(cache);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices);
  const float* step = scale_of(scale, device);
  const Slots slots = slots_of(cache);
  const int64_t pages = pages_of(cache, slots, page_size);
  only_fp8_has(scale, cache);
  const DLDataType to = gathered_as(cache, step != nullptr, dtype);
  const int64_t rows = indices.size(0) * page_size;
  const bool heads = cache.dim() > 2;
  const int64_t shape[] = {rows, heads ? slots.heads.count : slots.heads.width, slots.heads.width};
  const TensorView gathered = out.empty({shape, heads ? 3 : 2}, to, cache.device());
  if (heads) {
    TensorMatcher({rows, shape[1], shape[2]}).with_strides({-1, -1, 1}).with_dtype(to).with_device(device).verify(gathered);
  } else {
    TensorMatcher({rows, shape[1]}).with_strides({-1, 1}).with_dtype(to).with_device(device).verify(gathered);
  }
  const TokenRows target = tokens_of(gathered);

  check_indices<Index>(indices, pages, Skip::kMinusOne);
  const Conversion conversion =
      to == cache.dtype() ? Conversion::copy(bytes_of(cache)) : Conversion::widening(cache.dtype(), to, step);
  const Part part{cache.data_ptr(), gathered.data_ptr(), target, slots, conversion};
  const Index* page_of = static_cast<const Index*>(indices.data_ptr());
  const int64_t bytes = to.bits / 8;
  parallel_for(rows, grain_of(slots.heads.elements()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t page = page_of[row / page_size * indices.stride(0)];
      if (page >= 0) {
        part.load(row, page * page_size + row % page_size);
        continue;
      }
      for (int64_t head = 0; head < target.heads.count; ++head) {
        std::memset(static_cast<char*>(gathered.data_ptr()) + (row * target.stride + head * target.heads.stride) * bytes, 0,
                    static_cast<size_t>(target.heads.width * bytes));
      }
    }
  });
}

}  // namespace jitk

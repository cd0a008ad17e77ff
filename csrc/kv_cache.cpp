// Rows of tokens into the slots of a KV cache and out of it. A row is copied by its bytes, or cast to 8-bit floats and back.
#include "kv_cache_arguments.h"

#include <jitk/index.h>   // check_indices
#include <jitk/result.h>  // parallel_for

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

// One row, into its slot or out of it.
struct Part {
  CachedRows all;
  Conversion conversion;

  void store(int64_t token, int64_t slot) const {
    const Segments segments = all.segments();
    const int64_t source = token * all.rows.stride, target = all.slots.place(slot) + all.column;
    for (int64_t i = 0; i < segments.count; ++i) {
      conversion.run(all.tokens.data_ptr(), source + i * segments.first_stride, all.cache.data_ptr(),
                     target + i * segments.second_stride, segments.width);
    }
  }
  void load(int64_t token, int64_t slot) const {
    const Segments segments = all.segments();
    const int64_t source = all.slots.place(slot), target = token * all.rows.stride;
    for (int64_t i = 0; i < segments.count; ++i) {
      conversion.run(all.cache.data_ptr(), source + i * segments.second_stride, all.tokens.data_ptr(),
                     target + i * segments.first_stride, segments.width);
    }
  }
};

Part part_to_store(const CachedRows& x, Stored stored) {
  if (stored == Stored::kCopy) return {x, Conversion::copy(bytes_of(x.tokens))};
  return {x, Conversion::narrowing(x.tokens.dtype(), stored == Stored::kE4m3 ? kE4m3 : kE5m2, x.scale)};
}

template <typename Index>
void store(const Stores& stores, const TensorView& indices) {
  check_indices<Index>(indices, stores.first.slots.count, Skip::kMinusOne);
  const Part first = part_to_store(stores.first, stores.stored), second = part_to_store(stores.second, stores.stored);
  const Index* slot_of = static_cast<const Index*>(indices.data_ptr());
  const int64_t step = indices.stride(0), width = first.all.width() + second.all.width();
  parallel_for(first.all.rows.tokens, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = slot_of[token * step];
      if (slot < 0) continue;
      first.store(token, slot);
      second.store(token, slot);
    }
  });
}

}  // namespace

template <typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices,
                    std::optional<TensorView> k_scale, std::optional<TensorView> v_scale) {
  store<Index>(match_store<Index>(k, v, k_cache, v_cache, indices, k_scale, v_scale), indices);
}

template <typename Index>
void store_mla_cache(TensorView latent, TensorView rope, TensorView cache, TensorView indices,
                     std::optional<TensorView> scale) {
  store<Index>(match_store_mla<Index>(latent, rope, cache, indices, scale), indices);
}

template <typename Index>
void downcast_fp8(TensorView k, TensorView v, TensorView k_out, TensorView v_out, TensorView k_scale, TensorView v_scale,
                  TensorView loc, int64_t mult, int64_t offset) {
  store<Index>(match_downcast<Index>(k, v, k_out, v_out, k_scale, v_scale, loc, mult, offset), loc);
}

template <typename Index>
void gather_kv_cache(TensorView cache, TensorView indices, std::optional<TensorView> scale, int64_t page_size,
                     std::optional<DLDataType> dtype, Output& out) {
  const Gathered gathered = match_gather<Index>(cache, indices, scale, page_size, dtype, out);
  check_indices<Index>(indices, gathered.pages, Skip::kMinusOne);
  const TensorView& target = gathered.rows.tokens;
  const TokenRows& rows = gathered.rows.rows;
  const DLDataType to = target.dtype();
  const Part part{gathered.rows, to == cache.dtype() ? Conversion::copy(bytes_of(cache))
                                                     : Conversion::widening(cache.dtype(), to, gathered.rows.scale)};
  const Index* page_of = static_cast<const Index*>(indices.data_ptr());
  const int64_t bytes = to.bits / 8;
  parallel_for(rows.tokens, grain_of(gathered.rows.width()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t page = page_of[row / page_size * indices.stride(0)];
      if (page >= 0) {
        part.load(row, page * page_size + row % page_size);
        continue;
      }
      for (int64_t head = 0; head < rows.heads.count; ++head) {
        std::memset(static_cast<char*>(target.data_ptr()) + (row * rows.stride + head * rows.heads.stride) * bytes, 0,
                    static_cast<size_t>(rows.heads.width * bytes));
      }
    }
  });
}

}  // namespace jitk

// What the ops on KV caches are given, matched once for the CPU and for a GPU.
//
//   const Stores stores = match_store<Index>(k, v, k_cache, v_cache, indices, k_scale, v_scale);
//   const Gathered gathered = match_gather<Index>(cache, indices, scale, page_size, dtype, out);
//
// Left out: the values of indices (index.h, index.cuh), and what is done with rows.
#pragma once

#include <jitk/cache_dtype.h>  // stored_as, scale_of
#include <jitk/result.h>       // Output
#include <jitk/slots.h>        // tokens_of, slots_of

#include <optional>  // scales

#if defined(__CUDACC__)
#include <jitk/fp8.cuh>  // the 8-bit floats, which are CUDA's there
#endif

namespace jitk {

// Two tensors of tokens, which go into two caches or into two parts of one.
struct Stores {
  host::CachedRows first, second;
  Stored stored;
  DLDevice device;
};

struct Gathered {
  host::CachedRows rows;  // the tokens are what is gathered
  int64_t pages;
  DLDevice device;
};

namespace host {

template <typename Index>
Stores match_store(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                   const TensorView& indices, const std::optional<TensorView>& k_scale,
                   const std::optional<TensorView>& v_scale, DebugInfo where = {}) {
  SymbolicDims k_shape{"k_shape"}, v_shape{"v_shape"}, k_cache_shape{"k_cache_shape"}, v_cache_shape{"v_cache_shape"};
  SymbolicDType dtype, cache_dtype;
  SymbolicDevice device;
  TensorMatcher({k_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(k, where);
  TensorMatcher({v_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(v, where);
  TensorMatcher({k_cache_shape, -1}).with_strides({-1, 1}).with_dtype(cache_dtype).with_device(device).verify(k_cache, where);
  TensorMatcher({v_cache_shape, -1}).with_strides({-1, 1}).with_dtype(cache_dtype).with_device(device).verify(v_cache, where);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices, where);
  const float* k_step = scale_of(k_scale, device, where);
  const float* v_step = scale_of(v_scale, device, where);
  const TokenRows k_rows = tokens_of(k, where), v_rows = tokens_of(v, k, where);
  one_for_each_token(indices, k, where);
  const Slots k_slots = slots_of(k_cache, k, where), v_slots = slots_of(v_cache, v, where);
  as_many_slots(v_cache, v_slots, k_cache, k_slots, where);
  const Stored stored = stored_as(k, k_cache, where);
  only_fp8_has(k_scale, k_cache, where);
  only_fp8_has(v_scale, v_cache, where);
  return {{k, k_cache, k_rows, k_slots, k_step}, {v, v_cache, v_rows, v_slots, v_step}, stored, device.unwrap()};
}

template <typename Index>
Stores match_store_mla(const TensorView& latent, const TensorView& rope, const TensorView& cache, const TensorView& indices,
                       const std::optional<TensorView>& scale, DebugInfo where = {}) {
  SymbolicDims latent_shape{"latent_shape"}, rope_shape{"rope_shape"}, cache_shape{"cache_shape"};
  SymbolicDType dtype;
  SymbolicDevice device;
  TensorMatcher({latent_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(latent, where);
  TensorMatcher({rope_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(rope, where);
  TensorMatcher({cache_shape, -1}).with_strides({-1, 1}).with_device(device).verify(cache, where);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices, where);
  const float* step = scale_of(scale, device, where);
  const TokenRows first = tokens_of_one_head(latent, where), second = tokens_of_one_head(rope, where);
  (void)tokens_of(rope, latent, where);
  one_for_each_token(indices, latent, where);
  const Slots slots = slots_of_both(cache, latent, rope, where);
  const Stored stored = stored_as(latent, cache, where);
  only_fp8_has(scale, cache, where);
  return {{latent, cache, first, slots, step}, {rope, cache, second, slots, step, first.heads.width}, stored, device.unwrap()};
}

template <typename Index>
Stores match_downcast(const TensorView& k, const TensorView& v, const TensorView& k_out, const TensorView& v_out,
                      const TensorView& k_scale, const TensorView& v_scale, const TensorView& loc, int64_t mult, int64_t offset,
                      DebugInfo where = {}) {
  SymbolicDims k_shape{"k_shape"}, v_shape{"v_shape"}, k_out_shape{"k_out_shape"}, v_out_shape{"v_out_shape"};
  SymbolicDType dtype, out_dtype;
  SymbolicDevice device;
  TensorMatcher({k_shape, -1})
      .with_strides({-1, 1})
      .with_dtype<fp16_t, bf16_t, fp32_t>(dtype)
      .with_device(device)
      .verify(k, where);
  TensorMatcher({v_shape, -1}).with_strides({-1, 1}).with_dtype(dtype).with_device(device).verify(v, where);
  TensorMatcher({k_out_shape, -1})
      .with_strides({-1, 1})
      .with_dtype<fp8_e4m3_t, fp8_e5m2_t, uint8_t>(out_dtype)
      .with_device(device)
      .verify(k_out, where);
  TensorMatcher({v_out_shape, -1}).with_strides({-1, 1}).with_dtype(out_dtype).with_device(device).verify(v_out, where);
  const float* k_step = scale_of(k_scale, device, where);
  const float* v_step = scale_of(v_scale, device, where);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(loc, where);
  const TokenRows k_rows = tokens_of(k, where), v_rows = tokens_of(v, k, where);
  one_for_each_token(loc, k, where);
  const Slots k_slots = slots_in_rows(k_out, k, where), v_slots = slots_in_rows(v_out, v, where);
  as_many_slots(v_out, v_slots, k_out, k_slots, where);
  RuntimeCheck(where, mult >= 1, "mult must be at least 1, got ", mult);
  RuntimeCheck(where, offset >= 0, "offset must be at least 0, got ", offset);
  return {{k, k_out, k_rows, k_slots.every(mult, offset), k_step, offset * k_slots.stride},
          {v, v_out, v_rows, v_slots.every(mult, offset), v_step, offset * v_slots.stride},
          fp8_of(k_out.dtype()) == kE4m3 ? Stored::kE4m3 : Stored::kE5m2,
          device.unwrap()};
}

template <typename Index>
Gathered match_gather(const TensorView& cache, const TensorView& indices, const std::optional<TensorView>& scale,
                      int64_t page_size, std::optional<DLDataType> dtype, Output& out, DebugInfo where = {}) {
  SymbolicDims cache_shape{"cache_shape"};
  SymbolicDevice device;
  TensorMatcher({cache_shape, -1}).with_strides({-1, 1}).with_device(device).verify(cache, where);
  TensorMatcher({-1}).with_strides({-1}).with_dtype<Index>().with_device(device).verify(indices, where);
  const float* step = scale_of(scale, device, where);
  const Slots slots = slots_of(cache, where);
  const int64_t pages = pages_of(cache, slots, page_size, where);
  only_fp8_has(scale, cache, where);
  const DLDataType to = gathered_as(cache, step != nullptr, dtype, where);
  const int64_t rows = indices.size(0) * page_size;
  const bool heads = cache.dim() > 2;
  const int64_t shape[] = {rows, heads ? slots.heads.count : slots.heads.width, slots.heads.width};
  const TensorView gathered = out.empty({shape, heads ? 3 : 2}, to, cache.device());
  if (heads) {
    TensorMatcher({rows, shape[1], shape[2]})
        .with_strides({-1, -1, 1})
        .with_dtype(to)
        .with_device(device)
        .verify(gathered, where);
  } else {
    TensorMatcher({rows, shape[1]}).with_strides({-1, 1}).with_dtype(to).with_device(device).verify(gathered, where);
  }
  return {{gathered, cache, tokens_of(gathered, where), slots, step}, pages, device.unwrap()};
}

}  // namespace host
}  // namespace jitk

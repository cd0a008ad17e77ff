// Rows of tokens into the slots of a KV cache and out of it, K and V in one launch. What moves them is move_rows.cuh; here is
// what each op takes for its rows and slots.
#include <jitk/cache_dtype.h>  // stored_as, scale_of
#include <jitk/result.h>       // Output
#include <jitk/slots.h>        // tokens_of, slots_of

#include <jitk/move_rows.cuh>

#include <optional>  // scales

namespace jitk {
namespace {

struct StoreKV {
  static constexpr bool kCopies = true;
  static constexpr bool kGathers = false;
  JITK_DEVICE static const char* indices() { return "jitk::store_kv_cache: indices"; }
};
struct Downcast {
  static constexpr bool kCopies = false;
  static constexpr bool kGathers = false;
  JITK_DEVICE static const char* indices() { return "jitk::downcast_fp8: loc"; }
};
struct Gather {
  static constexpr bool kCopies = true;
  static constexpr bool kGathers = true;
  JITK_DEVICE static const char* indices() { return "jitk::gather_kv_cache: indices"; }
};
struct StoreMLA {
  static constexpr bool kCopies = true;
  static constexpr bool kGathers = false;
  JITK_DEVICE static const char* indices() { return "jitk::store_mla_cache: indices"; }
};

}  // namespace

template <typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices,
                    std::optional<TensorView> k_scale, std::optional<TensorView> v_scale) {
  using namespace host;
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
  const Stored stored = stored_as(k, k_cache);
  only_fp8_has(k_scale, k_cache);
  only_fp8_has(v_scale, v_cache);

  const CheckedIndices checked(indices, k_slots.count, device.unwrap(), Skip::kMinusOne);
  moves::move_rows<StoreKV, Index>({{k, k_cache, k_rows, k_slots, k_step},
                                    {v, v_cache, v_rows, v_slots, v_step},
                                    indices,
                                    k_rows.tokens,
                                    1,
                                    stored,
                                    device.unwrap(),
                                    checked},
                                   k.dtype());
  checked.report();
}

template <typename Index>
void store_mla_cache(TensorView latent, TensorView rope, TensorView cache, TensorView indices,
                     std::optional<TensorView> scale) {
  using namespace host;
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
  const Stored stored = stored_as(latent, cache);
  only_fp8_has(scale, cache);

  const CheckedIndices checked(indices, slots.count, device.unwrap(), Skip::kMinusOne);
  moves::move_rows<StoreMLA, Index>({{latent, cache, first, slots, step},
                                     {rope, cache, second, slots, step, first.heads.width},
                                     indices,
                                     first.tokens,
                                     1,
                                     stored,
                                     device.unwrap(),
                                     checked},
                                    latent.dtype());
  checked.report();
}

template <typename Index>
void downcast_fp8(TensorView k, TensorView v, TensorView k_out, TensorView v_out, TensorView k_scale, TensorView v_scale,
                  TensorView loc, int64_t mult, int64_t offset) {
  using namespace host;
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

  const CheckedIndices checked(loc, k_some.count, device.unwrap(), Skip::kMinusOne);
  moves::move_rows<Downcast, Index>({{k, k_out, k_rows, k_some, k_step, offset * k_slots.stride},
                                     {v, v_out, v_rows, v_some, v_step, offset * v_slots.stride},
                                     loc,
                                     k_rows.tokens,
                                     1,
                                     to == kE4m3 ? Stored::kE4m3 : Stored::kE5m2,
                                     device.unwrap(),
                                     checked},
                                    k.dtype());
  checked.report();
}

template <typename Index>
void gather_kv_cache(TensorView cache, TensorView indices, std::optional<TensorView> scale, int64_t page_size,
                     std::optional<DLDataType> dtype, Output& out) {
  using namespace host;
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

  const CheckedIndices checked(indices, pages, device.unwrap(), Skip::kMinusOne);
  const Stored stored = to == cache.dtype() ? Stored::kCopy : stored_as(gathered, cache);
  const moves::Tensors tensors{gathered, cache, target, slots, step};
  moves::Tensors nothing = tensors;
  nothing.rows.heads = {};
  moves::move_rows<Gather, Index>({tensors, nothing, indices, rows, page_size, stored, device.unwrap(), checked}, to);
  checked.report();
}

}  // namespace jitk

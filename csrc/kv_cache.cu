// Rows of tokens into the slots of a KV cache and out of it, K and V in one launch. What moves them is move_rows.cuh; here is
// what each op takes for its rows and slots.
#include "kv_cache_arguments.h"

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

template <typename Op, typename Index>
void store(const Stores& stores, const TensorView& indices) {
  const host::CheckedIndices checked(indices, stores.first.slots.count, stores.device, Skip::kMinusOne);
  moves::move_rows<Op, Index>(
      {{stores.first}, {stores.second}, indices, stores.first.rows.tokens, 1, stores.stored, stores.device, checked},
      stores.first.tokens.dtype());
  checked.report();
}

}  // namespace

template <typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices,
                    std::optional<TensorView> k_scale, std::optional<TensorView> v_scale) {
  store<StoreKV, Index>(host::match_store<Index>(k, v, k_cache, v_cache, indices, k_scale, v_scale), indices);
}

template <typename Index>
void store_mla_cache(TensorView latent, TensorView rope, TensorView cache, TensorView indices,
                     std::optional<TensorView> scale) {
  store<StoreMLA, Index>(host::match_store_mla<Index>(latent, rope, cache, indices, scale), indices);
}

template <typename Index>
void downcast_fp8(TensorView k, TensorView v, TensorView k_out, TensorView v_out, TensorView k_scale, TensorView v_scale,
                  TensorView loc, int64_t mult, int64_t offset) {
  store<Downcast, Index>(host::match_downcast<Index>(k, v, k_out, v_out, k_scale, v_scale, loc, mult, offset), loc);
}

template <typename Index>
void gather_kv_cache(TensorView cache, TensorView indices, std::optional<TensorView> scale, int64_t page_size,
                     std::optional<DLDataType> dtype, Output& out) {
  const Gathered gathered = host::match_gather<Index>(cache, indices, scale, page_size, dtype, out);
  const TensorView& target = gathered.rows.tokens;
  const host::CheckedIndices checked(indices, gathered.pages, gathered.device, Skip::kMinusOne);
  const Stored stored = target.dtype() == cache.dtype() ? Stored::kCopy : host::stored_as(target, cache);
  moves::Tensors nothing{gathered.rows};
  nothing.rows.heads = {};
  moves::move_rows<Gather, Index>(
      {{gathered.rows}, nothing, indices, gathered.rows.rows.tokens, page_size, stored, gathered.device, checked},
      target.dtype());
  checked.report();
}

}  // namespace jitk

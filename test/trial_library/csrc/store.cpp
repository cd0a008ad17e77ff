// Stores rows of k and v in the slots of a cache, in the cache's dtype. A token whose index is -1 is not stored.
#include <jitk/result.h>  // parallel_for
#include <jitk/tensor.h>  // TensorMatcher

namespace trial {

using namespace jitk;
using namespace jitk::host;

template <typename T, typename Stored, typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices) {
  SymbolicSize tokens{"tokens"}, heads{"heads"}, head_dim{"head_dim"}, slots{"slots"};
  TensorMatcher({tokens, heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().verify(k).verify(v);
  TensorMatcher({slots, heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<Stored>().verify(k_cache).verify(v_cache);
  TensorMatcher({tokens}).with_dtype<Index>().verify(indices);

  const auto store = [&](TensorView x, TensorView cache, int64_t token, int64_t slot) {
    for (int64_t head = 0; head < heads.unwrap(); ++head) {
      const T* from = static_cast<const T*>(x.data_ptr()) + token * x.stride(0) + head * x.stride(1);
      Stored* to = static_cast<Stored*>(cache.data_ptr()) + slot * cache.stride(0) + head * cache.stride(1);
      for (int64_t i = 0; i < head_dim.unwrap(); ++i) to[i] = from_float<Stored>(to_float(from[i]));
    }
  };
  for (int64_t token = 0; token < tokens.unwrap(); ++token) {
    const int64_t slot = static_cast<const Index*>(indices.data_ptr())[token];
    RuntimeCheck(slot >= -1 && slot < slots.unwrap(), "index ", slot, " of token ", token, " is not below ", slots.unwrap());
    if (slot < 0) continue;
    store(k, k_cache, token, slot);
    store(v, v_cache, token, slot);
  }
}

}  // namespace trial

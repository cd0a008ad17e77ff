// Copies items of KV caches by index lists on the CPU, where a call has returned when all of it has arrived.
#include <jitk/index.h>   // check_indices
#include <jitk/items.h>   // match_kv
#include <jitk/result.h>  // parallel_for
#include <jitk/tensor.h>  // TensorMatcher

#include <cstring>   // memcpy
#include <optional>  // MLA has no v

namespace jitk {

namespace {

void match_place(const TensorList& layers) {
  for (const TensorView& view : layers) {
    host::RuntimeCheck(view.device().device_type == kDLCPU, "argument '", view.name(),
                       "' must be on the CPU as the indices are, got ", view.device());
  }
}

template <typename Index>
void copy_layers(const TensorList& dst, const Index* to, const TensorList& src, const Index* from, int64_t count,
                 const host::ItemCopy& copy) {
  if (copy.empty()) return;
  constexpr int64_t kGrain = 32768;  // bytes: fewer are done before a second thread has started
  const int64_t item_bytes = copy.rows * copy.width;
  for (int64_t layer = 0; layer < dst.size(); ++layer) {
    char* const written = static_cast<char*>(dst[layer].data_ptr());
    const char* const read = static_cast<const char*>(src[layer].data_ptr());
    host::parallel_for(count, item_bytes < kGrain ? kGrain / item_bytes : 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t row = 0; row < copy.rows; ++row) {
          memcpy(written + copy.dst.place(to[i], row), read + copy.src.place(from[i], row), static_cast<size_t>(copy.width));
        }
      }
    });
  }
}

template <typename Index>
void transfer(const TensorList& k_dst, const TensorList& v_dst, TensorView indices_dst, const TensorList& k_src,
              const TensorList& v_src, TensorView indices_src, int64_t max_blocks) {
  using namespace host;
  SymbolicSize items{"items"};
  TensorMatcher({items}).with_dtype<Index>().verify(indices_dst).verify(indices_src);
  RuntimeCheck(max_blocks >= 0, "argument 'max_blocks' must be 0 or more, got ", max_blocks);
  for (const TensorList* caches : {&k_dst, &v_dst, &k_src, &v_src}) match_place(*caches);
  const KVCopy copy = match_kv(k_dst, v_dst, k_src, v_src);
  if (k_dst.size() == 0) return;
  check_indices<Index>(indices_dst, copy.k.dst.count);
  check_indices<Index>(indices_src, copy.k.src.count);

  const Index* const to = static_cast<const Index*>(indices_dst.data_ptr());
  const Index* const from = static_cast<const Index*>(indices_src.data_ptr());
  copy_layers(k_dst, to, k_src, from, items.unwrap(), copy.k);
  copy_layers(v_dst, to, v_src, from, items.unwrap(), copy.v);
}

TensorList one(const TensorView& view) { return {&view, 1}; }
TensorList one(const std::optional<TensorView>& view) { return {view ? &*view : nullptr, view ? 1 : 0}; }

}  // namespace

template <typename Index>
void transfer_kv_one_layer(TensorView k_dst, std::optional<TensorView> v_dst, TensorView indices_dst, TensorView k_src,
                           std::optional<TensorView> v_src, TensorView indices_src, int64_t max_blocks) {
  transfer<Index>(one(k_dst), one(v_dst), indices_dst, one(k_src), one(v_src), indices_src, max_blocks);
}

template <typename Index>
void transfer_kv_all_layers(TensorList k_dst, TensorList v_dst, TensorView indices_dst, TensorList k_src, TensorList v_src,
                            TensorView indices_src, std::optional<TensorView> arrived, int64_t max_blocks) {
  host::SymbolicSize layers{"layers"};
  layers.set_value(k_dst.size(), "k_dst");
  if (arrived) host::TensorMatcher({layers}).with_dtype<int32_t>().verify(*arrived);
  transfer<Index>(k_dst, v_dst, indices_dst, k_src, v_src, indices_src, max_blocks);
  for (int64_t layer = 0; arrived && layer < k_dst.size(); ++layer) static_cast<int32_t*>(arrived->data_ptr())[layer] = 1;
}

inline void wait_kv_layer(TensorView k_cache, std::optional<TensorView> v_cache, TensorView arrived, int64_t layer) {
  using namespace host;
  (void)k_cache, (void)v_cache;
  SymbolicSize layers{"layers"};
  TensorMatcher({layers}).with_dtype<int32_t>().verify(arrived);
  RuntimeCheck(layer >= 0 && layer < layers.unwrap(), "argument 'layer' must be below ", layers.unwrap(),
               ", the layers of 'arrived', got ", layer);
  RuntimeCheck(static_cast<const int32_t*>(arrived.data_ptr())[layer] > 0, "layer ", layer,
               " has not arrived, and on the CPU no transfer is under way");
}

}  // namespace jitk

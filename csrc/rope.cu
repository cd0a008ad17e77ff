// Rotary position embedding of queries and keys in one pass over memory, with what stands around it in a model: the norm of heads
// before it, the store into the KV cache behind it. One kernel, rope_kernel.cuh, serves every op here.
#include "rope_arguments.h"
#include "rope_launch.cuh"

#include <jitk/cache_dtype.h>  // scale_of, only_fp8_has
#include <jitk/result.h>       // Output

#include <jitk/index.cuh>  // CheckedIndices

#include <optional>  // sections, scales

namespace jitk {
namespace {

using namespace rotary;

struct Options {
  int64_t head_dim;
  std::optional<IntList> section;
  bool interleaved;
};

Side side_of(const Heads& from, const Heads& to) {
  Side side{};
  side.from = from.data;
  side.to = to.data;
  side.from_batch = from.batch_stride, side.from_token = from.token_stride, side.from_head = from.head_stride;
  side.to_batch = to.batch_stride, side.to_token = to.token_stride, side.to_head = to.head_stride;
  host::RuntimeCheck(from.width <= 1 << 30 && from.count <= 1 << 30, "a head has at most 2^30 elements, and a token heads");
  side.width = static_cast<uint32_t>(from.width);
  side.heads = static_cast<uint32_t>(from.count);
  side.inverse_width = 1.0f / static_cast<float>(from.width);
  return side;
}

struct Weights {
  const TensorView& q;
  const TensorView& k;
  double eps;
  bool gemma;
};

struct Stores {
  const TensorView& v;
  const TensorView& k_cache;
  const TensorView& v_cache;
  const TensorView& indices;
  const std::optional<TensorView>& k_scale;
  const std::optional<TensorView>& v_scale;
};

template <typename F>
void store_side(Side& side, const TensorView& cache, const Heads& x, const std::optional<TensorView>& scale,
                host::SymbolicSize& blocks, host::SymbolicSize& block_size, host::SymbolicDevice& device) {
  host::SymbolicDType stored;
  const Slots slots = slots_of<typename F::Stored>(cache, x, blocks, block_size, stored, device);
  side.cache = slots.data;
  side.cache_block = slots.blocks > 1 ? slots.block_stride : 0;
  side.cache_slot = slots.block_size > 1 ? slots.slot_stride : 0;
  side.cache_head = x.count > 1 ? slots.head_stride : 0;
  host::only_fp8_has(scale, cache);
  side.scale = host::scale_of(scale, device);
}

// The kernel counts positions in 32 bits, and reads some row whatever it is asked for.
void check_positions_of(const TensorView& cache, const PositionRows& rows, const TensorView& positions) {
  using namespace host;
  RuntimeCheck(rows.max_position > 0 || positions.numel() == 0, "argument '", cache.name(), "' has no positions, got ",
               cache.shape());
  RuntimeCheck(rows.max_position <= int64_t{1} << 32, "argument '", cache.name(), "' has at most 4294967296 positions, got ",
               cache.shape());
}

// In place; `weights` of forms with a norm, `stores` of forms that store.
template <typename F>
void turn(const TensorView& q, const TensorView& k, const TensorView& cache, const TensorView& positions,
          const Options& options, const Weights* weights, const Stores* stores) {
  using namespace host;
  using T = typename F::T;
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, blocks{"blocks"}, block_size{"slots"};
  SymbolicDevice device;
  RuntimeCheck(cache.dim() == 2, "argument 'cos_sin_cache' must be [max_position, rope_dim], got ", cache.shape());
  const int64_t flat_dim = options.head_dim > 0 ? options.head_dim : cache.size(1);
  const auto heads = [&](const TensorView& x, SymbolicSize& count) {
    SymbolicSize width{"head_dim"};
    return heads_of<T>(x, options.head_dim, flat_dim, tokens, count, width, device);
  };
  const Heads qs = heads(q, q_heads), ks = heads(k, k_heads);
  const PositionRows rows = rows_of_positions(cache, positions, options.section, options.interleaved, tokens, device);
  check_rope_dim(rows.rope_dim(), qs.width);
  check_rope_dim(rows.rope_dim(), ks.width);

  Call<F> call{
      {side_of(qs, qs), side_of(ks, ks), Side{}}, {rows, tokens.unwrap(), {}}, FastDivisor(1), FastDivisor(1), FastDivisor(1)};
  call.half = static_cast<uint32_t>(rows.pairs);
  if constexpr (F::kNorm) {
    SymbolicDType dtype;
    const auto weight_of = [&](Side& side, const TensorView& weight) {
      SymbolicSize width{"head_dim"};
      width.set_value(side.width);
      TensorMatcher({width}).with_dtype<fp32_t, fp16_t, bf16_t>(dtype).with_device(device).verify(weight);
      side.weight = weight.data_ptr();
    };
    weight_of(call.sides[0], weights->q);
    weight_of(call.sides[1], weights->k);
    call.weight_kind = kind_of(weights->q.dtype());
    call.eps = static_cast<float>(weights->eps);
    call.one_plus = weights->gemma ? 1.0f : 0.0f;
  }
  const TensorView* indices = &positions;
  if constexpr (F::kStores) {
    const Heads vs = heads(stores->v, k_heads);
    call.sides[2] = side_of(vs, vs);
    store_side<F>(call.sides[1], stores->k_cache, ks, stores->k_scale, blocks, block_size, device);
    store_side<F>(call.sides[2], stores->v_cache, vs, stores->v_scale, blocks, block_size, device);
    indices = &stores->indices;
    TensorMatcher({tokens}).with_strides({-1}).with_dtype<int32_t, int64_t>().with_device(device).verify(*indices);
    call.indices = indices->data_ptr();
    call.index_stride = stride_of(*indices, 0);
    call.are_indices_wide = indices->dtype().bits == 64;
    call.slot_count = blocks.unwrap() * block_size.unwrap();
    call.block_size = FastDivisor(static_cast<uint64_t>(block_size.unwrap()));
  }
  check_positions_of(cache, rows, positions);
  const CheckedIndices checked(positions, rows.max_position, device.unwrap());
  const CheckedIndices checked_slots(*indices, call.slot_count, device.unwrap(), Skip::kMinusOne);
  call.angles.bounds = checked.bounds();
  call.slots = checked_slots.bounds();
  const uint64_t bytes = rows.kind == Kind::kFp32 ? 4 : 2;
  const uint64_t angle_places = places(rows.cache, bytes * (rows.row_stride | rows.pairs));
  launch<F>(call, tokens.unwrap(), rows.kind, angle_places, device.unwrap());
  checked.report();
  if constexpr (F::kStores) checked_slots.report();
}

template <typename F>
void turn_qk(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin, int64_t heads_dim,
             Output& q_out, Output& k_out) {
  using namespace host;
  using T = typename F::T;
  RuntimeCheck(heads_dim == 1 || heads_dim == 2, "unsqueeze_dim must be 1 or 2, got ", heads_dim);
  SymbolicSize batch{"batch"}, tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, width{"head_dim"};
  SymbolicDevice device;
  const Heads qs = heads_of_batch<T>(q, heads_dim, batch, tokens, q_heads, width, device);
  const Heads ks = heads_of_batch<T>(k, heads_dim, batch, tokens, k_heads, width, device);
  const TokenRows rows = rows_of_tokens(cos, sin, batch.unwrap(), tokens, device);
  check_rope_dim(rows.rope_dim, width.unwrap());
  const Heads qs_out = heads_of_batch<T>(q_out.empty_like(q), heads_dim, batch, tokens, q_heads, width, device);
  const Heads ks_out = heads_of_batch<T>(k_out.empty_like(k), heads_dim, batch, tokens, k_heads, width, device);

  Call<F> call{{side_of(qs, qs_out), side_of(ks, ks_out), Side{}},
               {rows},
               FastDivisor(1),
               FastDivisor(static_cast<uint64_t>(tokens.unwrap())),
               FastDivisor(1)};
  call.half = static_cast<uint32_t>(rows.rope_dim / 2);
  call.is_batched = batch.unwrap() > 1;
  const int64_t bytes = rows.kind == Kind::kFp32 ? 4 : 2;
  const int64_t strides = rows.cos_batch_stride | rows.cos_token_stride | rows.sin_batch_stride | rows.sin_token_stride;
  const uint64_t angle_places = places(rows.cos, rows.sin, static_cast<uint64_t>(bytes * (strides | call.half)));
  launch<F>(call, batch.unwrap() * tokens.unwrap(), rows.kind, angle_places, device.unwrap());
}

}  // namespace

// The ops, as ops/rope.py names them.

template <typename T, bool kNeox, int32_t kDims>
void apply_rope(TensorView q, TensorView k, TensorView cos_sin_cache, TensorView positions, int64_t head_dim,
                std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{head_dim, mrope_section, mrope_interleaved};
  turn<Form<T, OfPositions<kNeox, (kDims > 1)>, false, void, true>>(q, k, cos_sin_cache, positions, options, nullptr, nullptr);
}

template <typename T, bool kNeox, int32_t kDims>
void rope(TensorView input, TensorView cos_sin_cache, TensorView positions, int64_t head_dim,
          std::optional<IntList> mrope_section, bool mrope_interleaved, Output& out) {
  using namespace host;
  using F = Form<T, OfPositions<kNeox, (kDims > 1)>, false, void, false>;
  SymbolicSize tokens{"tokens"}, count{"heads"}, width{"head_dim"};
  SymbolicDims shape{"shape"};
  SymbolicDevice device;
  RuntimeCheck(cos_sin_cache.dim() == 2, "argument 'cos_sin_cache' must be [max_position, rope_dim], got ",
               cos_sin_cache.shape());
  const int64_t flat_dim = head_dim > 0 ? head_dim : cos_sin_cache.size(1);
  const Heads from = heads_of<T>(input, head_dim, flat_dim, tokens, count, width, device);
  const PositionRows rows = rows_of_positions(cos_sin_cache, positions, mrope_section, mrope_interleaved, tokens, device);
  check_rope_dim(rows.rope_dim(), from.width);
  const TensorView result = out.empty_like(input);
  TensorMatcher({shape}).with_strides({-1}).with_dtype<T>().verify(input).verify(result);
  const Heads to = heads_of<T>(result, head_dim, flat_dim, tokens, count, width, device);

  check_positions_of(cos_sin_cache, rows, positions);
  const CheckedIndices checked(positions, rows.max_position, device.unwrap());
  Call<F> call{{side_of(from, to), Side{}, Side{}},
               {rows, tokens.unwrap(), checked.bounds()},
               FastDivisor(1),
               FastDivisor(1),
               FastDivisor(1)};
  call.half = static_cast<uint32_t>(rows.pairs);
  const uint64_t bytes = rows.kind == Kind::kFp32 ? 4 : 2;
  launch<F>(call, tokens.unwrap(), rows.kind, places(rows.cache, bytes * (rows.row_stride | rows.pairs)), device.unwrap());
  checked.report();
}

template <typename T, bool kNeox, int32_t kDims>
void fused_qknorm_rope(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight, TensorView cos_sin_cache,
                       TensorView positions, double eps, bool gemma, int64_t head_dim, std::optional<IntList> mrope_section,
                       bool mrope_interleaved) {
  const Options options{head_dim, mrope_section, mrope_interleaved};
  const Weights weights{q_weight, k_weight, eps, gemma};
  turn<Form<T, OfPositions<kNeox, (kDims > 1)>, true, void, true>>(q, k, cos_sin_cache, positions, options, &weights, nullptr);
}

template <typename T, typename Stored, bool kNeox, int32_t kDims>
void apply_rope_store_kv(TensorView q, TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                         TensorView cos_sin_cache, TensorView positions, TensorView indices, std::optional<TensorView> k_scale,
                         std::optional<TensorView> v_scale, int64_t head_dim, std::optional<IntList> mrope_section,
                         bool mrope_interleaved) {
  const Options options{head_dim, mrope_section, mrope_interleaved};
  const Stores stores{v, k_cache, v_cache, indices, k_scale, v_scale};
  turn<Form<T, OfPositions<kNeox, (kDims > 1)>, false, Stored, true>>(q, k, cos_sin_cache, positions, options, nullptr,
                                                                      &stores);
}

template <typename T, typename Stored, bool kNeox, int32_t kDims>
void fused_qknorm_rope_store_kv(TensorView q, TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
                                TensorView q_weight, TensorView k_weight, TensorView cos_sin_cache, TensorView positions,
                                TensorView indices, double eps, std::optional<TensorView> k_scale,
                                std::optional<TensorView> v_scale, bool gemma, int64_t head_dim,
                                std::optional<IntList> mrope_section, bool mrope_interleaved) {
  const Options options{head_dim, mrope_section, mrope_interleaved};
  const Weights weights{q_weight, k_weight, eps, gemma};
  const Stores stores{v, k_cache, v_cache, indices, k_scale, v_scale};
  turn<Form<T, OfPositions<kNeox, (kDims > 1)>, true, Stored, true>>(q, k, cos_sin_cache, positions, options, &weights,
                                                                     &stores);
}

template <typename T, bool kNeox>
void rope_qk(TensorView q, TensorView k, TensorView cos, TensorView sin, int64_t unsqueeze_dim, Output& q_out, Output& k_out) {
  turn_qk<Form<T, OfTokens<kNeox, false>, false, void, false>>(q, k, cos, sin, unsqueeze_dim, q_out, k_out);
}

template <typename T, bool kNeox>
void rope_qk_backward(TensorView grad_q, TensorView grad_k, TensorView cos, TensorView sin, int64_t unsqueeze_dim,
                      Output& q_grad, Output& k_grad) {
  turn_qk<Form<T, OfTokens<kNeox, true>, false, void, false>>(grad_q, grad_k, cos, sin, unsqueeze_dim, q_grad, k_grad);
}

}  // namespace jitk

// Norms in one pass over memory: a row stays in registers between its sums and its output.
//
// One kernel serves every op here. The way of a call: match the tensors, here; where rows are (norm_rows.cuh); the choice of a
// team for each row (norm_spread.cuh); the launch (norm_launch.cuh); the kernel (norm_kernel.cuh), in which a thread has a part
// of a row (norm_part.cuh) and its team the row's statistics (norm_statistics.cuh).
#include "norm_launch.cuh"  // launch_rows
#include "norm_part.cuh"    // the norms
#include "norm_rows.cuh"    // Tokens, Heads

#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows, TensorMatcher

#include <optional>  // the bias

namespace jitk {
namespace {

template <typename T, typename W, typename Norm>
void normalize(TensorView input, const TensorView* residual, TensorView weight, const TensorView* bias, double eps,
               TensorView out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  SymbolicDevice device;
  Rows in, added, to;
  TensorMatcher({tokens, hidden}).with_rows(in).with_dtype<T>().with_device(device).verify(input);
  if (residual != nullptr)
    TensorMatcher({tokens, hidden}).with_rows(added).with_dtype<T>().with_device(device).verify(*residual);
  TensorMatcher({hidden}).with_dtype<W>().with_device(device).verify(weight);
  if (bias != nullptr) TensorMatcher({hidden}).with_dtype<W>().with_device(device).verify(*bias);
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<T>().with_device(device).verify(out);
  if (in.count == 1) in.stride = added.stride = to.stride = 0;

  const auto data = [](const TensorView* view) { return view != nullptr ? view->data_ptr() : nullptr; };
  const norm::Row<T, W> first{static_cast<const T*>(input.data_ptr()), static_cast<T*>(data(residual)),
                              static_cast<T*>(out.data_ptr()), static_cast<const W*>(weight.data_ptr()),
                              static_cast<const W*>(data(bias))};
  const norm::Tokens<T, W> rows{first, in.stride, added.stride, to.stride};
  norm::launch_rows<T, W, Norm>(rows, in.count, in.width, eps, device.unwrap());
}

}  // namespace

template <typename T, typename W>
void rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  normalize<T, W, norm::Rms>(input, nullptr, weight, nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void gemma_rmsnorm(TensorView input, TensorView weight, double eps, Output& out) {
  normalize<T, W, norm::GemmaRms>(input, nullptr, weight, nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void layernorm(TensorView input, TensorView weight, std::optional<TensorView> bias, double eps, Output& out) {
  normalize<T, W, norm::Layer>(input, nullptr, weight, bias ? &*bias : nullptr, eps, out.empty_like(input));
}

template <typename T, typename W>
void fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  normalize<T, W, norm::AddRms>(input, &residual, weight, nullptr, eps, input);
}

template <typename T, typename W>
void gemma_fused_add_rmsnorm(TensorView input, TensorView residual, TensorView weight, double eps) {
  normalize<T, W, norm::GemmaAddRms>(input, &residual, weight, nullptr, eps, input);
}

template <typename T, typename W>
void fused_qknorm(TensorView q, TensorView k, TensorView q_weight, TensorView k_weight, double eps) {
  using namespace host;
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, head_dim{"head_dim"};
  SymbolicDevice device;
  TensorMatcher({tokens, q_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(q);
  TensorMatcher({tokens, k_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(k);
  TensorMatcher({head_dim}).with_dtype<W>().with_device(device).verify(q_weight);
  TensorMatcher({head_dim}).with_dtype<W>().with_device(device).verify(k_weight);

  using Side = typename norm::Heads<T, W>::Side;
  const auto side = [](const TensorView& x, const TensorView& weight) {
    return Side{static_cast<T*>(x.data_ptr()), static_cast<const W*>(weight.data_ptr()), x.sizes_[0] > 1 ? x.strides_[0] : 0,
                x.sizes_[1] > 1 ? x.strides_[1] : 0};
  };
  const int64_t heads = q_heads.unwrap() + k_heads.unwrap();
  norm::Heads<T, W> place{side(q, q_weight), side(k, k_weight), static_cast<uint32_t>(q_heads.unwrap()),
                          FastDivisor(static_cast<uint64_t>(heads))};
  // Heads are counted in 32 bits.
  const int64_t tokens_per_launch = (int64_t{1} << 31) / max(heads, int64_t{1});
  for (int64_t done = 0; done < tokens.unwrap(); done += tokens_per_launch) {
    const int64_t rows = min(tokens.unwrap() - done, tokens_per_launch) * heads;
    norm::launch_rows<T, W, norm::Rms>(place, rows, head_dim.unwrap(), eps, device.unwrap());
    place.q.data += tokens_per_launch * place.q.token_stride;
    place.k.data += tokens_per_launch * place.k.token_stride;
  }
}

}  // namespace jitk

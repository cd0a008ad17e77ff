// The k largest of a row's softmax, and where they are. A warp is a row, and each round finds the next best of it.
#include <jitk/dtype.cuh>   // cast
#include <jitk/launch.cuh>  // LaunchKernel
#include <jitk/result.h>    // Output
#include <jitk/rows.h>      // Rows

#include <rank.h>  // rank_of, expert_of

namespace trial {

using namespace jitk;

constexpr uint32_t kWarps = 4;

template <typename T>
__device__ T warp_max(T x) {
  for (uint32_t step = 16; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

template <typename T>
__global__ void topk_kernel(const T* __restrict__ logits, int64_t logits_stride, float* __restrict__ weights,
                            int64_t weights_stride, int32_t* __restrict__ ids, int64_t ids_stride, int64_t rows,
                            uint32_t experts, uint32_t k) {
  using namespace device;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= rows) return;
  const T* x = logits + row * logits_stride;
  float largest = -INFINITY, sum = 0;
  for (uint32_t i = threadIdx.x; i < experts; i += 32) largest = max(largest, cast<float>(x[i]));
  largest = warp_max(largest);
  for (uint32_t i = threadIdx.x; i < experts; i += 32) sum += expf(cast<float>(x[i]) - largest);
  for (uint32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  unsigned long long last = ~0ull;
  for (uint32_t place = 0; place < k; ++place) {
    unsigned long long best = 0;
    for (uint32_t i = threadIdx.x; i < experts; i += 32) {
      const unsigned long long rank = rank_of(cast<float>(x[i]), i);
      if (rank < last && rank > best) best = rank;
    }
    last = best = warp_max(best);
    if (threadIdx.x != 0) continue;
    ids[row * ids_stride + place] = static_cast<int32_t>(expert_of(best));
    weights[row * weights_stride + place] = expf(cast<float>(x[expert_of(best)]) - largest) / sum;
  }
}

template <typename T>
void topk_softmax(TensorView logits, int64_t k, Output& weights_out, Output& ids_out) {
  using namespace host;
  SymbolicDims tokens{"tokens"};
  SymbolicSize experts{"experts"};
  SymbolicDevice device;
  Rows from, weighed, chosen;
  TensorMatcher({tokens, experts}).with_rows(from).with_dtype<T>().with_device(device).verify(logits);
  RuntimeCheck(k >= 0 && k <= from.width, "k must be from 0 to the number of experts, ", from.width, ", got ", k);
  Shape shape(logits.shape());
  shape[-1] = k;
  const TensorView weights = weights_out.empty(shape, dtype_of<float>(), logits.device());
  const TensorView ids = ids_out.empty(shape, dtype_of<int32_t>(), logits.device());
  TensorMatcher({tokens, k}).with_rows(weighed).with_dtype<float>().with_device(device).verify(weights);
  TensorMatcher({tokens, k}).with_rows(chosen).with_dtype<int32_t>().with_device(device).verify(ids);

  LaunchKernel(div_ceil(from.count, int64_t{kWarps}), dim3(32, kWarps), device.unwrap())(
      topk_kernel<T>, static_cast<const T*>(logits.data_ptr()), from.stride, static_cast<float*>(weights.data_ptr()),
      weighed.stride, static_cast<int32_t*>(ids.data_ptr()), chosen.stride, from.count, static_cast<uint32_t>(from.width),
      static_cast<uint32_t>(k));
}

}  // namespace trial

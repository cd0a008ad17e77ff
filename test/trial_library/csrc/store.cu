// Stores rows of k and v in the slots of a cache, in the cache's dtype. A token whose index is -1 is not stored. A block is a
// token.
#include <jitk/fp8.cuh>     // fp8_e4m3_t, cast
#include <jitk/launch.cuh>  // LaunchKernel
#include <jitk/tensor.h>    // TensorMatcher

namespace trial {

using namespace jitk;

struct Heads {
  void* data;
  int64_t row_stride, head_stride;

  explicit Heads(TensorView x) : data(x.data_ptr()), row_stride(x.stride(0)), head_stride(x.stride(1)) {}
  template <typename T>
  __device__ T* at(int64_t row, int64_t head) const {
    return static_cast<T*>(data) + row * row_stride + head * head_stride;
  }
};

template <typename T, typename Stored, typename Index>
__global__ void store_kernel(Heads k, Heads v, Heads k_cache, Heads v_cache, const Index* __restrict__ indices, uint32_t heads,
                             uint32_t head_dim) {
  using namespace device;
  const int64_t token = blockIdx.x;
  const int64_t slot = indices[token];
  if (slot < 0) return;
  for (uint32_t item = threadIdx.x; item < heads * head_dim; item += blockDim.x) {
    const uint32_t head = item / head_dim, i = item % head_dim;
    k_cache.at<Stored>(slot, head)[i] = cast<Stored>(cast<float>(k.at<T>(token, head)[i]));
    v_cache.at<Stored>(slot, head)[i] = cast<Stored>(cast<float>(v.at<T>(token, head)[i]));
  }
}

template <typename T, typename Stored, typename Index>
void store_kv_cache(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache, TensorView indices) {
  using namespace host;
  SymbolicSize tokens{"tokens"}, heads{"heads"}, head_dim{"head_dim"}, slots{"slots"};
  SymbolicDevice device;
  TensorMatcher({tokens, heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(k).verify(v);
  TensorMatcher({slots, heads, head_dim})
      .with_strides({-1, -1, 1})
      .with_dtype<Stored>()
      .with_device(device)
      .verify(k_cache)
      .verify(v_cache);
  TensorMatcher({tokens}).with_dtype<Index>().with_device(device).verify(indices);

  LaunchKernel(tokens.unwrap(), 256, device.unwrap())(store_kernel<T, Stored, Index>, Heads(k), Heads(v), Heads(k_cache),
                                                      Heads(v_cache), static_cast<const Index*>(indices.data_ptr()),
                                                      static_cast<uint32_t>(heads.unwrap()),
                                                      static_cast<uint32_t>(head_dim.unwrap()));
}

}  // namespace trial

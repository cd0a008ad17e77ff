// Rotary embedding of q and k in place: pairs (i, i + half) turn by the angle of their token's position. A block is a token.
#include <jitk/dtype.cuh>   // cast
#include <jitk/launch.cuh>  // LaunchKernel
#include <jitk/tensor.h>    // TensorMatcher

namespace trial {

using namespace jitk;

template <typename T>
struct Heads {
  T* data;
  int64_t count, token_stride, head_stride;

  explicit Heads(TensorView x)
      : data(static_cast<T*>(x.data_ptr())), count(x.size(1)), token_stride(x.stride(0)), head_stride(x.stride(1)) {}
};

template <typename T, typename Position>
__global__ void rope_kernel(Heads<T> q, Heads<T> k, const float* __restrict__ cos_sin_cache,
                            const Position* __restrict__ positions, uint32_t half) {
  using namespace device;
  const int64_t token = blockIdx.x;
  const float* cos = cos_sin_cache + static_cast<int64_t>(positions[token]) * 2 * half;
  const float* sin = cos + half;
  const uint32_t pairs = static_cast<uint32_t>(q.count + k.count) * half;
  for (uint32_t item = threadIdx.x; item < pairs; item += blockDim.x) {
    const uint32_t head = item / half, i = item % half;
    T* row = head < q.count ? q.data + token * q.token_stride + head * q.head_stride
                            : k.data + token * k.token_stride + (head - q.count) * k.head_stride;
    const float a = cast<float>(row[i]), b = cast<float>(row[i + half]);
    row[i] = cast<T>(a * cos[i] - b * sin[i]);
    row[i + half] = cast<T>(b * cos[i] + a * sin[i]);
  }
}

template <typename T, typename Position>
void rope(TensorView q, TensorView k, TensorView cos_sin_cache, TensorView positions) {
  using namespace host;
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, head_dim{"head_dim"};
  SymbolicDevice device;
  TensorMatcher({tokens, q_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(q);
  TensorMatcher({tokens, k_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().with_device(device).verify(k);
  TensorMatcher({-1, head_dim}).with_dtype<float>().with_device(device).verify(cos_sin_cache);
  TensorMatcher({tokens}).with_dtype<Position>().with_device(device).verify(positions);
  RuntimeCheck(head_dim.unwrap() % 2 == 0, "head_dim must be even, got ", head_dim.unwrap());

  LaunchKernel(tokens.unwrap(), 256, device.unwrap())(
      rope_kernel<T, Position>, Heads<T>(q), Heads<T>(k), static_cast<const float*>(cos_sin_cache.data_ptr()),
      static_cast<const Position*>(positions.data_ptr()), static_cast<uint32_t>(head_dim.unwrap() / 2));
}

}  // namespace trial

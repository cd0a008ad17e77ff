// Rotary embedding of q and k in place: pairs (i, i + half) turn by the angle of their token's position.
#include <jitk/result.h>  // parallel_for
#include <jitk/tensor.h>  // TensorMatcher

namespace trial {

using namespace jitk;
using namespace jitk::host;

template <typename T, typename Position>
void rope(TensorView q, TensorView k, TensorView cos_sin_cache, TensorView positions) {
  SymbolicSize tokens{"tokens"}, q_heads{"q_heads"}, k_heads{"k_heads"}, head_dim{"head_dim"}, rows{"rows"};
  TensorMatcher({tokens, q_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().verify(q);
  TensorMatcher({tokens, k_heads, head_dim}).with_strides({-1, -1, 1}).with_dtype<T>().verify(k);
  TensorMatcher({rows, head_dim}).with_dtype<float>().verify(cos_sin_cache);
  TensorMatcher({tokens}).with_dtype<Position>().verify(positions);
  RuntimeCheck(head_dim.unwrap() % 2 == 0, "head_dim must be even, got ", head_dim.unwrap());

  const int64_t half = head_dim.unwrap() / 2;
  const auto rotate = [=, &rows](TensorView x, int64_t token) {
    const Position position = static_cast<const Position*>(positions.data_ptr())[token];
    RuntimeCheck(position >= 0 && position < rows.unwrap(), "position ", static_cast<int64_t>(position), " of token ", token,
                 " is not below ", rows.unwrap());
    const float* cos = static_cast<const float*>(cos_sin_cache.data_ptr()) + position * 2 * half;
    const float* sin = cos + half;
    for (int64_t head = 0; head < x.size(1); ++head) {
      T* row = static_cast<T*>(x.data_ptr()) + token * x.stride(0) + head * x.stride(1);
      for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(row[i]), b = to_float(row[i + half]);
        row[i] = from_float<T>(a * cos[i] - b * sin[i]);
        row[i + half] = from_float<T>(b * cos[i] + a * sin[i]);
      }
    }
  };
  parallel_for(tokens.unwrap(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) rotate(q, token), rotate(k, token);
  });
}

}  // namespace trial

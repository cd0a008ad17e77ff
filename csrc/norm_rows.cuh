// Where the rows that are normalised are: of tensors with a stride between rows, or the heads of queries and keys.
//
//   place.row(i)        the i-th row, for the kernel
//   place.starts()      all that rows start at, for the launcher: it decides how wide their vectors are (vec.cuh)
#pragma once

#include <jitk/vec.cuh>  // places, strides_of

#include <jitk/fast_divisor.h>

namespace jitk::norm {

// Where the parts of a row are.
template <typename T, typename W>
struct Row {
  const T* input;
  T* residual;  // the input is added to it
  T* out;
  const W* weight;
  const W* bias;  // or null
};

// The rows of tensors. Strides count elements.
template <typename T, typename W>
struct Tokens {
  Row<T, W> first;
  int64_t input_stride;
  int64_t residual_stride;
  int64_t out_stride;

  JITK_DEVICE Row<T, W> row(int64_t i) const {
    return {first.input + i * input_stride, first.residual + i * residual_stride, first.out + i * out_stride, first.weight,
            first.bias};
  }
  uint64_t starts() const {
    return host::places(first.input, first.residual, first.out, first.weight, first.bias,
                        host::strides_of<T>(input_stride, residual_stride, out_stride));
  }
};

// The heads of queries and keys, normalised in place: each token's queries, then its keys.
template <typename T, typename W>
struct Heads {
  struct Side {
    T* data;
    const W* weight;
    int64_t token_stride;
    int64_t head_stride;

    uint64_t starts() const { return host::places(data, weight, host::strides_of<T>(token_stride, head_stride)); }
  };
  Side q;
  Side k;
  uint32_t q_heads;
  FastDivisor heads;

  JITK_DEVICE Row<T, W> row(int64_t i) const {
    const auto at = heads.divide(static_cast<uint32_t>(i));
    const bool is_q = at.remainder < q_heads;
    const uint32_t head = is_q ? at.remainder : at.remainder - q_heads;
    T* data = (is_q ? q.data : k.data) + at.quotient * (is_q ? q.token_stride : k.token_stride) +
              head * (is_q ? q.head_stride : k.head_stride);
    return {data, nullptr, data, is_q ? q.weight : k.weight, nullptr};
  }
  uint64_t starts() const { return q.starts() | k.starts(); }
};

}  // namespace jitk::norm

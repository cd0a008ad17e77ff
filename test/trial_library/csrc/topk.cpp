// The k largest of a row's softmax, and where they are.
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows

#include <cmath>   // exp
#include <rank.h>  // rank_of, expert_of

namespace trial {

using namespace jitk;
using namespace jitk::host;

template <typename T>
void topk_softmax(TensorView logits, int64_t k, Output& weights_out, Output& ids_out) {
  SymbolicDims tokens{"tokens"};
  SymbolicSize experts{"experts"};
  Rows from, weighed, chosen;
  TensorMatcher({tokens, experts}).with_rows(from).with_dtype<T>().verify(logits);
  RuntimeCheck(k >= 0 && k <= from.width, "k must be from 0 to the number of experts, ", from.width, ", got ", k);
  Shape shape(logits.shape());
  shape[-1] = k;
  const TensorView weights = weights_out.empty(shape, dtype_of<float>(), logits.device());
  const TensorView ids = ids_out.empty(shape, dtype_of<int32_t>(), logits.device());
  TensorMatcher({tokens, k}).with_rows(weighed).with_dtype<float>().verify(weights);
  TensorMatcher({tokens, k}).with_rows(chosen).with_dtype<int32_t>().verify(ids);

  for (int64_t row = 0; row < from.count; ++row) {
    const T* x = static_cast<const T*>(logits.data_ptr()) + row * from.stride;
    float largest = -INFINITY;
    double sum = 0;
    for (int64_t i = 0; i < from.width; ++i) largest = to_float(x[i]) > largest ? to_float(x[i]) : largest;
    for (int64_t i = 0; i < from.width; ++i) sum += std::exp(to_float(x[i]) - largest);
    uint64_t last = ~uint64_t{0};
    for (int64_t place = 0; place < k; ++place) {
      uint64_t best = 0;
      for (int64_t i = 0; i < from.width; ++i) {
        const uint64_t rank = rank_of(to_float(x[i]), static_cast<uint32_t>(i));
        if (rank < last && rank > best) best = rank;
      }
      last = best;
      static_cast<int32_t*>(ids.data_ptr())[row * chosen.stride + place] = static_cast<int32_t>(expert_of(best));
      static_cast<float*>(weights.data_ptr())[row * weighed.stride + place] =
          static_cast<float>(std::exp(to_float(x[expert_of(best)]) - largest) / sum);
    }
  }
}

}  // namespace trial

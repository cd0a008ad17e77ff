// Quantises each row to fp8 with a scale of its own. A NaN makes a scale of NaN, and so a row of them.
#include <jitk/result.h>  // Output
#include <jitk/rows.h>    // Rows

#include <cmath>  // fabs

namespace trial {

using namespace jitk;
using namespace jitk::host;

template <typename T>
void quant_fp8_per_token(TensorView input, Output& quantised, Output& step_of) {
  SymbolicDims tokens{"tokens"};
  SymbolicSize hidden{"hidden"};
  Rows from, to, scales;
  TensorMatcher({tokens, hidden}).with_rows(from).with_dtype<T>().verify(input);
  const TensorView out = quantised.empty(input.shape(), dtype_of<fp8_e4m3_t>(), input.device());
  Shape one(input.shape());
  one[-1] = 1;
  const TensorView scale = step_of.empty(one, dtype_of<float>(), input.device());
  TensorMatcher({tokens, hidden}).with_rows(to).with_dtype<fp8_e4m3_t>().verify(out);
  TensorMatcher({tokens, 1}).with_rows(scales).with_dtype<float>().verify(scale);
  RuntimeCheck(from.width > 0, "argument 'input' must have columns, got ", input.shape());

  for (int64_t row = 0; row < from.count; ++row) {
    const T* x = static_cast<const T*>(input.data_ptr()) + row * from.stride;
    fp8_e4m3_t* y = static_cast<fp8_e4m3_t*>(out.data_ptr()) + row * to.stride;
    float largest = 1e-10f;
    for (int64_t i = 0; i < from.width; ++i) {
      const float size = std::fabs(to_float(x[i]));
      largest = size <= largest || largest != largest ? largest : size;
    }
    const float step = largest / 448.0f;
    for (int64_t i = 0; i < from.width; ++i) y[i] = from_float<fp8_e4m3_t>(to_float(x[i]) / step);
    static_cast<float*>(scale.data_ptr())[row * scales.stride] = step;
  }
}

}  // namespace trial

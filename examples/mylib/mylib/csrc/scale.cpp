// scale_shift on the CPU: rows are shared among PyTorch's threads.
#include <mylib/scale_shift.h>

#include <jitk/result.h>  // Output, parallel_for

namespace mylib {

template <typename T, int32_t kGroup>
void scale_shift(TensorView input, TensorView scale, std::optional<TensorView> shift, Output& out) {
  const ScaleShift<T> call = match<T, kGroup>(input, scale, shift, out.empty_like(input));
  // In rows: fewer elements are done before a second thread has started.
  const int64_t grain = host::div_ceil(int64_t{32768}, call.hidden + 1);
  host::parallel_for(call.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < call.hidden; ++column) {
        const int64_t group = column / kGroup;
        const float shifted_by = call.shift != nullptr ? to_float(call.shift[group]) : 0.0f;
        const float value = to_float(call.input[row * call.input_stride + column]) * to_float(call.scale[group]) + shifted_by;
        call.out[row * call.out_stride + column] = from_float<T>(value);
      }
    }
  });
}

}  // namespace mylib

// The tutorial op on the CPU: adds a constant that is known when the kernel is compiled. docs/tutorial.md walks through it.
#include <jitk/result.h>  // Output, parallel_for
#include <jitk/tensor.h>  // TensorMatcher

namespace jitk {

template <int32_t kConstant>
void add_constant(TensorView src, Output& out) {
  using namespace host;
  const TensorView result = out.empty_like(src);
  // 1. Match.
  SymbolicDims shape{"shape"};
  TensorMatcher({shape}).with_dtype<int32_t>().with_device<kDLCPU>().verify(src).verify(result);
  // 2. Plan.
  const int32_t* from = static_cast<const int32_t*>(src.data_ptr());
  int32_t* to = static_cast<int32_t*>(result.data_ptr());
  constexpr int64_t kGrain = 32768;  // elements: fewer are done before a second thread has started
  // 3. Run. Unsigned, because an overflow of int32_t is undefined.
  parallel_for(src.numel(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      to[i] = static_cast<int32_t>(static_cast<uint32_t>(from[i]) + static_cast<uint32_t>(kConstant));
    }
  });
}

}  // namespace jitk

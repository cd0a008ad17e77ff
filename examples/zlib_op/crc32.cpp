// Checksums of rows of bytes, by zlib: rows are shared among PyTorch's threads.
#include <jitk/result.h>  // Output, parallel_for
#include <jitk/tensor.h>  // TensorMatcher

#include <zlib.h>

namespace zlib_op {

void crc32(jitk::TensorView data, jitk::Output& out) {
  using namespace jitk::host;
  // 1. Match.
  SymbolicDims rows{"rows"};
  SymbolicSize bytes{"bytes"};
  TensorMatcher({rows, bytes}).with_dtype<uint8_t>().verify(data);
  const jitk::TensorView to = out.empty(rows.value(), jitk::dtype_of<int64_t>(), data.device());
  TensorMatcher({rows}).with_dtype<int64_t>().verify(to);

  // 2. Plan.
  const auto* const from = static_cast<const Bytef*>(data.data_ptr());
  auto* const sums = static_cast<int64_t*>(to.data_ptr());
  const int64_t length = bytes.unwrap();
  const int64_t grain = 65536 / (length + 1) + 1;  // rows: fewer are done before a second thread has started

  // 3. Run.
  parallel_for(to.numel(), grain, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      sums[row] = static_cast<int64_t>(::crc32_z(0, from + row * length, static_cast<size_t>(length)));
    }
  });
}

}  // namespace zlib_op

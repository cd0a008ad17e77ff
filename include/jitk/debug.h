// Checks of indices that only debug builds make (JITK_DEBUG=1, which defines the macro of the same name).
//
//   return sizes_[JITK_CHECKED_INDEX(i, ndim_, "a dimension", name())];
//
// Without the macro that is `i`. With it an index outside of [0, count) is an exception on the host; on a GPU a line on the
// program's output, after which the kernel traps: compute-sanitizer and cuda-gdb then show where.
#pragma once

#ifndef JITK_DEBUG
#define JITK_CHECKED_INDEX(index, count, what, whose) (index)
#else
#define JITK_CHECKED_INDEX(index, count, what, whose) \
  ::jitk::details::checked_index(static_cast<int64_t>(index), static_cast<int64_t>(count), what, whose)

#include <cstdint>    // int64_t
#include <cstdio>     // snprintf, printf
#include <exception>  // std::exception

#ifdef __CUDACC__
#define JITK_DEBUG_BOTH __host__ __device__
#else
#define JITK_DEBUG_BOTH
#endif

namespace jitk {
namespace details {

class IndexError : public std::exception {
 public:
  IndexError(int64_t index, int64_t count, const char* what, const char* whose) {
    snprintf(text_, sizeof(text_), "%s %lld of %s, which has %lld", what, static_cast<long long>(index), whose,
             static_cast<long long>(count));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[256];
};

JITK_DEBUG_BOTH constexpr int64_t checked_index(int64_t index, int64_t count, const char* what, const char* whose) {
  if (index >= 0 && index < count) return index;
#ifdef __CUDA_ARCH__
  printf("jitk: %s %lld of %s, which has %lld, in block (%u, %u, %u), thread (%u, %u, %u)\n", what,
         static_cast<long long>(index), whose, static_cast<long long>(count), blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
         threadIdx.y, threadIdx.z);
  __trap();
  return 0;
#else
  throw IndexError(index, count, what, whose);
#endif
}

}  // namespace details
}  // namespace jitk

#undef JITK_DEBUG_BOTH
#endif

// Division by a number that is known at launch but not at compile time, in a few multiplications instead of a subroutine.
//
//   FastDivisor heads(q.size(1));                          on the host; 16 bytes, passed to the kernel by value
//   const auto [token, head] = heads.divide(thread);       in the kernel: quotient and remainder, of the type of `thread`
//   thread / heads, thread % heads
//
// Exact for every numerator of the type and every divisor from 1 to 2^64 - 1; signed numerators must not be negative. A 32-bit
// numerator takes two multiplications, a 64-bit one a 64-bit product and a correction. A divisor of 0, the size of an empty
// tensor, can be stored and passed but not divided by.
// Left out: signed division, divisors known at compile time (the compiler does as well).
#pragma once

#include <cstdint>      // uint64_t
#include <type_traits>  // which of the two widths

#if defined(__CUDACC__)
#include <jitk/arch.cuh>  // JITK_HOST_DEVICE
#else
#define JITK_HOST_DEVICE inline
#endif

namespace jitk {

// With M = floor((2^64 - 1) / d), and r = 2^64 - 1 - M d so that 0 <= r < d:
//
//   n M / 2^64  =  n / d - e,   e = n (1 + r) / (d 2^64)
//
// 64 bits. 1 + r <= d and n < 2^64 give 0 <= e < 1, so floor(n M / 2^64) is floor(n / d) or one less. The remainder that goes
// with it, below 2 d and at most n, tells which.
//
// 32 bits. (n + 1) M / 2^64 = (n + 1) / d - e', e' = (n + 1)(1 + r) / (d 2^64). Write n = q d + t with 0 <= t < d. The value is
// q + (t + 1) / d - e', below q + 1 because e' > 0. If d <= 2^32, then (n + 1)(1 + r) <= 2^32 2^32, so e' <= 1 / d, which is
// at most (t + 1) / d: the value is at least q, and its floor is q. If d > 2^32, then M < 2^32 and (n + 1) M < 2^64: the floor
// is 0, which is q.
class FastDivisor {
 public:
  template <typename N>
  struct Result {
    N quotient;
    N remainder;
  };

  JITK_HOST_DEVICE explicit constexpr FastDivisor(uint64_t divisor)
      : divisor_(divisor), low_(static_cast<uint32_t>(magic(divisor))), high_(static_cast<uint32_t>(magic(divisor) >> 32)) {}

  JITK_HOST_DEVICE constexpr uint64_t divisor() const { return divisor_; }

  template <typename N>
  JITK_HOST_DEVICE Result<N> divide(N n) const {
    static_assert(std::is_integral<N>::value, "only integers are divided");
    if constexpr (sizeof(N) <= 4) {
      const uint32_t numerator = static_cast<uint32_t>(n);
      const uint32_t quotient = divide_32(numerator);
      return {static_cast<N>(quotient), static_cast<N>(numerator - quotient * static_cast<uint32_t>(divisor_))};
    } else {
      const uint64_t numerator = static_cast<uint64_t>(n);
      uint64_t quotient = multiply_high(numerator, static_cast<uint64_t>(high_) << 32 | low_);
      uint64_t remainder = numerator - quotient * divisor_;
      if (remainder >= divisor_) {
        ++quotient;
        remainder -= divisor_;
      }
      return {static_cast<N>(quotient), static_cast<N>(remainder)};
    }
  }

  template <typename N>
  friend JITK_HOST_DEVICE N operator/(N n, const FastDivisor& divisor) {
    return divisor.divide(n).quotient;
  }
  template <typename N>
  friend JITK_HOST_DEVICE N operator%(N n, const FastDivisor& divisor) {
    return divisor.divide(n).remainder;
  }

 private:
  JITK_HOST_DEVICE static constexpr uint64_t magic(uint64_t divisor) { return divisor == 0 ? 0 : ~uint64_t{0} / divisor; }

  // floor((n + 1) M / 2^64), from the two halves of M: neither sum passes 64 bits.
  JITK_HOST_DEVICE uint32_t divide_32(uint32_t n) const {
    const uint64_t from_low = (static_cast<uint64_t>(n) * low_ + low_) >> 32;
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * high_ + from_low + high_) >> 32);
  }

  JITK_HOST_DEVICE static uint64_t multiply_high(uint64_t x, uint64_t y) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(x, y);
#else
    return static_cast<uint64_t>((static_cast<unsigned __int128>(x) * y) >> 64);
#endif
  }

  uint64_t divisor_;
  uint32_t low_;  // of M
  uint32_t high_;
};

}  // namespace jitk

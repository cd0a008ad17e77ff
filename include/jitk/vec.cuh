// Several elements in one memory instruction.
//
//   constexpr uint32_t kVec = device::kMaxVecBytes / sizeof(bf16_t);
//   using Vec = device::AlignedVector<bf16_t, kVec>;
//   const uint32_t vec = host::widest_vector<bf16_t>(input, host::strides_of<bf16_t>(row_stride, width));    the launcher
//   Vec x;                                                                                       the kernel
//   x.load(input, i);       x[0] = ...;       x.store(output, i);                                i counts vectors
//
// A vector reads and writes at multiples of its own size only; anything else is a misaligned address, which ends the CUDA
// context. Tensors start wherever a slice starts, so the launcher asks widest_vector, of pointers and of strides alike.
// Left out: tails (a second loop of single elements).
#pragma once

#include <jitk/arch.cuh>   // kMaxVecBytes
#include <jitk/debug.h>    // JITK_CHECKED_INDEX
#include <jitk/dtype.cuh>  // to_floats

#include <cstddef>      // size_t
#include <type_traits>  // the words of a size

namespace jitk {
namespace details {

struct alignas(32) Words8 {
  uint32_t word[8];
};

template <size_t kBytes>
using words_t = std::conditional_t<
    kBytes == 32, Words8,
    std::conditional_t<
        kBytes == 16, uint4,
        std::conditional_t<kBytes == 8, uint2,
                           std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>>;

// Past L1, which has no second use for it. Not by the read-only path (.nc): a kernel that starts early (PDL) or works in place
// must not meet a stale line. Volatile and "memory" keep it behind PDLWaitPrimary and barriers.
JITK_DEVICE void load_streaming(uint8_t& x, const void* from) {
  uint16_t wide;  // assembly has no register of a byte
  asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=h"(wide) : "l"(from) : "memory");
  x = static_cast<uint8_t>(wide);
}
JITK_DEVICE void load_streaming(uint16_t& x, const void* from) {
  asm volatile("ld.global.L1::no_allocate.u16 %0, [%1];" : "=h"(x) : "l"(from) : "memory");
}
JITK_DEVICE void load_streaming(uint32_t& x, const void* from) {
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
}
JITK_DEVICE void load_streaming(uint2& x, const void* from) {
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
}
JITK_DEVICE void load_streaming(uint4& x, const void* from) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
}
JITK_DEVICE void load_streaming(Words8& x, const void* from) {
  asm volatile("ld.global.L1::no_allocate.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3]), "=r"(x.word[4]), "=r"(x.word[5]),
                 "=r"(x.word[6]), "=r"(x.word[7])
               : "l"(from)
               : "memory");
}

// A plain load, but volatile: it stays where it is written among the loads above.
JITK_DEVICE void load_ordered(uint32_t& x, const void* from) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
}
JITK_DEVICE void load_ordered(uint2& x, const void* from) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
}
JITK_DEVICE void load_ordered(uint4& x, const void* from) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
}

template <typename Words>
JITK_DEVICE void store_streaming(const Words& x, void* to) {
  __stcs(static_cast<Words*>(to), x);
}
JITK_DEVICE void store_streaming(const Words8& x, void* to) {
  asm volatile("st.global.cs.v8.b32 [%8], {%0, %1, %2, %3, %4, %5, %6, %7};" ::"r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]),
               "r"(x.word[3]), "r"(x.word[4]), "r"(x.word[5]), "r"(x.word[6]), "r"(x.word[7]), "l"(to)
               : "memory");
}

JITK_DEVICE void load_streaming(uint4& x, const void* from, uint64_t policy) {
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from), "l"(policy)
               : "memory");
}
JITK_DEVICE void store_with_policy(const uint4& x, void* to, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w),
               "l"(policy)
               : "memory");
}

}  // namespace details

namespace device {

// How L2 treats what is loaded or stored. A load past L1 that names no policy is the first to leave L2 as well: with one, kernels
// at the limit of the memory were 5 to 8 percent faster (H200, 2026-11-20).
class L2Policy {
 public:
  JITK_DEVICE static L2Policy evict_unchanged() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
    return L2Policy(policy);
  }
  JITK_DEVICE uint64_t value() const { return value_; }

 private:
  JITK_DEVICE explicit L2Policy(uint64_t value) : value_(value) {}
  uint64_t value_;
};

// Bytes of the vectors that take a policy.
inline constexpr uint32_t kPolicyVecBytes = 16;

template <typename T, size_t N>
class AlignedVector {
  using Words = details::words_t<sizeof(T) * N>;  // in place of the elements, for CUDA's bf16x2_t would be copied one by one
  static_assert(N > 0 && (N & (N - 1)) == 0, "a vector has a power of two of elements");
  static_assert((sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) * N <= kMaxVecBytes,
                "a vector is at most 16 bytes, or 32 on Blackwell with CUDA 12.9 and later");

 public:
  // `data` points to vectors, and `offset` counts them.
  JITK_DEVICE void load(const void* data, int64_t offset = 0) { words_ = static_cast<const Words*>(data)[offset]; }
  JITK_DEVICE void store(void* data, int64_t offset = 0) const { static_cast<Words*>(data)[offset] = words_; }

  // For global memory that is read once, or not read again by this kernel: the caches keep what others need.
  JITK_DEVICE void load_streaming(const void* data, int64_t offset = 0) {
    details::load_streaming(words_, static_cast<const Words*>(data) + offset);
  }
  JITK_DEVICE void store_streaming(void* data, int64_t offset = 0) const {
    details::store_streaming(words_, static_cast<Words*>(data) + offset);
  }

  // In the order of the program with load_streaming, where the compiler would wait with it until the value is needed.
  JITK_DEVICE void load_ordered(const void* data, int64_t offset = 0) {
    details::load_ordered(words_, static_cast<const Words*>(data) + offset);
  }
  // With a policy for L2, and loads past L1, where the vector has kPolicyVecBytes. Narrower ones are loaded and stored as any: their
  // neighbours share a line of L1.
  JITK_DEVICE void load_streaming(const void* data, int64_t offset, L2Policy policy) {
    if constexpr (sizeof(Words) == kPolicyVecBytes) {
      details::load_streaming(words_, static_cast<const Words*>(data) + offset, policy.value());
    } else {
      load(data, offset);
    }
  }
  JITK_DEVICE void store(void* data, int64_t offset, L2Policy policy) const {
    if constexpr (sizeof(Words) == kPolicyVecBytes) {
      details::store_with_policy(words_, static_cast<Words*>(data) + offset, policy.value());
    } else {
      store(data, offset);
    }
  }

  JITK_DEVICE void fill(T value) {
#pragma unroll
    for (size_t i = 0; i < N; ++i) data()[i] = value;
  }

  JITK_DEVICE T& operator[](size_t i) { return data()[JITK_CHECKED_INDEX(i, N, "element", "an AlignedVector")]; }
  JITK_DEVICE const T& operator[](size_t i) const { return data()[JITK_CHECKED_INDEX(i, N, "element", "an AlignedVector")]; }
  JITK_DEVICE T* data() { return reinterpret_cast<T*>(&words_); }
  JITK_DEVICE const T* data() const { return reinterpret_cast<const T*>(&words_); }
  JITK_HOST_DEVICE static constexpr size_t size() { return N; }

 private:
  Words words_;
};

// The elements as floats and back, in pairs where the type packs, which takes half of the instructions. Rounds once, to nearest
// even.
template <typename T, size_t N>
JITK_DEVICE void to_floats(const AlignedVector<T, N>& vector, float (&values)[N]) {
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (size_t i = 0; i < N; i += 2) {
      const fp32x2_t pair = cast<fp32x2_t>(*reinterpret_cast<const packed_t<T>*>(vector.data() + i));
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (size_t i = 0; i < N; ++i) values[i] = cast<fp32_t>(vector[i]);
  }
}

template <typename T, size_t N>
JITK_DEVICE void from_floats(const float (&values)[N], AlignedVector<T, N>& vector) {
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (size_t i = 0; i < N; i += 2) {
      *reinterpret_cast<packed_t<T>*>(vector.data() + i) = cast<packed_t<T>>(fp32x2_t{values[i], values[i + 1]});
    }
  } else {
#pragma unroll
    for (size_t i = 0; i < N; ++i) vector[i] = cast<T>(values[i]);
  }
}

// N elements of a type wider than the loop's, split over as many vectors as needed: fp32 weights beside halves. Every place that
// is loaded is aligned to kAlignment bytes.
template <typename T, uint32_t N, uint32_t kAlignment>
class AlignedVectors {
  static constexpr uint32_t kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  static constexpr uint32_t kPart = (kBytes < kAlignment ? kBytes : kAlignment) / sizeof(T);

 public:
  // `data` points to the first of the N elements.
  JITK_DEVICE void load(const T* data) {
#pragma unroll
    for (uint32_t i = 0; i < N / kPart; ++i) parts_[i].load(data, i);
  }
  JITK_DEVICE void load_ordered(const T* data) {
#pragma unroll
    for (uint32_t i = 0; i < N / kPart; ++i) parts_[i].load_ordered(data, i);
  }
  JITK_DEVICE void to_floats(float (&values)[N]) const {
#pragma unroll
    for (uint32_t i = 0; i < N / kPart; ++i) {
      float part[kPart];
      device::to_floats(parts_[i], part);
#pragma unroll
      for (uint32_t j = 0; j < kPart; ++j) values[i * kPart + j] = part[j];
    }
  }

 private:
  AlignedVector<T, kPart> parts_[N / kPart];
};

}  // namespace device

namespace host {

inline uint64_t place(const void* data) { return reinterpret_cast<uintptr_t>(data); }
inline uint64_t place(uint64_t bytes) { return bytes; }

// All places that vectors start at, one on top of the other: a power of two divides the result if it divides each of them. A
// place is a pointer, a distance in bytes between two starts, or places().
template <typename... Places>
uint64_t places(Places... each) {
  return (uint64_t{0} | ... | place(each));
}

// Distances that count elements of T, in bytes: of strides, and of the width of rows that lie back to back.
template <typename T, typename... Elements>
uint64_t strides_of(Elements... each) {
  return sizeof(T) * static_cast<uint64_t>((int64_t{0} | ... | int64_t{each}));
}

// The widest vector of T that can be read at every place, in elements: kWidest bytes, else 4, which is a pair of halves, else
// one element.
template <typename T, uint32_t kWidest = device::kMaxVecBytes, typename... Places>
uint32_t widest_vector(Places... each) {
  static_assert(kWidest >= 4 && (kWidest & (kWidest - 1)) == 0 && sizeof(T) <= kWidest, "a vector holds whole elements");
  const uint64_t all = places(each...);
  const uint32_t bytes = all % kWidest == 0 ? kWidest : all % 4 == 0 ? 4 : 1;
  return bytes > sizeof(T) ? bytes / sizeof(T) : 1;
}

}  // namespace host
}  // namespace jitk

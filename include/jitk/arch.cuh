// The target of the build. No other header, and no kernel, asks about an architecture or a version of CUDA.
//
//   -DJITK_CUDA_ARCH=900                      the build injects it, in the spelling of __CUDA_ARCH__: 800, 900, 1000
//   fp16_t values[kMaxVecBytes / sizeof(fp16_t)];      the same number where a launch is planned and where it runs
//   PDLWaitPrimary<kUsePDL>();  ...  PDLTriggerSecondary<kUsePDL>();
//
// __CUDA_ARCH__ does not exist while host code is compiled: a vector width chosen by it would differ between the launcher and
// the kernel. So there is one architecture per compilation, and both sides read it here.
// Left out: properties of the device that runs (launch.cuh).
#pragma once

#include <cstdint>      // uint32_t
#include <type_traits>  // is_same

#if !defined(JITK_CUDA_ARCH)
#error "JITK_CUDA_ARCH is not defined: compile with -DJITK_CUDA_ARCH=900 for -gencode=arch=compute_90a,code=sm_90a"
#elif JITK_CUDA_ARCH < 700 || JITK_CUDA_ARCH % 10 != 0
#error "JITK_CUDA_ARCH is spelled as __CUDA_ARCH__ is, 900 for sm_90 and sm_90a, and starts at 700"
#endif
#if defined(__CUDA_ARCH__)
static_assert(__CUDA_ARCH__ == JITK_CUDA_ARCH,
              "JITK_CUDA_ARCH is not the architecture of -gencode; one compilation has one of them");
#endif

#define JITK_DEVICE __forceinline__ __device__
#define JITK_HOST_DEVICE __forceinline__ __host__ __device__

// Macros, for the inline assembly of kernels; everything else asks the constants below.
#define JITK_ARCH_HOPPER_OR_GREATER (JITK_CUDA_ARCH >= 900)
// 12.9 is the first compiler that knows 32-byte loads and stores.
#define JITK_ARCH_BLACKWELL_OR_GREATER \
  (JITK_CUDA_ARCH >= 1000 && (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 9)))
// A warp-wide float maximum in one instruction, on sm_100a and sm_103a but not on their portable subset. Device code only: the
// compiler says which of the two it compiles for to nobody else.
#if JITK_CUDA_ARCH >= 1000 && JITK_CUDA_ARCH < 1100 && \
    (defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
#define JITK_HAS_REDUX_F32 1
#else
#define JITK_HAS_REDUX_F32 0
#endif

namespace jitk::device {

inline constexpr uint32_t kWarpThreads = 32;
inline constexpr uint32_t kWarpSize = kWarpThreads;

// The widest load or store of global memory. Shared memory stays at 16.
inline constexpr uint32_t kMaxVecBytes = JITK_ARCH_BLACKWELL_OR_GREATER ? 32 : 16;

inline constexpr bool kHasWarpReduceInteger = JITK_CUDA_ARCH >= 800;
inline constexpr bool kPDLSupported = JITK_ARCH_HOPPER_OR_GREATER;

// The place of a thread in its group of kNumThreads consecutive lanes. It reads the lane register: right for every shape of
// block, which threadIdx.x % 32 is not.
template <uint32_t kNumThreads = kWarpThreads>
JITK_DEVICE uint32_t get_lane_id() {
  static_assert(kNumThreads >= 1 && kNumThreads <= 32 && (kNumThreads & (kNumThreads - 1)) == 0,
                "a group is a power of two of lanes");
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));  // not volatile: it never changes, and one read serves the whole kernel
  return kNumThreads == 32 ? lane : lane % kNumThreads;
}

// Programmatic dependent launch, for kernels launched with LaunchKernel::enable_pdl(). Nothing before Hopper.
//
// Wait returns when the kernels before this one in the stream have finished and their writes are visible. A thread must call it
// before it reads, or overwrites, what they use. Without it the launch order means nothing.
template <bool kUsePDL>
JITK_DEVICE void PDLWaitPrimary() {
  if constexpr (kUsePDL && kPDLSupported) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Trigger lets the next kernel start its blocks, once every block of this one has called it or ended. It orders no memory, the
// next kernel's wait does: so it may come early, and leaving it out only costs the overlap.
template <bool kUsePDL>
JITK_DEVICE void PDLTriggerSecondary() {
  if constexpr (kUsePDL && kPDLSupported) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Has the compiler compute the values here. It puts off address arithmetic and parameters until they are needed, which is behind
// a wait that the time before it was free for.
template <typename T>
JITK_DEVICE void compute_here(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a value is a register or two");
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("" ::"f"(value));
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("" ::"r"(value));
  } else {
    asm volatile("" ::"l"(value));
  }
}

// Has the compiler keep the value in a register, whatever it was computed from. It would read parameters again for each use,
// and compute again what they go through.
template <typename T>
JITK_DEVICE void keep_in_register(T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a value is a register or two");
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
}

}  // namespace jitk::device

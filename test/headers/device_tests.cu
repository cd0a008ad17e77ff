// Kernels that put the device half of the header library to work. test_headers_device.py compiles them for every architecture,
// reads their PTX, and calls them by name where there is a GPU:
//
//   jitk_test("casts fp32_t", buffers, count, extra)      device pointers, elements, one more number; returns a cudaError_t
//
// Every thread of a kernel writes what it got, so that Python compares each element with PyTorch or with exact integers.
#include <jitk/atomic.cuh>
#include <jitk/cta.cuh>
#include <jitk/fast_divisor.h>
#include <jitk/fp8.cuh>
#include <jitk/math.cuh>
#include <jitk/pointer.cuh>
#include <jitk/tile.cuh>
#include <jitk/vec.cuh>
#include <jitk/warp.cuh>

using namespace jitk;
using namespace jitk::device;

struct Buffers {
  void* at[12];
};

__device__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// Conversions, from one type to all: output k is of the k-th type.
template <typename To, typename From>
__device__ void cast_to(Buffers buffers, int output, From x, int64_t i) {
  store_as<To>(buffers.at[output], cast<To>(x), i);
}

template <typename From>
__global__ void casts(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const From x = load_as<From>(buffers.at[0], i);
  cast_to<fp32_t>(buffers, 1, x, i);
  cast_to<fp16_t>(buffers, 2, x, i);
  cast_to<bf16_t>(buffers, 3, x, i);
  cast_to<fp64_t>(buffers, 4, x, i);
  cast_to<int32_t>(buffers, 5, x, i);
  cast_to<int64_t>(buffers, 6, x, i);
  cast_to<fp8_e4m3_t>(buffers, 7, x, i);
  cast_to<fp8_e5m2_t>(buffers, 8, x, i);
}

template <typename From>
__global__ void casts_of_pairs(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const From x = load_as<From>(buffers.at[0], i);
  cast_to<fp32x2_t>(buffers, 1, x, i);
  cast_to<fp16x2_t>(buffers, 2, x, i);
  cast_to<bf16x2_t>(buffers, 3, x, i);
  cast_to<fp8x2_e4m3_t>(buffers, 4, x, i);
  cast_to<fp8x2_e5m2_t>(buffers, 5, x, i);
}

__global__ void casts_of_quads(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const fp32x4_t x = load_as<fp32x4_t>(buffers.at[0], i);
  cast_to<fp8x4_e4m3_t>(buffers, 1, x, i);
  cast_to<fp8x4_e5m2_t>(buffers, 2, x, i);
  cast_to<fp32x4_t>(buffers, 3, cast<fp8x4_e4m3_t>(x), i);
  cast_to<fp32x4_t>(buffers, 4, cast<fp8x4_e5m2_t>(x), i);
}

template <typename T>
__global__ void pair_arithmetic(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  using Trait = DTypeTrait<T>;
  const T x = load_as<T>(buffers.at[0], i);
  const T y = load_as<T>(buffers.at[1], i);
  store_as<T>(buffers.at[2], math::max(x, y), i);
  store_as<T>(buffers.at[3], math::min(x, y), i);
  store_as<T>(buffers.at[4], math::abs(x), i);
  store_as<T>(buffers.at[5], Trait::add(x, y), i);
  T swapped;
  unpack(swapped)[0] = unpack(x)[1];
  unpack(swapped)[1] = unpack(x)[0];
  store_as<T>(buffers.at[6], swapped, i);
}

// Vectors, stored in reverse so that an offset that is not multiplied by the size shows. Named for the test that reads the PTX.
#define COPY_KERNELS(NAME, T, N)                                                                                 \
  extern "C" __global__ void copy_##NAME(const void* __restrict__ in, void* __restrict__ out, int64_t count) {   \
    const int64_t i = thread_index();                                                                            \
    if (i >= count) return;                                                                                      \
    AlignedVector<T, N> x;                                                                                       \
    x.load(in, i);                                                                                               \
    x.store(out, count - 1 - i);                                                                                 \
  }                                                                                                              \
  extern "C" __global__ void stream_##NAME(const void* __restrict__ in, void* __restrict__ out, int64_t count) { \
    const int64_t i = thread_index();                                                                            \
    if (i >= count) return;                                                                                      \
    AlignedVector<T, N> x;                                                                                       \
    x.load_streaming(in, i);                                                                                     \
    x.store_streaming(out, count - 1 - i);                                                                       \
  }
COPY_KERNELS(1, uint8_t, 1)
COPY_KERNELS(2, uint8_t, 2)
COPY_KERNELS(4, bf16_t, 2)
COPY_KERNELS(8, fp8_e4m3_t, 8)
COPY_KERNELS(16, fp16_t, 8)
COPY_KERNELS(16_of_1, fp8_e5m2_t, 16)
COPY_KERNELS(16_of_4, bf16x2_t, 4)
COPY_KERNELS(16_of_8, int64_t, 2)
COPY_KERNELS(16_of_16, fp32x4_t, 1)
COPY_KERNELS(widest, bf16_t, kMaxVecBytes / sizeof(bf16_t))
COPY_KERNELS(widest_of_8, fp32x2_t, kMaxVecBytes / sizeof(fp32x2_t))

static_assert(AlignedVector<bf16_t, 8>::size() == 8 && alignof(AlignedVector<bf16_t, 8>) == 16);
static_assert(std::is_trivially_copyable_v<AlignedVector<bf16x2_t, 4>>);  // bf16x2_t itself is not
static_assert(kMaxVecBytes == (JITK_CUDA_ARCH >= 1000 ? 32 : 16) && kPDLSupported == (JITK_CUDA_ARCH >= 900));
static_assert(std::is_same_v<packed_t<bf16_t>, bf16x2_t> && std::is_void_v<packed_t<bf16x2_t>>);
static_assert(dtype_of<fp8_e4m3_t>() == DLDataType{kDLFloat8_e4m3fn, 8, 1});

__global__ void fill(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  AlignedVector<bf16_t, 8> x;
  x.fill(load_as<bf16_t>(buffers.at[0], i));
  x[3] = cast<bf16_t>(-1);
  x.store(buffers.at[1], i);
}

// Tiles: one block of 96 threads (three warps) copies; what a group does not reach keeps its old value.
template <typename T>
__device__ void copy_tiles(tile::Memory<T> memory, const void* in, void* out, int64_t count) {
  for (int64_t t = 0; memory.in_bound(count, t); ++t) memory.store(out, memory.load(in, t), t);
}

extern "C" __global__ void tile_copy(const void* __restrict__ in, void* __restrict__ out, int64_t count) {
  copy_tiles(tile::Memory<AlignedVector<bf16_t, 8>>::cta(96), in, out, count);
}

__global__ void tiles(Buffers buffers, int64_t count) {
  using Memory = tile::Memory<fp32x2_t>;
  const void* in = buffers.at[0];
  copy_tiles(Memory::cta(), in, buffers.at[1], count);
  if (threadIdx.x / kWarpThreads == 1) copy_tiles(Memory::warp(), in, buffers.at[2], count);
  if (threadIdx.x / 8 == 7) copy_tiles(Memory::warp(8), in, buffers.at[3], count);
  if (threadIdx.x == 95) copy_tiles(Memory::thread(), in, buffers.at[4], count);
}

template <typename T, uint32_t kStart, uint32_t kFinish>
__global__ void warp_reduce(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();  // count is whole warps
  const T x = load_as<T>(buffers.at[0], i);
  store_as<T>(buffers.at[1], warp::reduce_sum<kStart, kFinish>(x), i);
  store_as<T>(buffers.at[2], warp::reduce_max<kStart, kFinish>(x), i);
  store_as<T>(buffers.at[3], warp::reduce_min<kStart, kFinish>(x), i);
}

// A warp of which only the first 24 lanes are there.
__global__ void warp_reduce_masked(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (get_lane_id() >= 24) return;
  const float x = load_as<float>(buffers.at[0], i);
  store_as<float>(buffers.at[1], warp::reduce_sum<8>(x, 0x00ffffffu), i);
}

template <typename T, uint32_t kWidth>
__global__ void warp_scan(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  const T x = load_as<T>(buffers.at[0], i);
  store_as<T>(buffers.at[1], warp::inclusive_sum<kWidth>(x), i);
  store_as<T>(buffers.at[2], warp::inclusive_max<kWidth>(x), i);
  store_as<T>(buffers.at[3], warp::inclusive_min<kWidth>(x, threadIdx.x % kWarpThreads), i);
  store_as<T>(buffers.at[4], warp::broadcast<kWidth>(x, kWidth / 2), i);
  store_as<uint32_t>(buffers.at[5], get_lane_id<kWidth>(), i);
}

// Five reductions in a row through one buffer, by warps that are out of step.
template <typename T, uint32_t kNumThreads>
__global__ void cta_reduce(Buffers buffers, int64_t count) {
  __shared__ T shared[cta::kMaxWarps];
  const int64_t i = thread_index();
  const T x = load_as<T>(buffers.at[0], i);
  if (threadIdx.x / kWarpThreads % 3 == 0) __nanosleep(2000);
  const T sum = cta::reduce_sum<kNumThreads, cta::Buffer::kFresh>(x, shared);
  if (threadIdx.x / kWarpThreads % 3 == 1) __nanosleep(2000);
  const T largest = cta::reduce_max<kNumThreads>(x, shared);
  const T smallest = cta::reduce_min<kNumThreads>(x, shared);
  if (threadIdx.x / kWarpThreads % 3 == 2) __nanosleep(2000);
  const T sum_again = cta::reduce_sum<kNumThreads>(x, shared);
  const T largest_again = cta::reduce_max<kNumThreads>(x, shared);
  store_as<T>(buffers.at[1], sum, i);
  store_as<T>(buffers.at[2], largest, i);
  store_as<T>(buffers.at[3], smallest, i);
  store_as<T>(buffers.at[4], sum_again, i);
  store_as<T>(buffers.at[5], largest_again, i);
}

__global__ void functions(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const float x = load_as<float>(buffers.at[0], i);
  store_as<float>(buffers.at[1], math::sigmoid(x), i);
  store_as<float>(buffers.at[2], math::sigmoid_fast(x), i);
  store_as<float>(buffers.at[3], math::silu(x), i);
  store_as<float>(buffers.at[4], math::silu_fast(x), i);
  store_as<float>(buffers.at[5], math::softplus_fast(x), i);
  store_as<float>(buffers.at[6], math::exp2(x * math::log2e), i);
  store_as<float>(buffers.at[7], math::rsqrt(math::abs(x)), i);
  store_as<float>(buffers.at[8], math::tanh(x), i);
  store_as<float>(buffers.at[9], math::sin(x), i);
  store_as<float>(buffers.at[10], math::reciprocal_fast(x), i);
}

template <typename N>
__global__ void divide(Buffers buffers, int64_t count, FastDivisor divisor) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const auto [quotient, remainder] = divisor.divide(load_as<N>(buffers.at[0], i));
  store_as<N>(buffers.at[1], quotient, i);
  store_as<N>(buffers.at[2], remainder, i);
}

__global__ void atomics(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const float x = load_as<float>(buffers.at[0], i);
  atomic::max(static_cast<float*>(buffers.at[1]), x);
  atomic::min(static_cast<float*>(buffers.at[2]), x);
}

// The first kernel lets the second start at once, and writes late. Named, for the test that reads the PTX.
extern "C" __global__ void pdl_producer(float* data, int64_t count) {
  PDLTriggerSecondary<true>();
  for (int round = 0; round < 50; ++round) __nanosleep(10000);
  const int64_t i = thread_index();
  if (i < count) data[i] = static_cast<float>(i);
}
extern "C" __global__ void pdl_consumer(const float* data, float* out, int64_t count) {
  PDLWaitPrimary<true>();
  const int64_t i = thread_index();
  if (i >= count) return;
  AlignedVector<float, 1> x;
  x.load_streaming(data, i);
  x.store_streaming(out, i);
}
extern "C" __global__ void pdl_off(float* data) {
  PDLWaitPrimary<false>();
  *data = 1;
  PDLTriggerSecondary<false>();
}

using Case = void (*)(Buffers buffers, int64_t count, int64_t extra);

constexpr uint32_t kBlock = 256;

uint32_t blocks(int64_t count) { return static_cast<uint32_t>((count + kBlock - 1) / kBlock); }

template <void (*kKernel)(Buffers, int64_t)>
void each(Buffers buffers, int64_t count, int64_t) {
  kKernel<<<blocks(count), kBlock>>>(buffers, count);
}

template <void (*kKernel)(const void*, void*, int64_t)>
void copy(Buffers buffers, int64_t count, int64_t) {
  kKernel<<<blocks(count), kBlock>>>(buffers.at[0], buffers.at[1], count);
}

template <void (*kKernel)(Buffers, int64_t)>
void by_block(Buffers buffers, int64_t count, int64_t threads) {  // count is whole blocks
  kKernel<<<static_cast<uint32_t>(count / threads), static_cast<uint32_t>(threads)>>>(buffers, count);
}

template <typename N>
void divide_by(Buffers buffers, int64_t count, int64_t divisor) {
  divide<N><<<blocks(count), kBlock>>>(buffers, count, FastDivisor(static_cast<uint64_t>(divisor)));
}

void run_pdl(Buffers buffers, int64_t count, int64_t) {
  float* data = static_cast<float*>(buffers.at[0]);
  pdl_producer<<<blocks(count), kBlock>>>(data, count);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks(count));
  config.blockDim = dim3(kBlock);
  config.attrs = &attribute;
  config.numAttrs = kPDLSupported ? 1 : 0;
  cudaLaunchKernelEx(&config, pdl_consumer, static_cast<const float*>(data), static_cast<float*>(buffers.at[1]), count);
}

#define CASTS(T) {"casts " #T, each<casts<T>>}
#define CASTS_OF_PAIRS(T) {"casts_of_pairs " #T, each<casts_of_pairs<T>>}
#define COPIES(NAME) \
  {"copy " #NAME, copy<copy_##NAME>}, { "stream " #NAME, copy<stream_##NAME> }
#define WARP_REDUCE(T, START, FINISH) {"warp_reduce " #T " " #START " " #FINISH, each<warp_reduce<T, START, FINISH>>}
#define CTA_REDUCE(T, THREADS) {"cta_reduce " #T " " #THREADS, by_block<cta_reduce<T, THREADS>>}

struct Named {
  const char* name;
  Case run;
};

const Named kCases[] = {
    CASTS(fp32_t),
    CASTS(fp16_t),
    CASTS(bf16_t),
    CASTS(fp64_t),
    CASTS(bool),
    CASTS(int8_t),
    CASTS(uint8_t),
    CASTS(int16_t),
    CASTS(int32_t),
    CASTS(uint32_t),
    CASTS(int64_t),
    CASTS(uint64_t),
    CASTS(fp8_e4m3_t),
    CASTS(fp8_e5m2_t),
    CASTS_OF_PAIRS(fp32x2_t),
    CASTS_OF_PAIRS(fp16x2_t),
    CASTS_OF_PAIRS(bf16x2_t),
    CASTS_OF_PAIRS(fp8x2_e4m3_t),
    CASTS_OF_PAIRS(fp8x2_e5m2_t),
    {"casts_of_quads", each<casts_of_quads>},
    {"pair_arithmetic fp16x2_t", each<pair_arithmetic<fp16x2_t>>},
    {"pair_arithmetic bf16x2_t", each<pair_arithmetic<bf16x2_t>>},
    COPIES(1),
    COPIES(2),
    COPIES(4),
    COPIES(8),
    COPIES(16),
    COPIES(16_of_1),
    COPIES(16_of_4),
    COPIES(16_of_8),
    COPIES(16_of_16),
    COPIES(widest),
    COPIES(widest_of_8),
    {"fill", each<fill>},
    {"tiles", by_block<tiles>},
    WARP_REDUCE(fp32_t, 32, 1),
    WARP_REDUCE(fp32_t, 8, 1),
    WARP_REDUCE(fp32_t, 32, 8),
    WARP_REDUCE(fp32_t, 2, 1),
    WARP_REDUCE(fp32_t, 1, 1),
    WARP_REDUCE(int32_t, 32, 1),
    WARP_REDUCE(int32_t, 16, 2),
    WARP_REDUCE(uint32_t, 32, 1),
    WARP_REDUCE(int8_t, 32, 1),
    WARP_REDUCE(uint8_t, 32, 1),
    WARP_REDUCE(int64_t, 32, 1),
    WARP_REDUCE(fp64_t, 32, 1),
    WARP_REDUCE(fp16_t, 32, 1),
    WARP_REDUCE(bf16_t, 4, 1),
    WARP_REDUCE(bf16x2_t, 32, 1),
    WARP_REDUCE(fp32x2_t, 32, 1),
    {"warp_reduce_masked", each<warp_reduce_masked>},
    {"warp_scan fp32_t 32", each<warp_scan<fp32_t, 32>>},
    {"warp_scan int32_t 32", each<warp_scan<int32_t, 32>>},
    {"warp_scan int64_t 8", each<warp_scan<int64_t, 8>>},
    CTA_REDUCE(fp32_t, 32),
    CTA_REDUCE(fp32_t, 64),
    CTA_REDUCE(fp32_t, 96),
    CTA_REDUCE(fp32_t, 256),
    CTA_REDUCE(fp32_t, 992),
    CTA_REDUCE(fp32_t, 1024),
    CTA_REDUCE(fp32_t, cta::kBlockDim),
    CTA_REDUCE(int32_t, 160),
    CTA_REDUCE(int64_t, 1024),
    CTA_REDUCE(bf16_t, 256),
    {"functions", each<functions>},
    {"divide int64_t", divide_by<int64_t>},
    {"divide uint32_t", divide_by<uint32_t>},
    {"divide int32_t", divide_by<int32_t>},
    {"atomics", each<atomics>},
    {"pdl", run_pdl},
};

// Host code: no GPU needed.
extern "C" bool jitk_is_aligned(const void* pointer, int64_t stride_in_bytes) {
  return host::is_aligned<AlignedVector<bf16_t, 8>>(pointer, stride_in_bytes);
}
extern "C" const void* jitk_offset(const void* pointer, int32_t row, int64_t column) {
  return host::pointer::offset<fp32_t>(pointer, row, column);
}

extern "C" int jitk_test(const char* name, void* const* pointers, int count_of_pointers, int64_t count, int64_t extra) {
  Buffers buffers = {};
  for (int i = 0; i < count_of_pointers; ++i) buffers.at[i] = pointers[i];
  for (const Named& test : kCases) {
    if (strcmp(test.name, name) != 0) continue;
    test.run(buffers, count, extra);
    const cudaError_t launched = cudaGetLastError();
    return static_cast<int>(launched != cudaSuccess ? launched : cudaDeviceSynchronize());
  }
  return static_cast<int>(cudaErrorInvalidSymbol);
}

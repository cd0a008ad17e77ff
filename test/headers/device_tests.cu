// Kernels that put the device half of the header library to work. test_headers_device.py compiles them for every architecture,
// reads their PTX, and calls them by name where there is a GPU:
//
//   jitk_test("casts fp32_t", buffers, count, extra)      device pointers, elements, one more number; returns a cudaError_t
//
// Every thread of a kernel writes what it got, so that Python compares each element with PyTorch or with exact integers.
#include <jitk/cta.cuh>
#include <jitk/fast_divisor.h>
#include <jitk/fp8.cuh>
#include <jitk/math.cuh>
#include <jitk/overlap.cuh>
#include <jitk/pointer.cuh>
#include <jitk/share.cuh>
#include <jitk/spread.cuh>
#include <jitk/team.cuh>
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

// fp8_e8m0_t has no other arithmetic, and is made of a float.
__global__ void casts_of_e8m0(Buffers buffers, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const fp8_e8m0_t x = cast<fp8_e8m0_t>(load_as<fp32_t>(buffers.at[0], i));
  store_as<fp8_e8m0_t>(buffers.at[1], x, i);
  store_as<fp32_t>(buffers.at[2], cast<fp32_t>(x), i);
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
  store_as<T>(buffers.at[2], warp::inclusive_sum<kWidth>(x, threadIdx.x % kWarpThreads), i);
  store_as<uint32_t>(buffers.at[3], get_lane_id<kWidth>(), i);
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
  store_as<float>(buffers.at[1], math::sigmoid_fast(x), i);
  store_as<float>(buffers.at[2], math::exp2_fast(x * math::log2e), i);
  store_as<float>(buffers.at[3], math::rsqrt(math::abs(x)), i);
  store_as<float>(buffers.at[4], math::reciprocal_fast(x), i);
}

template <typename N>
__global__ void divide(Buffers buffers, int64_t count, FastDivisor divisor) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const auto [quotient, remainder] = divisor.divide(load_as<N>(buffers.at[0], i));
  store_as<N>(buffers.at[1], quotient, i);
  store_as<N>(buffers.at[2], remainder, i);
}

// Each thread's place in its team, and what the team reduces, twice.
template <Team kTeam>
__global__ void team_reduce(Buffers buffers, uint32_t lanes_log2) {
  __shared__ team::Buffer<kTeam, float> sums;
  __shared__ team::Buffer<kTeam, fp32x2_t> maxima;
  const auto member = team::join<kTeam>(lanes_log2);
  const int64_t i = thread_index();
  const float x = load_as<float>(buffers.at[0], i);
  team::meet<kTeam>();
  store_as<float>(buffers.at[1], team::sum(member, x, sums), i);
  store_as<fp32x2_t>(buffers.at[2], team::max(member, fp32x2_t{x, -x}, maxima), i);
  store_as<int64_t>(buffers.at[3], member.team(), i);
  store_as<uint32_t>(buffers.at[4], member.rank(), i);
  store_as<uint32_t>(buffers.at[5], member.size(), i);
}

// Each team counts in at its vectors of a row of `count`, which are single elements here.
template <Team kTeam, uint32_t kItems>
__global__ void team_share(Buffers buffers, int64_t count, uint32_t lanes_log2) {
  const auto member = team::join<kTeam>(lanes_log2);
  const Share<kTeam, kItems> share(member, static_cast<typename Share<kTeam, kItems>::Index>(count));
  int32_t* row = static_cast<int32_t*>(buffers.at[0]) + member.team() * count;
  share.each([&](uint32_t, auto at) { atomicAdd(row + at, 1); });
  team::meet<kTeam>();
}

// What follows from a line of a table: the grid of so many rows of so many vectors.
constexpr bool is_grid(Spread spread, int64_t rows, int64_t vectors, RowGrid expected) {
  const RowGrid grid = host::row_grid(spread, rows, vectors);
  return grid.blocks == expected.blocks && grid.threads == expected.threads && grid.lanes_log2 == expected.lanes_log2;
}
static_assert(is_grid({Team::kLanes, 1, 128}, 9, 16, {2, 128, 4}), "8 teams of 16 lanes to a block");
static_assert(is_grid({Team::kLanes, 2, 128}, 9, 34, {3, 128, 5}), "17 lanes are 32");
static_assert(is_grid({Team::kLanes, 0, 128}, 8, 1000, {2, 128, 5}), "at most a warp");
static_assert(is_grid({Team::kLanes, 4, 64}, 65, 1, {2, 64, 0}), "a lane each");
static_assert(is_grid({Team::kWarp, 2, 256}, 17, 40, {3, 256, 0}), "8 warps to a block");
static_assert(is_grid({Team::kBlock, 2, 0}, 7, 64, {7, 32, 0}), "one warp holds 64 vectors");
static_assert(is_grid({Team::kBlock, 2, 0}, 7, 65, {7, 64, 0}), "but not 65");
static_assert(is_grid({Team::kBlock, 0, 128}, 7, 100000, {7, 128, 0}), "any number of vectors");
static_assert(is_grid({Team::kCluster, 4, 0, 8}, 3, 32768, {24, 1024, 0}), "8 blocks to a row");
static_assert(host::holds({Team::kBlock, 2, 0}, 2048, 1024) && !host::holds({Team::kBlock, 2, 0}, 2049, 1024), "the last row");
static_assert(host::holds({Team::kLanes, 2, 128}, 64, 1024) && !host::holds({Team::kLanes, 2, 128}, 65, 1024), "of a warp");
static_assert(host::holds({Team::kWarp, 0, 256}, 100000, 1), "what is read again");

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

// Blocks of 256 threads, for a cluster four of them.
template <typename... Params>
void launch_teams(void (*kernel)(Params...), Team team, int64_t blocks_of_grid, Params... params) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 4;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(blocks_of_grid));
  config.blockDim = dim3(kBlock);
  config.attrs = &attribute;
  config.numAttrs = team == Team::kCluster ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, params...);
}

template <Team kTeam>
void reduce_teams(Buffers buffers, int64_t count, int64_t lanes_log2) {
  launch_teams(team_reduce<kTeam>, kTeam, count / kBlock, buffers, static_cast<uint32_t>(lanes_log2));
}
template <Team kTeam, uint32_t kItems>
void share_teams(Buffers buffers, int64_t count, int64_t blocks_of_grid) {
  launch_teams(team_share<kTeam, kItems>, kTeam, blocks_of_grid, buffers, count, 3u);
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
    {"casts_of_e8m0", each<casts_of_e8m0>},
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
    {"team_reduce lanes", reduce_teams<Team::kLanes>},
    {"team_reduce warp", reduce_teams<Team::kWarp>},
    {"team_reduce block", reduce_teams<Team::kBlock>},
    {"team_share lanes 4", share_teams<Team::kLanes, 4>},
    {"team_share block 2", share_teams<Team::kBlock, 2>},
    {"team_share block 0", share_teams<Team::kBlock, 0>},
#if JITK_ARCH_HOPPER_OR_GREATER
    {"team_reduce cluster", reduce_teams<Team::kCluster>},
    {"team_share cluster 2", share_teams<Team::kCluster, 2>},
#endif
    {"pdl", run_pdl},
};

// Host code: no GPU needed.
extern "C" uint32_t jitk_widest_vector(const void* pointer, int64_t stride, int64_t width) {
  return host::widest_vector<bf16_t, 16>(pointer, host::strides_of<bf16_t>(stride, width));
}
extern "C" uint32_t jitk_widest_vector_of_bytes(const void* pointer) { return host::widest_vector<uint8_t, 16>(pointer); }
extern "C" uint32_t jitk_widest_vector_of_doubles(const void* pointer) { return host::widest_vector<fp64_t, 16>(pointer); }
extern "C" int jitk_trigger(int64_t threads, int64_t block, int64_t sms) {
  return static_cast<int>(block == 0 ? host::choose_trigger(threads, sms)
                                     : host::choose_trigger(threads, static_cast<uint32_t>(block), sms));
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

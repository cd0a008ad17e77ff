// Copies items (rows or pages) of KV caches by index lists, between device memory and pinned host memory or within either.
//
// The bytes in flight over their round trip are the bandwidth. A read of host memory takes 1 to 2 us, so a link of 55 GB/s needs
// 100 KB under way at any moment: each thread loads eight vectors before it stores the first, and a block of 512 threads keeps
// 64 KB in flight. A few blocks fill the link, and `max_blocks` leaves the other SMs to compute.
// Layers are copied in order, each by all blocks: what comes first is there first, and `arrived` says so.
#include <jitk/items.h>   // match_kv
#include <jitk/tensor.h>  // TensorMatcher

#include <jitk/index.cuh>    // CheckedIndices
#include <jitk/launch.cuh>   // LaunchKernel
#include <jitk/pointer.cuh>  // pointer::offset
#include <jitk/vec.cuh>      // AlignedVector, widest_vector

#include <cassert>   // __assert_fail
#include <cstdio>    // printf
#include <optional>  // MLA has no v

namespace jitk {

namespace {

// Measured on an H200: with half as many threads, or vectors of a thread, two blocks do not keep the link busy.
constexpr uint32_t kThreads = 512;
constexpr uint32_t kWarps = kThreads / device::kWarpThreads;
constexpr uint32_t kUnroll = 8;
constexpr int64_t kUnit = kUnroll * device::kWarpThreads;  // vectors that a warp moves at a time
constexpr int64_t kBlocksForHost = 8;                      // enough for PCIe 5; a parameter where another link needs more
constexpr uint32_t kLayersAtOnce = 96;  // of one launch: their addresses are parameters, of which there are 4 KB

constexpr uint32_t kNone = ~0u;  // in place of a row

// The place of a vector: in a row of an item.
struct Place {
  int64_t item;
  uint32_t row, vector;
};

// The keys, or the values.
struct Plane {
  int64_t dst_stride, dst_row_stride, src_stride, src_row_stride;  // bytes
  uint32_t rows, vectors;                                          // of an item, of a row
  uint32_t turn;                                                   // units beyond whole rounds of the warps
  Place next, jump;                                                // from vector to vector of a thread, from unit to unit
};

template <typename Index, uint32_t kLayers>
struct Params {
  const Index* indices_dst;
  const Index* indices_src;
  device::Bounds bounds_dst, bounds_src;
  int64_t dst_count, src_count, items;  // of the caches, of the lists
  int32_t* arrived;                     // of the first layer; or null
  uint32_t layers, planes;
  Plane plane[2];
  void* dst[2][kLayers];
  const void* src[2][kLayers];
};

JITK_HOST_DEVICE Place place_of(uint64_t vector, uint32_t rows, uint32_t vectors) {
  const uint64_t row = vector / vectors;
  return {static_cast<int64_t>(row / rows), static_cast<uint32_t>(row % rows), static_cast<uint32_t>(vector % vectors)};
}

// Numbers of three digits are added, which spares a division for each vector.
JITK_DEVICE void advance(Place& at, const Place& step, uint32_t rows, uint32_t vectors) {
  at.vector += step.vector;
  at.row += step.row;
  at.item += step.item;
  if (at.vector >= vectors) {
    at.vector -= vectors;
    ++at.row;
  }
  if (at.row >= rows) {
    at.row -= rows;
    ++at.item;
  }
}

// All of one layer's keys or values, from the unit of this warp on. Loads pass L1 by, and not on the read-only path: the host, or
// a kernel before this one, has written what they read. False if an index was out of range, and not followed.
template <uint32_t kBytes, typename Index, typename Params>
JITK_DEVICE bool copy_plane(const Params& params, const Plane& plane, uint32_t unit, const void* src, void* dst) {
  using namespace device;
  using Vec = AlignedVector<uint8_t, kBytes>;
  Place at = place_of(uint64_t{unit} * kUnit + get_lane_id(), plane.rows, plane.vectors);
  bool right = true;
  while (at.item < params.items) {
    Index from_item[kUnroll], to_item[kUnroll];
    uint32_t row[kUnroll], vector[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const bool some = at.item < params.items;
      from_item[u] = some ? params.indices_src[at.item] : Index{0};
      to_item[u] = some ? params.indices_dst[at.item] : Index{0};
      row[u] = some ? at.row : kNone;
      vector[u] = at.vector;
      advance(at, plane.next, plane.rows, plane.vectors);
    }
    const void* from[kUnroll];
    void* to[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const bool inside = static_cast<uint64_t>(to_item[u]) < static_cast<uint64_t>(params.dst_count) &&
                          static_cast<uint64_t>(from_item[u]) < static_cast<uint64_t>(params.src_count);
      right = right && (inside || row[u] == kNone);
      const int64_t offset = int64_t{vector[u]} * kBytes;
      from[u] = pointer::offset(src, from_item[u] * plane.src_stride, row[u] * plane.src_row_stride, offset);
      to[u] = inside && row[u] != kNone
                  ? pointer::offset(dst, to_item[u] * plane.dst_stride, row[u] * plane.dst_row_stride, offset)
                  : nullptr;
    }
    Vec vectors[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (to[u] != nullptr) vectors[u].load_streaming(from[u]);
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (to[u] != nullptr) vectors[u].store(to[u]);
    }
    advance(at, plane.jump, plane.rows, plane.vectors);
  }
  return right;
}

// Where an index was out of range: says which, apart from the loop, whose registers a call would spill.
template <typename Params>
__device__ __noinline__ void refuse(const Params& params) {
  for (int64_t i = 0; i < params.items; ++i) {
    (void)params.bounds_dst.admit(params.indices_dst[i], i, "jitk::transfer_kv: indices_dst");
    (void)params.bounds_src.admit(params.indices_src[i], i, "jitk::transfer_kv: indices_src");
  }
}

// From 0 a flag goes down by 2 with each warp that is done, and the last one sets it to 1: above 0 the layer is there. One that
// was left at 1 works too, whose lowest bit is passed over. The warps' writes come before the flag, for who reads it with
// acquire semantics and for the kernels behind that. Warps, not blocks: one that is done goes on to the next layer at once, and
// does not leave the link idle while the others of its block wait for what they have asked for.
JITK_DEVICE void mark_arrived(int32_t* flag, uint32_t warps) {
  __syncwarp();
  if (device::get_lane_id() != 0) return;
  int32_t before;
  asm volatile("fence.acq_rel.sys;" ::: "memory");
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], -2;" : "=r"(before) : "l"(flag) : "memory");
  if (before >> 1 != 1 - static_cast<int32_t>(warps)) return;
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}

// Units are dealt to the warps of all blocks in turn, and each plane goes on where the one before it stopped: small planes are
// under way side by side, where the same few warps would copy one after the other.
template <uint32_t kBytes, typename Index, uint32_t kLayers>
__global__ void __launch_bounds__(kThreads) transfer_kernel(const __grid_constant__ Params<Index, kLayers> params) {
  device::PDLWaitPrimary<true>();
  // The next kernel is not let in before the end: its blocks would wait on SMs that are meant to compute.
  const uint32_t warps = gridDim.x * kWarps;
  uint32_t unit = threadIdx.x / device::kWarpThreads * gridDim.x + blockIdx.x;  // of a plane, that this warp begins with
  bool right = true;
  for (uint32_t layer = 0; layer < params.layers; ++layer) {
    for (uint32_t i = 0; i < params.planes; ++i) {
      const Plane& plane = params.plane[i];
      right = copy_plane<kBytes, Index>(params, plane, unit, params.src[i][layer], params.dst[i][layer]) && right;
      unit = unit >= plane.turn ? unit - plane.turn : unit + warps - plane.turn;
    }
    if (params.arrived != nullptr) mark_arrived(params.arrived + layer, warps);
  }
  if (__builtin_expect(!right, 0)) refuse(params);
}

// --- launch ---------------------------------------------------------------------------------------

// What a kernel on the device uses to get at the tensor.
void* address_on(DLDevice device, const TensorView& view, host::DebugInfo where = {}) {
  if (view.device().device_type == kDLCUDA || view.numel() == 0) {
    host::RuntimeCheck(where, view.device().device_type != kDLCUDA || view.device() == device, "argument '", view.name(),
                       "' is on another device\n  expected  ", device,
                       ", where the indices are, or pinned memory\n  got       ", view.device(), "\n  remedy: ", view.name(),
                       ".to('", device, "')");
    return view.data_ptr();
  }
  cudaPointerAttributes attributes;
  host::RuntimeDeviceCheck(cudaPointerGetAttributes(&attributes, view.data_ptr()), where);
  if (__builtin_expect(attributes.type == cudaMemoryTypeUnregistered || attributes.devicePointer == nullptr, 0)) {
    host::panic(where, "argument '", view.name(), "' is in pageable memory, which the device does not reach\n  expected  ",
                device, ", or pinned memory of the CPU\n  got       ", view.shape(), "  ", view.dtype(), "  ", view.device(),
                "\n  remedy: ", view.name(), ".pin_memory(), or torch.empty(..., pin_memory=True)");
  }
  return attributes.devicePointer;
}

Plane plan(const host::ItemCopy& copy, int64_t items, int64_t bytes, int64_t warps) {
  const int64_t vectors = copy.width / bytes;
  host::RuntimeCheck(vectors <= INT32_MAX && copy.rows <= INT32_MAX,
                     "an item has at most 2^31 - 1 rows of as many vectors, got ", copy.rows, " of ", vectors);
  const auto place = [&](int64_t step) {
    return place_of(static_cast<uint64_t>(step), static_cast<uint32_t>(copy.rows), static_cast<uint32_t>(vectors));
  };
  return {copy.dst.stride,
          copy.dst.row_stride,
          copy.src.stride,
          copy.src.row_stride,
          static_cast<uint32_t>(copy.rows),
          static_cast<uint32_t>(vectors),
          static_cast<uint32_t>(host::div_ceil(copy.rows * vectors * items, kUnit) % warps),
          place(device::kWarpThreads),
          place((warps - 1) * kUnit)};
}

// How a call is launched: by so many blocks, in vectors of so many bytes.
struct Launch {
  int64_t blocks;
  uint32_t bytes;
};

// A grid that is on the GPU at once, for blocks that wait their turn would copy the first layer behind the last one.
Launch choose_launch(const host::KVCopy& copy, uint64_t places, int64_t items, int64_t max_blocks, bool on_host, int64_t sms) {
  const uint32_t bytes = host::widest_vector<uint8_t, 16>(places);
  const int64_t widest =
      copy.k.rows * copy.k.width > copy.v.rows * copy.v.width ? copy.k.rows * copy.k.width : copy.v.rows * copy.v.width;
  const int64_t units = host::div_ceil(host::div_ceil(widest, bytes) * items, kUnit);
  int64_t blocks = max_blocks > 0 ? max_blocks : on_host ? kBlocksForHost : sms;
  if (blocks > sms) blocks = sms;
  if (blocks > units) blocks = units;
  return {blocks, bytes};
}

uint64_t places_of(const host::ItemCopy& copy) {
  return host::places(static_cast<uint64_t>(copy.width), static_cast<uint64_t>(copy.dst.stride),
                      static_cast<uint64_t>(copy.dst.row_stride), static_cast<uint64_t>(copy.src.stride),
                      static_cast<uint64_t>(copy.src.row_stride));
}

template <typename Index, uint32_t kLayers>
void transfer(const TensorList& k_dst, const TensorList& v_dst, TensorView indices_dst, const TensorList& k_src,
              const TensorList& v_src, TensorView indices_src, int32_t* arrived, DLDevice device, int64_t max_blocks) {
  using namespace host;
  const KVCopy copy = match_kv(k_dst, v_dst, k_src, v_src);
  RuntimeCheck(max_blocks >= 0, "argument 'max_blocks' must be 0 or more, got ", max_blocks);
  const int64_t items = indices_dst.size(0);
  const int64_t layers = k_dst.size();
  if (layers == 0) return;

  // Planes without bytes are left out, but their places are looked at.
  Params<Index, kLayers> params;
  const TensorList* const lists[2][2] = {{&k_dst, &k_src}, {&v_dst, &v_src}};
  const ItemCopy* const copies[2] = {&copy.k, &copy.v};
  const CheckedIndices checked_dst(indices_dst, copy.k.dst.count, device);
  const CheckedIndices checked_src(indices_src, copy.k.src.count, device);
  for (int64_t begin = 0; begin < layers; begin += kLayers) {
    const int64_t count = layers - begin < kLayers ? layers - begin : int64_t{kLayers};
    uint64_t all = 0;
    bool on_host = false;
    params.planes = 0;
    for (uint32_t i = 0; i < 2; ++i) {
      if (lists[i][0]->size() == 0) continue;
      for (int64_t layer = 0; layer < count; ++layer) {
        const TensorView& to = (*lists[i][0])[begin + layer];
        const TensorView& from = (*lists[i][1])[begin + layer];
        params.dst[params.planes][layer] = address_on(device, to);
        params.src[params.planes][layer] = address_on(device, from);
        on_host = on_host || to.device().device_type == kDLCPU || from.device().device_type == kDLCPU;
        all |= places(params.dst[params.planes][layer], params.src[params.planes][layer]);
      }
      if (copies[i]->empty()) continue;
      all |= places_of(*copies[i]);
      ++params.planes;
    }
    const int64_t sms = runtime::get_sm_count(device.device_id);
    Launch launch = choose_launch(copy, all, items, max_blocks, on_host, sms);
    if (params.planes == 0 || items == 0) {
      if (arrived == nullptr) continue;
      params.planes = 0;
      launch.blocks = 1;  // which has nothing but flags to write
    }
    for (uint32_t i = 0, plane = 0; plane < params.planes; ++i) {
      if (!copies[i]->empty()) params.plane[plane++] = plan(*copies[i], items, launch.bytes, launch.blocks * kWarps);
    }
    params.indices_dst = static_cast<const Index*>(indices_dst.data_ptr());
    params.indices_src = static_cast<const Index*>(indices_src.data_ptr());
    params.bounds_dst = checked_dst.bounds();
    params.bounds_src = checked_src.bounds();
    params.dst_count = copy.k.dst.count;
    params.src_count = copy.k.src.count;
    params.items = items;
    params.arrived = arrived == nullptr ? nullptr : arrived + begin;
    params.layers = static_cast<uint32_t>(count);
    void (*const kernel)(Params<Index, kLayers>) = launch.bytes == 16  ? transfer_kernel<16, Index, kLayers>
                                                   : launch.bytes == 4 ? transfer_kernel<4, Index, kLayers>
                                                                       : transfer_kernel<1, Index, kLayers>;
    LaunchKernel(launch.blocks, kThreads, device).enable_pdl()(kernel, params);
  }
  checked_dst.report();
  checked_src.report();
}

template <typename Index>
DLDevice match_indices(TensorView indices_dst, TensorView indices_src) {
  using namespace host;
  SymbolicSize items{"items"};
  SymbolicDevice device;
  TensorMatcher({items}).with_dtype<Index>().with_device(device).verify(indices_dst).verify(indices_src);
  return device.unwrap();
}

TensorList one(const TensorView& view) { return {&view, 1}; }
TensorList one(const std::optional<TensorView>& view) { return {view ? &*view : nullptr, view ? 1 : 0}; }

// --- wait for a layer -----------------------------------------------------------------------------

constexpr uint64_t kPatience = 60'000'000'000;  // ns: a transfer that takes longer was not launched before the wait

// One thread on one SM. A transfer that was launched before needs nothing of this stream, so it comes to an end.
__global__ void wait_kernel(const int32_t* flag, int64_t layer) {
  device::PDLWaitPrimary<true>();  // behind it the flag is that of this round
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  for (;;) {
    int32_t value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    if (value > 0) return;
    __nanosleep(200);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (now - begin > kPatience) break;
  }
  printf("jitk::wait_kv_layer: layer %lld has not arrived within 60 s: launch the transfer before the wait\n",
         static_cast<long long>(layer));
  __assert_fail("a layer arrives", "jitk::wait_kv_layer", 0, "wait_kernel");
}

}  // namespace

template <typename Index>
void transfer_kv_one_layer(TensorView k_dst, std::optional<TensorView> v_dst, TensorView indices_dst, TensorView k_src,
                           std::optional<TensorView> v_src, TensorView indices_src, int64_t max_blocks) {
  const DLDevice device = match_indices<Index>(indices_dst, indices_src);
  transfer<Index, 1>(one(k_dst), one(v_dst), indices_dst, one(k_src), one(v_src), indices_src, nullptr, device, max_blocks);
}

template <typename Index>
void transfer_kv_all_layers(TensorList k_dst, TensorList v_dst, TensorView indices_dst, TensorList k_src, TensorList v_src,
                            TensorView indices_src, std::optional<TensorView> arrived, int64_t max_blocks) {
  using namespace host;
  const DLDevice device = match_indices<Index>(indices_dst, indices_src);
  SymbolicSize layers{"layers"};
  layers.set_value(k_dst.size(), "k_dst");
  if (arrived) TensorMatcher({layers}).with_dtype<int32_t>().with_device(device).verify(*arrived);
  int32_t* const flags = arrived ? static_cast<int32_t*>(arrived->data_ptr()) : nullptr;
  transfer<Index, kLayersAtOnce>(k_dst, v_dst, indices_dst, k_src, v_src, indices_src, flags, device, max_blocks);
}

inline void wait_kv_layer(TensorView k_cache, std::optional<TensorView> v_cache, TensorView arrived, int64_t layer) {
  using namespace host;
  SymbolicSize layers{"layers"};
  SymbolicDevice device;
  TensorMatcher({layers}).with_dtype<int32_t>().with_device(device).verify(arrived);
  for (const TensorView* cache : {&k_cache, v_cache ? &*v_cache : &k_cache}) {
    RuntimeCheck(cache->device() == device.unwrap(), "argument '", cache->name(), "' is on another device\n  expected  ",
                 device.unwrap(), ", where the flags are\n  got       ", cache->device());
  }
  RuntimeCheck(layer >= 0 && layer < layers.unwrap(), "argument 'layer' must be below ", layers.unwrap(),
               ", the layers of 'arrived', got ", layer);
  LaunchKernel(1, 1, device.unwrap()).enable_pdl()(wait_kernel, static_cast<const int32_t*>(arrived.data_ptr()) + layer, layer);
}

}  // namespace jitk

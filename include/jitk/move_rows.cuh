// Moves rows of tokens into the slots of a cache or out of it, two tensors in one launch: what ops on KV caches have in common.
//
//   struct StoreKV { static constexpr bool kGathers = false; ... };                       see move_kernel
//   move_rows<StoreKV, Index>({first, second, indices, rows, 1, stored, device, checked}, k.dtype());
//
// A row is copied by its bytes, or cast to 8-bit floats and back. Teams of lanes have it, each thread `kItems` vectors at once
// of one of the tensors; the slot of the row is read meanwhile. So widths are free: a narrow row takes a part of a warp, a wide
// one several warps.
// From top to bottom: where a vector is, the kernel, its launch.
// Left out: arithmetic on rows before they are stored.
#pragma once

#include <jitk/row_teams.h>  // spread_rows
#include <jitk/slots.h>      // TokenRows, Slots, join

#include <jitk/index.cuh>           // CheckedIndices
#include <jitk/launch.cuh>          // LaunchKernel
#include <jitk/stored_vectors.cuh>  // Copy, Cast
#include <jitk/vec.cuh>             // L2Policy, places

#include <jitk/fast_divisor.h>

namespace jitk {
namespace moves {

using host::RowTeams;

// --- where a vector is ----------------------------------------------------------------------------

// Rows of one tensor, in bytes: from a row to the next, and within a row from a segment to the next.
struct Side {
  char* data;
  int64_t row_stride;
  int64_t segment_stride;
};

// The rows of one tensor of tokens and their places in a cache.
struct Part {
  Side tokens;
  Side slots;
  int64_t block_gap;       // in bytes, from the end of a block of slots to the next
  FastDivisor block_size;  // of slots
  FastDivisor segment;     // of vectors
  uint32_t vectors;        // of a row
  const float* scale;
};

struct Move {
  Part parts[2];
  const void* indices;
  int64_t index_stride;
  int64_t first_row;  // of this launch
  uint32_t rows;      // of this launch
  uint32_t split;     // of a row's teams, how many have the first part
  uint32_t lanes_log2;
  FastDivisor teams;  // of a row
  FastDivisor page;   // rows that one index stands for
  Stored stored;
  bool segmented;  // a row is more than one segment
  bool gapped;     // a block of slots does not begin where the one before it ends
};

// A vector's place in a row of tokens and in one of slots.
struct InRow {
  int64_t tokens;
  int64_t slots;
};

template <typename Kind>
JITK_DEVICE InRow find_in_row(const Part& part, uint32_t vector, bool segmented) {
  if (!segmented) return {int64_t{vector} * Kind::kTokenBytes, int64_t{vector} * Kind::kSlotBytes};
  const auto at = part.segment.divide(vector);
  return {at.quotient * part.tokens.segment_stride + int64_t{at.remainder} * Kind::kTokenBytes,
          at.quotient * part.slots.segment_stride + int64_t{at.remainder} * Kind::kSlotBytes};
}

// --- the kernel -----------------------------------------------------------------------------------

// Op::kGathers says which way; Op::indices() names them in the line that is printed of one that is out of range; without
// Op::kCopies there are casts alone.
// Few rows cost what lies between the wait and the store: all that does not depend on the index is computed before it.
template <typename Op, typename Kind, uint32_t kItems, typename Index>
__global__ void __launch_bounds__(RowTeams::kBlock)
    move_kernel(const __grid_constant__ Move move, const __grid_constant__ device::Bounds bounds) {
  using namespace device;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const auto at = move.teams.divide(thread >> move.lanes_log2);
  if (at.quotient >= move.rows) return;
  const int64_t row = move.first_row + at.quotient;
  const bool second = at.remainder >= move.split;
  const Part& part = move.parts[second ? 1 : 0];
  const uint32_t lanes = 1u << move.lanes_log2;
  uint32_t first = (second ? at.remainder - move.split : at.remainder) * lanes * kItems + (thread & (lanes - 1));
  keep_in_register(first);
  const auto in_row = [&](uint32_t i) { return find_in_row<Kind>(part, first + i * lanes, move.segmented); };
  char* const row_of_tokens = part.tokens.data + row * part.tokens.row_stride;
  char* tokens[kItems];
  InRow in_rows[kItems];
#pragma unroll
  for (uint32_t i = 0; i < kItems; ++i) {
    in_rows[i] = in_row(i);
    tokens[i] = row_of_tokens + in_rows[i].tokens;
    compute_here(tokens[i]);
  }
  int64_t position = row;  // of the index
  uint64_t row_of_page = 0;
  uint64_t step = static_cast<uint64_t>(part.slots.row_stride);  // from an index's place to that of the next
  char* slots = part.slots.data;
  if constexpr (Op::kGathers) {
    const auto page = move.page.divide(static_cast<uint64_t>(row));
    position = static_cast<int64_t>(page.quotient);
    row_of_page = page.remainder;
    slots += row_of_page * step;
    step *= move.page.divisor();
  }
  const Index* const index_place = static_cast<const Index*>(move.indices) + position * move.index_stride;
  if constexpr (kItems == 1) slots += in_rows[0].slots;
  uint32_t vectors = part.vectors;
  compute_here(index_place);
  compute_here(slots);
  keep_in_register(step);
  keep_in_register(vectors);
  const auto is_there = [&](uint32_t i) { return first + i * lanes < vectors; };
  // Kept for each of several vectors, places would take registers that the vectors need.
  const auto in_slot = [&](uint32_t i) { return kItems == 1 ? 0 : in_row(i).slots; };
  // Ahead of the check, so without a sign: an index that is out of range may overflow.
  const auto offset_of = [&](int64_t index) {
    uint64_t offset = static_cast<uint64_t>(index) * step;
    if (move.gapped) {
      uint64_t slot = static_cast<uint64_t>(index);
      if constexpr (Op::kGathers) slot = slot * move.page.divisor() + row_of_page;
      offset += slot / part.block_size * static_cast<uint64_t>(part.block_gap);
    }
    return static_cast<int64_t>(offset);
  };
  // A policy would keep the first load waiting: the compiler makes its descriptor right before it. L2 has room for few rows.
  const L2Policy policy = L2Policy::evict_unchanged();
  const auto load = [&](auto& x, const char* from) {
    if constexpr (kItems == 1) {
      x.load_ordered(from);
    } else {
      x.load_streaming(from, 0, policy);
    }
  };
  PDLTriggerSecondary<true>();  // the next kernel's blocks come when all of this one's have: none of them is held up
  PDLWaitPrimary<true>();

  const int64_t index = *index_place;
  // At once with the index: behind it, a round trip to memory would come on top of those of the index and of the row.
  Scale scale{1.0f, false};
  if constexpr (Kind::kScales) {
    if (part.scale != nullptr) {
      AlignedVector<float, 1> one;
      one.load_ordered(part.scale);
      scale = {one[0], true};
    }
  }
  if constexpr (Op::kGathers) {
    typename Kind::Slot x[kItems];
    const int64_t offset = offset_of(index);
    const bool admitted = bounds.admit(index, position, Op::indices());
    if (admitted) {
#pragma unroll
      for (uint32_t i = 0; i < kItems; ++i) {
        if (is_there(i)) load(x[i], slots + offset + in_slot(i));
      }
    }
    const typename Kind::Factor factor(scale);
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      const auto out = admitted ? Kind::load(x[i], move.stored, factor) : Kind::zeros();
      if (is_there(i)) out.store(tokens[i]);
    }
  } else {
    typename Kind::Token x[kItems];
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      if (is_there(i)) load(x[i], tokens[i]);
    }
    const int64_t offset = offset_of(index);
    if (!bounds.admit(index, position, Op::indices())) return;
    const typename Kind::Factor factor(scale);
    // Attention reads the cache soon: it is stored as any memory.
#pragma unroll
    for (uint32_t i = 0; i < kItems; ++i) {
      if (is_there(i)) Kind::store(x[i], move.stored, factor).store(slots + offset + in_slot(i));
    }
  }
}

// --- its launch -----------------------------------------------------------------------------------

// Strides count elements here, and bytes in a Part.
struct Tensors : host::CachedRows {
  // All that vectors start at (vec.cuh).
  uint64_t token_places(int64_t bytes) const {
    const host::Segments all = segments();
    const int64_t strides = rows.stride | all.first_stride | all.width;
    return width() == 0 ? 0 : host::places(tokens.data_ptr(), static_cast<uint64_t>(strides * bytes));
  }
  uint64_t slot_places(int64_t bytes) const {
    const host::Segments all = segments();
    const int64_t strides = slots.stride | slots.block_gap | column | all.second_stride | all.width;
    return width() == 0 ? 0 : host::places(cache.data_ptr(), static_cast<uint64_t>(strides * bytes));
  }
  template <typename Kind>
  int64_t vectors(int64_t slot_bytes) const {
    return width() * slot_bytes / Kind::kSlotBytes;
  }
  template <typename Kind>
  Part part(int64_t token_bytes, int64_t slot_bytes) const {
    const host::Segments all = segments();
    return {
        {static_cast<char*>(tokens.data_ptr()), rows.stride * token_bytes, all.first_stride * token_bytes},
        {static_cast<char*>(cache.data_ptr()) + column * slot_bytes, slots.stride * slot_bytes, all.second_stride * slot_bytes},
        slots.block_gap * slot_bytes,
        FastDivisor(static_cast<uint64_t>(slots.block_size)),
        FastDivisor(static_cast<uint64_t>(all.width * slot_bytes / Kind::kSlotBytes)),
        static_cast<uint32_t>(vectors<Kind>(slot_bytes)),
        scale};
  }
};

struct Work {
  Tensors first;
  Tensors second;  // without elements, where there is but one
  TensorView indices;
  int64_t rows;
  int64_t page;  // rows that one index stands for
  Stored stored;
  DLDevice device;
  const host::CheckedIndices& checked;
};

template <typename Kind>
inline constexpr const host::ItemsTable& kItemsOf = Kind::kTokenBytes != kWideBytes ? host::kNarrow
                                                    : Kind::kScales                 ? host::kCasts
                                                                                    : host::kCopies;

template <typename Op, typename Kind, typename Index>
auto kernel_of(uint32_t items) {
  constexpr const host::ItemsTable& kItems = kItemsOf<Kind>;
  if (items == kItems.few.items) return move_kernel<Op, Kind, kItems.few.items, Index>;
  if (items == kItems.some.items) return move_kernel<Op, Kind, kItems.some.items, Index>;
  return move_kernel<Op, Kind, kItems.many, Index>;
}

// Bytes are those of an element.
template <typename Op, typename Kind, typename Index>
void launch(const Work& work, int64_t token_bytes, int64_t slot_bytes) {
  using namespace host;
  const int64_t first = work.first.vectors<Kind>(slot_bytes), second = work.second.vectors<Kind>(slot_bytes);
  if (work.rows == 0 || first + second == 0) return;
  RuntimeCheck((first | second) < int64_t{1} << 30, "a row has at most 1073741823 vectors, got ", max(first, second));
  const int64_t sms = runtime::get_sm_count(work.device.device_id);
  const RowTeams teams = spread_rows(work.rows, first, second, kItemsOf<Kind>, sms);

  Move move{{work.first.part<Kind>(token_bytes, slot_bytes), work.second.part<Kind>(token_bytes, slot_bytes)},
            work.indices.data_ptr(),
            work.indices.stride(0),
            0,
            0,
            teams.first,
            teams.lanes_log2,
            FastDivisor(teams.first + teams.second),
            FastDivisor(static_cast<uint64_t>(work.page)),
            work.stored,
            work.first.segments().count > 1 || work.second.segments().count > 1,
            work.first.slots.block_gap != 0 || work.second.slots.block_gap != 0};
  for (; move.first_row < work.rows; move.first_row += teams.rows_of_launch()) {
    const int64_t some = min(work.rows - move.first_row, teams.rows_of_launch());
    move.rows = static_cast<uint32_t>(some);
    const int64_t grid = teams.blocks(some);
    LaunchKernel(grid, RowTeams::kBlock, work.device)
        .enable_pdl()(kernel_of<Op, Kind, Index>(teams.items), move, work.checked.bounds());
  }
}

template <typename Op, typename Index>
void copy(const Work& work, int64_t bytes) {
  const uint64_t all = work.first.token_places(bytes) | work.first.slot_places(bytes) | work.second.token_places(bytes) |
                       work.second.slot_places(bytes);
  if (all % 16 == 0) return launch<Op, Copy<16>, Index>(work, bytes, bytes);
  if (all % 8 == 0) return launch<Op, Copy<8>, Index>(work, bytes, bytes);
  if (all % 4 == 0) return launch<Op, Copy<4>, Index>(work, bytes, bytes);
  if (all % 2 == 0) return launch<Op, Copy<2>, Index>(work, bytes, bytes);
  launch<Op, Copy<1>, Index>(work, bytes, bytes);
}

template <typename Op, typename Index, typename T>
void cast_from(const Work& work) {
  constexpr uint32_t kVec = kWideBytes / sizeof(T);
  const uint64_t tokens = work.first.token_places(sizeof(T)) | work.second.token_places(sizeof(T));
  const uint64_t slots = work.first.slot_places(1) | work.second.slot_places(1);
  if (tokens % kWideBytes == 0 && slots % kVec == 0) return launch<Op, Cast<T, kVec>, Index>(work, sizeof(T), 1);
  launch<Op, Cast<T, 1>, Index>(work, sizeof(T), 1);
}

// `wide` is the dtype of the tokens.
template <typename Op, typename Index>
void move_rows(const Work& work, DLDataType wide) {
  if constexpr (Op::kCopies) {
    if (work.stored == Stored::kCopy) return copy<Op, Index>(work, wide.bits / 8);
  }
  if (wide == dtype_of<bf16_t>()) return cast_from<Op, Index, bf16_t>(work);
  if (wide == dtype_of<fp16_t>()) return cast_from<Op, Index, fp16_t>(work);
  cast_from<Op, Index, fp32_t>(work);
}

}  // namespace moves
}  // namespace jitk

// Where a thread has the angles of its pairs from, and what it does with them.
//
//   auto row = angles.find(batch, token);                            where its position is, ahead of the wait for other kernels
//   angles.ask(row);                                                 asks for it, while heads are loaded
//   angles.arrive(row);                                              waits for it
//   typename Angles::template Unit<kVec> unit;
//   angles.load(row, u, place, unit);                                of the unit u: two vectors whose elements turn together
//   if (!angles.admit(row, lane == 0)) return;                       a position outside the cache is not followed
//   Angles::turn(unit, first, second);
//
// Units. With pairs (i, i + half) the two vectors of a unit lie half a head apart, and their elements turn each other. Vectors of
// neighbours turn by themselves; they are as far apart, so that the lanes of a warp read what is side by side. Single elements
// of neighbours are next to each other.
#pragma once

#include "rope_arguments.h"  // PositionRows, TokenRows, Kind

#include <jitk/index.cuh>  // Bounds
#include <jitk/vec.cuh>    // AlignedVectors

#include <type_traits>  // the type that a kind stands for

namespace jitk::rotary {

// Of N floats the alignment that load_floats needs.
constexpr uint64_t floats_alignment(Kind kind, uint32_t n) {
  const uint64_t bytes = n * (kind == Kind::kFp32 ? 4 : 2);
  return bytes < 16 ? bytes : 16;
}

// body(pointer) with a pointer to elements of the kind. One branch for all that is loaded in it, so that loads wait together.
template <typename Body>
JITK_DEVICE void with_kind(Kind kind, const Body& body) {
  if (kind == Kind::kFp32) {
    body(static_cast<const fp32_t*>(nullptr));
  } else if (kind == Kind::kFp16) {
    body(static_cast<const fp16_t*>(nullptr));
  } else {
    body(static_cast<const bf16_t*>(nullptr));
  }
}

// kCount floats in each of kRuns places.
template <typename E, uint32_t kCount, uint32_t kRuns>
struct Runs {
  device::AlignedVectors<E, kCount, 16> runs[kRuns];

  JITK_DEVICE void load(uint32_t run, const void* from, int64_t offset) {
    runs[run].load(static_cast<const E*>(from) + offset);
  }
  JITK_DEVICE void to_floats(float* to) const {
#pragma unroll
    for (uint32_t run = 0; run < kRuns; ++run) {
      float values[kCount];
      runs[run].to_floats(values);
#pragma unroll
      for (uint32_t i = 0; i < kCount; ++i) to[run * kCount + i] = values[i];
    }
  }
};
template <typename Pointer>
using pointee_t = std::remove_const_t<std::remove_pointer_t<Pointer>>;

// Where the two vectors of a unit begin in a head.
struct Place {
  uint32_t first;
  uint32_t second;
};

// Where an index of either width is.
JITK_DEVICE const uint32_t* find_index(const void* indices, bool is_wide, int64_t offset) {
  return static_cast<const uint32_t*>(indices) + (is_wide ? 2 * offset : offset);
}

// One on its way from memory: to ask for its value is to wait for it.
struct Asked {
  uint32_t low = ~0u;
  uint32_t high = ~0u;

  Asked() = default;
  // In halves: a choice between two loads would wait for the one that is made.
  JITK_DEVICE Asked(const uint32_t* place, bool is_wide) {
    low = place[0];
    if (is_wide) high = place[1];
  }
  // Not ahead of what is asked for before this call: the compiler would, as it cannot know what waits.
  JITK_DEVICE void arrive() { device::keep_in_register(low); }
  JITK_DEVICE int64_t value(bool is_wide) const {
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(low) >> 31);
    return static_cast<int64_t>(uint64_t{is_wide ? high : sign} << 32 | low);
  }
};

// Both products are rounded, as in PyTorch: an FMA would leave the rest of one where they cancel.
JITK_DEVICE float turned(float x, float cos, float partner, float sin) {
  return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(partner, sin));
}

// kSections: each pair goes by one of three positions (PositionRows).
template <bool kNeoxForm, bool kSections>
struct OfPositions {
  static constexpr bool kNeox = kNeoxForm;
  static constexpr bool kBatches = false;

  PositionRows rows;
  int64_t tokens;
  device::Bounds bounds;

  // A cosine and a sine for each pair.
  template <uint32_t kVec>
  struct Unit {
    float cos[kVec];
    float sin[kVec];
  };
  static constexpr uint32_t kAxes = kSections ? 3 : 1;
  struct Row {
    const uint32_t* places[kAxes];
    Asked asked[kAxes];
    int64_t token;
    uint32_t positions[kAxes] = {};  // within the cache
  };

  // How many floats are read at a time.
  static constexpr uint32_t run(uint32_t vec) { return kNeox || vec == 1 ? vec : vec / 2; }

  JITK_DEVICE Row find(uint32_t, int64_t token) const {
    Row row;
    row.token = token;
#pragma unroll
    for (uint32_t axis = 0; axis < kAxes; ++axis) {
      row.places[axis] = find_index(rows.positions, rows.is_wide, axis * rows.axis_stride + token * rows.position_stride);
      device::compute_here(row.places[axis]);
    }
    return row;
  }

  // For all of a token's positions at once: pairs that would ask for theirs wait for one more answer.
  JITK_DEVICE void ask(Row& row) const {
#pragma unroll
    for (uint32_t axis = 0; axis < kAxes; ++axis) row.asked[axis] = Asked(row.places[axis], rows.is_wide);
  }

  // A position outside the cache is moved into it, so that nobody waits for the check. A cache has at most 2^32 positions.
  JITK_DEVICE void arrive(Row& row) const {
#pragma unroll
    for (uint32_t axis = 0; axis < kAxes; ++axis) {
      row.asked[axis].arrive();
      row.positions[axis] = min(row.asked[axis].low, static_cast<uint32_t>(rows.max_position - 1));
    }
  }

  JITK_DEVICE bool admit(const Row& row, bool reports) const {
    bool fits = true;
#pragma unroll
    for (uint32_t axis = 0; axis < kAxes; ++axis) {
      fits &= admit_one(row.asked[axis].value(rows.is_wide), axis * tokens + row.token, reports);
    }
    return fits;
  }
  JITK_DEVICE bool admit_one(int64_t index, int64_t place, bool reports) const {
    const bool fits = static_cast<uint64_t>(index) < static_cast<uint64_t>(rows.max_position);
    if (__builtin_expect(!fits && reports, 0)) bounds.refuse(index, place, "jitk: positions of a rotary embedding");
    return fits;
  }

  template <uint32_t kVec>
  JITK_DEVICE void load(const Row& row, uint32_t u, Place, Unit<kVec>& unit) const {
    constexpr uint32_t kRun = kSections ? 1 : run(kVec);
    with_kind(rows.kind, [&](auto element) {
      Runs<pointee_t<decltype(element)>, kRun, kVec / kRun> cos, sin;
#pragma unroll
      for (uint32_t e = 0; e < kVec; e += kRun) {
        const int64_t pair = pair_of<kVec>(u, e);
        const int64_t from = position_of(row, pair);
        cos.load(e / kRun, rows.cache, from * rows.row_stride + pair);
        sin.load(e / kRun, rows.cache, from * rows.row_stride + rows.pairs + pair);
      }
      cos.to_floats(unit.cos);
      sin.to_floats(unit.sin);
    });
  }

  template <uint32_t kVec>
  JITK_DEVICE static void turn(const Unit<kVec>& unit, float (&first)[kVec], float (&second)[kVec]) {
#pragma unroll
    for (uint32_t e = 0; e < kVec; ++e) {
      constexpr uint32_t kRun = run(kVec);
      float& a = kRun == kVec ? first[e] : e < kRun ? first[2 * e] : second[2 * (e - kRun)];
      float& b = kRun == kVec ? second[e] : e < kRun ? first[2 * e + 1] : second[2 * (e - kRun) + 1];
      const float was = a;
      a = turned(was, unit.cos[e], b, -unit.sin[e]);
      b = turned(b, unit.cos[e], was, unit.sin[e]);
    }
  }

 private:
  template <uint32_t kVec>
  JITK_DEVICE int64_t pair_of(uint32_t u, uint32_t e) const {
    constexpr uint32_t kRun = run(kVec);
    if (kRun == kVec) return u * kVec + e;
    return e < kRun ? u * kRun + e : rows.pairs / 2 + u * kRun + e - kRun;
  }
  JITK_DEVICE int64_t position_of(const Row& row, int64_t pair) const {
    if constexpr (kSections) {
      const uint32_t axis = axis_of(pair);
      return axis == 0 ? row.positions[0] : axis == 1 ? row.positions[1] : row.positions[2];  // an index would be of memory
    } else {
      return row.positions[0];
    }
  }
  JITK_DEVICE uint32_t axis_of(int64_t pair) const {
    if (rows.sections == Sections::kInOrder) return pair < rows.height ? 0 : pair < rows.width ? 1 : 2;
    const uint32_t turn = static_cast<uint32_t>(pair) % 3;
    return (turn == 1 && pair < rows.height) || (turn == 2 && pair < rows.width) ? turn : 0;
  }
};

template <bool kNeoxForm, bool kAdjoint>
struct OfTokens {
  static constexpr bool kNeox = kNeoxForm;
  static constexpr bool kBatches = true;

  TokenRows rows;

  // A cosine and a sine for each element of both vectors.
  template <uint32_t kVec>
  struct Unit {
    float cos[2 * kVec];
    float sin[2 * kVec];
  };
  struct Row {
    int64_t cos;
    int64_t sin;
  };

  static constexpr uint32_t run(uint32_t vec) { return vec; }

  JITK_DEVICE Row find(uint32_t batch, int64_t token) const {
    return {batch * rows.cos_batch_stride + token * rows.cos_token_stride,
            batch * rows.sin_batch_stride + token * rows.sin_token_stride};
  }
  JITK_DEVICE void ask(Row&) const {}
  JITK_DEVICE void arrive(Row&) const {}
  JITK_DEVICE bool admit(const Row&, bool) const { return true; }

  template <uint32_t kVec>
  JITK_DEVICE void load(const Row& row, uint32_t, Place place, Unit<kVec>& unit) const {
    with_kind(rows.kind, [&](auto element) {
      Runs<pointee_t<decltype(element)>, kVec, 2> cos, sin;
      cos.load(0, rows.cos, row.cos + place.first);
      cos.load(1, rows.cos, row.cos + place.second);
      sin.load(0, rows.sin, row.sin + place.first);
      sin.load(1, rows.sin, row.sin + place.second);
      cos.to_floats(unit.cos);
      sin.to_floats(unit.sin);
    });
  }

  template <uint32_t kVec>
  JITK_DEVICE static void turn(const Unit<kVec>& unit, float (&first)[kVec], float (&second)[kVec]) {
    constexpr bool kApart = kNeox || kVec == 1;
#pragma unroll
    for (uint32_t e = 0; e < kVec; ++e) {
      // The pair of (vector, element): that of both vectors at e, or neighbours of one.
      const uint32_t v = kApart ? 0 : e / (kVec / 2 + (kVec == 1));
      const uint32_t i = kApart ? e : 2 * (e - v * (kVec / 2));
      const uint32_t w = kApart ? 1 : v, j = kApart ? e : i + 1;
      float& a = v == 0 ? first[i] : second[i];
      float& b = w == 0 ? first[j] : second[j];
      const float was = a;
      const float back = kAdjoint ? unit.sin[w * kVec + j] : -unit.sin[v * kVec + i];
      const float on = kAdjoint ? -unit.sin[v * kVec + i] : unit.sin[w * kVec + j];
      a = turned(was, unit.cos[v * kVec + i], b, back);
      b = turned(b, unit.cos[w * kVec + j], was, on);
    }
  }
};

}  // namespace jitk::rotary

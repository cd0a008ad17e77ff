// What measurements choose about rotations. A compiler's flag tries another value: NVCC_APPEND_FLAGS="-DJITK_ROPE_HEADS=2".
#pragma once

#include <cstdint>  // uint32_t

#ifndef JITK_ROPE_BLOCK  // threads: 32, 64, 128, 256
#define JITK_ROPE_BLOCK 128
#endif
#ifndef JITK_ROPE_HEADS  // of a lane in flight, with many tokens: 1, 2, 4, 8
#define JITK_ROPE_HEADS 4
#endif
#ifndef JITK_ROPE_ROUNDS  // in which a lane has so many heads, with many tokens: 1, 2, 4
#define JITK_ROPE_ROUNDS 1
#endif
#ifndef JITK_ROPE_AHEAD  // whether the heads of a round are loaded while those of the one before are turned: 0, 1
#define JITK_ROPE_AHEAD 0
#endif
#ifndef JITK_ROPE_VECTOR
#define JITK_ROPE_VECTOR 16
#endif
#ifndef JITK_ROPE_TRIGGER
#define JITK_ROPE_TRIGGER -1
#endif
#ifndef JITK_ROPE_MIN_BLOCKS  // that an SM shall hold, with many tokens; it limits registers, 0 does not: 0, 4, 5, 6
#define JITK_ROPE_MIN_BLOCKS 0
#endif
#ifndef JITK_ROPE_FEW_LANES  // on each SM, up to which tokens are few: 0, 256, 512, 1024, 2048
#define JITK_ROPE_FEW_LANES 1024
#endif
#ifndef JITK_ROPE_LOAD  // of heads: 0 past L1 with a policy for L2, 1 past L1, 2 as any
#define JITK_ROPE_LOAD 0
#endif
#ifndef JITK_ROPE_STORE  // of heads: 0 with a policy for L2, 1 as any
#define JITK_ROPE_STORE 0
#endif

namespace jitk::rotary {

inline constexpr uint32_t kBlock = JITK_ROPE_BLOCK;
inline constexpr uint32_t kHeadsInFlight = JITK_ROPE_HEADS;
inline constexpr uint32_t kRounds = JITK_ROPE_ROUNDS;
inline constexpr bool kLoadsAhead = JITK_ROPE_AHEAD;
inline constexpr uint32_t kVectorBytes = JITK_ROPE_VECTOR;
inline constexpr int32_t kTrigger = JITK_ROPE_TRIGGER;
inline constexpr uint32_t kMinBlocks = JITK_ROPE_MIN_BLOCKS;
inline constexpr int64_t kFewLanes = JITK_ROPE_FEW_LANES;
inline constexpr uint32_t kLoad = JITK_ROPE_LOAD;
inline constexpr uint32_t kStore = JITK_ROPE_STORE;

}  // namespace jitk::rotary

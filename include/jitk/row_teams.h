// Which threads of a GPU move which vectors of rows: a team of neighbouring lanes has a row, or a part of one.
//
//   const RowTeams teams = spread_rows(rows, k_vectors, v_vectors, kCopies, sms);
//   grid = teams.blocks(rows), block = teams.kBlock
//
// A row has two parts, K and V, each with teams of its own, so that a thread deals with one tensor. A thread moves `items`
// vectors at once: enough bytes in flight to keep memory busy, and one where vectors are few, as then only latency counts.
// Nothing here depends on CUDA: the choice is tested without a GPU. Left out: rows that are reduced (share.cuh).
#pragma once

#include <cstdint>  // uint32_t

namespace jitk {
namespace host {

struct RowTeams {
  // Threads of a block. A block for each of few warps, on a multiprocessor of its own, takes 3 to 6 percent longer (H200).
  static constexpr uint32_t kBlock = 256;

  uint32_t items;       // vectors of a thread
  uint32_t lanes_log2;  // of a team
  uint32_t first;       // teams for the first part of a row
  uint32_t second;

  int64_t threads(int64_t rows) const { return rows * (int64_t{first} + second) << lanes_log2; }
  int64_t blocks(int64_t rows) const { return (threads(rows) + kBlock - 1) / kBlock; }
  // Threads are counted in 32 bits.
  int64_t rows_of_launch() const {
    const int64_t rows = (int64_t{1} << 31) / threads(1);
    return rows > 0 ? rows : 1;
  }
};

// How many vectors a thread has: the first line that is not exceeded, in vectors for each multiprocessor, or `many`. Measured on
// an H200: `bench kernels`.
struct ItemsTable {
  struct Line {
    int64_t vectors_of_sm;
    uint32_t items;
  };
  Line few, some;
  uint32_t many;
};
// What is copied, what is cast, which has more to do before its first vector, and vectors of less than 16 bytes.
inline constexpr ItemsTable kCopies{{1024, 1}, {4096, 2}, 4};
inline constexpr ItemsTable kCasts{{1024, 1}, {16384, 4}, 8};
inline constexpr ItemsTable kNarrow{{0, 4}, {0, 4}, 4};
// Teams are not made smaller than this for the sake of idle lanes: 8 vectors of 16 bytes are a line of 128.
inline constexpr uint32_t kLeastLanesLog2 = 3;

// For rows of `first` and `second` vectors, of which one has some. A team has the lanes that the wider part needs, or fewer where
// fewer threads then have a row: 40 and not 64 of them have 64 and 8 vectors, two each, as 5 teams of 8 lanes and not 2 of 32.
inline RowTeams spread_rows(int64_t rows, int64_t first, int64_t second, const ItemsTable& table, int64_t sms) {
  RowTeams teams{table.many, 0, 0, 0};
  const int64_t vectors = rows * (first + second);
  if (vectors <= table.few.vectors_of_sm * sms) {
    teams.items = table.few.items;
  } else if (vectors <= table.some.vectors_of_sm * sms) {
    teams.items = table.some.items;
  }
  const int64_t wider = first > second ? first : second;
  while (teams.lanes_log2 < 5 && int64_t{teams.items} << teams.lanes_log2 < wider) ++teams.lanes_log2;
  const auto teams_of = [&](int64_t part, uint32_t lanes_log2) {
    const int64_t team = int64_t{teams.items} << lanes_log2;
    return (part + team - 1) / team;
  };
  const auto threads_of_row = [&](uint32_t lanes_log2) {
    return (teams_of(first, lanes_log2) + teams_of(second, lanes_log2)) << lanes_log2;
  };
  for (uint32_t fewer = teams.lanes_log2; fewer-- > kLeastLanesLog2;) {
    if (threads_of_row(fewer) < threads_of_row(teams.lanes_log2)) teams.lanes_log2 = fewer;
  }
  teams.first = static_cast<uint32_t>(teams_of(first, teams.lanes_log2));
  teams.second = static_cast<uint32_t>(teams_of(second, teams.lanes_log2));
  return teams;
}

}  // namespace host
}  // namespace jitk

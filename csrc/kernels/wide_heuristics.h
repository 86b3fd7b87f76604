// When few tokens are served by wide tiles (decode_wide.cu), and how. Pure functions of the
// problem's size, tested on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/heuristics.h"

namespace lora_ext {

// How the shrink of wide tiles deals its clusters out. A unit is a tile and 64 rows of A. A cluster
// shares a part of a unit's K among its CTAs and adds their sums up; with more units than clusters
// it falls into groups that serve a unit each. Only the device knows how many tiles there are.
struct WideSplit {
  int32_t cluster;       // CTAs, a power of 2
  int32_t num_clusters;  // of the grid
  int32_t places;        // clusters that several parts of units may take together
  int32_t most_parts;    // of a unit
  int32_t row_groups;    // units of a tile

  struct Cut {
    int group;  // CTAs that share a part
    int parts;
  };
  LORA_EXT_HOST_DEVICE Cut cut(int num_tiles) const {
    const int units = num_tiles > 0 ? num_tiles * row_groups : 1;
    Cut cut{cluster, 1};
    for (int groups = num_clusters; groups < units && cut.group > 1; groups *= 2) {
      cut.group /= 2;
    }
    if (cut.group == cluster) {
      const int fitting = small_quotient(places, units);
      cut.parts = fitting < 1 ? 1 : fitting < most_parts ? fitting : most_parts;
    }
    return cut;
  }
  // Most parts of a row group of up to `capacity` tiles together.
  int64_t all_parts(int64_t capacity) const {
    return std::max<int64_t>(capacity, places / row_groups);
  }
};

constexpr int kWideMostRank = 128;  // that the expand's shared memory holds for 64 tokens
constexpr int kWideRows = 64;       // of A, that a CTA of the shrink takes

// Where the decode kernels would read a slot's weights several times from L2, once for each 16
// tokens, and slots are few and may have many tokens, if all are in use `wide_tokens` each.
//
// Above rank 64, where x is read again for each 32 rows, 6 (70b `down`, T50 shared 17.7 -> 10.5 us,
// of eight slots 26.3 -> 34). Else fewer where y is wider than K is long, so that blocks of it
// share the sums of xa. Above rank 32 also 6, if of more than 32 tokens (rank 64, T64: qkv, one
// adapter 7.9 -> 6.1, eight 11.4 -> 11.4; gate_up 10.7 -> 8.7, 16.9 -> 17.6; but T24 of four slots
// 7.0 -> 8.3), and 16 (T100: `down` 8.7 -> 8.1, 11.4 -> 13.6); up to rank 32 24 and 48 (T200 of
// eight slots: qkv 11.2 -> 8.4, 12.0 -> 10.4; of four: `down` 9.7 -> 8.1, 10.8 -> 8.8). Up to rank
// 16 only with three full tiles, where slices together are most of a unit's rows (T256 of eight
// slots: qkv 8.8 -> 7.0, 9.3 -> 9.3; one slice 10.2 -> 10.0, 10.7 -> 12.1).
inline int64_t wide_tokens(const ApplyShape& s) {
  constexpr int64_t kNever = kDecodeMaxTokens + 1;
  const bool wide_y = s.out_features > s.in_features, few = s.num_tokens <= 2 * kTileTokens;
  if (s.max_rank <= 16) {
    const bool full = s.num_tokens >= 3 * kWideTileTokens && s.num_slices > 1;
    return wide_y && full && s.max_rank > 8 ? 24 : kNever;
  }
  if (s.max_rank <= 32) {
    return few ? kNever : wide_y ? 24 : 48;
  }
  return s.max_rank > 64 ? 6 : !wide_y ? 16 : few ? 12 : 6;
}

inline bool decode_is_wide(const ApplyShape& s) {
  // Bytes that the decode kernels would read, from which on it pays.
  const int64_t much = s.max_rank > 32 ? 4 << 20 : 8 << 20;
  if (!s.half || s.batch_invariant || s.num_tokens > kDecodeMaxTokens ||
      s.num_tokens <= kTileTokens || s.max_rank > kWideMostRank) {
    return false;
  }
  const int64_t weights = int64_t{2} * s.max_rank * (s.num_slices * s.in_features + s.out_features);
  return ceil_div(s.num_tokens, kTileTokens) * weights > much && s.num_slots <= s.sm_count / 16 &&
         s.num_tokens >= s.num_slots * wide_tokens(s);
}

// Clusters of 8 find places on most of the chip; those of 16, on less of it, leave the expand half
// as many parts, and are not idle where mixes leave a few more units, where full tiles make up to
// four and K is long (`down`, rank 64, T128 shared: 8.4 -> 8.0 us, T256 zipf 19.0 -> 15.5). A CTA
// has at least four steps of 64 values of K, and no more than two clusters share them, since the
// expand adds their parts up (70b `down`, rank 128, T50 shared: 11.8 -> 10.7; `down`, rank 64, T128
// 8.1 -> 7.9). Units, or parts of them, take a multiprocessor for each CTA, so that the expand is
// resident beside them; only with more units two (qkv, rank 64, T128 of eight slots: 14.8 -> 12.9),
// since CTAs without a unit come late and hold the expand up (T32 shared: 5.1 -> 5.9).
inline WideSplit wide_split(const ApplyShape& s) {
  constexpr int64_t kSteps = 4 * 64, kMostParts = 2;
  const int64_t rows = s.num_slices * ceil_div(s.max_rank, 16) * 16;
  const int64_t row_groups = ceil_div(rows, kWideRows);
  const int64_t full = ceil_div(s.num_tokens, kWideTileTokens) * row_groups;
  const int64_t most = max_tiles(s.num_tokens, s.num_slots, kWideTileTokens) * row_groups;
  const bool long_k = full <= 4 && s.in_features >= 2 * 16 * kSteps;
  const int64_t cluster = long_k && resident_blocks(s.sm_count, 1, 16) >= 16 ? 16 : 8;
  const int64_t places = std::max<int64_t>(s.sm_count / cluster, 1);
  const int64_t grid = most > places ? 2 * places : places;
  return {
      static_cast<int32_t>(cluster), static_cast<int32_t>(std::max(grid, ceil_div(most, cluster))),
      static_cast<int32_t>(places),
      static_cast<int32_t>(std::clamp<int64_t>(s.in_features / (kSteps * cluster), 1, kMostParts)),
      static_cast<int32_t>(row_groups)};
}

}  // namespace lora_ext

// Shape -> launch configuration of the MoE kernels; see heuristics.h.
#pragma once

#include "common/moe_routing.h"
#include "kernels/heuristics.h"

namespace lora_ext {

struct MoeShape {
  int64_t num_pairs, num_groups;  // (slot, expert) that the weights have
  int64_t num_experts;
  int64_t in_features;
  int matrices, rows;  // matrices of A for one (slot, expert), and rows of each
  int max_rank;
  bool vector;  // addresses and strides allow 16-byte loads
  int sm_count;
};

struct MoeShrinkConfig {
  int row_blocks;  // blocks of 16 rows of A that a CTA computes: 1, 2 or 4
  int blocks;      // CTAs that share a tile's rows
  int splits;      // CTAs that share K; each has a plane of the workspace, which the expand adds up
  int split_features;
  // CTAs come in clusters of so many, which share a part of K, so many values each, and add up
  // their sums, if there are up to so many tiles, which only the device can count. 1: never.
  int members, member_features, few_tiles;
  bool small;              // A is little: the batch waits for its loads, not for the bandwidth
  int prefetch_features;   // of a part of K, brought to L2 ahead of time
  int most_blocks_per_sm;  // 0: as many as fit
  int shared_percent;      // of an SM's L1 cache that is to be shared memory, -1: any
};

// pair / divisor as a multiplication and a shift, exact for all pairs: a division is twenty
// instructions that wait for each other, in front of a CTA's first x.
struct MoePairDivisor {
  uint32_t factor;
  int32_t shift;

  MoePairDivisor() = default;
  explicit MoePairDivisor(int32_t divisor) : shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) {
      ++shift;
    }
    factor = static_cast<uint32_t>(ceil_div(int64_t{1} << shift, int64_t{divisor}));
  }
  LORA_EXT_HOST_DEVICE int token_of(int pair) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(pair)) * factor >> shift);
  }
};

// A group for every pair, or all groups: a decode step's routing is close to that, and a prefill
// has CTAs to spare anyway.
inline int64_t likely_moe_tiles(int64_t num_pairs, int64_t num_groups) {
  return std::max(ceil_div(num_pairs, kMoeTilePairs), std::min(num_pairs, num_groups));
}

// Parts of K of a tile: as many as keep all CTAs resident (two to an SM) and leave each 384 values
// of it, 12 loads for each lane of its four warps: fewer are not worth another plane for the expand
// to read.
inline int moe_shrink_parts(const MoeShape& s, int64_t ctas) {
  constexpr int kMaxParts = 16;
  int parts = 1;
  while (parts < kMaxParts && s.in_features >= 768 * parts && 2 * parts * ctas <= 2 * s.sm_count) {
    parts *= 2;
  }
  // A long K goes on to be split, up to four CTAs an SM: a tile of many pairs has so much of x that
  // the others would wait for it (Mixtral's w2, 256 pairs: 22.9 -> 19.8 us). Not with thousands of
  // pairs, for which another plane is more to read (4,096: 70 -> 76).
  constexpr int kLongFeatures = 1792, kLongPairs = 1024;
  while (parts < kMaxParts && s.num_pairs <= kLongPairs &&
         s.in_features >= int64_t{2} * kLongFeatures * parts &&
         2 * parts * ctas <= 4 * s.sm_count) {
    parts *= 2;
  }
  return parts;
}

// As many rows in a CTA as x is to be read for, up to 64, where registers end. How K is split does
// not depend on how the weights lie in memory, so neither do the bits of a result.
inline MoeShrinkConfig moe_shrink_config(const MoeShape& s) {
  constexpr int kMostRows = 64;
  MoeShrinkConfig config{};
  config.row_blocks = !s.vector || s.rows <= 16 ? 1 : s.rows <= 32 ? 2 : 4;
  config.blocks = s.matrices * static_cast<int>(ceil_div(s.rows, 16 * config.row_blocks));
  const int64_t tile_ctas = ceil_div(int64_t{s.matrices} * s.rows, kMostRows);
  const int parts = moe_shrink_parts(s, likely_moe_tiles(s.num_pairs, s.num_groups) * tile_ctas);
  config.split_features = static_cast<int>(ceil_div(ceil_div(s.in_features, parts), 128) * 128);
  config.splits = static_cast<int>(ceil_div(s.in_features, config.split_features));
  // Fewer rows a CTA where there are fewer CTAs than SMs: A comes by more of them (one token of
  // rank 64, w2: 5.0 -> 4.7 us).
  while (s.vector && config.row_blocks > 1 &&
         2 * likely_moe_tiles(s.num_pairs, s.num_groups) * config.blocks * config.splits <=
             s.sm_count) {
    config.row_blocks /= 2;
    config.blocks = s.matrices * static_cast<int>(ceil_div(s.rows, 16 * config.row_blocks));
  }
  // A batch that waits for its loads, not for the bandwidth, gains from loads that begin before the
  // kernel may: 0.4 to 1 us where tiles are no more than two on an SM. Where A is more it would
  // only be read in another order.
  constexpr int64_t kPrefetchBytes = 8 << 20;
  const int64_t tiles = likely_moe_tiles(s.num_pairs, s.num_groups);
  const int64_t a_bytes = tiles * s.matrices * s.rows * s.in_features * 2;
  const bool small = tiles <= 2 * s.sm_count && a_bytes <= kPrefetchBytes;
  config.small = s.vector && small;
  // With one adapter there may be far fewer tiles than these, so few that most SMs would have none
  // (gpt-oss-20b, 300 tokens of rank 64, w13: 51.3 -> 41.3 us). Two members only for many pairs, of
  // which a CTA takes 128 rows, not 64, and not up to rank 16 for up to 32 rows, which have a deep
  // ring (Qwen3-30B, 512 tokens, w13: rank 32 32.6 -> 29.3 us, rank 16 22.7 -> 24.6).
  constexpr int kMostMembers = 4;
  const int64_t one_slot = likely_moe_tiles(s.num_pairs, std::min(s.num_groups, s.num_experts));
  const bool many = s.num_pairs > 16 * one_slot;
  const int64_t rows = int64_t{s.matrices} * s.rows;
  const int64_t few_ctas = many ? ceil_div(tile_ctas, 2) : tile_ctas;
  const int ratio = moe_shrink_parts(s, one_slot * few_ctas) / parts;
  const bool two = many && !(s.max_rank <= 16 && rows > 16 && rows <= 32);
  config.members = 1;
  if (!small && ratio >= (two ? 2 : kMostMembers)) {
    config.members = std::min(ratio, kMostMembers);
    config.few_tiles = static_cast<int>(2 * s.sm_count / (config.members * parts * few_ctas));
    config.member_features =
        static_cast<int>(ceil_div(ceil_div(config.split_features, config.members), 128) * 128);
  }
  // Of a larger A the beginning, as much as memory brings while the kernel before comes to its end,
  // where the CTAs are all resident and each row has 1 KB of it or more (Qwen3-30B, w13: 8 tokens
  // of rank 64 14.8 -> 14.1 us, 32 of rank 16 15.8 -> 14.9).
  constexpr int kLeastFeatures = 512;
  const int64_t likely_blocks = tiles * config.blocks * config.splits;
  if (config.small) {
    config.prefetch_features = config.split_features;
  } else if (s.vector && config.members == 1 && likely_blocks <= 2 * s.sm_count) {
    const int64_t features = kPrefetchBytes / (2 * tiles * s.matrices * s.rows);
    config.prefetch_features =
        features >= kLeastFeatures ? static_cast<int>(features / config.splits / 64 * 64) : 0;
  }
  // CTAs that come while the kernel before is at work crowd where that one has left. Where even
  // shares of them are a few on each SM, no SM may have more.
  const int64_t most_blocks = max_moe_tiles(s.num_pairs, std::min(s.num_pairs, s.num_groups)) *
                              config.blocks * config.splits;
  const int64_t per_sm = ceil_div(likely_blocks, s.sm_count);
  const bool even = per_sm >= 2 && per_sm <= 4 && 4 * most_blocks <= 5 * per_sm * s.sm_count;
  config.most_blocks_per_sm = !config.small && even ? static_cast<int>(per_sm) : 0;
  // An SM that has to divide its cache anew cannot take CTAs before the others have left, which
  // small batches wait for: both kernels ask for all of it. In large ones loads on their way to
  // registers want the cache; CTAs of 16 rows, of which five would have room on an SM, leave the
  // expand its own then (Qwen3-30B, 512 tokens, w2: 40.6 -> 39.6 us; Qwen3-235B, 1,000 tokens of
  // rank 8 62.4 -> 59.9).
  constexpr int kExpandsShare = 72, kManyPairs = 1024;
  config.shared_percent = config.small                                         ? 100
                          : config.row_blocks == 1 && s.num_pairs > kManyPairs ? kExpandsShare
                                                                               : -1;
  return config;
}

// One kernel for both products: CTAs that each take a tile and 256 columns of a slice.
constexpr int kMoeJointColumns = 256;
struct MoeJointConfig {
  int cluster;  // CTAs of a slice that read A together
  int blocks;   // CTAs of a tile; a slice has whole clusters
};
inline int64_t moe_joint_blocks(int64_t columns, int cluster) {
  return ceil_div(columns, int64_t{kMoeJointColumns} * cluster) * cluster;
}
inline MoeJointConfig moe_joint_config(const int64_t* columns, int num_slices, bool clusters) {
  constexpr int kMostCluster = 8;
  const int64_t widest =
      ceil_div(*std::max_element(columns, columns + num_slices), kMoeJointColumns);
  MoeJointConfig config{};
  config.cluster =
      clusters ? static_cast<int>(ceil_div(widest, ceil_div(widest, kMostCluster))) : 1;
  for (int i = 0; i < num_slices; ++i) {
    config.blocks += static_cast<int>(moe_joint_blocks(columns[i], config.cluster));
  }
  return config;
}

// Whether it is taken: for few pairs, where its CTAs are no more than five on two SMs and what
// their clusters read of A, 16 rows each, is no more than 4 MB, for most of it is the same and
// comes slowly; and where K has room in shared memory (Qwen3-30B, one token: w13 3.4 -> 2.9 us,
// w2 3.9
// -> 2.6; gpt-oss-20b 3.9 -> 2.8, 4.0 -> 2.8).
inline bool moe_is_joint(int64_t num_pairs, int64_t num_groups, int64_t in_features, int max_rank,
                         const MoeJointConfig& config, int sm_count) {
  constexpr int64_t kMostPairs = 40, kMostBytes = 4 << 20, kMostFeatures = 4096;
  constexpr int kRows = 16;
  const int64_t blocks = likely_moe_tiles(num_pairs, num_groups) * config.blocks;
  return num_pairs <= kMostPairs && max_rank <= kRows &&
         in_features <= kMostFeatures * config.cluster && 2 * blocks <= 5 * int64_t{sm_count} &&
         blocks / config.cluster * kRows * in_features * 2 <= kMostBytes;
}

// Whether the expand is that of many pairs: where each (slot, expert) may well have as many as a
// warp takes, and, with more ranks, whose xa and B are more to share, wherever pairs are thousands.
// From fewer pairs on where sharing is worth more: xa of eight parts of K, or the wider products
// that there are for ranks above 16 (Mixtral, 1,024 pairs: w2 36 -> 32 us, rank 64 77 -> 59).
inline bool moe_expand_is_many(int64_t num_pairs, int64_t num_groups, int max_rank, int splits) {
  const int64_t most_few = max_rank > 16 || splits >= 8 ? 512 : 1024;
  return max_rank <= 64 && num_pairs > most_few &&
         (num_pairs / 16 >= num_groups || (max_rank > 16 && num_pairs > 2048));
}

// Whether parts of K are so many that in the expand lanes without a pair had better take some of
// them: more than a lane asks for at once, which is four of up to 16 ranks, one of more.
inline bool moe_expand_shares_splits(int splits, int max_rank) {
  return max_rank <= 64 && splits >= (max_rank <= 16 ? 8 : 4);
}

// Units of 64 columns that a warp of the expand of few pairs takes, all loads of which are on their
// way at once: two where a unit is small, ranks up to 32, and B is more than the CTAs of one unit a
// warp hold that have room beside the shrink: five of 8 KB on an SM, or three of 16 (Qwen3-30B, 16
// tokens, w2: 7.6 -> 6.7 us, w13 of one adapter 8.1 -> 7.3). Where lanes share the parts of K,
// which two units do not, only where it is 64 KB on an SM.
inline int moe_expand_units(int64_t num_pairs, int64_t num_groups, int64_t columns, int max_rank,
                            int splits, int sm_count) {
  const bool narrow = max_rank <= 16;
  const int64_t b_bytes = likely_moe_tiles(num_pairs, num_groups) * columns * (narrow ? 32 : 64);
  const int room = moe_expand_shares_splits(splits, max_rank) ? 64 : narrow ? 5 * 8 : 3 * 16;
  return max_rank <= 32 && b_bytes > int64_t{1024} * room * sm_count ? 2 : 1;
}

// Whether it had better have more CTAs on an SM, six of two units a warp instead of four, than ask
// for y ahead: where the tiles of even one adapter keep so many busy. With fewer they would crowd
// on some SMs (Qwen3-235B of one and of eight adapters -3 to -7 %, Qwen3-30B +5 and -4 %).
inline bool moe_expand_is_dense(int64_t num_pairs, int64_t num_groups, int64_t num_experts,
                                int blocks, int sm_count) {
  const int64_t one_slot = likely_moe_tiles(num_pairs, std::min(num_groups, num_experts));
  return one_slot * blocks >= 5 * int64_t{sm_count};
}

// CTAs an SM that the shrink's grid has at most; beyond, each takes several tiles. CTAs that find
// none keep the expand from starting, so that with few pairs there are no more than are resident at
// once (Qwen3-30B, 128 tokens of one adapter: w13 of rank 64 35.7 -> 33.0 us, rank 16 14.2
// -> 13.0); with many, more of them even out what tiles take.
inline int moe_shrink_blocks_per_sm(int64_t num_pairs, int row_blocks, bool wide) {
  constexpr int64_t kFewPairs = 1024, kManyPairs = 8192;
  if (wide) {
    return num_pairs <= kFewPairs ? 2 : num_pairs <= kManyPairs ? 8 : 32;
  }
  return num_pairs <= kFewPairs && row_blocks <= 2 ? 5 : 32;
}
// The same of the expand of few pairs, `blocks` of them for a tile: as many as are resident, where
// two rounds of them will do (32 tokens of one adapter, w2: 8.4 -> 7.1 us).
inline int moe_expand_blocks_per_sm(int64_t num_pairs, int64_t num_groups, int blocks, int units,
                                    bool dense, int sm_count) {
  const int64_t likely = likely_moe_tiles(num_pairs, num_groups) * blocks;
  return units == 2 && !dense && likely <= 8 * int64_t{sm_count} ? 4 : 16;
}

// Rows of the grids over tiles: all that there can be while CTAs are few; beyond, each CTA takes
// several, so that a routing of few groups does not launch thousands of CTAs that find nothing. Of
// CTAs that do more each there should be fewer.
inline int64_t moe_grid_tiles(int64_t num_pairs, int64_t num_groups, int blocks, int sm_count,
                              int most_per_sm = 32) {
  const int64_t most = max_moe_tiles(num_pairs, std::min(num_pairs, num_groups));
  return std::max<int64_t>(1, std::min(most, ceil_div(int64_t{most_per_sm} * sm_count, blocks)));
}

}  // namespace lora_ext

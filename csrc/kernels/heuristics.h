// Shape -> launch configuration. Pure functions of the problem's size, tested on the CPU; no branch
// on any one model's shapes, and each constant has its reason beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/params.h"

namespace lora_ext {

constexpr int kDefaultSharedBytes = 48 * 1024;  // what a block gets without asking
constexpr int kMaxSharedBytes = 99 * 1024;      // what every chip from sm_80 on gives on request
constexpr int kReservedSharedBytes = 1024;      // that a chip takes for itself for each CTA
constexpr int kMaxSlots = 8192;                 // plan_batch needs three counts a slot within that

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens and slots up to which a plan has a thread for each of them; segments too, which may be
// more, as they may be empty.
constexpr int kSmallPlan = 256;
inline bool plan_is_small(int64_t max_tokens, int64_t num_slots, int64_t count) {
  const int64_t threads = std::max(max_tokens, num_slots);
  return threads <= kSmallPlan && count <= threads;
}

struct PlanConfig {
  int threads, num_buckets, shared_bytes;
  int slots_at, tokens_at;  // in shared memory, in int32 units; -1: they stay in global memory
};

// One CTA. A bucket is the token range of one warp: no more of them than there are groups of 32
// tokens, since a slot's counts are added up one after another; fewer where the histogram would not
// fit. What fits beside it spares a round trip to global memory.
inline PlanConfig plan_config(int64_t max_tokens, int64_t num_slots) {
  constexpr int64_t kMostInts = kDefaultSharedBytes * 2 / 4;
  int buckets = static_cast<int>(std::clamp<int64_t>(ceil_div(max_tokens, 32), 1, 32));
  while (buckets > 1 && num_slots * (buckets + 2) > kMostInts) {
    buckets /= 2;
  }
  PlanConfig config{};
  config.num_buckets = buckets;
  config.threads = max_tokens > 512 || num_slots > 512 ? 1024 : std::max(256, 32 * buckets);
  // Counts and tiles of the slots, or before that the segments of a round.
  int64_t ints = std::max<int64_t>(num_slots * (buckets + 2), 3 * config.threads);
  const auto place = [&](int64_t size) {
    if (ints + size > kMostInts) {
      return -1;
    }
    const int at = static_cast<int>(ints);
    ints += size;
    return at;
  };
  config.slots_at = place(num_slots + 1);
  config.tokens_at = place(max_tokens);
  config.shared_bytes = static_cast<int>(4 * ints);
  return config;
}

// Most tiles that `num_tokens` tokens can make, whatever the mix: the grid of the kernels that run
// over tiles.
inline int64_t max_tiles(int64_t num_tokens, int64_t num_slots, int tile_tokens) {
  return std::min(num_tokens, num_tokens / tile_tokens + num_slots);
}

struct ApplyShape {
  int64_t num_tokens, num_slots, in_features, out_features;
  int num_slices, max_rank;
  int sm_count;
  bool half;             // x and the weights have 16 bits: tensor cores
  bool batch_invariant;  // the choice must not depend on the batch
};

// number / divisor for a number up to 2^20: half a unit more, and no rounding passes a whole
// number. An integer division would be twenty instructions that somebody waits for.
LORA_EXT_HOST_DEVICE inline int small_quotient(int number, int divisor) {
#ifdef __CUDA_ARCH__
  return static_cast<int>(__fdividef(number + 0.5f, divisor));
#else
  return number / divisor;
#endif
}

// Into how many parts the decode shrink cuts the K of each of a batch's tiles: those from
// `first_longer` on have one more than the others.
struct TileCuts {
  int least, first_longer;

  LORA_EXT_HOST_DEVICE int parts(int tile) const { return least + (tile >= first_longer); }
  // All parts are numbered, tile by tile.
  LORA_EXT_HOST_DEVICE int first_part(int tile) const {
    return tile * least + (tile > first_longer ? tile - first_longer : 0);
  }
  LORA_EXT_HOST_DEVICE int tile_of(int part) const {
    const int rest = part - first_longer * least;
    const bool longer = rest >= 0;
    return (longer ? first_longer : 0) + small_quotient(longer ? rest : part, least + longer);
  }
};

// Only the device knows how many tiles there are, so that a batch of one adapter among hundreds of
// slots is cut as it should be.
struct SplitRules {
  static constexpr int kCount = 3;
  static constexpr int kMostParts = 16;  // the expand adds them up, latency it pays
  bool alike;                            // all tiles are cut alike
  int8_t most_parts[kCount];             // of a tile, as long as
  int32_t most_ctas[kCount];             // of a row group are no more than this

  // But where CTAs may be more than have room at once, as many as may be: the first tiles' parts
  // are the longer ones (70b `down`, rank 128, 200 tokens zipf: 85.3 -> 82.5 us; in one wave, where
  // the longest part counts, up to 8 % slower).
  LORA_EXT_HOST_DEVICE TileCuts cuts(int num_tiles) const {
    const int tiles = num_tiles > 0 ? num_tiles : 1;
    int least = 1;
    for (int i = 0; i < kCount; ++i) {
      const int fitting = small_quotient(most_ctas[i], tiles);
      const int parts = fitting < most_parts[i] ? fitting : most_parts[i];
      least = parts > least ? parts : least;
    }
    const int left = most_ctas[kCount - 1] - least * tiles;
    const bool longer = !alike && least < most_parts[kCount - 1] && left > 0;
    return {least, longer ? tiles - left : tiles};
  }
  // Most parts of up to `capacity` tiles together: the grid, and the room for partial products.
  int64_t all_parts(int64_t capacity) const {
    int64_t most = capacity;
    for (int i = 0; i < kCount; ++i) {
      most = std::max(most, std::min<int64_t>(capacity * most_parts[i], most_ctas[i]));
    }
    return most;
  }
};

// How a tile's rows of A and its K are dealt out to the CTAs that the decode shrink has for it:
// `parts` for each of the row groups that the pool's highest rank makes. A lower rank makes fewer,
// and the CTAs that are left over take pieces of K, so that adapters of rank 16 in a pool of rank
// 64 keep as many CTAs at work as those of rank 64 (qkv, 32 of them: 17.3 -> 13.2 us). Where pieces
// are many as it is, it would cost more to add them up.
struct TileShares {
  int groups;  // of rows
  int pieces;  // of K
  int stride;  // between the partial products of two pieces

  LORA_EXT_HOST_DEVICE TileShares(int row_groups, int group_rows_log, int rows, int parts)
      : groups((rows + (1 << group_rows_log) - 1) >> group_rows_log),
        pieces(parts),
        stride((groups << group_rows_log) * kTileTokens) {
    if (2 * groups <= row_groups && groups > 0) {  // else no division, which somebody waits for
      const int most = small_quotient(SplitRules::kMostParts, parts);
      const int each = small_quotient(row_groups, groups);
      pieces *= each < most ? each : most > 1 ? most : 1;
    }
  }
};

struct ApplyConfig {
  bool decode;     // the two decode kernels; else the wide shrink and expand
  int blocks;      // blocks of 16 rows of A that a CTA of the decode shrink computes, 1 or 2
  int row_groups;  // such CTAs for all rows of a slot of the highest rank
  SplitRules split_rules;
  int prefetch_features;  // values of K of a part that are brought to L2 ahead of time
  // Of an SM's L1 cache, what either kernel wants as shared memory; -1: any.
  int shrink_shared_percent, expand_shared_percent;
};

// The decode kernels pay while a tile's weights are what moves; past that x and y are, and the wide
// kernels read each once.
constexpr int64_t kDecodeMaxTokens = 256;
constexpr int kDecodeWarps = 8;  // of a CTA of the shrink; they share K in steps of 32

// Tiles that a batch will likely have: all slots in use, or all tiles full, whichever is more. The
// grid covers the worst case (max_tiles); CTAs beyond the real tiles leave at once.
inline int64_t likely_tiles(int64_t num_tokens, int64_t num_slots, int tile_tokens) {
  return std::max(ceil_div(num_tokens, tile_tokens), std::min(num_tokens, num_slots));
}

// CTAs of a cluster share one processing cluster of the chip, so that clusters of `cluster` CTAs do
// not fill it to the last place: three quarters were always found free.
inline int64_t resident_blocks(int sm_count, int per_sm, int cluster) {
  return cluster == 1 ? int64_t{sm_count} * per_sm : int64_t{sm_count} * per_sm * 3 / 4;
}

// Steps of a warp of the decode shrink whose loads are on their way together, as many as registers
// hold, with so many blocks of 16 rows of A.
constexpr int shrink_steps(int blocks) { return blocks == 1 ? 5 : 3; }

// Few CTAs for a small problem, so that the expand's find room beside them and have B and y ready
// in time, but no warp with more than one round of loads to wait for (70b qkv, rank 32, 3 tokens:
// 4.5 -> 4.1 us); more where a warp would else have many of them, at most as many as have room at
// once: a second wave takes as long as the first. But CTAs with more than 32 rounds may be two
// waves: few and long ones would leave places empty (70b `down`, rank 128, 200 tokens zipf: 152
// CTAs for 264 places, 102 -> 92 us). Small problems and low ranks, which wait for each instruction
// (rank 16, one token: 2 %), know that all tiles are cut alike.
inline SplitRules split_rules(const ApplyShape& s, int blocks, int row_groups, bool small) {
  const int64_t steps = ceil_div(s.in_features, 32 * kDecodeWarps);  // of a warp, without a split
  const struct {
    int64_t work, most_ctas;  // with more than `work` steps, cut as long as CTAs are no more
  } limits[SplitRules::kCount] = {{shrink_steps(blocks), s.sm_count * 3 / 4},
                                  {8, small ? s.sm_count * 3 / 2 : 2 * s.sm_count},
                                  {32, 4 * s.sm_count}};
  SplitRules rules{};
  rules.alike = blocks == 1 || s.max_rank <= 16;
  for (int i = 0; i < SplitRules::kCount; ++i) {
    int64_t parts = 1, ctas = limits[i].most_ctas / row_groups;
    while (parts < SplitRules::kMostParts && steps > limits[i].work * parts) {
      parts *= 2;
    }
    if (s.batch_invariant) {  // as for one tile, whatever the batch
      parts = std::clamp<int64_t>(ctas, 1, parts);
      ctas = 1 << 30;
    }
    rules.most_parts[i] = static_cast<int8_t>(parts);
    rules.most_ctas[i] = static_cast<int32_t>(ctas);
  }
  return rules;
}

// Blocks of 16 rows of A that a CTA of the decode shrink computes, of `all_blocks` that a tile has
// and `bytes` of A for `tiles`. One has more loads in flight; two read x half as often (`down`, 256
// tokens of one adapter of rank 64: 17.7 -> 16.0 us), which counts as soon as an SM in four has a
// CTA. Where tiles have four tokens x is little: then what is in flight counts until an SM in two
// has a CTA, or until A is so much that DRAM is busy in any case (70b qkv, 16 tokens of 8 adapters
// of rank 32: 10.6 -> 9.2 us, 64 of one 7.1 -> 7.6). Of three blocks two CTAs of two would have one
// in vain (qkv, rank 16, 256 tokens of 32 adapters: 12.8 -> 11.9).
inline int shrink_blocks(const ApplyShape& s, int64_t tiles, int64_t all_blocks, int64_t bytes) {
  constexpr int64_t kMuch = 32 << 20;
  const int64_t ctas = tiles * all_blocks;
  if (all_blocks == 1 || ctas <= s.sm_count / 4) {
    return 1;
  }
  const int64_t little_x =
      all_blocks == 3 ? 8 * tiles : std::min<int64_t>(4 * tiles, kDecodeMaxTokens / 2);
  const bool in_flight = !s.batch_invariant && s.num_tokens <= little_x;
  return in_flight && (ctas <= s.sm_count / 2 || bytes <= kMuch) ? 1 : 2;
}

inline ApplyConfig apply_config(const ApplyShape& s) {
  if (!s.half || (!s.batch_invariant && s.num_tokens > kDecodeMaxTokens)) {
    return {};
  }
  const int rows = s.num_slices * s.max_rank;
  const int64_t tiles =
      s.batch_invariant ? 1 : likely_tiles(s.num_tokens, s.num_slots, kTileTokens);
  const int64_t bytes = tiles * rows * s.in_features * 2;
  const int blocks = shrink_blocks(s, tiles, ceil_div(rows, 16), bytes);
  // Few bytes and few tiles. With more, copies ahead of time are in the way of those that somebody
  // waits for, and loads want the whole cache (`down`, 32 adapters of rank 16: 10.4 -> 9.4 us).
  constexpr int64_t kSmallBytes = 16 << 20;
  const bool small = bytes <= kSmallBytes && tiles <= s.sm_count / 8;
  // Kernels that want the cache divided differently are never on an SM at the same time, and small
  // ones live from being there at the same time (`down`, 8 tokens of one adapter of rank 64: 7.7 ->
  // 6.1 us), as do those of few bytes whose expand needs little room (qkv, rank 16, 32 tokens zipf:
  // 7.8 -> 6.3; but rank 32, 17 tokens of 17 adapters: 9.0 -> 10.1). Loads on their way live in
  // what is left of the cache, so a large shrink asks for the least that two CTAs can do with; else
  // an SM may stay divided as the expand before wanted it (70b qkv, rank 64, 100 tokens zipf: 44.0
  // -> 39.4).
  const bool together = small || (bytes <= kSmallBytes && s.max_rank <= 16);
  constexpr int kSharedPercent = 58;  // two CTAs of each kernel
  constexpr int kLeastSharedPercent = 28;
  const auto row_groups = static_cast<int>(ceil_div(rows, 16 * blocks));
  return {true,
          blocks,
          row_groups,
          split_rules(s, blocks, row_groups, small),
          small ? static_cast<int>(s.in_features) : 4 * 32 * kDecodeWarps,
          together              ? kSharedPercent
          : bytes > kSmallBytes ? kLeastSharedPercent
                                : -1,
          together ? kSharedPercent : -1};
}

// CTAs of the decode expand that walk along the rows of y, `resident` on an SM; 0: one CTA for each
// of a tile's `blocks`, which begins sooner and leaves the shrink more room, as long as they are no
// more than a wave of them, or half as many again where B is what they wait for (gate_up, 32
// adapters of rank 16: 25.7 -> 19.6 us; but qkv, 32 adapters of rank 64: 27.3 -> 30.0). Above rank
// 64, where a block is four steps of B or more, as long as they are two on three SMs (`down`, rank
// 128: 3 tokens of 3 adapters 17.6 -> 15.0 us, 1 token 8.2 -> 10.5).
inline int64_t decode_stream_ctas(int64_t num_tokens, int64_t num_slots, int64_t blocks,
                                  int max_rank, int resident, int sm_count) {
  const int64_t most = max_rank <= 16   ? int64_t{5} * sm_count
                       : max_rank <= 64 ? int64_t{6} * sm_count
                                        : int64_t{2} * sm_count / 3;
  const bool many = likely_tiles(num_tokens, num_slots, kTileTokens) * blocks > most;
  return many ? int64_t{resident} * sm_count : 0;
}

// Whether the decode expand, of `ctas`, lets the next kernel start at once, not only when it waits
// itself: where low ranks and few CTAs leave room for a shrink that comes next, which then has its
// weights in L2 by the time it may read them (rank 16: one token 3.8 -> 3.4 us, 8 of 8 adapters 4.8
// -> 4.4; rank 32: one 3.9 -> 3.6; but rank 16, 128 of one adapter 6.2 -> 6.6, rank 32, 32 of one
// 4.8 -> 5.5, rank 64, 8 of one 4.5 -> 5.0).
inline bool expand_launches_next(int64_t num_tokens, int64_t ctas, int max_rank, int sm_count) {
  const int64_t most_tokens = max_rank <= 16 ? 32 : max_rank <= 32 ? 8 : 0;
  return num_tokens <= most_tokens && ctas <= 2 * sm_count;
}

// Tokens of an embedding up to which each has CTAs of its own, which need nothing of the plan but
// the token's slot (one token: 1.6 -> 1.2 us).
inline bool embedding_is_few(int64_t num_tokens) { return num_tokens <= 8; }

// Those up to which a warp finds the tokens of a slot by itself, among 32 at a time, instead of
// waiting for the plan's tiles (32 tokens, rank 16: 2.8 -> 1.9 us; 96, rank 64: 4.1 -> 6.2, since B
// is read again for every 32).
inline bool embedding_is_by_slots(int64_t num_tokens) { return num_tokens <= 64; }

// Whether an embedding's tiles are full enough for products of 64 tokens at a time, and ranks high
// enough that products count (rank 64: 2,048 tokens 16.1 -> 14.1 us, 256 tokens of 8 slots 5.9 ->
// 5.7, but of 32 slots 9.5 -> 10.6).
inline bool embedding_is_wide(int64_t num_tokens, int64_t num_slots, int max_rank) {
  return max_rank > 32 && num_tokens >= 32 * likely_tiles(num_tokens, num_slots, kWideTileTokens);
}

// Tiles that the grid of an embedding has CTAs for: all that are likely, and some that slots leave
// partly filled; with more, CTAs serve several in turn.
inline int64_t embedding_grid_tiles(int64_t num_tokens, int64_t num_slots, int sm_count) {
  return std::min(max_tiles(num_tokens, num_slots, kWideTileTokens),
                  likely_tiles(num_tokens, num_slots, kWideTileTokens) + sm_count / 4);
}

// CTAs of a cluster that share one sum of the gradients' kernels, `steps` steps long: as long as
// each keeps eight steps, which take about as long as it does to join the partial sums, and all
// have room on the chip. `blocks` are the sums.
constexpr int kProductBlocksPerSm = 4;  // as many as 128 registers for each of 128 threads allow
inline int gradient_cluster(int64_t blocks, int64_t steps, int sm_count, bool clusters) {
  int cluster = 1;
  while (clusters && cluster < 8 && steps >= 16 * cluster &&
         blocks * 2 * cluster <= resident_blocks(sm_count, kProductBlocksPerSm, 2 * cluster)) {
    cluster *= 2;
  }
  return cluster;
}

}  // namespace lora_ext

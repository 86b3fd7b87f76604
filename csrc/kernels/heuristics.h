// Shape -> launch configuration. Pure functions of the problem's size, tested on the CPU; no branch
// on any one model's shapes, and each constant has its reason beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/plan.h"

namespace lora_ext {

constexpr int kDefaultSharedBytes = 48 * 1024;  // what a block gets without asking
constexpr int kMaxSharedBytes =
    200 * 1024;  // leaves room below the 227 KB of sm_90 and the 163 KB ... of sm_80
constexpr int kMaxSlots = 16384;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct PlanConfig {
  int threads, num_buckets, shared_bytes;
};

// One CTA. A bucket is the token range of one warp: no more of them than there are groups of 32
// tokens, since every further one lengthens the scan over L * buckets counts; fewer where the
// histogram would not fit.
inline PlanConfig plan_config(int64_t max_tokens, int64_t num_slots) {
  int buckets = static_cast<int>(std::clamp<int64_t>(ceil_div(max_tokens, 32), 1, 32));
  const auto bytes = [&](int b) {
    return static_cast<int>(4 * (32 + 2 * num_slots + 1 + num_slots * b));
  };
  while (buckets > 1 && bytes(buckets) > kDefaultSharedBytes * 2) {
    buckets /= 2;
  }
  const int threads = max_tokens > 512 || num_slots > 512 ? 1024 : std::max(256, 32 * buckets);
  return {threads, buckets, bytes(buckets)};
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
  bool clusters;         // the chip has thread block clusters
  bool batch_invariant;  // the choice must not depend on the batch
};

struct ApplyConfig {
  bool
      fused;  // one kernel, shrink and expand joined by a cluster; else two kernels and a workspace
  int cluster;  // CTAs that share one (tile, slice): they split K, then N
};

// Fused pays while a tile's weights are what moves; past that x and y are, and the two wide kernels
// read each once.
constexpr int64_t kFusedMaxTokens = 256;

// The cluster splits K: more CTAs mean more loads in flight for few tiles, and more scheduling for
// many. 16 is the most a cluster can have; below 256 values of K for a CTA its eight warps would
// have no 32-wide step each.
inline int cluster_size(const ApplyShape& s) {
  const int64_t items =
      s.batch_invariant ? 1 : max_tiles(s.num_tokens, s.num_slots, kTileTokens) * s.num_slices;
  const int64_t most = s.batch_invariant ? 8 : 16;
  int cluster = 1;
  while (cluster < most && s.in_features >= 256 * 2 * cluster &&
         items * 2 * cluster <= 4 * s.sm_count) {
    cluster *= 2;
  }
  return cluster;
}

inline ApplyConfig apply_config(const ApplyShape& s) {
  const bool fused = s.clusters && (s.batch_invariant || s.num_tokens <= kFusedMaxTokens);
  return {fused, fused ? cluster_size(s) : 1};
}

struct ShrinkShape {
  int64_t num_tokens, num_slots, in_features;
  int rows;  // S * R: columns of xa
  int sm_count;
  bool clusters;
};

struct ShrinkConfig {
  int rows;     // columns of xa that one CTA computes: 32, 64, 128 or 256
  int cluster;  // CTAs that split K
};

// All rows in one CTA, as far as registers allow, so that x is read once; then K is split until the
// chip is filled.
inline ShrinkConfig shrink_config(const ShrinkShape& s) {
  ShrinkConfig config{s.rows <= 32 ? 32 : s.rows <= 64 ? 64 : s.rows <= 128 ? 128 : 256, 1};
  const int64_t tiles =
      max_tiles(s.num_tokens, s.num_slots, kWideTileTokens) * ceil_div(s.rows, config.rows);
  while (s.clusters && config.cluster < 8 && s.in_features >= 512 * config.cluster &&
         tiles * config.cluster < 2 * s.sm_count) {
    config.cluster *= 2;
  }
  return config;
}

struct ExpandShape {
  int64_t num_tokens, num_slots, out_features;
  int num_slices, max_rank;
  int sm_count;
};

struct ExpandConfig {
  bool wide;    // tiles of 64 tokens instead of 16
  int columns;  // of y for one CTA, a multiple of 256
};

// Wide tiles for prefill, while 64 rows of xa in two halves fit in shared memory; columns so that
// there are a few CTAs for each SM.
inline ExpandConfig expand_config(const ExpandShape& s) {
  const bool wide = s.num_tokens > 256 && s.max_rank <= 256;
  const int64_t tiles =
      max_tiles(s.num_tokens, s.num_slots, wide ? kWideTileTokens : kTileTokens) * s.num_slices;
  const int64_t width = ceil_div(s.out_features, s.num_slices);
  int64_t columns = round_up(width, 256);
  while (columns > 256 && tiles * ceil_div(width, columns) < 4 * s.sm_count) {
    columns = round_up(columns / 2, 256);
  }
  return {wide, static_cast<int>(columns)};
}

}  // namespace lora_ext

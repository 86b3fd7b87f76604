// Shape -> launch configuration. Pure functions of the problem's size, tested on the CPU; no branch
// on any one model's shapes, and each constant has its reason beside it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/plan.h"

namespace lora_ext {

constexpr int kDefaultSharedBytes = 48 * 1024;  // what a block gets without asking
constexpr int kMaxSharedBytes = 99 * 1024;      // what every chip from sm_80 on gives on request
constexpr int kMaxSlots = 8192;                 // plan_batch needs three counts a slot within that

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  int64_t num_tokens, num_slots, in_features;
  int num_slices, max_rank;
  int sm_count;
  bool clusters;         // the chip has thread block clusters
  bool batch_invariant;  // the choice must not depend on the batch
};

struct ApplyConfig {
  bool
      fused;  // one kernel, shrink and expand joined by a cluster; else two kernels and a workspace
  int cluster;  // CTAs that share one (tile, slice): they split K, then N
  bool deep;    // no more CTAs than SMs: each may use all registers for loads in flight
};

// Fused pays while a tile's weights are what moves; past that x and y are, and the two wide kernels
// read each once.
constexpr int64_t kFusedMaxTokens = 256;

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

// CTAs of the fused kernel on one SM: registers allow three for narrow ranks and two for wide ones,
// shared memory one where the cluster's partial sums take more than 32 KB.
inline int fused_blocks_per_sm(int max_rank, int cluster) {
  return max_rank <= 16 ? 3 : cluster * max_rank * 64 <= 32 * 1024 ? 2 : 1;
}

// The cluster splits K: more CTAs mean more loads in flight for few tiles. All CTAs should be
// resident at once: a second wave would cost the whole latency of the chain again (measured at 32
// adapters of rank 16: K = 14336 takes 12.7 us with clusters of 8 and 18.8 with 16). 16 is the most
// that a cluster can have, and pays from 512 values of K for a CTA on: K = 4096 at one token takes
// 6.5 us with 8 and 7.0 with 16, K = 14336 8.7 and 7.7.
inline int cluster_size(const ApplyShape& s) {
  const int64_t items =
      s.batch_invariant ? 1 : likely_tiles(s.num_tokens, s.num_slots, kTileTokens) * s.num_slices;
  const int most = s.batch_invariant ? 8 : 16;
  const auto fits = [&](int cluster) {
    return s.in_features >= 512 * cluster &&
           items * cluster <=
               resident_blocks(s.sm_count, fused_blocks_per_sm(s.max_rank, cluster), cluster);
  };
  int cluster = 1;
  while (cluster < most && fits(2 * cluster)) {
    cluster *= 2;
  }
  return cluster;
}

inline ApplyConfig apply_config(const ApplyShape& s) {
  if (!s.clusters || (!s.batch_invariant && s.num_tokens > kFusedMaxTokens)) {
    return {false, 1, false};
  }
  const int cluster = cluster_size(s);
  const int64_t blocks =
      likely_tiles(s.num_tokens, s.num_slots, kTileTokens) * s.num_slices * cluster;
  // The largest clusters do not find room everywhere: some chips' clusters have spare SMs.
  const int64_t room = cluster == 16 ? resident_blocks(s.sm_count, 1, cluster) : s.sm_count;
  return {true, cluster, blocks <= room};
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

// All rows in one CTA, as far as registers allow, so that x is read once; then K is split as long
// as all CTAs of full tiles stay resident at once (two to an SM, one with 256 rows): a second wave
// would cost the latency of the whole chain again. Partly filled tiles beyond that are few or
// short.
inline ShrinkConfig shrink_config(const ShrinkShape& s) {
  ShrinkConfig config{s.rows <= 32 ? 32 : s.rows <= 64 ? 64 : s.rows <= 128 ? 128 : 256, 1};
  const int64_t tiles = ceil_div(s.num_tokens, kWideTileTokens) * ceil_div(s.rows, config.rows);
  const auto fits = [&](int cluster) {
    return s.in_features >= 512 * cluster &&
           tiles * cluster <= resident_blocks(s.sm_count, config.rows <= 128 ? 2 : 1, cluster);
  };
  while (s.clusters && config.cluster < 16 && fits(2 * config.cluster)) {
    config.cluster *= 2;
  }
  return config;
}

// The expand's CTAs get two warps instead of four or eight where there would else be fewer of them
// than SMs: a small batch is all latency, and more CTAs have more loads in flight.
inline bool expand_is_narrow(int64_t num_tokens, int64_t num_slots, int64_t out_features,
                             int sm_count) {
  constexpr int64_t kColumns = 512;
  return likely_tiles(num_tokens, num_slots, kWideTileTokens) * ceil_div(out_features, kColumns) <
         sm_count;
}

}  // namespace lora_ext

// How the wide shrink and expand are launched, of more tokens than the decode kernels take. Pure
// functions of the problem's size, tested on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/wide_heuristics.h"

namespace lora_ext {

struct ShrinkShape {
  int64_t num_tokens, num_slots, in_features;
  int rows;  // columns of xa: S * R, or S * (R rounded up to 16) for the kernel with wgmma
  int sm_count;
  bool clusters;
};

// Shared memory of the kernel with wgmma: all of a multiprocessor's, for one CTA; for one that
// leaves room to a CTA of the expand; for one of two.
constexpr int kShrinkWhole = 216, kShrinkPart = 144, kShrinkHalf = 108;

struct ShrinkConfig {
  int rows;       // columns of xa that one CTA computes
  int cluster;    // CTAs that split K
  int kilobytes;  // of shared memory for stages, of the kernel with wgmma
};

// Tiles that a batch of some segments has: more than full ones, because slots leave tiles partly
// filled.
inline int64_t mixed_tiles(int64_t num_tokens, int64_t num_slots) {
  const int64_t full = ceil_div(num_tokens, kWideTileTokens);
  return full + std::min(full, num_slots) / 4;
}

// Columns of xa that a CTA of the kernel with wgmma computes: equal shares of at most `most`, as
// there are kernels for 16, 32, 48, 64, 96, 128 and 192.
inline int shrink_rows(int rows, int most = 192) {
  const auto share = static_cast<int>(ceil_div(rows, ceil_div(rows, most)));
  return share <= 64 ? (share + 15) / 16 * 16 : share <= 96 ? 96 : share <= 128 ? 128 : 192;
}

// Rows: 32, 64, 128 or 256.
// All rows in one CTA, as far as registers allow, so that x is read once; then K is split as long
// as all CTAs of full tiles stay resident at once (two to an SM, one with 256 rows): a second wave
// would cost the latency of the whole chain again. Partly filled tiles beyond that are few or
// short.
inline ShrinkConfig shrink_config(const ShrinkShape& s) {
  ShrinkConfig config{s.rows <= 32 ? 32 : s.rows <= 64 ? 64 : s.rows <= 128 ? 128 : 256, 1, 0};
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

// The same for the kernel with wgmma, whose slices begin at multiples of 16 rows: 16, 32, 48, 64,
// 96, 128 or 192 rows and any cluster up to 8, or 16.
//
// Many tiles: one CTA on a multiprocessor, with all of its shared memory, and tiles cut into equal
// parts. As far as 16 CTAs for each tile have room together: clusters of 16, each with all rows, so
// that x is read once; the expand's first CTAs find room beside them (70B `down`, 304 tokens of
// rank 128: 27.4 -> 23.6 us); but not with more than 128 rows, whose sums they exchange for 2.4 us
// (70B qkv, 352 tokens of rank 64: 20.4 -> 17.1 us without). Few tiles else: up to 96 rows a CTA,
// because more CTAs have more loads in flight and what they read twice of x comes from the L2, and
// up to 64 as long as their clusters have room for more tiles than full ones, for clusters of few
// CTAs are put two on a multiprocessor (qkv, 304 tokens: rank 32 11.9 -> 10.3 us, with an SM for
// each CTA; rank 64 13.0 -> 11.8; but 512 tokens of four segments 16.1 -> 18.1), and 16 of them
// where each still has 512 values of K (down, T = 512, rank 16, with the expand: 15.2 -> 12.0 us).
// Else the cluster with the least time: waves over CTAs that share a tile, plus a tenth of a tile's
// time for each wave. Three quarters of the places, as resident_blocks counts, because clusters
// find little room beside another kernel's CTAs (2048 tokens, clusters of 7: 11.0 us alone, but 5
// us more with the expand behind it); pairs always find it. And some tiles more than full ones,
// because slots leave tiles partly filled (16 segments of 2048 tokens: 37 us with clusters of 6, 30
// with 5). Two CTAs of up to 64 rows share a multiprocessor: one would have too few copies on their
// way (`down`, 2048 tokens, rank 64: 43.7 us, 36.9 with two).
inline ShrinkConfig shrink_wgmma_config(const ShrinkShape& s) {
  const int64_t full = ceil_div(s.num_tokens, kWideTileTokens), blocks = ceil_div(s.rows, 192);
  const int rows = shrink_rows(s.rows);
  if (2 * full * blocks > s.sm_count) {
    return {rows, 1, kShrinkWhole};
  }
  const int most = static_cast<int>(std::clamp<int64_t>(s.in_features / 512, 1, 16));
  if (rows > 64 && rows <= 128 && most == 16 &&
      full * blocks * 16 <= resident_blocks(s.sm_count, 1, 16)) {
    return {rows, 16, kShrinkPart};
  }
  const int64_t likely = mixed_tiles(s.num_tokens, s.num_slots);
  const int narrow_rows = shrink_rows(s.rows, 64);
  const int64_t blocks_of_narrow = ceil_div(s.rows, narrow_rows);
  const bool narrow =
      likely * blocks_of_narrow * 8 <= resident_blocks(s.sm_count, blocks_of_narrow > 2 ? 2 : 1, 8);
  const int few_rows = narrow ? narrow_rows : shrink_rows(s.rows, 96);
  const int64_t few = full * ceil_div(s.rows, few_rows);
  if (few * 8 <= resident_blocks(s.sm_count, 2, 8)) {
    // Of a short K, too, as long as CTAs have a multiprocessor each (K 2880, 304 tokens of rank
    // 8: 10.6 -> 9.6 us).
    const int least = few * 8 <= s.sm_count ? 320 : 512;
    const auto most_of_short = static_cast<int>(std::clamp<int64_t>(s.in_features / least, 1, 8));
    const int cluster = most == 16 && few * 16 <= s.sm_count ? 16 : most_of_short;
    return {few_rows, cluster, kShrinkHalf};
  }
  ShrinkConfig config{rows, 1, rows <= 64 ? kShrinkHalf : kShrinkWhole};
  const int64_t items = likely * blocks;
  const auto time = [&](int cluster) {  // times cluster
    const int64_t places =
        resident_blocks(s.sm_count, rows <= 64 ? 2 : 1, cluster <= 2 ? 1 : cluster);
    return ceil_div(items, std::max<int64_t>(places / cluster, 1)) * (10 + cluster);
  };
  for (int cluster = 2; cluster <= std::min(most, 8); ++cluster) {
    if (time(cluster) * config.cluster < time(config.cluster) * cluster) {
      config.cluster = cluster;
    }
  }
  return config;
}

// How often a cluster is halved so that its groups serve a tile each: as long as more CTAs than
// there are places for have a tile. Only the device knows how many tiles a batch has, and segments
// may leave most partly filled (`down`, 512 tokens in 16 segments, rank 16: 20 tiles for clusters
// of 16, two waves; 21.6 -> 17.7 us).
LORA_EXT_HOST_DEVICE inline int cluster_halvings(int num_tiles, int cluster, int places) {
  int halvings = 0;
  while ((cluster >> halvings) % 2 == 0 && num_tiles * (cluster >> halvings) > places) {
    ++halvings;
  }
  return halvings;
}

// What its apply's expand is left with. Many tiles are cut into parts, as many as there are
// multiprocessors, for tiles by whole CTAs would end in a wave that is mostly empty (16 segments of
// 8192 tokens, down, rank 16: 128 -> 110 us). With fewer tiles there are more parts of a tile than
// the expand should add up, and another kernel does, where clusters would have most to exchange, or
// would not all have room: those of 16 with more than 32 rows, and those whose CTAs have a
// multiprocessor each (qkv, 2048 tokens, rank 64: 34.6 -> 29.9 us; down, 512 tokens in 16 segments:
// 30.4 -> 25.7; but rank 16 12.0 -> 13.2).
inline XaLayout xa_layout(const ShrinkShape& s) {
  constexpr int kStep = 64;  // values of K
  XaLayout layout{};
  layout.by_tile = true;
  layout.most_tiles = static_cast<int32_t>(max_tiles(s.num_tokens, s.num_slots, kWideTileTokens));
  layout.steps = static_cast<int32_t>(ceil_div(s.in_features, kStep));
  const ShrinkConfig config = shrink_wgmma_config(s);
  const int rows = shrink_rows(s.rows);
  const int64_t blocks = ceil_div(s.rows, rows);
  const bool many = 2 * ceil_div(s.num_tokens, kWideTileTokens) * blocks > s.sm_count;
  layout.summed =
      !many && (config.cluster == 16 ? config.kilobytes == kShrinkHalf && config.rows > 32
                                     : config.kilobytes == kShrinkWhole);
  if (many || layout.summed) {
    layout.parts = static_cast<int32_t>(std::max<int64_t>(s.sm_count / blocks, 1));
  }
  return layout;
}

// Whether an apply's shrink splits sums for the expand. Those of fp16 are scaled by the largest of
// a token's, which no lane of the shrink knows.
inline bool xa_in_halves(const XaLayout& layout, DType dtype) {
  return layout.by_tile && layout.whole() && dtype == DType::kBFloat16;
}

// fp32 elements that it takes.
inline int64_t xa_elements(const ShrinkShape& s, const XaLayout& layout) {
  const int64_t places = int64_t{layout.most_tiles} * (layout.summed ? 2 : 1) + layout.parts;
  return places * kWideTileTokens * s.rows;
}

// Clusters of the grid of that kernel: one for each tile of a likely batch, and some for tiles that
// are partly filled; more tiles than that are served in turn. Those without a tile are in the way
// where they are many (`down`, 512 tokens of rank 16, pools of 64 slots and 256: 15.3 and 19.8 us,
// 11.3 with 16 clusters).
inline int64_t shrink_clusters(int64_t num_tokens, int64_t num_slots, int sm_count) {
  return std::min(max_tiles(num_tokens, num_slots, kWideTileTokens),
                  2 * ceil_div(num_tokens, kWideTileTokens) + sm_count / 8);
}

// CTAs of the expand that walks along rows of y, of which `resident` have room at once: where walks
// are long, as many again that come when the first ones leave and share the last eighth of the
// work, for multiprocessors take up to a quarter longer than others (8192 tokens in 16 segments,
// rank 64: 113 -> 108 us). Where they are short, what a CTA begins with would cost more.
inline int64_t expand_walks(int64_t num_tokens, int64_t row_steps, int64_t resident) {
  const int64_t items = ceil_div(num_tokens, kWideTileTokens) * row_steps;
  return items > 12 * resident ? 2 * resident : resident;
}

// Where the two kernels of decode_wide.cuh serve more than 256 tokens better, whose expand has B
// and y of its first blocks at hand when xa comes: as long as all blocks are a wave and a third of
// CTAs at most, and units of the shrink, tiles by 64 rows of A, find a cluster each. Up to as many
// values of K as make no more steps than its ring holds (K 2,048, 512 tokens of rank 64: 8.2 -> 7.3
// us, 304 of six segments of rank 32: 9.0 -> 8.2); of more, above rank 32, while there are two
// clusters for each unit, and x is little (K 4,096, 304 tokens of rank 64: 9.4 -> 7.8 us, but
// 640: 12.1 -> 12.5).
inline bool prefill_is_wide(const ApplyShape& s) {
  constexpr int64_t kRing = 6 * 64, kMostElements = 4 << 20;
  if (!s.half || s.batch_invariant || s.num_tokens <= kDecodeMaxTokens || s.max_rank <= 16 ||
      s.max_rank > kWideMostRank) {
    return false;
  }
  const WideSplit split = wide_split(s);
  const int64_t tiles = mixed_tiles(s.num_tokens, s.num_slots), units = tiles * split.row_groups;
  if (3 * tiles * ceil_div(s.out_features, 128) > 4 * 2 * s.sm_count) {
    return false;
  }
  if (s.in_features <= kRing * split.cluster) {
    return units <= split.places;
  }
  return s.max_rank > 32 && 2 * units <= split.places &&
         s.num_tokens * s.in_features <= kMostElements;
}

// The expand that walks along rows of y pays from where y is what moves; its registers hold 128
// ranks of xa.
inline bool expand_streams(int64_t num_tokens, int max_rank) {
  return num_tokens > kDecodeMaxTokens && max_rank <= 128;
}

}  // namespace lora_ext

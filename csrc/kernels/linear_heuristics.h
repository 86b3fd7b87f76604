// When a base layer of few tokens and its adapters are one stream of the weights
// (linear_decode.cu), and how. Pure functions of the problem's size, tested on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/heuristics.h"

namespace lora_ext {

struct LinearShape {
  int64_t num_tokens, num_slots, in_features, out_features;
  int num_slices, max_rank, sm_count;
  bool half;             // x, W and the adapters have 16 bits
  bool capable;          // the chip starts a kernel while the one before is at work, and an SM has
                         // shared memory enough
  bool vector;           // rows of x and W allow 16-byte copies
  bool batch_invariant;  // the choice must not depend on the batch
};

struct LinearConfig {
  int blocks;  // of 8 tokens; 0: the base layer and its adapters take kernels of their own
  int groups;  // CTAs
  int lanes;   // that copy a row of B, 8 ranks each: as many as the pool's rank needs, up to 8
};

// With more tokens x, which every CTA reads from L2, is as much as its share of W: 32 tokens take
// 146 us a layer where cuBLAS takes 120.
constexpr int64_t kLinearMaxTokens = 16;
// Of an SM; what a CTA takes of it leaves room for a shrink, but where xa is large.
constexpr int kLinearSharedBytes = 228 * 1024;
// Values of xa of all tokens, fp32, in shared memory.
constexpr int64_t kLinearMostXa = 8192;

// xa of a slice of a token there, in values: whole products of 16 ranks.
LORA_EXT_HOST_DEVICE inline int xa_slice(int max_rank) { return (max_rank + 15) / 16 * 16; }

inline LinearConfig linear_config(const LinearShape& s) {
  const int blocks = s.num_tokens <= 8 ? 1 : 2;
  if (!s.half || !s.capable || !s.vector || s.batch_invariant || s.num_tokens < 1 ||
      s.num_tokens > kLinearMaxTokens || s.in_features < 1 || s.out_features < 1 ||
      int64_t{8} * blocks * s.num_slices * xa_slice(s.max_rank) > kLinearMostXa) {
    return {};
  }
  return {blocks, static_cast<int>(std::min<int64_t>(ceil_div(s.out_features, 16), s.sm_count)),
          s.max_rank <= 16   ? 2
          : s.max_rank <= 32 ? 4
                             : 8};
}

// Tokens from which on a product of a tile of W by clusters comes first, where it can be had
// (linear_wgmma.cu): it pays for each adapter more and for the tokens less. With one it is the
// faster one as soon as linear_decode's tokens are two blocks (16 tokens of rank 16: 129 -> 124 us
// a layer), with more of them it is not (four: 130 -> 136).
LORA_EXT_HOST_DEVICE inline int64_t linear_wgmma_tokens(int64_t num_slots) {
  return num_slots == 1 ? 9 : kLinearMaxTokens + 1;
}

// Of an SM's L1 cache, what a shrink wants as shared memory that runs beside a base layer's product
// or just before one; `alone`: what it wants else. Beside linear_wgmma all of it, as that kernel
// does, so that an SM need not be divided anew (what one adapter of rank 16 adds to a layer of 32
// tokens: 7.8 -> 6.3 %). But loads on their way live in what is left of the cache, so not where
// they are many (32 adapters of rank 16: 162 -> 164 us), nor beside linear_decode, which leaves
// more of an SM (8 tokens of 8 adapters: 7.3 -> 8.3 %).
inline int shrink_beside_product_percent(const ApplyShape& s, int alone) {
  constexpr int64_t kFewBytes = 4 << 20;
  const int64_t bytes = likely_tiles(s.num_tokens, s.num_slots, kTileTokens) * s.num_slices *
                        s.max_rank * s.in_features * 2;
  return s.num_tokens >= linear_wgmma_tokens(s.num_slots) && bytes <= kFewBytes ? 100 : alone;
}

// The same of both kernels of an apply that begins beside a base layer's product: room for two CTAs
// of each, and what is left for loads on their way, as all of it begins at once when the product's
// CTAs leave (128 tokens of 32 adapters of rank 16: 184 us a layer with what CUDA chooses, 186 with
// all, 183 with none, 179).
constexpr int kBesideSharedPercent = 30;

// The same for a few dozen tokens on sm_90a (linear_wgmma.cu). More tokens, or ranks, are faster as
// cuBLAS and two kernels behind it: 48 tokens of one adapter of rank 16 take 151 us a layer for
// 149, 32 tokens of 32 adapters of rank 64 251 for 237. With 32 tokens it takes 128 for 147 (one
// adapter of rank 16), 162 for 171 (32 of them), 134 for 149 and 192 for 192 (rank 32).
constexpr int64_t kLinearWgmmaMaxTokens = 32;
constexpr int kLinearWgmmaMaxRank = 32;
constexpr int kLinearTileRows = 128;  // of W, of a tile

// CTAs that share a tile's K: as many as make one and a half on an SM, which cover each other's
// beginnings and ends; more than six find no room for their cluster beside the others (`down`, 32
// tokens: 34 us with six, 38 with eight). 0: another kernel, as where that leaves half the SMs
// idle.
inline int linear_wgmma_cluster(const LinearShape& s) {
  constexpr int64_t kMostCluster = 6, kLeastFeatures = 256;
  if (!s.half || !s.capable || !s.vector || s.batch_invariant ||
      s.num_tokens < linear_wgmma_tokens(s.num_slots) || s.num_tokens > kLinearWgmmaMaxTokens ||
      s.max_rank > kLinearWgmmaMaxRank || s.in_features < kLeastFeatures) {
    return 0;
  }
  const int64_t tiles = ceil_div(s.out_features, kLinearTileRows);
  const int64_t cluster = std::clamp<int64_t>(
      s.sm_count * 3 / 2 / tiles, 1, std::min(kMostCluster, s.in_features / kLeastFeatures));
  return 2 * tiles * cluster < s.sm_count ? 0 : static_cast<int>(cluster);
}

}  // namespace lora_ext

// What the two decode kernels have in common: their work list, and how a CTA finds its entry.
//
// Up to 256 tokens, shrink and expand are two kernels chained by programmatic dependent launch. The
// shrink (decode_shrink.cuh) writes partial products of parts of K to a workspace; the expand
// (decode_expand.cuh), resident while the shrink is at work and with its B and y already fetched,
// adds them up in the order of the parts and multiplies. So all weights are on their way at once,
// and no CTA waits for a neighbour.
//
// In both products the weights are the 16-row operand of the mma and the tokens the 8-column one,
// so that a tile of one token wastes no weight bandwidth; every lane loads 16 bytes at a time, to
// where it needs them itself: no barrier stands between a load and its use. Weights are read once
// per tile, at their true rank. The order of every sum is fixed: same inputs, same bits.
#pragma once

#include "kernels/heuristics.h"

namespace lora_ext::cuda {

// The kernels' own parameters: the parameter bank is cold at every launch, and the arrays of
// ApplyParams would cost a dozen misses, a microsecond in all.
struct DecodeBatch {
  const int32_t* header;
  const Tile* tiles;
  const int32_t *permutation, *ranks;
  const float* scalings;
  float* partial;  // room for [part of a tile][row_groups * group_rows][16 tokens]
  SplitRules split_rules;
  int32_t tile_capacity, max_tokens, num_slots, num_tokens, max_rank, num_slices, in_features;
  int32_t row_groups, group_rows_log;  // CTAs of the shrink for a part of K, and rows of each
};

__device__ __forceinline__ TileShares tile_shares(const DecodeBatch& p, int rank, int parts) {
  return TileShares(p.row_groups, p.group_rows_log, rank * p.num_slices, parts);
}

// Where the partial products of a tile begin, given its first part.
__device__ __forceinline__ float* partial_products(const DecodeBatch& p, int first_part) {
  const int rows = p.row_groups << p.group_rows_log;
  return p.partial + int64_t{first_part} * (rows * kTileTokens);
}

// What a CTA must know before its first load of weights; `token` is that of entry lane % 16.
struct DecodeTile {
  int slot, start, count, rank, token;
};

// Reads the plan. While it may be yet to be written, past the L1 cache, which would keep what was
// there; when it is final through that cache, because all warps of all CTAs read the same few lines
// at the same time, one after another where L2 has them: 2 us with 256 CTAs of 8 warps.
template <bool kFinal, typename V>
__device__ __forceinline__ V read_plan(const V* from) {
  if constexpr (kFinal) {
    return __ldca(from);
  } else {
    return __ldcg(from);
  }
}

// Of a final plan. Asked for here, not where it is first used, which would be a trip of its own.
__device__ __forceinline__ int read_num_tiles(const DecodeBatch& p) {
  int count;
  asm volatile("ld.global.ca.s32 %0, [%1];\n" : "=r"(count) : "l"(p.header + kNumTiles));
  return count;
}

// `slot` and `start` say where to look, so that the tile, its rank and its tokens come in one round
// of loads instead of two; where they are wrong it reads again.
template <bool kFinal>
__device__ __forceinline__ DecodeTile read_tile(const DecodeBatch& p, int tile, int slot,
                                                int start) {
  const int entry = threadIdx.x % kTileTokens;
  for (;;) {
    const int4 raw =
        read_plan<kFinal>(reinterpret_cast<const int4*>(p.tiles + min(tile, p.tile_capacity - 1)));
    const int rank = read_plan<kFinal>(p.ranks + min(max(slot, 0), p.num_slots - 1));
    const int token =
        read_plan<kFinal>(p.permutation + min(max(start + entry, 0), p.max_tokens - 1));
    if (raw.x == slot && raw.y == start && tile < p.tile_capacity) {
      // A token past the end of x (a plan for more tokens than this call has) counts as absent.
      return {slot, start, raw.z, min(rank, p.max_rank),
              entry < raw.z && token < p.num_tokens ? token : -1};
    }
    if (raw.x < 0 || tile >= p.tile_capacity) {
      return {-1, 0, 0, 0, -1};
    }
    slot = raw.x, start = raw.y;
  }
}

}  // namespace lora_ext::cuda

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
  float* partial;  // [tile][split][S * R][16 tokens]
  SplitLimits split_limits;
  int32_t tile_capacity, max_tokens, num_slots, num_tokens, max_rank, num_slices, in_features;
};

// What a CTA must know before its first load of weights; `token` is that of entry lane % 16.
struct DecodeTile {
  int slot, start, count, rank, token;
};

// The parts of K follow from the tiles that there are, which the host does not know.
__device__ __forceinline__ int read_split_shift(const DecodeBatch& p) {
  return p.split_limits.shift(__ldcg(p.header + kNumTiles));
}

// `slot` and `start` say where to look, so that the tile, its rank and its tokens come in one round
// of loads instead of two; where they are wrong it reads again. Past L1, since the guess may have
// been read before the kernel that makes the plan was done.
__device__ __forceinline__ DecodeTile read_tile(const DecodeBatch& p, int tile, int slot,
                                                int start) {
  const int entry = threadIdx.x % kTileTokens;
  for (;;) {
    const int4 raw =
        __ldcg(reinterpret_cast<const int4*>(p.tiles + min(tile, p.tile_capacity - 1)));
    const int rank = __ldcg(p.ranks + min(max(slot, 0), p.num_slots - 1));
    const int token = __ldcg(p.permutation + min(max(start + entry, 0), p.max_tokens - 1));
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

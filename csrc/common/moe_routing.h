// The routing of one MoE layer: one int32 buffer that tells its LoRA kernels which (token, choice)
// pair uses which (slot, expert).
//
// Written by moe_lora_align_ for every layer, since every layer routes anew, and read by the
// layer's moe_lora_apply_ calls. Pair p is choice p % top_k of token p / top_k. Pairs without an
// adapter (slot -1) or without an expert (id -1, or one that this process does not hold) are left
// out, so the work follows from what is here alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"

namespace lora_ext {

// A weight read should serve as many pairs as there are; kernels leave out what a tile does not
// fill, so one height serves one pair as well as many.
constexpr int kMoeTilePairs = 64;

// The start of the buffer, in int32 units.
enum RoutingHeader : int {
  kNumRoutedPairs = 0,     // the valid length of the permutation
  kNumGroups = 1,          // distinct (slot, expert)
  kNumMoeTiles = 2,        // valid tiles; behind them up to the capacity: slot -1
  kPermutationOffset = 3,  // where the permutation starts in the buffer
  kRoutingHeaderSize = 16,
};

// Up to kMoeTilePairs pairs of one (slot, expert): permutation[start .. start + count). Tiles are
// in the order of (slot, expert), and each starts where the one before it ends.
struct alignas(16) MoeTile {
  int32_t slot, start, count, expert;
};

// Most tiles that `num_pairs` pairs can make, whatever the mix.
constexpr int64_t max_moe_tiles(int64_t num_pairs, int64_t num_groups) {
  return std::min(num_pairs, num_pairs / kMoeTilePairs + num_groups);
}

// Pairs that moe_lora_align_ sorts without help from memory. More are shared by several thread
// blocks, which exchange them there.
constexpr int64_t kMoeSharedPairs = 2048;

// Where the sections lie for one call, as offsets in int32 units. The tiles come first because
// their place does not depend on the call: a kernel reads header and tile at once, and learns from
// the header where the permutation is.
struct RoutingLayout {
  int64_t tile_capacity, permutation, scratch, size;

  constexpr RoutingLayout(int64_t num_pairs, int64_t num_groups)
      : tile_capacity(max_moe_tiles(num_pairs, num_groups)),
        permutation(kRoutingHeaderSize + 4 * tile_capacity),
        scratch((permutation + num_pairs + 1) / 2 * 2),  // holds 64-bit values
        size(num_pairs > kMoeSharedPairs ? scratch + 4 * num_pairs : permutation + num_pairs) {}
};

LORA_EXT_HOST_DEVICE inline const MoeTile* moe_tiles(const int32_t* routing) {
  return reinterpret_cast<const MoeTile*>(routing + kRoutingHeaderSize);
}
LORA_EXT_HOST_DEVICE inline MoeTile* moe_tiles(int32_t* routing) {
  return reinterpret_cast<MoeTile*>(routing + kRoutingHeaderSize);
}

}  // namespace lora_ext

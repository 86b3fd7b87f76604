// moe_align on the CPU: the routed pairs, sorted by (slot, expert) and pair.

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace lora_ext::cpu {
namespace {

// The expert of a pair among the weights' experts, or -1.
int64_t local_expert(const MoeAlignParams& p, int64_t pair) {
  int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[pair]
                               : static_cast<const int32_t*>(p.topk_ids)[pair];
  if (p.expert_map != nullptr) id = id >= 0 && id < p.num_global ? p.expert_map[id] : -1;
  return id >= 0 && id < p.num_experts ? id : -1;
}

}  // namespace

void moe_align(const MoeAlignParams& p) {
  const RoutingLayout at(p.num_pairs, int64_t{p.num_slots} * p.num_experts);
  std::vector<int64_t> words;  // key and pair: unique, so that any sort is a stable one
  words.reserve(p.num_pairs);
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int32_t slot = p.token_slots[pair / p.top_k];
    const int64_t expert = local_expert(p, pair);
    if (slot < 0 || slot >= p.num_slots || expert < 0) continue;
    words.push_back((int64_t{slot} * p.num_experts + expert) << 32 | pair);
  }
  std::sort(words.begin(), words.end());

  MoeTile* const tiles = moe_tiles(p.routing);
  int32_t* const permutation = p.routing + at.permutation;
  const auto num_routed = static_cast<int32_t>(words.size());
  int32_t num_groups = 0, num_tiles = 0;
  for (int32_t i = 0; i < num_routed; ++i) {
    permutation[i] = static_cast<int32_t>(words[i]);
    const auto key = static_cast<int32_t>(words[i] >> 32);
    const bool new_group = i == 0 || key != static_cast<int32_t>(words[i - 1] >> 32);
    if (new_group || tiles[num_tiles - 1].count == kMoeTilePairs) {
      tiles[num_tiles++] = MoeTile{key / p.num_experts, i, 0, key % p.num_experts};
    }
    ++tiles[num_tiles - 1].count;
    num_groups += new_group;
  }
  std::fill(permutation + num_routed, permutation + p.num_pairs, -1);
  std::fill(tiles + num_tiles, tiles + at.tile_capacity, MoeTile{-1, 0, 0, 0});
  std::fill_n(p.routing, static_cast<int>(kRoutingHeaderSize), 0);
  p.routing[kNumRoutedPairs] = num_routed;
  p.routing[kNumGroups] = num_groups;
  p.routing[kNumMoeTiles] = num_tiles;
  p.routing[kPermutationOffset] = static_cast<int32_t>(at.permutation);
}

}  // namespace lora_ext::cpu

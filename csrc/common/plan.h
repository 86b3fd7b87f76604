// The batch plan: one int32 buffer that tells every layer which token uses which slot.
//
// Computed once per batch by plan_batch_ and shared by all layers. Its layout depends on two
// capacities only, M (max_tokens, a multiple of 64) and L (slots), and its size is linear in both,
// so an op that knows L and the buffer's size knows M: no capacity travels as an argument.
// Everything a kernel needs to find its work is here; nothing in it depends on a module (ranks and
// scalings do, and are arguments of the ops).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lora_ext {

// Heights of the two tile lists. 16 tokens fill the token side of one mma; 64 is a wide tile for
// prefill, where a weight read should serve as many tokens as possible.
constexpr int kTileTokens = 16;
constexpr int kWideTileTokens = 64;

// Counts at the start of the plan, in int32 units.
enum PlanHeader : int {
  kNumTokens = 0,       // tokens of the batch, without padding
  kNumSegments = 1,     // runs of consecutive tokens of one slot (-1 runs included)
  kNumActiveSlots = 2,  // distinct slots >= 0 in the batch
  kNumLoraTokens = 3,   // tokens with a slot >= 0: the valid length of the permutation
  kNumTiles = 4,
  kNumWideTiles = 5,
  kPlanHeaderSize = 16,
};

// Up to kTileTokens (or kWideTileTokens) tokens of one slot: permutation[start .. start + count).
// Entries past the count of the header have slot -1, so a CTA needs one load to know that it has no
// work.
struct alignas(16) Tile {
  int32_t slot, start, count, unused;
};

// Where the sections lie, as offsets in int32 units. Sections that are read 16 bytes at a time come
// first.
struct PlanLayout {
  int64_t max_tokens, num_slots;
  int64_t tiles, wide_tiles, token_slots, permutation, seg_indptr, seg_slots, slot_indptr, enabled,
      size;

  LORA_EXT_HOST_DEVICE constexpr PlanLayout(int64_t max_tokens_, int64_t num_slots_)
      : max_tokens(max_tokens_),
        num_slots(num_slots_),
        tiles(kPlanHeaderSize),
        wide_tiles(tiles + 4 * tile_capacity(max_tokens_, kTileTokens)),
        token_slots(wide_tiles + 4 * tile_capacity(max_tokens_, kWideTileTokens)),
        permutation(token_slots + max_tokens_),
        seg_indptr(permutation + max_tokens_),
        seg_slots(seg_indptr + max_tokens_ + 4),
        slot_indptr(seg_slots + max_tokens_),
        enabled(slot_indptr + num_slots_ + 1),
        size(enabled + num_slots_ + 3) {}

  // Every slot in the batch can leave one tile partly filled.
  LORA_EXT_HOST_DEVICE constexpr int64_t tile_capacity(int64_t tokens, int tile_tokens) const {
    return tokens / tile_tokens + num_slots;
  }
};

constexpr int64_t plan_size(int64_t max_tokens, int64_t num_slots) {
  return PlanLayout((max_tokens + kWideTileTokens - 1) / kWideTileTokens * kWideTileTokens,
                    num_slots)
      .size;
}

// Capacity M of a plan of `size` elements for `num_slots` slots, or -1 where no such plan exists.
constexpr int64_t plan_max_tokens(int64_t size, int64_t num_slots) {
  const int64_t rest = size - PlanLayout(0, num_slots).size;
  const int64_t per_block = PlanLayout(kWideTileTokens, 0).size - PlanLayout(0, 0).size;
  return rest < 0 || rest % per_block != 0 ? -1 : rest / per_block * kWideTileTokens;
}

// The sections as pointers: what kernels take.
struct PlanView {
  int32_t* header;       // [kPlanHeaderSize]
  Tile* tiles;           // [M / 16 + L]
  Tile* wide_tiles;      // [M / 64 + L]
  int32_t* token_slots;  // [M] slot of each token; -1: no adapter, or padding
  int32_t* permutation;  // [M] token ids grouped by slot, in token order within a slot; -1 behind
                         // kNumLoraTokens
  int32_t* seg_indptr;   // [M + 1] merged segments; valid: kNumSegments + 1
  int32_t* seg_slots;    // [M] slot of each merged segment; valid: kNumSegments
  int32_t* slot_indptr;  // [L + 1] where each slot's tokens start in the permutation
  int32_t* enabled;      // [L] 1 where the batch uses the slot
  int64_t max_tokens;    // M
  int64_t num_slots;     // L
};

LORA_EXT_HOST_DEVICE inline PlanView plan_view(int32_t* plan, int64_t max_tokens,
                                               int64_t num_slots) {
  const PlanLayout at(max_tokens, num_slots);
  return PlanView{plan,
                  reinterpret_cast<Tile*>(plan + at.tiles),
                  reinterpret_cast<Tile*>(plan + at.wide_tiles),
                  plan + at.token_slots,
                  plan + at.permutation,
                  plan + at.seg_indptr,
                  plan + at.seg_slots,
                  plan + at.slot_indptr,
                  plan + at.enabled,
                  max_tokens,
                  num_slots};
}

}  // namespace lora_ext

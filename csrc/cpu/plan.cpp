// plan_batch on the CPU: a stable counting sort of the tokens by slot, and the lists that follow
// from it. Every field of the plan is written, so the result does not depend on what the buffer
// held before.

#include <algorithm>

#include "cpu/kernels.h"

namespace lora_ext::cpu {
namespace {

// Fills token_slots, -1 behind the batch, and returns the number of tokens. What lies beyond the
// capacity is dropped, and a slot that does not exist counts as no adapter: nothing is ever written
// out of bounds.
int64_t fill_token_slots(const PlanParams& p) {
  const PlanView& plan = p.plan;
  const auto valid_slot = [&](int32_t slot) {
    return slot >= 0 && slot < plan.num_slots ? slot : -1;
  };
  const auto clamp = [&](int64_t token) { return std::clamp<int64_t>(token, 0, plan.max_tokens); };

  std::fill_n(plan.token_slots, plan.max_tokens, -1);
  if (p.seg_lens == nullptr && p.seg_indptr == nullptr) {
    const int64_t num_tokens = clamp(p.n);
    std::transform(p.slots, p.slots + num_tokens, plan.token_slots, valid_slot);
    return num_tokens;
  }
  int64_t end = 0;
  for (int64_t segment = 0; segment < p.n; ++segment) {
    const int64_t begin = p.seg_lens != nullptr ? end : p.seg_indptr[segment];
    end = p.seg_lens != nullptr ? begin + std::max(p.seg_lens[segment], 0)
                                : p.seg_indptr[segment + 1];
    if (clamp(begin) < clamp(end)) {
      std::fill(plan.token_slots + clamp(begin), plan.token_slots + clamp(end),
                valid_slot(p.slots[segment]));
    }
  }
  return clamp(end);
}

// Runs of consecutive tokens of one slot.
int64_t fill_segments(const PlanView& plan, int64_t num_tokens) {
  int64_t num_segments = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (token == 0 || plan.token_slots[token] != plan.token_slots[token - 1]) {
      plan.seg_indptr[num_segments] = static_cast<int32_t>(token);
      plan.seg_slots[num_segments++] = plan.token_slots[token];
    }
  }
  std::fill(plan.seg_indptr + num_segments, plan.seg_indptr + plan.max_tokens + 1,
            static_cast<int32_t>(num_tokens));
  std::fill(plan.seg_slots + num_segments, plan.seg_slots + plan.max_tokens, -1);
  return num_segments;
}

// slot_indptr, permutation and enabled; returns the number of slots in use.
int64_t group_by_slot(const PlanView& plan, int64_t num_tokens) {
  // Counts go two entries up, so that after the prefix sum entry slot + 1 is where the slot starts;
  // placing the tokens moves it to where the slot ends, which is where the next one starts.
  int32_t* const indptr = plan.slot_indptr;
  std::fill_n(indptr, plan.num_slots + 1, 0);
  std::fill_n(plan.enabled, plan.num_slots, 0);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t slot = plan.token_slots[token];
    if (slot < 0) continue;
    plan.enabled[slot] = 1;
    if (slot + 2 <= plan.num_slots) ++indptr[slot + 2];
  }
  for (int64_t slot = 0; slot < plan.num_slots; ++slot) indptr[slot + 1] += indptr[slot];

  std::fill_n(plan.permutation, plan.max_tokens, -1);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t slot = plan.token_slots[token];
    if (slot >= 0) plan.permutation[indptr[slot + 1]++] = static_cast<int32_t>(token);
  }
  return std::count(plan.enabled, plan.enabled + plan.num_slots, 1);
}

int64_t fill_tiles(const PlanView& plan, Tile* tiles, int32_t tile_tokens) {
  int64_t num_tiles = 0;
  for (int32_t slot = 0; slot < plan.num_slots; ++slot) {
    const int32_t end = plan.slot_indptr[slot + 1];
    for (int32_t start = plan.slot_indptr[slot]; start < end; start += tile_tokens) {
      tiles[num_tiles++] = Tile{slot, start, std::min(tile_tokens, end - start), 0};
    }
  }
  std::fill(tiles + num_tiles, tiles + plan.max_tokens / tile_tokens + plan.num_slots,
            Tile{-1, 0, 0, 0});
  return num_tiles;
}

}  // namespace

void plan_batch(const PlanParams& p) {
  const PlanView& plan = p.plan;
  const int64_t num_tokens = fill_token_slots(p);
  const int64_t num_segments = fill_segments(plan, num_tokens);
  const int64_t num_active = group_by_slot(plan, num_tokens);

  std::fill_n(plan.header, static_cast<int>(kPlanHeaderSize), 0);
  plan.header[kNumTokens] = static_cast<int32_t>(num_tokens);
  plan.header[kNumSegments] = static_cast<int32_t>(num_segments);
  plan.header[kNumActiveSlots] = static_cast<int32_t>(num_active);
  plan.header[kNumLoraTokens] = plan.slot_indptr[plan.num_slots];
  plan.header[kNumTiles] = static_cast<int32_t>(fill_tiles(plan, plan.tiles, kTileTokens));
  plan.header[kNumWideTiles] =
      static_cast<int32_t>(fill_tiles(plan, plan.wide_tiles, kWideTileTokens));
}

}  // namespace lora_ext::cpu

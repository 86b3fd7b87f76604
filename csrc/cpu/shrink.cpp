// Shrink on the CPU. An item of work is a wide tile (up to 64 tokens of one slot) by a few rows of
// the slot's A, which stay in the cache while the tokens pass.

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace lora_ext::cpu {
namespace {

constexpr int kRowsPerItem = 8;

int64_t row_blocks(const ShrinkParams& p, const Tile& tile) {
  return (slot_rank(p.ranks, tile.slot, p.max_rank) + kRowsPerItem - 1) / kRowsPerItem;
}

// Rows [block * kRowsPerItem, ...) of one slice.
void shrink_block(const ShrinkParams& p, const Tile& tile, int slice, int64_t block) {
  const int rank = slot_rank(p.ranks, tile.slot, p.max_rank);
  const int64_t row = block * kRowsPerItem;
  const int64_t element = element_bytes(p.dtype);
  const void* x[kWideTileTokens];
  void* out[kWideTileTokens];
  int64_t num_tokens = 0;
  for (int32_t i = tile.start; i < tile.start + tile.count; ++i) {
    const int64_t token = p.plan.permutation[i];
    if (token >= p.num_tokens) continue;
    x[num_tokens] = static_cast<const char*>(p.x) + token * p.x_stride * element;
    out[num_tokens++] =
        static_cast<char*>(p.xa) +
        (token * p.xa_stride + int64_t{slice} * rank + row) * accumulator_bytes(p.dtype);
  }
  const char* const a = static_cast<const char*>(p.a.base[slice]) +
                        p.a.row_offset(tile.slot, slice, rank, row) * element;
  microkernels().dot[static_cast<int>(p.dtype)](DotParams{
      x, num_tokens, a, p.a.stride(slice, rank), std::min<int64_t>(kRowsPerItem, rank - row),
      p.in_features, p.scalings[tile.slot], out});
}

}  // namespace

void shrink_adapters(const ShrinkParams& p) {
  const int64_t num_tiles = p.plan.header[kNumWideTiles];
  // Ranks differ, so tiles have different numbers of items: item -> tile by binary search.
  std::vector<int64_t> first_item(num_tiles + 1, 0);
  int64_t work = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t blocks = p.num_slices * row_blocks(p, p.plan.wide_tiles[i]);
    first_item[i + 1] = first_item[i] + blocks;
    work += blocks * kRowsPerItem * p.plan.wide_tiles[i].count * p.in_features;
  }
  parallel_for(first_item[num_tiles], work, [&](int64_t item) {
    const auto tile =
        std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
    const int64_t index = item - first_item[tile];
    const int64_t blocks = row_blocks(p, p.plan.wide_tiles[tile]);
    shrink_block(p, p.plan.wide_tiles[tile], static_cast<int>(index / blocks), index % blocks);
  });
}

void shrink(const ShrinkParams& p) {
  const int64_t bytes = accumulator_bytes(p.dtype);
  const int64_t columns = int64_t{p.num_slices} * p.max_rank;
  parallel_for(p.num_tokens, p.num_tokens * columns, [&](int64_t token) {
    const int32_t slot = p.plan.token_slots[token];
    const int64_t written =
        slot < 0 ? 0 : int64_t{p.num_slices} * slot_rank(p.ranks, slot, p.max_rank);
    std::memset(static_cast<char*>(p.xa) + (token * p.xa_stride + written) * bytes, 0,
                (columns - written) * bytes);
  });
  shrink_adapters(p);
}

}  // namespace lora_ext::cpu

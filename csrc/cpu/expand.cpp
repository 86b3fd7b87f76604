// Expand on the CPU. An item of work is a wide tile (up to 64 tokens of one slot) by some columns
// of y; B's rows for them are transposed panel by panel, and each panel serves all tokens while it
// is in the nearest cache.

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kColumnsPerItem = 256;

// The tokens of a tile: where their rows of xa and y start.
struct TileRows {
  int64_t count = 0;
  const char* xa[kWideTileTokens];
  char* y[kWideTileTokens];

  TileRows(const ExpandParams& p, const Tile& tile) {
    for (int32_t i = tile.start; i < tile.start + tile.count; ++i) {
      const int64_t token = p.plan.permutation[i];
      if (token >= p.num_tokens) continue;
      xa[count] = static_cast<const char*>(p.xa) + token * p.xa_stride * accumulator_bytes(p.dtype);
      y[count++] = static_cast<char*>(p.y) + token * p.y_stride * element_bytes(p.y_dtype);
    }
  }
};

// Columns [begin, end) of one slice, counted within the slice.
void expand_columns(const ExpandParams& p, const Tile& tile, int slice, int64_t begin,
                    int64_t end) {
  const int rank = slot_rank(p.ranks, tile.slot, p.max_rank);
  if (rank == 0) return;
  const Microkernels& kernels = microkernels();
  const bool is_wide = p.dtype == DType::kFloat64;
  const int64_t lanes = kernels.lanes(p.dtype);
  const TileRows rows(p, tile);

  const void* xa[kWideTileTokens];
  for (int64_t i = 0; i < rows.count; ++i) {
    xa[i] = rows.xa[i] + int64_t{slice} * rank * accumulator_bytes(p.dtype);
  }
  alignas(64) unsigned char panel[kMaxPanelBytes];
  for (int64_t column = begin; column < end; column += lanes) {
    const int64_t num_columns = std::min(lanes, end - column);
    const char* const b = static_cast<const char*>(p.b.base[slice]) +
                          p.b.row_offset(tile.slot, slice, rank, column) * element_bytes(p.dtype);
    void* y[kWideTileTokens];
    for (int64_t i = 0; i < rows.count; ++i) {
      y[i] = rows.y[i] + (p.slices.offset[slice] + column) * element_bytes(p.y_dtype);
    }
    kernels.pack[static_cast<int>(p.dtype)](
        PackParams{b, p.b.stride(slice, rank), num_columns, rank, panel});
    kernels.accumulate[is_wide][static_cast<int>(p.y_dtype)](
        AccumulateParams{panel, rank, num_columns, xa, y, rows.count});
  }
}

}  // namespace

void expand(const ExpandParams& p) {
  // The blocks of columns of all slices in one row: item -> (tile, block) -> (slice, columns).
  int64_t first_block[kMaxSlices + 1] = {};
  for (int i = 0; i < p.slices.count; ++i) {
    const int64_t width = p.slices.offset[i + 1] - p.slices.offset[i];
    first_block[i + 1] = first_block[i] + (width + kColumnsPerItem - 1) / kColumnsPerItem;
  }
  const int64_t num_blocks = first_block[p.slices.count];
  const int64_t num_tiles = p.plan.header[kNumWideTiles];
  int64_t work = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const Tile& tile = p.plan.wide_tiles[i];
    work += int64_t{tile.count} * slot_rank(p.ranks, tile.slot, p.max_rank) *
            p.slices.offset[p.slices.count];
  }
  parallel_for(num_tiles * num_blocks, work, [&](int64_t item) {
    const int64_t block = item % num_blocks;
    int slice = 0;
    while (block >= first_block[slice + 1]) ++slice;
    const int64_t width = p.slices.offset[slice + 1] - p.slices.offset[slice];
    const int64_t begin = (block - first_block[slice]) * kColumnsPerItem;
    expand_columns(p, p.plan.wide_tiles[item / num_blocks], slice, begin,
                   std::min(begin + kColumnsPerItem, width));
  });
}

}  // namespace lora_ext::cpu

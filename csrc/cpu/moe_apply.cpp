// moe_apply on the CPU: shrink into the workspace, then expand from it, both by tiles of up to 64
// pairs of one (slot, expert) with the microkernels of the dense ops. A row's bits depend on
// nothing but the row.

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kColumnsPerItem = 256;
constexpr int kMaxElementBytes = 8;

// One tile with its adapter. Pairs that this call's y does not have are left out. The workspace has
// a row for each pair.
struct TileRows {
  const MoeTile& tile;
  int rank;
  int64_t count = 0;
  int32_t pairs[kMoeTilePairs];
  char* xa[kMoeTilePairs];

  TileRows(const MoeApplyParams& p, const MoeTile& tile_)
      : tile(tile_), rank(slot_rank(p.ranks, tile_.slot, p.max_rank)) {
    const int32_t* const permutation = p.routing + p.routing[kPermutationOffset];
    const int64_t row_bytes = int64_t{p.slices.count} * p.max_rank * accumulator_bytes(p.dtype);
    for (int32_t i = tile.start; i < tile.start + tile.count; ++i) {
      if (permutation[i] >= p.num_pairs) continue;
      pairs[count] = permutation[i];
      xa[count++] = static_cast<char*>(p.workspace) + permutation[i] * row_bytes;
    }
  }
};

double topk_weight(const MoeApplyParams& p, int64_t pair) {
  switch (p.weights_dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(p.topk_weights)[pair];
    case DType::kFloat32:
      return static_cast<const float*>(p.topk_weights)[pair];
    case DType::kBFloat16: {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(p.topk_weights)[pair]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
    default: {
      // Subnormals and all: the exponent moves into fp32's range by one exact multiplication.
      const uint16_t half = static_cast<const uint16_t*>(p.topk_weights)[pair];
      const uint32_t magnitude = half & 0x7fffu;
      const uint32_t bits = magnitude << 13 | (magnitude >= 0x7c00u ? 0x7f800000u : 0);
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      if (magnitude < 0x7c00u) value *= 0x1p112f;
      return half & 0x8000u ? -value : value;
    }
  }
}

template <class Scalar>
void scale(char* values, int64_t count, double factor) {
  auto* const at = reinterpret_cast<Scalar*>(values);
  for (int64_t i = 0; i < count; ++i) at[i] *= static_cast<Scalar>(factor);
}

// One slice of the intermediate of a tile, weighted.
void shrink_tile(const MoeApplyParams& p, const TileRows& rows, int slice) {
  const int64_t element = element_bytes(p.dtype), offset = int64_t{slice} * rows.rank;
  const void* x[kMoeTilePairs];
  void* out[kMoeTilePairs];
  for (int64_t i = 0; i < rows.count; ++i) {
    x[i] = static_cast<const char*>(p.x) + rows.pairs[i] / p.x_divisor * p.x_stride * element;
    out[i] = rows.xa[i] + offset * accumulator_bytes(p.dtype);
  }
  const char* const a =
      static_cast<const char*>(p.a.base[slice]) +
      p.a.row_offset(rows.tile.slot, rows.tile.expert, slice, rows.rank, 0) * element;
  microkernels().dot[static_cast<int>(p.dtype)](
      DotParams{x, rows.count, a, p.a.stride(slice, rows.rank), rows.rank, p.in_features,
                p.scalings[rows.tile.slot], out});
  if (p.topk_weights == nullptr) return;
  for (int64_t i = 0; i < rows.count; ++i) {
    const auto scale_row = p.dtype == DType::kFloat64 ? scale<double> : scale<float>;
    scale_row(static_cast<char*>(out[i]), rows.rank, topk_weight(p, rows.pairs[i]));
  }
}

void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t count,
                  int64_t element) {
  for (int64_t n = 0; n < count; ++n) {
    std::memcpy(to + n * to_stride * element, from + n * from_stride * element, element);
  }
}

// Columns [begin, end) of one slice, counted within the slice. Where y's columns are not neighbours
// they pass through copies that are.
void expand_columns(const MoeApplyParams& p, const TileRows& rows, int slice, int64_t begin,
                    int64_t end) {
  const Microkernels& kernels = microkernels();
  const int64_t lanes = kernels.lanes(p.dtype), element = element_bytes(p.y_dtype);
  const bool is_wide = p.dtype == DType::kFloat64, strided = p.column_stride != 1;
  const void* xa[kMoeTilePairs];
  for (int64_t i = 0; i < rows.count; ++i) {
    xa[i] = rows.xa[i] + int64_t{slice} * rows.rank * accumulator_bytes(p.dtype);
  }
  alignas(64) unsigned char panel[kMaxPanelBytes];
  alignas(64) char copies[kMoeTilePairs][kMaxLanes * kMaxElementBytes];
  for (int64_t column = begin; column < end; column += lanes) {
    const int64_t num_columns = std::min(lanes, end - column);
    char* at[kMoeTilePairs];
    void* y[kMoeTilePairs];
    for (int64_t i = 0; i < rows.count; ++i) {
      at[i] =
          static_cast<char*>(p.y) +
          (rows.pairs[i] * p.y_stride + p.column_start[slice] + column * p.column_stride) * element;
      if (strided) copy_strided(copies[i], 1, at[i], p.column_stride, num_columns, element);
      y[i] = strided ? copies[i] : at[i];
    }
    const char* const b =
        static_cast<const char*>(p.b.base[slice]) +
        p.b.row_offset(rows.tile.slot, rows.tile.expert, slice, rows.rank, column) *
            element_bytes(p.dtype);
    kernels.pack[static_cast<int>(p.dtype)](
        PackParams{b, p.b.stride(slice, rows.rank), num_columns, rows.rank, panel});
    kernels.accumulate[is_wide][static_cast<int>(p.y_dtype)](
        AccumulateParams{panel, rows.rank, num_columns, xa, y, rows.count});
    for (int64_t i = 0; strided && i < rows.count; ++i) {
      copy_strided(at[i], p.column_stride, copies[i], 1, num_columns, element);
    }
  }
}

}  // namespace

int64_t moe_apply_workspace(const MoeApplyParams& p) {
  return p.num_pairs * p.slices.count * p.max_rank * accumulator_bytes(p.dtype);
}

void moe_apply(const MoeApplyParams& p) {
  const int64_t num_tiles = p.routing[kNumMoeTiles];
  const MoeTile* const tiles = moe_tiles(p.routing);
  int64_t work = 0;  // multiply-adds for one column of x or y
  for (int64_t i = 0; i < num_tiles; ++i) {
    work += int64_t{tiles[i].count} * slot_rank(p.ranks, tiles[i].slot, p.max_rank);
  }
  const int num_slices = p.slices.count;
  parallel_for(num_tiles * num_slices, work * num_slices * p.in_features, [&](int64_t item) {
    const TileRows rows(p, tiles[item / num_slices]);
    if (rows.rank > 0) shrink_tile(p, rows, static_cast<int>(item % num_slices));
  });

  // The blocks of columns of all slices in one row: item -> (tile, block) -> (slice, columns).
  int64_t first_block[kMaxSlices + 1] = {};
  for (int i = 0; i < num_slices; ++i) {
    const int64_t width = p.slices.offset[i + 1] - p.slices.offset[i];
    first_block[i + 1] = first_block[i] + (width + kColumnsPerItem - 1) / kColumnsPerItem;
  }
  const int64_t num_blocks = first_block[num_slices];
  parallel_for(num_tiles * num_blocks, work * p.slices.offset[num_slices], [&](int64_t item) {
    const TileRows rows(p, tiles[item / num_blocks]);
    if (rows.rank == 0) return;
    const int64_t block = item % num_blocks;
    int slice = 0;
    while (block >= first_block[slice + 1]) ++slice;
    const int64_t width = p.slices.offset[slice + 1] - p.slices.offset[slice];
    const int64_t begin = (block - first_block[slice]) * kColumnsPerItem;
    expand_columns(p, rows, slice, begin, std::min(begin + kColumnsPerItem, width));
  });
}

}  // namespace lora_ext::cpu

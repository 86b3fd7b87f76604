// Gradients of an apply on the CPU: four products with one inner loop. An item of work is a block
// of up to 64 x 128 elements of one result, summed in fp32 (fp64) over the whole of what there is
// to sum, in order, and rounded once: so no two threads write to one place, and the bits do not
// depend on their number.

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/microkernels.h"
#include "cpu/parallel.h"

namespace lora_ext::cpu {
namespace {

constexpr int64_t kBlockRows = kWideTileTokens;
constexpr int64_t kBlockColumns = 128;
constexpr int64_t kDepth = 128;  // terms of the sum at a time

// One operand: where its rows lie, and the element of each row that comes first.
struct Operand {
  const void* base;
  int64_t stride;
  DType dtype;
  const int64_t* tokens;  // the token whose row it is, or null: row i is row i
  int64_t first;

  const void* row(int64_t i) const {
    const int64_t at = (tokens != nullptr ? tokens[i] : i) * stride;
    return static_cast<const char*>(base) + at * element_bytes(dtype);
  }
};

Operand rows_of(const Factor& factor, int32_t slot, int slice, int rank, DType dtype,
                int64_t first) {
  const char* const base = static_cast<const char*>(factor.base[slice]) +
                           factor.row_offset(slot, slice, rank, 0) * element_bytes(dtype);
  return {base, factor.stride(slice, rank), dtype, nullptr, first};
}

// sums[m][n] = sum_k left(m, k) * right[k][first + n], with left(m, k) = left[m][first + k] or,
// where its rows are what is summed over, left[k][first + m].
enum class Left { kRows, kColumns };

template <class Scalar>
struct Block {
  static constexpr bool kIsWide = sizeof(Scalar) == 8;
  static constexpr DType kDType = kIsWide ? DType::kFloat64 : DType::kFloat32;

  int64_t rows, columns;
  alignas(64) Scalar sums[kBlockRows][kBlockColumns] = {};
  alignas(64) Scalar left[kBlockRows][kDepth];
  alignas(64) Scalar panel[kDepth * kMaxLanes];

  Block(int64_t rows_, int64_t columns_) : rows(rows_), columns(columns_) {}

  void load_left(const Operand& from, Left kind, int64_t k, int64_t depth) {
    const auto widen = microkernels().widen[kIsWide][static_cast<int>(from.dtype)];
    const void* pointers[std::max(kBlockRows, kDepth)];
    if (kind == Left::kRows) {
      for (int64_t m = 0; m < rows; ++m) pointers[m] = from.row(m);
      widen(WidenParams{pointers, rows, from.first + k, depth, left, kDepth});
      return;
    }
    Scalar wide[kDepth][kBlockRows];
    for (int64_t i = 0; i < depth; ++i) pointers[i] = from.row(k + i);
    widen(WidenParams{pointers, depth, from.first, rows, wide, kBlockRows});
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < depth; ++i) left[m][i] = wide[i][m];
    }
  }

  // Adds the terms [0, terms) of a product to the sums.
  void add(const Operand& a, Left kind, const Operand& b, int64_t terms) {
    const Microkernels& kernels = microkernels();
    const int64_t lanes = kernels.lanes(kDType);
    const void* left_rows[kBlockRows];
    void* sum_rows[kBlockRows];
    const void* right_rows[kDepth];
    for (int64_t m = 0; m < rows; ++m) left_rows[m] = left[m];
    for (int64_t k = 0; k < terms; k += kDepth) {
      const int64_t depth = std::min(kDepth, terms - k);
      load_left(a, kind, k, depth);
      for (int64_t i = 0; i < depth; ++i) right_rows[i] = b.row(k + i);
      for (int64_t n = 0; n < columns; n += lanes) {
        const int64_t count = std::min(lanes, columns - n);
        for (int64_t m = 0; m < rows; ++m) sum_rows[m] = sums[m] + n;
        kernels.widen[kIsWide][static_cast<int>(b.dtype)](
            WidenParams{right_rows, depth, b.first + n, count, panel, lanes});
        kernels.accumulate[kIsWide][static_cast<int>(kDType)](
            AccumulateParams{panel, depth, count, left_rows, sum_rows, rows});
      }
    }
  }

  // Row m of the sums, rounded to `dtype`.
  void store(int64_t m, DType dtype, void* to) const {
    microkernels().narrow[static_cast<int>(dtype)](NarrowParams{sums[m], columns, to});
  }
};

// The numbers that the four products share.
template <class Scalar>
struct Gradients {
  static constexpr DType kDType = Block<Scalar>::kDType;

  const ApplyBackwardParams& p;
  const ApplyParams& apply = p.apply;
  const PlanView& plan = apply.plan;
  const int64_t stride = int64_t{apply.slices.count} * apply.max_rank;  // of g and xa

  int rank(int32_t slot) const { return slot_rank(apply.ranks, slot, apply.max_rank); }
  int64_t width(int slice) const {
    return apply.slices.offset[slice + 1] - apply.slices.offset[slice];
  }
  // The tokens of permutation[begin, end) that this call has.
  std::vector<int64_t> tokens(int64_t begin, int64_t end) const {
    std::vector<int64_t> result;
    for (int64_t i = begin; i < end; ++i) {
      if (plan.permutation[i] < apply.num_tokens) result.push_back(plan.permutation[i]);
    }
    return result;
  }

  // g = scaling * dy B, an item for each tile and slice.
  void down() const {
    parallel_over_tiles(apply.slices.count, [&](const Tile& tile, int slice) {
      const int r = rank(tile.slot);
      const auto rows = tokens(tile.start, tile.start + tile.count);
      const Operand dy{apply.y, apply.y_stride, apply.y_dtype, rows.data(),
                       apply.slices.offset[slice]};
      for (int64_t j = 0; j < r; j += kBlockColumns) {
        Block<Scalar> block(rows.size(), std::min<int64_t>(kBlockColumns, r - j));
        block.add(dy, Left::kRows, rows_of(apply.b, tile.slot, slice, r, apply.dtype, j),
                  width(slice));
        for (size_t m = 0; m < rows.size(); ++m) {
          Scalar* const to = static_cast<Scalar*>(p.g) + rows[m] * stride + slice * r + j;
          for (int64_t n = 0; n < block.columns; ++n) {
            to[n] = static_cast<Scalar>(apply.scalings[tile.slot]) * block.sums[m][n];
          }
        }
      }
    });
  }

  // dx = g A, an item for each tile and block of columns.
  void input() const {
    const int64_t blocks = (apply.in_features + kBlockColumns - 1) / kBlockColumns;
    parallel_over_tiles(blocks, [&](const Tile& tile, int64_t index) {
      const int r = rank(tile.slot);
      const int64_t first = index * kBlockColumns;
      const auto rows = tokens(tile.start, tile.start + tile.count);
      Block<Scalar> block(rows.size(), std::min(kBlockColumns, apply.in_features - first));
      for (int slice = 0; slice < apply.slices.count; ++slice) {
        block.add({p.g, stride, kDType, rows.data(), int64_t{slice} * r}, Left::kRows,
                  rows_of(apply.a, tile.slot, slice, r, apply.dtype, first), r);
      }
      for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t at = rows[m] * apply.in_features + first;
        block.store(m, apply.dtype, static_cast<char*>(p.dx) + at * element_bytes(apply.dtype));
      }
    });
  }

  // dA = sum of g^T x: rows are ranks, columns input features.
  void weight_a() const {
    parallel_over_slots(
        [&](int, int r) { return std::pair<int64_t, int64_t>(r, apply.in_features); },
        [&](int32_t slot, int slice, int64_t row, int64_t column, Block<Scalar>& block,
            const std::vector<int64_t>& rows) {
          const int r = rank(slot);
          block.add({p.g, stride, kDType, rows.data(), int64_t{slice} * r + row}, Left::kColumns,
                    {apply.x, apply.x_stride, apply.dtype, rows.data(), column}, rows.size());
          store_rows(block, p.da, slot, slice, row, column);
        });
  }

  // dB = sum of dy^T xa: rows are output features, columns ranks.
  void weight_b() const {
    parallel_over_slots(
        [&](int slice, int r) { return std::pair<int64_t, int64_t>(width(slice), r); },
        [&](int32_t slot, int slice, int64_t row, int64_t column, Block<Scalar>& block,
            const std::vector<int64_t>& rows) {
          const int r = rank(slot);
          block.add({apply.y, apply.y_stride, apply.y_dtype, rows.data(),
                     apply.slices.offset[slice] + row},
                    Left::kColumns,
                    {apply.workspace, stride, kDType, rows.data(), int64_t{slice} * r + column},
                    rows.size());
          store_rows(block, p.db, slot, slice, row, column);
        });
  }

 private:
  void store_rows(const Block<Scalar>& block, const Factor& to, int32_t slot, int slice,
                  int64_t row, int64_t column) const {
    char* const base = static_cast<char*>(const_cast<void*>(to.base[slice]));
    for (int64_t m = 0; m < block.rows; ++m) {
      const int64_t at = to.row_offset(slot, slice, rank(slot), row + m) + column;
      block.store(m, apply.dtype, base + at * element_bytes(apply.dtype));
    }
  }

  // f(tile, index) for every tile whose slot has an adapter and every index below `count`.
  template <class F>
  void parallel_over_tiles(int64_t count, const F& f) const {
    const int64_t tiles = plan.header[kNumWideTiles];
    const int64_t work = tiles * kWideTileTokens * apply.max_rank *
                         (apply.in_features + apply.slices.offset[apply.slices.count]);
    parallel_for(tiles * count, work, [&](int64_t item) {
      const Tile& tile = plan.wide_tiles[item / count];
      if (rank(tile.slot) > 0) f(tile, item % count);
    });
  }

  // f for every block of every slice of the slots in use; shape(slice, rank) is the shape of a
  // slice's gradient.
  template <class Shape, class F>
  void parallel_over_slots(const Shape& shape, const F& f) const {
    struct Item {
      int32_t slot;
      int slice;
      int64_t row, column, rows, columns;
    };
    std::vector<Item> items;
    int64_t work = 0;
    for (int32_t slot = 0; slot < plan.num_slots; ++slot) {
      const int64_t count = plan.slot_indptr[slot + 1] - plan.slot_indptr[slot];
      const int r = rank(slot);
      if (count == 0 || r == 0) continue;
      for (int slice = 0; slice < apply.slices.count; ++slice) {
        const auto [rows, columns] = shape(slice, r);
        work += count * rows * columns;
        for (int64_t row = 0; row < rows; row += kBlockRows) {
          for (int64_t column = 0; column < columns; column += kBlockColumns) {
            items.push_back({slot, slice, row, column, std::min(kBlockRows, rows - row),
                             std::min(kBlockColumns, columns - column)});
          }
        }
      }
    }
    parallel_for(items.size(), work, [&](int64_t i) {
      const Item& item = items[i];
      const auto rows = tokens(plan.slot_indptr[item.slot], plan.slot_indptr[item.slot + 1]);
      Block<Scalar> block(item.rows, item.columns);
      f(item.slot, item.slice, item.row, item.column, block, rows);
    });
  }
};

template <class Scalar>
void run(const ApplyBackwardParams& p) {
  const Gradients<Scalar> gradients{p};
  if (p.dx != nullptr || p.wants_da) gradients.down();
  if (p.dx != nullptr) gradients.input();
  if (p.wants_da) gradients.weight_a();
  if (p.wants_db) {
    shrink_adapters(shrink_of(p.apply));
    gradients.weight_b();
  }
}

}  // namespace

void apply_backward(const ApplyBackwardParams& p) {
  p.apply.dtype == DType::kFloat64 ? run<double>(p) : run<float>(p);
}

}  // namespace lora_ext::cpu

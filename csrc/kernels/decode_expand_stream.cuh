// The decode expand where the work is more than a wave of CTAs: as many CTAs as are resident walk
// along the rows of y (see decode_tile.cuh).
//
// The work of a batch, tiles by blocks of 256 columns, is cut into equal parts, one a CTA. It adds
// up the partial products of a tile and a slice once and passes its blocks with B and y of the next
// one on their way. A CTA for each block, as in decode_expand.cuh, would look for its tile, add up
// and wait for its copies each time, and that takes longer than the copies do. Where nobody has an
// adapter, the grid is small.
#pragma once

#include "kernels/decode_expand.cuh"

namespace lora_ext::cuda {

// CTAs of an SM: what shared memory has room for with bf16 and ranks up to 128.
template <int kChunk>
constexpr int kDecodeStreamCtas = kChunk == 4 ? 4 : 3;

template <typename Y, int kChunk>
struct DecodeStreamTraits : DecodeExpandTraits<Y, kChunk> {
  using Expand = DecodeExpandTraits<Y, kChunk>;
  static constexpr int kStages = 2;  // a third costs a CTA of the SM, and is slower
  static constexpr int kStageBytes = Expand::kStageBytes + Expand::kOutputBytes;
  LORA_EXT_HOST_DEVICE static int shared_bytes(int max_rank) {
    return Expand::kHeaderBytes + kStages * kStageBytes +
           2 * kTileTokens * Expand::xa_stride(max_rank) * 2;
  }
};

// Ranks up to 16: a warp copies the weights of its 64 columns as they lie there, two or four
// columns to a line, so that lines are asked for once and not by quarters (gate_up, 100 tokens of
// many adapters: 14.8 -> 13.1 us), and reads them as the mma's operand, columns in the order of
// decode_expand_body.
struct WeightRows {
  static constexpr int kBytes = kUnitColumns * 32;

  // Where half the ranks of column 8 g + i lie: neither what a copy writes nor what a matrix's rows
  // are read from, columns of the same i, meet in a bank.
  __device__ __forceinline__ static int at(int g, int i, int half) {
    return (16 * g + ((2 * i + half) ^ g)) * 16;
  }
  template <typename T>
  __device__ __forceinline__ static void copy(unsigned char* rows, const T* b, int64_t stride,
                                              int columns, int rank) {
    const unsigned lane = threadIdx.x % 32, quad = lane % 4;
#pragma unroll
    for (int i = 0; i < kUnitColumns / 8; ++i) {
      const int column = 8 * i + lane / 4;
      if (column < columns) {
        device::copy_async_8<true>(rows + at(i, lane / 4, quad / 2) + quad % 2 * 8,
                                   b + column * stride + 4 * quad,
                                   2 * min(max(rank - static_cast<int>(4 * quad), 0), 4));
      }
    }
  }
  // For a warp whose lanes have waited for their copies.
  template <typename T>
  __device__ __forceinline__ static void multiply(float (&acc)[4][2][4], const unsigned char* rows,
                                                  const T* high, const T* low, int stride,
                                                  int count) {
    const unsigned lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    __syncwarp();
    uint32_t weights[4][4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      device::ldmatrix_x4(weights[m], rows + at(lane % 8, 2 * m + lane / 8 % 2, lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n == 0 || count > 8) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto* tokens = reinterpret_cast<const uint32_t*>((half == 0 ? high : low) +
                                                                 (8 * n + g) * stride + 2 * q);
          const uint32_t first = tokens[0], second = tokens[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            device::mma<T>(acc[m][n], weights[m][0], weights[m][1], weights[m][2], weights[m][3],
                           first, second);
          }
        }
      }
    }
  }
};

// Blocks first to last of a slice, for a tile.
template <typename T, typename Y, int kChunk, bool kFollows>
__device__ __forceinline__ void decode_expand_blocks(const DecodeExpandParams& p,
                                                     const DecodeTile& t, int tile, int slice,
                                                     int first, int last, int num_tiles,
                                                     bool& y_there, unsigned char* shared) {
  using Traits = DecodeStreamTraits<Y, kChunk>;
  constexpr int kSpan = Traits::kSpan, kStages = Traits::kStages;
  constexpr bool kByRows = kChunk == 4;
  static_assert(!kByRows || kExpandWarps * WeightRows::kBytes == Traits::Expand::kStageBytes);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const auto& from = p.slices[slice];
  const int rank = t.rank;
  const int xa_stride = Traits::xa_stride(p.batch.max_rank);
  int* token_max = reinterpret_cast<int*>(shared);
  unsigned char* stages = shared + Traits::kHeaderBytes;
  T* xa_high = reinterpret_cast<T*>(stages + kStages * Traits::kStageBytes);
  T* xa_low = xa_high + kTileTokens * xa_stride;

  // Columns, outputs and the order of weights in a lane are as in decode_expand_body.
  const int lane_column = warp * kUnitColumns + 8 * g;
  Y* rows[4];
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    const int id = __shfl_sync(0xffffffffu, t.token, 8 * (o / 2) + 2 * q + o % 2);
    rows[o] = id >= 0 ? static_cast<Y*>(p.y) + id * p.y_stride + from.first_column + lane_column
                      : nullptr;
  }
  const T* b = static_cast<const T*>(from.b) + t.slot * from.slot_stride +
               (from.first_row + (kByRows ? warp * kUnitColumns : lane_column)) * from.row_stride +
               (kByRows ? 0 : q * kChunk);
  // A stage takes a step of a block's weights, and with the last step y. Each lane, or warp, copies
  // to where it reads itself, so no barrier stands between the copies and their use.
  int fetched = first, fetched_rank = 0, fetch_stage = 0;
  const auto fetch_y = [&](unsigned char* stage, int column) {
    Y* to = reinterpret_cast<Y*>(stage + Traits::Expand::kStageBytes) + thread * 8;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (lane_column + column < from.width && rows[o] != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
          device::copy_async_16(to + o * kExpandThreads * 8 + i, rows[o] + column + i, 16);
        }
      }
    }
  };
  const auto fetch = [&] {
    if (fetched < last) {
      unsigned char* stage = stages + fetch_stage * Traits::kStageBytes;
      const int column = fetched * kExpandColumns;
      if constexpr (kByRows) {
        WeightRows::copy(stage + warp * WeightRows::kBytes, b + column * from.row_stride,
                         from.row_stride, from.width - column - warp * kUnitColumns, rank);
      } else if (lane_column + column < from.width) {  // columns come in whole eights
        T* to = reinterpret_cast<T*>(stage) + thread * kChunk;
        const T* row = b + column * from.row_stride + fetched_rank;
        const int valid = 2 * min(max(rank - fetched_rank - q * kChunk, 0), kChunk);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          device::copy_async_16(to + i * kExpandThreads * kChunk, row, valid);
          row += from.row_stride;
        }
      }
      fetched_rank += kSpan;
      if (fetched_rank >= rank) {
        if (y_there) {
          fetch_y(stage, column);
        }
        fetched_rank = 0, ++fetched;
      }
    }
    fetch_stage = fetch_stage + 1 < kStages ? fetch_stage + 1 : 0;
    device::copy_async_commit();
  };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    fetch();
  }

  PartialProducts xa(p.batch, t, tile, slice, num_tiles, kByRows);
  xa.wait();
  if (kFollows && !y_there) {
    static_assert(kStages == 2);  // one was fetched, without y
    if (rank <= kSpan) {          // else y comes with a step that is yet to be fetched
      fetch_y(stages, first * kExpandColumns);
      device::copy_async_commit();
    }
    y_there = true;
  }
  __syncthreads();  // all warps are done with xa of the blocks before
  split_xa<T, kSpan>(xa, t, token_max, xa_high, xa_low,
                     [&](int token, int row) { return token * xa_stride + row; });

  int next_stage = 0;
#pragma unroll 1
  for (int block = first; block < last; ++block) {
    float acc[4][2][4] = {};
    const unsigned char* stage = stages;
#pragma unroll 1
    for (int j = 0; j < rank; j += kSpan) {
      device::copy_async_wait<kStages - 2>();
      fetch();  // to the stage that was used last
      stage = stages + next_stage * Traits::kStageBytes;
      next_stage = next_stage + 1 < kStages ? next_stage + 1 : 0;
      if constexpr (kByRows) {
        WeightRows::multiply(acc, stage + warp * WeightRows::kBytes, xa_high, xa_low, xa_stride,
                             t.count);
      } else {
        const T* weights_at = reinterpret_cast<const T*>(stage) + thread * kChunk;
        multiply_step<T, kChunk>(acc, weights_at, xa_high + j, xa_low + j, xa_stride, t.count);
      }
    }
    const int column = block * kExpandColumns;
    if (lane_column + column < from.width) {
      const Y* y_at = reinterpret_cast<const Y*>(stage + Traits::Expand::kStageBytes) + thread * 8;
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        if (rows[o] == nullptr) {
          continue;
        }
        float delta[8];
        const int row = 8 * (o / 2) + 2 * q + o % 2;
        lane_delta<T>(acc, o, device::kNeedsScale<T> ? device::scale_up(token_max[row]) : 1.0f,
                      delta);
        device::Outputs<Y> values;
        values.load(y_at + o * kExpandThreads * 8);
        values.add(delta);
        values.store(rows[o] + column);
      }
    }
  }
}

// Calls blocks(tile's DecodeTile, tile, slice, first, last, number of tiles) for what the CTA has
// of the batch, blocks of a tile and a slice at a time.
template <typename Blocks>
__device__ __forceinline__ void walk_blocks(const DecodeExpandParams& p, const Blocks& blocks) {
  if (!p.after_shrink) {
    device::grid_dependency_launch();
    device::grid_dependency_wait();
  }
  // Looked at beside the number of tiles: where there is a CTA for each item, it is the one.
  const int num_tiles = read_num_tiles(p.batch);
  int known = blockIdx.x / p.blocks_per_tile;
  DecodeTile t = read_tile<true>(p.batch, known, 0, 0);
  const unsigned items = min(num_tiles, p.batch.tile_capacity) * p.blocks_per_tile,
                 parts = gridDim.x;
  const unsigned each = items / parts, longer = items - each * parts;  // parts with an item more
  int at = static_cast<int>(each * blockIdx.x + min(blockIdx.x, longer));
  const int end = static_cast<int>(at + each + (blockIdx.x < longer));
  while (at < end) {
    const int tile = at / p.blocks_per_tile;
    int slice = 0, slice_begin = tile * p.blocks_per_tile;
    while (at - slice_begin >= p.slices[slice].blocks) {
      slice_begin += p.slices[slice++].blocks;
    }
    const int last = min(end, slice_begin + p.slices[slice].blocks);
    if (tile != known) {
      known = tile;
      t = read_tile<true>(p.batch, tile, 0, 0);
    }
    if (t.slot >= 0 && t.rank > 0) {
      blocks(t, tile, slice, at - slice_begin, last - slice_begin, num_tiles);
    }
    at = last;
  }
  if (blockIdx.x == 0) {  // as in decode_expand.cuh
    device::grid_dependency_wait();
  }
}

// For B and y whose rows allow vector accesses.
template <typename T, typename Y, int kChunk, bool kFollows = false>
__global__ void __launch_bounds__(kExpandThreads, kDecodeStreamCtas<kChunk>)
    decode_expand_stream_kernel(const __grid_constant__ DecodeExpandParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  bool y_there = !kFollows;
  walk_blocks(p, [&](const DecodeTile& t, int tile, int slice, int first, int last, int num_tiles) {
    decode_expand_blocks<T, Y, kChunk, kFollows>(p, t, tile, slice, first, last, num_tiles, y_there,
                                                 shared);
  });
}

}  // namespace lora_ext::cuda

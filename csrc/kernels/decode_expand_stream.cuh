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

// Blocks first to last of a slice, for a tile.
template <typename T, typename Y, int kChunk>
__device__ __forceinline__ void decode_expand_blocks(const DecodeExpandParams& p,
                                                     const DecodeTile& t, int tile, int slice,
                                                     int first, int last, bool& waited,
                                                     unsigned char* shared) {
  using Traits = DecodeStreamTraits<Y, kChunk>;
  constexpr int kSpan = Traits::kSpan, kStages = Traits::kStages;
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
               (from.first_row + lane_column) * from.row_stride + q * kChunk;
  // A stage takes a step of a block's weights, and with the last step y. Each lane copies to where
  // it reads itself, so no barrier stands between the copies and their use.
  int fetched = first, fetched_rank = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetched < last) {
      unsigned char* stage = stages + fetch_stage * Traits::kStageBytes;
      const int column = fetched * kExpandColumns;
      const bool exists = lane_column + column < from.width;  // columns come in whole eights
      if (exists) {
        T* to = reinterpret_cast<T*>(stage) + thread * kChunk;
        const T* row = b + column * from.row_stride + fetched_rank;
        const int valid = 2 * min(max(rank - fetched_rank - q * kChunk, 0), kChunk);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if constexpr (kChunk == 8) {
            device::copy_async_16(to + i * kExpandThreads * kChunk, row, valid);
          } else {
            device::copy_async_8(to + i * kExpandThreads * kChunk, row, valid);
          }
          row += from.row_stride;
        }
      }
      fetched_rank += kSpan;
      if (fetched_rank >= rank) {
        Y* y_to = reinterpret_cast<Y*>(stage + Traits::Expand::kStageBytes) + thread * 8;
#pragma unroll
        for (int o = 0; o < 4; ++o) {
          if (exists && rows[o] != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
              device::copy_async_16(y_to + o * kExpandThreads * 8 + i, rows[o] + column + i, 16);
            }
          }
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

  PartialProducts xa(p.batch, t, tile, slice);
  if (!waited) {
    device::grid_dependency_launch();
    device::grid_dependency_wait();
    waited = true;
  }
  xa.scaling = read_plan<true>(xa.scaling_at);
  __syncthreads();  // all warps are done with xa of the blocks before
  split_xa<T, kSpan>(xa, t, token_max, xa_high, xa_low, xa_stride);

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
      const T* weights_at = reinterpret_cast<const T*>(stage) + thread * kChunk;
      multiply_step<T, kChunk>(acc, weights_at, xa_high + j, xa_low + j, xa_stride, t.count);
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

// For B and y whose rows allow vector accesses.
template <typename T, typename Y, int kChunk>
__global__ void __launch_bounds__(kExpandThreads, kDecodeStreamCtas<kChunk>)
    decode_expand_stream_kernel(const __grid_constant__ DecodeExpandParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  bool waited = !p.after_shrink;
  if (waited) {
    device::grid_dependency_launch();
    device::grid_dependency_wait();
  }
  // Looked at beside the number of tiles: where there is a CTA for each item, it is the one.
  int known = blockIdx.x / p.blocks_per_tile;
  DecodeTile t = read_tile<true>(p.batch, known, 0, 0);
  const int num_tiles = min(read_plan<true>(p.batch.header + kNumTiles), p.batch.tile_capacity);
  const unsigned items = num_tiles * p.blocks_per_tile, parts = gridDim.x;
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
      decode_expand_blocks<T, Y, kChunk>(p, t, tile, slice, at - slice_begin, last - slice_begin,
                                         waited, shared);
    }
    at = last;
  }
}

}  // namespace lora_ext::cuda

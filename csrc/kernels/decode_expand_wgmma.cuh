// The streaming expand above rank 16 where the chip has wgmma: the walk of decode_expand_stream.cuh
// with the weights of 256 columns in shared memory for products of the warpgroup, which take them
// from there themselves: registers are y's, and there is time to copy whole lines, eight or four
// threads a row of B.
#pragma once

#include "common/wgmma.cuh"
#include "kernels/decode_expand_stream.cuh"

namespace lora_ext::cuda {

constexpr int kDecodeWgmmaCtas = 3;  // of an SM: what shared memory has room for up to rank 128

// kSpan: ranks of a step, that the swizzle of a row spans.
template <int kSpan>
struct DecodeWgmmaTraits {
  static constexpr int kStages = 2;  // with more on its way it is slower
  static constexpr int kAhead = 2;   // blocks whose y is on its way to L2
  static constexpr int kRowBytes = kSpan * 2;
  static constexpr int kStageBytes = kExpandColumns * kRowBytes;
  static constexpr int kXaTile = kTileTokens * kRowBytes;  // of either half, low behind high
  static constexpr int kAlignment = 1024;                  // for the swizzle
  LORA_EXT_HOST_DEVICE static int xa_bytes(int max_rank) {
    return (max_rank + kSpan - 1) / kSpan * 2 * kXaTile;
  }
  LORA_EXT_HOST_DEVICE static int shared_bytes(int max_rank) {
    return kStages * kStageBytes + xa_bytes(max_rank) + kTileTokens * 4 + kAlignment;
  }
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static constexpr int kBound = kExpandThreads;
#else
  static constexpr int kBound = 32;  // tells the launcher that the kernel is empty here
#endif
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Blocks first to last of a slice, for a tile.
template <typename T, typename Y, int kSpan>
__device__ __forceinline__ void decode_wgmma_blocks(const DecodeExpandParams& p,
                                                    const DecodeTile& t, int tile, int slice,
                                                    int first, int last, int num_tiles,
                                                    unsigned char* shared) {
  using Traits = DecodeWgmmaTraits<kSpan>;
  constexpr int kStages = Traits::kStages, kRowBytes = Traits::kRowBytes;
  constexpr int kChunks = kSpan / 8, kRows = kExpandThreads / kChunks;  // copied at once
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const auto& from = p.slices[slice];
  const int rank = t.rank;
  unsigned char* const split = shared + kStages * Traits::kStageBytes;
  int* const token_max = reinterpret_cast<int*>(split + Traits::xa_bytes(p.batch.max_rank));

  // Outputs are as in decode_expand_body.
  const int lane_column = warp * kUnitColumns + 8 * g;
  int ids[4];
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    ids[o] = __shfl_sync(0xffffffffu, t.token, 8 * (o / 2) + 2 * q + o % 2);
  }
  const auto exists = [&](int o, int column) {  // columns come in whole eights
    return ids[o] >= 0 && lane_column + column < from.width;
  };
  const auto row_of = [&](int o, int column) {
    return static_cast<Y*>(p.y) + ids[o] * p.y_stride + from.first_column + lane_column + column;
  };
  // Column 64 w + 8 g + i of a block is row 16 w + 8 (i % 2) + g of product i / 2, so that a lane
  // has eight neighbours. A thread copies columns kRows apart, whose i is the same and whose g is
  // after kTurns of them.
  constexpr int kTurns = 64 / kRows;
  const int chunk = thread % kChunks, copy_row = thread / kChunks, copy_g = copy_row / 8;
  const T* b = static_cast<const T*>(from.b) + t.slot * from.slot_stride +
               (from.first_row + copy_row) * from.row_stride + 8 * chunk;
  const int to_row = copy_row % 8 / 2 * 64 + copy_row % 2 * 8 + copy_g;
  int fetched = first, fetched_rank = 0;
  const auto fetch = [&](int stage) {  // a step of a block's weights
    if (fetched < last) {
      const uint32_t to =
          device::shared_address(shared) + stage * Traits::kStageBytes + to_row * kRowBytes;
      uint32_t turns[kTurns];
#pragma unroll
      for (int k = 0; k < kTurns; ++k) {
        const int turn_g = copy_g + k * (kRows / 8);
        turns[k] =
            to + k * (kRows / 8) * kRowBytes + (chunk ^ device::swizzle_of<kRowBytes>(turn_g)) * 16;
      }
      const int column = fetched * kExpandColumns, left = from.width - column - copy_row;
      const T* row = b + column * from.row_stride + fetched_rank;
      const int valid = 2 * min(max(rank - fetched_rank - 8 * chunk, 0), 8);
      const auto copy = [&](const auto& copy_16) {
#pragma unroll
        for (int k = 0; k < kExpandColumns / kRows; ++k) {
          if (k * kRows < left) {
            copy_16(turns[k % kTurns] + k / kTurns * 16 * kRowBytes, row);
          }
          row += kRows * from.row_stride;
        }
      };
      if (valid % 16 == 0) {
        copy([&](uint32_t to, const T* row) { device::copy_async_16_or_zero(to, row, valid > 0); });
      } else {
        copy([&](uint32_t to, const T* row) { device::copy_async_16(to, row, valid); });
      }
      fetched_rank += kSpan;
      if (fetched_rank >= rank) {
        fetched_rank = 0, ++fetched;
      }
    }
    device::copy_async_commit();
  };
  __syncthreads();  // all warps are done with the blocks before
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) {
    fetch(s);
  }
  // y to L2, since before the wait it may be yet to be written, and registers have room for no more
  // than the next block's: a warp's columns, a line for each token and lane.
  const auto prefetch_y = [&](int block) {
    constexpr int kLines = kUnitColumns * static_cast<int>(sizeof(Y)) / 128;
    const int column =
        block * kExpandColumns + warp * kUnitColumns + lane / kTileTokens * (kUnitColumns / kLines);
    if (lane < kLines * kTileTokens && t.token >= 0 && block < last && column < from.width) {
      device::prefetch_line(static_cast<const Y*>(p.y) + t.token * p.y_stride + from.first_column +
                            column);
    }
  };
#pragma unroll 1
  for (int d = 0; d < Traits::kAhead; ++d) {
    prefetch_y(first + d);
  }

  PartialProducts xa(p.batch, t, tile, slice, num_tiles, false);
  xa.wait();
  device::Outputs<Y> outputs[4];
  const auto load_y = [&](int column) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (exists(o, column)) {
        outputs[o].load(row_of(o, column));
      }
    }
  };
  load_y(first * kExpandColumns);
  split_xa<T, kSpan>(xa, t, token_max, reinterpret_cast<T*>(split),
                     reinterpret_cast<T*>(split + Traits::kXaTile), [](int token, int row) {
                       const int at = row % kSpan / 8 ^ device::swizzle_of<kRowBytes>(token);
                       return row / kSpan * (2 * kTileTokens * kSpan) + token * kSpan + at * 8 +
                              row % 8;
                     });

  int stage = 0;
#pragma unroll 1
  for (int block = first; block < last; ++block) {
    const int column = block * kExpandColumns;
    float sums[4][kTileTokens];  // of 64 columns, with the high halves and the low ones
#pragma unroll 1
    for (int j = 0; j < rank; j += kSpan) {
      device::copy_async_wait<kStages - 2>();
      device::fence_shared_for_products();
      __syncthreads();
      const unsigned char* const weights = shared + stage * Traits::kStageBytes;
      device::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kSpan / 16; ++kk) {
        const uint64_t tokens =
            device::swizzled_tile<kRowBytes>(split + j / kSpan * 2 * Traits::kXaTile) + 2 * kk;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          device::wgmma<T, 2 * kTileTokens>(
              sums[m], device::swizzled_tile<kRowBytes>(weights + m * 64 * kRowBytes) + 2 * kk,
              tokens, j + kk == 0);
        }
      }
      device::wgmma_commit();
      if (block > first || j > 0) {
        fetch(stage == 0 ? kStages - 1 : stage - 1);  // which was used last
      }
      stage = stage + 1 < kStages ? stage + 1 : 0;
      device::wgmma_wait<0>();
    }
    float acc[4][2][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      acc[i / 8][i / 4 % 2][i % 4] = sums[i / 8][i % 8] + sums[i / 8][8 + i % 8];
    }
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      if (exists(o, column)) {
        float delta[8];
        const int row = 8 * (o / 2) + 2 * q + o % 2;
        lane_delta<T>(acc, o, device::kNeedsScale<T> ? device::scale_up(token_max[row]) : 1.0f,
                      delta);
        outputs[o].add(delta);
        outputs[o].store(row_of(o, column));
      }
    }
    if (block + 1 < last) {
      load_y(column + kExpandColumns);
      prefetch_y(block + 1 + Traits::kAhead);
    }
  }
}

#endif

// For B and y whose rows allow vector accesses. y comes when the kernel before has ended, whatever
// that is.
template <typename T, typename Y, int kSpan>
__global__ void __launch_bounds__(DecodeWgmmaTraits<kSpan>::kBound, kDecodeWgmmaCtas)
    decode_expand_wgmma_kernel(const __grid_constant__ DecodeExpandParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  constexpr int kAlignment = DecodeWgmmaTraits<kSpan>::kAlignment;
  unsigned char* shared = unaligned + (-device::shared_address(unaligned) & (kAlignment - 1));
  walk_blocks(p, [&](const DecodeTile& t, int tile, int slice, int first, int last, int num_tiles) {
    decode_wgmma_blocks<T, Y, kSpan>(p, t, tile, slice, first, last, num_tiles, shared);
  });
#endif
}

}  // namespace lora_ext::cuda

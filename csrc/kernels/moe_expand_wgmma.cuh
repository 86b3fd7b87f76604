// The expand of many pairs on sm_90a for ranks above 16: a warpgroup's products, with 64 columns of
// y as the rows and the tile's pairs as the columns of the result, as many as there are.
//
// A CTA takes a tile and 256 columns of y, all at once for up to 16 pairs, else one half behind the
// other. Every value of B and xa passes through shared memory once, where the products read both,
// so that nothing but sums takes registers. y lies there by rows of pairs and is turned on its way
// to the sums and back.
#pragma once

#include "common/wgmma.cuh"
#include "kernels/moe_expand_tiles.cuh"

namespace lora_ext::cuda {

// How a CTA's shared memory is used for tiles of up to kPairs pairs: B of kUnits units of 64
// columns, their y, and the two halves of xa, all by rows of 64 values, swizzled.
template <int kPairs>
struct MoeWgmmaTraits {
  static constexpr int kUnits = kPairs <= 16 ? 4 : 2;
  static constexpr int kRowBytes = 128, kUnitBytes = kUnitColumns * kRowBytes;
  static constexpr int kOutputBytes = kPairs * kRowBytes;  // of a unit
  static constexpr int kOutputsAt = kUnits * kUnitBytes;
  static constexpr int kXaAt = kOutputsAt + kUnits * kOutputBytes, kXaBytes = kPairs * kRowBytes;
  static constexpr int kSharedBytes = kXaAt + 2 * kXaBytes;

  __device__ static int at(int row, int chunk) { return row * kRowBytes + (chunk ^ row % 8) * 16; }
};
constexpr int kMoeWgmmaColumns = 256;
constexpr int kMoeWgmmaBytes = MoeWgmmaTraits<kMoeTilePairs>::kSharedBytes;
static_assert(kMoeWgmmaBytes >= MoeWgmmaTraits<16>::kSharedBytes);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Columns [column, column + columns) of a slice, 256 at most, for a tile of up to kPairs pairs.
template <typename T, typename Y, int kRanks, int kPairs, bool kVector>
__device__ __forceinline__ void expand_wgmma_tile(const MoeExpandParams& p, const MoeExpandSlice& s,
                                                  int slice, const MoeTile& tile, int rank,
                                                  int column, unsigned char* shared,
                                                  float* scales) {
  using Traits = MoeWgmmaTraits<kPairs>;
  constexpr int kUnits = Traits::kUnits, kStep = kUnits * kUnitColumns;
  constexpr int kCopyRows = kMoeThreads / 8, kPairCopies = kPairs / kCopyRows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, q = lane % 4;
  const int chunk = thread % 8, row = thread / 8;
  const int columns = min(kMoeWgmmaColumns, s.width - column);
  int pairs[kPairCopies];
#pragma unroll
  for (int i = 0; i < kPairCopies; ++i) {
    const int at = row + kCopyRows * i;
    pairs[i] = at < tile.count ? p.routing.permutation()[tile.start + at] : -1;
  }
  // Of B and xa, whose rows have a piece for each eight ranks.
  constexpr int kRankChunks = kRanks / 8, kRankRows = kMoeThreads / kRankChunks;
  constexpr int kXaCopies = kPairs > kRankRows ? kPairs / kRankRows : 1;
  const int rank_chunk = thread % kRankChunks, rank_row = thread / kRankChunks;
  int xa_pairs[kXaCopies];
#pragma unroll
  for (int i = 0; i < kXaCopies; ++i) {
    const int at = rank_row + kRankRows * i;
    xa_pairs[i] = at < tile.count ? p.routing.permutation()[tile.start + at] : -1;
  }
  const T* const b = static_cast<const T*>(s.b) + tile.slot * s.slot_stride +
                     tile.expert * s.expert_stride +
                     (s.first_row + column + rank_row) * s.row_stride + 8 * rank_chunk;
  const int b_bytes = 2 * min(max(rank - 8 * rank_chunk, 0), 8);
  const auto copy_weights = [&](int first) {
    const T* from = b + first * s.row_stride;
#pragma unroll
    for (int c = 0; c < kStep; c += kRankRows) {
      unsigned char* const to = shared + Traits::at(rank_row + c, rank_chunk);
      if constexpr (kVector) {
        device::copy_async_16(to, from, first + c + rank_row < columns ? b_bytes : 0);
      } else {
        device::Chunk<T, 8> values;
        device::load_scalars(values, from, first + c + rank_row < columns ? b_bytes / 2 : 0);
        write_chunk(to, values);
      }
      from += kRankRows * s.row_stride;
    }
    device::copy_async_commit();
  };
  Y* const y = static_cast<Y*>(p.y) + s.column_start + column * (kVector ? 1 : p.column_stride);
  // body(place in shared memory, row of y, column) for what this thread copies of y.
  const auto each_output = [&](int first, const auto& body) {
#pragma unroll
    for (int i = 0; i < kPairCopies; ++i) {
      if (pairs[i] >= 0) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const int c = first + u * kUnitColumns + 8 * chunk;
          if (c < columns) {
            body(reinterpret_cast<Y*>(shared + Traits::kOutputsAt + u * Traits::kOutputBytes +
                                      Traits::at(row + kCopyRows * i, chunk)),
                 y + pairs[i] * p.y_stride, c);
          }
        }
      }
    }
  };
  const auto copy_outputs = [&](int first) {
    each_output(first, [&](Y* to, const Y* from, int c) {
      if constexpr (kVector) {
        device::copy_async_16(to, from + c, 16);
      } else {
        for (int e = 0; e < 8 && c + e < columns; ++e) {
          to[e] = from[(c + e) * p.column_stride];
        }
      }
    });
    device::copy_async_commit();
  };
  const auto store_outputs = [&](int first) {
    each_output(first, [&](const Y* from, Y* to, int c) {
      if constexpr (kVector) {
        *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int e = 0; e < 8 && c + e < columns; ++e) {
          to[(c + e) * p.column_stride] = from[e];
        }
      }
    });
  };
  copy_weights(0);
#pragma unroll
  for (int i = 0; i < kPairCopies; ++i) {
    pairs[i] = pairs[i] < p.num_pairs ? pairs[i] : -1;
  }
  copy_outputs(0);
  device::grid_dependency_wait();
  {
    float values[kXaCopies][1][8];
    const float* rows[kXaCopies];
#pragma unroll
    for (int i = 0; i < kXaCopies; ++i) {
      const int pair = xa_pairs[i] < p.num_pairs ? xa_pairs[i] : -1;
      rows[i] = pair >= 0 ? p.xa + pair * p.xa_row_stride + slice * p.xa_rank_stride : nullptr;
    }
    load_held<kXaCopies, 8, 1>(values, p, rows, 8 * rank_chunk, rank);
#pragma unroll
    for (int i = 0; i < kXaCopies; ++i) {
      const int at = rank_row + kRankRows * i;
      const bool exists = kPairs % kRankRows == 0 || at < kPairs;
      int max_bits = 0;
      if constexpr (device::kNeedsScale<T>) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          max_bits = max(max_bits, __float_as_int(fabsf(values[i][0][e])));
        }
#pragma unroll
        for (int distance = 1; distance < kRankChunks; distance *= 2) {
          max_bits = max(max_bits, __shfl_xor_sync(kAllLanes, max_bits, distance));
        }
        if (rank_chunk == 0 && exists) {
          scales[at] = device::scale_up(max_bits);
        }
      }
      if (exists) {
        SplitChunk<T, 8> xa;
        xa.set(values[i][0], device::kNeedsScale<T> ? device::scale_down(max_bits) : 1.0f);
        unsigned char* const to = shared + Traits::kXaAt + Traits::at(at, rank_chunk);
        write_chunk(to, xa.high);
        write_chunk(to + Traits::kXaBytes, xa.low);
      }
    }
  }
  const uint64_t high = device::swizzled_tile(shared + Traits::kXaAt);
  const uint64_t low = device::swizzled_tile(shared + Traits::kXaAt + Traits::kXaBytes);
#pragma unroll 1
  for (int first = 0; first < columns; first += kStep) {
    device::copy_async_wait<1>();
    device::fence_shared_for_products();
    __syncthreads();  // B and xa are there
    float sums[kUnits][kPairs / 2];
    device::wgmma_fence();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint64_t weights = device::swizzled_tile(shared + u * Traits::kUnitBytes);
#pragma unroll
      for (int kk = 0; kk < kRanks / 16; ++kk) {
        device::wgmma<T, kPairs>(sums[u], weights + 2 * kk, high + 2 * kk, kk == 0);
        device::wgmma<T, kPairs>(sums[u], weights + 2 * kk, low + 2 * kk, false);
      }
    }
    device::wgmma_commit();
    device::copy_async_wait<0>();
    device::wgmma_wait<0>();
    __syncthreads();  // y is there, B may be overwritten
    if (first + kStep < columns) {
      copy_weights(first + kStep);
    }
    // sums[u][4 n + 2 h + e] is of column 16 warp + 8 h + g of the unit, pair 8 n + 2 q + e.
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int n = 0; n < kPairs / 8; n += 2) {
        const int from_row = 8 * (n + lane / 16) + lane % 8, from_chunk = 2 * warp + lane / 8 % 2;
        unsigned char* const at = shared + Traits::kOutputsAt + u * Traits::kOutputBytes +
                                  Traits::at(from_row, from_chunk);
        uint32_t words[4];
        device::ldmatrix_transposed_x4(words, at);
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // eight pairs by eight columns
          const int of = 4 * (n + m / 2) + 2 * (m % 2), to_pair = 8 * (n + m / 2) + 2 * q;
          float d0 = sums[u][of], d1 = sums[u][of + 1];
          if constexpr (device::kNeedsScale<T>) {
            d0 *= scales[to_pair], d1 *= scales[to_pair + 1];
          }
          words[m] = device::pack<Y>(device::unpack<Y>(words[m], 0) + d0,
                                     device::unpack<Y>(words[m], 1) + d1);
        }
        device::stmatrix_transposed_x4(at, words);
      }
    }
    __syncthreads();
    store_outputs(first);
    if (first + kStep < columns) {
      copy_outputs(first + kStep);
    }
  }
}
#endif

// kRanks: 32 or 64, the most that a slot has.
template <typename T, typename Y, int kRanks, bool kVector>
__global__ void __launch_bounds__(kMoeThreads, kVector ? 4 : 2)
    moe_expand_wgmma_kernel(const __grid_constant__ MoeExpandParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(sizeof(Y) == 2 && kMoeThreads == 128);
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ float scales[kMoeTilePairs];  // fp16 only
  const int lane = threadIdx.x % 32;
  int column = blockIdx.x, slice = 0;
  while (column >= p.slices[slice].units) {
    column -= p.slices[slice++].units;
  }
  column *= kMoeWgmmaColumns;
  device::grid_dependency_launch();
  const MoeExpandSlice& s = p.slices[slice];
  const int num_tiles = p.routing.num_tiles();
  MoeTile tile = p.routing.tile(blockIdx.y);
  const bool few_slots = p.num_slots <= 32;  // their ranks are read beside the tile
  const int lane_rank = few_slots && lane < p.num_slots ? p.ranks[lane] : 0;
#pragma unroll 1
  for (int index = blockIdx.y; index < num_tiles; index += gridDim.y) {
    if (index != blockIdx.y) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    const int slot_rank =
        few_slots ? __shfl_sync(kAllLanes, lane_rank, tile.slot) : p.ranks[tile.slot];
    const int rank = min(slot_rank, p.max_rank);
    if (rank <= 0) {
      continue;
    }
    if (tile.count <= 16) {
      expand_wgmma_tile<T, Y, kRanks, 16, kVector>(p, s, slice, tile, rank, column, shared, scales);
    } else if (tile.count <= 32) {
      expand_wgmma_tile<T, Y, kRanks, 32, kVector>(p, s, slice, tile, rank, column, shared, scales);
    } else {
      expand_wgmma_tile<T, Y, kRanks, 64, kVector>(p, s, slice, tile, rank, column, shared, scales);
    }
    __syncthreads();  // the next tile fills the same places, perhaps otherwise
  }
#endif
}

}  // namespace lora_ext::cuda

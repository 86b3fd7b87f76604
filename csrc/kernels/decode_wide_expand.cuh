// The second kernel of the decode apply of wide tiles (see decode_wide.cuh): xa from its parts, and
// y += xa B^T.
#pragma once

#include "kernels/decode_wide.cuh"

namespace lora_ext::cuda {

constexpr int kWideThreads = 256;  // of the expand: two warpgroups, of 64 columns of y each
constexpr int kWideColumns = 128;

// kSteps: steps of 16 ranks. In shared memory, tiles of 64 ranks in the products' swizzle: of
// the weights of a block and of the next one, of xa's upper and of its lower halves.
template <int kSteps>
struct WideExpandTraits {
  static constexpr int kQuads = 4 * kSteps;
  static constexpr int kChunks = 2 * kSteps;  // of eight ranks, a row of weights
  static constexpr int kRankTiles = kSteps / 4;
  static constexpr int kWeightsTile = kWideColumns * 128, kXaTile = kWideTileTokens * 128;
  static constexpr int kStageBytes = kRankTiles * kWeightsTile;
  static constexpr int kUpperAt = 2 * kStageBytes;
  static constexpr int kLowerAt = kUpperAt + kRankTiles * kXaTile;
  static constexpr int kScalesAt = kLowerAt + kRankTiles * kXaTile;  // fp16 only
  static constexpr int kAlignment = 1024;                            // for the swizzle
  static constexpr int kSharedBytes = kScalesAt + kWideTileTokens * 4 + kAlignment;
};

// A tile's xa of a slice to shared memory, as two halves and with a scale for each token: the sums
// of the parts, of which as many are on their way at once as registers hold.
// kAhead: parts behind the first one.
template <typename T, int kSteps, int kAhead>
__device__ __forceinline__ void sum_parts(const ApplyParams& p, const WideWork& work, int index,
                                          int slice, const Tile& tile, int rank, int parts,
                                          unsigned char* shared) {
  using Traits = WideExpandTraits<kSteps>;
  constexpr int kQuads = Traits::kQuads, kTokens = kWideThreads / kQuads, kOwn = 4;
  const int quad = threadIdx.x % kQuads, padded = padded_rank(rank);
  const int j = quad / 4 * 16 + quad % 4 * 2;
  const int64_t stride = int64_t{kWideTileTokens} * work.columns;
#pragma unroll 1
  for (int first = 0; first < kWideTileTokens; first += kOwn * kTokens) {
    const int token = first + threadIdx.x / kQuads;
    const int tokens = 4 * quad < padded ? tile.count - token : 0;  // from there on
    const float* from = work.row_of_part(index * parts, token) + slice * padded + 4 * quad;
    const auto load = [&](float4(&to)[kOwn], int part) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        device::load_where(to[i], from + i * kTokens * work.columns,
                           part < parts && i * kTokens < tokens);
      }
      from += stride;
    };
    float4 sums[kOwn];
    load(sums, 0);
#pragma unroll 1
    for (int part = 1; part < parts; part += kAhead) {
      float4 next[kAhead][kOwn];
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
        load(next[n], part + n);
      }
#pragma unroll
      for (int n = 0; n < kAhead; ++n) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          sums[i].x += next[n][i].x, sums[i].y += next[n][i].y;
          sums[i].z += next[n][i].z, sums[i].w += next[n][i].w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float4& sum = sums[i];
      sum.x = j < rank ? sum.x : 0.0f, sum.y = j + 1 < rank ? sum.y : 0.0f;
      sum.z = j + 8 < rank ? sum.z : 0.0f, sum.w = j + 9 < rank ? sum.w : 0.0f;
      if constexpr (device::kNeedsScale<T>) {
        int most = max(max(__float_as_int(fabsf(sum.x)), __float_as_int(fabsf(sum.y))),
                       max(__float_as_int(fabsf(sum.z)), __float_as_int(fabsf(sum.w))));
#pragma unroll
        for (int distance = 1; distance < kQuads; distance *= 2) {
          most = max(most, __shfl_xor_sync(0xffffffffu, most, distance));
        }
        const float scale = device::scale_down(most);
        sum.x *= scale, sum.y *= scale, sum.z *= scale, sum.w *= scale;
        if (quad == 0) {
          reinterpret_cast<float*>(shared + Traits::kScalesAt)[token + i * kTokens] =
              device::scale_up(most);
        }
      }
      uint2 upper, lower;
      device::split_two<T>(sum.x, sum.y, upper.x, lower.x);
      device::split_two<T>(sum.z, sum.w, upper.y, lower.y);
      const int row = token + i * kTokens, chunk = quad % 16 / 4 * 2;
      const int tile_row = quad / 16 * Traits::kXaTile + row * 128 + quad % 4 * 4;
      unsigned char* to = shared + Traits::kUpperAt + tile_row + (chunk ^ row % 8) * 16;
      unsigned char* next_to = shared + Traits::kUpperAt + tile_row + ((chunk + 1) ^ row % 8) * 16;
      constexpr int kToLower = Traits::kLowerAt - Traits::kUpperAt;
      *reinterpret_cast<uint32_t*>(to) = upper.x;
      *reinterpret_cast<uint32_t*>(next_to) = upper.y;
      *reinterpret_cast<uint32_t*>(to + kToLower) = lower.x;
      *reinterpret_cast<uint32_t*>(next_to + kToLower) = lower.y;
    }
  }
}

// The work, tiles by `blocks` of 128 columns, is cut into equal parts, one a CTA, which adds up the
// xa of a tile and a slice once and passes its blocks with the weights of the next one on their
// way. kFollows: y comes with xa, not before.
template <typename T, typename Y, int kSteps, bool kFollows = false>
__global__ void __launch_bounds__(WideShrinkTraits::kBound, 2)
    decode_wide_expand_kernel(const __grid_constant__ ApplyParams p,
                              const __grid_constant__ WideWork work, int blocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WideExpandTraits<kSteps>;
  constexpr int kChunks = Traits::kChunks, kRows = kWideThreads / kChunks;  // copied at once
  constexpr int kAhead = kSteps == 4 && sizeof(Y) == 2 ? 3 : 2;  // no more, or registers spill
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1));
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int half = warp / 4;  // of the columns
  const int num_tiles = work.num_tiles(p.plan), parts = work.split.cut(num_tiles).parts;
  // Looked at beside the number of tiles: where there is a CTA for each item, it is the one.
  int known = small_quotient(blockIdx.x, blocks);
  Tile tile = p.plan.wide_tiles[known];
  bool waited = false;
  const unsigned items = num_tiles * blocks, each = items / gridDim.x,
                 longer = items - each * gridDim.x;  // parts with an item more
  int item = static_cast<int>(each * blockIdx.x + min(blockIdx.x, longer));
  const int end = static_cast<int>(item + each + (blockIdx.x < longer));
#pragma unroll 1
  while (item < end) {
    const int index = small_quotient(item, blocks);
    if (index != known) {
      known = index;
      tile = p.plan.wide_tiles[index];
    }
    int slice = 0, block = item - index * blocks, width = 0, of_slice = 0;
    for (;; ++slice) {
      width = p.slices.offset[slice + 1] - p.slices.offset[slice];
      of_slice = (width + kWideColumns - 1) / kWideColumns;
      if (block < of_slice) {
        break;
      }
      block -= of_slice;
    }
    const int last = min(of_slice, block + end - item);
    item += last - block;
    Y* rows[2];  // of the two tokens that the lane has sums of, from its first column on
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = 16 * (warp % 4) + 8 * h + g;
      const int id = token < tile.count ? p.plan.permutation[tile.start + token] : -1;
      rows[h] = id >= 0 && id < p.num_tokens ? static_cast<Y*>(p.y) + id * p.y_stride +
                                                   p.slices.offset[slice] + 64 * half + 8 * q
                                             : nullptr;
    }
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (rank <= 0) {
      continue;
    }
    __syncthreads();  // all warps are done with the blocks before
    const int chunk = thread % kChunks, row = thread / kChunks;
    const int bytes = 2 * min(max(rank - 8 * chunk, 0), 8);
    const int64_t stride = p.b.stride(slice, rank);
    const T* b = static_cast<const T*>(p.b.base[slice]) +
                 p.b.row_offset(tile.slot, slice, rank, row) + 8 * chunk;
    // Column 32 m + 8 q + 2 n + e of a half is row 32 m + 8 n + 2 q + e of its product, so that a
    // lane has eight neighbours. A thread's columns are kRows apart.
    constexpr int kTurns = 32 / kRows;
    const auto fetch = [&](int number, int stage_at) {
      if (number < last) {
        uint32_t turns[kTurns];
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int to = row % 8 / 2 * 8 + (row / 8 + i * (kRows / 8)) * 2 + row % 2;
          turns[i] = device::shared_address(shared) + stage_at + chunk / 8 * Traits::kWeightsTile +
                     to * 128 + (chunk % 8 ^ to % 8) * 16;
        }
        const T* from = b + int64_t{number} * kWideColumns * stride;
        const int left = width - number * kWideColumns - row;
        const auto copy = [&](const auto& copy_16) {
#pragma unroll
          for (int i = 0; i < kWideColumns / kRows; ++i) {
            if (i * kRows < left) {
              copy_16(turns[i % kTurns] + i / kTurns * 32 * 128, from);
            }
            from += kRows * stride;
          }
        };
        if (bytes % 16 == 0) {
          copy([&](uint32_t to, const T* at) { device::copy_async_16_or_zero(to, at, bytes > 0); });
        } else {
          copy([&](uint32_t to, const T* at) { device::copy_async_16(to, at, bytes); });
        }
      }
      device::copy_async_commit();
    };
    int stage = 0;
    device::Outputs<Y> outputs[2][2];
    const auto exists = [&](int number, int h, int m) {
      return rows[h] != nullptr && 64 * half + 32 * m + 8 * q < width - number * kWideColumns;
    };
    const auto load_y = [&](int number) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (exists(number, h, m)) {
            outputs[h][m].load(rows[h] + number * kWideColumns + 32 * m);
          }
        }
      }
    };
    // To L2: registers have room for no more than the next block's, and its load comes late.
    const auto prefetch_y = [&](int number) {
      constexpr int kLines = static_cast<int>(sizeof(Y)) / 2;  // of a lane's two runs of columns
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int m = 0; m < kLines; ++m) {
          if (q == 0 && exists(number, h, m)) {
            device::prefetch_line(rows[h] + number * kWideColumns + 32 * m);
          }
        }
      }
    };
    fetch(block, stage);
    if (block + 1 < last) {
      prefetch_y(block + 1);
    }
    if (!kFollows) {
      load_y(block);
    }
    if (!waited) {
      device::grid_dependency_launch();
      device::grid_dependency_wait();
      waited = true;
    }
    if (kFollows) {
      load_y(block);
    }
    sum_parts<T, kSteps, kAhead>(p, work, index, slice, tile, rank, parts, shared);
#pragma unroll 1
    for (; block < last; ++block) {
      device::copy_async_wait<0>();
      device::fence_shared_for_products();
      __syncthreads();
      const unsigned char* const weights_at = shared + stage;
      stage = Traits::kStageBytes - stage;
      fetch(block + 1, stage);
      // sums[4 (4 m + n) + 2 h + e] is token 16 (warp % 4) + 8 h + g, column 32 m + 8 q + 2 n + e.
      float sums[32];
      device::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {
        const uint64_t weights =
            device::swizzled_tile(weights_at + kk / 4 * Traits::kWeightsTile + half * 64 * 128) +
            kk % 4 * 2;
        const unsigned char* const xa = shared + kk / 4 * Traits::kXaTile;
        device::wgmma<T, 64>(sums, device::swizzled_tile(xa + Traits::kUpperAt) + kk % 4 * 2,
                             weights, kk == 0);
        device::wgmma<T, 64>(sums, device::swizzled_tile(xa + Traits::kLowerAt) + kk % 4 * 2,
                             weights);
      }
      device::wgmma_commit();
      float scales[2];  // fp16 only
      if constexpr (device::kNeedsScale<T>) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scales[h] = reinterpret_cast<const float*>(
              shared + Traits::kScalesAt)[16 * (warp % 4) + 8 * h + g];
        }
      }
      device::wgmma_wait<0>();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (exists(block, h, m)) {
            float delta[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              delta[i] = sums[4 * (4 * m + i / 2) + 2 * h + i % 2];
              if constexpr (device::kNeedsScale<T>) {
                delta[i] *= scales[h];
              }
            }
            outputs[h][m].add(delta);
            outputs[h][m].store(rows[h] + block * kWideColumns + 32 * m);
          }
        }
      }
      if (block + 1 < last) {
        load_y(block + 1);
        if (block + 2 < last) {
          prefetch_y(block + 2);
        }
      }
    }
  }
  if (kFollows && !waited && blockIdx.x == 0) {  // what comes next waits for this kernel alone
    device::grid_dependency_wait();
  }
#endif
}

}  // namespace lora_ext::cuda

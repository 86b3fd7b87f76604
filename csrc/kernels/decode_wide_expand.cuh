// The second and the third kernel of the decode apply of wide tiles (see decode_wide.cuh): xa from
// its parts, and y += xa B^T.
#pragma once

#include "kernels/decode_wide.cuh"
#include "kernels/output_span.cuh"

namespace lora_ext::cuda {

constexpr int kWideWarps = 8;  // of the expand: two spans of 64 columns by four groups of 16 tokens
constexpr int kWideThreads = 32 * kWideWarps;
constexpr int kSpan = 64;  // columns of y that a warp holds sums of
constexpr int kWideColumns = 2 * kSpan;

// A lane has a quad of ranks, a warp one token and slice, or several tokens; one, two, four or
// eight warps divide the parts, so that all that a thread loads is on its way at once.
template <typename T, int kSteps>
__global__ void __launch_bounds__(kWideThreads)
    decode_wide_sum_kernel(const __grid_constant__ ApplyParams p,
                           const __grid_constant__ WideWork work) {
  constexpr int kQuads = 4 * kSteps, kTokens = 32 / kQuads, kAtOnce = 10;
  constexpr int kGroups = kWideTileTokens / kTokens;  // that a tile's tokens are
  __shared__ float4 sums[kWideWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % kQuads;
  device::grid_dependency_launch();
  const int num_tiles = work.num_tiles(p.plan), parts = work.split.parts(num_tiles);
  const int num_slices = p.slices.count, items = num_tiles * num_slices * kGroups;
  if (items == 0) {
    if (p.beside && blockIdx.x == 0) {  // what comes next waits for this kernel, and for it alone
      device::grid_dependency_wait();
    }
    return;
  }
  int sharers_log = 0;
  while (sharers_log < 3 && parts > kAtOnce << sharers_log) {
    ++sharers_log;
  }
  const int each = kWideWarps >> sharers_log, sharer = warp & ((1 << sharers_log) - 1);
  bool waited = false;
#pragma unroll 1
  for (int first = blockIdx.x * each; first < items; first += gridDim.x * each) {
    const int item = min(first + (warp >> sharers_log), items - 1);
    const int row = small_quotient(item, num_slices), slice = item - row * num_slices;
    const int index = row / kGroups, token = row % kGroups * kTokens + lane / kQuads;
    const Tile tile = p.plan.wide_tiles[index];
    const int rank = min(p.ranks[tile.slot], p.max_rank), padded = padded_rank(rank);
    const float* from = work.row_of_part(index * parts, token) + slice * padded + 4 * quad;
    const int64_t stride = int64_t{kWideTileTokens} * work.columns;
    if (!waited) {
      device::grid_dependency_wait();  // the parts are all that is yet to come
      waited = true;
    }
    float4 sum = make_float4(0, 0, 0, 0);
    if (token < tile.count && 4 * quad < padded) {
#pragma unroll 1
      for (int part = sharer; part < parts; part += kAtOnce << sharers_log) {
        float4 next[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          next[i] = __ldcg(reinterpret_cast<const float4*>(
              from + min(part + (i << sharers_log), parts - 1) * stride));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {  // those past the last part count as 0
          device::add_masked(sum, next[i], (part + (i << sharers_log) - parts) >> 31);
        }
      }
    }
    if (sharers_log > 0) {
      sums[warp][lane] = sum;
      __syncthreads();
      for (int w = 1; w < 1 << sharers_log && sharer == 0; ++w) {
        const float4 next = sums[warp + w][lane];
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      __syncthreads();
    }
    const int64_t out = (int64_t{index} * kWideTileTokens + token) * num_slices + slice;
    if (sharer == 0) {
      const int j = quad / 4 * 16 + quad % 4 * 2;
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
          work.scales[out] = device::scale_up(most);
        }
      }
      uint4 halves;
      device::split_two<T>(sum.x, sum.y, halves.x, halves.z);
      device::split_two<T>(sum.z, sum.w, halves.y, halves.w);
      if (token < tile.count) {
        work.halves[out * kQuads + quad] = halves;
      }
    }
  }
}

// kSteps: steps of 16 ranks.
template <typename Y, int kSteps>
struct WideExpandTraits : OutputSpan<Y> {
  static constexpr int kQuads = 4 * kSteps;
  static constexpr int kChunks = 2 * kSteps;       // of eight ranks, a row of weights
  static constexpr int kStride = kSteps * 16 + 8;  // elements; odd in chunks: no bank conflicts
  static constexpr int kXaAt = kWideColumns * kStride * 2;
  static constexpr int kOutputsAt = kXaAt + kWideTileTokens * kQuads * 16;
  static constexpr int kSharedBytes = kOutputsAt + kWideWarps * OutputSpan<Y>::kSpanBytes;

  __device__ static int xa_at(int token, int quad) {
    return kXaAt + (token * kQuads + (quad ^ (token & 1) * 4)) * 16;
  }
};

// A CTA at a time serves a tile and 128 columns of a slice; `blocks` are those of a tile.
// kFollows: y comes with xa, not before.
template <typename T, typename Y, int kSteps, bool kFollows = false>
__global__ void __launch_bounds__(kWideThreads, 2)
    decode_wide_expand_kernel(const __grid_constant__ ApplyParams p,
                              const __grid_constant__ WideWork work, int blocks) {
  using Traits = WideExpandTraits<Y, kSteps>;
  constexpr int kQuads = Traits::kQuads, kStride = Traits::kStride, kChunks = Traits::kChunks;
  constexpr int kPerChunk = Traits::kPerChunk;
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int num_tiles = work.num_tiles(p.plan);
  bool waited = false;
#pragma unroll 1
  for (int item = blockIdx.x;; item += gridDim.x) {
    const int index = small_quotient(item, blocks);
    const Tile tile = p.plan.wide_tiles[min(index, work.most_tiles - 1)];  // in the same trip
    if (index >= num_tiles) {
      if (kFollows && !waited && blockIdx.x == 0) {
        device::grid_dependency_wait();
      }
      return;
    }
    int slice = 0, block = item - index * blocks, width = 0;
    for (;; ++slice) {
      width = p.slices.offset[slice + 1] - p.slices.offset[slice];
      const int of_slice = (width + kWideColumns - 1) / kWideColumns;
      if (block < of_slice) {
        break;
      }
      block -= of_slice;
    }
    const int first_token = warp % 4 * kTileTokens, span = warp / 4 * kSpan;
    const int row_chunk = lane % Traits::kRowChunks, row_of_copy = lane / Traits::kRowChunks;
    int ids[Traits::kCopies];
#pragma unroll
    for (int i = 0; i < Traits::kCopies; ++i) {
      const int token = first_token + Traits::kCopyRows * i + row_of_copy;
      ids[i] = token < tile.count ? p.plan.permutation[tile.start + token] : -1;
    }
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (rank <= 0) {
      continue;
    }
    __syncthreads();  // all warps are done with the weights before
    const int first_column = block * kWideColumns, columns = width - first_column;
    {
      constexpr int kRows = kWideThreads / kChunks;  // of weights, that the CTA copies at once
      const int chunk = thread % kChunks, row = thread / kChunks;
      const int bytes = 2 * min(max(rank - 8 * chunk, 0), 8);
      const int64_t stride = p.b.stride(slice, rank);
      const T* from = static_cast<const T*>(p.b.base[slice]) +
                      p.b.row_offset(tile.slot, slice, rank, first_column + row) + 8 * chunk;
#pragma unroll
      for (int i = 0; i < kWideColumns / kRows; ++i) {
        const int c = row + i * kRows;
        if (c < columns) {
          // Column 8 g + 2 b + h of a span is row g + 8 h of its block b.
          const int at = c / 64 * 64 + c % 8 / 2 * 16 + c % 2 * 8 + c % 64 / 8;
          device::copy_async_16(shared + (at * kStride + 8 * chunk) * 2, from, bytes);
        }
        from += kRows * stride;
      }
    }
    unsigned char* outputs = shared + Traits::kOutputsAt + warp * Traits::kSpanBytes;
    const bool copies = span + row_chunk * kPerChunk < columns;
    Y* rows[Traits::kCopies];
    const auto fetch_y = [&](int i) {
      if (rows[i] != nullptr) {
        device::copy_async_16(outputs + Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk),
                              rows[i], 16);
      }
    };
#pragma unroll
    for (int i = 0; i < Traits::kCopies; ++i) {
      rows[i] = copies && ids[i] >= 0 && ids[i] < p.num_tokens
                    ? static_cast<Y*>(p.y) + ids[i] * p.y_stride + p.slices.offset[slice] +
                          first_column + span + row_chunk * kPerChunk
                    : nullptr;
      if (!kFollows) {
        fetch_y(i);
      }
    }
    device::copy_async_commit();
    if (!waited) {
      device::grid_dependency_launch();
      device::grid_dependency_wait();
      waited = true;
    }
    if (kFollows) {
#pragma unroll
      for (int i = 0; i < Traits::kCopies; ++i) {
        fetch_y(i);
      }
    }
    const int64_t first_out = int64_t{index} * kWideTileTokens * p.slices.count + slice;
#pragma unroll
    for (int i = 0; i < kWideTileTokens * kQuads / kWideThreads; ++i) {
      const int at = thread + i * kWideThreads, token = at / kQuads, quad = at % kQuads;
      if (token < tile.count && 4 * quad < padded_rank(rank)) {
        device::copy_async_16(shared + Traits::xa_at(token, quad),
                              work.halves + (first_out + token * p.slices.count) * kQuads + quad,
                              16);
      }
    }
    device::copy_async_commit();
    float scales[4];  // fp16 only: of the tokens 8 n + 2 q + e
    if constexpr (device::kNeedsScale<T>) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        const int token = first_token + 8 * (o / 2) + 2 * q + o % 2;
        scales[o] = __ldcg(work.scales + first_out + token * p.slices.count);
      }
    }
    device::copy_async_wait<0>();
    __syncthreads();
    if (first_token >= tile.count || span >= columns) {
      continue;
    }
    const T* weights =
        reinterpret_cast<const T*>(shared) + (span + lane % 16) * kStride + lane / 16 * 8;
    float acc[4][2][4] = {};
#pragma unroll 2
    for (int kk = 0; kk < kSteps; ++kk) {
      if (16 * kk < rank) {
        uint32_t w[4][4];
        uint4 tokens[2];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          device::ldmatrix_x4(w[b], weights + b * 16 * kStride + 16 * kk);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          tokens[n] = *reinterpret_cast<const uint4*>(
              shared + Traits::xa_at(first_token + 8 * n + g, 4 * kk + q));
        }
#pragma unroll
        for (int b = 0; b < 4; ++b) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            device::mma<T>(acc[b][n], w[b][0], w[b][1], w[b][2], w[b][3], tokens[n].x, tokens[n].y);
          }
        }
#pragma unroll
        for (int b = 0; b < 4; ++b) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            device::mma<T>(acc[b][n], w[b][0], w[b][1], w[b][2], w[b][3], tokens[n].z, tokens[n].w);
          }
        }
      }
    }
    Traits::template add<T>(outputs, acc, scales);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Traits::kCopies; ++i) {
      if (rows[i] != nullptr) {
        *reinterpret_cast<uint4*>(rows[i]) = *reinterpret_cast<const uint4*>(
            outputs + Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk));
      }
    }
    __syncwarp();
  }
}

}  // namespace lora_ext::cuda

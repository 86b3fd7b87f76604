// y += xa B^T on sm_90a for ranks above 32: the walk of expand_stream.cuh with products of a
// warpgroup.
//
// A CTA is a warpgroup and serves a tile of 64 tokens, whose xa stays in registers as the left
// operand of the products; the weights of a step come from shared memory, once for the tile instead
// of once for 16 tokens. Three CTAs fit an SM: while one waits for its products or its copies, the
// others are at work. A group of two tiles would read the weights half as often, but where slots
// leave tiles alone those would take as long as pairs.
#pragma once

#include <cuda.h>

#include "common/wgmma.cuh"
#include "kernels/expand_stream.cuh"

namespace lora_ext::cuda {

constexpr int kWgmmaExpandThreads = 2 * kWideTileTokens;  // a warpgroup

// B of each slice as [L, columns, R], for copies of boxes of 64 columns by 64 ranks.
struct ExpandMaps {
  CUtensorMap b[kMaxSlices];
};

// kSteps: steps of 16 ranks that the registers hold, a multiple of 4.
template <typename Y, int kSteps>
struct WgmmaExpandTraits {
  static constexpr int kColumns = kSpanColumns;
  static constexpr int kChunks = 2 * kSteps;          // of eight ranks, a row of weights
  static constexpr int kBlockBytes = kColumns * 128;  // 64 ranks of a step's columns, swizzled
  static constexpr int kWeightBytes = kSteps / 4 * kBlockBytes;
  static constexpr int kRowBytes = kColumns * sizeof(Y);
  static constexpr int kSpanBytes = kTileTokens * kRowBytes;  // of a warp
  static constexpr int kStageBytes = kWeightBytes + kWgmmaExpandThreads / 32 * kSpanBytes;
  static constexpr int kAlignment = 1024;  // of a stage, for the swizzle
  static constexpr int kBlocks = sizeof(Y) == 4 ? 2 : 3;
  static constexpr int kBudget = 220 * 1024 / kBlocks - kAlignment - 64;
  static constexpr int kStages = kBudget / kStageBytes < 3 ? kBudget / kStageBytes : 3;
  static constexpr int kBarriersAt = kStages * kStageBytes;  // of the boxes of each stage
  static constexpr int kSharedBytes = kBarriersAt + kStages * 8 + kAlignment;
  // Copies of 16 bytes: a warp's copy i is of rows kCopyRows * i and following.
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kCopyRows = 32 / kRowChunks;
  static constexpr int kCopies = kTileTokens / kCopyRows;

  // Where a chunk lies in a warp's span: rotated so that neither whole rows nor a product's sums
  // meet in a bank.
  __device__ static int at(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (sizeof(Y) == 2 ? row & 7 : 2 * row & 6)) * 16;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// xa of the tokens 8 n + g of a warp, split into two 16-bit halves, as left operands.
template <typename T, int kSteps>
struct TokenOperand {
  uint32_t high[kSteps][4], low[kSteps][4];
  float scales[2];  // fp16 only

  // rows: of the two tokens, at the slice's first column; parts: of the sums, part_stride apart.
  __device__ __forceinline__ void load(const ExpandParams& p, const float* const (&rows)[2],
                                       int rank, int parts, int64_t part_stride) {
    const int q = threadIdx.x % 4;
    float4 sums[2][kSteps];  // ranks 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of a step
    if (p.layout.by_tile) {
      // All loads of a part at once, for each costs a trip to the L2; by way of L1, since CTAs of
      // the same tile may share a multiprocessor.
      const auto part_of = [&](int part, int n, int kk) {
        return *reinterpret_cast<const float4*>(rows[n] + part * part_stride + 16 * kk + 4 * q);
      };
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          sums[n][kk] = 16 * kk < rank ? part_of(0, n, kk) : make_float4(0, 0, 0, 0);
        }
      }
      if (p.layout.halves) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int kk = 0; kk < kSteps; ++kk) {
            high[kk][n] = __float_as_uint(sums[n][kk].x);
            high[kk][2 + n] = __float_as_uint(sums[n][kk].y);
            low[kk][n] = __float_as_uint(sums[n][kk].z);
            low[kk][2 + n] = __float_as_uint(sums[n][kk].w);
          }
        }
        return;
      }
#pragma unroll 1
      for (int part = 1; part < parts; ++part) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int kk = 0; kk < kSteps; ++kk) {
            if (16 * kk < rank) {
              const float4 more = part_of(part, n, kk);
              sums[n][kk].x += more.x, sums[n][kk].y += more.y;
              sums[n][kk].z += more.z, sums[n][kk].w += more.w;
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          const float* from = rows[n] + 16 * kk + 2 * q;
          const int left = rank - 16 * kk - 2 * q;
          sums[n][kk].x = left > 0 ? __ldcg(from) : 0.0f;
          sums[n][kk].y = left > 1 ? __ldcg(from + 1) : 0.0f;
          sums[n][kk].z = left > 8 ? __ldcg(from + 8) : 0.0f;
          sums[n][kk].w = left > 9 ? __ldcg(from + 9) : 0.0f;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {  // behind the rank there may be anything
        const int j = 16 * kk + 2 * q;
        float4& four = sums[n][kk];
        four.x = j < rank ? four.x : 0.0f, four.y = j + 1 < rank ? four.y : 0.0f;
        four.z = j + 8 < rank ? four.z : 0.0f, four.w = j + 9 < rank ? four.w : 0.0f;
      }
      float scale = 1.0f;
      if constexpr (device::kNeedsScale<T>) {
        int bits = 0;
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          const float4& four = sums[n][kk];
          bits = max(bits, max(max(__float_as_int(fabsf(four.x)), __float_as_int(fabsf(four.y))),
                               max(__float_as_int(fabsf(four.z)), __float_as_int(fabsf(four.w)))));
        }
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 1));
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, 2));
        scale = device::scale_down(bits), scales[n] = device::scale_up(bits);
      }
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {
        const float4& four = sums[n][kk];
        device::split_two<T>(four.x * scale, four.y * scale, high[kk][n], low[kk][n]);
        device::split_two<T>(four.z * scale, four.w * scale, high[kk][2 + n], low[kk][2 + n]);
      }
    }
  }
};

// Steps [first, last) of a tile's rows of y.
template <typename T, typename Y, int kSteps>
__device__ __forceinline__ void expand_wgmma_tile(const ExpandParams& p, const Tile& tile,
                                                  const ExpandMaps& maps, const XaOfTile& xa,
                                                  int rank, int first, int last,
                                                  unsigned char* shared, uint32_t& turns) {
  using Traits = WgmmaExpandTraits<Y, kSteps>;
  constexpr int kStages = Traits::kStages, kChunks = Traits::kChunks;
  constexpr int kWeightRows = kWgmmaExpandThreads / kChunks;  // that the block copies at once
  constexpr int kPerChunk = 16 / sizeof(Y);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int first_token = warp * kTileTokens;
  const auto token_id = [&](int token) {  // -1: none
    const int id = token < tile.count ? p.plan.permutation[tile.start + token] : -1;
    return id < p.num_tokens ? id : -1;  // a plan may be for more tokens than this call has
  };

  const int row_chunk = lane % Traits::kRowChunks, row_of_copy = lane / Traits::kRowChunks;
  int ids[Traits::kCopies];
#pragma unroll
  for (int i = 0; i < Traits::kCopies; ++i) {
    ids[i] = token_id(first_token + Traits::kCopyRows * i + row_of_copy);
  }
  const auto outputs_at = [&](int id, const StreamPlace& place) {
    return static_cast<Y*>(p.y) + id * p.y_stride + place.start + place.column +
           row_chunk * kPerChunk;
  };

  unsigned char* spans = shared + Traits::kWeightBytes + warp * Traits::kSpanBytes;
  const auto barrier_of = [&](int stage) {
    return reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + stage;
  };
  // Behind a slot's rank there may be anything; behind the highest, boxes bring zeros.
  const bool boxes = rank == p.max_rank;
  const auto copy_weight_rows = [&](const StreamPlace& place, unsigned char* weights) {
    const int chunk = thread % kChunks, row = thread / kChunks;
    const int bytes = 2 * min(max(rank - 8 * chunk, 0), 8);
    const T* from = static_cast<const T*>(p.b.base[place.slice]) +
                    p.b.row_offset(tile.slot, place.slice, rank, place.column + row) + 8 * chunk;
    const int64_t stride = p.b.stride(place.slice, rank) * kWeightRows;
    unsigned char* to =
        weights + chunk / 8 * Traits::kBlockBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
#pragma unroll
    for (int c = 0; c < Traits::kColumns; c += kWeightRows) {
      device::copy_async_16(to + c * 128, from, place.column + row + c < place.width ? bytes : 0);
      from += stride;
    }
  };
  StreamPlace fetched = stream_place(p.slices, first, Traits::kColumns);
  StreamPlace now = fetched;
  int fetch_stage = 0, left = last - first;
  const auto fetch = [&] {
    if (left > 0) {
      const int columns = fetched.width - fetched.column;
      unsigned char* to = shared + fetch_stage * Traits::kStageBytes;
      if (!boxes) {
        copy_weight_rows(fetched, to);
      } else if (thread == 0) {
        device::barrier_arrive_expecting(barrier_of(fetch_stage), Traits::kWeightBytes);
#pragma unroll
        for (int i = 0; i < kSteps / 4; ++i) {
          device::copy_box(to + i * Traits::kBlockBytes, &maps.b[fetched.slice], 64 * i,
                           fetched.column, tile.slot, barrier_of(fetch_stage));
        }
      }
      if (row_chunk * kPerChunk < columns) {
#pragma unroll
        for (int i = 0; i < Traits::kCopies; ++i) {
          if (ids[i] >= 0) {
            device::copy_async_16(spans + fetch_stage * Traits::kStageBytes +
                                      Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk),
                                  outputs_at(ids[i], fetched), 16);
          }
        }
      }
      fetched.advance(p.slices, Traits::kColumns);
      --left;
    }
    fetch_stage = fetch_stage + 1 < kStages ? fetch_stage + 1 : 0;
    device::copy_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch();
  }

  // Lanes without a token read another's xa: their products reach nobody.
  const float* xa_rows[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int token = min(first_token + 8 * n + g, tile.count - 1);
    const int64_t row = p.layout.by_tile ? int64_t{xa.first_row} + token : max(token_id(token), 0);
    xa_rows[n] = static_cast<const float*>(p.xa) + row * p.xa_stride;
  }
  if (p.after_xa) {
    device::grid_dependency_wait();  // xa is all that the kernel before has written
  }
  TokenOperand<T, kSteps> tokens;
  const auto load_xa = [&](int slice) {
    const int column = slice * (p.layout.by_tile ? XaLayout::padded(rank) : rank);
    const float* const from[2] = {xa_rows[0] + column, xa_rows[1] + column};
    tokens.load(p, from, rank, xa.parts, kWideTileTokens * p.xa_stride);
  };
  bool needs_xa = true;

  int stage = 0;
  for (int step = first; step < last; ++step) {
    if (needs_xa) {
      load_xa(now.slice);
    }
    device::copy_async_wait<kStages - 2>();
    if (boxes) {
      device::barrier_wait(barrier_of(stage), turns >> stage & 1);
      turns ^= 1u << stage;
    } else {
      device::fence_shared_for_products();
    }
    __syncthreads();  // this step's data are there, and every warp is done with the stage that is
                      // filled next
    const uint64_t weights = device::swizzled_tile(shared + stage * Traits::kStageBytes);
    float acc[kSpanColumns / 2];
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      const uint64_t b = weights + kk / 4 * Traits::kBlockBytes / 16 + kk % 4 * 2;
      device::wgmma<T, kSpanColumns>(acc, tokens.high[kk], b, kk == 0);
      device::wgmma<T, kSpanColumns>(acc, tokens.low[kk], b, false);
    }
    device::wgmma_commit();
    fetch();  // while the tensor cores are at work
    // acc[4 n + 2 h + e] is of token 8 h + g, column 8 n + 2 q + e.
    unsigned char* span = spans + stage * Traits::kStageBytes;
    using Pair = std::conditional_t<sizeof(Y) == 2, uint32_t, float2>;
    // Of the units of eight columns 2 j and 2 j + 1, of tokens g and g + 8 each.
    Pair outputs[kSpanColumns / 16][4];
    const auto matrix = [&](int j) {  // the row that a lane names of matrices of 8 by 8
      return span + Traits::at(lane % 16, 2 * j + lane / 16);
    };
    const auto output = [&](int h, int n) {
      constexpr int kPairs = kPerChunk / 2;  // in a chunk
      return reinterpret_cast<Pair*>(span + Traits::at(8 * h + g, n * 4 / kPairs + q / kPairs)) +
             q % kPairs;
    };
#pragma unroll
    for (int j = 0; j < kSpanColumns / 16; ++j) {
      if constexpr (sizeof(Y) == 2) {
        device::ldmatrix_x4(outputs[j], matrix(j));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          outputs[j][i] = *output(i % 2, 2 * j + i / 2);
        }
      }
    }
    device::wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < kSpanColumns / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = 2 * j + i / 2, h = i % 2;
        float d0 = acc[4 * n + 2 * h], d1 = acc[4 * n + 2 * h + 1];
        if constexpr (device::kNeedsScale<T>) {
          d0 *= tokens.scales[h], d1 *= tokens.scales[h];
        }
        Pair& pair = outputs[j][i];
        if constexpr (sizeof(Y) == 2) {
          pair = device::pack<Y>(device::unpack<Y>(pair, 0) + d0, device::unpack<Y>(pair, 1) + d1);
        } else {
          pair = make_float2(pair.x + d0, pair.y + d1);
          *output(h, n) = pair;
        }
      }
      if constexpr (sizeof(Y) == 2) {
        device::stmatrix_x4(matrix(j), outputs[j]);
      }
    }
    __syncwarp();
    if (row_chunk * kPerChunk < now.width - now.column) {
#pragma unroll
      for (int i = 0; i < Traits::kCopies; ++i) {
        if (ids[i] >= 0) {
          *reinterpret_cast<uint4*>(outputs_at(ids[i], now)) = *reinterpret_cast<const uint4*>(
              span + Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk));
        }
      }
    }
    stage = stage + 1 < kStages ? stage + 1 : 0;
    needs_xa = now.advance(p.slices, Traits::kColumns);
  }
  device::copy_async_wait<0>();
  device::fence_shared_for_products();
  __syncthreads();  // the next tile fills the stages again, perhaps by boxes
}
#endif

// after_xa: see expand.cu.
template <typename T, typename Y, int kSteps>
__global__ void __launch_bounds__(kWgmmaExpandThreads, WgmmaExpandTraits<Y, kSteps>::kBlocks)
    expand_wgmma_kernel(const __grid_constant__ ExpandWork work,
                        const __grid_constant__ ExpandMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Traits = WgmmaExpandTraits<Y, kSteps>;
  device::warm_parameters<kWgmmaExpandThreads>(work);
  const ExpandParams& p = work.p;
  const int row_steps = work.row_steps;
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kStages; ++i) {
      device::barrier_init(reinterpret_cast<uint64_t*>(shared + Traits::kBarriersAt) + i, 1);
    }
    device::barrier_init_fence();
  }
  if (threadIdx.x < p.slices.count) {
    device::prefetch_map(maps.b + threadIdx.x);
  }
  __syncthreads();
  uint32_t turns = 0;  // of each stage's barrier, mod 2
  if (!p.after_xa) {
    device::grid_dependency_wait();
  }
  device::grid_dependency_launch();
  int num_tiles = p.plan.header[kNumWideTiles];
  num_tiles = p.layout.by_tile ? min(num_tiles, p.layout.most_tiles) : num_tiles;
  // All tiles by all steps, in equal parts.
  const unsigned items = num_tiles * row_steps, parts = min(gridDim.x, items);
  if (blockIdx.x >= parts) {
    return;
  }
  const WalkPart part(num_tiles, row_steps, parts, work.first_wave);
  int at = part.begin;
  const int end = part.end;
  while (at < end) {
    const int index = at / row_steps, begin = index * row_steps;
    const Tile tile = p.plan.wide_tiles[index];
    const int rank = min(p.ranks[tile.slot], p.max_rank);
    if (rank > 0) {
      const XaOfTile xa = xa_of_tile(p.layout, index, num_tiles);
      expand_wgmma_tile<T, Y, kSteps>(p, tile, maps, xa, rank, at - begin,
                                      min(end - begin, row_steps), shared, turns);
    }
    at = begin + row_steps;
  }
#endif
}

}  // namespace lora_ext::cuda

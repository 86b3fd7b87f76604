// Shrink and expand in one launch: the decode kernel (sm_90).
//
// A cluster of C CTAs serves one (tile of up to 16 tokens, slice). Each CTA contracts its part of
// K, the partial products meet through distributed shared memory in fixed order, and each CTA
// expands its part of N. Per CTA:
//   1. What needs no other result is put in flight at once: B and y of each warp's first 64
//      columns, by asynchronous copies to where the same lane will read them (no registers held, no
//      barrier needed).
//   2. x A^T over its K range: the weights are the 16-row operand of the mma and the tokens the
//      8-column one, so that a tile of one token wastes no weight bandwidth; 16-byte loads straight
//      from global memory to the tensor cores.
//   3. The sum over warps goes into the shared memory of every CTA of the cluster (stores do not
//      wait, loads would), and behind the barrier each adds up all of them: xa in fp32, scaled,
//      then split into two 16-bit halves for the tensor cores.
//   4. xa B^T, 64 columns of y a warp at a time; y is read once, added to in fp32, rounded once.
// Weights are read once per tile, at their true rank. The order of every sum is fixed: same inputs,
// same bits. A CTA lives for a few microseconds, so instructions count as much as bytes: what is
// not aligned to 16 bytes takes a second copy of the body (kVector false) instead of branches in
// the first.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/heuristics.h"

namespace lora_ext::cuda {

constexpr int kFusedWarps = 8;
constexpr int kFusedThreads = 32 * kFusedWarps;
// Floats between rows of 16 tokens: float2 stores of a half-warp hit distinct banks.
constexpr int kPartialStride = 20;
// Columns of y that a warp updates at a time: 8 lanes of 16 bytes for each token.
constexpr int kUnitColumns = 64;
constexpr int kCached = 256;  // tokens and slots whose metadata is fetched before the tile is known

// kRowBlocks: blocks of 16 ranks that a warp computes, 1 for pools of rank up to 16, else 2.
// kDeep: for launches that leave an SM to one CTA, which may then use all registers for loads.
template <int kRowBlocks, bool kDeep>
struct FusedTraits {
  static constexpr int kRows = 16 * kRowBlocks;
  // 32-wide K steps whose loads are in flight together: as many as the registers hold.
  static constexpr int kSteps = kDeep ? 7 : 3;
  static constexpr int kChunk = 4 * kRowBlocks;  // neighbouring ranks of B that a lane holds
  static constexpr int kSpan = 4 * kChunk;       // ranks of one expand step
  static constexpr int kMinBlocks = kDeep ? 1 : kRowBlocks == 1 ? 3 : 2;
};

// Partial sums are pushed to all CTAs of the cluster while they fit here; wide ranks are pulled
// from `part` instead.
constexpr int kMaxReceived = 64 * 1024;
LORA_EXT_HOST_DEVICE inline bool fused_pushes(int max_rank, int cluster) {
  return cluster > 1 && cluster * max_rank * 16 * 4 <= kMaxReceived;
}

struct FusedShared {  // byte offsets
  int b, y, part, partial, bytes;
};
template <typename Y, int kRowBlocks>
LORA_EXT_HOST_DEVICE FusedShared fused_shared(int max_rank, int cluster) {
  using Traits = FusedTraits<kRowBlocks, false>;
  const int rank = (max_rank + 31) / 32 * 32;
  const int partial = kFusedWarps * Traits::kRows * kPartialStride * 4;
  // xa takes the place of the partial sums once those are summed.
  const int halves = 2 * 16 * (rank + 8) * 2;
  FusedShared at{};
  at.b = 128 + 3 * kCached * 4;
  at.y = at.b + kFusedThreads * 8 * Traits::kChunk * 2;
  at.part = at.y + kFusedThreads * 4 * 8 * static_cast<int>(sizeof(Y));
  at.partial = at.part + (fused_pushes(max_rank, cluster) ? cluster * max_rank : rank) * 16 * 4;
  at.bytes = at.partial + (partial > halves ? partial : halves);
  return at;
}

// The kernel's own parameters: a CTA reads two 64-byte lines and that of its slice. The parameter
// bank is cold at every launch, and the arrays of ApplyParams would cost a dozen misses, a
// microsecond in all.
struct alignas(64) FusedSlice {
  const void *a, *b;
  int64_t a_slot_stride, a_row_stride, b_slot_stride, b_row_stride;
  int32_t first_column, width, b_first_row, unused;
};
struct alignas(64) FusedParams {
  const Tile* tiles;
  const int32_t *permutation, *ranks;
  const float* scalings;
  const void* x;
  void* y;
  int64_t x_stride, y_stride;
  const int64_t *a_offsets, *b_offsets;  // flat layouts, else null
  int32_t cluster, max_tokens, num_slots, num_tokens, in_features, max_rank;
  bool a_rows_by_rank, vector_x_y;
  FusedSlice slices[kMaxSlices];
};

// What a CTA works on.
template <typename T>
struct FusedWork {
  int member, rank, count;
  int token0, token1;  // of lane group g: tokens g and g + 8 of the tile, -1 where there is none
  float scaling;
  const T *a, *b;  // the slice's first row
  int64_t a_stride, b_stride;
  int first_column, width;
};

template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(device::Chunk<T, 8>& chunk, const T* row, int k, int end,
                                           bool exists) {
  if constexpr (kVector) {
    device::load_vector(chunk, row + k, exists && k < end);
  } else {
    device::load_scalars(chunk, row + k, exists ? end - k : 0);
  }
}

// Ranks j .. j + kChunk of eight rows of B to shared memory, lane by lane; ranks from `rank` on
// become 0.
template <typename T, int kChunk, bool kVector>
__device__ __forceinline__ void stage_rows(T* to, const T* row, int64_t stride, int j, int rank,
                                           int rows) {
  const int valid = min(max(rank - j, 0), kChunk);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    T* at = to + i * kFusedThreads * kChunk;
    if constexpr (kVector) {  // rows come in whole eights
      if (rows > 0) {
        if constexpr (kChunk == 8) {
          device::copy_async_16(at, row + j, 2 * valid);
        } else {
          device::copy_async_8(at, row + j, 2 * valid);
        }
      }
    } else {
      device::Chunk<T, kChunk> chunk;
      device::load_scalars(chunk, row + j, i < rows ? valid : 0);
      *reinterpret_cast<device::Chunk<T, kChunk>*>(at) = chunk;
    }
    row += stride;
  }
}

template <typename T, typename Y, int kRowBlocks, bool kDeep, bool kVector>
__device__ __forceinline__ void fused_body(const FusedParams& p, const FusedWork<T>& work,
                                           unsigned char* shared) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Traits = FusedTraits<kRowBlocks, kDeep>;
  constexpr int kChunk = Traits::kChunk, kSpan = Traits::kSpan;
  const FusedShared at = fused_shared<Y, kRowBlocks>(p.max_rank, p.cluster);
  const bool pushes = fused_pushes(p.max_rank, p.cluster);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int rank = work.rank, cluster = p.cluster;
  int* token_ids = reinterpret_cast<int*>(shared);  // [16]
  int* token_max = reinterpret_cast<int*>(shared) +
                   16;  // [16], fp16 only: bits of the largest |xa| of each token
  T* staged_b = reinterpret_cast<T*>(shared + at.b) + thread * kChunk;  // [8][thread][kChunk]
  Y* staged_y = reinterpret_cast<Y*>(shared + at.y) + thread * 8;       // [4][thread][8]
  float* part =
      reinterpret_cast<float*>(shared + at.part);  // [rank][16], read by the whole cluster
  float* partial = reinterpret_cast<float*>(shared + at.partial);  // [warp][kRows][kPartialStride]
  const int xa_stride = (p.max_rank + 31) / 32 * 32 + 8;
  T* xa_high = reinterpret_cast<T*>(shared + at.partial);  // [16][xa_stride]
  T* xa_low = xa_high + 16 * xa_stride;

  // 1. B and y of the warp's first unit. Row m of the mma's 16 weight rows stands for column 8 g +
  // i of the unit, so that a lane's results of the four row blocks are eight neighbours in y.
  const int width = work.width;
  const int64_t b_stride = work.b_stride;
  const T* b = work.b;
  Y* y = static_cast<Y*>(p.y) + work.first_column;
  // Output o of a lane: token 8 * (o / 2) + 2 q + o % 2 of the tile, eight columns from 8 g.
  const auto output_row = [&](int o) {
    const int id = token_ids[8 * (o / 2) + 2 * q + o % 2];
    return id >= 0 ? y + id * p.y_stride : nullptr;
  };
  const auto stage_b = [&](int column, int j) {
    stage_rows<T, kChunk, kVector>(staged_b, b + column * b_stride, b_stride, j + q * kChunk, rank,
                                   width - column);
  };
  const auto stage_y = [&](int column) {
    if (kVector && column < width) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        if (o < 2 || work.count > 8) {
          const Y* from = output_row(o);
          if (from != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
              device::copy_async_16(staged_y + o * kFusedThreads * 8 + i, from + column + i, 16);
            }
          }
        }
      }
    }
  };
  int column = (work.member * kFusedWarps + warp) * kUnitColumns + 8 * g;
  stage_b(column, 0);
  stage_y(column);
  device::copy_async_commit();

  // 2. This CTA's part of K, in whole 32-wide steps. Warps divide the ranks into groups of kRows
  // and K into parts; neighbouring parts take neighbouring 64-byte pieces of the same rows, so that
  // DRAM sees long runs.
  const int in_features = p.in_features;
  const int steps = (in_features + 31) / 32;
  const int k_begin = steps * work.member / cluster * 32;
  const int k_end = min(steps * (work.member + 1) / cluster * 32, in_features);
  const T* x = static_cast<const T*>(p.x);
  const bool has0 = work.token0 >= 0, has1 = work.token1 >= 0;
  const T* x0 = x + max(work.token0, 0) * p.x_stride;
  const T* x1 = x + max(work.token1, 0) * p.x_stride;
  const int64_t a_stride = work.a_stride;
  const T* a = work.a;
  const int group_shift = kRowBlocks == 1 || rank <= 32 ? 0 : rank <= 64 ? 1 : rank <= 128 ? 2 : 3;
  const int num_parts = kFusedWarps >> group_shift;
  const int group = warp / num_parts, k_part = warp % num_parts;
  const int pass_rows = Traits::kRows << group_shift;
  for (int pass = 0; pass < (kRowBlocks == 1 ? 1 : rank); pass += pass_rows) {
    const int row0 = pass + group * Traits::kRows;
    const T* a_rows[2 * kRowBlocks];
    bool has_row[2 * kRowBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
      has_row[i] = row0 + 8 * i + g < rank;
      a_rows[i] = a + (row0 + 8 * i + g) * a_stride;
    }
    float acc[kRowBlocks][2][4] = {};
    // The bound is the warp's, not the lane's: mma needs all lanes.
    for (int start = k_begin + 32 * k_part; start < k_end;
         start += 32 * Traits::kSteps * num_parts) {
      device::Chunk<T, 8> weights[Traits::kSteps][2 * kRowBlocks], tokens[Traits::kSteps][2];
#pragma unroll
      for (int s = 0; s < Traits::kSteps; ++s) {
        const int k = start + 32 * s * num_parts + 8 * q;
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
          load_chunk<T, kVector>(weights[s][i], a_rows[i], k, k_end, has_row[i]);
        }
        load_chunk<T, kVector>(tokens[s][0], x0, k, k_end, has0);
        load_chunk<T, kVector>(tokens[s][1], x1, k, k_end, has1);
      }
#pragma unroll
      for (int s = 0; s < Traits::kSteps; ++s) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
#pragma unroll
          for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              device::mma<T>(acc[block][n], weights[s][2 * block].words[w],
                             weights[s][2 * block + 1].words[w], weights[s][2 * block].words[w + 1],
                             weights[s][2 * block + 1].words[w + 1], tokens[s][n].words[w],
                             tokens[s][n].words[w + 1]);
            }
          }
        }
      }
    }
    if (pass > 0) {
      __syncthreads();  // the sums of the pass before are done with `partial`
    }
#pragma unroll
    for (int block = 0; block < kRowBlocks; ++block) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float* to = partial + (warp * Traits::kRows + 16 * block + 8 * h + g) * kPartialStride +
                      8 * n + 2 * q;
          *reinterpret_cast<float2*>(to) =
              make_float2(acc[block][n][2 * h], acc[block][n][2 * h + 1]);
        }
      }
    }
    __syncthreads();
    if (pushes && pass == 0) {
      device::cluster_wait();  // the peers have started: their shared memory is theirs
    }
    for (int i = thread; i < min(rank - pass, pass_rows) * 4; i += kFusedThreads) {
      const int row = i / 4;
      const float* from =
          partial +
          (row / Traits::kRows * num_parts * Traits::kRows + row % Traits::kRows) * kPartialStride +
          i % 4 * 4;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int w = 1; w < kFusedWarps; ++w) {
        if (w < num_parts) {
          const float4 next =
              *reinterpret_cast<const float4*>(from + w * Traits::kRows * kPartialStride);
          sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
        }
      }
      if (!pushes) {
        *reinterpret_cast<float4*>(part + pass * 16 + i * 4) = sum;
      } else if (i % 4 * 4 < work.count) {
        const float* to = part + (work.member * rank + pass) * 16 + i * 4;
#pragma unroll 8
        for (int c = 0; c < cluster; ++c) {
          device::store_peer(device::peer_address(to, c), sum);
        }
      }
    }
  }

  // 3. All CTAs' parts, in the order of the cluster; ranks up to the next multiple of an expand
  // step become 0.
  if (cluster > 1) {
    device::cluster_arrive();
    device::cluster_wait();
  } else {
    __syncthreads();
  }
  const int padded = (rank + kSpan - 1) / kSpan * kSpan;
  const auto pull = [&](int i) {  // four tokens of row i / 4
    float4 sum = make_float4(0, 0, 0, 0);
    if (i < rank * 4 && i % 4 * 4 < work.count) {
#pragma unroll 4
      for (int c = 0; c < cluster; ++c) {
        const float4 next = pushes ? *reinterpret_cast<const float4*>(part + c * rank * 16 + i * 4)
                                   : device::load_peer(device::peer_address(part + i * 4, c));
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
    }
    return make_float4(sum.x * work.scaling, sum.y * work.scaling, sum.z * work.scaling,
                       sum.w * work.scaling);
  };
  if constexpr (device::kNeedsScale<T>) {
    for (int i = thread; i < rank * 4; i += kFusedThreads) {
      const float4 sum = pull(i);
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        atomicMax(token_max + i % 4 * 4 + e, __float_as_int(fabsf(values[e])));
      }
    }
    __syncthreads();
  }
  for (int i = thread; i < padded * 4; i += kFusedThreads) {
    const int row = i / 4, token = i % 4 * 4;
    const float4 sum = pull(i);
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = device::kNeedsScale<T> ? device::scale_down(token_max[token + e]) : 1.0f;
      T high, low;
      device::split(values[e] * scale, high, low);
      xa_high[(token + e) * xa_stride + row] = high;
      xa_low[(token + e) * xa_stride + row] = low;
    }
  }
  __syncthreads();
  const bool pulled = cluster > 1 && !pushes;
  if (pulled) {
    device::cluster_arrive();  // done with the peers' shared memory; they may not leave before that
  }

  // 4. Units of 64 columns.
  for (bool first = true; column - 8 * g < width;
       column += cluster * kFusedWarps * kUnitColumns, first = false) {
    if (!first) {
      stage_y(column);
    }
    float acc[4][2][4] = {};
    for (int j = 0; j < rank; j += kSpan) {
      if (!first || j > 0) {
        stage_b(column, j);
        device::copy_async_commit();
      }
      device::copy_async_wait<0>();
      device::Chunk<T, kChunk> high[2], low[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int from = (8 * n + g) * xa_stride + j + q * kChunk;
        high[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_high + from);
        low[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_low + from);
      }
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        device::Chunk<T, kChunk> weights[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weights[h] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
              staged_b + (2 * block + h) * kFusedThreads * kChunk);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n == 0 || work.count > 8) {
#pragma unroll
            for (int w = 0; w < kChunk / 2; w += 2) {
              device::mma<T>(acc[block][n], weights[0].words[w], weights[1].words[w],
                             weights[0].words[w + 1], weights[1].words[w + 1], high[n].words[w],
                             high[n].words[w + 1]);
              device::mma<T>(acc[block][n], weights[0].words[w], weights[1].words[w],
                             weights[0].words[w + 1], weights[1].words[w + 1], low[n].words[w],
                             low[n].words[w + 1]);
            }
          }
        }
      }
    }
    if (column < width) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        Y* row = o < 2 || work.count > 8 ? output_row(o) : nullptr;
        if (row != nullptr) {
          float delta[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            delta[i] = acc[i / 2][o / 2][i % 2 * 2 + o % 2];
            if constexpr (device::kNeedsScale<T>) {
              delta[i] *= device::scale_up(token_max[8 * (o / 2) + 2 * q + o % 2]);
            }
          }
          device::Outputs<Y> outputs;
          if constexpr (kVector) {
            outputs.load(staged_y + o * kFusedThreads * 8);
            outputs.add(delta);
            outputs.store(row + column);
          } else {
            outputs.load_scalars(row + column, width - column);
            outputs.add(delta);
            outputs.store_scalars(row + column, width - column);
          }
        }
      }
    }
  }
  if (pulled) {
    device::cluster_wait();
  }
#endif
}

// kGeneral: a tile finds out for itself whether its rows allow vector accesses, as it must where
// only the device knows the offsets and ranks (flat layouts); else the launcher has made sure that
// they do.
template <typename T, typename Y, int kRowBlocks, bool kDeep, bool kGeneral>
__global__ void __launch_bounds__(kFusedThreads,
                                  kGeneral ? 2 : FusedTraits<kRowBlocks, kDeep>::kMinBlocks)
    apply_fused_kernel(const __grid_constant__ FusedParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = threadIdx.x, g = thread % 32 / 4;
  int* token_ids = reinterpret_cast<int*>(shared);
  int* permutation = token_ids + 32;
  int* ranks = permutation + kCached;
  float* scalings = reinterpret_cast<float*>(ranks + kCached);
  const FusedSlice& slice = p.slices[blockIdx.y];

  device::grid_dependency_wait();
  device::grid_dependency_launch();
  // One round of loads instead of three: tile, then its tokens, rank and scaling, would each wait
  // for the one before.
  const Tile tile = p.tiles[blockIdx.x / p.cluster];
  const bool cached = p.max_tokens <= kCached && p.num_slots <= kCached;
  if (cached) {
    if (thread < p.max_tokens) {
      permutation[thread] = p.permutation[thread];
    }
    if (thread < p.num_slots) {
      ranks[thread] = p.ranks[thread];
      scalings[thread] = p.scalings[thread];
    }
  }
  if (tile.slot < 0) {
    return;  // the whole cluster alike
  }
  __syncthreads();
  FusedWork<T> work;
  work.member = blockIdx.x % p.cluster;
  work.count = tile.count;
  work.rank = min(cached ? ranks[tile.slot] : p.ranks[tile.slot], p.max_rank);
  work.scaling = cached ? scalings[tile.slot] : p.scalings[tile.slot];
  if (work.rank <= 0) {
    return;
  }
  work.first_column = slice.first_column;
  work.width = slice.width;
  const bool flat_a = kGeneral && p.a_offsets != nullptr,
             flat_b = kGeneral && p.b_offsets != nullptr;
  work.a_stride = slice.a_row_stride;
  work.b_stride = flat_b ? work.rank : slice.b_row_stride;
  work.a = static_cast<const T*>(slice.a) +
           (flat_a ? p.a_offsets[tile.slot] : tile.slot * slice.a_slot_stride) +
           (p.a_rows_by_rank ? static_cast<int>(blockIdx.y) * work.rank : 0) * work.a_stride;
  work.b = static_cast<const T*>(slice.b) +
           (flat_b ? p.b_offsets[tile.slot] : tile.slot * slice.b_slot_stride) +
           slice.b_first_row * work.b_stride;
  // A token past the end of x (a plan for more tokens than this call has) counts as absent.
  const auto token_of = [&](int i) {
    const int at = tile.start + i;
    const int id = i < tile.count ? (cached ? permutation[at] : p.permutation[at]) : -1;
    return id < p.num_tokens ? id : -1;
  };
  work.token0 = token_of(g);
  work.token1 = token_of(g + 8);
  if (thread < 16) {
    token_ids[thread] = token_of(thread);
    token_ids[16 + thread] = 0;
  }
  __syncthreads();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (fused_pushes(p.max_rank, p.cluster)) {
    device::cluster_arrive();  // waited for before the first push
  }
#endif
  if constexpr (!kGeneral) {
    fused_body<T, Y, kRowBlocks, kDeep, true>(p, work, shared);
  } else {
    constexpr int kChunk = FusedTraits<kRowBlocks, kDeep>::kChunk;
    const bool vector = p.vector_x_y && device::is_aligned(work.a, 16) && work.a_stride % 8 == 0 &&
                        device::is_aligned(work.b, 2 * kChunk) && work.b_stride % kChunk == 0;
    if (vector) {
      fused_body<T, Y, kRowBlocks, kDeep, true>(p, work, shared);
    } else {
      fused_body<T, Y, kRowBlocks, kDeep, false>(p, work, shared);
    }
  }
}

}  // namespace lora_ext::cuda

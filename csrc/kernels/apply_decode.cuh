// Shrink and expand for few tokens: two kernels, chained by programmatic dependent launch.
//
// The shrink splits each tile of up to 16 tokens of one slot into groups of rows of A (all slices'
// rows in one range) and parts of K; a CTA writes its partial products to a workspace. The expand
// splits it into 256 columns of y. It is resident while the shrink is at work, with its B and y
// already fetched; behind the wait it adds up the partial products, in the order of the parts, and
// multiplies. So all weights are on their way at once, and no CTA waits for a neighbour.
//
// In both products the weights are the 16-row operand of the mma and the tokens the 8-column one,
// so that a tile of one token wastes no weight bandwidth; every lane loads 16 bytes at a time, to
// where it needs them itself: no barrier stands between a load and its use. Weights are read once
// per tile, at their true rank. The order of every sum is fixed: same inputs, same bits.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/heuristics.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {

constexpr int kShrinkWarps = kDecodeWarps;
constexpr int kShrinkThreads = 32 * kShrinkWarps;
constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = 32 * kExpandWarps;
// Columns of y that a warp updates: 8 lanes of 16 bytes for each token.
constexpr int kUnitColumns = 64;
constexpr int kExpandColumns = kExpandWarps * kUnitColumns;

// The kernels' own parameters: the parameter bank is cold at every launch, and the arrays of
// ApplyParams would cost a dozen misses, a microsecond in all.
struct DecodeBatch {
  const int32_t* header;
  const Tile* tiles;
  const int32_t *permutation, *ranks;
  const float* scalings;
  float* partial;  // [tile][split][S * R][16 tokens]
  SplitLimits split_limits;
  int32_t tile_capacity, max_tokens, num_slots, num_tokens, max_rank, num_slices, in_features;
};
struct alignas(64) DecodeShrinkParams {
  DecodeBatch batch;
  const void* x;
  int64_t x_stride;
  const int64_t* a_offsets;   // flat layout, else null
  int32_t prefetch_features;  // of a CTA's part of K, before the wait
  bool one_range;             // row i * r + j of the first slice is row j of slice i
  bool vector_x;
  struct {
    const void* a;
    int64_t slot_stride, row_stride;
  } slices[kMaxSlices];
};
struct alignas(64) DecodeExpandParams {
  DecodeBatch batch;
  void* y;
  int64_t y_stride;
  const int64_t* b_offsets;  // flat layout, else null
  int32_t blocks_per_tile;
  bool vector_y;
  bool after_shrink;  // the kernel before is the shrink, which waited for all before it
  struct alignas(32) {
    const void* b;
    int64_t slot_stride, row_stride;
    int32_t first_column, width, first_row, blocks;
  } slices[kMaxSlices];
};

// Slice i of `b`, with y's pointer and stride already in `p`.
inline void add_slice(DecodeExpandParams& p, const Factor& b, const Slices& slices, int i) {
  auto& slice = p.slices[i];
  slice.b = b.base[i];
  slice.slot_stride = b.slot_stride[i];
  slice.row_stride = b.row_stride[i];
  slice.first_column = slices.offset[i];
  slice.width = slices.offset[i + 1] - slices.offset[i];
  slice.first_row = static_cast<int32_t>(b.first_row[i]);
  slice.blocks = (slice.width + kExpandColumns - 1) / kExpandColumns;
  p.blocks_per_tile += slice.blocks;
  p.vector_y = (i == 0 ? is_multiple(p.y, p.y_stride, 8, 16) : p.vector_y) &&
               slice.first_column % 8 == 0 && slice.width % 8 == 0;
}

// What a CTA must know before its first load of weights; `token` is that of entry lane % 16.
struct DecodeTile {
  int slot, start, count, rank, token;
};

// The parts of K follow from the tiles that there are, which the host does not know.
__device__ __forceinline__ int read_split_shift(const DecodeBatch& p) {
  return p.split_limits.shift(__ldcg(p.header + kNumTiles));
}

// `slot` and `start` say where to look, so that the tile, its rank and its tokens come in one round
// of loads instead of two; where they are wrong it reads again. Past L1, since the guess may have
// been read before the kernel that makes the plan was done.
__device__ __forceinline__ DecodeTile read_tile(const DecodeBatch& p, int tile, int slot,
                                                int start) {
  const int entry = threadIdx.x % kTileTokens;
  for (;;) {
    const int4 raw =
        __ldcg(reinterpret_cast<const int4*>(p.tiles + min(tile, p.tile_capacity - 1)));
    const int rank = __ldcg(p.ranks + min(max(slot, 0), p.num_slots - 1));
    const int token = __ldcg(p.permutation + min(max(start + entry, 0), p.max_tokens - 1));
    if (raw.x == slot && raw.y == start && tile < p.tile_capacity) {
      // A token past the end of x (a plan for more tokens than this call has) counts as absent.
      return {slot, start, raw.z, min(rank, p.max_rank),
              entry < raw.z && token < p.num_tokens ? token : -1};
    }
    if (raw.x < 0 || tile >= p.tile_capacity) {
      return {-1, 0, 0, 0, -1};
    }
    slot = raw.x, start = raw.y;
  }
}

// The shrink's first look, which finds its tile's slot, rank and tokens with nothing to go by:
// where the batch and the pool are small it reads all tokens and ranks beside the tiles that may be
// its own, one round of loads in place of three. Cold, as they are behind a base layer, each would
// take most of a microsecond. The barrier is every thread's, whatever it read.
__device__ __forceinline__ DecodeTile find_tile(const DecodeBatch& p, int& split_shift) {
  __shared__ int tokens[kShrinkThreads], ranks[kShrinkThreads];
  const int thread = threadIdx.x;
  if (p.max_tokens > kShrinkThreads || p.num_slots > kShrinkThreads) {
    split_shift = read_split_shift(p);
    return read_tile(p, blockIdx.x >> split_shift, 0, 0);
  }
  const int num_tiles = __ldcg(p.header + kNumTiles);
  int4 candidates[SplitLimits::kCount + 1];
#pragma unroll
  for (int shift = 0; shift <= SplitLimits::kCount; ++shift) {
    const int tile = min(static_cast<int>(blockIdx.x >> shift), p.tile_capacity - 1);
    candidates[shift] = __ldcg(reinterpret_cast<const int4*>(p.tiles + tile));
  }
  if (thread < p.max_tokens) {
    tokens[thread] = __ldcg(p.permutation + thread);
  }
  if (thread < p.num_slots) {
    ranks[thread] = __ldcg(p.ranks + thread);
  }
  __syncthreads();
  split_shift = p.split_limits.shift(num_tiles);
  int4 raw = candidates[0];
#pragma unroll
  for (int shift = 1; shift <= SplitLimits::kCount; ++shift) {
    raw = split_shift == shift ? candidates[shift] : raw;
  }
  if (raw.x < 0 || raw.x >= p.num_slots ||
      static_cast<int>(blockIdx.x >> split_shift) >= p.tile_capacity) {
    return {-1, 0, 0, 0, -1};
  }
  const int entry = thread % kTileTokens;
  const int token = tokens[min(max(raw.y + entry, 0), p.max_tokens - 1)];
  return {raw.x, raw.y, raw.z, min(ranks[raw.x], p.max_rank),
          entry < raw.z && token < p.num_tokens ? token : -1};
}

// Values k .. k + 8 of a row, those from `end` on as 0.
template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(device::Chunk<T, 8>& chunk, const T* row, int k, int end,
                                           bool exists) {
  if constexpr (kVector) {
    device::load_vector(chunk, row + k, exists && k < end);
  } else {
    device::load_scalars(chunk, row + k, exists ? end - k : 0);
  }
}

// kBlocks: blocks of 16 rows of A that a CTA computes.
template <int kBlocks>
struct DecodeShrinkTraits {
  static constexpr int kRows = 16 * kBlocks;
  // 32-wide K steps of a warp whose loads are in flight together: as many as registers hold.
  static constexpr int kSteps = kBlocks == 1 ? 5 : 3;
  static constexpr int kPartialStride = kTileTokens + 4;  // float2 stores hit distinct banks
  static constexpr int kSharedBytes = kShrinkWarps * kRows * kPartialStride * 4;
};

template <typename T>
__device__ __forceinline__ const T* shrink_row(const DecodeShrinkParams& p, int slot, int rank,
                                               int row) {
  const int slice = p.one_range ? 0 : row / rank;
  const auto& from = p.slices[slice];
  const int64_t start = p.a_offsets != nullptr ? p.a_offsets[slot] : slot * from.slot_stride;
  return static_cast<const T*>(from.a) + start + (row - slice * rank) * from.row_stride;
}

template <typename T, int kBlocks, bool kVector>
__device__ __forceinline__ void decode_shrink_body(const DecodeShrinkParams& p, const DecodeTile& t,
                                                   int split, int split_shift, float* shared) {
  using Traits = DecodeShrinkTraits<kBlocks>;
  constexpr int kSteps = Traits::kSteps, kRows = Traits::kRows;
  constexpr int kPartialStride = Traits::kPartialStride;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int rows = t.rank * p.batch.num_slices, first_row = blockIdx.y * kRows;

  const T* a_rows[2 * kBlocks];
  bool has_row[2 * kBlocks];
#pragma unroll
  for (int i = 0; i < 2 * kBlocks; ++i) {
    const int row = first_row + 8 * i + g;
    has_row[i] = row < rows;
    a_rows[i] = shrink_row<T>(p, t.slot, t.rank, has_row[i] ? row : 0);
  }
  const T* x_rows[2];
  bool has_token[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int token = __shfl_sync(0xffffffffu, t.token, 8 * n + g);
    has_token[n] = token >= 0;
    x_rows[n] = static_cast<const T*>(p.x) + max(token, 0) * p.x_stride;
  }

  // Neighbouring warps take neighbouring 64-byte pieces of the same rows, so that DRAM sees long
  // runs.
  const int steps = (p.batch.in_features + 31) / 32;
  const int end = steps * (split + 1) >> split_shift;
  const int k_end = min(32 * end, p.batch.in_features);
  float acc[kBlocks][2][4] = {};
  // The bound is the warp's, not the lane's: mma needs all lanes.
  for (int step = (steps * split >> split_shift) + warp; step < end;
       step += kShrinkWarps * kSteps) {
    device::Chunk<T, 8> weights[kSteps][2 * kBlocks], tokens[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = 32 * (step + s * kShrinkWarps) + 8 * q;
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        load_chunk<T, kVector>(weights[s][i], a_rows[i], k, k_end, has_row[i]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_chunk<T, kVector>(tokens[s][n], x_rows[n], k, k_end, has_token[n]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            if (n == 0 || t.count > 8) {
              device::mma<T>(acc[block][n], weights[s][2 * block].words[w],
                             weights[s][2 * block + 1].words[w], weights[s][2 * block].words[w + 1],
                             weights[s][2 * block + 1].words[w + 1], tokens[s][n].words[w],
                             tokens[s][n].words[w + 1]);
            }
          }
        }
      }
    }
  }

  // The warps' sums meet in shared memory, in fixed order.
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to =
            shared + (warp * kRows + 16 * block + 8 * h + g) * kPartialStride + 8 * n + 2 * q;
        *reinterpret_cast<float2*>(to) =
            make_float2(acc[block][n][2 * h], acc[block][n][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  const int64_t stride = int64_t{p.batch.num_slices} * p.batch.max_rank;
  float* out = p.batch.partial + (blockIdx.x * stride + first_row) * kTileTokens;
  const int used = min(rows - first_row, kRows);
#pragma unroll
  for (int i = thread; i < kRows * kTileTokens / 4; i += kShrinkThreads) {
    const int row = i / (kTileTokens / 4), token = i % (kTileTokens / 4) * 4;
    if (row < used && token < t.count) {
      const float* from = shared + row * kPartialStride + token;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int w = 1; w < kShrinkWarps; ++w) {
        const float4 next = *reinterpret_cast<const float4*>(from + w * kRows * kPartialStride);
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      *reinterpret_cast<float4*>(out + i * 4) = sum;
    }
  }
}

// kGeneral: a tile finds out for itself whether its rows allow vector accesses, as it must where
// only the device knows the offsets and ranks (flat layouts); else the launcher has made sure that
// they do.
template <typename T, int kBlocks, bool kGeneral>
__global__ void __launch_bounds__(kShrinkThreads, 2)
    decode_shrink_kernel(const __grid_constant__ DecodeShrinkParams p) {
  extern __shared__ __align__(128) float sums[];
  using Traits = DecodeShrinkTraits<kBlocks>;
  constexpr int kRows = Traits::kRows;
  // The kernel before this one may still be at work: what it writes must not be read, but what
  // will be read can be brought to L2. The plan may be among what it writes; as an address of a
  // prefetch, kept inside the tensors, the old one does no harm.
  const auto split_of = [](int shift) {
    return static_cast<int>(blockIdx.x & ((1u << shift) - 1));
  };
  int shift = 0;
  DecodeTile t = find_tile(p.batch, shift);
  if constexpr (!kGeneral) {
    if (t.slot >= 0 && t.slot < p.batch.num_slots) {
      const int steps = (p.batch.in_features + 31) / 32, split = split_of(shift);
      const int k = 32 * (steps * split >> shift);
      const int bytes = 2 * min(min(32 * (steps * (split + 1) >> shift), p.batch.in_features) - k,
                                p.prefetch_features);
      const int row = blockIdx.y * kRows + threadIdx.x;
      if (threadIdx.x < kRows && row < t.rank * p.batch.num_slices) {
        device::prefetch_l2(shrink_row<T>(p, t.slot, t.rank, row) + k, bytes);
      } else if (threadIdx.x >= kShrinkThreads - kTileTokens && t.token >= 0) {
        device::prefetch_l2(static_cast<const T*>(p.x) + t.token * p.x_stride + k, bytes);
      }
    }
  }
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  const int guess = shift;
  shift = read_split_shift(p.batch);
  t = read_tile(p.batch, blockIdx.x >> guess, t.slot, t.start);
  if (shift != guess) {
    t = read_tile(p.batch, blockIdx.x >> shift, 0, 0);
  }
  if (t.slot < 0 || blockIdx.y * kRows >= t.rank * p.batch.num_slices) {
    return;
  }
  bool vector = true;
  if constexpr (kGeneral) {
    vector = p.vector_x;
    for (int i = 0; i < p.batch.num_slices; ++i) {
      vector &= p.slices[i].row_stride % 8 == 0 &&
                device::is_aligned(shrink_row<T>(p, t.slot, t.rank, i * t.rank), 16);
    }
  }
  if (vector) {
    decode_shrink_body<T, kBlocks, true>(p, t, split_of(shift), shift, sums);
  } else if constexpr (kGeneral) {
    decode_shrink_body<T, kBlocks, false>(p, t, split_of(shift), shift, sums);
  }
}

// kChunk: neighbouring ranks of B that a lane holds, 4 for pools of rank up to 16, else 8.
template <typename Y, int kChunk>
struct DecodeExpandTraits {
  static constexpr int kSpan = 4 * kChunk;  // ranks of one step
  // Steps in shared memory: one in use, one on its way; pools of rank up to 16 have only one.
  static constexpr int kStages = kChunk == 4 ? 1 : 2;
  static constexpr int kStageBytes = kExpandThreads * 8 * kChunk * 2;
  static constexpr int kOutputBytes =
      kExpandThreads * (kTileTokens / 4) * 8 * static_cast<int>(sizeof(Y));
  static constexpr int kHeaderBytes = kTileTokens * 4;  // fp16: bits of each token's largest |xa|
  LORA_EXT_HOST_DEVICE static int xa_stride(int max_rank) {
    return (max_rank + kSpan - 1) / kSpan * kSpan + 8;
  }
  LORA_EXT_HOST_DEVICE static int shared_bytes(int max_rank) {
    return kHeaderBytes + kStages * kStageBytes + kOutputBytes +
           2 * kTileTokens * xa_stride(max_rank) * 2;
  }
};

// Where the expand has xa from: the partial products of a shrink, all that was yet to come when the
// kernel began.
struct PartialProducts {
  const float* first;  // [splits][...][rank][16 tokens]
  int stride;          // between splits
  int splits;
  const float* scaling_at;
  float scaling;

  __device__ __forceinline__ PartialProducts(const DecodeBatch& p, const DecodeTile& t, int tile,
                                             int slice)
      : stride(p.num_slices * p.max_rank * kTileTokens),
        splits(1 << read_split_shift(p)),
        scaling_at(p.scalings + t.slot) {
    first = p.partial + int64_t{tile} * splits * stride + slice * t.rank * kTileTokens;
  }

  __device__ __forceinline__ void wait() {
    device::grid_dependency_launch();
    device::grid_dependency_wait();
    scaling = __ldcg(scaling_at);
  }
  // Four tokens, from `token` on, of rank `row`.
  __device__ __forceinline__ float4 quad(int row, int token) const {
    float4 sum = make_float4(0, 0, 0, 0);
    const float* from = first + row * kTileTokens + token;
#pragma unroll 8
    for (int c = 0; c < splits; ++c) {
      const float4 next = __ldcg(reinterpret_cast<const float4*>(from));
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      from += stride;
    }
    return make_float4(sum.x * scaling, sum.y * scaling, sum.z * scaling, sum.w * scaling);
  }
};

template <typename T, typename Y, int kChunk, bool kVector, typename Source>
__device__ __forceinline__ void decode_expand_body(const DecodeExpandParams& p, const DecodeTile& t,
                                                   Source& xa, int slice, int block, const T* b,
                                                   int64_t b_stride, unsigned char* shared) {
  using Traits = DecodeExpandTraits<Y, kChunk>;
  constexpr int kSpan = Traits::kSpan, kStages = Traits::kStages;
  constexpr int kQuads = kTileTokens / 4;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int rank = t.rank, width = p.slices[slice].width;
  const int xa_stride = Traits::xa_stride(p.batch.max_rank);
  int* token_max = reinterpret_cast<int*>(shared);
  T* staged_b = reinterpret_cast<T*>(shared + Traits::kHeaderBytes) + thread * kChunk;
  Y* staged_y =
      reinterpret_cast<Y*>(shared + Traits::kHeaderBytes + kStages * Traits::kStageBytes) +
      thread * 8;
  T* xa_high = reinterpret_cast<T*>(shared + Traits::kHeaderBytes + kStages * Traits::kStageBytes +
                                    Traits::kOutputBytes);  // [16][xa_stride]
  T* xa_low = xa_high + kTileTokens * xa_stride;

  // Row m of the mma's 16 weight rows stands for column 8 g + i of the unit, so that a lane's
  // results of the four row blocks are eight neighbours in y.
  const int column = (block * kExpandWarps + warp) * kUnitColumns + 8 * g;
  const T* b_column = b + column * b_stride + q * kChunk;
  const auto stage_b = [&](int j) {
    const int valid = min(max(rank - j - q * kChunk, 0), kChunk);
    T* to = staged_b + j / kSpan % kStages * 8 * kExpandThreads * kChunk;
    const T* row = b_column + j;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kVector) {  // columns come in whole eights
        if (column < width) {
          if constexpr (kChunk == 8) {
            device::copy_async_16(to, row, 2 * valid);
          } else {
            device::copy_async_8(to, row, 2 * valid);
          }
        }
      } else {
        device::Chunk<T, kChunk> chunk;
        device::load_scalars(chunk, row, column + i < width ? valid : 0);
        *reinterpret_cast<device::Chunk<T, kChunk>*>(to) = chunk;
      }
      row += b_stride;
      to += kExpandThreads * kChunk;
    }
  };
  stage_b(0);
  // Output o of a lane: token 8 * (o / 2) + 2 q + o % 2 of the tile, eight columns.
  Y* outputs[4];
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    const int id = __shfl_sync(0xffffffffu, t.token, 8 * (o / 2) + 2 * q + o % 2);
    outputs[o] = id >= 0 && column < width ? static_cast<Y*>(p.y) + id * p.y_stride +
                                                 p.slices[slice].first_column + column
                                           : nullptr;
    if (kVector && outputs[o] != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
        device::copy_async_16(staged_y + o * kExpandThreads * 8 + i, outputs[o] + i, 16);
      }
    }
  }
  device::copy_async_commit();
  if (kStages > 1 && kSpan < rank) {
    stage_b(kSpan);
  }
  device::copy_async_commit();
  if (device::kNeedsScale<T> && thread < kTileTokens) {
    token_max[thread] = 0;
  }

  xa.wait();
  const auto quad = [&](int row, int token) {
    return row < rank && token < t.count ? xa.quad(row, token) : make_float4(0, 0, 0, 0);
  };
  if constexpr (device::kNeedsScale<T>) {
    __syncthreads();
    for (int i = thread; i < rank * kQuads; i += kExpandThreads) {
      const float4 sum = quad(i / kQuads, i % kQuads * 4);
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        atomicMax(token_max + i % kQuads * 4 + e, __float_as_int(fabsf(values[e])));
      }
    }
    __syncthreads();
  }
  const int padded = (rank + kSpan - 1) / kSpan * kSpan;
  for (int i = thread; i < padded * kQuads; i += kExpandThreads) {
    const int row = i / kQuads, token = i % kQuads * 4;
    const float4 sum = quad(row, token);
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

  float acc[4][2][4] = {};
  for (int j = 0; j < rank; j += kSpan) {
    device::copy_async_wait<1>();
    device::Chunk<T, kChunk> high[2], low[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int from = (8 * n + g) * xa_stride + j + q * kChunk;
      high[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_high + from);
      low[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_low + from);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      device::Chunk<T, kChunk> weights[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights[h] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
            staged_b + (j / kSpan % kStages * 8 + 2 * m + h) * kExpandThreads * kChunk);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (n == 0 || t.count > 8 * n) {
#pragma unroll
          for (int w = 0; w < kChunk / 2; w += 2) {
            device::mma<T>(acc[m][n], weights[0].words[w], weights[1].words[w],
                           weights[0].words[w + 1], weights[1].words[w + 1], high[n].words[w],
                           high[n].words[w + 1]);
            device::mma<T>(acc[m][n], weights[0].words[w], weights[1].words[w],
                           weights[0].words[w + 1], weights[1].words[w + 1], low[n].words[w],
                           low[n].words[w + 1]);
          }
        }
      }
    }
    if (j + kStages * kSpan < rank) {
      stage_b(j + kStages * kSpan);
    }
    device::copy_async_commit();
  }
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    if (outputs[o] == nullptr) {
      continue;
    }
    float delta[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta[i] = acc[i / 2][o / 2][i % 2 * 2 + o % 2];
      if constexpr (device::kNeedsScale<T>) {
        delta[i] *= device::scale_up(token_max[8 * (o / 2) + 2 * q + o % 2]);
      }
    }
    device::Outputs<Y> values;
    if constexpr (kVector) {
      values.load(staged_y + o * kExpandThreads * 8);
      values.add(delta);
      values.store(outputs[o]);
    } else {
      values.load_scalars(outputs[o], width - column);
      values.add(delta);
      values.store_scalars(outputs[o], width - column);
    }
  }
}

// To L2, as in the shrink, for a tile that may be another one by the time it is read.
template <typename T>
__device__ __forceinline__ void prefetch_b(const DecodeExpandParams& p, const DecodeTile& t,
                                           int slice, int block) {
  const auto& from = p.slices[slice];
  if (t.slot < 0 || t.slot >= p.batch.num_slots || p.b_offsets != nullptr) {
    return;
  }
  const T* b =
      static_cast<const T*>(from.b) + t.slot * from.slot_stride + from.first_row * from.row_stride;
  for (int i = threadIdx.x; i < kExpandColumns; i += kExpandThreads) {
    const int row = block * kExpandColumns + i;
    if (row < from.width && t.rank > 0) {
      device::prefetch_l2(b + row * from.row_stride, 2 * t.rank);
    }
  }
}

template <typename T, typename Y, int kChunk, bool kGeneral, typename Source>
__device__ __forceinline__ void decode_expand(const DecodeExpandParams& p, const DecodeTile& t,
                                              Source& xa, int slice, int block,
                                              unsigned char* shared) {
  const auto& from = p.slices[slice];
  const bool flat = kGeneral && p.b_offsets != nullptr;
  const int64_t b_stride = flat ? t.rank : from.row_stride;
  const T* b = static_cast<const T*>(from.b) +
               (flat ? p.b_offsets[t.slot] : t.slot * from.slot_stride) + from.first_row * b_stride;
  // kGeneral: a tile finds out for itself whether its rows allow vector accesses.
  if (!kGeneral || (p.vector_y && device::is_aligned(b, 2 * kChunk) && b_stride % kChunk == 0)) {
    decode_expand_body<T, Y, kChunk, true>(p, t, xa, slice, block, b, b_stride, shared);
  } else {
    decode_expand_body<T, Y, kChunk, false>(p, t, xa, slice, block, b, b_stride, shared);
  }
}

template <typename T, typename Y, int kChunk, bool kGeneral>
__global__ void __launch_bounds__(kExpandThreads, kChunk == 4 ? 6 : 4)
    decode_expand_kernel(const __grid_constant__ DecodeExpandParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int tile = blockIdx.x / p.blocks_per_tile;
  int slice = 0, block = blockIdx.x % p.blocks_per_tile;
  while (block >= p.slices[slice].blocks) {
    block -= p.slices[slice++].blocks;
  }
  DecodeTile t = read_tile(p.batch, tile, 0, 0);
  if (!p.after_shrink) {
    prefetch_b<T>(p, t, slice, block);
    device::grid_dependency_wait();
    t = read_tile(p.batch, tile, t.slot, t.start);
  }
  if (t.slot < 0 || t.rank <= 0) {
    return;
  }
  PartialProducts xa(p.batch, t, tile, slice);
  decode_expand<T, Y, kChunk, kGeneral>(p, t, xa, slice, block, shared);
}

}  // namespace lora_ext::cuda

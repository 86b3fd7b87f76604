// The decode expand: a CTA serves a tile and 256 columns of y (see decode_tile.cuh).
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/launch.cuh"
#include "kernels/output_span.cuh"

namespace lora_ext::cuda {

constexpr int kExpandWarps = 4;
constexpr int kExpandThreads = 32 * kExpandWarps;
// Columns of y that a warp updates: 8 lanes of 16 bytes for each token.
constexpr int kUnitColumns = 64;
constexpr int kExpandColumns = kExpandWarps * kUnitColumns;

struct alignas(64) DecodeExpandParams {
  DecodeBatch batch;
  void* y;
  int64_t y_stride;
  const int64_t* b_offsets;  // flat layout, else null
  int32_t blocks_per_tile;
  bool vector_y;
  bool after_shrink;   // the kernel before is the shrink, which waited for all before it
  bool launches_next;  // at once, not from where it waits
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
  static constexpr int kBatch = 16;  // loads that registers have room for

  const float* first;  // [pieces][...][rank][16 tokens]
  int stride;          // between pieces
  int pieces;
  const float* scaling_at;
  float scaling;

  // alike: known when this is compiled, where all tiles are cut alike.
  __device__ __forceinline__ PartialProducts(const DecodeBatch& p, const DecodeTile& t, int tile,
                                             int slice, int num_tiles, bool alike)
      : scaling_at(p.scalings + t.slot) {
    const TileCuts cuts = p.split_rules.cuts(num_tiles);
    const TileShares shares = tile_shares(p, t.rank, alike ? cuts.least : cuts.parts(tile));
    const int first_part = alike ? tile * cuts.least : cuts.first_part(tile);
    first = partial_products(p, first_part) + slice * t.rank * kTileTokens;
    stride = shares.stride, pieces = shares.pieces;
  }

  __device__ __forceinline__ void wait() {
    // Else the compiler leaves the divisions to where somebody waits for them.
    asm volatile("" : "+l"(first), "+r"(stride), "+r"(pieces));
    device::grid_dependency_launch();
    device::grid_dependency_wait();
    scaling = read_plan<true>(scaling_at);
  }
  // Four tokens each, from `token` on, of kCount ranks.
  template <int kCount>
  __device__ __forceinline__ void quads(const int (&rows)[kCount], int token,
                                        float4 (&sums)[kCount]) const {
    constexpr int kMost = kBatch / kCount;
    const float* from = first + token;
    for (int left = pieces; left > 0; left -= kMost, from += kMost * stride) {
      if (kMost > 8 && left > 8) {
        add<kMost>(rows, from, left, sums);
      } else if (kMost > 4 && left > 4) {
        add<8>(rows, from, left, sums);
      } else if (left > 1) {
        add<4>(rows, from, left, sums);
      } else {
        add<1>(rows, from, left, sums);
      }
    }
#pragma unroll
    for (auto& sum : sums) {
      sum = make_float4(sum.x * scaling, sum.y * scaling, sum.z * scaling, sum.w * scaling);
    }
  }
  // Up to kParts parts, all on their way at once; what is past the last one counts as 0.
  template <int kParts, int kCount>
  __device__ __forceinline__ void add(const int (&rows)[kCount], const float* from, int left,
                                      float4 (&sums)[kCount]) const {
    float4 parts[kParts][kCount];
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        parts[c][i] = __ldcg(reinterpret_cast<const float4*>(from + min(c, left - 1) * stride +
                                                             rows[i] * kTileTokens));
      }
    }
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        device::add_masked(sums[i], parts[c][i], (c - left) >> 31);
      }
    }
  }
};

// Leaves xa in shared memory twice, as the sum of two 16-bit halves, at(token, rank) from where
// they begin; ranks padded with 0 to whole steps of kSpan. fp16: scaled by what token_max, [16],
// says.
template <typename T, int kSpan, typename At>
__device__ __forceinline__ void split_xa(const PartialProducts& xa, const DecodeTile& t,
                                         int* token_max, T* high, T* low, const At& at) {
  const int thread = threadIdx.x;
  // The first one, two or four of a tile's quads of tokens: what is left out ends in columns of the
  // product that nobody reads.
  const int quads_log = (t.count > 4) + (t.count > 8), quads = 1 << quads_log;
  const int items = (t.rank + kSpan - 1) / kSpan * kSpan << quads_log;
  // The sums of kCount items, kExpandThreads from each other, to use(row, token, sum).
  const auto add_up = [&](auto count, int item, const auto& use) {
    constexpr int kCount = decltype(count)::value;
    const int token = (item & (quads - 1)) * 4;
    int rows[kCount], existing[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      rows[i] = (item + i * kExpandThreads) >> quads_log;
      existing[i] = min(rows[i], t.rank - 1);
    }
    float4 sums[kCount] = {};
    if (token < t.count) {
      xa.quads(existing, token, sums);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      use(rows[i], token, rows[i] < t.rank ? sums[i] : make_float4(0, 0, 0, 0));
    }
  };
  if constexpr (device::kNeedsScale<T>) {
    if (thread < kTileTokens) {
      token_max[thread] = 0;
    }
    __syncthreads();
    for (int i = thread; i < items; i += kExpandThreads) {
      add_up(std::integral_constant<int, 1>{}, i, [&](int, int token, const float4& sum) {
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          atomicMax(token_max + token + e, __float_as_int(fabsf(values[e])));
        }
      });
    }
    __syncthreads();
  }
  const auto store = [&](int row, int token, const float4& sum) {
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float scale = device::kNeedsScale<T> ? device::scale_down(token_max[token + e]) : 1.0f;
      const int to = at(token + e, row);
      device::split(values[e] * scale, high[to], low[to]);
    }
  };
  if constexpr (kSpan == 16) {  // ranks up to 16: no thread has two items
    if (thread < items) {
      add_up(std::integral_constant<int, 1>{}, thread, store);
    }
  } else {
    for (int i = thread; i < items; i += 2 * kExpandThreads) {
      if (i + kExpandThreads < items) {
        add_up(std::integral_constant<int, 2>{}, i, store);
      } else {
        add_up(std::integral_constant<int, 1>{}, i, store);
      }
    }
  }
  __syncthreads();
}

// A step of the product: weights as copied by the lane, the halves of xa from the step's first rank
// on. Products of one sum stand far apart: there are few warps to fill the time that one takes.
template <typename T, int kChunk>
__device__ __forceinline__ void multiply_step(float (&acc)[4][2][4], const T* staged, const T* high,
                                              const T* low, int stride, int count) {
  using Chunk = device::Chunk<T, kChunk>;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  Chunk weights[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weights[i] = *reinterpret_cast<const Chunk*>(staged + i * kExpandThreads * kChunk);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (n == 0 || count > 8) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk tokens = *reinterpret_cast<const Chunk*>((half == 0 ? high : low) +
                                                             (8 * n + g) * stride + q * kChunk);
#pragma unroll
        for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            device::mma<T>(acc[m][n], weights[2 * m].words[w], weights[2 * m + 1].words[w],
                           weights[2 * m].words[w + 1], weights[2 * m + 1].words[w + 1],
                           tokens.words[w], tokens.words[w + 1]);
          }
        }
      }
    }
  }
}

// kFollows: y comes with the partial products, not before.
template <typename T, typename Y, int kChunk, bool kVector, bool kFollows>
__device__ __forceinline__ void decode_expand_body(const DecodeExpandParams& p, const DecodeTile& t,
                                                   int tile, int slice, int block, int num_tiles,
                                                   const T* b, int64_t b_stride,
                                                   unsigned char* shared) {
  using Traits = DecodeExpandTraits<Y, kChunk>;
  constexpr int kSpan = Traits::kSpan, kStages = Traits::kStages;
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
            device::copy_async_8<true>(to, row, 2 * valid);
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
  const auto stage_y = [&](int o) {
    if (outputs[o] != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
        device::copy_async_16(staged_y + o * kExpandThreads * 8 + i, outputs[o] + i, 16);
      }
    }
  };
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    const int id = __shfl_sync(0xffffffffu, t.token, 8 * (o / 2) + 2 * q + o % 2);
    outputs[o] = id >= 0 && column < width ? static_cast<Y*>(p.y) + id * p.y_stride +
                                                 p.slices[slice].first_column + column
                                           : nullptr;
    if (kVector && !kFollows) {
      stage_y(o);
    }
  }
  device::copy_async_commit();
  if (kStages > 1 && kSpan < rank) {
    stage_b(kSpan);
  }
  if (!kFollows) {
    device::copy_async_commit();
  }
  PartialProducts xa(p.batch, t, tile, slice, num_tiles, kChunk == 4);
  xa.wait();
  if constexpr (kVector && kFollows) {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      stage_y(o);
    }
    device::copy_async_commit();
  }
  split_xa<T, kSpan>(xa, t, token_max, xa_high, xa_low,
                     [&](int token, int row) { return token * xa_stride + row; });

  float acc[4][2][4] = {};
  for (int j = 0; j < rank; j += kSpan) {
    device::copy_async_wait<1>();
    multiply_step<T, kChunk>(acc, staged_b + j / kSpan % kStages * 8 * kExpandThreads * kChunk,
                             xa_high + j, xa_low + j, xa_stride, t.count);
    if (j + kStages * kSpan < rank) {
      stage_b(j + kStages * kSpan);
    }
    device::copy_async_commit();
  }
  if (kFollows) {
    device::copy_async_wait<1>();  // y, which came behind the first step of B
  }
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    if (outputs[o] == nullptr) {
      continue;
    }
    float delta[8];
    const int row = 8 * (o / 2) + 2 * q + o % 2;
    lane_delta<T>(acc, o, device::kNeedsScale<T> ? device::scale_up(token_max[row]) : 1.0f, delta);
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

template <typename T, typename Y, int kChunk, bool kGeneral, bool kFollows>
__device__ __forceinline__ void decode_expand(const DecodeExpandParams& p, const DecodeTile& t,
                                              int tile, int slice, int block, int num_tiles,
                                              unsigned char* shared) {
  const auto& from = p.slices[slice];
  const bool flat = kGeneral && p.b_offsets != nullptr;
  const int64_t b_stride = flat ? t.rank : from.row_stride;
  const T* b = static_cast<const T*>(from.b) +
               (flat ? p.b_offsets[t.slot] : t.slot * from.slot_stride) + from.first_row * b_stride;
  // kGeneral: a tile finds out for itself whether its rows allow vector accesses.
  if (!kGeneral || (p.vector_y && device::is_aligned(b, 2 * kChunk) && b_stride % kChunk == 0)) {
    decode_expand_body<T, Y, kChunk, true, kFollows>(p, t, tile, slice, block, num_tiles, b,
                                                     b_stride, shared);
  } else {
    decode_expand_body<T, Y, kChunk, false, kFollows>(p, t, tile, slice, block, num_tiles, b,
                                                      b_stride, shared);
  }
}

template <typename T, typename Y, int kChunk, bool kGeneral, bool kFollows = false>
__global__ void __launch_bounds__(kExpandThreads, kChunk == 4 ? 5 : 4)
    decode_expand_kernel(const __grid_constant__ DecodeExpandParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int tile = blockIdx.x / p.blocks_per_tile;
  int slice = 0, block = blockIdx.x % p.blocks_per_tile;
  while (block >= p.slices[slice].blocks) {
    block -= p.slices[slice++].blocks;
  }
  if (p.launches_next) {
    device::grid_dependency_launch();
  }
  DecodeTile t;
  int num_tiles;
  if (p.after_shrink) {
    num_tiles = read_num_tiles(p.batch);
    t = read_tile<true>(p.batch, tile, 0, 0);
  } else {
    t = read_tile<false>(p.batch, tile, 0, 0);
    prefetch_b<T>(p, t, slice, block);
    device::grid_dependency_wait();
    num_tiles = read_num_tiles(p.batch);
    t = read_tile<true>(p.batch, tile, t.slot, t.start);
  }
  if (t.slot < 0 || t.rank <= 0) {
    if (kFollows && blockIdx.x == 0) {  // what comes next waits for this kernel, and for it alone
      device::grid_dependency_wait();
    }
    return;
  }
  decode_expand<T, Y, kChunk, kGeneral, kFollows>(p, t, tile, slice, block, num_tiles, shared);
}

}  // namespace lora_ext::cuda

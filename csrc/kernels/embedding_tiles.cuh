// y += scaling * A[ids] B^T for tiles of up to 64 tokens: what moves is y, or B.
//
// A CTA serves a tile and 128 columns, and asks for all that it needs at once; CTAs that wait at
// different places share a multiprocessor. The columns of A are the intermediate, 16 bits each and
// exact, so one product does where a shrink's sums take two; the scaling comes behind it. They come
// by copies to shared memory, too: ptxas would move loads to where their values are used, behind
// all that is waited for. y comes and goes by whole lines, through shared memory.
//
// Two ways to multiply. By mma.sync, the weights being its 16-row operand and the tokens its
// 8-column one; a lane holds neighbouring ranks of both. Or, on sm_90a, by wgmma with the tokens as
// 64 rows, which takes both from shared memory: for full tiles of ranks above 32, where products by
// mma.sync were a sixth of the time.
#pragma once

#include "common/wgmma.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/embedding_column.cuh"

namespace lora_ext::cuda {

constexpr int kEmbeddingWarps = kWideTileTokens / kTileTokens;
constexpr int kEmbeddingThreads = 32 * kEmbeddingWarps;
constexpr int kEmbeddingColumns = 128;
constexpr int kEmbeddingSpan = 64;  // columns of y whose lines a warp moves together
constexpr int kEmbeddingSpans = kEmbeddingColumns / kEmbeddingSpan;

// kSteps: of 16 ranks, a multiple of 4 for wgmma.
template <int kSteps_, bool kWgmma_>
struct EmbeddingTraits {
  static constexpr int kSteps = kSteps_;
  static constexpr bool kWgmma = kWgmma_;
  static constexpr int kChunk = kSteps <= 2 ? 4 : 8;  // neighbouring ranks that a lane holds
  static constexpr int kParts = 16 * kSteps / (4 * kChunk);
  static constexpr int kRowBytes = 32 * kSteps;
  // Without wgmma: rows of lanes that read together are eight apart; what is between keeps them off
  // each other's banks.
  static constexpr int kGroupBytes = 8 * kRowBytes + (kWgmma ? 0 : 8 * kChunk);
  static constexpr int kWeightBytes = kEmbeddingColumns / 8 * kGroupBytes;
  static constexpr int kTokensAt = kWeightBytes;
  static constexpr int kOutputsAt = kTokensAt + kWideTileTokens * kRowBytes;
  static constexpr int kSpanBytes = kTileTokens * kEmbeddingSpan * 2;  // of a warp
  static constexpr int kIdsAt = kOutputsAt + kEmbeddingWarps * kEmbeddingSpans * kSpanBytes;
  static constexpr int kScalingsAt = kIdsAt + kWideTileTokens * 8;
  static constexpr int kSharedBytes = kScalingsAt + kEmbeddingWarps * 4;

  // Where chunk `chunk`, of eight ranks, of the weights of a column lies. With wgmma, column
  // 8 g + 2 b + h of a span is row g + 8 h of its block b, so that a lane's sums are eight
  // neighbours in y.
  __device__ static int weight_at(int column, int chunk) {
    if constexpr (kWgmma) {
      const int row = column / 64 * 64 + column % 8 / 2 * 16 + column % 2 * 8 + column % 64 / 8;
      return chunk / 8 * kEmbeddingColumns * 128 + row * 128 + (chunk % 8 ^ row % 8) * 16;
    } else {
      return column / 8 * kGroupBytes + column % 8 * kRowBytes + chunk * 16;
    }
  }
  // The same of a token, for wgmma.
  __device__ static int token_at(int token, int chunk) {
    return chunk / 8 * kWideTileTokens * 128 + token * 128 + (chunk % 8 ^ token % 8) * 16;
  }
  // Where a chunk of y lies in a span: neither whole rows nor fragments meet in a bank.
  __device__ static int output_at(int row, int chunk) {
    return row * kEmbeddingSpan * 2 + (chunk ^ row % 8) * 16;
  }
};

// A tile, and what a warp's lanes need to know of it.
struct EmbeddingTile {
  int slot, start, count, rank;
  int token;  // of entry lane % 16 of the warp's 16; -1: none

  // With up to 16 or 32 tokens the warps of the same ones share the columns,
  // but with wgmma, where each has a row of 16 of its own.
  template <bool kWgmma>
  __device__ __forceinline__ int groups_log() const {
    return kWgmma ? 2 : (count > kTileTokens) + (count > 2 * kTileTokens);
  }
  template <bool kWgmma>
  __device__ __forceinline__ int first() const {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return (warp & ((1 << groups_log<kWgmma>()) - 1)) * kTileTokens;
  }
  // True if it is the tile that it was.
  template <bool kFinal>
  __device__ __forceinline__ bool read(const EmbeddingJob& p, int index) {
    const int4 raw = read_plan<kFinal>(reinterpret_cast<const int4*>(p.tiles + index));
    const bool same = raw.x == slot && raw.y == start && raw.z == count;
    slot = raw.x, start = raw.y, count = raw.z;
    return same;
  }
  // Inside the plan, whatever the tile says.
  template <bool kWgmma>
  __device__ __forceinline__ void read_tokens(const EmbeddingJob& p) {
    const int entry = first<kWgmma>() + static_cast<int>(threadIdx.x) % kTileTokens;
    rank = min(read_plan<true>(p.ranks + min(max(slot, 0), p.num_slots - 1)), p.max_rank);
    const int id = read_plan<true>(p.permutation + min(max(start + entry, 0), p.max_tokens - 1));
    // A plan may be for more tokens than this call has.
    token = entry < count && id < p.num_tokens ? id : -1;
  }
};

// The ids of a warp's tokens, on their way to shared memory: one word each, or two.
__device__ __forceinline__ void copy_ids(const EmbeddingJob& p, int token, int2* ids) {
  const int lane = threadIdx.x % 32;
  if (lane < kTileTokens && token >= 0) {
    if (p.ids == nullptr) {
      ids[lane] = make_int2(token, 0);
    } else {
      const int words = p.ids_are_int64 ? 2 : 1;
      const int32_t* from = static_cast<const int32_t*>(p.ids) + int64_t{words} * token;
      device::copy_async_4(&ids[lane].x, from);
      device::copy_async_4(&ids[lane].y, from + words - 1);
    }
  }
}

// y += scaling * delta for the eight columns of chunk `chunk` of a row of a span.
template <typename T, typename Traits>
__device__ __forceinline__ void add_outputs(unsigned char* span, int row, int chunk, float scaling,
                                            float (&delta)[8]) {
#pragma unroll
  for (float& value : delta) {
    value *= scaling;
  }
  T* const at = reinterpret_cast<T*>(span + Traits::output_at(row, chunk));
  device::Outputs<T> values;
  values.load(at);
  values.add(delta);
  values.store(at);
}

// A chunk by one access: it alone does not say how it is aligned.
template <typename T, int kChunk>
__device__ __forceinline__ device::Chunk<T, kChunk> read_chunk(const void* from) {
  device::Chunk<T, kChunk> chunk;
  if constexpr (kChunk == 8) {
    const uint4 raw = *static_cast<const uint4*>(from);
    chunk.words[0] = raw.x, chunk.words[1] = raw.y, chunk.words[2] = raw.z, chunk.words[3] = raw.w;
  } else {
    const uint2 raw = *static_cast<const uint2*>(from);
    chunk.words[0] = raw.x, chunk.words[1] = raw.y;
  }
  return chunk;
}

// By mma.sync: the warp's tokens and one span of columns.
template <typename T, typename Traits>
__device__ __forceinline__ void multiply_span(const EmbeddingTile& tile, int span, float scaling,
                                              const unsigned char* shared, unsigned char* outputs) {
  constexpr int kChunk = Traits::kChunk, kParts = Traits::kParts;
  using Chunk = device::Chunk<T, kChunk>;
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const auto* const own_tokens =
      reinterpret_cast<const Chunk*>(shared + Traits::kTokensAt) + threadIdx.x;
  const unsigned char* const weights_at =
      shared + Traits::weight_at(span * kEmbeddingSpan + 8 * g, 0) + q * kChunk * 2;
  const bool both = tile.template first<false>() + 8 < tile.count;
  float acc[4][2][4] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    Chunk tokens[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      tokens[n] = read_chunk<T, kChunk>(own_tokens + (n * kParts + part) * kEmbeddingThreads);
    }
    // Products of one sum far apart, since each waits for the one before, as far as registers
    // allow.
    constexpr int kAtOnce = kChunk == 4 ? 4 : 2;
#pragma unroll
    for (int b0 = 0; b0 < 4; b0 += kAtOnce) {
      Chunk weights[2 * kAtOnce];
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        weights[i] = read_chunk<T, kChunk>(weights_at + (2 * b0 + i) * Traits::kRowBytes +
                                           4 * part * kChunk * 2);
      }
#pragma unroll
      for (int w = 0; w < kChunk / 2; w += 2) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int b = 0; b < kAtOnce; ++b) {
            if (n == 0 || both) {
              device::mma<T>(acc[b0 + b][n], weights[2 * b].words[w], weights[2 * b + 1].words[w],
                             weights[2 * b].words[w + 1], weights[2 * b + 1].words[w + 1],
                             tokens[n].words[w], tokens[n].words[w + 1]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    float delta[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta[i] = acc[i / 2][o / 2][i % 2 * 2 + o % 2];
    }
    add_outputs<T, Traits>(outputs, 8 * (o / 2) + 2 * q + o % 2, g, scaling, delta);
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// By wgmma: all tokens and one span of columns.
template <typename T, typename Traits>
__device__ __forceinline__ void multiply_span(int span, float scaling, const unsigned char* shared,
                                              unsigned char* outputs) {
  constexpr int kBlocks = Traits::kRowBytes / 128;  // of 64 ranks
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const uint64_t weights = device::swizzled_tile(shared + span * kEmbeddingSpan * 128);
  const uint64_t tokens = device::swizzled_tile(shared + Traits::kTokensAt);
  float sums[kEmbeddingSpan / 2] = {};
  device::wgmma_fence();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      device::wgmma<T, kEmbeddingSpan>(sums, tokens + block * (kWideTileTokens * 8) + 2 * kk,
                                       weights + block * (kEmbeddingColumns * 8) + 2 * kk);
    }
  }
  device::wgmma_commit();
  device::wgmma_wait<0>();
  // sums[4 n + 2 h + e] is of token 8 h + g of the warp's, of column 16 q + 8 e + n.
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    float delta[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      delta[i] = sums[4 * i + o];
    }
    add_outputs<T, Traits>(outputs, 8 * (o / 2) + g, 2 * q + o % 2, scaling, delta);
  }
}
#endif

template <typename T, typename Traits>
__device__ __forceinline__ void embedding_tile(const EmbeddingJob& p, const EmbeddingTile& tile,
                                               int first_column, unsigned char* shared) {
  constexpr bool kWgmma = Traits::kWgmma;
  constexpr int kSteps = Traits::kSteps;
  constexpr int kSpans = kEmbeddingSpans;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int rank = tile.rank, first = tile.template first<kWgmma>();
  int2* const ids = reinterpret_cast<int2*>(shared + Traits::kIdsAt) + warp * kTileTokens;
  float* const own_scaling = reinterpret_cast<float*>(shared + Traits::kScalingsAt) + warp;
  copy_ids(p, tile.token, ids);
  device::copy_async_commit();
  if (lane == 0) {
    device::copy_async_4(own_scaling, p.scalings + tile.slot);
  }
  // y of the spans that the warp takes.
  const int groups_log = tile.template groups_log<kWgmma>();
  const int sharers = kEmbeddingWarps >> groups_log, sharer = warp >> groups_log;
  const int row_chunk = lane % 8, row_of_copy = lane / 8;
  unsigned char* const spans = shared + Traits::kOutputsAt + warp * kSpans * Traits::kSpanBytes;
  int row_tokens[kTileTokens / 4];
#pragma unroll
  for (int i = 0; i < kTileTokens / 4; ++i) {
    row_tokens[i] = __shfl_sync(0xffffffffu, tile.token, 4 * i + row_of_copy);
  }
  const auto row_of = [&](int i) {
    return static_cast<T*>(p.y) + row_tokens[i] * p.y_stride + first_column + 8 * row_chunk;
  };
  const auto has_chunk = [&](int span) {
    return first_column + span * kEmbeddingSpan + 8 * row_chunk < p.columns;
  };
#pragma unroll
  for (int i = 0; i < kTileTokens / 4; ++i) {
    const T* const from = row_of(i);
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      if (row_tokens[i] >= 0 && (span & (sharers - 1)) == sharer && has_chunk(span)) {
        device::copy_async_16(
            spans + span * Traits::kSpanBytes + Traits::output_at(4 * i + row_of_copy, row_chunk),
            from + span * kEmbeddingSpan, 16);
      }
    }
  }
  {
    constexpr int kChunks = 2 * kSteps, kRows = kEmbeddingThreads / kChunks;  // at once
    const int chunk = thread % kChunks, row = thread / kChunks;
    const int bytes = 2 * min(max(rank - 8 * chunk, 0), 8);
    const T* from = static_cast<const T*>(p.b) + tile.slot * p.b_slot_stride +
                    (first_column + row) * p.b_row_stride + 8 * chunk;
#pragma unroll
    for (int i = 0; i < kEmbeddingColumns; i += kRows) {
      device::copy_async_16(
          shared + (kWgmma ? Traits::weight_at(row + i, chunk)
                           : Traits::weight_at(row, chunk) + Traits::weight_at(i, 0)),
          from, first_column + row + i < p.columns ? bytes : 0);
      from += kRows * p.b_row_stride;
    }
  }
  device::copy_async_commit();
  device::copy_async_wait<1>();  // the ids
  __syncwarp();
  if (p.ids == nullptr) {
    device::grid_dependency_wait();  // the gathered columns are all that was yet to come
  }
  const int2 words = ids[lane % kTileTokens];
  const int64_t id =
      p.ids_are_int64 ? int64_t{words.y} << 32 | static_cast<uint32_t>(words.x) : words.x;
  const Column<T> column = find_column<T>(p, id, tile.slot);
  const auto own_address = reinterpret_cast<unsigned long long>(column.first);
  const unsigned long long address = tile.token >= 0 ? own_address : 0;
  const auto column_of = [&](int entry) {
    return Column<T>{reinterpret_cast<const T*>(__shfl_sync(0xffffffffu, address, entry)), 1};
  };
  if constexpr (kWgmma) {
#pragma unroll
    for (int i = 0; i < kTileTokens / 4; ++i) {
      const Column<T> of_row = column_of(4 * i + row_of_copy);
#pragma unroll
      for (int chunk = 0; chunk < 2 * kSteps; chunk += 8) {
        of_row.copy_async(reinterpret_cast<device::Chunk<T, 8>*>(
                              shared + Traits::kTokensAt +
                              Traits::token_at(first + 4 * i + row_of_copy, chunk + row_chunk)),
                          8 * (chunk + row_chunk), rank);
      }
    }
  } else {
    using Chunk = device::Chunk<T, Traits::kChunk>;
    Chunk* const own_tokens = reinterpret_cast<Chunk*>(shared + Traits::kTokensAt) + thread;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Column<T> of_fragment = column_of(8 * n + g);
#pragma unroll
      for (int part = 0; part < Traits::kParts; ++part) {
        of_fragment.copy_async(own_tokens + (n * Traits::kParts + part) * kEmbeddingThreads,
                               (4 * part + q) * Traits::kChunk, rank);
      }
    }
  }
  device::copy_async_commit();
  device::copy_async_wait<0>();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (kWgmma) {
    device::fence_shared_for_products();
  }
#endif
  __syncthreads();
  const float scaling = *own_scaling;
  const auto store_span = [&](int span) {
    __syncwarp();
    if (has_chunk(span)) {
#pragma unroll
      for (int i = 0; i < kTileTokens / 4; ++i) {
        if (row_tokens[i] >= 0) {
          *reinterpret_cast<uint4*>(row_of(i) + span * kEmbeddingSpan) =
              *reinterpret_cast<const uint4*>(spans + span * Traits::kSpanBytes +
                                              Traits::output_at(4 * i + row_of_copy, row_chunk));
        }
      }
    }
  };
#pragma unroll 1
  for (int span = sharer; span < kSpans; span += sharers) {
    if (first_column + span * kEmbeddingSpan >= p.columns) {
      break;
    }
    unsigned char* const outputs = spans + span * Traits::kSpanBytes;
    if constexpr (kWgmma) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
      multiply_span<T, Traits>(span, scaling, shared, outputs);  // by all warps together
#endif
    } else if (first < tile.count) {
      multiply_span<T, Traits>(tile, span, scaling, shared, outputs);
    }
    store_span(span);
  }
}

// kBlocks: that have room on an SM.
template <typename T, int kSteps, bool kWgmma, int kBlocks>
__global__ void __launch_bounds__(kEmbeddingThreads, kBlocks)
    embedding_tiles_kernel(const __grid_constant__ EmbeddingJob p) {
  using Traits = EmbeddingTraits<kSteps, kWgmma>;
  extern __shared__ __align__(1024) unsigned char shared[];
  EmbeddingTile tile{-1, 0, 0, 0, -1};
  if (p.looks_ahead) {  // at a tile that may be another one by the time it is read; B comes to L2
    tile.read<false>(p, static_cast<int>(blockIdx.x) / p.blocks);
    const int row = static_cast<int>(blockIdx.x) % p.blocks * kEmbeddingColumns + threadIdx.x;
    static_assert(kEmbeddingColumns == kEmbeddingThreads);
    prefetch_row<T, 16 * kSteps>(p, tile.slot, row);
  }
  if (p.ids != nullptr) {
    device::grid_dependency_wait();
  }
  device::grid_dependency_launch();
#pragma unroll 1
  for (int item = blockIdx.x; item < p.groups * p.blocks; item += gridDim.x) {
    const int index = static_cast<unsigned>(item) / static_cast<unsigned>(p.blocks);
    const int first_column = (item - index * p.blocks) * kEmbeddingColumns;
    const bool guess = p.looks_ahead && tile.slot >= 0;
    if (guess) {  // all in one trip, if the tile is what it was
      tile.template read_tokens<kWgmma>(p);
    }
    if (!tile.read<true>(p, index) || !guess) {
      tile.template read_tokens<kWgmma>(p);
    }
    if (tile.slot < 0) {
      break;
    }
    if (tile.rank > 0) {
      embedding_tile<T, Traits>(p, tile, first_column, shared);
    }
    __syncthreads();  // the next tile fills all of it again
  }
  // Who waits for this kernel counts on the gather before it too, which has written its room even
  // where nobody here has read it.
  device::grid_dependency_wait();
}

}  // namespace lora_ext::cuda

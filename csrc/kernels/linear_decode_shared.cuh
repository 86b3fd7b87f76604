// What the two halves of linear_decode know of each other: parameters, shared memory, barriers, and
// a CTA's share of W.
#pragma once

#include <cstddef>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/linear_heuristics.h"

namespace lora_ext::cuda {

constexpr int kFinishThreads = 128;

struct alignas(64) LinearDecodeParams {
  const void *x, *weight, *bias;  // bias: or null
  void* y;
  int64_t x_stride, weight_stride, y_stride;
  int32_t out_features;
  bool pairs;     // y allows stores of two neighbours
  bool vector_b;  // rows of B allow accesses of 16 bytes
  DecodeBatch batch;
  const int64_t* b_offsets;  // flat layout, else null
  struct alignas(32) {
    const void* b;
    int64_t slot_stride, row_stride;
    int32_t first_column, end_column, first_row;
  } slices[kMaxSlices];
};

// kTiles: blocks of 16 rows of W in a pass. kBlocks: blocks of 8 tokens. kLanes: lanes that copy a
// row of B, 2, 4 or 8, 8 ranks each.
template <int kTiles_, int kBlocks_, int kLanes_, int kRingBytes, int kRingBytesB>
struct LinearDecodeTraits {
  static constexpr int kLanes = kLanes_, kRanks = 8 * kLanes;  // ranks: of a step
  static constexpr int kChunksB = 4;                           // that a lane copies of B for a step
  static constexpr int kRowChunks = kLanes / 2;                // of them for 16 rows of one adapter
  static constexpr int kGroup = kChunksB / kRowChunks;         // tiles of the plan in a step
  static constexpr int kStagesB = kRingBytesB / (kChunksB * kFinishThreads * 16);
  static constexpr int kTiles = kTiles_, kBlocks = kBlocks_, kTokens = 8 * kBlocks;
  static constexpr int kWarps = 4, kStreamThreads = 32 * kWarps;  // of the stream
  static constexpr int kThreads = kStreamThreads + kFinishThreads;
  static constexpr int kStep = 32 * kWarps;             // values of K that the warps take together
  static constexpr int kChunks = kBlocks + 2 * kTiles;  // that a lane copies for a step
  static constexpr int kSlotBytes = kStreamThreads * 16, kStageBytes = kChunks * kSlotBytes;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static_assert(kStages >= 2);
  static constexpr int kBuffers = 2;         // of the sums
  static constexpr int kSumStride = 20;      // stores of a warp hit distinct banks
  static constexpr int kRows = 16 * kTiles;  // of W, of a pass

  struct Shared {
    unsigned char ring[kStages * kStageBytes];
    unsigned char ring_b[kStagesB][kChunksB][kFinishThreads][16];
    float sums[kBuffers][kTiles][kWarps][kTokens][kSumStride];
    float delta[kTokens][kRows];
    int place[kTokens];  // of each token: tile * 16 + entry; -1: no adapter
    // Of each tile of the plan that has a rank; behind the last one, rank and count are 0.
    int64_t start_b[kTokens];  // where B starts in a flat buffer
    int number[kTokens], slot[kTokens], rank[kTokens], first[kTokens], count[kTokens];
    float scaling[kTokens];
    alignas(16) int token[kTokens][kTileTokens];  // -1: none
    int tiles;
    alignas(16) float xa[1];  // [kTokens][slice][xa_slice], see linear_ranks.cuh
  };
  static_assert(offsetof(Shared, sums) % 16 == 0 && offsetof(Shared, delta) % 16 == 0);
  // Of xa, in values, between two tokens: whose stores of one rank hit distinct banks.
  LORA_EXT_HOST_DEVICE static int xa_stride(const DecodeBatch& batch) {
    return batch.num_slices * xa_slice(batch.max_rank) + 4;
  }
  static int shared_bytes(const DecodeBatch& batch) {
    return static_cast<int>(offsetof(Shared, xa)) + kTokens * xa_stride(batch) * 4;
  }
};

// Barriers of the CTA; 0 is __syncthreads'.
enum LinearBarrier : int { kFinishers = 1, kSumsFull = 2, kSumsFree = 4 };

// The blocks of 16 rows of W that a CTA computes, and in how many passes.
struct LinearShare {
  int first, count, passes;

  __device__ __forceinline__ LinearShare(int out_features, int most) {
    const int64_t tiles = (out_features + 15) / 16;
    first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
    count = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x) - first;
    passes = (count + most - 1) / most;
  }
  __device__ __forceinline__ int tile(int pass) const { return first + count * pass / passes; }
};

}  // namespace lora_ext::cuda

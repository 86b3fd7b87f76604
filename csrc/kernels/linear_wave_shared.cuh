// What the kernels of linear_wave know of each other: parameters, shared memory, a CTA's rows.
#pragma once

#include <cuda.h>

#include "common/ptx.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/linear_heuristics.h"
#include "kernels/tensor_map.h"

namespace lora_ext::cuda {

constexpr int kWaveThreads = 256;  // more would leave no registers for so many sums
constexpr int kWaveStepSlots = kBoxColumns / (2 * kLinearWaveRank);  // adapters of a step of K
constexpr int kWaveSteps = (kLinearWaveMaxSlots + kWaveStepSlots - 1) / kWaveStepSlots;

// xa as more columns of x: boxes of [tokens][kBoxColumns] as the copies leave those of x in shared
// memory, kWaveSteps of each slice. Of each slot in the batch kLinearWaveRank columns have the
// upper halves of its own tokens' xa, as many more what they lack; both are zeros for other tokens.
template <int kTokens>
struct WaveXa {
  static constexpr int kBytes = kTokens * kBoxColumns * 2;  // of a box
  static_assert(kBoxColumns == 64);                         // the swizzle of 128 bytes

  LORA_EXT_HOST_DEVICE static int64_t box(int slice, int step) {
    return int64_t{slice * kWaveSteps + step} * kBytes;
  }
  // Rank j of a token for the slot that is the `entry`-th, bf16; `half`: 0 or 1.
  LORA_EXT_HOST_DEVICE static int64_t at(int slice, int entry, int token, int half, int j) {
    const int column = (entry % kWaveStepSlots * 2 + half) * kLinearWaveRank + j;
    return box(slice, entry / kWaveStepSlots) + token * 128 +
           ((column / 8 ^ token % 8) * 8 + column % 8) * 2;
  }
};

// The slots that have both tokens and a rank, in the order of the plan's tiles.
struct WaveEntries {
  int32_t count;
  struct {
    int32_t slot, rank;
  } of[kLinearWaveMaxSlots];
};

struct alignas(64) LinearWaveParams {
  const unsigned char* xa;  // WaveXa
  const WaveEntries* entries;
  const int32_t* token_slots;
  const void* bias;  // or null
  void* y;
  int64_t y_stride;
  int32_t out_features, in_features, num_tokens, num_slices;
  struct {
    const void* b;  // rows of kLinearWaveRank values, one behind the other
    int64_t slot_stride;
    int32_t first_column, end_column, first_row;
  } slices[kMaxSlices];
};

struct WaveMaps {
  CUtensorMap weight, x;
};

// A step of the adapters in a CTA's rows.
struct WaveAdapterStep {
  const unsigned char* xa;
  const char* b[kWaveStepSlots];           // as it lies in memory
  int first_row, end_row;                  // of the CTA's, that B has
  int count, first, rank[kWaveStepSlots];  // of entries; of those that are not there rank 0
};

// kStages: steps of K in the ring.
template <int kTokens_, int kStages_>
struct LinearWaveTraits {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kBlocks = kTokens / 128;  // of 64 tokens, of a warpgroup
  static constexpr int kWeightBytes = kLinearWaveRows * kBoxColumns * 2;
  static constexpr int kTokenBytes = WaveXa<kTokens>::kBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // B of a slot, twice: fp16 becomes two values of bf16.
  static constexpr int kHalfBytes = kLinearWaveRows * kLinearWaveRank * 2;
  static constexpr int kSlotBytes = 2 * kHalfBytes;
  static_assert(kWaveStepSlots * kSlotBytes <= kWeightBytes);
  static constexpr int kRowBytes = 2 * kLinearWaveRows + 16;  // of a token's results: other banks
  static_assert(kWaveThreads / 32 * 16 * kRowBytes <= kStages * kStageBytes);
  static constexpr int kAlignment = 1024;
  struct Shared {
    unsigned char ring[kStages * kStageBytes];  // of W, then x
    uint64_t full[kStages];
    unsigned used[kStages];  // warps that are done with it
    WaveEntries entries;
    WaveAdapterStep adapters[kMaxSlices * kWaveSteps];
    int steps;          // of the products, those of the adapters too
    uint32_t poisoned;  // entries whose B has something that is not finite in the CTA's rows
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + kAlignment;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kWaveBound = kWaveThreads;
#else
constexpr int kWaveBound = 32;  // tells the launcher that the kernel is empty here
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Rows of W that a CTA has.
struct WaveRows {
  int first, end;

  __device__ __forceinline__ explicit WaveRows(const LinearWaveParams& p)
      : first(static_cast<int>(blockIdx.x) * kLinearWaveRows),
        end(min(first + kLinearWaveRows, p.out_features)) {}
  // Those of a slice, from the CTA's first on; none: x >= y.
  __device__ __forceinline__ int2 of(const LinearWaveParams& p, int slice) const {
    return make_int2(max(p.slices[slice].first_column - first, 0),
                     min(end, p.slices[slice].end_column) - first);
  }
};

// Where a thread is in the ring.
template <int kStages>
struct RingPlace {
  int index = 0;
  uint32_t turn = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0, turn ^= 1;
    }
  }
};
#endif

}  // namespace lora_ext::cuda

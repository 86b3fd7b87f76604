// What the warps of linear_wgmma know of each other: parameters, shared memory, and a CTA's part of
// the work.
#pragma once

#include <cuda.h>

#include "common/ptx.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/linear_heuristics.h"
#include "kernels/tensor_map.h"

namespace lora_ext::cuda {

constexpr int kLinearConsumers = 256, kLinearHelpers = 96;
constexpr int kLinearWgmmaThreads = kLinearConsumers + 32 + kLinearHelpers;

// Barriers of the CTA; 0 is everybody's.
constexpr int kHelpers = 1;

struct LinearMaps {
  CUtensorMap weight, x;
};

struct alignas(64) LinearWgmmaParams {
  DecodeBatch batch;
  const void* bias;  // or null
  void* y;
  int64_t y_stride;
  int32_t out_features;
  bool pairs;  // y allows stores of two neighbours
  struct {
    const void* b;  // rows of max_rank values, one behind the other
    int64_t slot_stride;
    int32_t first_column, end_column, first_row;
  } slices[kMaxSlices];
};

template <int kTokens_, int kStages_>
struct LinearWgmmaTraits {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kWeightBytes = kLinearTileRows * kBoxColumns * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kBoxColumns * 2;
  static constexpr int kGroups = kTokens / 8;
  // B of a tile in the ring: of as many slots as W's part of a stage has room for.
  static_assert(kWeightBytes >= 2 * kLinearTileRows * kLinearWgmmaMaxRank);
  LORA_EXT_HOST_DEVICE static int slot_bytes(int max_rank) {
    return 2 * kLinearTileRows * max_rank;
  }
  LORA_EXT_HOST_DEVICE static int slots(int max_rank) {
    return kWeightBytes / slot_bytes(max_rank);
  }
  static constexpr int kAlignment = 1024;
  struct Shared {
    unsigned char ring[kStages * kStageBytes];
    uint64_t full[kStages], empty[kStages], xa_full, xa_empty, found, sums_full;
    // Of each slot in the batch that has a rank.
    struct {
      int slot, rank;
      float scaling;
      uint32_t groups;  // of 8 tokens, that it has one in
    } entry[kTokens];
    int entries;
    alignas(8) int token_entry[kTokens];  // -1: no adapter
    // The CTA's own tokens that have an adapter, those of a tile of the plan one behind the other.
    struct OwnToken {
      int token, tile, place, entry;  // place: in the tile
    } own_tokens[kTokens];
    int num_own_tokens;
    alignas(16) float xa[4];  // [token][ranks], then the others' sums, [CTA][own group][thread][4]
  };
  // In whole steps of 16, and two tokens' rows in different banks.
  LORA_EXT_HOST_DEVICE static int xa_stride(int max_rank) {
    const int ranks = (max_rank + 15) / 16 * 16;
    return ranks % 32 == 0 ? ranks + 16 : ranks;
  }
  LORA_EXT_HOST_DEVICE static int own_groups(int cluster) {
    return (kGroups + cluster - 1) / cluster;
  }
  static int shared_bytes(int max_rank, int cluster) {
    return static_cast<int>(sizeof(Shared)) + kTokens * xa_stride(max_rank) * 4 +
           (cluster - 1) * own_groups(cluster) * kLinearConsumers * 16 + kAlignment;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kLinearWgmmaBound = kLinearWgmmaThreads;
#else
constexpr int kLinearWgmmaBound = 32;  // tells the launcher that the kernel is empty here
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What a CTA has to do. It finishes the groups of tokens that leave `member` when divided by
// `cluster`.
struct LinearPart {
  int cluster, member, first_row, begin, end;  // begin, end: steps of K
  // The step before which the adapters come, for which the stream of W waits: in the midst of it,
  // at another place for every second CTA, so that the other one of an SM streams meanwhile, and
  // early enough that a CTA makes up for what they cost it (an eighth later a site of 32 adapters
  // takes 2 % longer), but not before xa of few is there (an eighth earlier one of one, 1 %).
  int middle;

  __device__ __forceinline__ LinearPart(const LinearWgmmaParams& p, int cluster_)
      : cluster(cluster_), member(cluster_ > 1 ? device::cluster_rank() : 0) {
    first_row = static_cast<int>(blockIdx.x) / cluster * kLinearTileRows;
    const int steps = (p.batch.in_features + kBoxColumns - 1) / kBoxColumns;
    begin = steps * member / cluster;
    end = steps * (member + 1) / cluster;
    const bool late = (blockIdx.x / cluster + member) % 2 != 0;
    middle = begin + (end - begin) * (late ? 6 : 3) / 8;
  }
  template <int kGroups>
  __device__ __forceinline__ uint32_t groups() const {
    uint32_t mask = 0;
    for (int i = member; i < kGroups; i += cluster) {
      mask |= 1u << i;
    }
    return mask;
  }
  __device__ __forceinline__ int end_row(const LinearWgmmaParams& p) const {
    return min(first_row + kLinearTileRows, p.out_features);
  }
  __device__ __forceinline__ bool has(const LinearWgmmaParams& p, int slice) const {
    return max(first_row, p.slices[slice].first_column) <
           min(end_row(p), p.slices[slice].end_column);
  }
};

// The slots with tokens among the CTA's, as a mask of their entries. By whole warps.
template <typename Traits>
__device__ __forceinline__ uint32_t entries_of(const typename Traits::Shared& shared,
                                               uint32_t own) {
  static_assert(Traits::kTokens <= 32);
  const int lane = threadIdx.x % 32;
  return __ballot_sync(0xffffffffu,
                       lane < shared.entries && (shared.entry[lane].groups & own) != 0);
}
__device__ __forceinline__ int take_first(uint32_t& mask) {
  const int first = __ffs(static_cast<int>(mask)) - 1;
  mask &= mask - 1;
  return first;
}
#endif

}  // namespace lora_ext::cuda

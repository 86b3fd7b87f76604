// The two kernels of moe_lora_apply_ and what they agree on.
#pragma once

#include "kernels/launch.cuh"
#include "kernels/moe_heuristics.h"

namespace lora_ext::cuda {

constexpr int kMoeWarps = 4;
constexpr int kMoeThreads = 32 * kMoeWarps;

// The intermediate: for each split of K a plane [P, S, rank_stride] fp32. Slices start at multiples
// of four values, so that both kernels access it 16 bytes at a time.
struct MoeWorkspace {
  int64_t rank_stride, row_stride, plane, splits;

  MoeWorkspace(const MoeApplyParams& p, int64_t splits_)
      : rank_stride(ceil_div(p.max_rank, 4) * 4),
        row_stride(p.slices.count * rank_stride),
        plane(p.num_pairs * row_stride),
        splits(splits_) {}
  int64_t bytes() const { return splits * plane * 4; }
};

// A tile that this call's weights have an adapter for.
__device__ __forceinline__ bool is_valid(const MoeTile& tile, int num_slots, int num_experts) {
  return tile.slot >= 0 && tile.slot < num_slots && tile.expert >= 0 && tile.expert < num_experts;
}

// What every CTA reads first. Tiles that lie in the buffer are read whether they count or not: that
// does not wait for the header.
struct MoeRouting {
  const int32_t* routing;
  int32_t tile_limit;  // tiles that the buffer could hold

  __device__ __forceinline__ int size() const { return kRoutingHeaderSize + 4 * tile_limit; }
  __device__ __forceinline__ const int32_t* permutation() const {
    return routing + routing[kPermutationOffset];
  }
  __device__ __forceinline__ int num_tiles() const { return routing[kNumMoeTiles]; }
  __device__ __forceinline__ MoeTile tile(int index) const {
    return index < tile_limit ? moe_tiles(routing)[index] : MoeTile{-1, 0, 0, 0};
  }
};

inline MoeRouting moe_routing(const MoeApplyParams& p) {
  return {p.routing, static_cast<int32_t>((p.routing_size - kRoutingHeaderSize) / 4)};
}

inline int64_t moe_groups(const MoeApplyParams& p) { return int64_t{p.num_slots} * p.num_experts; }

inline bool is_multiple(const MoeFactor& factor, int num_slices, int64_t elements, int64_t bytes) {
  for (int i = 0; i < num_slices; ++i) {
    if (factor.expert_stride[i] % elements != 0) {
      return false;
    }
  }
  return is_multiple(static_cast<const Factor&>(factor), num_slices, elements, bytes);
}

cudaError_t moe_shrink(const MoeApplyParams& p, const MoeShrinkConfig& config);
cudaError_t moe_expand(const MoeApplyParams& p, const MoeShrinkConfig& config);
// Whether one kernel does both, by the shape alone, and that kernel.
bool moe_takes_joint(const MoeApplyParams& p);
cudaError_t moe_joint(const MoeApplyParams& p);
// Whether addresses and strides allow 16-byte accesses, of B of `chunk` elements.
bool moe_shrink_is_vector(const MoeApplyParams& p);
bool moe_expand_is_vector(const MoeApplyParams& p, int chunk);

}  // namespace lora_ext::cuda

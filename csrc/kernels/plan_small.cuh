// The batch plan of few tokens and slots, of which no thread has more than one: what plan_batch.cu
// does in loops is straight code here, with a token in registers from its load to its place.
//
// Two barriers: a warp counts its slots, a thread then adds up a slot's counts over the warps and
// those of the slots before it, in one packed number, and then every token knows its place. Batches
// of segments take two more, for their lengths' sums.
#pragma once

#include "common/ptx.cuh"
#include "kernels/heuristics.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {

// What the kernel is told: one line of the constant bank, which each launch finds cold; all
// pointers of a PlanView would be two lines more, 0.4 us each.
struct PlanSmallParams {
  const int32_t *slots, *seg_lens, *seg_indptr;  // as in PlanParams
  int32_t* plan;
  int32_t n, max_tokens, num_slots;
};

// Tokens, tiles and wide tiles of some slots: up to kSmallPlan each, so that one addition adds all.
struct PackedCounts {
  static constexpr int kBits = 10;
  static_assert(kSmallPlan < 1 << kBits && 3 * kBits < 32);
  int value;

  __device__ __forceinline__ static PackedCounts of_slot(int count) {
    return {count | (count + kTileTokens - 1) / kTileTokens << kBits |
            (count + kWideTileTokens - 1) / kWideTileTokens << 2 * kBits};
  }
  __device__ __forceinline__ int tokens() const { return value & ((1 << kBits) - 1); }
  __device__ __forceinline__ int tiles() const { return value >> kBits & ((1 << kBits) - 1); }
  __device__ __forceinline__ int wide_tiles() const { return value >> 2 * kBits; }
};

__device__ __forceinline__ int inclusive_scan_of_warp(int value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, value, distance);
    value += static_cast<int>(threadIdx.x % 32) >= distance ? below : 0;
  }
  return value;
}

// The slot of the thread's token, of a batch of segments no more than there are threads.
__device__ __forceinline__ int slot_in_segments(const PlanSmallParams& p, int& num_tokens) {
  constexpr int kWarps = kSmallPlan / 32;
  __shared__ int ends[kSmallPlan], slots[kSmallPlan], sums[kWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int n = p.n, capacity = p.max_tokens;
  int slot = -1, length = 0;
  if (thread < n) {
    slot = p.slots[thread];
    length = p.seg_lens != nullptr ? p.seg_lens[thread]
                                   : p.seg_indptr[thread + 1] - p.seg_indptr[thread];
    length = min(max(length, 0), capacity);
  }
  const int end = inclusive_scan_of_warp(length);
  slots[thread] = slot;
  if (lane == 31) {
    sums[warp] = end;
  }
  __syncthreads();
  const int of_warp = lane < static_cast<int>(blockDim.x) / 32 ? sums[lane] : 0;
  ends[thread] = end + __reduce_add_sync(0xffffffffu, lane < warp ? of_warp : 0);
  num_tokens = min(__reduce_add_sync(0xffffffffu, of_warp), capacity);
  __syncthreads();
  int segment = 0;  // how many end at the token or before
#pragma unroll 1
  for (int step = kSmallPlan / 2; step > 0; step /= 2) {
    const int next = segment + step;
    segment = next <= n && ends[next - 1] <= thread ? next : segment;
  }
  return thread < num_tokens ? slots[segment] : -1;
}

// As many threads as the plan has room for tokens, and as slots, and a multiple of 32.
__global__ void __launch_bounds__(kSmallPlan)
    plan_small_kernel(const __grid_constant__ PlanSmallParams p) {
  constexpr int kWarps = kSmallPlan / 32;
  constexpr unsigned kAllLanes = 0xffffffffu;
  __shared__ int histogram[kWarps][kSmallPlan];
  __shared__ int before[kSmallPlan], counts[kSmallPlan];  // of slots
  __shared__ int last_slot[kWarps], heads[kWarps], active[kWarps], sums[kWarps];
  const PlanView plan = plan_view(p.plan, p.max_tokens, p.num_slots);
  const int num_slots = p.num_slots, capacity = p.max_tokens;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_warps = blockDim.x / 32;
  const unsigned lanes_before = (1u << lane) - 1;

#pragma unroll 1
  for (int i = lane; i < num_slots; i += 32) {
    histogram[warp][i] = 0;
  }
  // The slots may be the work of the kernel before, and the plan is what kernels before may read.
  device::grid_dependency_launch();
  device::grid_dependency_wait();
  int num_tokens, slot = -1;
  if (p.seg_lens == nullptr && p.seg_indptr == nullptr) {
    num_tokens = min(p.n, capacity);
    slot = thread < num_tokens ? p.slots[thread] : -1;
  } else {
    slot = slot_in_segments(p, num_tokens);
  }
  slot = slot >= 0 && slot < num_slots ? slot : -1;
  __syncwarp();
  const unsigned same = __match_any_sync(kAllLanes, slot);
  const int rank_in_warp = __popc(same & lanes_before);
  if (slot >= 0 && rank_in_warp == 0) {
    histogram[warp][slot] = __popc(same);
  }
  if (lane == 31) {
    last_slot[warp] = slot;
  }
  __syncthreads();

  // A run of equal slots is a segment.
  const int slot_before = __shfl_up_sync(kAllLanes, slot, 1);
  const bool is_head = thread < num_tokens &&
                       (thread == 0 || slot != (lane > 0 ? slot_before : last_slot[warp - 1]));
  const unsigned all_heads = __ballot_sync(kAllLanes, is_head);
  // The thread's slot.
  int count = 0;
  if (thread < num_slots) {
#pragma unroll 2
    for (int bucket = 0; bucket < num_warps; ++bucket) {
      const int of_bucket = histogram[bucket][thread];
      histogram[bucket][thread] = count;
      count += of_bucket;
    }
  }
  const unsigned all_active = __ballot_sync(kAllLanes, count > 0);
  const int own = PackedCounts::of_slot(count).value;
  const int through = inclusive_scan_of_warp(own);
  before[thread] = through - own;
  counts[thread] = count;
  if (lane == 31) {
    sums[warp] = through, heads[warp] = __popc(all_heads), active[warp] = __popc(all_active);
  }
  __syncthreads();

  const bool exists = lane < num_warps;
  const int of_warp = exists ? sums[lane] : 0, heads_of = exists ? heads[lane] : 0;
  const int num_active = __reduce_add_sync(kAllLanes, exists ? active[lane] : 0);
  const int num_segments = __reduce_add_sync(kAllLanes, heads_of);
  const int first_segment = __reduce_add_sync(kAllLanes, lane < warp ? heads_of : 0);
  const int sums_through = inclusive_scan_of_warp(of_warp), sums_before = sums_through - of_warp;
  const PackedCounts total{__shfl_sync(kAllLanes, sums_through, 31)};
  const int of_slots_warp = __shfl_sync(kAllLanes, sums_before, max(slot, 0) / 32);
  const int of_own_warp = __shfl_sync(kAllLanes, sums_before, warp);
  if (slot >= 0) {
    const PackedCounts first{of_slots_warp + before[slot]};
    const int rank = histogram[warp][slot] + rank_in_warp, left = counts[slot] - rank;
    const int at = first.tokens() + rank;
    plan.permutation[at] = thread;
    if (rank % kTileTokens == 0) {
      plan.tiles[first.tiles() + rank / kTileTokens] = Tile{slot, at, min(kTileTokens, left), 0};
    }
    if (rank % kWideTileTokens == 0) {
      plan.wide_tiles[first.wide_tiles() + rank / kWideTileTokens] =
          Tile{slot, at, min(kWideTileTokens, left), 0};
    }
  }
  if (is_head) {
    const int at = first_segment + __popc(all_heads & lanes_before);
    plan.seg_indptr[at] = thread;
    plan.seg_slots[at] = slot;
  }
  if (thread < num_slots) {
    plan.slot_indptr[thread] = PackedCounts{of_own_warp + before[thread]}.tokens();
    plan.enabled[thread] = count > 0;
  }

  // What lies behind.
  if (thread < capacity) {
    plan.token_slots[thread] = slot;
    if (thread >= total.tokens()) {
      plan.permutation[thread] = -1;
    }
    if (thread >= num_segments) {
      plan.seg_indptr[thread] = num_tokens;
      plan.seg_slots[thread] = -1;
    }
  }
  if (thread == 0) {
    plan.seg_indptr[capacity] = num_tokens;
    plan.slot_indptr[num_slots] = total.tokens();
  }
#pragma unroll 1
  for (int i = total.tiles() + thread; i < capacity / kTileTokens + num_slots; i += blockDim.x) {
    plan.tiles[i] = Tile{-1, 0, 0, 0};
  }
#pragma unroll 1
  for (int i = total.wide_tiles() + thread; i < capacity / kWideTileTokens + num_slots;
       i += blockDim.x) {
    plan.wide_tiles[i] = Tile{-1, 0, 0, 0};
  }
  if (thread < kPlanHeaderSize) {
    int value = 0;
    value = thread == kNumTokens ? num_tokens : value;
    value = thread == kNumSegments ? num_segments : value;
    value = thread == kNumActiveSlots ? num_active : value;
    value = thread == kNumLoraTokens ? total.tokens() : value;
    value = thread == kNumTiles ? total.tiles() : value;
    value = thread == kNumWideTiles ? total.wide_tiles() : value;
    plan.header[thread] = value;
  }
}

}  // namespace lora_ext::cuda

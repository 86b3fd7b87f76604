// The batch plan in one launch of one CTA: a stable counting sort of tokens by slot.
//
// Warp w owns a contiguous range of tokens. Pass 1 counts slots per warp (match.any groups equal
// slots of 32 tokens, so one lane per distinct slot touches the warp's own histogram: no atomics,
// and the order is the token order). A scan over (slot, warp) turns the counts into positions, pass
// 2 scatters token ids there. Tiles follow from the slots' counts by another scan. One CTA, because
// every step depends on the one before; its time is latency, not bytes.
#include <cuda_runtime.h>

#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int warp_inclusive_scan(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, distance);
    value += lane >= distance ? below : 0;
  }
  return value;
}

// Exclusive scan of one value per thread; `total` is the sum over the block.
__device__ int block_exclusive_scan(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int inclusive = warp_inclusive_scan(value);
  if (lane == 31) {
    warp_sums[warp] = inclusive;
  }
  __syncthreads();
  if (warp == 0) {
    const int sums = warp_inclusive_scan(lane < num_warps ? warp_sums[lane] : 0);
    warp_sums[lane] = sums;
  }
  __syncthreads();
  total = warp_sums[num_warps - 1];
  const int result = inclusive - value + (warp > 0 ? warp_sums[warp - 1] : 0);
  __syncthreads();
  return result;
}

// Exclusive scan of data[0 .. n) in place, for any n; returns the sum.
__device__ int scan_in_place(int* data, int n, int* warp_sums) {
  int carry = 0;
  for (int start = 0; start < n; start += blockDim.x) {
    const int i = start + threadIdx.x;
    int total;
    const int before = block_exclusive_scan(i < n ? data[i] : 0, warp_sums, total);
    if (i < n) {
      data[i] = carry + before;
    }
    carry += total;
  }
  __syncthreads();
  return carry;
}

// Tiles of `height` tokens over each slot's range of the permutation, in slot order. `offsets` [L]
// is scratch.
__device__ int write_tiles(Tile* tiles, int64_t capacity, int height, const int32_t* slot_indptr,
                           int num_slots, int* offsets, int* warp_sums) {
  for (int slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    offsets[slot] = (slot_indptr[slot + 1] - slot_indptr[slot] + height - 1) / height;
  }
  __syncthreads();
  const int count = scan_in_place(offsets, num_slots, warp_sums);
  for (int slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int begin = slot_indptr[slot], end = slot_indptr[slot + 1];
    for (int at = begin, i = offsets[slot]; at < end; at += height, ++i) {
      tiles[i] = Tile{slot, at, min(height, end - at), 0};
    }
  }
  for (int64_t i = count + threadIdx.x; i < capacity; i += blockDim.x) {
    tiles[i] = Tile{-1, 0, 0, 0};
  }
  __syncthreads();
  return count;
}

__global__ void __launch_bounds__(kThreads) plan_batch_kernel(PlanParams p, int num_buckets) {
  extern __shared__ int shared[];
  const PlanView& plan = p.plan;
  const int num_slots = static_cast<int>(plan.num_slots),
            capacity = static_cast<int>(plan.max_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* warp_sums = shared;                     // [32]
  int* slot_indptr = warp_sums + 32;           // [L + 1]
  int* offsets = slot_indptr + num_slots + 1;  // [L]
  int* histogram = offsets + num_slots;        // [L][num_buckets]: warp w counts in bucket w
  const bool counts = warp < num_buckets;

  for (int i = threadIdx.x; i < num_slots * num_buckets; i += blockDim.x) {
    histogram[i] = 0;
  }

  // Token slots: straight from the input, or segments spread over their tokens.
  int num_tokens;
  if (p.seg_lens == nullptr && p.seg_indptr == nullptr) {
    num_tokens = static_cast<int>(min(p.n, plan.max_tokens));
    for (int t = threadIdx.x; t < capacity; t += blockDim.x) {
      const int slot = t < num_tokens ? p.slots[t] : -1;
      plan.token_slots[t] = slot < num_slots && slot >= 0 ? slot : -1;
    }
  } else {
    int carry = 0;
    for (int64_t start = 0; start < p.n; start += blockDim.x) {
      const int64_t i = start + threadIdx.x;
      int length = 0, slot = -1;
      if (i < p.n) {
        length =
            max(0, p.seg_lens != nullptr ? p.seg_lens[i] : p.seg_indptr[i + 1] - p.seg_indptr[i]);
        length = min(length, capacity);
        slot = p.slots[i] < num_slots && p.slots[i] >= 0 ? p.slots[i] : -1;
      }
      int total;
      const int first = carry + block_exclusive_scan(length, warp_sums, total);
      // Short segments by their own thread; long ones by the whole warp, so that one long prompt is
      // not one thread's loop.
      constexpr int kShort = 8;
      if (length <= kShort) {
        for (int t = first; t < min(first + length, capacity); ++t) {
          plan.token_slots[t] = slot;
        }
      }
      unsigned rest = __ballot_sync(kAllLanes, length > kShort);
      while (rest != 0) {
        const int source = __ffs(rest) - 1;
        rest &= rest - 1;
        const int begin = __shfl_sync(kAllLanes, first, source);
        const int end = min(begin + __shfl_sync(kAllLanes, length, source), capacity);
        const int value = __shfl_sync(kAllLanes, slot, source);
        for (int t = begin + lane; t < end; t += 32) {
          plan.token_slots[t] = value;
        }
      }
      carry = min(carry + total, capacity);
    }
    num_tokens = carry;
    for (int t = num_tokens + threadIdx.x; t < capacity; t += blockDim.x) {
      plan.token_slots[t] = -1;
    }
  }
  __syncthreads();  // also makes token_slots visible within the block

  // Pass 1: histogram per warp; runs of equal slots become segments.
  const int per_bucket = ((num_tokens + num_buckets - 1) / num_buckets + 31) / 32 * 32;
  const int begin = counts ? min(warp * per_bucket, num_tokens) : 0;
  const int end = counts ? min(begin + per_bucket, num_tokens) : 0;
  for (int start = begin; start < end; start += 32) {
    const int t = start + lane;
    const int slot = t < end ? plan.token_slots[t] : -1;
    const unsigned same = __match_any_sync(kAllLanes, slot);
    if (slot >= 0 && lane == __ffs(same) - 1) {
      histogram[slot * num_buckets + warp] += __popc(same);
    }
    __syncwarp();
  }
  int num_segments = 0;
  for (int start = 0; start < num_tokens; start += blockDim.x) {
    const int t = start + threadIdx.x;
    const int slot = t < num_tokens ? plan.token_slots[t] : -1;
    const bool head = t < num_tokens && (t == 0 || plan.token_slots[t - 1] != slot);
    int total;
    const int at = num_segments + block_exclusive_scan(head, warp_sums, total);
    if (head) {
      plan.seg_indptr[at] = t;
      plan.seg_slots[at] = slot;
    }
    num_segments += total;
  }
  for (int i = num_segments + threadIdx.x; i <= capacity; i += blockDim.x) {
    plan.seg_indptr[i] = num_tokens;
    if (i < capacity) {
      plan.seg_slots[i] = -1;
    }
  }
  __syncthreads();

  // Positions: slot-major, warp-minor, which is token order within a slot.
  const int num_lora_tokens = scan_in_place(histogram, num_slots * num_buckets, warp_sums);
  for (int slot = threadIdx.x; slot <= num_slots; slot += blockDim.x) {
    const int start = slot < num_slots ? histogram[slot * num_buckets] : num_lora_tokens;
    slot_indptr[slot] = start;
    plan.slot_indptr[slot] = start;
  }
  __syncthreads();
  int num_active = 0;
  for (int start = 0; start < num_slots; start += blockDim.x) {
    const int slot = start + threadIdx.x;
    const bool active = slot < num_slots && slot_indptr[slot + 1] > slot_indptr[slot];
    if (slot < num_slots) {
      plan.enabled[slot] = active;
    }
    num_active += __syncthreads_count(active);
  }

  // Pass 2: scatter.
  for (int start = begin; start < end; start += 32) {
    const int t = start + lane;
    const int slot = t < end ? plan.token_slots[t] : -1;
    const unsigned same = __match_any_sync(kAllLanes, slot);
    const int position = slot >= 0 ? histogram[slot * num_buckets + warp] : 0;
    __syncwarp();
    if (slot >= 0) {
      plan.permutation[position + __popc(same & ((1u << lane) - 1))] = t;
      if (lane == __ffs(same) - 1) {
        histogram[slot * num_buckets + warp] = position + __popc(same);
      }
    }
    __syncwarp();
  }
  for (int i = num_lora_tokens + threadIdx.x; i < capacity; i += blockDim.x) {
    plan.permutation[i] = -1;
  }

  const int num_tiles = write_tiles(plan.tiles, plan.max_tokens / kTileTokens + num_slots,
                                    kTileTokens, slot_indptr, num_slots, offsets, warp_sums);
  const int num_wide_tiles =
      write_tiles(plan.wide_tiles, plan.max_tokens / kWideTileTokens + num_slots, kWideTileTokens,
                  slot_indptr, num_slots, offsets, warp_sums);
  if (threadIdx.x < kPlanHeaderSize) {
    const int header[] = {num_tokens,      num_segments, num_active,
                          num_lora_tokens, num_tiles,    num_wide_tiles};
    plan.header[threadIdx.x] = threadIdx.x < 6 ? header[threadIdx.x] : 0;
  }
}

}  // namespace

int plan_batch(const PlanParams& params) {
  const PlanConfig config = plan_config(params.plan.max_tokens, params.plan.num_slots);
  LaunchShape shape{};
  shape.grid = dim3(1);
  shape.threads = config.threads;
  shape.shared_bytes = config.shared_bytes;
  shape.cluster = 1;
  return launch_kernel(plan_batch_kernel, shape, params.stream, params, config.num_buckets);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace lora_ext::cuda

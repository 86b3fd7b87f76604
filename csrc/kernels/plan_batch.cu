// The batch plan in one launch of one CTA: a stable counting sort of tokens by slot.
//
// Warp w owns a contiguous range of tokens, the bucket w. Pass 1 counts its slots (match.any groups
// equal slots of 32 tokens, so one lane per distinct slot touches the warp's own histogram: no
// atomics, and the order is the token order). One scan over the slots turns the counts into all
// that is cumulative: positions, tiles, wide tiles, slots in use. In pass 2 every token knows its
// rank within its slot, so it writes its place in the permutation, and the tile or the segment that
// it begins. One CTA, because every step depends on the one before; its time is latency, not bytes:
// tokens are read from global memory once, and a step costs one barrier. Loops stay rolled, since a
// small batch runs each once and the code itself comes from memory (1,368 -> 950 instructions).
#include <cuda_runtime.h>

#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/plan_small.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kMostThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

// Numbers that are summed up together.
template <int kCount>
struct Counts {
  int of[kCount];

  __device__ __forceinline__ void add(const Counts& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      of[i] += other.of[i];
    }
  }
  __device__ __forceinline__ Counts from_lane(int lane) const {
    Counts result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      result.of[i] = __shfl_sync(kAllLanes, of[i], lane);
    }
    return result;
  }
  __device__ __forceinline__ Counts inclusive_scan_of_warp() const {
    const int lane = threadIdx.x % 32;
    Counts sum = *this;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int below = __shfl_up_sync(kAllLanes, sum.of[i], distance);
        sum.of[i] += lane >= distance ? below : 0;
      }
    }
    return sum;
  }
};

// Exclusive scan over the block; `total` is the sum. Every warp adds up the warps' sums for itself:
// one barrier less than if one did it for all. The caller puts a barrier before the next scan.
template <int kCount>
__device__ __forceinline__ Counts<kCount> exclusive_scan(const Counts<kCount>& value,
                                                         Counts<kCount>* warp_sums,
                                                         Counts<kCount>& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  Counts<kCount> result = value.inclusive_scan_of_warp();
  if (lane == 31) {
    warp_sums[warp] = result;
  }
  __syncthreads();
  Counts<kCount> sums{};
  if (lane < num_warps) {
    sums = warp_sums[lane];
  }
  sums = sums.inclusive_scan_of_warp();
  total = sums.from_lane(num_warps - 1);
  const Counts<kCount> before = sums.from_lane(max(warp - 1, 0));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result.of[i] += (warp > 0 ? before.of[i] : 0) - value.of[i];
  }
  return result;
}

__device__ __forceinline__ int slot_or_none(int slot, int num_slots) {
  return slot >= 0 && slot < num_slots ? slot : -1;
}

// Segments spread over their tokens; returns how many tokens there are. `scratch`: three numbers of
// each thread.
__device__ int spread_segments(const PlanParams& p, int* token_slots, int* scratch) {
  __shared__ Counts<1> warp_sums[32];
  int* first_of = scratch;
  int* end_of = first_of + blockDim.x;
  int* slot_of = end_of + blockDim.x;
  // Short segments by their own thread; long ones by a warp, neighbours by different ones, so that
  // a long prompt is not one thread's loop.
  constexpr int kShort = 8;
  const int num_slots = static_cast<int>(p.plan.num_slots),
            capacity = static_cast<int>(p.plan.max_tokens);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32,
            num_warps = blockDim.x / 32;
  int num_tokens = 0;
#pragma unroll 1
  for (int64_t start = 0; start < p.n; start += blockDim.x) {
    const int64_t i = start + thread;
    int length = 0, slot = -1;
    if (i < p.n) {
      slot = slot_or_none(p.slots[i], num_slots);
      length = p.seg_lens != nullptr ? p.seg_lens[i] : p.seg_indptr[i + 1] - p.seg_indptr[i];
      length = min(max(length, 0), capacity);
    }
    Counts<1> total;
    const int first = num_tokens + exclusive_scan<1>({length}, warp_sums, total).of[0];
    const int end = min(first + length, capacity);
    if (length <= kShort) {
#pragma unroll 1
      for (int t = first; t < end; ++t) {
        token_slots[t] = slot;
      }
    }
    first_of[thread] = first;
    end_of[thread] = length > kShort ? end : 0;
    slot_of[thread] = slot;
    __syncthreads();
    const int mine = lane * num_warps + warp;
    unsigned rest = __ballot_sync(kAllLanes, end_of[mine] > 0);
    for (; rest != 0; rest &= rest - 1) {
      const int segment = (__ffs(rest) - 1) * num_warps + warp;
#pragma unroll 1
      for (int t = first_of[segment] + lane; t < end_of[segment]; t += 32) {
        token_slots[t] = slot_of[segment];
      }
    }
    num_tokens = min(num_tokens + total.of[0], capacity);
    __syncthreads();
  }
  return num_tokens;
}

__global__ void __launch_bounds__(kMostThreads)
    plan_batch_kernel(const __grid_constant__ PlanParams p,
                      const __grid_constant__ PlanConfig config) {
  extern __shared__ int shared[];
  __shared__ Counts<4> warp_sums[32];
  __shared__ int heads[32];  // segments that begin in a bucket
  const PlanView& plan = p.plan;
  const int num_slots = static_cast<int>(plan.num_slots),
            capacity = static_cast<int>(plan.max_tokens), num_buckets = config.num_buckets;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const unsigned lanes_before = (1u << lane) - 1;
  device::grid_dependency_launch();
  device::grid_dependency_wait();

  int* histogram = shared;  // [num_buckets][L]
  int* first_tile = histogram + num_buckets * num_slots;
  int* first_wide_tile = first_tile + num_slots;
  // These two only where shared memory holds them.
  int* slot_indptr = config.slots_at < 0 ? plan.slot_indptr : shared + config.slots_at;
  int* token_slots = config.tokens_at < 0 ? plan.token_slots : shared + config.tokens_at;

  int num_tokens;
  if (p.seg_lens == nullptr && p.seg_indptr == nullptr) {
    num_tokens = static_cast<int>(min(p.n, plan.max_tokens));
#pragma unroll 1
    for (int t = thread; t < num_tokens; t += blockDim.x) {
      token_slots[t] = slot_or_none(p.slots[t], num_slots);
    }
  } else {
    num_tokens = spread_segments(p, token_slots, shared);
  }
#pragma unroll 1
  for (int i = thread; i < num_slots * num_buckets; i += blockDim.x) {
    histogram[i] = 0;
  }
  __syncthreads();

  // Pass 1.
  const int bucket_size = ((num_tokens + num_buckets - 1) / num_buckets + 31) / 32 * 32;
  const int begin = warp < num_buckets ? min(warp * bucket_size, num_tokens) : 0;
  const int end = warp < num_buckets ? min(begin + bucket_size, num_tokens) : 0;
  int* counts = histogram + warp * num_slots;
  // A run of equal slots is a segment.
  const auto begins_segment = [&](int t, int slot) {
    return t < end && (t == 0 || token_slots[t - 1] != slot);
  };
  int num_heads = 0;
#pragma unroll 1
  for (int start = begin; start < end; start += 32) {
    const int t = start + lane;
    const int slot = t < end ? token_slots[t] : -1;
    const unsigned same = __match_any_sync(kAllLanes, slot);
    if (slot >= 0 && (same & lanes_before) == 0) {
      counts[slot] += __popc(same);
    }
    num_heads += __popc(__ballot_sync(kAllLanes, begins_segment(t, slot)));
    if (config.tokens_at >= 0 && t < end) {
      plan.token_slots[t] = slot;
    }
    __syncwarp();
  }
  if (lane == 0) {
    heads[warp] = num_heads;
  }
  __syncthreads();

  // What is cumulative over the slots; a bucket's count becomes the rank of its first token.
  Counts<4> totals{};
#pragma unroll 1
  for (int start = 0; start < num_slots; start += blockDim.x) {
    const int slot = start + thread;
    int count = 0;
    if (slot < num_slots) {
#pragma unroll 4
      for (int bucket = 0; bucket < num_buckets; ++bucket) {
        int& of_bucket = histogram[bucket * num_slots + slot];
        const int before = count;
        count += of_bucket;
        of_bucket = before;
      }
    }
    Counts<4> total;
    Counts<4> first =
        exclusive_scan<4>({count, (count + kTileTokens - 1) / kTileTokens,
                           (count + kWideTileTokens - 1) / kWideTileTokens, count > 0},
                          warp_sums, total);
    first.add(totals);
    if (slot < num_slots) {
      slot_indptr[slot] = plan.slot_indptr[slot] = first.of[0];
      first_tile[slot] = first.of[1];
      first_wide_tile[slot] = first.of[2];
      plan.enabled[slot] = count > 0;
    }
    totals.add(total);
    if (thread == 0 && start + static_cast<int>(blockDim.x) >= num_slots) {
      slot_indptr[num_slots] = plan.slot_indptr[num_slots] = totals.of[0];
    }
    __syncthreads();
  }
  const int num_lora_tokens = totals.of[0], num_tiles = totals.of[1], num_wide_tiles = totals.of[2];

  // Pass 2.
  const int heads_of = heads[lane];  // of warps that there are not: unused
  int segment = __reduce_add_sync(kAllLanes, lane < warp ? heads_of : 0);
  const int num_segments = __reduce_add_sync(kAllLanes, lane < num_buckets ? heads_of : 0);
#pragma unroll 1
  for (int start = begin; start < end; start += 32) {
    const int t = start + lane;
    const int slot = t < end ? token_slots[t] : -1;
    const unsigned same = __match_any_sync(kAllLanes, slot);
    const int rank = slot >= 0 ? counts[slot] + __popc(same & lanes_before) : 0;
    __syncwarp();
    if (slot >= 0) {
      const int first = slot_indptr[slot], left = slot_indptr[slot + 1] - first - rank;
      plan.permutation[first + rank] = t;
      if (rank % kTileTokens == 0) {
        plan.tiles[first_tile[slot] + rank / kTileTokens] =
            Tile{slot, first + rank, min(kTileTokens, left), 0};
      }
      if (rank % kWideTileTokens == 0) {
        plan.wide_tiles[first_wide_tile[slot] + rank / kWideTileTokens] =
            Tile{slot, first + rank, min(kWideTileTokens, left), 0};
      }
      if ((same & lanes_before) == 0) {
        counts[slot] += __popc(same);
      }
    }
    const bool is_head = begins_segment(t, slot);
    const unsigned all_heads = __ballot_sync(kAllLanes, is_head);
    if (is_head) {
      const int at = segment + __popc(all_heads & lanes_before);
      plan.seg_indptr[at] = t;
      plan.seg_slots[at] = slot;
    }
    segment += __popc(all_heads);
    __syncwarp();
  }

  // What lies behind.
#pragma unroll 1
  for (int i = num_tokens + thread; i < capacity; i += blockDim.x) {
    plan.token_slots[i] = -1;
  }
#pragma unroll 1
  for (int i = num_lora_tokens + thread; i < capacity; i += blockDim.x) {
    plan.permutation[i] = -1;
  }
#pragma unroll 1
  for (int i = num_segments + thread; i <= capacity; i += blockDim.x) {
    plan.seg_indptr[i] = num_tokens;
    if (i < capacity) {
      plan.seg_slots[i] = -1;
    }
  }
#pragma unroll 1
  for (int i = num_tiles + thread; i < capacity / kTileTokens + num_slots; i += blockDim.x) {
    plan.tiles[i] = Tile{-1, 0, 0, 0};
  }
#pragma unroll 1
  for (int i = num_wide_tiles + thread; i < capacity / kWideTileTokens + num_slots;
       i += blockDim.x) {
    plan.wide_tiles[i] = Tile{-1, 0, 0, 0};
  }
  if (thread < kPlanHeaderSize) {
    int value = 0;
    value = thread == kNumTokens ? num_tokens : value;
    value = thread == kNumSegments ? num_segments : value;
    value = thread == kNumActiveSlots ? totals.of[3] : value;
    value = thread == kNumLoraTokens ? num_lora_tokens : value;
    value = thread == kNumTiles ? num_tiles : value;
    value = thread == kNumWideTiles ? num_wide_tiles : value;
    plan.header[thread] = value;
  }
}

}  // namespace

int plan_batch(const PlanParams& params) {
  LaunchShape shape{};
  shape.grid = dim3(1);
  shape.dependent = true;
  if (plan_is_small(params.plan.max_tokens, params.plan.num_slots, params.n)) {
    shape.threads = static_cast<int>(
        32 * ceil_div(std::max({params.plan.max_tokens, params.plan.num_slots, int64_t{1}}), 32));
    shape.cluster = 1;
    const PlanView& plan = params.plan;
    return launch_kernel(
        plan_small_kernel, shape, params.stream,
        PlanSmallParams{params.slots, params.seg_lens, params.seg_indptr, plan.header,
                        static_cast<int32_t>(params.n), static_cast<int32_t>(plan.max_tokens),
                        static_cast<int32_t>(plan.num_slots)});
  }
  const PlanConfig config = plan_config(params.plan.max_tokens, params.plan.num_slots);
  shape.threads = config.threads;
  shape.shared_bytes = config.shared_bytes;
  shape.cluster = 1;
  return launch_kernel(plan_batch_kernel, shape, params.stream, params, config);
}

int plan_batch_from_host(const PlanParams& params) {
  void* slots = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&slots, const_cast<int32_t*>(params.slots), 0);
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported here, and must not fail the next launch too
    return error;
  }
  PlanParams mapped = params;
  mapped.slots = static_cast<const int32_t*>(slots);
  if (params.seg_indptr != nullptr) {
    mapped.seg_indptr = mapped.slots + (params.seg_indptr - params.slots);
  }
  return plan_batch(mapped);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace lora_ext::cuda

// The routing of one MoE layer in one launch: pairs sorted by (slot, expert), and their tiles.
//
// It stands before every layer's LoRA kernels, so latency is what counts, and the pairs of a decode
// step fit one CTA: barriers there cost tens of cycles where a second launch costs a microsecond.
//   - Few pairs: a thread owns one and counts the pairs that come before it. One barrier, no sort.
//   - More: a radix sort, least digit first, that is stable because a warp owns a contiguous range
//     of pairs and lanes of equal digits find each other by ballots.
//   - More than kMoeSharedPairs: the same by a cluster of CTAs, each with a contiguous range, which
//     learn each other's counts through distributed shared memory; pairs go through scratch behind
//     the routing. Chips without clusters do it with one CTA.
// The work grows with the pairs, never with slots * experts. Counts are integers, so equal routings
// give equal bits. Tiles follow from the sorted keys: one starts at each group and every
// kMoeTilePairs pairs within it, and ends where the next one starts.
#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
// Comparing all with all takes P * P / 64 cycles or so of one SM: 0.1 us here, and less than a
// radix pass with its five barriers; at twice as many it would be four times that.
constexpr int kComparedPairs = 128;
constexpr int kSortThreads = 1024;
constexpr int kMaxWarps = kSortThreads / 32;
// 2^7 digits by 32 warps of counts take 16 KB, and two passes serve 16,384 (slot, expert).
constexpr int kMaxDigitBits = 7;

// The group of a pair, slot * E + expert, or -1.
__device__ __forceinline__ int group_of(const MoeAlignParams& p, int pair) {
  const int token = static_cast<int>(static_cast<unsigned>(pair) / static_cast<unsigned>(p.top_k));
  const int slot = __ldg(p.token_slots + token);
  int64_t id = p.ids_are_int64 ? __ldg(static_cast<const int64_t*>(p.topk_ids) + pair)
                               : __ldg(static_cast<const int32_t*>(p.topk_ids) + pair);
  if (p.expert_map != nullptr) {
    id = id >= 0 && id < p.num_global ? __ldg(p.expert_map + id) : -1;
  }
  const bool routed = slot >= 0 && slot < p.num_slots && id >= 0 && id < p.num_experts;
  return routed ? slot * p.num_experts + static_cast<int>(id) : -1;
}

// CTAs of the cluster that share many pairs: as many as every chip with clusters guarantees.
constexpr int kClusterBlocks = 8;

// What a CTA of a cluster is, and what it knows of the others; without one, the only CTA.
template <bool kCluster>
struct Member {
  __device__ static int rank() { return kCluster ? static_cast<int>(blockIdx.x) : 0; }
  __device__ static int size() { return kCluster ? kClusterBlocks : 1; }
  // All that the cluster's threads have written, shared or global, is seen by all of them.
  __device__ static void barrier() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if constexpr (kCluster) {
      device::cluster_arrive();
      device::cluster_wait();
      return;
    }
#endif
    __syncthreads();
  }
  // `value` of the CTA `peer`, in its shared memory.
  __device__ static int read(const int* value, int peer) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if constexpr (kCluster) {
      return device::load_peer_int(device::peer_address(value, peer));
    }
#endif
    return *value;
  }
};

// Where the group that holds the pair `last` starts. All lanes of a warp search together.
template <typename KeyAt>
__device__ int find_group_start(int last, const KeyAt& key_at) {
  const int lane = threadIdx.x % 32, key = key_at(last);
  int low = 0, high = last;
  while (low < high) {
    const int step = (high - low + 31) / 32, probe = low + lane * step;
    const bool below = probe < high && key_at(probe) < key;
    const int count = __popc(__ballot_sync(kAllLanes, below));
    high = min(high, low + count * step);
    low = count > 0 ? low + (count - 1) * step + 1 : high;
  }
  return low;
}

struct TileCounts {
  int groups, tiles, first_start;  // of the first tile, if there is one
};

// Where tiles start, in order, among pairs begin .. end of the sorted ones; key_at(i) is the key of
// the i-th. Every thread of the block takes part; `shared` holds 2 * kMaxWarps ints.
template <typename KeyAt>
__device__ TileCounts find_tiles(int begin, int end, const KeyAt& key_at, int* starts,
                                 int* shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_warps = blockDim.x / 32;
  int* last_heads = shared;  // [warp]: the last start of a group, -1: none
  int* sums = shared + kMaxWarps;
  const unsigned up_to_lane = kAllLanes >> (31 - lane);
  // Of the group that reaches into this round.
  int group_start = begin > 0 && begin < end ? find_group_start(begin - 1, key_at) : 0;
  TileCounts found{0, 0, 0};
  for (int first = begin; first < end; first += blockDim.x) {
    const int i = first + thread;
    const bool exists = i < end;
    const bool head = exists && (i == 0 || key_at(i) != key_at(i - 1));
    const unsigned heads = __ballot_sync(kAllLanes, head);
    if (lane == 0) {
      last_heads[warp] = heads != 0 ? first + warp * 32 + 31 - __clz(heads) : -1;
    }
    __syncthreads();
    const int heads_before = lane < num_warps ? last_heads[lane] : -1;
    int start = max(group_start, __reduce_max_sync(kAllLanes, lane < warp ? heads_before : -1));
    if ((heads & up_to_lane) != 0) {
      start = first + warp * 32 + 31 - __clz(heads & up_to_lane);
    }
    group_start = max(group_start, __reduce_max_sync(kAllLanes, heads_before));
    const bool starts_tile = exists && (i - start) % kMoeTilePairs == 0;
    const unsigned tiles = __ballot_sync(kAllLanes, starts_tile);
    if (lane == 0) {  // both counts in one word: neither passes the threads of a block
      sums[warp] = __popc(heads) << 16 | __popc(tiles);
    }
    __syncthreads();
    const int counts = lane < num_warps ? sums[lane] : 0;
    const int before = __reduce_add_sync(kAllLanes, lane < warp ? counts : 0);
    const int total = __reduce_add_sync(kAllLanes, counts);
    if (starts_tile) {
      starts[found.tiles + (before & 0xffff) + __popc(tiles & (up_to_lane >> 1))] = i;
    }
    found.groups += total >> 16;
    found.tiles += total & 0xffff;
  }
  __syncthreads();
  found.first_start = found.tiles > 0 ? starts[0] : 0;
  return found;
}

// What follows the sorted pairs: tiles, the ends of both lists, the header. `starts` has room for
// one entry of each pair. The CTAs of a cluster share the pairs.
template <bool kCluster, typename KeyAt>
__device__ void write_routing(const MoeAlignParams& p, int permutation_offset, int tile_capacity,
                              int num_routed, const KeyAt& key_at, int* starts, int* shared) {
  using Block = Member<kCluster>;
  __shared__ int published[3];
  const int rank = Block::rank(), share = (num_routed + Block::size() - 1) / Block::size();
  const int begin = min(rank * share, num_routed), end = min(begin + share, num_routed);
  starts += begin;
  const TileCounts own = find_tiles(begin, end, key_at, starts, shared);
  int groups = own.groups, tiles = own.tiles, tiles_before = 0, next_start = num_routed;
  if constexpr (kCluster) {
    if (threadIdx.x == 0) {
      published[0] = own.groups, published[1] = own.tiles, published[2] = own.first_start;
    }
    Block::barrier();
    groups = tiles = 0;
#pragma unroll
    for (int peer = kClusterBlocks - 1; peer >= 0; --peer) {
      const int peer_tiles = Block::read(published + 1, peer);
      const int peer_start = Block::read(published + 2, peer);
      groups += Block::read(published, peer);
      tiles += peer_tiles;
      tiles_before += peer < rank ? peer_tiles : 0;
      next_start = peer > rank && peer_tiles > 0 ? peer_start : next_start;
    }
  }
  MoeTile* list = moe_tiles(p.routing);
  const int step = blockDim.x;
  for (int i = threadIdx.x; i < own.tiles; i += step) {
    const int start = starts[i], stop = i + 1 < own.tiles ? starts[i + 1] : next_start;
    const int key = key_at(start), slot = key / p.num_experts;
    list[tiles_before + i] = MoeTile{slot, start, stop - start, key - slot * p.num_experts};
  }
  const int thread = rank * step + static_cast<int>(threadIdx.x), threads = Block::size() * step;
  for (int i = tiles + thread; i < tile_capacity; i += threads) {
    list[i] = MoeTile{-1, 0, 0, 0};
  }
  for (int i = num_routed + thread; i < p.num_pairs; i += threads) {
    p.routing[permutation_offset + i] = -1;
  }
  if (thread < kRoutingHeaderSize) {
    const int header[] = {num_routed, groups, tiles, permutation_offset};
    p.routing[thread] = thread < 4 ? header[thread] : 0;
  }
  if constexpr (kCluster) {
    Block::barrier();  // peers may still be reading what this CTA has published
  }
}

__global__ void __launch_bounds__(kComparedPairs)
    moe_align_compare_kernel(const __grid_constant__ MoeAlignParams p, int permutation_offset,
                             int tile_capacity) {
  __shared__ __align__(16) int keys[kComparedPairs];
  __shared__ int sorted[kComparedPairs], starts[kComparedPairs], shared[2 * kMaxWarps];
  constexpr int kNone = 0x7fffffff;  // behind all groups
  const int thread = threadIdx.x, own_first = thread / 32 * 32;
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  int key = thread < p.num_pairs ? group_of(p, thread) : -1;
  key = key >= 0 ? key : kNone;
  keys[thread] = key;
  const int num_routed = __syncthreads_count(key != kNone);

  // Equal keys of a lower index come before: all of them in the warps before, none in those behind.
  int position = 0;
  const auto count = [&](int from, int to, int limit) {  // keys below the limit
    for (int j = from; j < to; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(keys + j);
      position += (four.x < limit) + (four.y < limit) + (four.z < limit) + (four.w < limit);
    }
  };
  if (key != kNone) {
    count(0, own_first, key + 1);
    count(own_first + 32, blockDim.x, key);
    for (int j = 0; j < 32; ++j) {
      position += keys[own_first + j] < key + (own_first + j < thread ? 1 : 0);
    }
    sorted[position] = key;
    p.routing[permutation_offset + position] = thread;
  }
  __syncthreads();
  write_routing<false>(
      p, permutation_offset, tile_capacity, num_routed, [&](int i) { return sorted[i]; }, starts,
      shared);
}

// Exclusive scan of data[0 .. n) in place; `shared` holds kMaxWarps ints. Returns the sum.
__device__ int scan_in_place(int* data, int n, int* shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_warps = blockDim.x / 32;
  int carry = 0;
  for (int first = 0; first < n; first += 4 * blockDim.x) {
    const int at = first + 4 * thread;
    int4 values = at < n ? *reinterpret_cast<const int4*>(data + at) : make_int4(0, 0, 0, 0);
    const int sum = values.x + values.y + values.z + values.w;
    int inclusive = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(kAllLanes, inclusive, distance);
      inclusive += lane >= distance ? below : 0;
    }
    if (lane == 31) {
      shared[warp] = inclusive;
    }
    __syncthreads();
    const int warp_sum = lane < num_warps ? shared[lane] : 0;
    const int before = __reduce_add_sync(kAllLanes, lane < warp ? warp_sum : 0);
    if (at < n) {
      int4 starts;
      starts.x = carry + before + inclusive - sum;
      starts.y = starts.x + values.x;
      starts.z = starts.y + values.y;
      starts.w = starts.z + values.z;
      *reinterpret_cast<int4*>(data + at) = starts;
    }
    carry += __reduce_add_sync(kAllLanes, warp_sum);
    __syncthreads();
  }
  return carry;
}

// A pair with its group, the group above.
using Word = unsigned long long;
__device__ __forceinline__ int key_of(Word word) { return static_cast<int>(word >> 32); }
__device__ __forceinline__ int pair_of(Word word) { return static_cast<int>(word); }

struct SortShape {
  int passes, digit_bits, permutation_offset, tile_capacity;
};

// Counts by (digit, warp), scanned in each CTA, become positions in the whole cluster: behind the
// lower digits of all CTAs, and behind its own digit of those before. Returns the sum of all
// counts.
__device__ int scan_over_cluster(int* counts, int total, int digits, int* shared) {
  using Block = Member<true>;
  __shared__ int digit_starts[(1 << kMaxDigitBits) + 1];
  __shared__ __align__(16) int bases[1 << kMaxDigitBits];
  __shared__ int shifts[1 << kMaxDigitBits];
  const int num_warps = blockDim.x / 32, rank = Block::rank();
  for (int digit = threadIdx.x; digit <= digits; digit += blockDim.x) {
    digit_starts[digit] = digit < digits ? counts[digit * num_warps] : total;
  }
  Block::barrier();
  for (int digit = threadIdx.x; digit < digits; digit += blockDim.x) {
    int all = 0, before = 0;
#pragma unroll
    for (int peer = 0; peer < kClusterBlocks; ++peer) {
      const int count =
          Block::read(digit_starts + digit + 1, peer) - Block::read(digit_starts + digit, peer);
      all += count;
      before += peer < rank ? count : 0;
    }
    bases[digit] = all;
    shifts[digit] = before - digit_starts[digit];
  }
  __syncthreads();
  const int sum = scan_in_place(bases, digits, shared);
  for (int i = threadIdx.x; i < digits * num_warps; i += blockDim.x) {
    counts[i] += bases[i / num_warps] + shifts[i / num_warps];
  }
  return sum;
}

template <bool kCluster>
__global__ void __launch_bounds__(kSortThreads)
    moe_align_sort_kernel(const __grid_constant__ MoeAlignParams p, SortShape shape,
                          Word* scratch) {
  using Block = Member<kCluster>;
  extern __shared__ __align__(16) unsigned char dynamic[];
  __shared__ int shared[2 * kMaxWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int num_warps = blockDim.x / 32, num_pairs = static_cast<int>(p.num_pairs);
  int* counts = reinterpret_cast<int*>(dynamic);  // [digit][warp]
  const int num_counts = num_warps << shape.digit_bits;
  Word* from = scratch != nullptr ? scratch : reinterpret_cast<Word*>(counts + num_counts);
  Word* to = from + num_pairs;
  // Past L1, which knows nothing of what the cluster's other CTAs write.
  const auto word_at = [&](int i) { return kCluster ? __ldcg(from + i) : from[i]; };
  device::grid_dependency_wait();
  device::grid_dependency_launch();

  int num_sorted = num_pairs;  // after the first pass: those that are routed
  for (int pass = 0; pass < shape.passes; ++pass) {
    for (int i = thread; i < num_counts; i += blockDim.x) {
      counts[i] = 0;
    }
    __syncthreads();
    const int shift = pass * shape.digit_bits, digit_mask = (1 << shape.digit_bits) - 1;
    const int all_warps = Block::size() * num_warps;
    const int per_warp = ((num_sorted + all_warps - 1) / all_warps + 31) / 32 * 32;
    const int begin = min((Block::rank() * num_warps + warp) * per_warp, num_sorted);
    const int end = min(begin + per_warp, num_sorted);
    const auto counter = [&](int key) {
      return counts + ((key >> shift & digit_mask) * num_warps + warp);
    };
#pragma unroll 4
    for (int i = begin + lane; i < end; i += 32) {
      int key;
      if (pass == 0) {  // read again below by the same thread
        key = group_of(p, i);
        from[i] = static_cast<Word>(static_cast<unsigned>(key)) << 32 | static_cast<unsigned>(i);
      } else {
        key = key_of(word_at(i));
      }
      if (key >= 0) {
        atomicAdd(counter(key), 1);
      }
    }
    __syncthreads();
    // By digit, then warp: the order of the pairs within a digit.
    num_sorted = scan_in_place(counts, num_counts, shared);
    if constexpr (kCluster) {
      num_sorted = scan_over_cluster(counts, num_sorted, 1 << shape.digit_bits, shared);
      __syncthreads();
    }
    const bool last = pass + 1 == shape.passes;
    Word next = begin + lane < end ? word_at(begin + lane) : ~Word{0};
    for (int first = begin; first < end; first += 32) {
      const Word word = next;
      const int following = first + 32 + lane;
      next = following < end ? word_at(following) : ~Word{0};
      const int key = key_of(word), digit = key >> shift & digit_mask;
      unsigned same = __ballot_sync(kAllLanes, key >= 0);
      for (int bit = 0; bit < shape.digit_bits; ++bit) {
        const bool set = (digit >> bit & 1) != 0;
        const unsigned with = __ballot_sync(kAllLanes, set);
        same &= set ? with : ~with;
      }
      if (key >= 0) {
        const int start = *counter(key), position = start + __popc(same & ((1u << lane) - 1));
        __syncwarp(same);
        if (lane == __ffs(same) - 1) {
          *counter(key) = start + __popc(same);
        }
        to[position] = word;
        if (last) {
          p.routing[shape.permutation_offset + position] = pair_of(word);
        }
      }
      __syncwarp();
    }
    Block::barrier();
    Word* swap = from;
    from = to;
    to = swap;
  }
  write_routing<kCluster>(
      p, shape.permutation_offset, shape.tile_capacity, num_sorted,
      [&](int i) { return key_of(word_at(i)); }, reinterpret_cast<int*>(to), shared);
}

}  // namespace

int moe_align(const MoeAlignParams& p) {
  const int64_t num_groups = int64_t{p.num_slots} * p.num_experts;
  const RoutingLayout at(p.num_pairs, num_groups);
  const int permutation_offset = static_cast<int>(at.permutation);
  const int tile_capacity = static_cast<int>(at.tile_capacity);
  LaunchShape launch{};
  launch.grid = dim3(1);
  launch.cluster = 1;
  launch.dependent = true;
  if (p.num_pairs <= kComparedPairs) {
    launch.threads = std::max(32, static_cast<int>(ceil_div(p.num_pairs, 32)) * 32);
    return launch_kernel(moe_align_compare_kernel, launch, p.stream, p, permutation_offset,
                         tile_capacity);
  }
  int bits = 2;  // counts are scanned four at a time
  while (num_groups > int64_t{1} << bits) {
    ++bits;
  }
  SortShape shape{};
  shape.passes = static_cast<int>(ceil_div(bits, kMaxDigitBits));
  shape.digit_bits = static_cast<int>(ceil_div(bits, shape.passes));
  shape.permutation_offset = permutation_offset;
  shape.tile_capacity = tile_capacity;
  const bool clustered = p.num_pairs > kMoeSharedPairs && device_properties().clusters;
  launch.cluster = clustered ? kClusterBlocks : 1;
  launch.grid = dim3(static_cast<unsigned>(launch.cluster));
  launch.threads = static_cast<int>(
      std::min<int64_t>(kSortThreads, ceil_div(p.num_pairs, 32 * int64_t{launch.cluster}) * 32));
  const bool in_shared = p.num_pairs <= kMoeSharedPairs;
  launch.shared_bytes = (launch.threads / 32 << shape.digit_bits) * 4 +
                        (in_shared ? static_cast<int>(2 * p.num_pairs) * 8 : 0);
  Word* scratch = in_shared ? nullptr : reinterpret_cast<Word*>(p.routing + at.scratch);
  return launch_kernel(clustered ? moe_align_sort_kernel<true> : moe_align_sort_kernel<false>,
                       launch, p.stream, p, shape, scratch);
}

}  // namespace lora_ext::cuda

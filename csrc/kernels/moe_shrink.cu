// xa = weight * scaling * x A^T for tiles of pairs of one (slot, expert): what moves is A, or,
// where an expert has many pairs, x.
//
// A CTA of four warps serves one tile, up to 64 rows of A and a part of K; every weight and every x
// of the CTA is loaded once, by asynchronous copies that run some steps ahead. Few pairs: the
// weights are the 16-row operand of the mma, the pairs its 8-column one, and a tile of one pair
// wastes no weight bandwidth; the warps divide K, and their sums meet in shared memory in fixed
// order. Many: the warps share what they load, and the products; with more than 64 rows of A one
// CTA does two CTAs' rows then, so that x is read once. Parts of K of different CTAs go to planes
// of the workspace of their own.
//
// How many tiles there are only the device knows: one adapter of 32 experts has an eighth of those
// that eight adapters have. Where they may be so few that most SMs would have none, CTAs come in
// clusters of two or four, which take a tile each, or share one and send each other their sums.
#include "kernels/moe_shrink_many.cuh"

namespace lora_ext::cuda {
namespace {

// With very many pairs a third CTA on an SM is worth more than it takes; with fewer, CTAs would
// crowd on some SMs, and this much shared memory keeps it out.
constexpr int kThirdBlockPairs = 8192, kTwoBlocksBytes = 80 * 1024;
constexpr int kDeepPairs = 1024;  // from which on deeper rings pay for more than 64 rows

// What will likely be read of A and x, to L2, before it may be: the routing and x may be yet to be
// written, but as an address of a prefetch, kept inside the tensors, what is read of them does no
// harm.
template <typename T, int kRows>
__device__ __forceinline__ void prefetch_part(const MoeShrinkParams& p, const MoeShrinkWork& work) {
  const int thread = threadIdx.x, index = blockIdx.y;
  if (index >= p.routing.tile_limit) {
    return;
  }
  // Past L1, which would keep what is yet to be overwritten.
  const int4 raw = __ldcg(reinterpret_cast<const int4*>(moe_tiles(p.routing.routing) + index));
  const int offset = __ldcg(p.routing.routing + kPermutationOffset);
  const MoeTile tile{raw.x, raw.y, raw.z, raw.w};
  if (!is_valid(tile, p.num_slots, p.num_experts)) {
    return;
  }
  const int bytes = 2 * min(work.k_end - work.k_begin, p.prefetch_features);
  if (thread < kRows) {
    const int rank = min(__ldcg(p.ranks + tile.slot), p.max_rank), row = work.row0 + thread;
    if (row < rank * (p.packed ? p.num_slices : 1)) {
      const MoeShrinkMatrix& matrix = p.matrices[work.matrix];
      device::prefetch_l2(static_cast<const T*>(matrix.a) + tile.slot * matrix.slot_stride +
                              tile.expert * matrix.expert_stride + row * matrix.row_stride +
                              work.k_begin,
                          bytes);
    }
  }
  const int i = thread - (kMoeThreads - kFewPairs);
  const int64_t at = int64_t{offset} + tile.start + i;
  if (i >= 0 && i < tile.count && at >= 0 && at < p.routing.size()) {
    const int pair = __ldcg(p.routing.routing + at);
    if (pair >= 0 && pair < p.num_pairs) {
      device::prefetch_l2(
          static_cast<const T*>(p.x) + p.x_divisor.token_of(pair) * p.x_stride + work.k_begin,
          bytes);
    }
  }
}

// kTwoWays: the CTAs of a cluster share a tile's part of K if there are up to p.few_tiles tiles,
// and take a tile each otherwise. Which one, each knows as soon as how many there are, for it reads
// both. kWide: A has more rows than a CTA computes for few pairs; for many, one in two serves both.
template <typename T, int kRowBlocks, bool kWide, bool kVector, bool kDeep, bool kTwoWays>
__global__ void __launch_bounds__(kMoeThreads, kRowBlocks == 4 && !kWide ? 2 : 3)
    moe_shrink_kernel(const __grid_constant__ MoeShrinkParams p) {
  using Traits = MoeShrinkTraits<kRowBlocks, kWide, kDeep>;
  extern __shared__ __align__(1024) unsigned char buffer[];
  __shared__ MoeShrinkShared shared;
  [[maybe_unused]] __shared__ uint64_t arrived;
  const int thread = threadIdx.x;
  MoeShrinkWork work;
  unsigned place = blockIdx.x;
  [[maybe_unused]] int member = 0;
#if __CUDA_ARCH__ >= 900
  if constexpr (kTwoWays) {
    place = device::cluster_id(), member = device::cluster_rank();
  }
#endif
  const int block = place / p.splits;
  work.split = place % p.splits;
  work.matrix = block / p.blocks_per_matrix;
  work.row0 = block % p.blocks_per_matrix * 16 * kRowBlocks;
  work.k_begin = work.split * p.split_features;
  work.k_end = min(work.k_begin + p.split_features, p.in_features);
  if (p.prefetch_features > 0) {
    prefetch_part<T, 16 * kRowBlocks>(p, work);
  }
  device::grid_dependency_wait();
  if (!p.expand_later) {
    device::grid_dependency_launch();
  }
  const int num_tiles = p.routing.num_tiles();
  const int32_t* permutation = p.routing.permutation();
  int first = blockIdx.y, stride = gridDim.y;
  MoeTile tile = p.routing.tile(first);
  MoeShrinkShare share{kTwoWays && num_tiles <= p.few_tiles, &arrived, 0};
  if constexpr (kTwoWays) {
    const int own_first = p.members * first + member;
    const MoeTile own_tile = p.routing.tile(own_first);
    if (share.on) {
      share.begin();
      work.k_begin = min(work.k_begin + member * p.member_features, work.k_end);
      work.k_end = min(work.k_begin + p.member_features, work.k_end);
    } else {
      tile = own_tile;
      first = own_first;
      stride *= p.members;
    }
  }
  const bool cached = p.num_slots <= kCachedSlots;
  if (cached && thread < p.num_slots) {
    shared.ranks[thread] = p.ranks[thread];
  }
  const MoeShrinkMatrix& matrix = p.matrices[work.matrix];
  __syncthreads();
  for (int index = first; index < num_tiles; index += stride) {
    if (index != first) {
      tile = p.routing.tile(index);
    }
    if (!is_valid(tile, p.num_slots, p.num_experts)) {
      continue;
    }
    work.count = tile.count;
    work.rank = min(cached ? shared.ranks[tile.slot] : p.ranks[tile.slot], p.max_rank);
    work.rows = work.rank * (p.packed ? p.num_slices : 1);
    const bool many = tile.count > kFewPairs;
    if (work.row0 >= work.rows || (kWide && many && block % p.blocks_per_matrix % 2 != 0)) {
      continue;
    }
    const T* a = static_cast<const T*>(matrix.a) + tile.slot * matrix.slot_stride +
                 tile.expert * matrix.expert_stride;
    MoeShrinkPair<T> pair{thread < tile.count ? permutation[tile.start + thread] : -1};
    if (many) {
      pair.publish(p, tile.slot, shared);
      __syncthreads();
      if (work.count <= kMoeTilePairs / 2) {
        shrink_many<T, Traits::kManyBlocks, kMoeTilePairs / 2, Traits::kSharedBytes, kVector,
                    kTwoWays>(p, work, a, matrix.row_stride, pair, share, shared, buffer);
      } else {
        shrink_many<T, Traits::kManyBlocks, kMoeTilePairs, Traits::kSharedBytes, kVector, kTwoWays>(
            p, work, a, matrix.row_stride, pair, share, shared, buffer);
      }
    } else if (work.count <= 8) {
      shrink_few<T, kRowBlocks, 1, Traits::kSharedBytes, kVector, kTwoWays>(
          p, work, a, matrix.row_stride, tile.slot, pair, share, shared, buffer);
    } else {
      shrink_few<T, kRowBlocks, 2, Traits::kSharedBytes, kVector, kTwoWays>(
          p, work, a, matrix.row_stride, tile.slot, pair, share, shared, buffer);
    }
  }
}

template <typename T, int kRowBlocks, bool kWide, bool kVector, bool kDeep = false>
cudaError_t launch(const MoeShrinkParams& params, LaunchShape shape, int most_blocks_per_sm,
                   void* stream) {
  shape.shared_bytes = MoeShrinkTraits<kRowBlocks, kWide, kDeep>::kSharedBytes;
  if (kWide && params.num_pairs <= kThirdBlockPairs) {
    shape.shared_bytes = std::max(shape.shared_bytes, kTwoBlocksBytes);
  }
  if (most_blocks_per_sm > 0) {  // as much shared memory as keeps another one out
    const int bytes = device_properties().shared_bytes / (most_blocks_per_sm + 1);
    shape.shared_bytes = std::max(shape.shared_bytes, std::min(bytes, kMaxSharedBytes));
  }
  if constexpr (kVector) {
    if (params.members == 1) {
      return launch_kernel(moe_shrink_kernel<T, kRowBlocks, kWide, true, kDeep, false>, shape,
                           stream, params);
    }
  }
  // CTAs of up to 64 rows that share parts of K have no deep ring.
  return launch_kernel(moe_shrink_kernel < T, kRowBlocks, kWide, kVector, kDeep && kWide, true >,
                       shape, stream, params);
}

}  // namespace

bool moe_shrink_is_vector(const MoeApplyParams& p) {
  return is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0 &&
         is_multiple(p.a, p.slices.count, 8, 16);
}

cudaError_t moe_shrink(const MoeApplyParams& p, const MoeShrinkConfig& config) {
  const MoeWorkspace at(p, config.splits);
  const int num_matrices = p.a.rows_by_rank ? 1 : p.slices.count;
  const bool vector = moe_shrink_is_vector(p);
  MoeShrinkParams params{};
  params.routing = moe_routing(p);
  params.ranks = p.ranks;
  params.scalings = p.scalings;
  params.x = p.x;
  params.topk_weights = p.topk_weights;
  params.xa = static_cast<float*>(p.workspace);
  params.x_stride = p.x_stride;
  params.xa_row_stride = at.row_stride;
  params.xa_plane = at.plane;
  params.x_divisor = MoePairDivisor(p.x_divisor);
  params.num_slots = p.num_slots;
  params.num_experts = p.num_experts;
  params.num_pairs = static_cast<int32_t>(p.num_pairs);
  params.in_features = static_cast<int32_t>(p.in_features);
  params.max_rank = p.max_rank;
  params.xa_rank_stride = static_cast<int32_t>(at.rank_stride);
  params.num_slices = p.slices.count;
  params.splits = config.splits;
  params.members = config.members;
  params.member_features = config.member_features;
  params.few_tiles = config.few_tiles;
  params.split_features = config.split_features;
  params.blocks_per_matrix = config.blocks / num_matrices;
  params.prefetch_features = config.prefetch_features;
  // Copies of the expand would come before those of a shrink that has nothing in L2 yet.
  params.expand_later = config.prefetch_features == 0;
  params.packed = p.a.rows_by_rank && p.slices.count > 1;
  params.float_weights = p.weights_dtype == DType::kFloat32;
  for (int i = 0; i < num_matrices; ++i) {
    params.matrices[i] = {p.a.base[i], p.a.slot_stride[i], p.a.expert_stride[i], p.a.row_stride[i]};
  }
  const bool wide = params.blocks_per_matrix > 1 && config.row_blocks == 4;
  const int most_per_sm = moe_shrink_blocks_per_sm(p.num_pairs, config.row_blocks, wide);
  LaunchShape shape{};
  const int blocks = config.blocks * config.splits;
  const int64_t rows =
      moe_grid_tiles(p.num_pairs, moe_groups(p), blocks, device_properties().sm_count, most_per_sm);
  shape.grid = dim3(static_cast<unsigned>(blocks * config.members),
                    static_cast<unsigned>(ceil_div(rows, config.members)));
  shape.threads = kMoeThreads;
  shape.cluster = config.members;
  shape.dependent = true;
  shape.shared_percent = config.shared_percent;
  // Two slices up to rank 16, whose expand is small enough to be beside two such CTAs; or more
  // rows, where many have work on an SM alone (T512 shared, rank 64: 53.9 -> 51.0 us, but T32 45.1
  // -> 45.6).
  const bool deep =
      p.num_pairs <= kThirdBlockPairs &&
      (wide ? p.num_pairs >= kDeepPairs : p.max_rank <= 16 && !config.small && config.members == 1);
  return dispatch_half(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (!vector) {
      return launch<T, 1, false, false>(params, shape, config.most_blocks_per_sm, p.stream);
    }
    switch (config.row_blocks) {
      case 1:
        return launch<T, 1, false, true>(params, shape, config.most_blocks_per_sm, p.stream);
      case 2:
        return deep ? launch<T, 2, false, true, true>(params, shape, config.most_blocks_per_sm,
                                                      p.stream)
                    : launch<T, 2, false, true>(params, shape, config.most_blocks_per_sm, p.stream);
      default:
        if (wide) {
          return deep
                     ? launch<T, 4, true, true, true>(params, shape, config.most_blocks_per_sm,
                                                      p.stream)
                     : launch<T, 4, true, true>(params, shape, config.most_blocks_per_sm, p.stream);
        }
        return launch<T, 4, false, true>(params, shape, config.most_blocks_per_sm, p.stream);
    }
  });
}

}  // namespace lora_ext::cuda

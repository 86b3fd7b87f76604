// The base product of a few dozen tokens with their adapters folded in, on sm_90a:
// y = x W^T + bias + xa B^T, each element rounded once.
//
// A CTA has a tile of 128 rows of W, all tokens as its columns, and a part of K; the parts of a
// tile are a cluster. One warp copies boxes of W and x, a ring ahead, and two warpgroups multiply
// them (wgmma), 64 rows each. Then the cluster's CTAs share the tokens, in groups of 8: each gets
// the others' sums of its groups through distributed shared memory, adds them up in fixed order,
// and finishes them. Two CTAs fit an SM, so that one's end is covered by another's stream.
//
// Three more warps bring together what the adapters need while the product is under way: the
// batch's slots, and xa of the CTA's groups as soon as the shrink, which was launched just before,
// has left it. B comes through the ring, amid W. The expand is then a few products on the sums in
// registers, whose layout mma.sync shares: 16 rows by 8 tokens, for each slot that has one of them.
#pragma once

#include "common/wgmma.cuh"
#include "kernels/linear_wgmma_adapters.cuh"
#include "kernels/linear_wgmma_shared.cuh"

namespace lora_ext::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// By one warp.
template <typename Traits>
__device__ __forceinline__ void copy_boxes(const LinearWgmmaParams& p, const LinearMaps& maps,
                                           typename Traits::Shared& shared,
                                           const LinearPart& part) {
  const bool leads = threadIdx.x % 32 == 0;
  int stage = 0;
  uint32_t turn = 1;
  const auto advance = [&] {
    if (++stage == Traits::kStages) {
      stage = 0, turn ^= 1;
    }
  };
  const auto copy_steps = [&](int first, int end) {
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      if (leads) {
        device::barrier_wait(&shared.empty[stage], turn);
        uint64_t* full = &shared.full[stage];
        device::barrier_arrive_expecting(full, Traits::kStageBytes);
        unsigned char* to = shared.ring + stage * Traits::kStageBytes;
        device::copy_box(to, &maps.weight, step * kBoxColumns, part.first_row, full);
        device::copy_box(to + Traits::kWeightBytes, &maps.x, step * kBoxColumns, 0, full);
      }
      advance();
    }
    __syncwarp();
  };
  copy_steps(part.begin, part.middle);
  device::barrier_wait(&shared.found, 0);
  const uint32_t own = part.groups<Traits::kGroups>();
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    const auto& from = p.slices[slice];
    const int bytes = Traits::slot_bytes(p.batch.max_rank), slots = Traits::slots(p.batch.max_rank);
    const int first_row = max(part.first_row, from.first_column);
    const int rows = min(part.end_row(p), from.end_column) - first_row;
    const int row_bytes = 2 * p.batch.max_rank, skipped = (first_row - part.first_row) * row_bytes;
    const char* const b = static_cast<const char*>(from.b) +
                          int64_t{from.first_row + first_row - from.first_column} * row_bytes;
    for (uint32_t left = entries_of<Traits>(shared, own); left != 0;) {
      device::barrier_wait(&shared.empty[stage], turn);
      uint64_t* full = &shared.full[stage];
      unsigned char* to = shared.ring + stage * Traits::kStageBytes + skipped;
      const int count = min(slots, __popc(left));
      if (leads) {
        device::barrier_arrive_expecting(full, count * rows * row_bytes);
      }
      for (int i = 0; i < count; ++i) {
        const int slot = shared.entry[take_first(left)].slot;
        if (leads) {
          device::copy_bulk(to + i * bytes, b + 2 * slot * from.slot_stride, rows * row_bytes,
                            full);
        }
      }
      advance();
    }
  }
  copy_steps(part.middle, part.end);
}

// The result, rounded; matrices of 8 x 8 are turned so that a lane has neighbours of y.
template <typename T, typename Traits>
__device__ __forceinline__ void store_rows(const LinearWgmmaParams& p, int warp_row, uint32_t own,
                                           const float (&sums)[Traits::kTokens / 2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  float bias[2] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 8 * h + g;
      bias[h] = row < p.out_features ? device::to_float(static_cast<const T*>(p.bias)[row]) : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < Traits::kGroups; ++j) {
    if ((own >> j & 1) == 0) {
      continue;
    }
    const int token = 8 * j + g;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t pair = device::transpose(
          device::pack<T>(sums[4 * j + 2 * h] + bias[h], sums[4 * j + 2 * h + 1] + bias[h]));
      const int row = warp_row + 8 * h + 2 * q;
      if (token < p.batch.num_tokens && row < p.out_features) {
        T* to = static_cast<T*>(p.y) + token * p.y_stride + row;
        if (p.pairs) {
          *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
          reinterpret_cast<uint16_t*>(to)[0] = static_cast<uint16_t>(pair);
          if (row + 1 < p.out_features) {
            reinterpret_cast<uint16_t*>(to)[1] = static_cast<uint16_t>(pair >> 16);
          }
        }
      }
    }
  }
}

template <typename T, typename Traits>
__device__ __forceinline__ void multiply(const LinearWgmmaParams& p,
                                         typename Traits::Shared& shared, const LinearPart& part) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int xa_stride = Traits::xa_stride(p.batch.max_rank);
  float4* const others = reinterpret_cast<float4*>(shared.xa + Traits::kTokens * xa_stride);
  const int own_groups = Traits::own_groups(part.cluster);
  int stage = 0;
  uint32_t turn = 0;
  const auto free = [&](int used) {
    if (lane == 0) {
      device::barrier_arrive(&shared.empty[used]);
    }
  };
  const auto advance = [&] {
    if (++stage == Traits::kStages) {
      stage = 0, turn ^= 1;
    }
  };
  float sums[Traits::kTokens / 2];
#pragma unroll
  for (int i = 0; i < Traits::kTokens / 2; ++i) {
    sums[i] = 0.0f;
  }
  const auto products = [&](int count) {
    int used = -1;
#pragma unroll 1
    for (; count > 0; --count) {
      device::barrier_wait(&shared.full[stage], turn);
      const unsigned char* data = shared.ring + stage * Traits::kStageBytes;
      const uint64_t weights = device::swizzled_tile(data + group * (Traits::kWeightBytes / 2));
      const uint64_t tokens = device::swizzled_tile(data + Traits::kWeightBytes);
      device::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kBoxColumns / 16; ++kk) {
        device::wgmma<T, Traits::kTokens>(sums, weights + 2 * kk, tokens + 2 * kk);
      }
      device::wgmma_commit();
      device::wgmma_wait<1>();
      if (used >= 0) {
        free(used);
      }
      used = stage;
      advance();
    }
    device::wgmma_wait<0>();
    if (used >= 0) {
      free(used);
    }
  };
  products(part.middle - part.begin);
  const uint32_t own = part.groups<Traits::kGroups>();
  const int warp_row = part.first_row + threadIdx.x / 32 * 16;
  device::barrier_wait(&shared.found, 0);
  uint32_t xa_turn = 0;
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    const auto& from = p.slices[slice];
    bool has_row[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 8 * h + lane / 4;
      has_row[h] = row >= from.first_column && row < from.end_column;
    }
    device::barrier_wait(&shared.xa_full, xa_turn);
    xa_turn ^= 1;
    const int bytes = Traits::slot_bytes(p.batch.max_rank), slots = Traits::slots(p.batch.max_rank);
    for (uint32_t left = entries_of<Traits>(shared, own); left != 0;) {
      device::barrier_wait(&shared.full[stage], turn);
      const unsigned char* b = shared.ring + stage * Traits::kStageBytes +
                               (threadIdx.x / 32 * 16 + lane / 4) * 2 * p.batch.max_rank +
                               lane % 4 * 8;
      const int count = min(slots, __popc(left));
#pragma unroll 1
      for (int i = 0; i < count; ++i, b += bytes) {
        const int entry = take_first(left), rank = shared.entry[entry].rank;
        const uint32_t groups = shared.entry[entry].groups & own;
#pragma unroll 1
        for (int first = 0; first < rank; first += 16) {
          add_ranks<T, Traits>(shared, entry, first, rank, groups, b + 2 * first,
                               16 * p.batch.max_rank, has_row, xa_stride, sums);
        }
      }
      __syncwarp();
      free(stage);
      advance();
    }
    __syncwarp();
    if (lane == 0) {
      device::barrier_arrive(&shared.xa_empty);
    }
  }
  products(part.end - part.middle);
  // Each group's sums to the CTA that finishes it.
  if (part.cluster > 1) {
    const auto counter = [&](int owner) { return device::peer_address(&shared.sums_full, owner); };
#pragma unroll
    for (int j = 0; j < Traits::kGroups; ++j) {
      const int owner = j % part.cluster;
      if (owner != part.member) {
        const int from = part.member - (part.member > owner ? 1 : 0);
        const float4* to =
            others + (from * own_groups + j / part.cluster) * kLinearConsumers + threadIdx.x;
        device::store_peer_async(
            device::peer_address(to, owner),
            make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]),
            counter(owner));
      }
    }
  }
  if (own == 0) {
    return;
  }
  if (part.cluster > 1) {
    device::barrier_wait(&shared.sums_full, 0);
#pragma unroll
    for (int j = 0; j < Traits::kGroups; ++j) {
      if (own >> j & 1) {
#pragma unroll 1
        for (int c = 0; c < part.cluster - 1; ++c) {
          const float4 other =
              others[(c * own_groups + j / part.cluster) * kLinearConsumers + threadIdx.x];
          sums[4 * j] += other.x, sums[4 * j + 1] += other.y;
          sums[4 * j + 2] += other.z, sums[4 * j + 3] += other.w;
        }
      }
    }
  }
  store_rows<T, Traits>(p, warp_row, own, sums);
}
#endif

template <typename T, typename Traits>
__global__ void __launch_bounds__(kLinearWgmmaBound, 2)
    linear_wgmma_kernel(const __grid_constant__ LinearWgmmaParams p,
                        const __grid_constant__ LinearMaps maps, int cluster) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1)));
  const int thread = threadIdx.x;
  const LinearPart part(p, cluster);
  if (thread == kLinearConsumers) {
    device::prefetch_map(&maps.weight);
    device::prefetch_map(&maps.x);
    for (int i = 0; i < Traits::kStages; ++i) {
      device::barrier_init(&shared.full[i], 1);
      device::barrier_init(&shared.empty[i], kLinearConsumers / 32);
    }
    device::barrier_init(&shared.xa_full, kLinearHelpers / 32);
    device::barrier_init(&shared.xa_empty, kLinearConsumers / 32);
    device::barrier_init(&shared.found, kLinearHelpers / 32);
    device::barrier_init(&shared.sums_full, 1);
    device::barrier_init_fence();
    device::barrier_arrive_expecting(
        &shared.sums_full,
        (cluster - 1) * __popc(part.groups<Traits::kGroups>()) * kLinearConsumers * 16);
  }
  __syncwarp();
  if (cluster > 1) {
    device::cluster_arrive();
  }
  if (thread / 32 == kLinearConsumers / 32) {
    device::cta_barrier_arrive(0, kLinearWgmmaThreads);  // the copies need not wait
  } else {
    device::cta_barrier_sync(0, kLinearWgmmaThreads);
  }
  if (thread < kLinearConsumers) {
    device::more_registers<88>();
    if (cluster > 1) {
      device::cluster_wait();
    }
    multiply<T, Traits>(p, shared, part);
  } else {
    device::fewer_registers<64>();
    if (thread < kLinearConsumers + 32) {
      copy_boxes<Traits>(p, maps, shared, part);
      device::grid_dependency_launch();
    } else {
      help<T, Traits>(p, shared, part, thread - kLinearConsumers - 32);
    }
    if (cluster > 1) {
      device::cluster_wait();
    }
  }
#endif
}

}  // namespace lora_ext::cuda

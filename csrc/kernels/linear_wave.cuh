// The base product of up to 256 tokens with their adapters folded in, on sm_90a, for a W whose rows
// are one wave of tiles: y = x W^T + bias + xa B^T, each element rounded once.
//
// A CTA has as many rows of W as its registers can hold the sums of, for all tokens, and all of K:
// so no sums move, and the chip has one wave of CTAs where tiles of 128 rows would be almost two.
// Tokens are the 64-row operand of the products. Two warpgroups multiply what is copied to a ring,
// a step of K of W and x at a time; warps of their own for the copies would have no registers, so
// the last warp that is done with a place in the ring asks for what comes there next.
//
// The adapters are more steps of K: B of each slot in the batch by xa of its own tokens, in two
// halves of 16 bits, and by zeros for all others (linear_wave_xa.cuh).
#pragma once

#include <type_traits>

#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/linear_wave_shared.cuh"

namespace lora_ext::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// By one warp: what the batch has of adapters.
template <typename Traits>
__device__ __forceinline__ void find_adapters(const LinearWaveParams& p,
                                              typename Traits::Shared& shared) {
  constexpr int kWords = sizeof(WaveEntries) / 4;
  static_assert(kWords <= 32);
  const int lane = threadIdx.x % 32;
  device::grid_dependency_wait();
  if (lane < kWords) {
    reinterpret_cast<int*>(&shared.entries)[lane] =
        __ldcg(reinterpret_cast<const int*>(p.entries) + lane);
  }
  __syncwarp();
  // A lane for each of a slice's steps.
  const int entries = shared.entries.count;
  const int of_slice = (entries + kWaveStepSlots - 1) / kWaveStepSlots;
  const WaveRows own(p);
  int steps = 0;
  for (int slice = 0; slice < p.num_slices; ++slice) {
    const int2 rows = own.of(p, slice);
    if (rows.x >= rows.y) {
      continue;
    }
    if (lane < of_slice) {
      const auto& from = p.slices[slice];
      WaveAdapterStep& step = shared.adapters[steps + lane];
      step.xa = p.xa + WaveXa<Traits::kTokens>::box(slice, lane);
      step.first_row = rows.x, step.end_row = rows.y;
      step.first = lane * kWaveStepSlots;
      step.count = min(kWaveStepSlots, entries - step.first);
      for (int i = 0; i < kWaveStepSlots; ++i) {
        step.rank[i] = 0;
        if (i >= step.count) {
          continue;
        }
        const auto& entry = shared.entries.of[step.first + i];
        step.rank[i] = entry.rank;
        step.b[i] =
            static_cast<const char*>(from.b) + 2 * entry.slot * from.slot_stride +
            2 * kLinearWaveRank * int64_t{from.first_row + own.first + rows.x - from.first_column};
      }
    }
    steps += of_slice;
  }
  if (lane == 0) {
    shared.steps += steps;
  }
  __syncwarp();
}

// By one thread: a step of W and x.
template <typename Traits>
__device__ __forceinline__ void copy_step(const WaveMaps& maps, typename Traits::Shared& shared,
                                          int stage, int step) {
  uint64_t* full = &shared.full[stage];
  unsigned char* to = shared.ring + stage * Traits::kStageBytes;
  device::barrier_arrive_expecting(full, Traits::kStageBytes);
  device::copy_box(to, &maps.weight, step * kBoxColumns,
                   static_cast<int>(blockIdx.x) * kLinearWaveRows, full);
  device::copy_box(to + Traits::kWeightBytes, &maps.x, step * kBoxColumns, 0, full);
}

// By one thread: one of the adapters, B as it lies in memory.
template <typename Traits>
__device__ __forceinline__ void copy_adapters(typename Traits::Shared& shared, int stage,
                                              int step) {
  const WaveAdapterStep& from = shared.adapters[step];
  const int bytes = (from.end_row - from.first_row) * (2 * kLinearWaveRank);
  uint64_t* full = &shared.full[stage];
  unsigned char* to = shared.ring + stage * Traits::kStageBytes;
  device::barrier_arrive_expecting(full, Traits::kTokenBytes + from.count * bytes);
  device::copy_bulk(to + Traits::kWeightBytes, from.xa, Traits::kTokenBytes, full);
#pragma unroll
  for (int i = 0; i < kWaveStepSlots; ++i) {
    if (i < from.count) {
      device::copy_bulk(to + i * Traits::kSlotBytes + from.first_row * (2 * kLinearWaveRank),
                        from.b[i], bytes, full);
    }
  }
}

// Two values of T, of which only the first `valid` count, as bf16: the value, and for fp16 what it
// lacks. `poisoned` where one is not finite: it becomes 0.
template <typename T>
__device__ __forceinline__ uint32_t arrange_pair(uint32_t pair, int valid, uint32_t& rest,
                                                 bool& poisoned) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7c00 : 0x7f80;
  pair = valid >= 2 ? pair : valid == 1 ? pair & 0xffff : 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if ((pair >> 16 * h & kExponent) == kExponent) {
      poisoned = true;
      pair &= 0xffff0000u >> 16 * h;
    }
  }
  if constexpr (std::is_same_v<T, __half>) {
    uint32_t high;
    device::split_two<__nv_bfloat16>(device::unpack<T>(pair, 0), device::unpack<T>(pair, 1), high,
                                     rest);
    return high;
  } else {
    return pair;
  }
}

// B of a step's slots as the products want it: nothing behind a slot's rank, whatever is there, nor
// in rows of another slice; a row's two halves in the swizzle of 32 bytes.
template <typename T, typename Traits>
__device__ __forceinline__ void arrange(typename Traits::Shared& shared,
                                        const WaveAdapterStep& step, unsigned char* slots) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kWaveStepSlots * kLinearWaveRows; i += kWaveThreads) {
    const int which = i / kLinearWaveRows, row = i - which * kLinearWaveRows;
    uint4* const at =
        reinterpret_cast<uint4*>(slots + which * Traits::kSlotBytes + row * (2 * kLinearWaveRank));
    const bool has = row >= step.first_row && row < step.end_row;
    const int rank = has ? step.rank[which] : 0;
    const int turned = row / 4 % 2;
    bool poisoned = false;
    uint4 rest[2], value[2] = {at[0], at[1]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int valid = rank - 8 * h;
      value[h] = make_uint4(arrange_pair<T>(value[h].x, valid, rest[h].x, poisoned),
                            arrange_pair<T>(value[h].y, valid - 2, rest[h].y, poisoned),
                            arrange_pair<T>(value[h].z, valid - 4, rest[h].z, poisoned),
                            arrange_pair<T>(value[h].w, valid - 6, rest[h].w, poisoned));
    }
    at[turned] = value[0], at[turned ^ 1] = value[1];
    if constexpr (std::is_same_v<T, __half>) {
      at[Traits::kHalfBytes / 16 + turned] = rest[0];
      at[Traits::kHalfBytes / 16 + (turned ^ 1)] = rest[1];
    }
    if (poisoned) {
      atomicOr(&shared.poisoned, 1u << (step.first + which));
    }
  }
  device::fence_shared_for_products();
}

// Adds what the products were spared to the results of a warp's 16 tokens: whatever an adapter has
// that is not finite stays with its own tokens.
template <typename T, typename Traits>
__device__ __forceinline__ void add_poison(const LinearWaveParams& p,
                                           const typename Traits::Shared& shared, int first_token) {
  const WaveRows rows(p);
  for (int i = threadIdx.x % 32; i < 16 * kLinearWaveRows; i += 32) {
    const int token = first_token + i / kLinearWaveRows;
    const int row = rows.first + i % kLinearWaveRows;
    if (token >= p.num_tokens || row >= rows.end) {
      continue;
    }
    const int slot = __ldg(p.token_slots + token);
    for (int e = 0; e < shared.entries.count; ++e) {
      for (int slice = 0; slice < p.num_slices; ++slice) {
        const auto& from = p.slices[slice];
        if (shared.entries.of[e].slot != slot || row < from.first_column ||
            row >= from.end_column) {
          continue;
        }
        const T* const b = static_cast<const T*>(from.b) + slot * from.slot_stride +
                           int64_t{from.first_row + row - from.first_column} * kLinearWaveRank;
        T& result = static_cast<T*>(p.y)[token * p.y_stride + row];
        for (int j = 0; j < shared.entries.of[e].rank; ++j) {
          const float value = device::to_float(b[j]);
          if (!isfinite(value)) {
            const float xa = device::to_float(*reinterpret_cast<const __nv_bfloat16*>(
                p.xa + WaveXa<Traits::kTokens>::at(slice, e, token, 0, j)));
            result = device::from_float<T>(device::to_float(result) + xa * value);
          }
        }
      }
    }
  }
}

// Rows of 32 bytes in the swizzle of as many.
__device__ __forceinline__ uint64_t narrow_tile(const void* start) {
  return (device::shared_address(start) & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{16} << 32 |
         uint64_t{3} << 62;
}

// The results of a warp's 16 tokens, turned in memory of its own that was the ring.
template <typename T, typename Traits>
__device__ __forceinline__ void store_tokens(const LinearWaveParams& p, int first_token,
                                             unsigned char* own,
                                             const float (&sums)[kLinearWaveRows / 2]) {
  constexpr int kChunks = kLinearWaveRows / 8;
  const int lane = threadIdx.x % 32, q = lane % 4;
  const WaveRows rows(p);
  const T* const bias = static_cast<const T*>(p.bias) + rows.first + 2 * q;
#pragma unroll
  for (int n = 0; n < kChunks; n += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float add[2] = {};
      if (p.bias != nullptr && rows.first + 8 * (n + i) < rows.end) {
        add[0] = device::to_float(bias[8 * (n + i)]),
        add[1] = device::to_float(bias[8 * (n + i) + 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        pairs[2 * i + h] = device::pack<T>(sums[4 * (n + i) + 2 * h] + add[0],
                                           sums[4 * (n + i) + 2 * h + 1] + add[1]);
      }
    }
    device::stmatrix_x4(own + lane % 16 * Traits::kRowBytes + (n + lane / 16) * 16, pairs);
  }
  __syncwarp();
#pragma unroll 7
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int token = i / kChunks, chunk = i % kChunks, row = rows.first + 8 * chunk;
    const uint4 value =
        *reinterpret_cast<const uint4*>(own + token * Traits::kRowBytes + chunk * 16);
    if (first_token + token < p.num_tokens && row < rows.end) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + (first_token + token) * p.y_stride + row) =
          value;
    }
  }
  __syncwarp();
}

template <typename T, typename Traits>
__device__ __forceinline__ void multiply(const LinearWaveParams& p, const WaveMaps& maps,
                                         typename Traits::Shared& shared) {
  constexpr int kBlocks = Traits::kBlocks;
  constexpr uint64_t kBlock = 64 * kBoxColumns * 2 / 16;  // in a descriptor
  const int steps = (p.in_features + kBoxColumns - 1) / kBoxColumns;
  RingPlace<Traits::kStages> stage;
  // Behind a step: the last warp that is done with a place in the ring fills it again.
  const auto refill = [&](int used, int next) {
    if (threadIdx.x % 32 == 0 && device::is_last_of(&shared.used[used], kWaveThreads / 32)) {
      if (next < steps) {
        copy_step<Traits>(maps, shared, used, next);
      } else if (next < shared.steps) {
        copy_adapters<Traits>(shared, used, next - steps);
      }
    }
    __syncwarp();
  };
  const auto place_of = [&](int used) { return shared.ring + used * Traits::kStageBytes; };
  const auto tokens_of = [&](int used) {
    return device::swizzled_tile(place_of(used) + Traits::kWeightBytes) +
           threadIdx.x / 128 * kBlocks * kBlock;
  };
  float sums[kBlocks][kLinearWaveRows / 2];
  int used = -1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::barrier_wait(&shared.full[stage.index], stage.turn);
    const uint64_t tokens = tokens_of(stage.index);
    const uint64_t weights = device::swizzled_tile(place_of(stage.index));
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kBoxColumns / 16; ++kk) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        device::wgmma<T, kLinearWaveRows>(sums[b], tokens + b * kBlock + 2 * kk, weights + 2 * kk,
                                          kk == 0 && used < 0);
      }
    }
    device::wgmma_commit();
    device::wgmma_wait<1>();
    if (used >= 0) {
      refill(used, step + Traits::kStages - 1);
    }
    if (step == steps / 2 && threadIdx.x < 32) {
      find_adapters<Traits>(p, shared);
    }
    used = stage.index;
    stage.advance();
  }
  device::wgmma_wait<0>();
  refill(used, steps + Traits::kStages - 1);
  // The next step's B is arranged while this one's products are under way.
  const auto arrange_step = [&](RingPlace<Traits::kStages> place, int step) {
    device::barrier_wait(&shared.full[place.index], place.turn);
    arrange<T, Traits>(shared, shared.adapters[step - steps], place_of(place.index));
  };
  device::cta_barrier_sync(0, kWaveThreads);
  if (steps < shared.steps) {
    arrange_step(stage, steps);
  }
#pragma unroll 1
  for (int step = steps; step < shared.steps;) {
    device::cta_barrier_sync(0, kWaveThreads);
    // The upper halves of xa by B, the lower ones by it too, and for fp16 the upper ones by what B
    // as bf16 lacks.
    constexpr int kProducts = std::is_same_v<T, __half> ? 3 : 2;
    const uint64_t tokens = tokens_of(stage.index), slots = narrow_tile(place_of(stage.index));
    device::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kWaveStepSlots; ++i) {
#pragma unroll
      for (int product = 0; product < kProducts; ++product) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          device::wgmma<__nv_bfloat16, kLinearWaveRows>(
              sums[b], tokens + b * kBlock + 2 * (2 * i + product % 2),
              slots + (i * Traits::kSlotBytes + product / 2 * Traits::kHalfBytes) / 16);
        }
      }
    }
    device::wgmma_commit();
    used = stage.index;
    stage.advance();
    if (step + 1 < shared.steps) {
      arrange_step(stage, step + 1);
    }
    device::wgmma_wait<0>();
    refill(used, ++step + Traits::kStages - 1);
  }
  device::cta_barrier_sync(0, kWaveThreads);  // nobody needs the ring any more
  const int warp = threadIdx.x / 32;
  const int first_token = warp / 4 * kBlocks * 64 + warp % 4 * 16;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    store_tokens<T, Traits>(p, first_token + 64 * b, shared.ring + warp * (16 * Traits::kRowBytes),
                            sums[b]);
  }
  if (shared.poisoned != 0) {
    for (int b = 0; b < kBlocks; ++b) {
      add_poison<T, Traits>(p, shared, first_token + 64 * b);
    }
  }
}
#endif

template <typename T, typename Traits>
__global__ void __launch_bounds__(kWaveBound, 1)
    linear_wave_kernel(const __grid_constant__ LinearWaveParams p,
                       const __grid_constant__ WaveMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(
      unaligned + (-device::shared_address(unaligned) & (Traits::kAlignment - 1)));
  if (threadIdx.x == 0) {
    device::prefetch_map(&maps.weight);
    device::prefetch_map(&maps.x);
    for (int i = 0; i < Traits::kStages; ++i) {
      device::barrier_init(&shared.full[i], 1);
      shared.used[i] = 0;
    }
    device::barrier_init_fence();
    shared.steps = (p.in_features + kBoxColumns - 1) / kBoxColumns;
    shared.poisoned = 0;
    static_assert(Traits::kStages * kBoxColumns < kLinearWaveLeastFeatures / 2);
    for (int step = 0; step < Traits::kStages; ++step) {
      copy_step<Traits>(maps, shared, step, step);
    }
  }
  __syncthreads();
  multiply<T, Traits>(p, maps, shared);
  device::grid_dependency_launch();
#endif
}

}  // namespace lora_ext::cuda

// The base product of few tokens with their adapters folded in: y = x W^T + bias + xa B^T, each
// element rounded once. A stream of W: one CTA an SM, rows of W in equal shares, 16 at a time as
// the operand of the mma and the tokens as its other one (see decode_tile.cuh).
//
// Four warps are the stream. They divide K in steps of 32, and each lane copies W and x
// asynchronously to where it reads them itself, some steps ahead and across the passes that a CTA
// makes over its rows: no barrier stands between a copy and its use, and nothing ever stops it. The
// other four finish: they wait for the shrink, which was launched just before and works beside the
// stream, add up what it leaves, multiply with B, and join that with the stream's sums of a pass.
#pragma once

#include "kernels/linear_decode_finish.cuh"
#include "kernels/linear_decode_shared.cuh"

namespace lora_ext::cuda {

template <typename T, typename Traits>
__device__ __forceinline__ void stream(const LinearDecodeParams& p,
                                       typename Traits::Shared& shared) {
  constexpr int kTiles = Traits::kTiles, kBlocks = Traits::kBlocks, kStages = Traits::kStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const LinearShare share(p.out_features, kTiles);
  const int in_features = p.batch.in_features;
  const int steps = (in_features + Traits::kStep - 1) / Traits::kStep;

  // The copies, which run ahead. Rows of W and x are eight apart.
  unsigned char* const own = shared.ring + threadIdx.x * 16;
  const int k_lane = 32 * warp + 8 * q;
  const char* const x = static_cast<const char*>(p.x) + 2 * (g * p.x_stride + k_lane);
  const uint32_t x_rows = 16 * static_cast<uint32_t>(p.x_stride);
  const uint32_t weight_rows = 16 * static_cast<uint32_t>(p.weight_stride);
  const char* weights = nullptr;
  int copy_pass = 0, copy_step = 0, copy_tiles = 0, rows_left = 0, fill_at = 0;
  const auto begin_pass = [&](int pass) {
    const int tile = share.tile(pass);
    copy_tiles = share.tile(pass + 1) - tile;
    rows_left = p.out_features - 16 * tile - g;
    weights = static_cast<const char*>(p.weight) +
              2 * ((int64_t{16} * tile + g) * p.weight_stride + k_lane);
  };
  const auto copy = [&] {
    if (copy_pass < share.passes) {
      const int k = Traits::kStep * copy_step;
      const bool inside = k_lane + k < in_features;
      unsigned char* to = own + fill_at;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        device::copy_async_16(to + n * Traits::kSlotBytes, x + 2 * k + uint64_t{x_rows} * n,
                              inside && 8 * n + g < p.batch.num_tokens ? 16 : 0);
      }
      to += kBlocks * Traits::kSlotBytes;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (i / 2 < copy_tiles) {
          device::copy_async_16<true>(to + i * Traits::kSlotBytes,
                                      weights + 2 * k + uint64_t{weight_rows} * i,
                                      inside && 8 * i < rows_left ? 16 : 0);
        }
      }
      if (++copy_step == steps) {
        copy_step = 0;
        begin_pass(++copy_pass);
      }
    } else if (copy_step == 0) {  // all copies are on their way
      copy_step = 1;
      device::grid_dependency_launch();
    }
    device::copy_async_commit();
    fill_at += Traits::kStageBytes;
    fill_at = fill_at < kStages * Traits::kStageBytes ? fill_at : 0;
  };
  begin_pass(0);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    copy();
  }
  int use_at = 0;
  const auto read = [&](uint32_t(&words)[4], int slot) {
    const uint4 raw = *reinterpret_cast<const uint4*>(own + use_at + slot * Traits::kSlotBytes);
    words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
  };
#pragma unroll 1
  for (int pass = 0; pass < share.passes; ++pass) {
    const int tiles = share.tile(pass + 1) - share.tile(pass);
    float acc[kTiles][kBlocks][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy();
      device::copy_async_wait<kStages - 1>();
      uint32_t tokens[kBlocks][4];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        read(tokens[n], n);
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i < tiles) {
          uint32_t upper[4], lower[4];
          read(upper, kBlocks + 2 * i);
          read(lower, kBlocks + 2 * i + 1);
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
              device::mma<T>(acc[i][n], upper[w], lower[w], upper[w + 1], lower[w + 1],
                             tokens[n][w], tokens[n][w + 1]);
            }
          }
        }
      }
      use_at += Traits::kStageBytes;
      use_at = use_at < kStages * Traits::kStageBytes ? use_at : 0;
    }
    const int buffer = pass % Traits::kBuffers;
    if (pass >= Traits::kBuffers) {
      device::cta_barrier_sync(kSumsFree + buffer, Traits::kThreads);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          shared.sums[buffer][i][warp][8 * n + 2 * q + e % 2][8 * (e / 2) + g] = acc[i][n][e];
        }
      }
    }
    device::cta_barrier_arrive(kSumsFull + buffer, Traits::kThreads);
  }
}

// Two CTAs of so many registers would fit an SM: the other half is for the shrinks, this one's and
// the next one's.
template <typename T, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    linear_decode_kernel(const __grid_constant__ LinearDecodeParams p) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  if (threadIdx.x < Traits::kStreamThreads) {
    stream<T, Traits>(p, shared);
  } else {
    finish<T, Traits>(p, shared);
  }
}

}  // namespace lora_ext::cuda

// How a CTA of moe_shrink computes its rows of a tile of many pairs: what moves is x, or both from
// L2.
//
// On sm_90a by wgmma, which takes both operands from shared memory while the next steps are asked
// for: by mma.sync a step took 1.1 us whatever came from memory, since four warps each waited for
// their own loads and products, one behind the other. Elsewhere so: warps share the rows, two to a
// block of them, and the pairs, 16 at a time in turn.
#pragma once

#include "common/wgmma.cuh"
#include "kernels/moe_shrink_tiles.cuh"

namespace lora_ext::cuda {

// Steps of 64 values of K pass through shared memory, several ahead; no warp reads what another one
// could have read for it. Of up to kPairs pairs: the fewer have room, the more steps do.
template <typename T, int kBlocks, int kPairs, int kBufferBytes, bool kVector, bool kTwoWays>
__device__ __forceinline__ void shrink_many(const MoeShrinkParams& p, const MoeShrinkWork& work,
                                            const T* a, int64_t a_stride,
                                            const MoeShrinkPair<T>& own_pair, MoeShrinkShare& share,
                                            MoeShrinkShared& shared, unsigned char* buffer) {
  constexpr int kPiece = 64;  // values of K, 128 bytes of a row, which the swizzle spans
  constexpr int kStageBytes = (16 * kBlocks + kPairs) * kPiece * 2;
  // Products read 64 rows of x, so behind the last stage there is as much as they go beyond it.
  constexpr int kWeightsAt = kPairs * kPiece * 2;
  constexpr int kBeyond = kMoeTilePairs * kPiece * 2 - kStageBytes;
  constexpr int kStages = (kBufferBytes - (kBeyond > 0 ? kBeyond : 0)) / kStageBytes;
  constexpr int kCopyRows = kMoeThreads / 8, kCopiesX = kPairs / kCopyRows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  // The rows that this thread copies are fixed: only an offset moves.
  const int chunk = thread % 8, row = thread / 8;
  const int swizzled = (row * 8 + (chunk ^ row % 8)) * 16;
  const T* x_rows[kCopiesX];
#pragma unroll
  for (int i = 0; i < kCopiesX; ++i) {
    const int pair = shared.pairs[row + kCopyRows * i];
    x_rows[i] =
        pair >= 0 ? static_cast<const T*>(p.x) + p.x_divisor.token_of(pair) * p.x_stride + 8 * chunk
                  : nullptr;
  }
  const T* const a_row = a + (work.row0 + row) * a_stride + 8 * chunk;
  const int64_t a_step = kCopyRows * a_stride;
  const int rows_left = work.rows - work.row0 - row;
  const auto copy = [&](unsigned char* to, const T* from, int k) {
    if constexpr (kVector) {
      device::copy_async_16<true>(to, from + k, k + 8 * chunk < work.k_end ? 16 : 0);
    } else {
      device::Chunk<T, 8> values;
      device::load_scalars(values, from + k, work.k_end - k - 8 * chunk);
      *reinterpret_cast<device::Chunk<T, 8>*>(to) = values;
    }
  };
  int fill_at = 0, use_at = 0, k = work.k_begin;
  const int steps = (work.k_end - work.k_begin + kPiece - 1) / kPiece;
  const auto fetch = [&] {
    if (k < work.k_end) {
      unsigned char* to = buffer + fill_at + swizzled;
#pragma unroll
      for (int i = 0; i < kCopiesX; ++i) {
        if (x_rows[i] != nullptr) {
          copy(to + kCopyRows * i * 128, x_rows[i], k);
        }
      }
      to += kWeightsAt;
      const T* from = a_row;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i, from += a_step) {
        if (kCopyRows * i < rows_left) {
          copy(to + kCopyRows * i * 128, from, k);
        }
      }
      k += kPiece;
    }
    device::copy_async_commit();
    fill_at += kStageBytes;
    fill_at = fill_at < kStages * kStageBytes ? fill_at : 0;
  };
#pragma unroll 1
  for (int step = 1; step < kStages; ++step) {
    fetch();
  }
  own_pair.publish_scale(p, shared);
  if (p.expand_later) {
    device::grid_dependency_launch();
  }
  float* const out = p.xa + work.split * p.xa_plane;
  // Where row r of A goes in a row of the intermediate; -1: nowhere.
  const auto column_of = [&](int r) {
    const int slice = p.packed ? small_quotient(r, work.rank) : work.matrix;
    return r < work.rows ? slice * p.xa_rank_stride + (p.packed ? r - slice * work.rank : r) : -1;
  };
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // The pairs are the 64 rows of a warpgroup's product, A's rows its columns. What lies in places
  // of either that were not copied reaches only sums that nobody reads.
  float sums[8 * kBlocks];
#pragma unroll
  for (float& sum : sums) {
    sum = 0.0f;
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    device::fence_shared_for_products();
    device::wgmma_wait<0>();
    __syncthreads();  // this step's data are there, and the products of the stage that is filled
                      // next are done
    const uint64_t weights = device::swizzled_tile(buffer + use_at + kWeightsAt);
    const uint64_t tokens = device::swizzled_tile(buffer + use_at);
    device::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      device::wgmma<T, 16 * kBlocks>(sums, tokens + 2 * kk, weights + 2 * kk);
    }
    device::wgmma_commit();
    fetch();  // while the tensor cores are at work
    use_at += kStageBytes;
    use_at = use_at < kStages * kStageBytes ? use_at : 0;
  }
  device::wgmma_wait<0>();
  // sums[4 n + 2 h + e] is of pair 16 warp + 8 h + g, row 8 n + 2 q + e.
  if (kTwoWays && share.on) {
    constexpr int kRows = 16 * kBlocks, kStride = kRows + 4;
    constexpr int kTurn = 4 * kMoeThreads, kItems = kMoeTilePairs * kRows / 4;
    static_assert(kMoeTilePairs * kStride * 4 + (kItems + kTurn - 1) / kTurn * kTurn * 16 <=
                  kBufferBytes);  // its sums and those that come
    float* const own = reinterpret_cast<float*>(buffer);
    share.ring_is_free<kTwoWays>();
    __syncthreads();  // the buffer is for the sums now
#pragma unroll
    for (int n = 0; n < 2 * kBlocks; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(own + (16 * warp + 8 * h + g) * kStride + 8 * n + 2 * q) =
            make_float2(sums[4 * n + 2 * h], sums[4 * n + 2 * h + 1]);
      }
    }
    __syncthreads();
    finish_sums<1, kMoeTilePairs, kRows, kTwoWays>(p, work, shared, own, share);
    __syncthreads();
    return;
  }
  const bool even = !p.packed || work.rank % 2 == 0;
#pragma unroll
  for (int n = 0; n < 2 * kBlocks; ++n) {
    const int r = work.row0 + 8 * n + 2 * q, first = column_of(r), second = column_of(r + 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pair = shared.pairs[16 * warp + 8 * h + g];
      if (pair >= 0 && first >= 0) {
        const float scale = shared.scales[16 * warp + 8 * h + g];
        const float2 two =
            make_float2(sums[4 * n + 2 * h] * scale, sums[4 * n + 2 * h + 1] * scale);
        float* const to = out + pair * p.xa_row_stride;
        if (even && second >= 0) {
          *reinterpret_cast<float2*>(to + first) = two;
        } else {
          to[first] = two.x;
          if (second >= 0) {
            to[second] = two.y;
          }
        }
      }
    }
  }
#else
  constexpr int kRowGroups = kBlocks == 1 ? 1 : 2, kPairGroups = kMoeWarps / kRowGroups;
  constexpr int kOwnBlocks = kBlocks / kRowGroups,
                kOwnPairs = (kPairs / 16 + kPairGroups - 1) / kPairGroups;
  const int row_group = warp % kRowGroups, pair_group = warp / kRowGroups;
  float acc[kOwnBlocks][2 * kOwnPairs][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's data are there, and every warp is done with the stage that is
                      // filled next
    fetch();
    const unsigned char* tokens = buffer + use_at;
    const unsigned char* weights = tokens + kWeightsAt;
#pragma unroll
    for (int kk = 0; kk < kPiece / 16; ++kk) {
      uint32_t w[kOwnBlocks][4];
#pragma unroll
      for (int b = 0; b < kOwnBlocks; ++b) {
        const int r = 16 * (row_group * kOwnBlocks + b) + lane % 16;
        device::ldmatrix_x4(w[b], weights + (r * 8 + ((2 * kk + lane / 16) ^ r % 8)) * 16);
      }
#pragma unroll
      for (int n = 0; n < kOwnPairs; ++n) {
        const int first = 16 * (n * kPairGroups + pair_group);
        if (first < work.count) {
          uint32_t t[4];
          const int r = first + lane / 16 * 8 + lane % 8;
          device::ldmatrix_x4(t, tokens + (r * 8 + ((2 * kk + lane / 8 % 2) ^ r % 8)) * 16);
#pragma unroll
          for (int b = 0; b < kOwnBlocks; ++b) {
            device::mma<T>(acc[b][2 * n], w[b][0], w[b][1], w[b][2], w[b][3], t[0], t[1]);
            device::mma<T>(acc[b][2 * n + 1], w[b][0], w[b][1], w[b][2], w[b][3], t[2], t[3]);
          }
        }
      }
    }
    use_at += kStageBytes;
    use_at = use_at < kStages * kStageBytes ? use_at : 0;
  }
  int columns[kOwnBlocks][2];
#pragma unroll
  for (int b = 0; b < kOwnBlocks; ++b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      columns[b][h] = column_of(work.row0 + 16 * (row_group * kOwnBlocks + b) + 8 * h + g);
    }
  }
#pragma unroll
  for (int n = 0; n < 2 * kOwnPairs; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = 16 * (n / 2 * kPairGroups + pair_group) + n % 2 * 8 + 2 * q + e;
      const int pair = shared.pairs[at];
      if (pair >= 0) {
        const float scale = shared.scales[at];
        float* to = out + pair * p.xa_row_stride;
#pragma unroll
        for (int b = 0; b < kOwnBlocks; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (columns[b][h] >= 0) {
              to[columns[b][h]] = acc[b][n][2 * h + e] * scale;
            }
          }
        }
      }
    }
  }
#endif
  device::copy_async_wait<0>();
  __syncthreads();  // the pairs and the buffer are filled again
}

}  // namespace lora_ext::cuda

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

#include <cuda.h>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "kernels/decode_tile.cuh"
#include "kernels/linear_heuristics.h"
#include "kernels/tensor_map.h"

namespace lora_ext::cuda {

constexpr int kLinearConsumers = 256, kLinearHelpers = 96;
constexpr int kLinearWgmmaThreads = kLinearConsumers + 32 + kLinearHelpers;

// Barriers of the CTA; 0 is everybody's.
constexpr int kHelpers = 1;

struct LinearMaps {
  CUtensorMap weight, x;
};

struct alignas(64) LinearWgmmaParams {
  DecodeBatch batch;
  const void* bias;  // or null
  void* y;
  int64_t y_stride;
  int32_t out_features;
  bool pairs;  // y allows stores of two neighbours
  struct {
    const void* b;  // rows of max_rank values, one behind the other
    int64_t slot_stride;
    int32_t first_column, end_column, first_row;
  } slices[kMaxSlices];
};

template <int kTokens_, int kStages_>
struct LinearWgmmaTraits {
  static constexpr int kTokens = kTokens_, kStages = kStages_;
  static constexpr int kWeightBytes = kLinearTileRows * kBoxColumns * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kBoxColumns * 2;
  static constexpr int kGroups = kTokens / 8;
  // B of a tile in the ring: of as many slots as W's part of a stage has room for.
  static_assert(kWeightBytes >= 2 * kLinearTileRows * kLinearWgmmaMaxRank);
  LORA_EXT_HOST_DEVICE static int slot_bytes(int max_rank) {
    return 2 * kLinearTileRows * max_rank;
  }
  LORA_EXT_HOST_DEVICE static int slots(int max_rank) {
    return kWeightBytes / slot_bytes(max_rank);
  }
  static constexpr int kAlignment = 1024;
  struct Shared {
    unsigned char ring[kStages * kStageBytes];
    uint64_t full[kStages], empty[kStages], xa_full, xa_empty, found, sums_full;
    // Of each slot in the batch that has a rank.
    struct {
      int slot, rank;
      uint32_t groups;  // of 8 tokens, that it has one in
    } entry[kTokens];
    int entries;
    alignas(8) int token_entry[kTokens];  // -1: no adapter
    // Up to four tokens of one tile of the plan: where their sums are, in units of four tokens.
    struct Quad {
      int tile, quarter, entry;
    } quad[kTokens];
    alignas(16) int quad_token[kTokens][4];  // -1: none
    int quads;
    alignas(16) float xa[4];  // [token][ranks], then the others' sums, [CTA][own group][thread][4]
  };
  // In whole steps of 16, and two tokens' rows in different banks.
  LORA_EXT_HOST_DEVICE static int xa_stride(int max_rank) {
    const int ranks = (max_rank + 15) / 16 * 16;
    return ranks % 32 == 0 ? ranks + 16 : ranks;
  }
  LORA_EXT_HOST_DEVICE static int own_groups(int cluster) {
    return (kGroups + cluster - 1) / cluster;
  }
  static int shared_bytes(int max_rank, int cluster) {
    return static_cast<int>(sizeof(Shared)) + kTokens * xa_stride(max_rank) * 4 +
           (cluster - 1) * own_groups(cluster) * kLinearConsumers * 16 + kAlignment;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int kLinearWgmmaBound = kLinearWgmmaThreads;
#else
constexpr int kLinearWgmmaBound = 32;  // tells the launcher that the kernel is empty here
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What a CTA has to do. It finishes the groups of tokens that leave `member` when divided by
// `cluster`.
struct LinearPart {
  int cluster, member, first_row, begin, end;  // begin, end: steps of K
  // The step before which the adapters come, for which the stream of W waits: in the midst of it,
  // at another place for every second CTA, so that the other one of an SM streams meanwhile.
  int middle;

  __device__ __forceinline__ LinearPart(const LinearWgmmaParams& p, int cluster_)
      : cluster(cluster_), member(cluster_ > 1 ? device::cluster_rank() : 0) {
    first_row = static_cast<int>(blockIdx.x) / cluster * kLinearTileRows;
    const int steps = (p.batch.in_features + kBoxColumns - 1) / kBoxColumns;
    begin = steps * member / cluster;
    end = steps * (member + 1) / cluster;
    const bool late = (blockIdx.x / cluster + member) % 2 != 0;
    middle = begin + (end - begin) * (late ? 7 : 4) / 8;
  }
  template <int kGroups>
  __device__ __forceinline__ uint32_t groups() const {
    uint32_t mask = 0;
    for (int i = member; i < kGroups; i += cluster) {
      mask |= 1u << i;
    }
    return mask;
  }
  __device__ __forceinline__ int end_row(const LinearWgmmaParams& p) const {
    return min(first_row + kLinearTileRows, p.out_features);
  }
  __device__ __forceinline__ bool has(const LinearWgmmaParams& p, int slice) const {
    return max(first_row, p.slices[slice].first_column) <
           min(end_row(p), p.slices[slice].end_column);
  }
};

// The slots with tokens among the CTA's, as a mask of their entries. By whole warps.
template <typename Traits>
__device__ __forceinline__ uint32_t entries_of(const typename Traits::Shared& shared,
                                               uint32_t own) {
  static_assert(Traits::kTokens <= 32);
  const int lane = threadIdx.x % 32;
  return __ballot_sync(0xffffffffu,
                       lane < shared.entries && (shared.entry[lane].groups & own) != 0);
}
__device__ __forceinline__ int take_first(uint32_t& mask) {
  const int first = __ffs(static_cast<int>(mask)) - 1;
  mask &= mask - 1;
  return first;
}

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

// By the helpers: the batch's slots, and of each the groups of tokens.
template <typename Traits>
__device__ __forceinline__ void find_entries(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int thread) {
  for (int i = thread; i < Traits::kTokens; i += kLinearHelpers) {
    shared.token_entry[i] = -1;
    shared.entry[i].groups = 0;
  }
  if (thread < 32) {
    int entries = 0, quads = 0, last = -1;
    const int tiles = min(p.tile_capacity, Traits::kTokens);
#pragma unroll 1
    for (int first = 0; first < tiles; first += 32) {
      const int tile = first + thread;
      const int4 raw = __ldcg(reinterpret_cast<const int4*>(p.tiles + min(tile, tiles - 1)));
      const bool exists = tile < tiles && raw.x >= 0;
      const int slot = exists ? raw.x : -1;
      const int rank = exists ? min(__ldcg(p.ranks + slot), p.max_rank) : 0;
      int before = __shfl_up_sync(0xffffffffu, slot, 1);
      before = thread == 0 ? last : before;
      const bool begins = rank > 0 && slot != before;
      const unsigned beginners = __ballot_sync(0xffffffffu, begins);
      const int at = entries + __popc(beginners & ((2u << thread) - 1)) - 1;
      if (begins) {
        shared.entry[at].slot = slot;
        shared.entry[at].rank = rank;
      }
      const int own = rank > 0 ? (raw.z + 3) / 4 : 0;
      int upto = own;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, d);
        upto += thread >= d ? other : 0;
      }
      // More than the CTA has room for are those of a plan for more tokens than this call has.
      for (int i = 0; i < own; ++i) {
        const int quad = quads + upto - own + i;
        if (quad < Traits::kTokens) {
          shared.quad[quad] = {tile, i, at};
          // Where the permutation has them, for now.
          shared.quad_token[quad][0] = raw.y + 4 * i;
          shared.quad_token[quad][1] = raw.y + raw.z;
        }
      }
      entries += __popc(beginners);
      quads += __shfl_sync(0xffffffffu, upto, 31);
      last = __shfl_sync(0xffffffffu, slot, 31);
      if (last < 0) {
        break;
      }
    }
    if (thread == 0) {
      shared.entries = entries;
      shared.quads = min(quads, Traits::kTokens);
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
  for (int i = thread; i < shared.quads; i += kLinearHelpers) {
    const int at = shared.quad_token[i][0], end = shared.quad_token[i][1],
              entry = shared.quad[i].entry;
    int tokens[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      tokens[e] = at + e < end ? __ldcg(p.permutation + at + e) : -1;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = tokens[e] < p.num_tokens ? tokens[e] : -1;
      shared.quad_token[i][e] = token;
      if (token >= 0) {
        shared.token_entry[token] = entry;
        atomicOr(&shared.entry[entry].groups, 1u << token / 8);
      }
    }
  }
  device::cta_barrier_sync(kHelpers, kLinearHelpers);
}

// xa of a slice for the groups of tokens that the CTA has, from the parts of the shrink:
// [token][ranks], zeros up to whole steps of 16.
template <typename Traits>
__device__ __forceinline__ void add_up_slice(const DecodeBatch& p, typename Traits::Shared& shared,
                                             int slice, uint32_t own, int splits, int thread) {
  constexpr int kParts = 8;
  const int64_t stride = int64_t{p.num_slices} * p.max_rank * kTileTokens;
  const int xa_stride = Traits::xa_stride(p.max_rank);
  const int ranks = (p.max_rank + 15) / 16 * 16, items = shared.quads * ranks;
  int quad = small_quotient(thread, ranks), j = thread - quad * ranks;
  const auto advance = [&] {
    for (j += kLinearHelpers; j >= ranks; j -= ranks) {
      ++quad;
    }
  };
#pragma unroll 1
  for (int i = thread; i < items; i += kLinearHelpers, advance()) {
    const auto at = shared.quad[quad];
    const int4 tokens = *reinterpret_cast<const int4*>(shared.quad_token[quad]);
    const int token[4] = {tokens.x, tokens.y, tokens.z, tokens.w};
    const auto has = [&](int e) { return token[e] >= 0 && (own >> token[e] / 8 & 1) != 0; };
    if (!has(0) && !has(1) && !has(2) && !has(3)) {
      continue;
    }
    const int rank = shared.entry[at.entry].rank;
    float4 sum = make_float4(0, 0, 0, 0);
    if (j < rank) {
      const float scaling = __ldcg(p.scalings + shared.entry[at.entry].slot);
      const float* from =
          p.partial + at.tile * splits * stride + (slice * rank + j) * kTileTokens + 4 * at.quarter;
      for (int c = 0; c < splits; c += kParts) {
        float4 parts[kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          parts[k] =
              __ldcg(reinterpret_cast<const float4*>(from + min(c + k, splits - 1) * stride));
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          if (c + k < splits) {
            sum.x += parts[k].x, sum.y += parts[k].y, sum.z += parts[k].z, sum.w += parts[k].w;
          }
        }
      }
      sum.x *= scaling, sum.y *= scaling, sum.z *= scaling, sum.w *= scaling;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (has(e)) {
        shared.xa[token[e] * xa_stride + j] = values[e];
      }
    }
  }
}

template <typename T, typename Traits>
__device__ __forceinline__ void help(const LinearWgmmaParams& p, typename Traits::Shared& shared,
                                     const LinearPart& part, int thread) {
  device::grid_dependency_wait();
  find_entries<Traits>(p.batch, shared, thread);
  if (thread % 32 == 0) {
    device::barrier_arrive(&shared.found);
  }
  const int splits = p.batch.split_rules.parts(__ldcg(p.batch.header + kNumTiles));
  uint32_t turn = 1;
  for (int slice = 0; slice < p.batch.num_slices && shared.entries > 0; ++slice) {
    if (!part.has(p, slice)) {
      continue;
    }
    device::barrier_wait(&shared.xa_empty, turn);
    turn ^= 1;
    add_up_slice<Traits>(p.batch, shared, slice, part.groups<Traits::kGroups>(), splits, thread);
    __syncwarp();
    if (thread % 32 == 0) {
      device::barrier_arrive(&shared.xa_full);
    }
  }
}

// What a step of 16 ranks of a slot adds to a warp's 16 rows of W. `b`: the lane's four ranks of
// row g, as they were copied.
template <typename T, typename Traits>
__device__ __forceinline__ void add_ranks(const typename Traits::Shared& shared, int entry,
                                          int first, int rank, uint32_t groups,
                                          const unsigned char* b, int eight_rows,
                                          const bool (&has_row)[2], int xa_stride,
                                          float (&sums)[Traits::kTokens / 2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  uint32_t a[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint2 words = *reinterpret_cast<const uint2*>(b + h * eight_rows);
    // What lies behind the rank must not count, whatever it is.
    const int valid = has_row[h] ? rank - first - 4 * q : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      a[e / 2][h + e % 2 * 2] =
          e < valid ? __float_as_uint(device::unpack<T>(e < 2 ? words.x : words.y, e % 2)) : 0u;
    }
  }
  const float* const xa = shared.xa + g * xa_stride + first + 4 * q;
#pragma unroll
  for (int j = 0; j < Traits::kGroups; ++j) {
    if (groups >> j & 1) {
      const float4 values = *reinterpret_cast<const float4*>(xa + 8 * j * xa_stride);
      const float ranks[4] = {values.x, values.y, values.z, values.w};
      float d[4] = {}, e[4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = ranks[2 * s + i];
          high[i] = __float_as_uint(value) & 0xffffe000u;
          low[i] = __float_as_uint(value - __uint_as_float(high[i]));
        }
        device::mma_tf32(d, a[s], high);
        device::mma_tf32(e, a[s], low);
      }
      // The group's other tokens must not have it, not even as a product with 0: what an adapter
      // has that is not finite stays with its own tokens.
      const int2 of = *reinterpret_cast<const int2*>(&shared.token_entry[8 * j + 2 * q]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((i % 2 == 0 ? of.x : of.y) == entry) {
          sums[4 * j + i] += d[i] + e[i];
        }
      }
    }
  }
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

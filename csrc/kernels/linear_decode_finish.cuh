// The finishing warps of linear_decode: the adapters' part of the product, and the result.
#pragma once

#include "kernels/linear_decode_shared.cuh"

namespace lora_ext::cuda {

// The tiles of the plan that have a rank, to shared memory.
template <typename Traits>
__device__ __forceinline__ void find_tiles(const DecodeBatch& p, const int64_t* b_offsets,
                                           typename Traits::Shared& shared, int thread) {
  static_assert(Traits::kTokens <= 32);
  if (thread < 32) {  // a tile each
    const int at = min(thread, p.tile_capacity - 1);
    const int4 raw = __ldcg(reinterpret_cast<const int4*>(p.tiles + at));
    const bool exists = thread < p.tile_capacity && raw.x >= 0;
    const int rank = exists ? min(__ldcg(p.ranks + raw.x), p.max_rank) : 0;
    const int64_t start = exists && b_offsets != nullptr ? __ldg(b_offsets + raw.x) : 0;
    const unsigned busy = __ballot_sync(0xffffffffu, rank > 0);
    const int tiles = __popc(busy);
    // Those without a rank go behind the others.
    const unsigned before = (1u << thread) - 1;
    const int to = rank > 0 ? __popc(busy & before) : tiles + __popc(~busy & before);
    if (to < Traits::kTokens) {
      shared.number[to] = thread;
      shared.slot[to] = rank > 0 ? raw.x : 0;
      shared.rank[to] = max(rank, 0);
      shared.first[to] = raw.y;
      shared.count[to] = rank > 0 ? raw.z : 0;
      shared.start_b[to] = start;
    }
    if (thread < Traits::kTokens) {
      shared.place[thread] = -1;
    }
    if (thread == 0) {
      shared.tiles = tiles;
    }
  }
  device::cta_barrier_sync(kFinishers, kFinishThreads);
  for (int i = thread; i < shared.tiles * kTileTokens; i += kFinishThreads) {
    const int tile = i / kTileTokens, entry = i % kTileTokens;
    int token = -1;
    if (entry < shared.count[tile]) {
      token = __ldcg(p.permutation + shared.first[tile] + entry);
      token = token < p.num_tokens ? token : -1;
    }
    shared.token[tile][entry] = token;
    if (token >= 0) {
      shared.place[token] = i;
    }
  }
  device::cta_barrier_sync(kFinishers, kFinishThreads);
}

// xa of the slices that rows [first_row, end_row) of W belong to, from the parts of the shrink;
// zeros behind a rank, up to a multiple of 8.
template <typename Traits>
__device__ __forceinline__ void add_up_xa(const LinearDecodeParams& p,
                                          typename Traits::Shared& shared, int first_row,
                                          int end_row, int parts_of_tile, int thread) {
  constexpr int kAtOnce = 2, kParts = 8;  // loads of a thread in flight
  const DecodeBatch& batch = p.batch;
  const int ranks = xa_slice(batch.max_rank), values = batch.num_tokens * ranks;
#pragma unroll 1
  for (int slice = 0; slice < batch.num_slices; ++slice) {
    if (p.slices[slice].first_column >= end_row || p.slices[slice].end_column <= first_row) {
      continue;
    }
#pragma unroll 1
    for (int i = thread; i < values; i += kAtOnce * kFinishThreads) {
      const float* from[kAtOnce];
      float scaling[kAtOnce], sum[kAtOnce] = {};
      int pieces[kAtOnce], stride[kAtOnce], most = 0;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = i + u * kFinishThreads, token = at / ranks, j = at % ranks;
        const int place = at < values ? shared.place[token] : -1,
                  tile = max(place, 0) / kTileTokens;
        const int rank = place >= 0 ? shared.rank[tile] : 0;
        const TileShares shares = tile_shares(batch, rank, parts_of_tile);
        from[u] = partial_products(batch, shared.number[tile], parts_of_tile) +
                  (slice * rank + j) * kTileTokens + place % kTileTokens;
        from[u] = j < rank ? from[u] : nullptr;
        pieces[u] = j < rank ? shares.pieces : 0, stride[u] = shares.stride;
        most = max(most, pieces[u]);
        scaling[u] = j < rank ? __ldcg(batch.scalings + shared.slot[tile]) : 0.0f;
      }
#pragma unroll 1
      for (int c = 0; c < most; c += kParts) {
        float parts[kAtOnce][kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            parts[u][k] = c + k < pieces[u] ? __ldcg(from[u] + (c + k) * stride[u]) : 0.0f;
          }
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            sum[u] += parts[u][k];
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = i + u * kFinishThreads;
        if (at < values) {
          shared.xa[(at / ranks * batch.num_slices + slice) * ranks + at % ranks] =
              from[u] != nullptr ? sum[u] * scaling[u] : 0.0f;
        }
      }
    }
  }
  device::cta_barrier_sync(kFinishers, kFinishThreads);
}

// A walk over what a CTA needs of B: for each block of 16 rows of W and each slice in it, groups of
// tiles, in turn for each warp, and of a group steps of Traits::kRanks.
template <typename Traits>
struct LinearWalk {
  const LinearDecodeParams& p;
  int groups, end_block;
  int block, slice, begin, end;  // begin, end: rows of the slice in the block
  int group, first;

  __device__ __forceinline__ LinearWalk(const LinearDecodeParams& p_, int tiles,
                                        const LinearShare& share, int warp)
      : p(p_),
        groups((tiles + Traits::kGroup - 1) / Traits::kGroup),
        end_block(share.first + share.count),
        block(groups > 0 ? share.first : end_block),
        slice(-1),
        group(warp),
        first(0) {
    next_slice();
    skip();
  }
  __device__ __forceinline__ bool done() const { return block >= end_block; }
  __device__ __forceinline__ void next() {
    first += Traits::kRanks;
    if (first >= p.batch.max_rank) {
      first = 0;
      group += kFinishThreads / 32;
      skip();
    }
  }

 private:
  __device__ __forceinline__ void skip() {
    while (group >= groups && !done()) {
      group -= groups;
      next_slice();
    }
  }
  __device__ __forceinline__ void next_slice() {
    while (!done()) {
      if (++slice >= p.batch.num_slices) {
        slice = 0;
        ++block;
      }
      begin = max(p.slices[slice].first_column, 16 * block);
      end = min(p.slices[slice].end_column, 16 * block + 16);
      if (begin < end) {
        return;
      }
    }
  }
};

// What the adapters add to W's rows of a pass, step by step, with the copies of B some steps ahead
// and across the passes, like those of W. A lane has four chunks of 8 ranks: chunk i is of tile
// i / kRowChunks of the group, and of row i % kRowChunks of those that its place among the lanes
// says.
template <typename T, typename Traits>
struct LinearExpand {
  static constexpr int kChunks = Traits::kChunksB, kRowChunks = Traits::kRowChunks;
  static constexpr int kGroup = Traits::kGroup, kRowStep = 32 / Traits::kLanes;

  const LinearDecodeParams& p;
  typename Traits::Shared& shared;
  int thread, fill = 0, use = 0;
  LinearWalk<Traits> ahead, now;

  __device__ __forceinline__ LinearExpand(const LinearDecodeParams& p_,
                                          typename Traits::Shared& shared_,
                                          const LinearShare& share, int thread_)
      : p(p_),
        shared(shared_),
        thread(thread_),
        ahead(p_, shared_.tiles, share, thread_ / 32),
        now(ahead) {
    for (int i = 0; i < Traits::kStagesB - 1; ++i) {
      copy();
    }
  }

  __device__ __forceinline__ void copy() {
    if (!ahead.done()) {
      const auto& from = p.slices[ahead.slice];
      const bool flat = p.b_offsets != nullptr;
      const int rank_lane = ahead.first + thread % Traits::kLanes * 8;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int tile = ahead.group * kGroup + i / kRowChunks, rank = shared.rank[tile];
        const int row = 16 * ahead.block + i % kRowChunks * kRowStep + thread % 32 / Traits::kLanes;
        const int valid = row >= ahead.begin && row < ahead.end ? rank - rank_lane : 0;
        const int count = min(max(valid, 0), 8);
        const int64_t start = flat ? shared.start_b[tile] : shared.slot[tile] * from.slot_stride;
        const T* b = static_cast<const T*>(from.b) + start + rank_lane +
                     (from.first_row + row - from.first_column) * (flat ? rank : from.row_stride);
        void* to = shared.ring_b[fill][i][thread];
        if (device::is_aligned(b, 16)) {
          device::copy_async_16<true>(to, b, 2 * count);
        } else {
          device::Chunk<T, 8> chunk;
          device::load_scalars(chunk, b, count);
          *static_cast<device::Chunk<T, 8>*>(to) = chunk;
        }
      }
      ahead.next();
    }
    device::copy_async_commit();
    fill = fill + 1 < Traits::kStagesB ? fill + 1 : 0;
  }

  // Up to block `end_block`, which is that of the pass.
  __device__ __forceinline__ void add(int first_block, int end_block) {
    const int lane = thread % Traits::kLanes, ranks = xa_slice(p.batch.max_rank);
#pragma unroll 1
    while (!now.done() && now.block < end_block) {
      copy();
      device::copy_async_wait<Traits::kStagesB - 1>();
      device::Chunk<T, 8> chunks[kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        chunks[i] = *reinterpret_cast<const device::Chunk<T, 8>*>(shared.ring_b[use][i][thread]);
      }
      // Of the row that this lane has the sum of in the end.
      const int row = 16 * now.block + lane / 2 * kRowStep + thread % 32 / Traits::kLanes;
      const bool has_row = lane % 2 == 0 && row >= now.begin && row < now.end;
      float* const delta = &shared.delta[0][row - 16 * first_block];
      const float* const xa = shared.xa + now.slice * ranks + now.first + 8 * lane;
      int count[kGroup], most = 0;
      bool active[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        const int tile = now.group * kGroup + t;
        count[t] = shared.count[tile];
        active[t] = now.first + 8 * lane < shared.rank[tile];
        most = max(most, count[t]);
      }
      // The tiles' tokens side by side, so that they need not wait for each other.
#pragma unroll 1
      for (int entry = 0; entry < most; ++entry) {
        int token[kGroup];
        float sums[kChunks] = {};
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          token[t] = entry < count[t] ? shared.token[now.group * kGroup + t][entry] : -1;
        }
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          if (token[t] >= 0 && active[t]) {
            const float* values_of = xa + token[t] * p.batch.num_slices * ranks;
#pragma unroll
            for (int j = 0; j < 8; j += 4) {
              const float4 values = *reinterpret_cast<const float4*>(values_of + j);
#pragma unroll
              for (int i = t * kRowChunks; i < (t + 1) * kRowChunks; ++i) {
                const uint32_t low = chunks[i].words[j / 2], high = chunks[i].words[j / 2 + 1];
                sums[i] += values.x * device::unpack<T>(low, 0);
                sums[i] += values.y * device::unpack<T>(low, 1);
                sums[i] += values.z * device::unpack<T>(high, 0);
                sums[i] += values.w * device::unpack<T>(high, 1);
              }
            }
          }
        }
        // Over the lanes of a row, each two of which are left with a sum for each tile.
#pragma unroll
        for (int half = kRowChunks / 2; half > 0; half /= 2) {
          const bool upper = lane & 2 * half;
#pragma unroll
          for (int i = 0; i < kGroup * half; ++i) {
            const int low = i / half * kRowChunks + i % half, high = low + half;
            const float kept = upper ? sums[high] : sums[low];
            const float given = upper ? sums[low] : sums[high];
            sums[low] = kept + __shfl_xor_sync(0xffffffffu, given, 2 * half);
          }
        }
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          const float own = sums[t * kRowChunks];
          const float sum = own + __shfl_xor_sync(0xffffffffu, own, 1);
          if (has_row && token[t] >= 0) {
            delta[token[t] * Traits::kRows] += sum;
          }
        }
      }
      use = use + 1 < Traits::kStagesB ? use + 1 : 0;
      now.next();
    }
  }
};

// The warps' sums of a pass, in fixed order; the result, rounded. A thread takes two neighbouring
// rows of a token at a time.
template <typename T, typename Traits>
__device__ __forceinline__ void finish_rows(const LinearDecodeParams& p,
                                            const typename Traits::Shared& shared, int thread,
                                            int buffer, int first_row, int end_row) {
#pragma unroll 1
  for (int unit = thread; unit < p.batch.num_tokens * Traits::kRows / 2; unit += kFinishThreads) {
    const int token = unit / (Traits::kRows / 2), at = unit % (Traits::kRows / 2) * 2;
    const int row = first_row + at;
    if (row >= end_row) {
      continue;
    }
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float2 next =
          *reinterpret_cast<const float2*>(&shared.sums[buffer][at / 16][w][token][at % 16]);
      sum.x += next.x, sum.y += next.y;
    }
    const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[token][at]);
    sum.x += delta.x, sum.y += delta.y;
    if (p.bias != nullptr) {
      const T* bias = static_cast<const T*>(p.bias) + row;
      sum.x += device::to_float(bias[0]);
      sum.y += row + 1 < end_row ? device::to_float(bias[1]) : 0.0f;
    }
    T* y = static_cast<T*>(p.y) + token * p.y_stride + row;
    if (p.pairs) {
      *reinterpret_cast<uint32_t*>(y) = device::pack<T>(sum.x, sum.y);
    } else {
      y[0] = device::from_float<T>(sum.x);
      if (row + 1 < end_row) {
        y[1] = device::from_float<T>(sum.y);
      }
    }
  }
}

template <typename T, typename Traits>
__device__ __forceinline__ void finish(const LinearDecodeParams& p,
                                       typename Traits::Shared& shared) {
  const int thread = threadIdx.x - Traits::kStreamThreads;
  const LinearShare share(p.out_features, Traits::kTiles);
  // The shrink has just read the same of the plan.
  const int parts = p.batch.split_rules.parts(read_num_tiles(p.batch));
  find_tiles<Traits>(p.batch, p.b_offsets, shared, thread);
  LinearExpand<T, Traits> expand(p, shared, share, thread);
  device::grid_dependency_wait();
  if (shared.tiles > 0) {
    add_up_xa<Traits>(p, shared, 16 * share.first, 16 * (share.first + share.count), parts, thread);
  }
#pragma unroll 1
  for (int pass = 0; pass < share.passes; ++pass) {
    const int tile = share.tile(pass), end_tile = share.tile(pass + 1);
    for (int i = thread; i < Traits::kTokens * Traits::kRows; i += kFinishThreads) {
      (&shared.delta[0][0])[i] = 0;
    }
    device::cta_barrier_sync(kFinishers, kFinishThreads);
    expand.add(tile, end_tile);
    const int buffer = pass % Traits::kBuffers;
    device::cta_barrier_sync(kSumsFull + buffer, Traits::kThreads);
    finish_rows<T, Traits>(p, shared, thread, buffer, 16 * tile,
                           min(16 * end_tile, p.out_features));
    if (pass + Traits::kBuffers < share.passes) {
      device::cta_barrier_arrive(kSumsFree + buffer, Traits::kThreads);
    }
    device::cta_barrier_sync(kFinishers, kFinishThreads);
  }
}

}  // namespace lora_ext::cuda

// The finishing warps of linear_decode: the adapters' part of the product, and the result.
#pragma once

#include "kernels/linear_decode_shared.cuh"
#include "kernels/linear_ranks.cuh"

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
    const float scaling = exists ? __ldcg(p.scalings + raw.x) : 0.0f;
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
      shared.scaling[to] = scaling;
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
// zeros behind a rank. Tokens of one tile are neighbours there: so are the lanes that have them.
template <typename T, typename Traits>
__device__ __forceinline__ void add_up_xa(const LinearDecodeParams& p,
                                          typename Traits::Shared& shared, int first_row,
                                          int end_row, const TileCuts& cuts, int thread) {
  constexpr int kAtOnce = 4;  // values of a thread
  const DecodeBatch& batch = p.batch;
  const int tokens = batch.num_tokens, ranks = xa_slice(batch.max_rank), values = tokens * ranks;
#pragma unroll 1
  for (int slice = 0; slice < batch.num_slices; ++slice) {
    if (p.slices[slice].first_column >= end_row || p.slices[slice].end_column <= first_row) {
      continue;
    }
#pragma unroll 1
    for (int i = thread; i < values; i += kAtOnce * kFinishThreads) {
      const float* from[kAtOnce];
      float scaling[kAtOnce], sum[kAtOnce] = {};
      int token[kAtOnce], rank[kAtOnce], pieces[kAtOnce], stride[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int at = i + u * kFinishThreads;
        rank[u] = small_quotient(at, tokens), token[u] = at - rank[u] * tokens;
        const int place = shared.place[token[u]], tile = max(place, 0) / kTileTokens;
        const int rank_of_tile = place >= 0 ? shared.rank[tile] : 0;
        const int number = shared.number[tile];
        const TileShares shares = tile_shares(batch, rank_of_tile, cuts.parts(number));
        from[u] = partial_products(batch, cuts.first_part(number)) +
                  (slice * rank_of_tile + rank[u]) * kTileTokens + place % kTileTokens;
        pieces[u] = rank[u] < rank_of_tile ? shares.pieces : 0, stride[u] = shares.stride;
        scaling[u] = shared.scaling[tile];
      }
      add_up_parts(from, pieces, stride, sum);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (rank[u] < ranks) {
          store_rank<T>(shared.xa + token[u] * Traits::xa_stride(batch) + slice * ranks, rank[u],
                        pieces[u] > 0 ? sum[u] * scaling[u] : 0.0f);
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
// and across the passes, like those of W. A lane copies four chunks of 8 ranks: chunk i is of tile
// i / kRowChunks of the group, and of row i % kRowChunks of those that its place among the lanes
// says. In a product it has four ranks of two rows, which others of its warp have copied.
template <typename T, typename Traits>
struct LinearExpand {
  static constexpr int kChunks = Traits::kChunksB, kRowChunks = Traits::kRowChunks;
  static constexpr int kGroup = Traits::kGroup, kLanes = Traits::kLanes, kRowStep = 32 / kLanes;

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

  // Where of a warp's 32 chunks that of a row and of ranks lies: the reads of 16 lanes, four rows
  // by 16 ranks, hit distinct banks.
  __device__ static __forceinline__ int chunk_at(int row, int chunk) {
    return row % kRowStep * kLanes + (chunk ^ (2 * (row % kRowStep * kLanes / 8) % kLanes));
  }

  __device__ __forceinline__ void copy() {
    if (!ahead.done()) {
      if (p.vector_b) {
        copy_step<true>();
      } else {
        copy_step<false>();
      }
      ahead.next();
    }
    device::copy_async_commit();
    fill = fill + 1 < Traits::kStagesB ? fill + 1 : 0;
  }

  // Up to block `end_block`, which is that of the pass.
  __device__ __forceinline__ void add(int first_block, int end_block) {
    const int lane = thread % 32, g = lane / 4, q = lane % 4, ranks = xa_slice(p.batch.max_rank);
    constexpr int kProducts = Traits::kRanks / kLinearRanks;  // for a tile's ranks of a step
#pragma unroll 1
    while (!now.done() && now.block < end_block) {
      __syncwarp();  // what is copied next lands where the warp has just read
      copy();
      device::copy_async_wait<Traits::kStagesB - 1>();
      __syncwarp();
      uint32_t rows[kGroup][kProducts][2][2];  // zeros behind a rank
      int count[kGroup], most = 0;
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        count[t] = shared.count[now.group * kGroup + t];
        most = max(most, count[t]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = g + 8 * h;
          const auto* const chunks = shared.ring_b[use][t * kRowChunks + row / kRowStep];
#pragma unroll
          for (int s = 0; s < kProducts; ++s) {
            const uint2 words = *reinterpret_cast<const uint2*>(
                chunks[thread - lane + chunk_at(row, 2 * s + q / 2)] + q % 2 * 8);
            rows[t][s][h][0] = words.x, rows[t][s][h][1] = words.y;
          }
        }
      }
      // Eight tokens of each tile at a time, side by side, so that none waits for another.
#pragma unroll 1
      for (int eight = 0; eight < most; eight += 8) {
        float d[kGroup][kProducts][4] = {};
        int2 tokens[kGroup];  // of this lane's results
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
          const int tile = now.group * kGroup + t, rank = eight < count[t] ? shared.rank[tile] : 0;
          const int* const of = &shared.token[tile][eight];
          tokens[t] = rank > 0 ? *reinterpret_cast<const int2*>(of + 2 * q) : make_int2(-1, -1);
          const int token = rank > 0 ? max(of[g], 0) : 0;
          const float* const xa = shared.xa + token * Traits::xa_stride(p.batch) +
                                  now.slice * ranks + now.first + 4 * q;
#pragma unroll
          for (int s = 0; s < kProducts; ++s) {
            const uint4 values = now.first + kLinearRanks * s < rank
                                     ? *reinterpret_cast<const uint4*>(xa + kLinearRanks * s)
                                     : make_uint4(0, 0, 0, 0);
            multiply_ranks<T>(d[t][s], rows[t][s], values);
          }
        }
#pragma unroll
        for (int t = 0; t < kGroup; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float sum = d[t][0][i];
#pragma unroll
            for (int s = 1; s < kProducts; ++s) {
              sum += d[t][s][i];
            }
            const int token = i % 2 == 0 ? tokens[t].x : tokens[t].y;
            const int row = 16 * now.block + g + i / 2 * 8;
            if (token >= 0 && row >= now.begin && row < now.end) {
              float& delta = shared.delta[token][row - 16 * first_block];
              delta = now.first == 0 ? sum : delta + sum;
            }
          }
        }
      }
      use = use + 1 < Traits::kStagesB ? use + 1 : 0;
      now.next();
    }
  }

 private:
  // kVector: all rows of B allow accesses of 16 bytes.
  template <bool kVector>
  __device__ __forceinline__ void copy_step() {
    const auto& from = p.slices[ahead.slice];
    const int lane = thread % 32, rank_lane = ahead.first + lane % kLanes * 8;
    const int first_row = 16 * ahead.block + lane / kLanes;
    auto* const to = shared.ring_b[fill];
    const int at = thread - lane + chunk_at(lane / kLanes, lane % kLanes);
    const T* b[kGroup];
    int rank[kGroup];
    int64_t row_stride[kGroup];
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      const int tile = ahead.group * kGroup + t;
      const bool flat = !kVector && p.b_offsets != nullptr;
      rank[t] = shared.rank[tile];
      row_stride[t] = flat ? rank[t] : from.row_stride;
      b[t] = static_cast<const T*>(from.b) + rank_lane +
             (flat ? shared.start_b[tile] : shared.slot[tile] * from.slot_stride) +
             (from.first_row + first_row - from.first_column) * row_stride[t];
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int t = i / kRowChunks, row = first_row + i % kRowChunks * kRowStep;
      const T* const chunk = b[t] + i % kRowChunks * kRowStep * row_stride[t];
      const int valid = row >= ahead.begin && row < ahead.end ? rank[t] - rank_lane : 0;
      const int count = min(max(valid, 0), 8);
      if (kVector || device::is_aligned(chunk, 16)) {
        device::copy_async_16<true>(to[i][at], chunk, 2 * count);
      } else {
        device::Chunk<T, 8> values;
        device::load_scalars(values, chunk, count);
        *reinterpret_cast<device::Chunk<T, 8>*>(to[i][at]) = values;
      }
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
  const TileCuts cuts = p.batch.split_rules.cuts(read_num_tiles(p.batch));
  find_tiles<Traits>(p.batch, p.b_offsets, shared, thread);
  LinearExpand<T, Traits> expand(p, shared, share, thread);
  device::grid_dependency_wait();
  if (shared.tiles > 0) {
    add_up_xa<T, Traits>(p, shared, 16 * share.first, 16 * (share.first + share.count), cuts,
                         thread);
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

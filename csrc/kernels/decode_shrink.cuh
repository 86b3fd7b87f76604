// The decode shrink: a CTA serves a tile of up to 16 tokens of one slot, 16 or 32 rows of A (the
// rows of all slices in one range) and a part of K (see decode_tile.cuh).
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/decode_tile.cuh"

namespace lora_ext::cuda {

constexpr int kShrinkWarps = kDecodeWarps;
constexpr int kShrinkThreads = 32 * kShrinkWarps;

struct alignas(64) DecodeShrinkParams {
  DecodeBatch batch;
  const void* x;
  int64_t x_stride;
  const int64_t* a_offsets;   // flat layout, else null
  int32_t prefetch_features;  // of a CTA's part of K, before the wait
  bool one_range;             // row i * r + j of the first slice is row j of slice i
  bool vector_x;
  struct {
    const void* a;
    int64_t slot_stride, row_stride;
  } slices[kMaxSlices];
};
// What a CTA has to do: some rows of a tile and a piece of its K. `num_tiles` is what the number of
// parts follows from.
struct ShrinkWork {
  DecodeTile tile;
  int num_tiles, index, parts, first_part;  // index: of the tile

  // kAlike: all tiles have as many parts, and a division less is waited for.
  template <bool kAlike>
  __device__ __forceinline__ void find_tile(const DecodeBatch& p, int part) {
    const TileCuts cuts = p.split_rules.cuts(num_tiles);
    if constexpr (kAlike) {
      parts = cuts.least, index = small_quotient(part, parts), first_part = index * parts;
    } else {
      index = cuts.tile_of(part), parts = cuts.parts(index), first_part = cuts.first_part(index);
    }
  }
};

// The rows and the piece of K of a CTA, of those that its tile has.
struct ShrinkPiece {
  int first_row, rows;  // of the tile's; none: 0
  int begin, end;       // of K, in steps of 32
  int sums_at;          // of the tile's partial products: [rows][16 tokens]

  __device__ __forceinline__ ShrinkPiece(const DecodeBatch& p, const ShrinkWork& work, int part,
                                         int group) {
    const TileShares shares = tile_shares(p, work.tile.rank, work.parts);
    int piece = part - work.first_part;
    if (group >= shares.groups && shares.groups > 0) {
      const int turn = small_quotient(group, shares.groups);
      group -= turn * shares.groups;
      piece += turn * work.parts;
    }
    const int steps = (p.in_features + 31) / 32;
    first_row = group << p.group_rows_log;
    rows = work.tile.slot >= 0 && piece < shares.pieces
               ? min(max(work.tile.rank * p.num_slices - first_row, 0), 1 << p.group_rows_log)
               : 0;
    begin = small_quotient(steps * piece, shares.pieces);
    end = piece == shares.pieces - 1 ? steps : small_quotient(steps * (piece + 1), shares.pieces);
    sums_at = piece * shares.stride + first_row * kTileTokens;
  }
};

// The first look, which finds a part's tile, rank and tokens with nothing to go by: where the batch
// and the pool are small it reads all tiles, tokens and ranks, one round of loads in place of
// three. Cold, as they are behind a base layer, each would take most of a microsecond. What it
// reads may be yet to be overwritten, so nothing in it is taken for granted. The barrier is every
// thread's, whatever it read.
template <bool kAlike>
__device__ __forceinline__ ShrinkWork find_work(const DecodeBatch& p, int part) {
  __shared__ int tokens[kShrinkThreads], ranks[kShrinkThreads];
  __shared__ int4 tiles[kShrinkThreads];
  __shared__ int num_tiles;
  const int thread = threadIdx.x;
  ShrinkWork work;
  if (p.max_tokens > kShrinkThreads || p.num_slots > kShrinkThreads ||
      p.tile_capacity > kShrinkThreads) {
    work.num_tiles = read_plan<false>(p.header + kNumTiles);
    work.template find_tile<kAlike>(p, part);
    work.tile = read_tile<false>(p, work.index, 0, 0);
    return work;
  }
  if (thread == 0) {
    num_tiles = read_plan<false>(p.header + kNumTiles);
  }
  if (thread < p.tile_capacity) {
    tiles[thread] = read_plan<false>(reinterpret_cast<const int4*>(p.tiles + thread));
  }
  if (thread < p.max_tokens) {
    tokens[thread] = read_plan<false>(p.permutation + thread);
  }
  if (thread < p.num_slots) {
    ranks[thread] = read_plan<false>(p.ranks + thread);
  }
  __syncthreads();
  work.num_tiles = num_tiles;
  work.template find_tile<kAlike>(p, part);
  work.tile = {-1, 0, 0, 0, -1};
  const int4 raw = tiles[min(work.index, p.tile_capacity - 1)];
  if (raw.x >= 0 && raw.x < p.num_slots && work.index < p.tile_capacity) {
    const int entry = thread % kTileTokens;
    const int token = tokens[min(max(raw.y + entry, 0), p.max_tokens - 1)];
    work.tile = {raw.x, raw.y, raw.z, min(ranks[raw.x], p.max_rank),
                 entry < raw.z && token >= 0 && token < p.num_tokens ? token : -1};
  }
  return work;
}

// The second look, at a plan that is final, with the first one to go by.
template <bool kAlike>
__device__ __forceinline__ ShrinkWork read_work(const DecodeBatch& p, int part,
                                                const ShrinkWork& guess) {
  ShrinkWork work = guess;
  work.num_tiles = read_plan<true>(p.header + kNumTiles);
  work.tile = read_tile<true>(p, guess.index, guess.tile.slot, guess.tile.start);
  if (work.num_tiles != guess.num_tiles) {
    work.template find_tile<kAlike>(p, part);
    work.tile = read_tile<true>(p, work.index, 0, 0);
  }
  return work;
}

// The same without a stop: what the first look found is used at once, and these loads, of what it
// read, say later whether that was right.
struct PlanCheck {
  int num_tiles, rank, token;
  int4 tile;

  __device__ __forceinline__ PlanCheck(const DecodeBatch& p, const ShrinkWork& work) {
    const DecodeTile& t = work.tile;
    const int entry = threadIdx.x % kTileTokens;
    num_tiles = read_plan<true>(p.header + kNumTiles);
    tile = read_plan<true>(reinterpret_cast<const int4*>(p.tiles + work.index));
    rank = read_plan<true>(p.ranks + t.slot);
    token = read_plan<true>(p.permutation + min(max(t.start + entry, 0), p.max_tokens - 1));
  }
  // Of the whole warp; all warps find the same.
  __device__ __forceinline__ bool confirms(const DecodeBatch& p, const ShrinkWork& work) const {
    const DecodeTile& t = work.tile;
    const bool exists =
        static_cast<int>(threadIdx.x % kTileTokens) < t.count && token >= 0 && token < p.num_tokens;
    return __all_sync(0xffffffffu, num_tiles == work.num_tiles && tile.x == t.slot &&
                                       tile.y == t.start && tile.z == t.count &&
                                       min(rank, p.max_rank) == t.rank &&
                                       (exists ? token : -1) == t.token);
  }
};

// The first `valid` of eight values, the others as 0.
template <typename T, bool kVector>
__device__ __forceinline__ void load_chunk(device::Chunk<T, 8>& chunk, const T* from, int valid) {
  if constexpr (kVector) {  // all or none
    device::load_vector_and_line(chunk, from, valid > 0);
  } else {
    device::load_scalars(chunk, from, valid);
  }
}

// kBlocks: blocks of 16 rows of A that a CTA computes.
template <int kBlocks>
struct DecodeShrinkTraits {
  static constexpr int kRows = 16 * kBlocks;
  static constexpr int kSteps = shrink_steps(kBlocks);
  static constexpr bool kAlike = kBlocks == 1;  // as split_rules cuts tiles
  // Whether there are registers to look the plan up again while the first loads are on their way.
  static constexpr bool kSpeculates = kBlocks == 1;
  static constexpr int kPartialStride = kTileTokens + 4;  // float2 stores hit distinct banks
  static constexpr int kSharedBytes = kShrinkWarps * kRows * kPartialStride * 4;
};

template <typename T, bool kFlat>
__device__ __forceinline__ const T* shrink_row(const DecodeShrinkParams& p, int slot, int rank,
                                               int row) {
  const int slice = p.one_range ? 0 : small_quotient(row, rank);
  const auto& from = p.slices[slice];
  const int64_t start =
      kFlat && p.a_offsets != nullptr ? p.a_offsets[slot] : slot * from.slot_stride;
  return static_cast<const T*>(from.a) + start + (row - slice * rank) * from.row_stride;
}

// What will be read, to L2, before it may be read: x may be yet to be written, and the tile another
// one than `work` says, but as an address of a prefetch, kept inside the tensors, it does no harm.
template <typename T>
__device__ __forceinline__ void prefetch_piece(const DecodeShrinkParams& p, const DecodeTile& t,
                                               const ShrinkPiece& piece) {
  const int k = 32 * piece.begin, end = min(32 * piece.end, p.batch.in_features);
  const int bytes = 2 * min(end - k, p.prefetch_features);
  const int row = threadIdx.x;
  if (row < piece.rows) {
    device::prefetch_l2(shrink_row<T, false>(p, t.slot, t.rank, piece.first_row + row) + k, bytes);
  } else if (threadIdx.x >= kShrinkThreads - kTileTokens && t.token >= 0) {
    device::prefetch_l2(static_cast<const T*>(p.x) + t.token * p.x_stride + k, bytes);
  }
}

// final: the plan is, and so is x. Else waits for both as late as it can; then what `work` says is
// put to use, and looked up again meanwhile.
template <typename T, int kBlocks, bool kVector, bool kFlat>
__device__ __forceinline__ void decode_shrink_body(const DecodeShrinkParams& p, int part, int group,
                                                   ShrinkWork work, ShrinkPiece piece, bool final,
                                                   float* shared) {
  using Traits = DecodeShrinkTraits<kBlocks>;
  constexpr int kSteps = Traits::kSteps, kRows = Traits::kRows;
  constexpr int kPartialStride = Traits::kPartialStride;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  float acc[kBlocks][2][4];
  bool waited = final, confirmed = final;
  do {
    const DecodeTile& t = work.tile;
    // Neighbouring warps take neighbouring 64-byte pieces of the same rows, so that DRAM sees long
    // runs.
    const int begin = piece.begin + warp, end = piece.end;
    const int first_k = 32 * begin + 8 * q;
    const T* a_next[2 * kBlocks];
    bool has_row[2 * kBlocks];
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int row = 8 * i + g;
      has_row[i] = row < piece.rows;
      a_next[i] =
          shrink_row<T, kFlat>(p, t.slot, t.rank, has_row[i] ? piece.first_row + row : 0) + first_k;
    }
    const T* x_next[2];
    bool has_token[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int token = __shfl_sync(0xffffffffu, t.token, 8 * n + g);
      has_token[n] = token >= 0;
      x_next[n] = static_cast<const T*>(p.x) + max(token, 0) * p.x_stride + first_k;
    }
    // Steps of the warp and values of the lane that are left: mma needs all lanes.
    int warp_left = end - begin, left = min(32 * end, p.batch.in_features) - first_k;
#pragma unroll
    for (int i = 0; i < kBlocks * 8; ++i) {
      acc[i / 8][i / 4 % 2][i % 4] = 0;
    }
    if (!waited) {
      device::grid_dependency_wait();
      device::grid_dependency_launch();
      waited = true;
    }
    // No load moves before the wait.
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      asm volatile("" : "+l"(a_next[i])::"memory");
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      asm volatile("" : "+l"(x_next[n])::"memory");
    }
    const PlanCheck check(p.batch, work);
    do {
      constexpr int kStride = 32 * kShrinkWarps;
      device::Chunk<T, 8> weights[kSteps][2 * kBlocks], tokens[kSteps][2];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int valid = left - s * kStride;
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
          load_chunk<T, kVector>(weights[s][i], a_next[i] + s * kStride, has_row[i] ? valid : 0);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          load_chunk<T, kVector>(tokens[s][n], x_next[n] + s * kStride, has_token[n] ? valid : 0);
        }
      }
      if (!confirmed) {
        confirmed = check.confirms(p.batch, work);
        if (!confirmed) {
          break;
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int w = 0; w < 4; w += 2) {
#pragma unroll
          for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              if (n == 0 || t.count > 8) {
                device::mma<T>(acc[block][n], weights[s][2 * block].words[w],
                               weights[s][2 * block + 1].words[w],
                               weights[s][2 * block].words[w + 1],
                               weights[s][2 * block + 1].words[w + 1], tokens[s][n].words[w],
                               tokens[s][n].words[w + 1]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        a_next[i] += kSteps * kStride;
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        x_next[n] += kSteps * kStride;
      }
      left -= kSteps * kStride, warp_left -= kSteps * kShrinkWarps;
    } while (warp_left > 0);
    if (confirmed) {
      break;
    }
    work = read_work<Traits::kAlike>(p.batch, part, work);
    piece = ShrinkPiece(p.batch, work, part, group);
    confirmed = true;
  } while (piece.rows > 0);

  // The warps' sums meet in shared memory, in fixed order.
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to =
            shared + (warp * kRows + 16 * block + 8 * h + g) * kPartialStride + 8 * n + 2 * q;
        *reinterpret_cast<float2*>(to) =
            make_float2(acc[block][n][2 * h], acc[block][n][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  float* out = partial_products(p.batch, work.first_part) + piece.sums_at;
#pragma unroll
  for (int i = thread; i < kRows * kTileTokens / 4; i += kShrinkThreads) {
    const int row = i / (kTileTokens / 4), token = i % (kTileTokens / 4) * 4;
    if (row < piece.rows && token < work.tile.count) {
      const float* from = shared + row * kPartialStride + token;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (int w = 1; w < kShrinkWarps; ++w) {
        const float4 next = *reinterpret_cast<const float4*>(from + w * kRows * kPartialStride);
        sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
      }
      *reinterpret_cast<float4*>(out + i * 4) = sum;
    }
  }
}

// kGeneral: a tile finds out for itself whether its rows allow vector accesses, as it must where
// only the device knows the offsets and ranks (flat layouts); else the launcher has made sure that
// they do. kBeside: nothing is yet to come, but the kernel before may be at work (beside.h).
template <typename T, int kBlocks, bool kGeneral, bool kBeside = false>
__global__ void __launch_bounds__(kShrinkThreads, 2)
    decode_shrink_kernel(const __grid_constant__ DecodeShrinkParams p) {
  extern __shared__ __align__(128) float sums[];
  using Traits = DecodeShrinkTraits<kBlocks>;
  // Row groups of a part are neighbours: so the CTAs that have work are the first ones of the grid,
  // which go to different SMs.
  const int row_groups = p.batch.row_groups;
  const int part = blockIdx.x / row_groups, group = blockIdx.x % row_groups;
  if (kBeside && blockIdx.x == gridDim.x - 1) {  // one CTA more, which ends when that kernel has
    device::grid_dependency_launch();
    device::grid_dependency_wait();
    return;
  }
  ShrinkWork work = find_work<Traits::kAlike>(p.batch, part);
  ShrinkPiece piece(p.batch, work, part, group);
  const bool likely = !kGeneral && !kBeside && piece.rows > 0;
  if (likely) {
    prefetch_piece<T>(p, work.tile, piece);
  }
  const bool final = !Traits::kSpeculates || !likely;
  if (final) {
    if (!kBeside) {
      device::grid_dependency_wait();
    }
    device::grid_dependency_launch();
    work = read_work<Traits::kAlike>(p.batch, part, work);
    piece = ShrinkPiece(p.batch, work, part, group);
    if (piece.rows == 0) {
      return;
    }
  }
  if constexpr (kGeneral) {
    bool vector = p.vector_x;
    for (int i = 0; i < p.batch.num_slices; ++i) {
      vector &= p.slices[i].row_stride % 8 == 0 &&
                device::is_aligned(
                    shrink_row<T, true>(p, work.tile.slot, work.tile.rank, i * work.tile.rank), 16);
    }
    if (!vector) {
      decode_shrink_body<T, kBlocks, false, true>(p, part, group, work, piece, true, sums);
      return;
    }
  }
  decode_shrink_body<T, kBlocks, true, kGeneral>(p, part, group, work, piece, final, sums);
}

}  // namespace lora_ext::cuda

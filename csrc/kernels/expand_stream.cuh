// y += xa B^T for many tokens: what moves is y, read and written once.
//
// A CTA serves a group of up to 128 neighbouring tokens of one slot, 16 a warp, and walks along the
// row of y. The group's xa stays in registers, split into two 16-bit halves; the weights of a step
// are read once for all tokens. Weights and y come by asynchronous copies, some steps ahead. Eight
// neighbouring lanes read and write 128 neighbouring bytes of y: with lanes as the fragments have
// them, each line takes four requests instead of one, and those are what limits. So y passes
// through shared memory both ways. The work of a batch, groups by steps, is cut into equal parts,
// one a CTA.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/output_span.cuh"
#include "kernels/prefill_heuristics.h"

namespace lora_ext::cuda {

constexpr int kStreamWarps = 2 * kWideTileTokens / kTileTokens;  // two wide tiles at a time
constexpr int kStreamThreads = 32 * kStreamWarps;
constexpr int kSpanColumns = 64;  // that a warp holds sums of at a time

// kSteps: steps of 16 ranks that the registers hold. kSpans: spans of 64 columns in a step.
template <typename Y, int kSteps, int kSpans, int kStages>
struct StreamTraits : OutputSpan<Y> {
  static constexpr int kColumns = kSpans * kSpanColumns;
  static constexpr int kChunks = 2 * kSteps;       // of eight ranks, a row of weights
  static constexpr int kStride = kSteps * 16 + 8;  // elements; odd in chunks: no bank conflicts
  static constexpr int kWeightBytes = kColumns * kStride * 2;
  static constexpr int kStageBytes =
      kWeightBytes + kStreamWarps * kSpans * OutputSpan<Y>::kSpanBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Up to two wide tiles of one slot that lie side by side in the plan.
struct TokenGroup {
  int slot, start, count;  // permutation[start .. start + count)
  int first_tile, tiles;
};

// The group that the wide tile `index` is part of.
__device__ __forceinline__ TokenGroup token_group(const PlanView& plan, int index, int num_tiles) {
  const int even = index & ~1;
  const Tile first = plan.wide_tiles[even];
  const Tile second = plan.wide_tiles[min(even + 1, num_tiles - 1)];
  if (even + 1 < num_tiles && first.slot == second.slot) {
    return {first.slot, first.start, first.count + second.count, even, 2};
  }
  const Tile& only = index == even ? first : second;
  return {only.slot, only.start, only.count, index, 1};
}

// Where xa of a tile's tokens lies: `parts` times, from the row first_row on.
struct XaOfTile {
  int first_row, parts;
};

__device__ __forceinline__ XaOfTile xa_of_tile(const XaLayout& layout, int tile, int num_tiles) {
  if (layout.whole()) {
    return {tile * kWideTileTokens, 1};
  }
  const XaLayout::Cut cut = layout.cut(num_tiles);
  const int first = cut.part_of(tile * layout.steps);
  const int last = cut.part_of((tile + 1) * layout.steps - 1);
  return {layout.place(first, tile) * kWideTileTokens, last - first + 1};
}

struct ExpandWork {
  ExpandParams p;
  int row_steps;        // of a row of y
  unsigned first_wave;  // CTAs that are resident at once
};

// A CTA's share of tiles * row_steps items, next to each other. A CTA that goes on to another tile
// begins anew there and would be the last to end; so where shares are long, and that leaves few
// CTAs without any, each tile is shared by the same number of them. A first wave of CTAs, as many
// as are resident, gets equal shares; where there are more, those get smaller ones of the rest, and
// even out how long the first take.
struct WalkPart {
  static constexpr unsigned kLateShare = 8, kLongShare = 4;
  int begin, end;

  __device__ __forceinline__ WalkPart(unsigned tiles, unsigned row_steps, unsigned parts,
                                      unsigned first_wave) {
    unsigned first_item = 0, items = tiles * row_steps, index = blockIdx.x;
    const unsigned of_tile = parts / tiles;
    if (parts <= first_wave && items >= kLongShare * parts && 8 * of_tile * tiles >= 7 * parts) {
      const unsigned tile = index / of_tile, place = index - tile * of_tile;
      begin = tile * row_steps + place * row_steps / of_tile;
      end = tile < tiles ? tile * row_steps + (place + 1) * row_steps / of_tile : 0;
      return;
    }
    if (parts > first_wave) {
      const unsigned early = items - items / kLateShare;
      if (index < first_wave) {
        items = early, parts = first_wave;
      } else {
        first_item = early, items -= early, parts -= first_wave, index -= first_wave;
      }
    }
    const unsigned each = items / parts, longer = items - each * parts;  // parts with an item more
    begin = static_cast<int>(first_item + each * index + min(index, longer));
    end = static_cast<int>(begin + each + (index < longer));
  }
};

// Where a walk along the row of y is: columns [column, width) of a slice are yet to come.
struct StreamPlace {
  int slice, start, column, width;

  __device__ __forceinline__ void enter(const Slices& slices, int slice_, int column_) {
    slice = slice_;
    start = slices.offset[slice_];
    width = slices.offset[slice_ + 1] - start;
    column = column_;
  }
  // True where a slice begins.
  __device__ __forceinline__ bool advance(const Slices& slices, int columns) {
    column += columns;
    if (column < width || slice + 1 == slices.count) {
      return false;
    }
    enter(slices, slice + 1, 0);
    return true;
  }
};

__device__ __forceinline__ StreamPlace stream_place(const Slices& slices, int step, int columns) {
  StreamPlace place;
  for (int slice = 0;; ++slice) {
    place.enter(slices, slice, step * columns);
    if (place.column < place.width || slice + 1 == slices.count) {
      return place;
    }
    step -= (place.width + columns - 1) / columns;
  }
}

template <typename T, typename Y, int kSteps, int kSpans, int kStages>
__device__ __forceinline__ void expand_group(const ExpandParams& p, const TokenGroup& group,
                                             int rank, int first, int last, int num_tiles,
                                             unsigned char* shared) {
  using Traits = StreamTraits<Y, kSteps, kSpans, kStages>;
  constexpr int kChunks = Traits::kChunks, kStride = Traits::kStride;
  constexpr int kWeightRows = kStreamThreads / kChunks;  // that the block copies at once
  constexpr int kWeightCopies = (Traits::kColumns + kWeightRows - 1) / kWeightRows;
  constexpr int kPerChunk = Traits::kPerChunk;
  constexpr int kPartsAtOnce = kSteps == 1 ? 4 : kSteps == 2 ? 2 : 1;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  // Warps beside each other along the row where one tile leaves half of them without tokens.
  const bool beside = kSpans % 2 == 0 && group.tiles == 1;
  const int first_token = (beside ? warp % 4 : warp) * kTileTokens;
  const int first_span = beside && warp >= 4 ? kSpans / 2 : 0;
  const int num_spans = beside ? kSpans / 2 : kSpans;
  const auto token_id = [&](int token) {  // -1: none
    const int id = token < group.count ? p.plan.permutation[group.start + token] : -1;
    return id < p.num_tokens ? id : -1;  // a plan may be for more tokens than this call has
  };

  const int row_chunk = lane % Traits::kRowChunks, row_of_copy = lane / Traits::kRowChunks;
  Y* rows[Traits::kCopies];
#pragma unroll
  for (int i = 0; i < Traits::kCopies; ++i) {
    const int id = token_id(first_token + Traits::kCopyRows * i + row_of_copy);
    rows[i] = id >= 0 ? static_cast<Y*>(p.y) + id * p.y_stride + row_chunk * kPerChunk : nullptr;
  }

  const int chunk = thread % kChunks, weight_row = thread / kChunks;
  const int weight_bytes = 2 * min(max(rank - 8 * chunk, 0), 8);
  unsigned char* spans = shared + Traits::kWeightBytes + warp * kSpans * Traits::kSpanBytes;
  StreamPlace fetched = stream_place(p.slices, first, Traits::kColumns);
  StreamPlace now = fetched;
  const auto weights_of = [&](const StreamPlace& place) {
    return static_cast<const T*>(p.b.base[place.slice]) +
           p.b.row_offset(group.slot, place.slice, rank, place.column + weight_row) + 8 * chunk;
  };
  const T* weights_from = weights_of(fetched);
  int64_t weight_stride = p.b.stride(fetched.slice, rank);
  int fetch_stage = 0, left = last - first;
  const auto fetch = [&] {
    if (left > 0) {
      const int columns = fetched.width - fetched.column;
      unsigned char* weights = shared + fetch_stage;
      const T* from = weights_from;
#pragma unroll
      for (int i = 0; i < kWeightCopies; ++i) {
        const int c = weight_row + i * kWeightRows;
        if (kWeightRows <= Traits::kColumns || c < Traits::kColumns) {
          // Column 8 g + 2 b + h of a span is row g + 8 h of its block b.
          const int row = c / 64 * 64 + c % 8 / 2 * 16 + c % 2 * 8 + c % 64 / 8;
          device::copy_async_16(weights + (row * kStride + 8 * chunk) * 2, from,
                                c < columns ? weight_bytes : 0);
        }
        from += kWeightRows * weight_stride;
      }
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const int column = (first_span + s) * kSpanColumns;
        if (s < num_spans && column + row_chunk * kPerChunk < columns) {
#pragma unroll
          for (int i = 0; i < Traits::kCopies; ++i) {
            if (rows[i] != nullptr) {
              device::copy_async_16(spans + fetch_stage + s * Traits::kSpanBytes +
                                        Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk),
                                    rows[i] + fetched.start + fetched.column + column, 16);
            }
          }
        }
      }
      if (fetched.advance(p.slices, Traits::kColumns)) {
        weights_from = weights_of(fetched);
        weight_stride = p.b.stride(fetched.slice, rank);
      } else {
        weights_from += Traits::kColumns * weight_stride;
      }
      --left;
    }
    fetch_stage += Traits::kStageBytes;
    fetch_stage = fetch_stage < kStages * Traits::kStageBytes ? fetch_stage : 0;
    device::copy_async_commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch();
  }

  // xa of the tokens 8 n + g. Lanes without a token read another's: their products reach nobody.
  const float* xa_rows[2];
  const int tile = min(first_token / kWideTileTokens, group.tiles - 1);
  const XaOfTile xa = xa_of_tile(p.layout, group.first_tile + tile, num_tiles);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int token = min(first_token + 8 * n + g, group.count - 1);
    const int64_t row = p.layout.by_tile ? int64_t{xa.first_row} + token - tile * kWideTileTokens
                                         : max(token_id(token), 0);
    xa_rows[n] = static_cast<const float*>(p.xa) + row * p.xa_stride;
  }
  uint32_t high[2][kSteps][2], low[2][kSteps][2];
  float scales[4];  // fp16 only: of the tokens 8 n + 2 q + e
  const auto load_xa = [&](int slice) {
    if (p.layout.halves) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          float4 four = make_float4(0, 0, 0, 0);
          if (16 * kk < rank) {
            four = __ldcg(reinterpret_cast<const float4*>(
                xa_rows[n] + slice * XaLayout::padded(rank) + 16 * kk + 4 * q));
          }
          high[n][kk][0] = __float_as_uint(four.x), high[n][kk][1] = __float_as_uint(four.y);
          low[n][kk][0] = __float_as_uint(four.z), low[n][kk][1] = __float_as_uint(four.w);
        }
      }
      return;
    }
    float2 sums[2][kSteps][2] = {};
    if (p.layout.by_tile) {
      const int64_t part_stride = kWideTileTokens * p.xa_stride;  // places of parts are neighbours
#pragma unroll 1
      for (int part = 0; part < xa.parts; part += kPartsAtOnce) {
        float4 next[kPartsAtOnce][2][kSteps];  // at once, for each costs a trip to the L2
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int kk = 0; kk < kSteps; ++kk) {
              next[i][n][kk] = make_float4(0, 0, 0, 0);
              if (16 * kk < rank && part + i < xa.parts) {
                next[i][n][kk] = __ldcg(reinterpret_cast<const float4*>(
                    xa_rows[n] + (part + i) * part_stride + slice * XaLayout::padded(rank) +
                    16 * kk + 4 * q));
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kPartsAtOnce; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int kk = 0; kk < kSteps; ++kk) {
              sums[n][kk][0].x += next[i][n][kk].x, sums[n][kk][0].y += next[i][n][kk].y;
              sums[n][kk][1].x += next[i][n][kk].z, sums[n][kk][1].y += next[i][n][kk].w;
            }
          }
        }
      }
    } else {
      const bool pairs =
          p.xa_stride % 2 == 0 && slice * rank % 2 == 0 && device::is_aligned(p.xa, 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int j = 16 * kk + 8 * h + 2 * q;
            const float* from = xa_rows[n] + slice * rank + j;
            if (pairs && j + 1 < rank) {
              sums[n][kk][h] = __ldcg(reinterpret_cast<const float2*>(from));
            } else if (j < rank) {
              sums[n][kk][h].x = __ldcg(from);
              sums[n][kk][h].y = j + 1 < rank ? __ldcg(from + 1) : 0.0f;
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      auto& values = sums[n];
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // behind the rank there may be anything
          const int j = 16 * kk + 8 * h + 2 * q;
          values[kk][h].x = j < rank ? values[kk][h].x : 0.0f;
          values[kk][h].y = j + 1 < rank ? values[kk][h].y : 0.0f;
        }
      }
      float scale = 1.0f;
      if constexpr (device::kNeedsScale<T>) {
        int most = 0;
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            most = max(most, max(__float_as_int(fabsf(values[kk][h].x)),
                                 __float_as_int(fabsf(values[kk][h].y))));
          }
        }
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
        scale = device::scale_down(most);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scales[2 * n + e] = device::scale_up(__shfl_sync(0xffffffffu, most, (2 * q + e) * 4));
        }
      }
#pragma unroll
      for (int kk = 0; kk < kSteps; ++kk) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          T tops[2], rests[2];
          device::split(values[kk][h].x * scale, tops[0], rests[0]);
          device::split(values[kk][h].y * scale, tops[1], rests[1]);
          high[n][kk][h] = device::pack_two(tops[0], tops[1]);
          low[n][kk][h] = device::pack_two(rests[0], rests[1]);
        }
      }
    }
  };
  bool needs_xa = true;

  int stage = 0;
  for (int step = first; step < last; ++step) {
    if (needs_xa) {
      if (p.after_xa) {
        device::grid_dependency_wait();  // xa is all that the kernel before has written
      }
      load_xa(now.slice);
      needs_xa = false;
    }
    device::copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's data are there, and every warp is done with the stage that is
                      // filled next
    fetch();
    if (first_token < group.count) {
#pragma unroll 1
      for (int s = 0; s < num_spans; ++s) {
        const int column = (first_span + s) * kSpanColumns;
        const int columns = now.width - now.column - column;
        if (columns <= 0) {
          break;
        }
        const T* weights = reinterpret_cast<const T*>(shared + stage) +
                           (column + lane % 16) * kStride + lane / 16 * 8;
        float acc[4][2][4] = {};
#pragma unroll
        for (int kk = 0; kk < kSteps; ++kk) {
          if (16 * kk < rank) {
            uint32_t w[4][4];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
              device::ldmatrix_x4(w[b], weights + b * 16 * kStride + 16 * kk);
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                device::mma<T>(acc[b][n], w[b][0], w[b][1], w[b][2], w[b][3], high[n][kk][0],
                               high[n][kk][1]);
              }
            }
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                device::mma<T>(acc[b][n], w[b][0], w[b][1], w[b][2], w[b][3], low[n][kk][0],
                               low[n][kk][1]);
              }
            }
          }
        }
        unsigned char* span = spans + stage + s * Traits::kSpanBytes;
        Traits::template add<T>(span, acc, scales);
        __syncwarp();
        if (row_chunk * kPerChunk < columns) {
#pragma unroll
          for (int i = 0; i < Traits::kCopies; ++i) {
            if (rows[i] != nullptr) {
              *reinterpret_cast<uint4*>(rows[i] + now.start + now.column + column) =
                  *reinterpret_cast<const uint4*>(
                      span + Traits::at(Traits::kCopyRows * i + row_of_copy, row_chunk));
            }
          }
        }
      }
    }
    stage += Traits::kStageBytes;
    stage = stage < kStages * Traits::kStageBytes ? stage : 0;
    needs_xa = now.advance(p.slices, Traits::kColumns);
  }
  device::copy_async_wait<0>();
  __syncthreads();  // the next group fills the stages again
}

// after_xa: see expand.cu.
template <typename T, typename Y, int kSteps, int kSpans, int kStages, int kBlocks>
__global__ void __launch_bounds__(kStreamThreads, kBlocks)
    expand_stream_kernel(const __grid_constant__ ExpandWork work) {
  const ExpandParams& p = work.p;
  const int row_steps = work.row_steps;
  extern __shared__ __align__(128) unsigned char shared[];
  if constexpr (kSteps <= 2) {  // with more there are no registers for it
    device::warm_parameters<kStreamThreads>(work);
  }
  if (!p.after_xa) {
    device::grid_dependency_wait();
  }
  device::grid_dependency_launch();
  int num_tiles = p.plan.header[kNumWideTiles];
  num_tiles = p.layout.by_tile ? min(num_tiles, p.layout.most_tiles) : num_tiles;
  const unsigned items = num_tiles * row_steps;
  // Where there is little, CTAs with a step of two tiles each, on as many multiprocessors.
  const unsigned parts = min(gridDim.x, (items + 1) / 2);
  if (blockIdx.x >= parts) {
    return;
  }
  const WalkPart part(num_tiles, row_steps, parts, work.first_wave);
  int at = part.begin;
  const int end = part.end;
  while (at < end) {
    const TokenGroup group = token_group(p.plan, at / row_steps, num_tiles);
    const int group_begin = group.first_tile * row_steps;
    const int group_end = group_begin + group.tiles * row_steps;
    // Items are cut across both tiles of a group; so is the neighbour's part, at the same place.
    const int first = (at - group_begin) >> (group.tiles - 1);
    const int last = end >= group_end ? row_steps : (end - group_begin) >> (group.tiles - 1);
    const int rank = min(p.ranks[group.slot], p.max_rank);
    if (rank > 0 && first < last) {
      expand_group<T, Y, kSteps, kSpans, kStages>(p, group, rank, first, last, num_tiles, shared);
    }
    at = group_end;
  }
}

}  // namespace lora_ext::cuda

// y += xa B^T for tiles of tokens of one slot: what moves is y, read and written once.
//
// A CTA serves one (tile of 64 tokens, slice) and 512 columns (256 where ranks are wide), 64 of
// them a warp. As for few tokens the weights are the 16-row operand and eight neighbouring columns
// of y fall to one lane, so that a warp reads and writes whole 128-byte lines. The warp keeps its
// weights while the tile's tokens pass, 16 at a time; their y is on its way two rounds ahead
// (cp.async to where the same lane will read it, so no barrier is needed). xa is split into two
// 16-bit halves in shared memory once.
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/expand_stream.cuh"
#include "kernels/expand_wgmma.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/prefill_heuristics.h"
#include "kernels/tensor_map.h"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr int kUnitColumns = 64;  // of a warp
constexpr int kRound = 16;        // tokens at a time
constexpr int kBuffers = 3;       // rounds of y in shared memory: one in use, two on their way

// kChunk: neighbouring ranks that a lane holds, 4 for pools of rank up to 16, else 8. Weights of up
// to kStaged steps of ranks stay in shared memory; a slot of a higher rank reads them again for
// each round.
template <typename Y, int kChunk>
struct ExpandShared {
  static constexpr int kWarps =
      kChunk == 4 ? 8 : 4;  // wider ranks need more shared memory for each warp
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kColumns = kWarps * kUnitColumns;
  static constexpr int kSpan = 4 * kChunk;
  static constexpr int kStaged = kChunk == 4 ? 1 : 2;
  static constexpr int kHeader = 2 * kWideTileTokens * 4;  // token ids, and maxima for fp16
  static constexpr int kStepBytes = kThreads * 8 * kChunk * 2;
  static constexpr int kRoundBytes = kThreads * 4 * 8 * sizeof(Y);
  static LORA_EXT_HOST_DEVICE int xa_stride(int max_rank) {
    return (max_rank + kSpan - 1) / kSpan * kSpan + 8;
  }
  static LORA_EXT_HOST_DEVICE int staged(int max_rank) { return max_rank <= kSpan ? 1 : kStaged; }
  // 64 tokens in two halves up to rank 512; above, half the tokens at a time.
  static LORA_EXT_HOST_DEVICE int tokens(int max_rank) {
    return max_rank <= 256 ? kWideTileTokens : kRound;
  }
  static LORA_EXT_HOST_DEVICE int bytes(int max_rank) {
    return kHeader + staged(max_rank) * kStepBytes + kBuffers * kRoundBytes +
           4 * tokens(max_rank) * xa_stride(max_rank);
  }
};

LORA_EXT_HOST_DEVICE inline int expand_blocks(const Slices& slices, int slice, int columns) {
  return (slices.offset[slice + 1] - slices.offset[slice] + columns - 1) / columns;
}

template <typename T, typename Y, int kChunk, bool kVector>
__device__ __forceinline__ void expand_body(const ExpandParams& p, const Tile& tile, int rank,
                                            int slice, int block, unsigned char* shared) {
  using Shared = ExpandShared<Y, kChunk>;
  constexpr int kSpan = Shared::kSpan, kThreads = Shared::kThreads;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4,
            q = lane % 4;
  const int num_staged = Shared::staged(p.max_rank), xa_tokens = Shared::tokens(p.max_rank);
  const int xa_stride = Shared::xa_stride(p.max_rank);
  int* token_ids = reinterpret_cast<int*>(shared);
  int* token_max = token_ids + kWideTileTokens;
  T* staged_b = reinterpret_cast<T*>(shared + Shared::kHeader) +
                thread * kChunk;  // [step][8][thread][kChunk]
  Y* staged_y =
      reinterpret_cast<Y*>(shared + Shared::kHeader + num_staged * Shared::kStepBytes) + thread * 8;
  T* xa_high = reinterpret_cast<T*>(shared + Shared::kHeader + num_staged * Shared::kStepBytes +
                                    kBuffers * Shared::kRoundBytes);  // [xa_tokens][xa_stride]
  T* xa_low = xa_high + xa_tokens * xa_stride;

  const int first_column = p.slices.offset[slice];
  const int width = p.slices.offset[slice + 1] - first_column;
  const int column = block * Shared::kColumns + warp * kUnitColumns + 8 * g;
  const int64_t b_stride = p.b.stride(slice, rank);
  const T* b = static_cast<const T*>(p.b.base[slice]) + p.b.row_offset(tile.slot, slice, rank, 0) +
               column * b_stride;
  Y* y = static_cast<Y*>(p.y) + first_column + column;
  const int rounds = (tile.count + kRound - 1) / kRound;

  const auto stage_b = [&](int j0, int step) {
    const int j = j0 + step * kSpan + q * kChunk, valid = min(max(rank - j, 0), kChunk);
    T* to = staged_b + step * 8 * kThreads * kChunk;
    const T* row = b + j;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kVector) {  // columns come in whole eights
        if (column < width) {
          if constexpr (kChunk == 8) {
            device::copy_async_16(to, row, 2 * valid);
          } else {
            device::copy_async_8(to, row, 2 * valid);
          }
        }
      } else {
        device::Chunk<T, kChunk> chunk;
        device::load_scalars(chunk, row, column + i < width ? valid : 0);
        *reinterpret_cast<device::Chunk<T, kChunk>*>(to) = chunk;
      }
      row += b_stride;
      to += kThreads * kChunk;
    }
  };
  // Output o of a lane: token 8 * (o / 2) + 2 q + o % 2 of the round, eight columns.
  const auto output_row = [&](int round, int o) {
    const int id = token_ids[round * kRound + 8 * (o / 2) + 2 * q + o % 2];
    return id >= 0 ? y + id * p.y_stride : nullptr;
  };
  const auto stage_y = [&](int round) {
    if (kVector && round < rounds && column < width) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        const Y* from = output_row(round, o);
        if (from != nullptr) {
          Y* to = staged_y + (round % kBuffers * 4 + o) * kThreads * 8;
#pragma unroll
          for (int i = 0; i < 8; i += 16 / static_cast<int>(sizeof(Y))) {
            device::copy_async_16(to + i, from + i, 16);
          }
        }
      }
    }
    device::copy_async_commit();
  };
  const bool stays = rank <= num_staged * kSpan;
  for (int step = 0; step < num_staged && stays && step * kSpan < rank; ++step) {
    stage_b(0, step);
  }
  stage_y(0);
  stage_y(1);
  if (p.after_xa) {
    device::grid_dependency_wait();  // xa is all that the kernel before has written
  }

  // xa of tokens [first, first + xa_tokens) to two halves; ranks up to the end of a step become 0.
  const int padded = (rank + kSpan - 1) / kSpan * kSpan;
  const auto split_xa = [&](int first) {
    const int tokens = min(rounds * kRound - first, xa_tokens);
    // A few threads share a token, four ranks each at a time: no division, and all loads of a
    // thread are independent.
    constexpr int kSharers = kThreads / kWideTileTokens;
    const int token = thread / kSharers;
    const int id = token < tokens ? token_ids[first + token] : -1;
    const float* from =
        static_cast<const float*>(p.xa) + max(id, 0) * p.xa_stride + int64_t{slice} * rank;
    const bool vector =
        p.xa_stride % 4 == 0 && slice * rank % 4 == 0 && device::is_aligned(p.xa, 16);
    const auto load = [&](float(&values)[4], int j) {
      if (vector && id >= 0 && j + 4 <= rank) {
        const float4 quad = *reinterpret_cast<const float4*>(from + j);
        values[0] = quad.x, values[1] = quad.y, values[2] = quad.z, values[3] = quad.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          values[e] = id >= 0 && j + e < rank ? from[j + e] : 0.0f;
        }
      }
    };
    if constexpr (device::kNeedsScale<T>) {
      for (int j = thread % kSharers * 4; j < rank && token < tokens; j += kSharers * 4) {
        float values[4];
        load(values, j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          atomicMax(token_max + first + token, __float_as_int(fabsf(values[e])));
        }
      }
      __syncthreads();
    }
    const float scale = device::kNeedsScale<T> && token < tokens
                            ? device::scale_down(token_max[first + token])
                            : 1.0f;
#pragma unroll 4
    for (int j = thread % kSharers * 4; j < padded; j += kSharers * 4) {
      if (token < tokens) {
        float values[4];
        load(values, j);
        T high[4], low[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          device::split(values[e] * scale, high[e], low[e]);
        }
        const int at = token * xa_stride + j;
        *reinterpret_cast<uint2*>(xa_high + at) = device::pack_four(high);
        *reinterpret_cast<uint2*>(xa_low + at) = device::pack_four(low);
      }
    }
    __syncthreads();
  };
  if (xa_tokens == kWideTileTokens) {
    split_xa(0);
  }

  for (int round = 0; round < rounds; ++round) {
    if (xa_tokens < kWideTileTokens) {
      __syncthreads();
      split_xa(round * kRound);
    }
    const int xa_row = xa_tokens < kWideTileTokens ? 0 : round * kRound;
    stage_y(round + 2);
    float acc[4][2][4] = {};
    for (int j = 0; j < rank; j += kSpan) {
      int step = j / kSpan;
      if (!stays) {
        step = 0;
        stage_b(j, 0);
        device::copy_async_commit();
        device::copy_async_wait<0>();
      } else if (j == 0) {
        device::copy_async_wait<2>();
      }
      device::Chunk<T, kChunk> high[2], low[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int from = (xa_row + 8 * n + g) * xa_stride + j + q * kChunk;
        high[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_high + from);
        low[n] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(xa_low + from);
      }
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        device::Chunk<T, kChunk> weights[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          weights[h] = *reinterpret_cast<const device::Chunk<T, kChunk>*>(
              staged_b + (step * 8 + 2 * block + h) * kThreads * kChunk);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int w = 0; w < kChunk / 2; w += 2) {
            device::mma<T>(acc[block][n], weights[0].words[w], weights[1].words[w],
                           weights[0].words[w + 1], weights[1].words[w + 1], high[n].words[w],
                           high[n].words[w + 1]);
            device::mma<T>(acc[block][n], weights[0].words[w], weights[1].words[w],
                           weights[0].words[w + 1], weights[1].words[w + 1], low[n].words[w],
                           low[n].words[w + 1]);
          }
        }
      }
    }
    if (column < width) {
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        Y* to = output_row(round, o);
        if (to == nullptr) {
          continue;
        }
        float delta[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          delta[i] = acc[i / 2][o / 2][i % 2 * 2 + o % 2];
          if constexpr (device::kNeedsScale<T>) {
            delta[i] *= device::scale_up(token_max[round * kRound + 8 * (o / 2) + 2 * q + o % 2]);
          }
        }
        device::Outputs<Y> outputs;
        if constexpr (kVector) {
          outputs.load(staged_y + (round % kBuffers * 4 + o) * kThreads * 8);
          outputs.add(delta);
          outputs.store(to);
        } else {
          outputs.load_scalars(to, width - column);
          outputs.add(delta);
          outputs.store_scalars(to, width - column);
        }
      }
    }
  }
}

// after_xa: the kernel before in the stream wrote xa (shrink or embedding) and has itself waited
// for all that came before it; so only xa is yet to come, and all else may be fetched while that
// kernel is at work.
template <typename T, typename Y, int kChunk, bool kGeneral>
__global__ void __launch_bounds__(ExpandShared<Y, kChunk>::kThreads, 3)
    expand_kernel(const __grid_constant__ ExpandParams p, unsigned blocks_per_tile, bool vector_y) {
  using Shared = ExpandShared<Y, kChunk>;
  extern __shared__ __align__(128) unsigned char shared[];
  int* token_ids = reinterpret_cast<int*>(shared);
  if (!p.after_xa) {
    device::grid_dependency_wait();
  }
  device::grid_dependency_launch();
  // Blocks of one tile come one behind the other: together they cover whole rows of y, which DRAM
  // serves better than the same columns of many rows.
  const Tile tile = p.plan.wide_tiles[blockIdx.x / blocks_per_tile];
  int slice = 0, block = static_cast<int>(blockIdx.x % blocks_per_tile);
  for (; slice < p.slices.count - 1; ++slice) {
    const int blocks = expand_blocks(p.slices, slice, Shared::kColumns);
    if (block < blocks) {
      break;
    }
    block -= blocks;
  }
  if (tile.slot < 0) {
    return;
  }
  const int rank = min(p.ranks[tile.slot], p.max_rank);
  for (int i = threadIdx.x; i < kWideTileTokens; i += Shared::kThreads) {
    const int id = i < tile.count ? p.plan.permutation[tile.start + i] : -1;
    token_ids[i] = id < p.num_tokens ? id : -1;  // a plan may be for more tokens than this call has
    token_ids[kWideTileTokens + i] = 0;
  }
  __syncthreads();
  if (rank <= 0) {
    return;
  }
  if constexpr (!kGeneral) {
    expand_body<T, Y, kChunk, true>(p, tile, rank, slice, block, shared);
  } else {
    const T* b = static_cast<const T*>(p.b.base[slice]) + p.b.row_offset(tile.slot, slice, rank, 0);
    if (vector_y && p.b.stride(slice, rank) % kChunk == 0 && device::is_aligned(b, 2 * kChunk)) {
      expand_body<T, Y, kChunk, true>(p, tile, rank, slice, block, shared);
    } else {
      expand_body<T, Y, kChunk, false>(p, tile, rank, slice, block, shared);
    }
  }
}

constexpr int kFloatThreads = 256;

// fp32: a block serves one token, a thread one column at a time.
template <typename Y>
__global__ void __launch_bounds__(kFloatThreads)
    expand_float_kernel(const __grid_constant__ ExpandParams p) {
  const int64_t token = blockIdx.x;
  const int slot = p.plan.token_slots[token];
  const int rank = slot >= 0 ? min(p.ranks[slot], p.max_rank) : 0;
  if (rank <= 0) {
    return;
  }
  Y* y = static_cast<Y*>(p.y) + token * p.y_stride;
  for (int slice = 0; slice < p.slices.count; ++slice) {
    const int first = p.slices.offset[slice], width = p.slices.offset[slice + 1] - first;
    const float* xa = static_cast<const float*>(p.xa) + token * p.xa_stride + slice * rank;
    for (int n = threadIdx.x; n < width; n += kFloatThreads) {
      const float* b =
          static_cast<const float*>(p.b.base[slice]) + p.b.row_offset(slot, slice, rank, n);
      float sum = 0.0f;
      for (int j = 0; j < rank; ++j) {
        sum = fmaf(xa[j], b[j], sum);
      }
      y[first + n] = device::from_float<Y>(device::to_float(y[first + n]) + sum);
    }
  }
}

bool vector_outputs(const ExpandParams& p) {
  bool vector = is_multiple(p.y, p.y_stride, 8, 16);
  for (int i = 0; i < p.slices.count; ++i) {
    vector &= p.slices.offset[i + 1] % 8 == 0;
  }
  return vector;
}

// As many CTAs as are resident at once share the work. Two to an SM, except where registers allow
// one; spans and stages fill the shared memory that every chip has.
template <typename T, typename Y, int kSteps>
cudaError_t launch_stream(const ExpandParams& p) {
  constexpr bool kWideOutputs = sizeof(Y) == 4;
  constexpr int kSpans = kSteps <= 2 && !kWideOutputs ? 2 : 1;
  constexpr int kStages = kSteps <= 2 || kWideOutputs ? 2 : 3;
  constexpr int kBlocks = kSteps <= 4 && !kWideOutputs ? 2 : 1;
  using Traits = StreamTraits<Y, kSteps, kSpans, kStages>;
  static_assert(Traits::kSharedBytes <= kMaxSharedBytes);
  int row_steps = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    row_steps += expand_blocks(p.slices, i, Traits::kColumns);
  }
  const int64_t items = max_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens) * row_steps;
  LaunchShape shape{};
  const int64_t resident = int64_t{device_properties().sm_count} * kBlocks;
  shape.grid =
      dim3(static_cast<unsigned>(std::min(items, expand_walks(p.num_tokens, row_steps, resident))));
  shape.threads = kStreamThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(expand_stream_kernel<T, Y, kSteps, kSpans, kStages, kBlocks>, shape,
                       p.stream, ExpandWork{p, row_steps, static_cast<unsigned>(resident)});
}

// The same on sm_90a for ranks above 32.
template <typename T, typename Y, int kSteps>
cudaError_t launch_wgmma_stream(const ExpandParams& p) {
  using Traits = WgmmaExpandTraits<Y, kSteps>;
  int row_steps = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    row_steps += expand_blocks(p.slices, i, Traits::kColumns);
  }
  const int64_t items = max_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens) * row_steps;
  LaunchShape shape{};
  const int64_t resident = int64_t{device_properties().sm_count} * Traits::kBlocks;
  shape.grid =
      dim3(static_cast<unsigned>(std::min(items, expand_walks(p.num_tokens, row_steps, resident))));
  shape.threads = kWgmmaExpandThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  shape.cluster = 1;
  shape.dependent = true;
  ExpandMaps maps;
  for (int i = 0; i < p.slices.count; ++i) {
    const int64_t columns = std::max(p.slices.offset[i + 1] - p.slices.offset[i], 1);
    const T* first = static_cast<const T*>(p.b.base[i]) + p.b.first_row[i] * p.b.row_stride[i];
    const int64_t slots = p.plan.num_slots;
    const int64_t slot_stride = slots > 1 ? p.b.slot_stride[i] : columns * p.b.row_stride[i];
    if (!encode_map(maps.b[i], p.dtype,
                    {first, p.max_rank, columns, p.b.row_stride[i], slots, slot_stride},
                    Traits::kColumns)) {
      return cudaErrorInvalidValue;
    }
  }
  return launch_kernel(expand_wgmma_kernel<T, Y, kSteps>, shape, p.stream,
                       ExpandWork{p, row_steps, static_cast<unsigned>(resident)}, maps);
}

// Whether that kernel can serve B where expand_reads_tiles: its copies need a tensor map.
bool takes_wgmma(const ExpandParams& p) {
  bool takes = has_wgmma() && has_tensor_maps();
  for (int i = 0; i < p.slices.count; ++i) {
    takes &= p.b.row_stride[i] >= p.max_rank &&
             (p.plan.num_slots == 1 || p.b.slot_stride[i] >= p.b.row_stride[i]);
  }
  return takes;
}

template <typename T, typename Y, int kChunk>
cudaError_t launch_expand(const ExpandParams& p) {
  using Shared = ExpandShared<Y, kChunk>;
  unsigned blocks_per_tile = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    blocks_per_tile += expand_blocks(p.slices, i, Shared::kColumns);
  }
  const bool vector_y = vector_outputs(p);
  const bool all_vector = vector_y && p.b.slot_offsets == nullptr &&
                          is_multiple(p.b, p.slices.count, kChunk, 2 * kChunk);
  LaunchShape shape{};
  shape.grid =
      dim3(static_cast<unsigned>(max_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens)) *
           blocks_per_tile);
  shape.threads = Shared::kThreads;
  shape.shared_bytes = Shared::bytes(p.max_rank);
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(
      all_vector ? expand_kernel<T, Y, kChunk, false> : expand_kernel<T, Y, kChunk, true>, shape,
      p.stream, p, blocks_per_tile, vector_y);
}

}  // namespace

bool expand_reads_tiles(const ExpandParams& p) {
  return p.dtype != DType::kFloat32 && expand_streams(p.num_tokens, p.max_rank) &&
         vector_outputs(p) && p.b.slot_offsets == nullptr &&
         is_multiple(p.b, p.slices.count, 8, 16);
}

int expand(const ExpandParams& p) {
  if (p.dtype == DType::kFloat32) {
    const auto blocks = static_cast<unsigned>(p.num_tokens);
    const auto stream = static_cast<cudaStream_t>(p.stream);
    switch (p.y_dtype) {
      case DType::kFloat32:
        expand_float_kernel<float><<<blocks, kFloatThreads, 0, stream>>>(p);
        break;
      case DType::kBFloat16:
        expand_float_kernel<__nv_bfloat16><<<blocks, kFloatThreads, 0, stream>>>(p);
        break;
      default:
        expand_float_kernel<__half><<<blocks, kFloatThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  }
  const bool streams = expand_reads_tiles(p), wgmma = streams && takes_wgmma(p);
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    if (streams) {
      if (p.max_rank <= 32) {
        return p.max_rank <= 16 ? launch_stream<T, Y, 1>(p) : launch_stream<T, Y, 2>(p);
      }
      if (wgmma) {
        return p.max_rank <= 64 ? launch_wgmma_stream<T, Y, 4>(p) : launch_wgmma_stream<T, Y, 8>(p);
      }
      return p.max_rank <= 64 ? launch_stream<T, Y, 4>(p) : launch_stream<T, Y, 8>(p);
    }
    return p.max_rank <= 16 ? launch_expand<T, Y, 4>(p) : launch_expand<T, Y, 8>(p);
  });
}

}  // namespace lora_ext::cuda

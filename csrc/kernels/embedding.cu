// Embedding side of LoRA: one column of A per token, gathered and scaled to fp32; and its apply,
// the decode expand with the gather in place of the partial products, so that one launch does all.
//
// In the gather alone a warp serves one token. With A stored vocabulary-major ([L, V, R] seen as
// [L, R, V]) its lanes read one contiguous run; with the engines' [L, R, V] each rank costs a
// sector of its own, which no order of threads can mend.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "kernels/decode_expand.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

constexpr int kWarps = 4;

// Where the elements of a token's column of A are; null where no adapter has this id.
template <typename T>
struct Column {
  const T* first;
  int64_t stride;
};

__device__ __forceinline__ int64_t read_id(const EmbeddingParams& p, int64_t token) {
  return p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[token]
                         : static_cast<const int32_t*>(p.ids)[token];
}

template <typename T>
__device__ __forceinline__ Column<T> find_column(const EmbeddingParams& p, int64_t id, int slot) {
  id -= p.vocab_start;
  if (id >= 0 && id < p.vocab_size) {
    return {static_cast<const T*>(p.a) + slot * p.a_slot_stride + id * p.a_vocab_stride,
            p.a_rank_stride};
  }
  if (id >= p.vocab_size && id - p.vocab_size < p.num_extra) {
    return {static_cast<const T*>(p.extra_a) + slot * p.extra_slot_stride +
                (id - p.vocab_size) * p.extra_token_stride,
            1};
  }
  return {nullptr, 0};
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps) embedding_kernel(EmbeddingParams p) {
  device::grid_dependency_launch();  // an expand behind it can fetch its weights and y meanwhile
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; t < p.num_tokens; t += step) {
    const int slot = p.plan.token_slots[t];
    int rank = 0;
    float scaling = 0.0f;
    Column<T> column{};
    if (slot >= 0) {
      column = find_column<T>(p, read_id(p, t), slot);
      rank = column.first != nullptr ? min(p.ranks[slot], p.max_rank) : 0;
      scaling = p.scalings[slot];
    }
    float* out = static_cast<float*>(p.xa) + t * p.xa_stride;
    for (int j = lane; j < p.max_rank; j += 32) {
      out[j] = j < rank ? scaling * device::to_float(column.first[j * column.stride]) : 0.0f;
    }
  }
}

// The columns of a tile's tokens, whose ids are asked for before B and y are, and which come to
// shared memory in one round of loads.
template <typename T>
struct GatheredColumns {
  const EmbeddingParams& p;
  const DecodeTile& t;
  Column<T>* columns;  // [16] in shared memory
  int2* ids;           // the same, as they come: one word or two
  float scaling;
  const T* values;
  int stride;

  __device__ __forceinline__ GatheredColumns(const EmbeddingParams& p_, const DecodeTile& t_,
                                             Column<T>* columns_, int2* ids_)
      : p(p_), t(t_), columns(columns_), ids(ids_) {
    if (threadIdx.x < kTileTokens && t.token >= 0) {
      const int words = p.ids_are_int64 ? 2 : 1;
      const int32_t* from = static_cast<const int32_t*>(p.ids) + int64_t{words} * t.token;
      device::copy_async_4(&ids[threadIdx.x].x, from);
      device::copy_async_4(&ids[threadIdx.x].y, from + words - 1);
    }
    device::copy_async_commit();
  }

  // room: [16][room_stride], which is xa's low half as soon as each value was read.
  __device__ __forceinline__ void wait(T* room, int room_stride) {
    scaling = read_plan<true>(p.scalings + t.slot);
    device::copy_async_wait<2>();  // all but B and y
    if (threadIdx.x < kTileTokens) {
      const int2 words = ids[threadIdx.x];
      const int64_t id =
          p.ids_are_int64 ? int64_t{words.y} << 32 | static_cast<uint32_t>(words.x) : words.x;
      columns[threadIdx.x] = t.token >= 0 ? find_column<T>(p, id, t.slot) : Column<T>{};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileTokens * ((t.rank + 7) / 8); i += kExpandThreads) {
      const Column<T> column = columns[i % kTileTokens];
      const int row = i / kTileTokens * 8;
      const T* from = column.first + row * column.stride;
      const int valid = column.first != nullptr ? t.rank - row : 0;
      device::Chunk<T, 8> chunk;
      if (column.stride == 1 && valid >= 8 && device::is_aligned(from, 16)) {
        device::load_vector(chunk, from, true);
      } else {
        T single[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          single[e] = e < valid ? from[e * column.stride] : T(0.0f);
        }
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          chunk.words[e / 2] = device::pack_two(single[e], single[e + 1]);
        }
      }
      *reinterpret_cast<device::Chunk<T, 8>*>(room + i % kTileTokens * room_stride + row) = chunk;
    }
    __syncthreads();
    values = room, stride = room_stride;
  }
  template <int kCount>
  __device__ __forceinline__ void quads(const int (&rows)[kCount], int token,
                                        float4 (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T* from = values + token * stride + rows[i];
      sums[i] =
          make_float4(scaling * device::to_float(from[0]), scaling * device::to_float(from[stride]),
                      scaling * device::to_float(from[2 * stride]),
                      scaling * device::to_float(from[3 * stride]));
    }
  }
};

// Before the wait: what is likely needed of B comes to L2, as in the decode shrink.
template <typename T, typename Y, int kChunk, bool kGeneral>
__global__ void __launch_bounds__(kExpandThreads, kChunk == 4 ? 5 : 4)
    embedding_apply_kernel(const __grid_constant__ EmbeddingParams p,
                           const __grid_constant__ DecodeExpandParams expand) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Column<T> columns[kTileTokens];
  __shared__ int2 ids[kTileTokens];
  const int tile = blockIdx.x / expand.blocks_per_tile, block = blockIdx.x % expand.blocks_per_tile;
  DecodeTile t = read_tile<false>(expand.batch, tile, 0, 0);
  prefetch_b<T>(expand, t, 0, block);
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  t = read_tile<true>(expand.batch, tile, t.slot, t.start);
  if (t.slot < 0 || t.rank <= 0) {
    return;
  }
  GatheredColumns<T> xa(p, t, columns, ids);
  decode_expand<T, Y, kChunk, kGeneral>(expand, t, xa, 0, block, shared);
}

template <typename T, typename Y, int kChunk>
cudaError_t launch_apply(const EmbeddingParams& p, const ExpandParams& e) {
  DecodeExpandParams d{};
  d.batch.tiles = e.plan.tiles;
  d.batch.permutation = e.plan.permutation;
  d.batch.ranks = e.ranks;
  d.batch.tile_capacity =
      static_cast<int32_t>(max_tiles(e.num_tokens, e.plan.num_slots, kTileTokens));
  d.batch.max_tokens = static_cast<int32_t>(e.plan.max_tokens);
  d.batch.num_slots = static_cast<int32_t>(e.plan.num_slots);
  d.batch.num_tokens = static_cast<int32_t>(e.num_tokens);
  d.batch.max_rank = e.max_rank;
  d.batch.num_slices = 1;
  d.y = e.y;
  d.y_stride = e.y_stride;
  add_slice(d, e.b, e.slices, 0);
  const bool all_vector = d.vector_y && is_multiple(e.b, 1, kChunk, 2 * kChunk);
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(int64_t{d.batch.tile_capacity} * d.blocks_per_tile));
  shape.threads = kExpandThreads;
  shape.shared_bytes = DecodeExpandTraits<Y, kChunk>::shared_bytes(e.max_rank);
  shape.cluster = 1;
  shape.dependent = true;
  return launch_kernel(all_vector ? embedding_apply_kernel<T, Y, kChunk, false>
                                  : embedding_apply_kernel<T, Y, kChunk, true>,
                       shape, p.stream, p, d);
}

}  // namespace

int embedding(const EmbeddingParams& params) {
  const auto blocks =
      static_cast<unsigned>(min((params.num_tokens + kWarps - 1) / kWarps, int64_t{1} << 20));
  const auto stream = static_cast<cudaStream_t>(params.stream);
  switch (params.dtype) {
    case DType::kBFloat16:
      embedding_kernel<__nv_bfloat16><<<blocks, 32 * kWarps, 0, stream>>>(params);
      break;
    case DType::kFloat16:
      embedding_kernel<__half><<<blocks, 32 * kWarps, 0, stream>>>(params);
      break;
    default:
      embedding_kernel<float><<<blocks, 32 * kWarps, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

int embedding_apply(const EmbeddingApplyParams& both) {
  EmbeddingParams p = both.gather;
  ExpandParams e = both.expand;
  p.stream = e.stream = both.stream;
  if (!embedding_is_one_kernel(e.num_tokens, p.dtype != DType::kFloat32)) {
    const int error = embedding(p);
    return error != 0 ? error : expand(e);
  }
  return dispatch_half_output(e.dtype, e.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    return e.max_rank <= 16 ? launch_apply<T, Y, 4>(p, e) : launch_apply<T, Y, 8>(p, e);
  });
}

}  // namespace lora_ext::cuda

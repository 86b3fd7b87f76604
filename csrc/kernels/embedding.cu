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

template <typename T>
__device__ __forceinline__ Column<T> find_column(const EmbeddingParams& p, int64_t token,
                                                 int slot) {
  const int64_t id = (p.ids_are_int64 ? static_cast<const int64_t*>(p.ids)[token]
                                      : static_cast<const int32_t*>(p.ids)[token]) -
                     p.vocab_start;
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
      column = find_column<T>(p, t, slot);
      rank = column.first != nullptr ? min(p.ranks[slot], p.max_rank) : 0;
      scaling = p.scalings[slot];
    }
    float* out = static_cast<float*>(p.xa) + t * p.xa_stride;
    for (int j = lane; j < p.max_rank; j += 32) {
      out[j] = j < rank ? scaling * device::to_float(column.first[j * column.stride]) : 0.0f;
    }
  }
}

// The columns of a tile's tokens, found when the copies of B and y are under way.
template <typename T>
struct GatheredColumns {
  const EmbeddingParams& p;
  const DecodeTile& t;
  Column<T>* columns;  // [16] in shared memory
  float scaling;

  __device__ __forceinline__ void wait() {
    scaling = p.scalings[t.slot];
    if (threadIdx.x < kTileTokens) {
      columns[threadIdx.x] = t.token >= 0 ? find_column<T>(p, t.token, t.slot) : Column<T>{};
    }
    __syncthreads();
  }
  __device__ __forceinline__ float4 quad(int row, int token) const {
    float values[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Column<T> column = columns[token + e];
      values[e] = column.first != nullptr
                      ? scaling * device::to_float(column.first[row * column.stride])
                      : 0.0f;
    }
    return make_float4(values[0], values[1], values[2], values[3]);
  }
};

// Before the wait: what is likely needed of B comes to L2, as in the decode shrink.
template <typename T, typename Y, int kChunk, bool kGeneral>
__global__ void __launch_bounds__(kExpandThreads, kChunk == 4 ? 6 : 4)
    embedding_apply_kernel(const __grid_constant__ EmbeddingParams p,
                           const __grid_constant__ DecodeExpandParams expand) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Column<T> columns[kTileTokens];
  const int tile = blockIdx.x / expand.blocks_per_tile, block = blockIdx.x % expand.blocks_per_tile;
  DecodeTile t = read_tile(expand.batch, tile, 0, 0);
  prefetch_b<T>(expand, t, 0, block);
  device::grid_dependency_wait();
  device::grid_dependency_launch();
  t = read_tile(expand.batch, tile, t.slot, t.start);
  if (t.slot < 0 || t.rank <= 0) {
    return;
  }
  GatheredColumns<T> xa{p, t, columns, 0.0f};
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

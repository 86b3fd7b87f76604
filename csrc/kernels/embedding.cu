// Embedding side of LoRA: one column of A per token, gathered and scaled to fp32; and its apply, in
// one launch where columns are in one piece and registers hold them.
//
// In the gather alone a warp serves one token. With A stored vocabulary-major ([L, V, R] seen as
// [L, R, V]) its lanes read one contiguous run; with the engines' [L, R, V] each rank costs a
// sector of its own, which no order of threads can mend. An apply of more than 64 tokens would read
// them again for every few columns of y too often: it gathers them first, as they are, and goes on
// with what has become one piece.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/embedding_few.cuh"
#include "kernels/embedding_slots.cuh"
#include "kernels/embedding_tiles.cuh"
#include "kernels/heuristics.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

constexpr int kWarps = 4;
// Tokens up to which columns that are not in one piece become one. A gather of more takes so long
// that the walk along rows of y, which has more of them on their way meanwhile, wins (2,048 tokens,
// rank 64: 23.8 us, 27.6 so).
constexpr int64_t kGatheredTokens = 256;

// Out: float, scaled; or T, the values as they are.
template <typename T, typename Out>
__global__ void __launch_bounds__(32 * kWarps) embedding_kernel(EmbeddingParams p) {
  device::grid_dependency_wait();
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
    Out* out = static_cast<Out*>(p.xa) + t * p.xa_stride;
    for (int j = lane; j < p.max_rank; j += 32) {
      if constexpr (sizeof(Out) == 2) {
        out[j] = j < rank ? column.first[j * column.stride] : T(0.0f);
      } else {
        out[j] = j < rank ? scaling * device::to_float(column.first[j * column.stride]) : 0.0f;
      }
    }
  }
}

LaunchShape launch_shape(int64_t blocks, int threads, int shared_bytes) {
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  shape.cluster = 1;
  shape.dependent = true;
  return shape;
}

template <typename T, typename Out>
cudaError_t launch_gather(const EmbeddingParams& p, void* stream) {
  const int64_t blocks = std::min(ceil_div(p.num_tokens, kWarps), int64_t{1} << 20);
  return launch_kernel(embedding_kernel<T, Out>, launch_shape(blocks, 32 * kWarps, 0), stream, p);
}

EmbeddingJob job_of(const EmbeddingParams& p, const ExpandParams& e) {
  EmbeddingJob job{};
  job.ids = p.ids;
  job.ids_are_int64 = p.ids_are_int64;
  job.a = p.a;
  job.a_slot_stride = p.a_slot_stride;
  job.a_rank_stride = p.a_rank_stride;
  job.a_vocab_stride = p.a_vocab_stride;
  job.extra_a = p.extra_a;
  job.extra_slot_stride = p.extra_slot_stride;
  job.extra_token_stride = p.extra_token_stride;
  job.num_extra = p.num_extra;
  job.vocab_start = p.vocab_start;
  job.vocab_size = p.vocab_size;
  job.b = static_cast<const char*>(e.b.base[0]) + 2 * e.b.first_row[0] * e.b.row_stride[0];
  job.b_slot_stride = e.b.slot_stride[0];
  job.b_row_stride = e.b.row_stride[0];
  job.y = e.y;
  job.y_stride = e.y_stride;
  job.columns = e.slices.offset[1];
  job.ranks = p.ranks;
  job.scalings = p.scalings;
  job.token_slots = p.plan.token_slots;
  job.permutation = p.plan.permutation;
  job.tiles = p.plan.wide_tiles;
  job.num_tokens = static_cast<int32_t>(p.num_tokens);
  job.num_slots = static_cast<int32_t>(p.plan.num_slots);
  job.max_tokens = static_cast<int32_t>(p.plan.max_tokens);
  job.max_rank = p.max_rank;
  return job;
}

// Whether every column of A is in one piece that allows vector accesses.
bool has_whole_columns(const EmbeddingParams& p) {
  const auto is_whole = [](const void* first, int64_t rank_stride, int64_t stride, int64_t slots) {
    return rank_stride == 1 && is_multiple(first, stride, 8, 16) && slots % 8 == 0;
  };
  return p.max_rank % 8 == 0 && is_whole(p.a, p.a_rank_stride, p.a_vocab_stride, p.a_slot_stride) &&
         (p.num_extra == 0 || is_whole(p.extra_a, 1, p.extra_token_stride, p.extra_slot_stride));
}

template <typename T, int kLanes>
cudaError_t launch_few(EmbeddingJob job, bool whole, void* stream) {
  job.blocks = static_cast<int32_t>(ceil_div(job.columns, kFewColumns));
  return launch_kernel(
      whole ? embedding_few_kernel<T, kLanes, true> : embedding_few_kernel<T, kLanes, false>,
      launch_shape(int64_t{job.num_tokens} * job.blocks, kFewThreads, 0), stream, job);
}

template <typename T, int kChunk, int kSteps, int kRows>
cudaError_t launch_slots(EmbeddingJob job, bool whole, void* stream) {
  job.blocks = static_cast<int32_t>(ceil_div(job.columns, kSlotsWarps * 8 * kRows));
  job.groups = std::min({job.num_tokens, job.num_slots, kSlotsTokens});
  return launch_kernel(
      whole ? embedding_slots_kernel<T, kChunk, kSteps, kRows, true>
            : embedding_slots_kernel<T, kChunk, kSteps, kRows, false>,
      launch_shape(ceil_div(job.num_tokens, kSlotsTokens) * job.groups * job.blocks, kSlotsThreads,
                   0),
      stream, job);
}

// A look at the plan ahead of time where CTAs are few: with more it delays those that come later.
template <typename T, int kSteps, bool kWgmma, int kBlocks>
cudaError_t launch_tiles(EmbeddingJob job, void* stream) {
  using Traits = EmbeddingTraits<kSteps, kWgmma>;
  const int64_t tokens = job.num_tokens, slots = job.num_slots;
  const int sm_count = device_properties().sm_count;
  job.blocks = static_cast<int32_t>(ceil_div(job.columns, kEmbeddingColumns));
  job.groups = static_cast<int32_t>(max_tiles(tokens, slots, kWideTileTokens));
  job.looks_ahead = likely_tiles(tokens, slots, kWideTileTokens) * job.blocks <= 2 * sm_count;
  return launch_kernel(embedding_tiles_kernel<T, kSteps, kWgmma, kBlocks>,
                       launch_shape(embedding_grid_tiles(tokens, slots, sm_count) * job.blocks,
                                    kEmbeddingThreads, Traits::kSharedBytes),
                       stream, job);
}

template <typename T>
cudaError_t apply(const EmbeddingParams& p, const ExpandParams& e) {
  EmbeddingJob job = job_of(p, e);
  const bool whole = has_whole_columns(p);
  if (embedding_is_few(job.num_tokens)) {
    return job.max_rank <= 16   ? launch_few<T, 2>(job, whole, p.stream)
           : job.max_rank <= 32 ? launch_few<T, 4>(job, whole, p.stream)
           : job.max_rank <= 64 ? launch_few<T, 8>(job, whole, p.stream)
                                : launch_few<T, 16>(job, whole, p.stream);
  }
  if (embedding_is_by_slots(job.num_tokens)) {
    return job.max_rank <= 16   ? launch_slots<T, 4, 1, 8>(job, whole, p.stream)
           : job.max_rank <= 32 ? launch_slots<T, 8, 1, 8>(job, whole, p.stream)
           : job.max_rank <= 64 ? launch_slots<T, 8, 2, 8>(job, whole, p.stream)
                                : launch_slots<T, 8, 4, 4>(job, whole, p.stream);
  }
  if (!whole) {
    EmbeddingParams gather = p;
    gather.xa_stride = ceil_div(p.max_rank, 8) * 8;
    const cudaError_t error = launch_gather<T, T>(gather, p.stream);
    if (error != cudaSuccess) {
      return error;
    }
    job.ids = nullptr;
    job.a = p.xa;
    job.a_slot_stride = 0;
    job.a_rank_stride = 1;
    job.a_vocab_stride = gather.xa_stride;
    job.vocab_start = job.num_extra = 0;
    job.vocab_size = job.num_tokens;
  }
  const bool wgmma = has_wgmma() && embedding_is_wide(job.num_tokens, job.num_slots, job.max_rank);
  if (job.max_rank <= 32) {
    return job.max_rank <= 16 ? launch_tiles<T, 1, false, 8>(job, p.stream)
                              : launch_tiles<T, 2, false, 6>(job, p.stream);
  }
  if (job.max_rank <= 64) {
    return wgmma ? launch_tiles<T, 4, true, 5>(job, p.stream)
                 : launch_tiles<T, 4, false, 4>(job, p.stream);
  }
  return wgmma ? launch_tiles<T, 8, true, 3>(job, p.stream)
               : launch_tiles<T, 8, false, 3>(job, p.stream);
}

}  // namespace

int embedding(const EmbeddingParams& p) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_gather<__nv_bfloat16, float>(p, p.stream);
    case DType::kFloat16:
      return launch_gather<__half, float>(p, p.stream);
    default:
      return launch_gather<float, float>(p, p.stream);
  }
}

int embedding_apply(const EmbeddingApplyParams& both) {
  EmbeddingParams p = both.gather;
  ExpandParams e = both.expand;
  p.stream = e.stream = both.stream;
  // 16 bytes at a time: the rows of B, y, and what a gather leaves in the room for xa, where it
  // takes half of that, in rows of whole eights.
  const bool vector = p.dtype != DType::kFloat32 && e.y_dtype == p.dtype && p.max_rank >= 4 &&
                      p.max_rank <= 128 && e.slices.offset[1] % 8 == 0 &&
                      is_multiple(e.y, e.y_stride, 8, 16) && is_multiple(e.b, 1, 8, 16) &&
                      is_multiple(p.xa, 8, 8, 16);
  if (vector && (has_whole_columns(p) || e.num_tokens <= kGatheredTokens)) {
    return dispatch_half(p.dtype, [&](auto t) { return apply<typename decltype(t)::type>(p, e); });
  }
  const int error = embedding(p);
  return error != 0 ? error : expand(e);
}

}  // namespace lora_ext::cuda

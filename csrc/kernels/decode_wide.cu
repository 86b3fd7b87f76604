// Launches the decode apply of wide tiles (decode_wide.cuh).
#include "kernels/decode_batch.cuh"
#include "kernels/decode_wide.h"
#include "kernels/decode_wide_expand.cuh"
#include "kernels/launch.cuh"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

WideWork wide_work(const ApplyParams& p, const WideSplit& split) {
  const int64_t tiles = max_tiles(p.num_tokens, p.plan.num_slots, kWideTileTokens);
  const int64_t columns = int64_t{p.slices.count} * padded_rank(p.max_rank);
  WideWork work{};
  work.split = split;
  work.most_tiles = static_cast<int32_t>(tiles);
  work.columns = static_cast<int32_t>(columns);
  work.parts = static_cast<float*>(p.workspace);
  return work;
}

template <typename T>
cudaError_t launch_shrink(const ApplyParams& p, const WideWork& work) {
  LaunchShape shape{};
  shape.grid = dim3(
      static_cast<unsigned>(work.split.cluster * (work.split.num_clusters + (p.beside ? 1 : 0))));
  shape.threads = WideShrinkTraits::kThreads;
  shape.shared_bytes = WideShrinkTraits::kSharedBytes;
  shape.cluster = work.split.cluster;
  shape.dependent = !p.beside;  // the capture knows already on what it depends, and how
  return launch_kernel(p.beside ? decode_wide_shrink_kernel<T, true> : decode_wide_shrink_kernel<T>,
                       shape, p.stream, p, work);
}

// As many CTAs of the expand as are resident at once.
template <typename T, typename Y, int kSteps>
cudaError_t launch_expand(const ApplyParams& p, const WideWork& work) {
  int64_t blocks = 0;
  for (int i = 0; i < p.slices.count; ++i) {
    blocks += ceil_div(p.slices.offset[i + 1] - p.slices.offset[i], kWideColumns);
  }
  const int64_t most = 2 * device_properties().sm_count;
  LaunchShape shape{};
  shape.threads = kWideThreads;
  shape.cluster = 1;
  shape.dependent = p.reduction == nullptr;  // else the capture knows already
  shape.grid = dim3(static_cast<unsigned>(std::min(work.most_tiles * blocks, most)));
  shape.shared_bytes = WideExpandTraits<kSteps>::kSharedBytes;
  return launch_kernel(p.beside ? decode_wide_expand_kernel<T, Y, kSteps, true>
                                : decode_wide_expand_kernel<T, Y, kSteps>,
                       shape, p.stream, p, work, static_cast<int>(blocks));
}

}  // namespace

bool decode_wide_takes(const ApplyParams& p) {
  return has_vectors(p) && p.max_rank <= kWideMostRank && has_wgmma();
}

int64_t decode_wide_workspace(const ApplyParams& p, const WideSplit& split) {
  const WideWork work = wide_work(p, split);
  return split.all_parts(work.most_tiles) * kWideTileTokens * work.columns;
}

int decode_wide_shrink(const ApplyParams& p, const WideSplit& split) {
  return dispatch_half(p.dtype, [&](auto t) {
    return launch_shrink<typename decltype(t)::type>(p, wide_work(p, split));
  });
}

int decode_wide_expand(const ApplyParams& p, const WideSplit& split) {
  const WideWork work = wide_work(p, split);
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    return p.max_rank <= 64 ? launch_expand<T, Y, 4>(p, work) : launch_expand<T, Y, 8>(p, work);
  });
}

}  // namespace lora_ext::cuda

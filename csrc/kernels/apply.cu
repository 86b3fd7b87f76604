// lora_apply_: the fused kernel where it pays, else shrink into a workspace and expand from it.
#include "kernels/apply_fused.cuh"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {
namespace {

ApplyConfig config_of(const ApplyParams& p) {
  const DeviceProperties device = device_properties();
  ApplyShape shape{};
  shape.num_tokens = p.num_tokens;
  shape.num_slots = p.plan.num_slots;
  shape.in_features = p.in_features;
  shape.num_slices = p.slices.count;
  shape.max_rank = p.max_rank;
  shape.sm_count = device.sm_count;
  shape.clusters = device.clusters && p.dtype != DType::kFloat32;
  shape.batch_invariant = p.batch_invariant;
  return apply_config(shape);
}

template <typename T, typename Y, int kRowBlocks>
cudaError_t launch_fused(const ApplyParams& p, const ApplyConfig& config) {
  const int cluster = config.cluster;
  constexpr int kChunk = FusedTraits<kRowBlocks, false>::kChunk;
  bool vector_x_y = is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0 &&
                    is_multiple(p.y, p.y_stride, 8, 16);
  for (int i = 0; i <= p.slices.count; ++i) {
    vector_x_y &= p.slices.offset[i] % 8 == 0;
  }
  const bool all_vector = vector_x_y && p.b.slot_offsets == nullptr &&
                          p.a.slot_offsets == nullptr && is_multiple(p.a, p.slices.count, 8, 16) &&
                          is_multiple(p.b, p.slices.count, kChunk, 2 * kChunk);
  FusedParams f{};
  f.tiles = p.plan.tiles;
  f.permutation = p.plan.permutation;
  f.ranks = p.ranks;
  f.scalings = p.scalings;
  f.x = p.x;
  f.y = p.y;
  f.x_stride = p.x_stride;
  f.y_stride = p.y_stride;
  f.a_offsets = p.a.slot_offsets;
  f.b_offsets = p.b.slot_offsets;
  f.cluster = cluster;
  f.max_tokens = static_cast<int32_t>(p.plan.max_tokens);
  f.num_slots = static_cast<int32_t>(p.plan.num_slots);
  f.num_tokens = static_cast<int32_t>(p.num_tokens);
  f.in_features = static_cast<int32_t>(p.in_features);
  f.max_rank = p.max_rank;
  f.a_rows_by_rank = p.a.rows_by_rank;
  f.vector_x_y = vector_x_y;
  for (int i = 0; i < p.slices.count; ++i) {
    FusedSlice& slice = f.slices[i];
    slice.a = p.a.base[i];
    slice.b = p.b.base[i];
    slice.a_slot_stride = p.a.slot_stride[i];
    slice.a_row_stride = p.a.row_stride[i];
    slice.b_slot_stride = p.b.slot_stride[i];
    slice.b_row_stride = p.b.row_stride[i];
    slice.first_column = p.slices.offset[i];
    slice.width = p.slices.offset[i + 1] - p.slices.offset[i];
    slice.b_first_row = static_cast<int32_t>(p.b.first_row[i]);
  }
  LaunchShape shape{};
  shape.grid =
      dim3(static_cast<unsigned>(max_tiles(p.num_tokens, p.plan.num_slots, kTileTokens) * cluster),
           p.slices.count);
  shape.threads = kFusedThreads;
  shape.shared_bytes = fused_shared<Y, kRowBlocks>(p.max_rank, cluster).bytes;
  shape.cluster = cluster;
  shape.dependent = true;
  const auto kernel = !all_vector   ? apply_fused_kernel<T, Y, kRowBlocks, false, true>
                      : config.deep ? apply_fused_kernel<T, Y, kRowBlocks, true, false>
                                    : apply_fused_kernel<T, Y, kRowBlocks, false, false>;
  return launch_kernel(kernel, shape, p.stream, f);
}

cudaError_t apply_fused(const ApplyParams& p, const ApplyConfig& config) {
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    return p.max_rank <= 16 ? launch_fused<T, Y, 1>(p, config) : launch_fused<T, Y, 2>(p, config);
  });
}

}  // namespace

int64_t apply_workspace(const ApplyParams& params) {
  return config_of(params).fused ? 0 : params.num_tokens * params.slices.count * params.max_rank;
}

int apply(const ApplyParams& p) {
  const ApplyConfig config = config_of(p);
  if (config.fused) {
    return apply_fused(p, config);
  }
  const int error = shrink(shrink_of(p));
  if (error != 0) {
    return error;
  }
  ExpandParams up = expand_of(p);
  up.after_xa = p.dtype != DType::kFloat32;
  return expand(up);
}

}  // namespace lora_ext::cuda

// The launch of moe_joint.cuh.
#include "kernels/moe_joint.cuh"

namespace lora_ext::cuda {
namespace {

MoeJointConfig joint_config(const MoeApplyParams& p) {
  int64_t columns[kMaxSlices];
  for (int i = 0; i < p.slices.count; ++i) {
    columns[i] = p.slices.offset[i + 1] - p.slices.offset[i];
  }
  return moe_joint_config(columns, p.slices.count, device_properties().clusters);
}

int part_steps(const MoeApplyParams& p, const MoeJointConfig& config) {
  return static_cast<int>(
      ceil_div(MoeJointTraits::steps(static_cast<int>(p.in_features)), config.cluster));
}

}  // namespace

bool moe_takes_joint(const MoeApplyParams& p) {
  constexpr int kReservedBytes = 1024;  // of an SM, for each CTA
  const MoeJointConfig config = joint_config(p);
  return moe_is_joint(p.num_pairs, moe_groups(p), p.in_features, p.max_rank, config,
                      device_properties().sm_count) &&
         MoeJointTraits::shared_bytes(part_steps(p, config), config.cluster) + kReservedBytes <=
             device_properties().shared_bytes;
}

cudaError_t moe_joint(const MoeApplyParams& p) {
  const MoeJointConfig config = joint_config(p);
  MoeJointParams params{};
  params.routing = moe_routing(p);
  params.ranks = p.ranks;
  params.scalings = p.scalings;
  params.x = p.x;
  params.topk_weights = p.topk_weights;
  params.y = p.y;
  params.x_stride = p.x_stride;
  params.y_stride = p.y_stride;
  params.column_stride = p.column_stride;
  params.x_divisor = p.x_divisor;
  params.num_slots = p.num_slots;
  params.num_experts = p.num_experts;
  params.num_pairs = static_cast<int32_t>(p.num_pairs);
  params.in_features = static_cast<int32_t>(p.in_features);
  params.max_rank = p.max_rank;
  params.num_slices = p.slices.count;
  params.cluster = config.cluster;
  params.part_steps = part_steps(p, config);
  params.packed = p.a.rows_by_rank;
  params.float_weights = p.weights_dtype == DType::kFloat32;
  for (int i = 0; i < p.slices.count; ++i) {
    MoeJointSlice& slice = params.slices[i];
    const int of_a = p.a.rows_by_rank ? 0 : i;  // the slices of a packed A are one matrix
    slice.a = p.a.base[of_a];
    slice.a_slot_stride = p.a.slot_stride[of_a];
    slice.a_expert_stride = p.a.expert_stride[of_a];
    slice.a_row_stride = p.a.row_stride[of_a];
    slice.b = p.b.base[i];
    slice.b_slot_stride = p.b.slot_stride[i];
    slice.b_expert_stride = p.b.expert_stride[i];
    slice.b_row_stride = p.b.row_stride[i];
    slice.b_first_row = p.b.first_row[i];
    slice.column_start = p.column_start[i];
    slice.width = p.slices.offset[i + 1] - p.slices.offset[i];
    slice.blocks = static_cast<int32_t>(moe_joint_blocks(slice.width, config.cluster));
  }
  const bool vector = moe_shrink_is_vector(p) && moe_expand_is_vector(p, 4);
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(config.blocks),
                    static_cast<unsigned>(moe_grid_tiles(p.num_pairs, moe_groups(p), config.blocks,
                                                         device_properties().sm_count)));
  shape.threads = kMoeThreads;
  shape.shared_bytes = MoeJointTraits::shared_bytes(params.part_steps, config.cluster);
  shape.cluster = config.cluster;
  shape.dependent = true;
  shape.shared_percent = 100;
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    const auto kernel = config.cluster > 1 ? vector ? moe_joint_kernel<T, Y, true, true>
                                                    : moe_joint_kernel<T, Y, false, true>
                        : vector ? moe_joint_kernel<T, Y, true, false>
                                           : moe_joint_kernel<T, Y, false, false>;
    return launch_kernel(kernel, shape, p.stream, params);
  });
}

}  // namespace lora_ext::cuda

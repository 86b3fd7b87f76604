// From an apply's arguments to what its decode kernels are told of the batch.
#pragma once

#include "kernels/decode_tile.cuh"
#include "kernels/launch.cuh"

namespace lora_ext::cuda {

inline ApplyShape apply_shape_of(const ApplyParams& p) {
  ApplyShape shape{};
  shape.num_tokens = p.num_tokens;
  shape.num_slots = p.plan.num_slots;
  shape.in_features = p.in_features;
  shape.out_features = p.slices.offset[p.slices.count];
  shape.num_slices = p.slices.count;
  shape.max_rank = p.max_rank;
  shape.sm_count = device_properties().sm_count;
  shape.half = p.dtype != DType::kFloat32;
  shape.batch_invariant = p.batch_invariant;
  return shape;
}

inline ApplyConfig apply_config_of(const ApplyParams& p) { return apply_config(apply_shape_of(p)); }

// Whether all rows allow accesses of 16 bytes.
inline bool has_vectors(const ApplyParams& p) {
  bool vector = is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0 &&
                is_multiple(p.y, p.y_stride, 8, 16) && p.a.slot_offsets == nullptr &&
                p.b.slot_offsets == nullptr && is_multiple(p.a, p.slices.count, 8, 16) &&
                is_multiple(p.b, p.slices.count, 8, 16);
  for (int i = 0; i < p.slices.count; ++i) {
    vector &= p.slices.offset[i + 1] % 8 == 0;
  }
  return vector;
}

inline int64_t num_tiles(const ApplyParams& p) {
  return max_tiles(p.num_tokens, p.plan.num_slots, kTileTokens);
}

inline DecodeBatch decode_batch(const ApplyParams& p, const ApplyConfig& config) {
  DecodeBatch batch{};
  batch.header = p.plan.header;
  batch.tiles = p.plan.tiles;
  batch.permutation = p.plan.permutation;
  batch.ranks = p.ranks;
  batch.scalings = p.scalings;
  batch.partial = static_cast<float*>(p.workspace);
  batch.tile_capacity = static_cast<int32_t>(num_tiles(p));
  batch.split_rules = config.split_rules;
  batch.max_tokens = static_cast<int32_t>(p.plan.max_tokens);
  batch.num_slots = static_cast<int32_t>(p.plan.num_slots);
  batch.num_tokens = static_cast<int32_t>(p.num_tokens);
  batch.max_rank = p.max_rank;
  batch.num_slices = p.slices.count;
  batch.in_features = static_cast<int32_t>(p.in_features);
  batch.row_groups = config.row_groups;
  batch.group_rows_log = config.blocks == 1 ? 4 : 5;
  return batch;
}

}  // namespace lora_ext::cuda

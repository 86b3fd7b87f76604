// lora_apply_: the decode kernels for few tokens, those of wide tiles where their slots may have
// many or a prefill is little work, else the wide shrink and expand.
#include "kernels/beside.h"
#include "kernels/decode_batch.cuh"
#include "kernels/decode_expand.cuh"
#include "kernels/decode_expand_stream.cuh"
#include "kernels/decode_expand_wgmma.cuh"
#include "kernels/decode_shrink.cuh"
#include "kernels/decode_wide.h"
#include "kernels/kernels.h"
#include "kernels/launch.cuh"
#include "kernels/linear_heuristics.h"
#include "kernels/prefill_heuristics.h"
#include "kernels/wide_apply.h"

namespace lora_ext::cuda {
namespace {

template <typename T, int kBlocks>
cudaError_t launch_shrink(const ApplyParams& p, const ApplyConfig& config) {
  using Traits = DecodeShrinkTraits<kBlocks>;
  DecodeShrinkParams d{};
  d.batch = decode_batch(p, config);
  d.x = p.x;
  d.x_stride = p.x_stride;
  d.a_offsets = p.a.slot_offsets;
  d.prefetch_features = config.prefetch_features;
  d.one_range = p.a.rows_by_rank || p.slices.count == 1;
  d.vector_x = is_multiple(p.x, p.x_stride, 8, 16) && p.in_features % 8 == 0;
  for (int i = 0; i < p.slices.count; ++i) {
    d.slices[i] = {p.a.base[i], p.a.slot_stride[i], p.a.row_stride[i]};
  }
  const bool all_vector =
      d.vector_x && p.a.slot_offsets == nullptr && is_multiple(p.a, p.slices.count, 8, 16);
  LaunchShape shape{};
  shape.grid = dim3(static_cast<unsigned>(
      config.row_groups * config.split_rules.all_parts(num_tiles(p)) + (p.beside ? 1 : 0)));
  shape.threads = kShrinkThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  shape.cluster = 1;
  shape.dependent = !p.beside;  // the capture knows already on what it depends, and how
  shape.shared_percent = config.shrink_shared_percent;
  return launch_kernel(p.beside     ? decode_shrink_kernel<T, kBlocks, false, true>
                       : all_vector ? decode_shrink_kernel<T, kBlocks, false>
                                    : decode_shrink_kernel<T, kBlocks, true>,
                       shape, p.stream, d);
}

template <typename T, typename Y, int kChunk>
cudaError_t launch_expand(const ApplyParams& p, const ApplyConfig& config, bool after_shrink) {
  DecodeExpandParams d{};
  d.after_shrink = after_shrink;
  d.batch = decode_batch(p, config);
  d.y = p.y;
  d.y_stride = p.y_stride;
  d.b_offsets = p.b.slot_offsets;
  for (int i = 0; i < p.slices.count; ++i) {
    add_slice(d, p.b, p.slices, i);
  }
  const bool all_vector = d.vector_y && p.b.slot_offsets == nullptr &&
                          is_multiple(p.b, p.slices.count, kChunk, 2 * kChunk);
  LaunchShape shape{};
  shape.threads = kExpandThreads;
  shape.cluster = 1;
  shape.dependent = p.reduction == nullptr;  // else the capture knows already
  const DeviceProperties device = device_properties();
  // As many CTAs of a kernel as are resident; none where one for each block is better.
  const auto stream_ctas = [&](int bytes, int most) {
    const int resident = std::min(most, device.shared_bytes / (bytes + kReservedSharedBytes));
    return decode_stream_ctas(p.num_tokens, p.plan.num_slots, d.blocks_per_tile, p.max_rank,
                              resident, device.sm_count);
  };
  const auto stream = [&](auto* kernel, int bytes, int most) {
    shape.grid = dim3(static_cast<unsigned>(stream_ctas(bytes, most)));
    shape.shared_bytes = bytes;
    return launch_kernel(kernel, shape, p.stream, d);
  };
  const int stream_bytes = DecodeStreamTraits<Y, kChunk>::shared_bytes(p.max_rank);
  if (all_vector && stream_ctas(stream_bytes, kDecodeStreamCtas<kChunk>) > 0) {
    if constexpr (kChunk == 8) {
      // Its sums round as those of no other kernel do, so where the choice of one depends on the
      // batch it must not be among them.
      if (has_wgmma() && !p.batch_invariant) {
        const auto by_wgmma = [&](auto span) {
          constexpr int kSpan = decltype(span)::value;
          return stream(decode_expand_wgmma_kernel<T, Y, kSpan>,
                        DecodeWgmmaTraits<kSpan>::shared_bytes(p.max_rank), kDecodeWgmmaCtas);
        };
        return p.max_rank <= 32 ? by_wgmma(std::integral_constant<int, 32>{})
                                : by_wgmma(std::integral_constant<int, 64>{});
      }
    }
    return stream(p.beside ? decode_expand_stream_kernel<T, Y, kChunk, true>
                           : decode_expand_stream_kernel<T, Y, kChunk>,
                  stream_bytes, kDecodeStreamCtas<kChunk>);
  }
  const int64_t ctas = num_tiles(p) * d.blocks_per_tile;
  d.launches_next = expand_launches_next(p.num_tokens, ctas, p.max_rank, device.sm_count);
  shape.grid = dim3(static_cast<unsigned>(ctas));
  shape.shared_bytes = DecodeExpandTraits<Y, kChunk>::shared_bytes(p.max_rank);
  shape.shared_percent = config.expand_shared_percent;
  return launch_kernel(p.beside     ? decode_expand_kernel<T, Y, kChunk, false, true>
                       : all_vector ? decode_expand_kernel<T, Y, kChunk, false>
                                    : decode_expand_kernel<T, Y, kChunk, true>,
                       shape, p.stream, d);
}

cudaError_t decode_shrink(const ApplyParams& p, const ApplyConfig& config) {
  return dispatch_half(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return config.blocks == 1 ? launch_shrink<T, 1>(p, config) : launch_shrink<T, 2>(p, config);
  });
}

cudaError_t decode_expand(const ApplyParams& p, const ApplyConfig& config, bool after_shrink) {
  return dispatch_half_output(p.dtype, p.y_dtype, [&](auto t, auto y) {
    using T = typename decltype(t)::type;
    using Y = typename decltype(y)::type;
    return p.max_rank <= 16 ? launch_expand<T, Y, 4>(p, config, after_shrink)
                            : launch_expand<T, Y, 8>(p, config, after_shrink);
  });
}

// The expand behind a shrink that was launched, or was not, with this error.
template <typename Expand>
int in_turn(const ApplyParams& p, int error, const Expand& expand) {
  if (error == 0 && p.reduction != nullptr) {
    error = start_behind_both(p.stream, p.reduction);
  }
  return error == 0 ? expand() : error;
}

}  // namespace

int64_t apply_workspace(const ApplyParams& p) {
  const ApplyConfig config = apply_config_of(p);
  const int64_t columns = int64_t{p.slices.count} * p.max_rank;
  if (config.decode) {
    // Without regard to how the tensors lie: the halves of an apply know different ones of them.
    const ApplyShape shape = apply_shape_of(p);
    const int64_t wide = decode_is_wide(shape) ? decode_wide_workspace(p, wide_split(shape)) : 0;
    const int64_t rows = int64_t{16} * config.blocks * config.row_groups;
    return std::max(config.split_rules.all_parts(num_tiles(p)) * rows * kTileTokens, wide);
  }
  const ApplyShape shape = apply_shape_of(p);
  const int64_t wide = prefill_is_wide(shape) ? decode_wide_workspace(p, wide_split(shape)) : 0;
  return std::max({p.num_tokens * columns, shrink_layout_elements(shrink_of(p)), wide});
}

// What runs beside it, or comes next, is a base layer's product.
int apply_shrink(const ApplyParams& p) {
  const ApplyShape shape = apply_shape_of(p);
  ApplyConfig config = apply_config(shape);
  config.shrink_shared_percent = shrink_beside_product_percent(shape, config.shrink_shared_percent);
  return decode_shrink(p, config);
}

int apply_expand(const ApplyParams& p) { return decode_expand(p, apply_config_of(p), false); }

// The kernels for more tokens, and wide tiles, are not taken apart: they know of A, B and y
// together how to add up.
bool apply_has_halves(const ApplyParams& p) {
  const ApplyShape shape = apply_shape_of(p);
  return apply_config(shape).decode && !decode_is_wide(shape);
}

bool apply_runs_beside(const ApplyParams& p) { return apply_config_of(p).decode && has_vectors(p); }

int apply(const ApplyParams& p) {
  const ApplyShape shape = apply_shape_of(p);
  if ((decode_is_wide(shape) || prefill_is_wide(shape)) && decode_wide_takes(p)) {
    const WideSplit split = wide_split(shape);
    return in_turn(p, decode_wide_shrink(p, split), [&] { return decode_wide_expand(p, split); });
  }
  if (ApplyConfig config = apply_config(shape); config.decode) {
    if (p.beside) {
      config.shrink_shared_percent = config.expand_shared_percent = kBesideSharedPercent;
    }
    return in_turn(p, decode_shrink(p, config), [&] { return decode_expand(p, config, true); });
  }
  ShrinkParams down = shrink_of(p);
  ExpandParams up = expand_of(p);
  up.after_xa = p.dtype != DType::kFloat32;
  XaLayout layout = expand_reads_tiles(up) ? shrink_layout(down) : XaLayout{};
  if (layout.by_tile) {
    layout.halves = xa_in_halves(layout, p.dtype);
    down.layout = up.layout = layout;
    down.xa_stride = up.xa_stride = int64_t{p.slices.count} * XaLayout::padded(p.max_rank);
  }
  const int error = shrink(down);
  return error != 0 ? error : expand(up);
}

}  // namespace lora_ext::cuda

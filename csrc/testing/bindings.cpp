// Host-side C++ that is no operator, for pytest: the plan's layout, the tile planner and the
// heuristics. Built only with LORA_EXT_TEST_BUILD=1.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "common/plan.h"
#include "kernels/heuristics.h"
#include "kernels/linear_heuristics.h"
#include "kernels/moe_heuristics.h"
#include "kernels/prefill_heuristics.h"
#include "kernels/wide_heuristics.h"

namespace py = pybind11;
using namespace py::literals;
using namespace lora_ext;

namespace {

void bind_plan(py::module_& m) {
  m.attr("TILE_TOKENS") = kTileTokens;
  m.attr("WIDE_TILE_TOKENS") = kWideTileTokens;
  m.attr("MAX_SLOTS") = kMaxSlots;
  m.attr("MAX_SHARED_BYTES") = kMaxSharedBytes;
  py::class_<PlanLayout>(m, "PlanLayout")
      .def(py::init<int64_t, int64_t>(), py::kw_only(), "max_tokens"_a, "num_slots"_a)
      .def_readonly("tiles", &PlanLayout::tiles)
      .def_readonly("wide_tiles", &PlanLayout::wide_tiles)
      .def_readonly("token_slots", &PlanLayout::token_slots)
      .def_readonly("permutation", &PlanLayout::permutation)
      .def_readonly("seg_indptr", &PlanLayout::seg_indptr)
      .def_readonly("seg_slots", &PlanLayout::seg_slots)
      .def_readonly("slot_indptr", &PlanLayout::slot_indptr)
      .def_readonly("enabled", &PlanLayout::enabled)
      .def_readonly("size", &PlanLayout::size)
      .def("tile_capacity", &PlanLayout::tile_capacity, "tokens"_a, "tile_tokens"_a);
  m.def("plan_size", &plan_size, "max_tokens"_a, "num_slots"_a);
  m.def("plan_max_tokens", &plan_max_tokens, "size"_a, "num_slots"_a);
  m.def("max_tiles", &max_tiles, "num_tokens"_a, "num_slots"_a, "tile_tokens"_a);
  m.def("plan_is_small", &plan_is_small, "max_tokens"_a, "num_slots"_a, "count"_a);
  py::class_<PlanConfig>(m, "PlanConfig")
      .def_readonly("threads", &PlanConfig::threads)
      .def_readonly("num_buckets", &PlanConfig::num_buckets)
      .def_readonly("shared_bytes", &PlanConfig::shared_bytes)
      .def_readonly("slots_at", &PlanConfig::slots_at)
      .def_readonly("tokens_at", &PlanConfig::tokens_at);
  m.def("plan_config", &plan_config, "max_tokens"_a, "num_slots"_a);
}

void bind_apply(py::module_& m) {
  py::class_<TileCuts>(m, "TileCuts")
      .def("parts", &TileCuts::parts, "tile"_a)
      .def("first_part", &TileCuts::first_part, "tile"_a)
      .def("tile_of", &TileCuts::tile_of, "part"_a);
  py::class_<SplitRules>(m, "SplitRules")
      .def("cuts", &SplitRules::cuts, "num_tiles"_a)
      .def("all_parts", &SplitRules::all_parts, "capacity"_a);
  py::class_<TileShares>(m, "TileShares")
      .def(py::init<int, int, int, int>(), py::kw_only(), "row_groups"_a, "group_rows_log"_a,
           "rows"_a, "parts"_a)
      .def_readonly("groups", &TileShares::groups)
      .def_readonly("pieces", &TileShares::pieces)
      .def_readonly("stride", &TileShares::stride);
  py::class_<ApplyConfig>(m, "ApplyConfig")
      .def_readonly("decode", &ApplyConfig::decode)
      .def_readonly("blocks", &ApplyConfig::blocks)
      .def_readonly("row_groups", &ApplyConfig::row_groups)
      .def_readonly("split_rules", &ApplyConfig::split_rules)
      .def_readonly("prefetch_features", &ApplyConfig::prefetch_features)
      .def_readonly("shrink_shared_percent", &ApplyConfig::shrink_shared_percent)
      .def_readonly("expand_shared_percent", &ApplyConfig::expand_shared_percent);
  m.def(
      "apply_config",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int num_slices, int max_rank,
         int sm_count, bool half, bool batch_invariant) {
        return apply_config({num_tokens, num_slots, in_features, 0, num_slices, max_rank, sm_count,
                             half, batch_invariant});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "num_slices"_a, "max_rank"_a,
      "sm_count"_a, "half"_a, "batch_invariant"_a);
  py::class_<WideSplit>(m, "WideSplit")
      .def_readonly("cluster", &WideSplit::cluster)
      .def_readonly("num_clusters", &WideSplit::num_clusters)
      .def_readonly("row_groups", &WideSplit::row_groups)
      .def(
          "cut",
          [](const WideSplit& split, int num_tiles) {
            const WideSplit::Cut cut = split.cut(num_tiles);
            return std::pair(cut.group, cut.parts);
          },
          "num_tiles"_a)
      .def("all_parts", &WideSplit::all_parts, "capacity"_a);
  m.def(
      "wide_split",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int num_slices, int max_rank,
         int sm_count) {
        return wide_split(
            {num_tokens, num_slots, in_features, 0, num_slices, max_rank, sm_count, true, false});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "num_slices"_a, "max_rank"_a,
      "sm_count"_a);
  m.def(
      "decode_is_wide",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int64_t out_features,
         int num_slices, int max_rank, bool half, bool batch_invariant) {
        return decode_is_wide({num_tokens, num_slots, in_features, out_features, num_slices,
                               max_rank, 132, half, batch_invariant});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "out_features"_a,
      "num_slices"_a, "max_rank"_a, "half"_a = true, "batch_invariant"_a = false);
}

void bind_linear(py::module_& m) {
  py::class_<LinearConfig>(m, "LinearConfig")
      .def_readonly("blocks", &LinearConfig::blocks)
      .def_readonly("groups", &LinearConfig::groups);
  m.attr("LINEAR_MAX_TOKENS") = kLinearMaxTokens;
  m.attr("LINEAR_WGMMA_MAX_TOKENS") = kLinearWgmmaMaxTokens;
  const auto bind = [&](const char* name, auto choose) {
    m.def(
        name,
        [choose](int64_t num_tokens, int64_t num_slots, int64_t in_features, int64_t out_features,
                 int num_slices, int max_rank, int sm_count, bool half, bool capable, bool vector,
                 bool batch_invariant) {
          return choose({num_tokens, num_slots, in_features, out_features, num_slices, max_rank,
                         sm_count, half, capable, vector, batch_invariant});
        },
        py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "out_features"_a,
        "num_slices"_a, "max_rank"_a, "sm_count"_a = 132, "half"_a = true, "capable"_a = true,
        "vector"_a = true, "batch_invariant"_a = false);
  };
  bind("linear_config", linear_config);
  bind("linear_wgmma_cluster", linear_wgmma_cluster);
  m.def(
      "shrink_beside_product_percent",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int num_slices, int max_rank) {
        return shrink_beside_product_percent(
            {num_tokens, num_slots, in_features, 0, num_slices, max_rank, 132, true, false}, -1);
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "num_slices"_a, "max_rank"_a);
}

void bind_shrink(py::module_& m) {
  py::class_<ShrinkConfig>(m, "ShrinkConfig")
      .def_readonly("rows", &ShrinkConfig::rows)
      .def_readonly("cluster", &ShrinkConfig::cluster)
      .def_readonly("kilobytes", &ShrinkConfig::kilobytes);
  m.def(
      "shrink_config",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int rows, int sm_count,
         bool clusters) {
        return shrink_config({num_tokens, num_slots, in_features, rows, sm_count, clusters});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "rows"_a, "sm_count"_a,
      "clusters"_a);
}

void bind_shrink_wgmma(py::module_& m) {
  m.def(
      "prefill_is_wide",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int64_t out_features,
         int num_slices, int max_rank, int sm_count, bool half, bool batch_invariant) {
        return prefill_is_wide({num_tokens, num_slots, in_features, out_features, num_slices,
                                max_rank, sm_count, half, batch_invariant});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "out_features"_a,
      "num_slices"_a, "max_rank"_a, "sm_count"_a = 132, "half"_a = true,
      "batch_invariant"_a = false);
  m.def(
      "shrink_wgmma_config",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int rows, int sm_count) {
        return shrink_wgmma_config({num_tokens, num_slots, in_features, rows, sm_count, true});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "rows"_a, "sm_count"_a);
  m.def("cluster_halvings", &cluster_halvings, py::kw_only(), "num_tiles"_a, "cluster"_a,
        "places"_a);
  m.def("shrink_clusters", &shrink_clusters, py::kw_only(), "num_tokens"_a, "num_slots"_a,
        "sm_count"_a);
  py::class_<XaLayout>(m, "XaLayout")
      .def_readonly("parts", &XaLayout::parts)
      .def_readonly("steps", &XaLayout::steps)
      .def("begin", [](const XaLayout& l, int tiles, int part) { return l.cut(tiles).begin(part); })
      .def("part_of",
           [](const XaLayout& l, int tiles, int step) { return l.cut(tiles).part_of(step); })
      .def_readonly("summed", &XaLayout::summed)
      .def("place", &XaLayout::place)
      .def_static("padded", &XaLayout::padded)
      .def_static("column", &XaLayout::column);
  m.def(
      "xa_layout",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int rows, int sm_count) {
        return xa_layout({num_tokens, num_slots, in_features, rows, sm_count, true});
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "rows"_a, "sm_count"_a);
  m.def(
      "xa_in_halves",
      [](const XaLayout& layout, bool bf16) {
        return xa_in_halves(layout, bf16 ? DType::kBFloat16 : DType::kFloat16);
      },
      "layout"_a, py::kw_only(), "bf16"_a);
  m.def(
      "xa_elements",
      [](int64_t num_tokens, int64_t num_slots, int64_t in_features, int rows, int sm_count) {
        const ShrinkShape shape{num_tokens, num_slots, in_features, rows, sm_count, true};
        return xa_elements(shape, xa_layout(shape));
      },
      py::kw_only(), "num_tokens"_a, "num_slots"_a, "in_features"_a, "rows"_a, "sm_count"_a);
}

void bind_expand(py::module_& m) {
  m.def("decode_stream_ctas", &decode_stream_ctas, py::kw_only(), "num_tokens"_a, "num_slots"_a,
        "blocks"_a, "max_rank"_a, "resident"_a, "sm_count"_a);
  m.def("expand_launches_next", &expand_launches_next, py::kw_only(), "num_tokens"_a, "ctas"_a,
        "max_rank"_a, "sm_count"_a);
  m.def("expand_walks", &expand_walks, py::kw_only(), "num_tokens"_a, "row_steps"_a, "resident"_a);
  m.def("expand_streams", &expand_streams, py::kw_only(), "num_tokens"_a, "max_rank"_a);
  m.def("embedding_is_few", &embedding_is_few, py::kw_only(), "num_tokens"_a);
  m.def("embedding_is_by_slots", &embedding_is_by_slots, py::kw_only(), "num_tokens"_a);
  m.def("embedding_is_wide", &embedding_is_wide, py::kw_only(), "num_tokens"_a, "num_slots"_a,
        "max_rank"_a);
  m.def("embedding_grid_tiles", &embedding_grid_tiles, py::kw_only(), "num_tokens"_a, "num_slots"_a,
        "sm_count"_a);
}

void bind_gradient(py::module_& m) {
  m.def("gradient_cluster", &gradient_cluster, py::kw_only(), "blocks"_a, "steps"_a, "sm_count"_a,
        "clusters"_a);
}

void bind_moe(py::module_& m) {
  m.def(
      "moe_routing_size",
      [](int64_t num_pairs, int64_t num_groups) {
        return RoutingLayout(num_pairs, num_groups).size;
      },
      "num_pairs"_a, "num_groups"_a);
  m.def("max_moe_tiles", &max_moe_tiles, "num_pairs"_a, "num_groups"_a);
  m.def("moe_grid_tiles", &moe_grid_tiles, "num_pairs"_a, "num_groups"_a, "blocks"_a, "sm_count"_a,
        "most_per_sm"_a = 32);
  m.def("moe_expand_shares_splits", &moe_expand_shares_splits, py::kw_only(), "splits"_a,
        "max_rank"_a);
  m.def("moe_shrink_blocks_per_sm", &moe_shrink_blocks_per_sm, py::kw_only(), "num_pairs"_a,
        "row_blocks"_a, "wide"_a);
  m.def("moe_expand_blocks_per_sm", &moe_expand_blocks_per_sm, py::kw_only(), "num_pairs"_a,
        "num_groups"_a, "blocks"_a, "units"_a, "dense"_a, "sm_count"_a);
  m.def("moe_expand_is_dense", &moe_expand_is_dense, py::kw_only(), "num_pairs"_a, "num_groups"_a,
        "num_experts"_a, "blocks"_a, "sm_count"_a);
  py::class_<MoeJointConfig>(m, "MoeJointConfig")
      .def_readonly("cluster", &MoeJointConfig::cluster)
      .def_readonly("blocks", &MoeJointConfig::blocks);
  m.def(
      "moe_joint_config",
      [](const std::vector<int64_t>& columns, bool clusters) {
        return moe_joint_config(columns.data(), static_cast<int>(columns.size()), clusters);
      },
      "columns"_a, "clusters"_a);
  m.def("moe_is_joint", &moe_is_joint, py::kw_only(), "num_pairs"_a, "num_groups"_a,
        "in_features"_a, "max_rank"_a, "config"_a, "sm_count"_a);
  m.def("moe_expand_is_many", &moe_expand_is_many, py::kw_only(), "num_pairs"_a, "num_groups"_a,
        "max_rank"_a, "splits"_a);
  m.def("moe_expand_units", &moe_expand_units, py::kw_only(), "num_pairs"_a, "num_groups"_a,
        "columns"_a, "max_rank"_a, "splits"_a, "sm_count"_a);
  py::class_<MoeShrinkConfig>(m, "MoeShrinkConfig")
      .def_readonly("row_blocks", &MoeShrinkConfig::row_blocks)
      .def_readonly("blocks", &MoeShrinkConfig::blocks)
      .def_readonly("splits", &MoeShrinkConfig::splits)
      .def_readonly("split_features", &MoeShrinkConfig::split_features)
      .def_readonly("members", &MoeShrinkConfig::members)
      .def_readonly("member_features", &MoeShrinkConfig::member_features)
      .def_readonly("few_tiles", &MoeShrinkConfig::few_tiles)
      .def_readonly("prefetch_features", &MoeShrinkConfig::prefetch_features)
      .def_readonly("most_blocks_per_sm", &MoeShrinkConfig::most_blocks_per_sm)
      .def_readonly("small", &MoeShrinkConfig::small)
      .def_readonly("shared_percent", &MoeShrinkConfig::shared_percent);
  m.def(
      "moe_token_of", [](int pair, int divisor) { return MoePairDivisor(divisor).token_of(pair); },
      "pair"_a, "divisor"_a);
  m.def(
      "moe_shrink_config",
      [](int64_t num_pairs, int64_t num_groups, int64_t num_experts, int64_t in_features,
         int matrices, int rows, int max_rank, bool vector, int sm_count) {
        return moe_shrink_config({num_pairs, num_groups, num_experts, in_features, matrices, rows,
                                  max_rank, vector, sm_count});
      },
      py::kw_only(), "num_pairs"_a, "num_groups"_a, "num_experts"_a, "in_features"_a, "matrices"_a,
      "rows"_a, "max_rank"_a, "vector"_a, "sm_count"_a);
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  m.doc() = "Host-side C++ of lora_ext, for the tests.";
  bind_plan(m);
  bind_apply(m);
  bind_linear(m);
  bind_shrink(m);
  bind_shrink_wgmma(m);
  bind_expand(m);
  bind_gradient(m);
  bind_moe(m);
}

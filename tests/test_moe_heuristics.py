"""Launch heuristics of the MoE kernels: pure C++, held to what the kernels rely on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_ext

testing = pytest.importorskip(
    "lora_ext._testing", reason="needs a build with LORA_EXT_TEST_BUILD=1 and Python.h"
)

SLOTS = st.integers(1, testing.MAX_SLOTS)
FEATURES = st.integers(1, 200_000)
SM_COUNTS = st.sampled_from([1, 78, 108, 132, 148])
PAIRS = st.integers(1, 200_000)
GROUPS = st.integers(1, 2**31 - 1)
EXPERTS = st.integers(1, 1024)
SHRINK: dict[str, Any] = {  # what moe_shrink_config takes
    "num_pairs": PAIRS,
    "num_groups": GROUPS,
    "num_experts": EXPERTS,
    "in_features": FEATURES,
    "matrices": st.integers(1, 8),
    "rows": st.integers(1, 8 * 1024),
    "max_rank": st.integers(1, 1024),
    "vector": st.booleans(),
    "sm_count": SM_COUNTS,
}


@given(num_tokens=st.integers(0, 20_000), top_k=st.integers(1, 16), num_slots=SLOTS)
def test_the_routing_grows_with_the_pairs_alone(
    num_tokens: int, top_k: int, num_slots: int
) -> None:
    pairs, groups = num_tokens * top_k, num_slots * 128
    size = testing.moe_routing_size(pairs, groups)
    assert lora_ext.moe_routing_size(num_tokens, top_k, num_slots, 128) == size
    assert size <= 16 + (5 if pairs <= 2048 else 9) * pairs + 1
    assert testing.max_moe_tiles(pairs, groups) <= pairs


@given(pair=st.integers(0, 2**31 - 1), divisor=st.integers(1, 2**31 - 1) | st.integers(1, 32))
def test_the_token_of_a_pair_comes_without_a_division(pair: int, divisor: int) -> None:
    for near in (pair, pair // divisor * divisor, max(pair // divisor * divisor - 1, 0)):
        assert testing.moe_token_of(near, divisor) == near // divisor


@given(**SHRINK)
def test_the_moe_shrink_covers_rows_and_features(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    per_matrix = config.blocks // shape["matrices"]
    assert config.blocks == per_matrix * shape["matrices"]
    assert (per_matrix - 1) * 16 * config.row_blocks < shape["rows"]
    assert shape["rows"] <= per_matrix * 16 * config.row_blocks
    # Every part of K has something in it, and starts where a warp's first step does.
    assert 1 <= config.splits <= 16
    assert config.split_features % 128 == 0
    assert (config.splits - 1) * config.split_features < shape["in_features"]
    assert shape["in_features"] <= config.splits * config.split_features


@given(**SHRINK)
def test_ctas_of_the_moe_shrink_share_parts_of_k_where_tiles_may_be_few(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    assert config.members in (1, 2, 4)
    if config.members > 1:
        # All CTAs of so many tiles are resident, two to an SM.
        assert config.members * config.few_tiles * config.splits <= 2 * shape["sm_count"]
        assert config.member_features % 128 == 0
        covered = config.members * config.member_features
        assert config.member_features <= config.split_features <= covered


def test_few_tiles_of_one_adapter_share_parts_of_k() -> None:
    shape = dict(in_features=2880, matrices=1, rows=32, max_rank=16, vector=True, sm_count=132)
    of = testing.moe_shrink_config
    few = of(num_pairs=1200, num_groups=256, num_experts=32, **shape)  # gpt-oss-20b, 300 tokens
    assert (few.splits, few.split_features) == (1, 2944)
    assert (few.members, few.few_tiles, few.member_features) == (4, 66, 768)
    assert of(num_pairs=1200, num_groups=32, num_experts=32, **shape).members == 1
    # Twice as many tiles as would do: of many pairs, and not up to rank 16 for two slices.
    groups = dict(num_groups=1024, num_experts=128)
    assert of(num_pairs=4096, **groups, **shape).members == 1
    assert of(num_pairs=4096, **groups, **{**shape, "max_rank": 32}).members == 2
    assert of(num_pairs=1024, **groups, **{**shape, "max_rank": 32}).members == 1
    assert of(num_pairs=4096, **groups, **{**shape, "rows": 16}).members == 2
    wide = of(num_pairs=4096, **groups, **{**shape, "rows": 128, "max_rank": 64})
    assert (wide.members, wide.few_tiles) == (2, 132)


@given(**SHRINK)
def test_the_moe_shrink_prefetches_where_a_is_little(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    groups = min(shape["num_pairs"], shape["num_groups"])
    least_bytes = 2 * groups * shape["matrices"] * shape["rows"] * shape["in_features"]
    little = shape["vector"] and groups <= 2 * shape["sm_count"] and least_bytes <= 8 << 20
    assert little or not config.small
    if little and shape["num_pairs"] <= shape["num_groups"]:  # a tile for each pair
        assert config.small
    if config.small:
        assert config.prefetch_features == config.split_features


@given(**SHRINK)
def test_the_moe_shrink_prefetches_the_beginning_of_a_larger_a(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    assert 0 <= config.prefetch_features <= config.split_features
    if config.small or config.prefetch_features == 0:
        return
    assert shape["vector"] and config.members == 1  # each CTA knows its tile
    tiles = min(shape["num_pairs"], shape["num_groups"])
    assert tiles * config.blocks * config.splits <= 2 * shape["sm_count"]  # all resident
    assert config.prefetch_features % 64 == 0  # whole lines
    of_a_row = config.prefetch_features * config.splits
    assert of_a_row > 512 - 64 * config.splits
    assert 2 * of_a_row * tiles * shape["matrices"] * shape["rows"] <= 8 << 20


def test_how_much_the_moe_shrink_prefetches() -> None:
    of = partial(
        testing.moe_shrink_config,
        num_groups=1024,
        num_experts=128,
        in_features=2048,
        matrices=1,
        vector=True,
        sm_count=132,
    )

    def prefetched(num_pairs: int, rows: int, max_rank: int) -> tuple[bool, int, int]:
        config = of(num_pairs=num_pairs, rows=rows, max_rank=max_rank)
        return config.small, config.splits, config.prefetch_features

    # Qwen3-30B's w13: 8 tokens, then 32, and batches whose rows would have less than 1 KB each or
    # whose CTAs are not all resident.
    assert prefetched(64, 32, 16) == (True, 4, 512)
    assert prefetched(64, 128, 64) == (False, 2, 256)
    assert prefetched(256, 32, 16) == (False, 1, 512)
    assert prefetched(128, 128, 64) == (False, 1, 0)
    assert prefetched(256, 128, 64) == (False, 1, 0)
    assert prefetched(1024, 32, 16) == (False, 1, 0)


@given(**SHRINK)
def test_how_the_moe_shrink_divides_the_cache(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    if config.small:
        assert config.shared_percent == 100
    elif config.row_blocks == 1 and shape["num_pairs"] > 1024:
        assert config.shared_percent == 72
    else:
        assert config.shared_percent == -1


@given(**SHRINK)
def test_moe_shrink_blocks_are_spread_where_they_are_few(**shape: int) -> None:
    config = testing.moe_shrink_config(**shape)
    groups = min(shape["num_pairs"], shape["num_groups"])
    most_tiles = testing.max_moe_tiles(shape["num_pairs"], groups)
    if config.most_blocks_per_sm != 0:
        room = config.most_blocks_per_sm * shape["sm_count"]
        assert 2 <= config.most_blocks_per_sm <= 4
        assert 4 * most_tiles * config.blocks * config.splits <= 5 * room
        assert not config.small  # which wants to be there early


@given(num_pairs=PAIRS, num_groups=GROUPS, rows=st.integers(1, 128), sm_count=SM_COUNTS)
def test_a_long_k_is_split_further_for_few_pairs(**shape: int) -> None:
    def features(in_features: int) -> int:
        config = testing.moe_shrink_config(
            in_features=in_features, matrices=1, vector=True, num_experts=100, max_rank=16, **shape
        )
        return int(config.split_features)

    tiles = max(-(-shape["num_pairs"] // 64), min(shape["num_pairs"], shape["num_groups"]))
    ctas = tiles * -(-shape["rows"] // 64)
    if shape["num_pairs"] <= 1024 and 16 * ctas <= 2 * shape["sm_count"]:
        assert features(14336) == 896  # as many parts as there may be
    if shape["num_pairs"] <= 1024 and 8 * ctas <= 4 * shape["sm_count"]:
        assert features(14336) <= 1792
    if shape["num_pairs"] > 1024 and 2 * ctas > shape["sm_count"]:
        assert features(14336) >= 7168


@pytest.mark.parametrize(("num_pairs", "features"), [(1000, 3584), (2000, 7168)])
def test_a_long_k_of_many_pairs_is_left(num_pairs: int, features: int) -> None:
    config = testing.moe_shrink_config(
        num_pairs=num_pairs,
        num_groups=100,
        num_experts=100,
        max_rank=16,
        in_features=14336,
        matrices=1,
        rows=16,
        sm_count=132,
        vector=True,
    )
    assert config.split_features == features


def test_lanes_without_a_pair_share_parts_of_k_where_those_are_many() -> None:
    assert testing.moe_expand_shares_splits(splits=8, max_rank=16)
    assert not testing.moe_expand_shares_splits(splits=4, max_rank=16)
    assert testing.moe_expand_shares_splits(splits=4, max_rank=64)
    assert not testing.moe_expand_shares_splits(splits=2, max_rank=64)
    assert not testing.moe_expand_shares_splits(splits=16, max_rank=128)


@given(columns=st.lists(st.integers(1, 100_000), min_size=1, max_size=8), clusters=st.booleans())
def test_clusters_that_do_both_products_cover_the_columns(
    columns: list[int], clusters: bool
) -> None:
    config = testing.moe_joint_config(columns, clusters)
    widest = -(-max(columns) // 256)
    assert config.cluster == 1 if not clusters else config.cluster <= min(8, widest)
    assert config.blocks % config.cluster == 0
    assert config.blocks >= sum(-(-count // 256) for count in columns)
    assert config.blocks < sum(-(-count // 256) + config.cluster for count in columns)


def test_one_kernel_does_both_products_of_few_pairs() -> None:
    w13, w2 = testing.moe_joint_config([768, 768], True), testing.moe_joint_config([2048], True)
    assert (w13.cluster, w13.blocks) == (3, 6)
    assert (w2.cluster, w2.blocks) == (8, 8)
    wide = testing.moe_joint_config([2880], True)
    assert (wide.cluster, wide.blocks) == (6, 12)
    shape = dict(num_groups=1024, max_rank=16, sm_count=132)

    def joint(num_pairs: int, in_features: int, config: Any, **other: int) -> bool:
        sizes = {**shape, "num_pairs": num_pairs, "in_features": in_features, **other}
        return bool(testing.moe_is_joint(config=config, **sizes))

    assert joint(40, 768, w2)
    assert joint(32, 2048, w13)
    assert joint(20, 2880, wide)
    assert not joint(41, 768, w2, num_groups=1)
    assert not joint(40, 768, w2, max_rank=17)
    assert not joint(40, 768, w2, sm_count=127)  # 320 CTAs
    assert not joint(24, 2880, wide, sm_count=1000)  # 4.4 MB of A
    assert joint(1, 32768, w2)
    assert not joint(1, 32769, w2)  # no room for a part of K
    alone = testing.moe_joint_config([768, 768], False)
    assert (alone.cluster, alone.blocks) == (1, 6)
    assert joint(8, 2048, alone)
    assert not joint(16, 2048, alone)


@pytest.mark.parametrize(
    ("many", "num_pairs", "num_groups", "max_rank", "splits"),
    [
        (False, 1024, 64, 16, 4),
        (True, 1024, 64, 16, 8),
        (True, 1024, 64, 64, 4),
        (True, 1024, 64, 17, 1),
        (False, 512, 32, 64, 8),
        (False, 1024, 65, 64, 8),
        (True, 1040, 65, 16, 1),
        (False, 4096, 1024, 16, 1),
        (True, 4096, 1024, 17, 1),
        (False, 2048, 1024, 64, 1),
        (False, 16384, 1, 65, 8),
    ],
)
def test_the_moe_expand_of_many_pairs(
    many: bool, num_pairs: int, num_groups: int, max_rank: int, splits: int
) -> None:
    is_many = testing.moe_expand_is_many(
        num_pairs=num_pairs, num_groups=num_groups, max_rank=max_rank, splits=splits
    )
    assert is_many == many


def test_moe_grids_of_few_pairs_are_what_is_resident_at_once() -> None:
    per_sm = testing.moe_shrink_blocks_per_sm
    assert per_sm(num_pairs=1024, row_blocks=4, wide=True) == 2
    assert per_sm(num_pairs=4096, row_blocks=4, wide=True) == 8
    assert per_sm(num_pairs=16384, row_blocks=4, wide=True) == 32
    assert per_sm(num_pairs=1024, row_blocks=2, wide=False) == 5
    assert per_sm(num_pairs=1024, row_blocks=4, wide=False) == 32
    assert per_sm(num_pairs=1025, row_blocks=1, wide=False) == 32
    per_sm = testing.moe_expand_blocks_per_sm
    few = dict(num_pairs=256, num_groups=1024, sm_count=132)
    assert per_sm(blocks=4, units=2, dense=False, **few) == 4
    assert per_sm(blocks=5, units=2, dense=False, **few) == 16
    assert per_sm(blocks=4, units=1, dense=False, **few) == 16
    assert per_sm(blocks=4, units=2, dense=True, **few) == 16


@pytest.mark.parametrize(
    ("dense", "num_pairs", "num_groups", "num_experts", "blocks"),
    [
        (True, 384, 1024, 128, 6),  # Qwen3-235B, w13
        (True, 384, 128, 128, 6),  # of one adapter
        (False, 64, 1024, 128, 6),  # too few pairs for as many tiles
        (False, 384, 1024, 128, 5),
        (False, 1024, 1024, 128, 4),  # Qwen3-30B, w2
        (False, 64, 64, 8, 56),  # Mixtral, w13: eight tiles of one adapter
        (True, 4000, 256, 32, 12),  # gpt-oss-20b, w13: tiles of 64 pairs
        (False, 4000, 256, 32, 6),
    ],
)
def test_the_moe_expand_is_dense_where_one_adapter_fills_the_sms(
    dense: bool, num_pairs: int, num_groups: int, num_experts: int, blocks: int
) -> None:
    is_dense = testing.moe_expand_is_dense(
        num_pairs=num_pairs,
        num_groups=num_groups,
        num_experts=num_experts,
        blocks=blocks,
        sm_count=132,
    )
    assert is_dense == dense


@given(
    num_pairs=PAIRS,
    num_groups=GROUPS,
    columns=st.integers(1, 100_000),
    max_rank=st.integers(1, 1024),
    splits=st.integers(1, 16),
    sm_count=SM_COUNTS,
)
def test_warps_of_the_moe_expand_take_two_units_only_beyond_a_wave(**shape: int) -> None:
    units = testing.moe_expand_units(**shape)
    assert units in (1, 2)
    if units == 2:
        assert shape["max_rank"] <= 32
        b_bytes = shape["num_pairs"] * shape["columns"] * (32 if shape["max_rank"] <= 16 else 64)
        assert b_bytes > 40_960 * shape["sm_count"]


@pytest.mark.parametrize(
    ("units", "num_pairs", "columns", "max_rank", "splits"),
    [
        (1, 82, 2048, 16, 4),  # Qwen3-30B, w2: 656 CTAs of one unit a warp, 660 have room
        (2, 83, 2048, 16, 4),
        (1, 131, 2048, 16, 8),  # lanes share the parts of K
        (2, 133, 2048, 16, 8),
        (1, 49, 2048, 32, 2),  # 392 of 396
        (2, 50, 2048, 17, 2),
        (1, 66, 2048, 17, 4),
        (1, 4096, 2048, 33, 1),
    ],
)
def test_a_wave_of_the_moe_expand_of_few_pairs(
    units: int, num_pairs: int, columns: int, max_rank: int, splits: int
) -> None:
    found = testing.moe_expand_units(
        num_pairs=num_pairs,
        num_groups=1024,
        columns=columns,
        max_rank=max_rank,
        splits=splits,
        sm_count=132,
    )
    assert found == units


@given(
    num_pairs=PAIRS,
    num_groups=GROUPS,
    num_experts=EXPERTS,
    in_features=FEATURES,
    rank=st.integers(1, 1024),
    slices=st.integers(1, 8),
    sm_count=SM_COUNTS,
)
def test_layouts_do_not_change_how_k_is_split(rank: int, slices: int, **shape: int) -> None:
    configs = [
        testing.moe_shrink_config(
            matrices=matrices,
            rows=slices * rank // matrices,
            max_rank=rank,
            vector=vector,
            **shape,
        )
        for matrices in (1, slices)
        for vector in (False, True)
    ]
    ways = {(c.split_features, c.members, c.few_tiles, c.member_features) for c in configs}
    assert len(ways) == 1


@given(
    num_pairs=PAIRS,
    num_groups=GROUPS,
    blocks=st.integers(1, 4096),
    sm_count=SM_COUNTS,
    most_per_sm=st.sampled_from([8, 16, 32]),
)
def test_the_grid_over_moe_tiles_is_bounded(**shape: int) -> None:
    tiles = testing.moe_grid_tiles(**shape)
    assert 1 <= tiles <= max(1, testing.max_moe_tiles(shape["num_pairs"], shape["num_groups"]))
    assert tiles <= 65_535
    assert tiles == 1 or (tiles - 1) * shape["blocks"] < shape["most_per_sm"] * shape["sm_count"]

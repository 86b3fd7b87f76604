"""Plan layout, tile planner and launch heuristics: pure C++, held to what the kernels rely on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora_ext.ops

testing = pytest.importorskip(
    "lora_ext._testing", reason="needs a build with LORA_EXT_TEST_BUILD=1 and Python.h"
)

TOKENS = st.integers(0, 40_000)
SLOTS = st.integers(1, testing.MAX_SLOTS)
FEATURES = st.integers(1, 200_000)
SM_COUNTS = st.sampled_from([1, 78, 108, 132, 148])
SECTIONS = ("tiles", "wide_tiles", "token_slots", "permutation", "seg_indptr", "seg_slots")


@given(max_tokens=TOKENS, num_slots=SLOTS)
def test_the_capacity_follows_from_the_size(max_tokens: int, num_slots: int) -> None:
    size = testing.plan_size(max_tokens, num_slots)
    wide = testing.WIDE_TILE_TOKENS
    assert testing.plan_max_tokens(size, num_slots) == -(-max_tokens // wide) * wide
    assert testing.plan_max_tokens(size + 1, num_slots) == -1
    assert lora_ext.ops.plan_size(max_tokens, num_slots) == size


@given(blocks=st.integers(0, 1_000), num_slots=SLOTS)
def test_the_sections_follow_each_other(blocks: int, num_slots: int) -> None:
    max_tokens = blocks * testing.WIDE_TILE_TOKENS
    layout = testing.PlanLayout(max_tokens=max_tokens, num_slots=num_slots)
    lengths = [
        4 * layout.tile_capacity(max_tokens, testing.TILE_TOKENS),
        4 * layout.tile_capacity(max_tokens, testing.WIDE_TILE_TOKENS),
        max_tokens,
        max_tokens,
        max_tokens + 1,
        max_tokens,
        num_slots + 1,
        num_slots,
    ]
    starts = [getattr(layout, name) for name in (*SECTIONS, "slot_indptr", "enabled", "size")]
    for (start, end), length in zip(itertools.pairwise(starts), lengths, strict=True):
        assert start + length <= end
    # Read 16 bytes at a time, so 4 elements.
    assert layout.tiles % 4 == layout.wide_tiles % 4 == layout.token_slots % 4 == 0


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=64),
    tile_tokens=st.sampled_from([testing.TILE_TOKENS, testing.WIDE_TILE_TOKENS]),
)
def test_no_mix_makes_more_tiles_than_planned_for(counts: list[int], tile_tokens: int) -> None:
    tiles = sum(-(-count // tile_tokens) for count in counts)
    num_tokens, num_slots = sum(counts), len(counts)
    assert tiles <= testing.max_tiles(num_tokens, num_slots, tile_tokens)
    layout = testing.PlanLayout(max_tokens=num_tokens, num_slots=num_slots)
    assert tiles <= layout.tile_capacity(num_tokens, tile_tokens)


@given(max_tokens=TOKENS, num_slots=SLOTS)
def test_the_plan_kernel_fits_every_capacity(max_tokens: int, num_slots: int) -> None:
    config = testing.plan_config(max_tokens, num_slots)
    assert config.threads % 32 == 0 and 32 * config.num_buckets <= config.threads <= 1024
    assert config.shared_bytes <= testing.MAX_SHARED_BYTES - 1024  # static arrays need some
    counts = max(num_slots * (config.num_buckets + 2), 3 * config.threads)
    parts = [(0, counts), (config.slots_at, num_slots + 1), (config.tokens_at, max_tokens)]
    placed = sorted((at, at + size) for at, size in parts if at >= 0)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(placed))
    assert 4 * placed[-1][1] <= config.shared_bytes


def test_a_small_plan_has_a_thread_for_each_token_slot_and_segment() -> None:
    assert testing.plan_is_small(256, 256, 256) and testing.plan_is_small(0, 1, 1)
    assert testing.plan_is_small(64, 200, 200) and not testing.plan_is_small(64, 200, 201)
    assert not testing.plan_is_small(320, 8, 1) and not testing.plan_is_small(64, 257, 1)


def test_a_decode_plan_stays_in_shared_memory() -> None:
    config = testing.plan_config(256, 1024)
    assert config.slots_at > 0 and config.tokens_at > 0


APPLY = {
    "num_slots": SLOTS,
    "in_features": FEATURES,
    "num_slices": st.integers(1, 8),
    "max_rank": st.integers(1, 1024),
    "sm_count": SM_COUNTS,
    "half": st.booleans(),
}


@given(num_tokens=TOKENS, batch_invariant=st.booleans(), **APPLY)
def test_every_warp_of_the_decode_shrink_has_work(**shape: int) -> None:
    config = testing.apply_config(**shape)
    if not config.decode:
        assert not shape["half"] or not shape["batch_invariant"]
        return
    assert shape["half"]
    assert config.blocks in (1, 2)
    rules = config.split_rules
    splits = [rules.parts(tiles) for tiles in range(1, 300)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] == 1 or splits[0] * 32 * 8 < shape["in_features"] + 32 * 8


def test_a_small_apply_divides_the_cache_alike_and_a_large_shrink_wants_all_of_it() -> None:
    qkv = {"num_tokens": 32, "in_features": 4096, "num_slices": 3, "sm_count": 132}
    qkv |= {"half": True, "batch_invariant": False}
    sizes = ((8, 16, 58, 58), (32, 16, -1, -1), (32, 64, 28, -1))
    for num_slots, max_rank, shrink, expand in sizes:
        config = testing.apply_config(num_slots=num_slots, max_rank=max_rank, **qkv)
        assert config.shrink_shared_percent == shrink
        assert config.expand_shared_percent == expand


@given(capacity=st.integers(1, 300), **{**APPLY, "num_tokens": TOKENS})
def test_the_grid_has_room_for_every_part_of_every_number_of_tiles(
    capacity: int, **shape: int
) -> None:
    rules = testing.apply_config(batch_invariant=False, **shape).split_rules
    parts = [tiles * rules.parts(tiles) for tiles in range(1, capacity + 1)]
    assert rules.all_parts(capacity) >= max(parts)


@given(
    row_groups=st.integers(1, 96),
    group_rows_log=st.integers(4, 5),
    parts=st.integers(1, 16),
    data=st.data(),
)
def test_a_low_rank_puts_the_ctas_of_a_high_one_to_work_on_pieces_of_k(
    row_groups: int, group_rows_log: int, parts: int, data: st.DataObject
) -> None:
    most_rows = row_groups << group_rows_log
    rows = data.draw(st.integers(1, most_rows))

    def shares(rows: int) -> Any:
        return testing.TileShares(
            row_groups=row_groups, group_rows_log=group_rows_log, rows=rows, parts=parts
        )

    low, high = shares(rows), shares(most_rows)
    assert (high.groups, high.pieces) == (row_groups, parts)
    assert 0 <= (low.groups << group_rows_log) - rows < 1 << group_rows_log
    # No more CTAs, and no more room for sums, than there are.
    assert low.groups * low.pieces <= row_groups * parts
    assert low.pieces * low.stride <= parts * most_rows * 16
    # As many as fit, but no more than sixteen to add up.
    each = low.pieces // parts
    assert each * parts == low.pieces <= 16
    assert (each + 1) * low.groups > row_groups or (each + 1) * parts > 16


@given(tokens=st.lists(TOKENS, min_size=2, max_size=4), **APPLY)
def test_batch_invariant_means_one_choice_for_all_batches(tokens: list[int], **shape: int) -> None:
    configs = [testing.apply_config(num_tokens=t, batch_invariant=True, **shape) for t in tokens]
    assert len({(config.decode, config.split_rules.parts(1)) for config in configs}) == 1
    for config in configs:
        assert config.split_rules.parts(1) == config.split_rules.parts(10**6)


@given(
    num_tokens=st.integers(1, 256),
    num_slots=st.integers(1, 300),
    in_features=FEATURES,
    num_slices=st.integers(1, 8),
    max_rank=st.integers(1, 128),
    sm_count=SM_COUNTS,
)
def test_clusters_serve_every_unit_of_wide_tiles(**shape: int) -> None:
    split = testing.wide_split(**shape)
    assert split.row_groups * 64 >= shape["num_slices"] * shape["max_rank"]
    capacity = min(shape["num_tokens"], shape["num_tokens"] // 64 + shape["num_slots"])
    before = split.cut(0)
    for tiles in range(1, capacity + 1):
        group, parts = split.cut(tiles)
        assert split.cluster % group == 0 and 1 <= parts <= 2  # which the expand adds up
        assert group * parts <= before[0] * before[1]  # more tiles, fewer CTAs for each
        before = group, parts
        groups = split.num_clusters * (split.cluster // group)
        assert tiles * parts * split.row_groups <= groups
        assert tiles * parts <= split.all_parts(capacity)
        assert parts == 1 or parts * group * 256 <= shape["in_features"]


def test_two_clusters_find_places_beside_each_other_where_units_may_be_many() -> None:
    qkv = {"in_features": 4096, "num_slices": 3, "max_rank": 64, "sm_count": 132}
    assert testing.wide_split(num_tokens=128, num_slots=2, **qkv).num_clusters == 16
    assert testing.wide_split(num_tokens=128, num_slots=8, **qkv).num_clusters == 32
    # Long K and few units: clusters of 16.
    down = {**qkv, "num_slices": 1}
    for in_features, cluster in ((14336, 16), (4096, 8)):
        shape = {**down, "in_features": in_features}
        split = testing.wide_split(num_tokens=128, num_slots=8, **shape)
        assert split.cluster == cluster


def test_wide_tiles_are_for_many_tokens_of_large_adapters() -> None:
    qkv = {"in_features": 8192, "out_features": 10240, "num_slices": 3, "max_rank": 128}
    assert testing.decode_is_wide(num_tokens=200, num_slots=8, **qkv)
    assert not testing.decode_is_wide(num_tokens=200, num_slots=64, **qkv)
    assert not testing.decode_is_wide(num_tokens=8, num_slots=1, **qkv)
    assert not testing.decode_is_wide(num_tokens=257, num_slots=8, **qkv)
    assert not testing.decode_is_wide(num_tokens=200, num_slots=8, **qkv, half=False)
    assert not testing.decode_is_wide(num_tokens=200, num_slots=8, **qkv, batch_invariant=True)
    for max_rank in (32, 256):
        assert not testing.decode_is_wide(
            num_tokens=200, num_slots=8, **{**qkv, "max_rank": max_rank}
        )
    # More tokens a slot where ranks are lower.
    narrow = {**qkv, "out_features": 6144}
    for max_rank, fewest, sizes in ((128, 48, qkv), (64, 96, qkv), (64, 128, narrow)):
        shape = {"num_slots": 8, **sizes, "max_rank": max_rank}
        assert testing.decode_is_wide(num_tokens=fewest, **shape)
        assert not testing.decode_is_wide(num_tokens=fewest - 1, **shape)


@given(
    num_tokens=TOKENS,
    num_slots=SLOTS,
    in_features=FEATURES,
    rows=st.integers(1, 8 * 1024),
    sm_count=SM_COUNTS,
    clusters=st.booleans(),
)
def test_the_shrink_covers_its_rows(**shape: int) -> None:
    config = testing.shrink_config(**shape)
    assert config.rows == 256 or shape["rows"] <= config.rows in (32, 64, 128)
    assert config.cluster in ((1, 2, 4, 8, 16) if shape["clusters"] else (1,))


@given(
    num_tokens=st.integers(1, 40_000),
    num_slots=SLOTS,
    in_features=FEATURES,
    rows=st.integers(1, 8 * 1024),
    sm_count=SM_COUNTS,
)
def test_the_shrink_by_wgmma_takes_what_the_chip_has(**shape: int) -> None:
    config = testing.shrink_wgmma_config(**shape)
    assert config.rows in (16, 32, 48, 64, 96, 128, 192)
    assert config.rows < shape["rows"] + 64  # no block is mostly padding
    assert 1 <= config.cluster <= 8 or config.cluster == 16
    least = 320 if config.cluster <= 8 else 512
    assert config.cluster == 1 or shape["in_features"] >= least * config.cluster
    del shape["in_features"], shape["rows"]
    clusters = testing.shrink_clusters(**shape)
    tiles = -(-shape["num_tokens"] // testing.WIDE_TILE_TOKENS)
    most = testing.max_tiles(shape["num_tokens"], shape["num_slots"], testing.WIDE_TILE_TOKENS)
    assert min(tiles, most) <= clusters <= most


@pytest.mark.parametrize(
    ("num_tokens", "rows", "expected"),
    [
        (304, 96, (48, 8, 108)),
        (448, 96, (96, 8, 108)),  # no SM for each CTA of 48 rows
        (304, 128, (64, 8, 108)),
        (304, 192, (64, 8, 108)),
        (512, 192, (96, 8, 108)),
        (1024, 384, (192, 2, 216)),
        (2048, 192, (192, 2, 216)),
        (2048, 48, (48, 5, 108)),
        (8192, 192, (192, 1, 216)),
        (8192, 16, (16, 1, 216)),
        (16384, 64, (64, 1, 216)),
    ],
)
def test_the_shrink_by_wgmma_fills_an_h200(
    num_tokens: int, rows: int, expected: tuple[int, int, int]
) -> None:
    config = testing.shrink_wgmma_config(
        num_tokens=num_tokens, num_slots=16, in_features=4096, rows=rows, sm_count=132
    )
    assert (config.rows, config.cluster, config.kilobytes) == expected


def test_a_pool_of_many_slots_makes_few_clusters_without_a_tile() -> None:
    shape = {"num_tokens": 512, "sm_count": 132}
    clusters = [testing.shrink_clusters(num_slots=slots, **shape) for slots in (1, 4, 64, 1000)]
    assert clusters == [9, 12, 32, 32]


def test_the_shrink_by_wgmma_reads_x_once_where_clusters_of_16_have_room() -> None:
    shape = {"num_slots": 16, "in_features": 28672, "rows": 128, "sm_count": 132}
    config = testing.shrink_wgmma_config(num_tokens=304, **shape)
    assert (config.rows, config.cluster, config.kilobytes) == (128, 16, 144)
    assert testing.shrink_wgmma_config(num_tokens=512, **shape).cluster == 8
    shape["rows"] = 192  # too much to exchange
    assert testing.shrink_wgmma_config(num_tokens=304, **shape).cluster == 8


def test_a_short_k_is_cut_finer_where_ctas_have_a_multiprocessor_each() -> None:
    shape = {"num_slots": 16, "in_features": 2880, "sm_count": 132}
    clusters = {
        (num_tokens, rows): testing.shrink_wgmma_config(
            num_tokens=num_tokens, rows=rows, **shape
        ).cluster
        for num_tokens, rows in ((304, 48), (1000, 48), (304, 384), (1100, 48))
    }
    assert clusters == {(304, 48): 8, (1000, 48): 8, (304, 384): 5, (1100, 48): 5}


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "out_features", "num_slices", "max_rank", "expected"),
    [
        (304, 4096, 4096, 1, 64, True),
        (448, 4096, 4096, 1, 64, True),
        (512, 4096, 4096, 1, 64, False),  # a cluster for some units only
        (304, 4096, 4096, 1, 32, False),
        (304, 4096, 14336, 1, 64, False),  # more blocks of y than are resident
        (304, 4096, 6144, 3, 64, False),
        (304, 28672, 8192, 1, 64, False),  # x is much
        (512, 2048, 2048, 1, 64, True),  # all of a CTA's share of K in its ring
        (832, 2048, 2048, 1, 64, True),
        (896, 2048, 2048, 1, 64, False),  # more units than clusters
        (304, 2880, 6144, 3, 32, True),
        (304, 2880, 6144, 3, 16, False),
        (256, 2048, 2048, 1, 64, False),  # decode_is_wide says
    ],
)
def test_short_prefills_of_little_work_take_the_wide_decode_kernels(
    num_tokens: int,
    in_features: int,
    out_features: int,
    num_slices: int,
    max_rank: int,
    expected: bool,
) -> None:
    shape = {
        "num_tokens": num_tokens,
        "num_slots": 16,
        "in_features": in_features,
        "out_features": out_features,
        "num_slices": num_slices,
        "max_rank": max_rank,
    }
    assert testing.prefill_is_wide(**shape) is expected
    assert not testing.prefill_is_wide(**shape, half=False)
    assert not testing.prefill_is_wide(**shape, batch_invariant=True)


@given(num_tiles=st.integers(0, 10_000), cluster=st.integers(1, 16), places=st.integers(1, 1000))
def test_clusters_are_halved_until_every_tile_has_a_place(
    num_tiles: int, cluster: int, places: int
) -> None:
    halvings = testing.cluster_halvings(num_tiles=num_tiles, cluster=cluster, places=places)
    groups = 2**halvings
    assert cluster % groups == 0
    assert num_tiles * (cluster // groups) <= places or cluster // groups % 2 == 1
    assert halvings == 0 or num_tiles * (2 * cluster // groups) > places


@given(
    num_tokens=st.integers(257, 40_000),
    num_slots=SLOTS,
    in_features=st.integers(1, 20_000),
    rows=st.integers(1, 64).map(lambda n: 16 * n),
    sm_count=SM_COUNTS,
    data=st.data(),
)
def test_xa_by_tiles_has_all_steps_once(data: st.DataObject, **shape: int) -> None:
    layout = testing.xa_layout(**shape)
    elements = testing.xa_elements(**shape)
    tile_elements = testing.WIDE_TILE_TOKENS * shape["rows"]
    most = testing.max_tiles(shape["num_tokens"], shape["num_slots"], testing.WIDE_TILE_TOKENS)
    assert elements >= most * tile_elements
    assert 64 * layout.steps >= shape["in_features"] > 64 * (layout.steps - 1)
    if layout.parts == 0:
        return
    tiles = data.draw(st.integers(1, most))
    places = set()
    step = 0
    for part in range(layout.parts):
        assert layout.begin(tiles, part) == step
        end = layout.begin(tiles, part + 1)
        if end == step:
            continue
        assert layout.part_of(tiles, step) == layout.part_of(tiles, end - 1) == part
        for tile in range(step // layout.steps, -(-end // layout.steps)):
            place = layout.place(part, tile)
            assert place not in places
            assert (place + 1) * tile_elements <= elements
            places.add(place)
        step = end
    assert step == tiles * layout.steps
    used = sum(layout.begin(tiles, i) < layout.begin(tiles, i + 1) for i in range(layout.parts))
    assert used in (layout.parts, min(layout.parts, step)) or (
        used % tiles == 0 and 4 * used >= 3 * layout.parts
    )


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "rows", "expected"),
    [
        (512, 4096, 192, (0, False)),  # clusters, all of which have room
        (512, 14336, 16, (0, False)),  # clusters of 16 that have little to exchange
        (512, 14336, 64, (132, True)),  # clusters of 16 that have much
        (2048, 14336, 64, (0, False)),
        (2048, 4096, 192, (132, True)),  # a CTA on each multiprocessor
        (2048, 8192, 384, (66, True)),
        (8192, 4096, 192, (132, False)),  # many tiles: the expand adds up a part or two
    ],
)
def test_parts_of_xa_are_summed_where_there_are_many_of_a_tile(
    num_tokens: int, in_features: int, rows: int, expected: tuple[int, bool]
) -> None:
    shape = {"num_slots": 16, "in_features": in_features, "rows": rows, "sm_count": 132}
    layout = testing.xa_layout(num_tokens=num_tokens, **shape)
    assert (layout.parts, layout.summed) == expected
    # Only whole sums are left in halves, and only of a dtype that needs no scale.
    in_parts = layout.parts > 0 and not layout.summed
    assert testing.xa_in_halves(layout, bf16=True) is not in_parts
    assert not testing.xa_in_halves(layout, bf16=False)


@given(
    num_tokens=st.integers(257, 100_000),
    row_steps=st.integers(1, 1000),
    resident=st.integers(1, 1000),
)
def test_long_walks_of_the_expand_have_a_second_wave(**shape: int) -> None:
    tiles = -(-shape["num_tokens"] // testing.WIDE_TILE_TOKENS)
    steps = tiles * shape["row_steps"] / shape["resident"]
    waves = testing.expand_walks(**shape) / shape["resident"]
    assert waves == (2 if steps > 12 else 1)


def test_the_columns_of_a_row_of_xa_are_those_of_a_matrix_product() -> None:
    columns = [testing.XaLayout.column(position) for position in range(32)]
    assert sorted(columns) == list(range(32))
    for lane in range(4):
        first = 2 * lane
        assert columns[4 * lane : 4 * lane + 4] == [first, first + 1, first + 8, first + 9]
    assert [testing.XaLayout.padded(rank) for rank in (1, 16, 17, 64)] == [16, 16, 32, 64]


def test_the_expand_streams_where_its_registers_hold_the_ranks() -> None:
    assert testing.expand_streams(num_tokens=512, max_rank=128)
    assert not testing.expand_streams(num_tokens=512, max_rank=129)
    assert not testing.expand_streams(num_tokens=1, max_rank=16)


@given(
    num_slots=SLOTS,
    blocks=st.integers(1, 1_000),
    max_rank=st.integers(1, 1024),
    sm_count=SM_COUNTS,
)
def test_the_decode_expand_streams_where_its_grid_would_be_large(**shape: int) -> None:
    ctas = [testing.decode_stream_ctas(num_tokens=2**i, resident=3, **shape) for i in range(9)]
    assert ctas == sorted(ctas)
    assert set(ctas) <= {0, 3 * shape["sm_count"]}
    rank, sm_count = shape["max_rank"], shape["sm_count"]
    most = 5 * sm_count if rank <= 16 else 6 * sm_count if rank <= 64 else 2 * sm_count // 3
    assert (ctas[0] == 0) == (shape["blocks"] <= most)  # one token, one tile


def test_a_small_expand_lets_the_next_kernel_start_at_once() -> None:
    small = {"num_tokens": 32, "ctas": 264, "max_rank": 16, "sm_count": 132}
    assert testing.expand_launches_next(**small)
    for more in ({"num_tokens": 33}, {"ctas": 265}, {"max_rank": 17}, {"sm_count": 131}):
        assert not testing.expand_launches_next(**{**small, **more})


def test_an_embedding_of_few_tokens_needs_no_tiles() -> None:
    assert testing.embedding_is_few(num_tokens=8)
    assert not testing.embedding_is_few(num_tokens=9)
    assert testing.embedding_is_by_slots(num_tokens=64)
    assert not testing.embedding_is_by_slots(num_tokens=65)


@given(num_tokens=TOKENS, num_slots=SLOTS, max_rank=st.integers(1, 1024))
def test_an_embedding_is_wide_where_tiles_are_half_full(
    num_tokens: int, num_slots: int, max_rank: int
) -> None:
    wide = testing.embedding_is_wide(num_tokens=num_tokens, num_slots=num_slots, max_rank=max_rank)
    tiles = max(-(-num_tokens // 64), min(num_tokens, num_slots))
    assert wide == (max_rank > 32 and num_tokens >= 32 * tiles)


@given(num_tokens=st.integers(1, 40_000), num_slots=SLOTS, sm_count=SM_COUNTS)
def test_the_grid_of_an_embedding_has_all_likely_tiles(
    num_tokens: int, num_slots: int, sm_count: int
) -> None:
    tiles = testing.embedding_grid_tiles(
        num_tokens=num_tokens, num_slots=num_slots, sm_count=sm_count
    )
    likely = max(-(-num_tokens // 64), min(num_tokens, num_slots))
    most = testing.max_tiles(num_tokens, num_slots, testing.WIDE_TILE_TOKENS)
    assert min(likely, most) <= tiles <= min(most, likely + sm_count // 4)


@given(
    blocks=st.integers(0, 100_000),
    steps=st.integers(0, 100_000),
    sm_count=SM_COUNTS,
    clusters=st.booleans(),
)
def test_a_gradient_is_shared_only_where_there_is_enough_to_sum(**shape: int) -> None:
    cluster = testing.gradient_cluster(**shape)
    assert cluster in ((1, 2, 4, 8) if shape["clusters"] else (1,))
    assert cluster == 1 or shape["steps"] >= 8 * cluster
    assert cluster == 1 or shape["blocks"] * cluster <= 4 * shape["sm_count"]

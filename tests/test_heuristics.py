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
    splits = [rules.cuts(tiles).parts(0) for tiles in range(1, 300)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] == 1 or splits[0] * 32 * 8 < shape["in_features"] + 32 * 8


@pytest.mark.parametrize(
    ("in_features", "max_rank", "parts"), [(4096, 16, 4), (8192, 32, 8), (28672, 16, 16)]
)
def test_a_warp_of_a_small_decode_shrink_has_one_round_of_loads(
    in_features: int, max_rank: int, parts: int
) -> None:
    """Five steps of 32 features each of eight warps, as long as K is cut into no more than 16."""
    config = testing.apply_config(
        num_tokens=1,
        num_slots=8,
        in_features=in_features,
        num_slices=1,
        max_rank=max_rank,
        sm_count=132,
        half=True,
        batch_invariant=False,
    )
    assert config.blocks == 1
    assert config.split_rules.cuts(1).parts(0) == parts


@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "in_features", "rows", "blocks"),
    [
        (128, 8, 14336, 64, 1),  # a CTA for one SM in four
        (256, 8, 14336, 64, 2),
        (32, 8, 28672, 128, 1),  # for one in two, 59 MB, of four tokens a tile
        (33, 8, 28672, 128, 2),
        (128, 32, 4096, 96, 1),  # 25 MB
        (129, 32, 4096, 96, 2),
        (129, 64, 4096, 64, 2),  # though of two tokens a tile
        (128, 32, 4096, 192, 2),  # 50 MB
        (256, 32, 4096, 48, 1),  # three blocks, 13 MB
        (256, 31, 4096, 48, 2),
    ],
)
def test_rows_a_cta_of_the_decode_shrink(
    num_tokens: int, num_slots: int, in_features: int, rows: int, blocks: int
) -> None:
    shape = {"num_slots": num_slots, "in_features": in_features, "max_rank": rows, "half": True}
    shape |= {"num_slices": 1, "sm_count": 132}
    config = testing.apply_config(num_tokens=num_tokens, batch_invariant=False, **shape)
    assert (config.blocks, config.row_groups) == (blocks, -(-rows // (16 * blocks)))


def test_a_batch_invariant_shrink_has_as_many_rows_a_cta_for_any_batch() -> None:
    shape = {"num_slots": 8, "in_features": 4096, "num_slices": 1, "max_rank": 1024}
    shape |= {"sm_count": 132, "half": True}
    for batch_invariant, blocks in ((False, [1, 2]), (True, [2, 2])):
        configs = [
            testing.apply_config(num_tokens=tokens, batch_invariant=batch_invariant, **shape)
            for tokens in (1, 8)
        ]
        assert [config.blocks for config in configs] == blocks


def test_a_small_apply_divides_the_cache_alike_and_a_large_shrink_wants_all_of_it() -> None:
    qkv = {"num_tokens": 32, "in_features": 4096, "num_slices": 3, "sm_count": 132}
    qkv |= {"half": True, "batch_invariant": False}
    sizes = ((8, 16, 58, 58), (32, 16, 58, 58), (20, 32, -1, -1), (32, 64, 28, -1))
    for num_slots, max_rank, shrink, expand in sizes:
        config = testing.apply_config(num_slots=num_slots, max_rank=max_rank, **qkv)
        assert config.shrink_shared_percent == shrink
        assert config.expand_shared_percent == expand


@given(capacity=st.integers(1, 300), **{**APPLY, "num_tokens": TOKENS})
def test_the_grid_has_room_for_every_part_of_every_number_of_tiles(
    capacity: int, **shape: int
) -> None:
    rules = testing.apply_config(batch_invariant=False, **shape).split_rules
    parts = [rules.cuts(tiles).first_part(tiles) for tiles in range(1, capacity + 1)]
    assert rules.all_parts(capacity) >= max(parts)


@given(num_tiles=st.integers(1, 300), **{**APPLY, "num_tokens": TOKENS})
def test_the_parts_of_all_tiles_are_numbered_and_the_longer_ones_come_first(
    num_tiles: int, **shape: int
) -> None:
    config = testing.apply_config(batch_invariant=False, **shape)
    cuts = config.split_rules.cuts(num_tiles)
    parts = [cuts.parts(tile) for tile in range(num_tiles)]
    assert parts == sorted(parts) and 1 <= parts[-1] <= min(16, parts[0] + 1)
    if config.blocks == 1 or shape["max_rank"] <= 16:  # whose kernels do not look
        assert parts[0] == parts[-1]
    numbered = [tile for tile in range(num_tiles) for _ in range(parts[tile])]
    assert [cuts.tile_of(part) for part in range(len(numbered))] == numbered
    assert [cuts.first_part(tile) for tile in range(num_tiles)] == [
        numbered.index(tile) for tile in range(num_tiles)
    ]


def test_tiles_are_cut_unlike_where_ctas_may_be_two_waves() -> None:
    # 70b `down`, rank 128, 38 tiles of four row groups: 528 CTAs, not 456. In one wave all alike.
    shape = {"num_tokens": 200, "num_slots": 32, "num_slices": 1, "max_rank": 128, "sm_count": 132}
    for in_features, parts in ((28672, (3, 4)), (8192, (1, 1))):
        config = testing.apply_config(
            in_features=in_features, half=True, batch_invariant=False, **shape
        )
        cuts = config.split_rules.cuts(38)
        assert (cuts.parts(0), cuts.parts(37)) == parts
        assert cuts.first_part(38) * config.row_groups <= 528


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
    assert len({(config.decode, config.split_rules.cuts(1).parts(0)) for config in configs}) == 1
    for config in configs:
        for num_tiles in (2, 10**6):
            cuts = config.split_rules.cuts(num_tiles)
            assert cuts.parts(0) == cuts.parts(num_tiles - 1) == config.split_rules.cuts(1).parts(0)


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
    for num_tokens, max_rank in ((32, 16), (8, 32)):
        small = {"num_tokens": num_tokens, "ctas": 264, "max_rank": max_rank, "sm_count": 132}
        assert testing.expand_launches_next(**small)
        for more in (
            {"num_tokens": num_tokens + 1},
            {"ctas": 265},
            {"max_rank": max_rank + 1},
            {"sm_count": 131},
        ):
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

"""When few tokens are served by wide tiles, and how (wide_heuristics.h)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

testing = pytest.importorskip(
    "lora_ext._testing", reason="needs a build with LORA_EXT_TEST_BUILD=1 and Python.h"
)


@given(
    num_tokens=st.integers(1, 256),
    num_slots=st.integers(1, 300),
    in_features=st.integers(1, 200_000),
    num_slices=st.integers(1, 8),
    max_rank=st.integers(1, 128),
    sm_count=st.sampled_from([1, 78, 108, 132, 148]),
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
    for max_rank in (8, 256):
        assert not testing.decode_is_wide(
            num_tokens=256, num_slots=1, **{**qkv, "max_rank": max_rank}
        )
    # More tokens a slot where ranks are lower, fewer where y is wider than K is long.
    narrow = {**qkv, "out_features": 6144}
    for max_rank, slots, fewest, sizes in (
        (128, 8, 48, qkv),
        (128, 8, 48, narrow),
        (64, 8, 48, qkv),
        (64, 2, 24, qkv),
        (64, 8, 128, narrow),
        (32, 8, 192, qkv),
        (32, 2, 49, qkv),  # 8 MB, once for each 16
        (32, 4, 192, narrow),
        (16, 4, 192, qkv),
    ):
        shape = {"num_slots": slots, **sizes, "max_rank": max_rank}
        assert testing.decode_is_wide(num_tokens=fewest, **shape)
        assert not testing.decode_is_wide(num_tokens=fewest - 1, **shape)
    for other in (narrow, {**qkv, "num_slices": 1}):
        assert not testing.decode_is_wide(num_tokens=256, num_slots=1, **{**other, "max_rank": 16})

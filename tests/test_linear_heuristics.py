"""When lora_linear has a product of its own, and how: pure C++, held to what its kernels ask."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

testing = pytest.importorskip(
    "lora_ext._testing", reason="needs a build with LORA_EXT_TEST_BUILD=1 and Python.h"
)

# At both ends of what the kernels take: any size at all would hardly ever be theirs.
any_size = given(
    num_tokens=st.sampled_from([0, 1, 8, 9, 16, 17, 24, 32, 33, 300]),
    num_slots=st.sampled_from([1, 2, 8, 100]),
    in_features=st.one_of(st.integers(1, 3_000), st.integers(1, 200_000)),
    out_features=st.one_of(st.integers(1, 8_000), st.integers(1, 200_000)),
    num_slices=st.integers(1, 8),
    max_rank=st.sampled_from([1, 8, 16, 32, 33, 64, 256, 1024]),
    sm_count=st.sampled_from([1, 78, 108, 132, 148]),
)


@any_size
@settings(max_examples=2000)
def test_one_stream_of_weights_serves_few_tokens(**size: int) -> None:
    config = testing.linear_config(**size)
    num_tokens, xa = size["num_tokens"], size["num_slices"] * size["max_rank"]
    if config.blocks:
        assert num_tokens <= min(8 * config.blocks, testing.LINEAR_MAX_TOKENS)
        assert 1 <= config.groups <= min(size["sm_count"], -(-size["out_features"] // 16))
        assert 4 * 8 * config.blocks * xa <= 32 * 1024
    else:
        assert num_tokens == 0 or num_tokens > testing.LINEAR_MAX_TOKENS or xa > 256


@any_size
@settings(max_examples=2000)
def test_a_product_by_clusters_serves_a_few_dozen_tokens(**size: int) -> None:
    cluster = testing.linear_wgmma_cluster(**size)
    assert 0 <= cluster <= 6
    if cluster:
        least = 8 if size["num_slots"] == 1 else testing.LINEAR_MAX_TOKENS
        assert least < size["num_tokens"] <= testing.LINEAR_WGMMA_MAX_TOKENS
        assert size["max_rank"] <= 32
        assert size["in_features"] >= 256 * cluster
        tiles = -(-size["out_features"] // 128)
        assert 2 * tiles * cluster >= size["sm_count"]
        assert cluster == 1 or tiles * cluster <= size["sm_count"] * 3 // 2


@pytest.mark.parametrize("without", ["half", "capable", "vector"])
def test_conditions(without: str) -> None:
    size = {"num_tokens": 8, "num_slots": 8, "in_features": 4096, "out_features": 6144}
    size |= {"num_slices": 3, "max_rank": 64}
    assert testing.linear_config(**size).blocks == 1
    assert testing.linear_config(**size, **{without: False}).blocks == 0
    assert testing.linear_config(**size, batch_invariant=True).blocks == 0
    size |= {"num_tokens": 24, "max_rank": 16}
    assert testing.linear_wgmma_cluster(**size) == 4
    assert testing.linear_wgmma_cluster(**size, **{without: False}) == 0
    assert testing.linear_wgmma_cluster(**size, batch_invariant=True) == 0


def test_the_product_by_clusters_comes_first_where_one_adapter_is_all_there_can_be() -> None:
    size = {"in_features": 4096, "out_features": 6144, "num_slices": 3, "max_rank": 32}
    tokens = range(1, 18)
    by_slots = {
        n: [t for t in tokens if testing.linear_wgmma_cluster(num_tokens=t, num_slots=n, **size)]
        for n in (1, 2, 8)
    }
    assert by_slots == {1: list(range(9, 18)), 2: [17], 8: [17]}


def test_a_shrink_of_few_bytes_leaves_an_sm_divided_as_the_product_has_it() -> None:
    percent = testing.shrink_beside_product_percent
    site = {"in_features": 4096, "num_slices": 3, "max_rank": 16}
    assert percent(num_tokens=17, num_slots=8, **site) == 100
    assert percent(num_tokens=16, num_slots=8, **site) == -1  # linear_decode's
    assert percent(num_tokens=9, num_slots=1, **site) == 100
    assert percent(num_tokens=8, num_slots=1, **site) == -1
    # With more bytes never again all of it.
    by_slots = [percent(num_tokens=32, num_slots=n, **site) for n in (1, 4, 8, 16, 64)]
    assert by_slots == [100, 100, 100, -1, -1]

"""How a prefill's shrink and expand are launched (prefill_heuristics.h)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

testing = pytest.importorskip(
    "lora_ext._testing", reason="needs a build with LORA_EXT_TEST_BUILD=1 and Python.h"
)

SLOTS = st.integers(1, testing.MAX_SLOTS)
SM_COUNTS = st.sampled_from([1, 78, 108, 132, 148])
TOKENS = st.integers(0, 40_000)
FEATURES = st.integers(1, 200_000)


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

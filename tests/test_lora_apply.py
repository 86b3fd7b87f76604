"""lora_apply_: the fast path against the fp64 oracle, in every situation that a batch can be in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generators import (
    HALVES_AND_FP32,
    LAYOUTS,
    NAN,
    RANKS,
    apply_,
    dtypes_on,
    generator,
    make_batch,
    make_module,
    misaligned,
    on_devices,
    randn,
    random_slots,
    strided_rows,
)
from lora_ext import ops
from numerics import assert_close, assert_same_bits, expected_expand, expected_shrink

pytestmark = on_devices


def expected(y, x, module, weights, batch):
    """The oracle's y, with the error that is allowed."""
    common = (module.ranks, module.scalings, batch.token_slots, module.num_slices, module.max_rank)
    xa = expected_shrink(x, weights.lora_a, *common, weights.a_offsets)
    rest = (module.ranks, batch.token_slots, module.output_slices, weights.b_offsets)
    return expected_expand(y, xa, weights.lora_b, *rest)


def check_apply(y, x, module, batch, layout, **options):
    """Runs the op on y and compares it with the oracle; rows without an adapter keep their bits."""
    weights = module.weights(layout)
    before = y.clone()
    want = expected(y, x, module, weights, batch)
    apply_(y, x, module, weights, batch.plan, **options)
    assert_close(y, want)
    ranks = module.ranks.tolist()
    idle = [t for t, slot in enumerate(batch.slots) if slot < 0 or ranks[slot] == 0]
    assert_same_bits(y[idle], before[idle])
    return y


def random_problem(module, slots, gen, y_dtype=None):
    """(y, x, batch) for token slots."""
    batch = make_batch(slots, module.num_slots, module.device)
    x = randn((len(slots), module.in_features), module.dtype, module.device, gen)
    y_dtype = module.dtype if y_dtype is None else y_dtype
    y = randn((len(slots), module.out_features), y_dtype, module.device, gen)
    return y, x, batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "output_slices",
    [[256], [128, 128], [128, 32, 32], [33, 1, 7, 8], [64, 8, 8, 16, 1, 2, 3, 24]],
    ids=["1", "2", "3", "4", "8"],
)
def test_all_ranks_in_one_batch(device, layout, output_slices):
    for dtype in dtypes_on(device):
        gen = generator("apply", output_slices)
        module = make_module(RANKS, 160, output_slices, dtype, device)
        slots = [*random_slots(90, len(RANKS), gen), *[len(RANKS) - 1] * 40, *[6] * 70]
        y, x, batch = random_problem(module, slots, gen)
        check_apply(y, x, module, batch, layout)


@pytest.mark.parametrize("rank", [*RANKS, 1000, 1024])
def test_one_rank_for_all(device, rank):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("rank", rank)
        module = make_module([rank] * 3, 128, [96], dtype, device)
        y, x, batch = random_problem(module, [0, 0, 1, -1, 2, 1, *[2] * 20], gen)
        check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("max_rank", [33, 64, 300])
def test_pool_wider_than_any_rank(device, max_rank):
    gen = generator("wide pool")
    module = make_module([16, 5, 32], 64, [48, 16], torch.bfloat16, device, max_rank=max_rank)
    y, x, batch = random_problem(module, random_slots(50, 3, gen), gen)
    check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("tokens", [2, 9, 40, 200])
@pytest.mark.parametrize("output_slices", [[72], [72, 24, 64]])
def test_low_ranks_in_a_pool_of_high_ones(device, tokens, output_slices):
    # What the highest rank would need of the chip is at work for the others, too: on pieces of K,
    # of which some are empty where K is short.
    ranks = [16, 8, 64, 3, 0, *[16] * 11]
    for dtype in (torch.bfloat16, torch.float16):
        for in_features in (72, 3000):
            gen = generator("low ranks", tokens, output_slices, dtype)
            module = make_module(ranks, in_features, output_slices, dtype, device, max_rank=128)
            for slots in (random_slots(tokens, len(ranks), gen), [5] * tokens):
                y, x, batch = random_problem(module, slots, gen)
                again = y.clone()
                check_apply(y, x, module, batch, "packed")
                apply_(again, x, module, module.weights("packed"), batch.plan)
                assert_same_bits(again, y)


def test_tiles_whose_k_is_not_cut_alike(device):
    # Thirteen tiles of 34 row groups, and CTAs for fifteen parts: two waves of them on 132 SMs.
    gen = generator("cuts")
    module = make_module([136, 90], 8448, [8] * 8, torch.bfloat16, device)
    y, x, batch = random_problem(module, [0] * 100 + [1] * 90, gen)
    again = y.clone()
    check_apply(y, x, module, batch, "packed")
    apply_(again, x, module, module.weights("packed"), batch.plan)
    assert_same_bits(again, y)


@pytest.mark.parametrize("in_features", [1, 2, 7, 16, 31, 64, 100, 129, 1000, 4096, 14336])
def test_any_in_features(device, in_features):
    for dtype in dtypes_on(device):
        gen = generator("K", in_features)
        module = make_module([3, 16, 0, 40], in_features, [24, 8], dtype, device)
        y, x, batch = random_problem(module, random_slots(21, 4, gen), gen)
        check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("width", [1, 2, 3, 7, 15, 17, 31, 64, 100, 129, 1000, 4097, 32001])
def test_any_width(device, width):
    for dtype in dtypes_on(device):
        gen = generator("N", width)
        module = make_module([3, 16, 0, 40], 48, [width], dtype, device)
        y, x, batch = random_problem(module, random_slots(11, 4, gen), gen)
        check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("y_dtype", HALVES_AND_FP32)
def test_any_dtype_of_y(device, y_dtype):
    for dtype in dtypes_on(device):
        gen = generator("y", y_dtype)
        module = make_module([16, 5], 64, [100], dtype, device)
        y, x, batch = random_problem(module, random_slots(37, 2, gen), gen, y_dtype)
        check_apply(y, x, module, batch, "packed")


SITUATIONS = {
    "no tokens": [],
    "one token": [2],
    "one token without adapter": [-1],
    "all without adapter": [-1] * 33,
    "none without adapter": [0, 1, 2, 3] * 8,
    "interleaved": [-1, 0, -1, 1, -1, 2, -1, 3] * 5,
    "one adapter": [1] * 40,
    "300 decodes of one adapter": [2] * 300,
    "300 and 100": [2] * 300 + [0] * 100,
    "first and last slot": [0, 3, 0, 3, 3],
    "runs": [0] * 17 + [-1] * 3 + [1] * 64 + [0] * 5 + [3] * 65 + [-1],
    "[0, 0, 1] merge": [0] * 3 + [0] * 5 + [1] * 4,
    "1024 requests": [(7 * t) % 5 - 1 for t in range(1024)],
    "one long segment": [1] * 3000,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(device, situation):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("situation", situation)
        module = make_module([16, 8, 33, 0], 72, [40, 24], dtype, device)
        y, x, batch = random_problem(module, SITUATIONS[situation], gen)
        check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("max_rank", [40, 64, 96, 128])
def test_many_tokens_of_high_ranks(device, max_rank):
    # Tiles of tokens that are neighbours in memory and of others, slots below the pool's rank, and
    # tokens enough for tiles to be cut into parts.
    ranks = [max_rank, max_rank // 2, 3, 0, 16]
    for dtype in dtypes_on(device):
        gen = generator("high ranks", max_rank, dtype)
        module = make_module(ranks, 136, [72, 24, 64], dtype, device, max_rank=max_rank)
        runs = [0] * 200 + [1] * 70 + [-1] * 3 + [2] * 65 + [3] * 5 + [4] * 64
        for slots in (runs, random_slots(330, 5, gen), [0] * 2600 + [1] * 2000):
            for y_dtype in HALVES_AND_FP32 if slots is runs else [dtype]:
                y, x, batch = random_problem(module, slots, gen, y_dtype)
                check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("mix", ["runs", "random", "few"])
def test_tiles_cut_into_many_parts(device, mix):
    # As many parts of K as there are multiprocessors, over tiles of a few hundred tokens: a kernel
    # of its own adds them up, some of each tile, or more than a hundred where one tile is all.
    gen = generator("parts", mix)
    slots = {
        "runs": [0] * 700 + [1] * 150 + [-1] * 20 + [2] * 33 + [3] * 9 + [4] * 8,
        "random": random_slots(850, 5, gen),
        "few": [-1] * 830 + [0] * 20,
    }[mix]
    for dtype in (torch.bfloat16, torch.float16):
        module = make_module([64, 40, 3, 0, 16], 9000, [72, 24, 64], dtype, device, max_rank=64)
        y, x, batch = random_problem(module, slots, gen)
        again = y.clone()
        check_apply(y, x, module, batch, "packed")
        apply_(again, x, module, module.weights("packed"), batch.plan)
        assert_same_bits(again, y)


@pytest.mark.parametrize("slots_in_use", [1, 9, 13, 40])
@pytest.mark.parametrize(("max_rank", "in_features"), [(16, 8200), (48, 4104)])
def test_clusters_halved_where_segments_are_short(device, slots_in_use, max_rank, in_features):
    # Tiles of a few tokens each, more of them than clusters of 16 find places for, or 8: then parts
    # of a cluster serve a tile each, the last of which may be of rank 0, or none at all.
    gen = generator("halved", slots_in_use, max_rank)
    ranks = [
        max_rank if slot % 5 != 3 else [0, 3, max_rank - 1][slot // 5 % 3] for slot in range(40)
    ]
    slots = [slot for slot in range(slots_in_use) for _ in range(480 // slots_in_use)]
    for dtype in (torch.bfloat16, torch.float16):
        module = make_module(ranks, in_features, [72], dtype, device, max_rank=max_rank)
        y, x, batch = random_problem(module, slots, gen)
        again = y.clone()
        check_apply(y, x, module, batch, "packed")
        apply_(again, x, module, module.weights("packed"), batch.plan)
        assert_same_bits(again, y)


def test_many_slots(device):
    gen = generator("many slots")
    ranks = [(7 * slot) % 20 for slot in range(300)]
    module = make_module(ranks, 64, [32], torch.bfloat16, device)
    y, x, batch = random_problem(module, random_slots(700, 300, gen), gen)
    check_apply(y, x, module, batch, "flat")


def test_plan_with_room_to_spare(device):
    # A padded batch: x and y have more rows than the plan has tokens, and the plan more room.
    gen = generator("padding")
    module = make_module([16, 4], 64, [48], torch.bfloat16, device)
    y, x, _ = random_problem(module, [0] * 30, gen)
    x[20:] = NAN
    batch = make_batch([0, 1, 1, -1] * 5, 2, device, max_tokens=500)
    before = y.clone()
    want = expected(y[:20], x[:20], module, module.weights("packed"), batch)
    apply_(y, x, module, module.weights("packed"), batch.plan)
    assert_close(y[:20], want)
    assert_same_bits(y[20:], before[20:])


def test_fewer_rows_than_the_plan_has_tokens(device):
    # A module may see the first tokens only: the plan's other tokens must not be touched.
    gen = generator("pruned")
    module = make_module([16, 4], 64, [48], torch.bfloat16, device)
    slots = [0, 1, 1, -1] * 10
    y, x, _ = random_problem(module, slots, gen)
    full = y.clone()
    plan = make_batch(slots, 2, device).plan
    apply_(full, x, module, module.weights("packed"), plan)
    first = y.clone()
    apply_(first[:13], x[:13], module, module.weights("packed"), plan)
    assert_same_bits(first[:13], full[:13])
    assert_same_bits(first[13:], y[13:])


# ---- layouts, addresses, strides


@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
def test_layouts_and_addresses_do_not_change_a_bit(device, dtype):
    gen = generator("layouts", dtype)
    module = make_module([16, 64, 3, 0], 256, [64, 32], dtype, device)
    y, x, batch = random_problem(module, random_slots(40, 4, gen), gen)
    first = y.clone()
    packed = module.weights("packed")
    apply_(first, x, module, packed, batch.plan)
    for layout in LAYOUTS:
        again = y.clone()
        apply_(again, x, module, module.weights(layout), batch.plan)
        assert_same_bits(again, first)
    for gap in (8, 3):
        strided = strided_rows(y, gap)
        apply_(strided, strided_rows(x, gap), module, packed, batch.plan)
        assert_same_bits(strided, first)
        assert strided._base[:, :gap].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_pointers(device, layout):
    for dtype in dtypes_on(device):
        gen = generator("misaligned")
        module = make_module([16, 33, 3], 128, [64, 40], dtype, device)
        y, x, batch = random_problem(module, random_slots(40, 3, gen), gen)
        x, y = misaligned(x), misaligned(y)
        weights = module.weights(layout, place=misaligned)
        want = expected(y, x, module, weights, batch)
        apply_(y, x, module, weights, batch.plan)
        assert_close(y, want)


def test_unit_dimensions_and_strided_pools(device):
    # Pools as engines have them: [L, 1, R, K] per slice, and views into a larger pool.
    gen = generator("unit")
    module = make_module([16, 5], 64, [32, 24], torch.bfloat16, device)
    y, x, batch = random_problem(module, random_slots(25, 2, gen), gen)
    first = y.clone()
    per_slice = module.weights("per_slice")
    apply_(first, x, module, per_slice, batch.plan)

    def engine_pool(t):
        larger = t.new_full((t.shape[0], 3, t.shape[1] + 2, t.shape[2] + 8), NAN)
        view = larger[:, 1:2, : t.shape[1], 8:]
        view.copy_(t[:, None])
        return view

    ops.lora_apply_(
        y,
        x,
        [engine_pool(a) for a in per_slice.lora_a],
        [engine_pool(b) for b in per_slice.lora_b],
        module.ranks,
        module.scalings,
        batch.plan,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
    )
    assert_same_bits(y, first)


# ---- what must not leak


def test_nan_in_one_adapter_or_token_reaches_no_other_row(device):
    for dtype in dtypes_on(device):
        gen = generator("nan")
        module = make_module([16, 16, 16, 16, 16], 64, [48, 16], dtype, device)
        slots = [0, 1, 2, 3, -1] * 9
        y, x, batch = random_problem(module, slots, gen)
        clean = y.clone()
        apply_(clean, x, module, module.weights("packed"), batch.plan)
        module.a[1][0].fill_(NAN)
        module.b[2][1].fill_(float("inf"))
        for factor in (*module.a[4], *module.b[4]):
            factor.fill_(NAN)
        x[0] = NAN
        x[4::5] = NAN
        dirty = y.clone()
        apply_(dirty, x, module, module.weights("packed"), batch.plan)
        mine = [t for t in range(45) if slots[t] in (0, 3, -1) and t != 0]
        assert_same_bits(dirty[mine], clean[mine])
        assert_same_bits(dirty[2::5, :48], clean[2::5, :48])
        assert dirty[0].isnan().all() and dirty[1::5, :48].isnan().all()


def test_slot_reused_by_a_smaller_adapter(device):
    gen = generator("reuse")
    module = make_module([64, 64], 64, [32, 32], torch.bfloat16, device)
    y, x, batch = random_problem(module, [0, 1] * 10, gen)
    weights = module.weights("packed")
    # The evicted adapter stays behind the new one's rank; nothing is cleared.
    smaller = make_module([8, 64], 64, [32, 32], torch.bfloat16, device, max_rank=64)
    weights.lora_a[0][0, :16] = torch.cat(smaller.a[0])
    weights.lora_b[0][0, :, :8] = torch.cat(smaller.b[0])
    module.ranks[0] = 8
    want = expected(y, x, module, weights, batch)
    apply_(y, x, module, weights, batch.plan)
    assert_close(y, want)


# ---- accuracy


@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
def test_large_intermediate_that_cancels(device, dtype):
    # Pairs of large, nearly opposite terms: an intermediate rounded to a half would leave errors of
    # the size of the result.
    gen = generator("cancel")
    module = make_module([32], 16, [64], dtype, device)
    module.a[0][0][16:] = module.a[0][0][:16]
    module.a[0][0].mul_(32)
    module.b[0][0][:, 16:] = -module.b[0][0][:, :16]
    module.b[0][0][:, 3].mul_(1.0625)
    y, x, batch = random_problem(module, [0] * 30, gen, torch.float32)
    check_apply(y, x, module, batch, "packed")


def test_zero_scaling_and_large_scaling(device):
    gen = generator("scaling")
    module = make_module([8, 8, 8], 64, [32], torch.bfloat16, device)
    module.scalings.copy_(torch.tensor([0.0, 128.0, -2.0]))
    y, x, batch = random_problem(module, [0, 1, 2, -1] * 6, gen)
    before = y.clone()
    check_apply(y, x, module, batch, "packed")
    assert torch.equal(y[0::4], before[0::4])


# ---- the situations in which SGLang tests its torch-native backend


@pytest.mark.parametrize("name", ["qkv", "gate_up", "single"])
@pytest.mark.parametrize("seg_lens", [[1] * 8, [5, 0, 17, 1, 0, 64, 3], [128], [0, 0, 0]])
def test_engine_situations(device, name, seg_lens):
    output_slices = {"qkv": [256, 64, 64], "gate_up": [192, 192], "single": [320]}[name]
    for dtype in HALVES_AND_FP32:
        gen = generator("engine", name, seg_lens)
        ranks = torch.randint(8, 257, (3,), generator=gen).tolist()
        module = make_module(ranks, 256, output_slices, dtype, device)
        module.scalings.copy_(torch.tensor([0.25, 1.0, 4.0]))
        segments = zip(seg_lens, torch.randint(0, 3, (len(seg_lens),), generator=gen), strict=True)
        slots = [int(slot) for length, slot in segments for _ in range(length)]
        y, x, batch = random_problem(module, slots, gen)
        check_apply(y, x, module, batch, "packed")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_problem(device, data):
    ranks = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6), "ranks")
    slots = data.draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=90), "slots")
    output_slices = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=8), "slices")
    in_features = data.draw(st.integers(1, 300), "K")
    dtype = data.draw(st.sampled_from(dtypes_on(device)), "dtype")
    y_dtype = data.draw(st.sampled_from(HALVES_AND_FP32), "dtype of y")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    module = make_module(ranks, in_features, output_slices, dtype, device)
    y, x, batch = random_problem(module, slots, generator("any"), y_dtype)
    if y.numel():
        x = strided_rows(x, data.draw(st.integers(0, 9), "gap of x"))
        y = strided_rows(y, data.draw(st.integers(0, 9), "gap of y"))
    invariant = data.draw(st.booleans(), "batch_invariant")
    check_apply(y, x, module, batch, layout, batch_invariant=invariant)

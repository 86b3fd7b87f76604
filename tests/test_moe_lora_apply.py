"""moe_lora_apply_: gate/up and down of mixture-of-experts layers against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from generators import (
    HALVES_AND_FP32,
    NAN,
    dtypes_on,
    generator,
    misaligned,
    on_devices,
    random_slots,
    strided_rows,
)
from moe_problems import (
    LAYOUTS,
    apply_,
    check_apply,
    int32,
    make_moe,
    random_batch,
    random_ids,
    route,
    tensors,
)
from numerics import assert_same_bits

pytestmark = on_devices


# ---- shapes


RANKS = [0, 1, 3, 4, 8, 12, 16, 33, 64, 96, 100, 128, 256, 512]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_slices", [[96], [64, 64], [33, 1, 7]], ids=["1", "2", "3"])
def test_all_ranks_in_one_batch(device, layout, output_slices):
    for dtype in dtypes_on(device):
        gen = generator("all ranks", output_slices)
        module = make_moe(RANKS, 3, 96, output_slices, dtype, device)
        batch = random_batch(160, 2, module, device, gen)
        check_apply(*tensors(module, batch, False, gen), module, batch, layout)


@pytest.mark.parametrize("rank", [*RANKS, 1000, 1024])
@pytest.mark.parametrize("per_pair", [False, True], ids=["w13", "w2"])
def test_one_rank_for_all(device, rank, per_pair):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("rank", rank)
        module = make_moe([rank] * 2, 2, 128, [40, 24], dtype, device)
        batch = random_batch(30, 2, module, device, gen)
        check_apply(*tensors(module, batch, per_pair, gen), module, batch)


@pytest.mark.parametrize("in_features", [1, 7, 16, 31, 64, 129, 768, 1000, 2048, 4096, 14336])
def test_any_in_features(device, in_features):
    for dtype in dtypes_on(device):
        gen = generator("K", in_features)
        module = make_moe([3, 16, 0, 40], 2, in_features, [24, 8], dtype, device)
        batch = random_batch(15, 2, module, device, gen)
        check_apply(*tensors(module, batch, True, gen), module, batch)


@pytest.mark.parametrize("width", [1, 2, 7, 15, 17, 31, 64, 100, 129, 768, 1000, 4097])
def test_any_width(device, width):
    for dtype in dtypes_on(device):
        gen = generator("N", width)
        module = make_moe([3, 16, 0, 40], 2, 48, [width, width], dtype, device)
        batch = random_batch(15, 2, module, device, gen)
        check_apply(*tensors(module, batch, False, gen), module, batch)


# tokens, top_k, experts: one pair, tiles of every height, many experts
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 8, 128), (8, 8, 128), (33, 2, 8), (64, 1, 1), (300, 4, 16), (40, 8, 1024)],
    ids=str,
)
@pytest.mark.parametrize("per_pair", [False, True], ids=["w13", "w2"])
def test_routings(device, shape, per_pair):
    num_tokens, top_k, num_experts = shape
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gen = generator("routings", shape)
        module = make_moe([8, 16, 0], num_experts, 64, [32, 32], dtype, device)
        batch = random_batch(num_tokens, top_k, module, device, gen)
        check_apply(*tensors(module, batch, per_pair, gen), module, batch)


@pytest.mark.parametrize("ranks", [[16, 16, 16], [64, 16, 64]], ids=str)
def test_groups_of_every_size(device, ranks):
    # One token more or less than each multiple of 8 and 16 that a kernel may take at a time.
    for dtype in (torch.bfloat16, torch.float16):
        gen = generator("groups", ranks)
        sizes = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 257]
        module = make_moe(ranks, len(sizes), 1088, [72, 56], dtype, device)
        ids = torch.tensor([e for e, size in enumerate(sizes) for _ in range(size)])[:, None]
        ids = ids[torch.randperm(len(ids), generator=gen)]
        batch = route(ids, [1] * len(ids), module, device)
        check_apply(*tensors(module, batch, False, gen), module, batch)


# More columns than a block of the expand takes, for tiles of every height, by 16 bytes and not.
@pytest.mark.parametrize("ranks", [[64, 40, 33], [32, 17], [16, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_outputs_of_many_pairs(device, dtype, ranks):
    gen = generator("wide", dtype, ranks)
    sizes = [1, 15, 17, 32, 33, 64, 130, 900]
    module = make_moe(ranks, len(sizes), 64, [520, 136, 5], dtype, device)
    ids = torch.tensor([e for e, size in enumerate(sizes) for _ in range(size)])[:, None]
    batch = route(ids[torch.randperm(len(ids), generator=gen)], [1] * len(ids), module, device)
    y, x = tensors(module, batch, False, gen)
    check_apply(y, x, module, batch)
    narrower = make_moe(ranks, len(sizes), 64, [520, 136], dtype, device)
    y, x = tensors(narrower, batch, False, gen)
    check_apply(y, x, narrower, batch)
    first, again = y.clone(), misaligned(y)
    apply_(first, x, narrower, narrower.weights(), batch)
    apply_(again, x, narrower, narrower.weights(), batch)
    assert_same_bits(again, first)


@pytest.mark.parametrize("y_dtype", HALVES_AND_FP32)
def test_any_dtype_of_y(device, y_dtype):
    for dtype in dtypes_on(device):
        gen = generator("y", y_dtype)
        module = make_moe([16, 5], 4, 64, [96, 8], dtype, device)
        batch = random_batch(37, 2, module, device, gen)
        check_apply(*tensors(module, batch, False, gen, y_dtype), module, batch)


@pytest.mark.parametrize("max_rank", [33, 64, 300])
def test_pool_wider_than_any_rank(device, max_rank):
    gen = generator("wide pool")
    module = make_moe([16, 5, 32], 2, 64, [48, 16], torch.bfloat16, device, max_rank=max_rank)
    batch = random_batch(50, 2, module, device, gen)
    for layout in LAYOUTS:
        check_apply(*tensors(module, batch, False, gen), module, batch, layout)


def test_more_slots_than_a_warp_has_lanes(device):
    gen = generator("slots")
    module = make_moe([24, 0, 17, 9] * 10, 2, 64, [72], torch.bfloat16, device)
    batch = random_batch(1100, 2, module, device, gen)
    check_apply(*tensors(module, batch, False, gen), module, batch)


# ---- which pair has which adapter


SITUATIONS = {
    "no tokens": ([], []),
    "300 decodes of one adapter": ([0] * 300, [[t % 4, 3] for t in range(300)]),
    "300 and 100": ([0] * 300 + [1] * 100, [[t % 3, 3] for t in range(400)]),
    "all without adapter": ([-1] * 50, [[0, 1]] * 50),
    "interleaved": ([-1, 1] * 50, [[0, 1]] * 100),
    "disabled adapter": ([2, 1] * 50, [[0, 1]] * 100),
    "nothing routed": ([0] * 70, [[-1, -1]] * 70),
    "one expert gets all": ([1] * 1000, [[3, -1]] * 1000),
    "the same expert twice": ([0, 1, 2], [[3, 3], [3, 3], [-1, 3]]),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(device, situation):
    slots, ids = SITUATIONS[situation]
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("situation", situation)
        module = make_moe([16, 40, 0], 4, 72, [40, 24], dtype, device)
        batch = route(torch.tensor(ids, dtype=torch.int64).reshape(-1, 2), slots, module, device)
        check_apply(*tensors(module, batch, False, gen), module, batch)


def test_expert_map(device):
    gen = generator("map")
    module = make_moe([16, 8], 4, 64, [32], torch.bfloat16, device)
    local = int32([-1, 2, -1, 0, 1, -1, 3, -1], device)
    ids = random_ids(50, 3, 8, gen, missing=0.1)
    batch = route(ids, random_slots(50, 2, gen), module, device, local)
    check_apply(*tensors(module, batch, True, gen), module, batch)


def test_poison_of_one_adapter_stays_there(device):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gen = generator("poison")
        module = make_moe([16, 8, 16], 4, 64, [32, 16], dtype, device)
        batch = random_batch(60, 2, module, device, gen)
        y, x = tensors(module, batch, True, gen)
        lora_a, lora_b = module.weights()
        clean = y.clone()
        apply_(clean, x, module, (lora_a, lora_b), batch)
        lora_a[0][1], lora_b[0][2, 3] = NAN, float("inf")
        touched = torch.zeros(batch.num_pairs, dtype=torch.bool)
        for (slot, expert), pairs in batch.groups.items():
            touched[pairs] = slot == 1 or (slot, expert) == (2, 3)
        x[touched.nonzero()[0, 0]] = NAN
        poisoned = y.clone()
        apply_(poisoned, x, module, (lora_a, lora_b), batch)
        assert_same_bits(poisoned[~touched], clean[~touched])
        assert not poisoned[touched].isfinite().any()


# ---- layouts of weights and of y


@pytest.mark.parametrize("expanded", [False, True], ids=["size 1", "stride 0"])
@pytest.mark.parametrize("shared", ["a", "b", "both"])
def test_shared_outer(device, shared, expanded):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("shared", shared)
        options = dict(shared_a=shared != "b", shared_b=shared != "a")
        module = make_moe([16, 4, 40], 6, 64, [40, 24], dtype, device, **options)
        batch = random_batch(50, 3, module, device, gen)
        for layout in ("packed", "rank_strided"):
            y, x = tensors(module, batch, False, gen)
            check_apply(y, x, module, batch, layout, expanded)


def check_every_place(y, x, module, batch):
    """Right, and the same bits in every layout and where rows allow no wide accesses."""
    first, again = y.clone(), misaligned(y)
    check_apply(first, x, module, batch)
    apply_(again, misaligned(x), module, module.weights(place=misaligned), batch)
    assert_same_bits(again, first)
    for layout in LAYOUTS:
        again = y.clone()
        apply_(again, x, module, module.weights(layout), batch)
        assert_same_bits(again, first)


# Up to 40 pairs and rank 16 one kernel does both products.
@pytest.mark.parametrize("in_features", [1, 7, 40, 129, 776, 2048, 4096])
@pytest.mark.parametrize("ranks", [[16, 3, 0], [8, 5]], ids=str)
@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
def test_few_pairs_of_low_ranks(device, dtype, ranks, in_features):
    gen = generator("few", dtype, ranks, in_features)
    for num_tokens, num_experts, per_pair in ((1, 8, True), (16, 2, False), (16, 2, True)):
        module = make_moe(ranks, num_experts, in_features, [296, 40], dtype, device)
        batch = random_batch(num_tokens, 2, module, device, gen)
        check_every_place(*tensors(module, batch, per_pair, gen), module, batch)
        check_apply(*tensors(module, batch, per_pair, gen, torch.float32), module, batch)


# With many pairs it is another kernel that takes 16 bytes at a time; with few and a long K, lanes
# without a pair add up parts of it.
@pytest.mark.parametrize("num_tokens, in_features", [(40, 256), (600, 256), (3, 4096)])
@pytest.mark.parametrize("ranks", [[16, 64, 3, 0], [16, 5, 0]], ids=str)
@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
def test_layouts_and_addresses_do_not_change_a_bit(device, dtype, ranks, num_tokens, in_features):
    gen = generator("layouts", dtype, num_tokens)
    module = make_moe(ranks, 4, in_features, [64, 32], dtype, device)
    batch = random_batch(num_tokens, 2, module, device, gen)
    y, x = tensors(module, batch, True, gen)
    first = y.clone()
    apply_(first, x, module, module.weights(), batch)
    for layout in LAYOUTS:
        again = y.clone()
        apply_(again, x, module, module.weights(layout), batch)
        assert_same_bits(again, first)
    for gap in (8, 3):
        strided = strided_rows(y, gap)
        apply_(strided, strided_rows(x, gap), module, module.weights(), batch)
        assert_same_bits(strided.contiguous(), first)
        assert strided._base[:, :gap].isnan().all()
    again = misaligned(y)
    apply_(again, misaligned(x), module, module.weights(place=misaligned), batch)
    assert_same_bits(again, first)


# One adapter of few experts makes so few tiles that CTAs share parts of K, several adapters not.
@pytest.mark.parametrize("num_tokens", [75, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_adapter_of_few_experts(device, dtype, num_tokens):
    gen = generator("few experts", dtype, num_tokens)
    module = make_moe([16, 5, 0, 12, 3, 16, 9, 7], 32, 2056, [40, 24], dtype, device)
    ids = random_ids(num_tokens, 4, 32, gen)
    one_slots = [[slot] * num_tokens for slot in (0, 1)]
    for slots in (*one_slots, torch.randint(8, (num_tokens,), generator=gen).tolist()):
        batch = route(ids, slots, module, device)
        check_every_place(*tensors(module, batch, False, gen), module, batch)


def test_y_with_three_dimensions_and_strided_rows(device):
    gen = generator("3-D")
    module = make_moe([16, 4], 4, 64, [40, 24], torch.bfloat16, device)
    batch = random_batch(30, 3, module, device, gen)
    y, x = tensors(module, batch, False, gen)
    want = y.clone()
    apply_(want, x, module, module.weights(), batch)
    wide = torch.full((30, 3, 80), NAN, dtype=y.dtype, device=device)
    wide[..., :64] = y.view(30, 3, 64)
    apply_(wide, x, module, module.weights(), batch)
    assert_same_bits(wide[..., :64].reshape(90, 64), want)
    assert wide[..., 64:].isnan().all()
    view = wide[..., 8:72]
    view.copy_(y.view(30, 3, 64))
    apply_(view, x, module, module.weights(), batch)
    assert_same_bits(view.reshape(90, 64), want)
    assert wide[..., 72:].isnan().all()


COLUMNS = {
    "swapped": (lambda n: [n, 0], 1),
    "interleaved": (lambda n: [0, 1], 2),
    "interleaved, swapped": (lambda n: [1, 0], 2),
    "with a gap": (lambda n: [3, n + 5], 1),
    "every third": (lambda n: [2, 0], 3),
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("width", [64, 33, 1000])
def test_columns(device, columns, width):
    make_starts, stride = COLUMNS[columns]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gen = generator("columns", columns)
        module = make_moe([16, 4, 40], 4, 64, [width, width], dtype, device)
        batch = random_batch(40, 2, module, device, gen)
        for layout in ("packed", "per_slice"):
            y, x = tensors(module, batch, False, gen, columns=3 * width)
            starts = make_starts(width)
            check_apply(y, x, module, batch, layout, starts=starts, stride=stride)


@pytest.mark.parametrize("weights_dtype", [torch.float32, None], ids=["fp32", "x's"])
def test_topk_weights(device, weights_dtype):
    for dtype in dtypes_on(device):
        gen = generator("topk_weights")
        module = make_moe([16, 4, 40], 8, 64, [72], dtype, device)
        batch = random_batch(40, 4, module, device, gen)
        y, x = tensors(module, batch, True, gen)
        weights = torch.rand(40, 4, generator=gen) * torch.tensor([1.0, 1e-6, 0.0, 2.0])
        weights = weights.to(device, dtype if weights_dtype is None else weights_dtype)
        check_apply(y, x, module, batch, topk_weights=weights)


def test_large_intermediate_that_cancels(device):
    for dtype in (torch.bfloat16, torch.float16):
        gen = generator("cancel")
        module = make_moe([16], 2, 64, [32], dtype, device)
        for expert in range(2):
            a, b = module.a[0][expert][0], module.b[0][expert][0]
            a[8:] = a[:8] * 300
            a[:8] = a[8:]
            b[:, 8:] = -b[:, :8] * (1 + 2**-7)
        batch = random_batch(20, 2, module, device, gen)
        check_apply(*tensors(module, batch, True, gen), module, batch)

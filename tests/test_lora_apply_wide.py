"""lora_apply_ where up to 256 tokens share few adapters of high rank: the kernels of wide tiles."""

from __future__ import annotations

import pytest
import torch

from generators import apply_, generator, make_batch, make_module, on_devices, random_slots
from lora_ext import ops
from numerics import Expected, assert_close, assert_same_bits
from test_lora_apply import check_apply, expected, random_problem
from test_on_device import capture

pytestmark = on_devices

# 256 tokens times these weights, once for each 16, are more than 20 MB.
IN_FEATURES, OUTPUT_SLICES = 1480, [1000, 264, 272]
RANKS = [128, 100, 0, 33, 8, 3]
MIXES = {
    "one": [0] * 256,
    "in turn": [t % 7 - 1 for t in range(256)],
    "runs": [0] * 70 + [-1] * 5 + [1] * 64 + [3] * 17 + [2] * 9 + [4] + [5] * 90,
    "random": random_slots(256, len(RANKS), generator("wide")),
    "no adapter": [-1] * 256,
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_mix(device, mix, dtype):
    gen = generator("wide", mix)
    module = make_module(RANKS, IN_FEATURES, OUTPUT_SLICES, dtype, device)
    for y_dtype in (dtype, torch.float32):
        y, x, batch = random_problem(module, MIXES[mix], gen, y_dtype)
        check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("max_rank", [24, 32, 40, 64, 128])
@pytest.mark.parametrize("layout", ["packed", "per_slice"])
def test_any_rank_of_the_pool(device, max_rank, layout):
    gen = generator("wide", max_rank)
    in_features = 3072 if max_rank <= 32 else 6144  # low ranks: where y is wider
    ranks = [max_rank, 16, min(max_rank, 37)]
    module = make_module(ranks, in_features, [4096, 1024], torch.bfloat16, device)
    y, x, batch = random_problem(module, random_slots(250, 3, gen), gen)
    check_apply(y, x, module, batch, layout)


@pytest.mark.parametrize("num_tokens", [17, 64, 130, 256])
@pytest.mark.parametrize("max_rank", [64, 128])
def test_parts_of_a_long_k(device, num_tokens, max_rank):
    """Few tiles, whose K several clusters share."""
    gen = generator("wide parts", num_tokens, max_rank)
    module = make_module([max_rank], 14000, [1024], torch.bfloat16, device)
    y, x, batch = random_problem(module, [0] * num_tokens, gen)
    check_apply(y, x, module, batch, "packed")


def test_a_plan_that_changes_in_front_of_the_shrink(device):
    """What a thread block looks up before the plan is final it looks up again."""
    gen = generator("wide plan")
    module = make_module(RANKS, IN_FEATURES, OUTPUT_SLICES, torch.bfloat16, device)
    weights = module.weights("packed")
    y, x, _ = random_problem(module, MIXES["random"], gen)
    slots = torch.zeros(256, dtype=torch.int32, device=device)
    plan = make_batch(MIXES["one"], len(RANKS), device).plan
    result = y.clone()

    def step() -> None:
        result.copy_(y)
        ops.plan_batch_(plan, slots, num_slots=len(RANKS))
        apply_(result, x, module, weights, plan)

    run = capture(step).replay if device == "cuda" else step
    for mix in [*MIXES, *reversed(MIXES)]:
        slots.copy_(torch.tensor(MIXES[mix], dtype=torch.int32))
        run()
        want = y.clone()
        apply_(want, x, module, weights, make_batch(MIXES[mix], len(RANKS), device).plan)
        assert_same_bits(result, want)


def test_wide_range_of_intermediates(device):
    # fp16 holds neither the largest of these products nor, beside it, the smallest.
    gen = generator("wide range")
    module = make_module([128, 72], IN_FEATURES, OUTPUT_SLICES, torch.float16, device)
    y, x, batch = random_problem(module, [0, 1] * 128, gen, torch.float32)
    x[::3] *= 256
    x[1::3] /= 256
    module.scalings.copy_(torch.tensor([64.0, 1.0]))
    check_apply(y, x, module, batch, "packed")


def test_deterministic_and_alone_as_in_the_batch_of_a_larger_plan(device):
    gen = generator("wide deterministic")
    module = make_module(RANKS, IN_FEATURES, OUTPUT_SLICES, torch.bfloat16, device)
    weights = module.weights("packed")
    y, x, _ = random_problem(module, MIXES["random"], gen)
    results = []
    for max_tokens in (256, 256, 2000):
        again = y.clone()
        plan = make_batch(MIXES["random"], len(RANKS), device, max_tokens=max_tokens).plan
        apply_(again, x, module, weights, plan)
        results.append(again)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_fewer_rows_than_the_plan_has_tokens(device):
    """Launches are sized by the call: a row has its delta or, its tile being past them, nothing."""
    gen = generator("wide pruned")
    module = make_module(RANKS, IN_FEATURES, OUTPUT_SLICES, torch.bfloat16, device)
    slots = MIXES["in turn"] + MIXES["in turn"]
    y, x, _ = random_problem(module, slots, gen)
    plan = make_batch(slots, len(RANKS), device).plan
    first = make_batch(slots[:250], len(RANKS), device)
    want = expected(y[:250], x[:250], module, module.weights("packed"), first)
    before = y.clone()
    apply_(y[:250], x[:250], module, module.weights("packed"), plan)
    assert_same_bits(y[250:], before[250:])
    written = (y[:250] != before[:250]).any(dim=1)
    assert written.sum() > 100
    assert_close(y[:250][written], Expected(want.value[written], want.error[written]))

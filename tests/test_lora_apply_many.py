"""lora_apply_ where up to 256 tokens use many adapters and y is wide: the streaming expand."""

from __future__ import annotations

import pytest
import torch

from generators import apply_, generator, make_batch, make_module, on_devices, random_slots
from numerics import assert_same_bits
from test_lora_apply import check_apply, random_problem

pytestmark = on_devices

# Tiles of 40 slots by 29 blocks of 256 columns, which neither slices nor tiles fill.
NUM_SLOTS, IN_FEATURES, OUTPUT_SLICES = 40, 264, [5000, 1032, 8, 1024]


def problem_of(ranks, device, gen, dtype=torch.bfloat16, y_dtype=None):
    module = make_module(ranks, IN_FEATURES, OUTPUT_SLICES, dtype, device)
    slots = [*random_slots(70, NUM_SLOTS, gen), *[7] * 37, *[3] * 9]
    return module, *random_problem(module, slots, gen, y_dtype)


@pytest.mark.parametrize("max_rank", [16, 24, 32, 64, 100, 128, 200])
@pytest.mark.parametrize("layout", ["packed", "per_slice"])
def test_any_rank(device, max_rank, layout):
    gen = generator("many", max_rank)
    some = [max_rank, 0, max_rank - 3, max_rank // 2, 5, max_rank]
    module, y, x, batch = problem_of((some * 7)[:NUM_SLOTS], device, gen)
    check_apply(y, x, module, batch, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_rank", [32, 72])
def test_any_dtype(device, dtype, max_rank):
    for y_dtype in (dtype, torch.float32):
        gen = generator("many", dtype, max_rank)
        module, y, x, batch = problem_of([max_rank] * NUM_SLOTS, device, gen, dtype, y_dtype)
        check_apply(y, x, module, batch, "packed")


def test_wide_range_of_intermediates(device):
    # fp16 holds neither the largest of these products nor, beside it, the smallest.
    gen = generator("many range")
    module, y, x, batch = problem_of([64] * NUM_SLOTS, device, gen, torch.float16, torch.float32)
    x[::3] *= 256
    x[1::3] /= 256
    module.scalings[::2] = 64.0
    check_apply(y, x, module, batch, "packed")


@pytest.mark.parametrize("max_rank", [32, 128])
def test_deterministic_and_batch_invariant_where_asked_for(device, max_rank):
    gen = generator("many bits", max_rank)
    module, y, x, batch = problem_of([max_rank] * NUM_SLOTS, device, gen)
    weights = module.weights("packed")

    def rows(tokens, **options):
        plan = make_batch([batch.slots[t] for t in tokens], NUM_SLOTS, device).plan
        result = y[tokens].clone()
        apply_(result, x[tokens], module, weights, plan, **options)
        return result

    everything = list(range(len(batch.slots)))
    assert_same_bits(rows(everything), rows(everything))
    together = rows(everything, batch_invariant=True)
    for token in (0, 40, 75, 115):
        assert_same_bits(rows([token], batch_invariant=True)[0], together[token])

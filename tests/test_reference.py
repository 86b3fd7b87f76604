"""The reference's own forms against each other, and against the definition written out."""

from __future__ import annotations

import pytest
import torch

from generators import (
    LAYOUTS,
    NAN,
    generator,
    make_module,
    on_devices,
    randn,
    random_slots,
)
from lora_ext import reference
from numerics import Expected, accumulator, assert_close, assert_same_bits, half_ulp

pytestmark = on_devices


def make_problem(device, dtype=torch.float32, ranks=(16, 0, 5, 64), output_slices=(24, 8, 9)):
    gen = generator("reference", ranks, output_slices)
    module = make_module(ranks, 40, output_slices, dtype, device)
    slots = sorted(random_slots(60, len(ranks), gen))
    seg_slots = list(range(-1, len(ranks)))
    seg_lens = [slots.count(slot) for slot in seg_slots]
    x = randn((60, 40), dtype, device, gen)
    y = randn((60, sum(output_slices)), dtype, device, gen)
    token_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    return module, x, y, token_slots, (seg_lens, seg_slots)


def oracle(module, x, y, token_slots, layout="packed"):
    weights = module.weights(layout)
    return reference.apply(
        y,
        x,
        weights.lora_a,
        weights.lora_b,
        module.ranks,
        module.scalings,
        token_slots,
        module.output_slices,
        module.max_rank,
        weights.a_offsets,
        weights.b_offsets,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_is_the_definition(device, layout):
    module, x, y, token_slots, _ = make_problem(device)
    got = oracle(module, x, y, token_slots, layout)
    want = y.double().clone()
    for token, slot in enumerate(token_slots.tolist()):
        if slot < 0:
            continue
        column = 0
        for a, b in zip(module.a[slot], module.b[slot], strict=True):
            delta = b.double() @ (a.double() @ x[token].double())
            want[token, column : column + len(b)] += float(module.scalings[slot]) * delta
            column += len(b)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got.data_ptr() != y.data_ptr()


def allowed(want, y, dtype, magnitude=8.0):
    """fp32 sums of some dozens of terms of size 1, and the rounding of y."""
    error = 60 * torch.finfo(accumulator(dtype)).eps * (want.abs() + magnitude)
    return Expected(want, error + half_ulp(want.abs() + error, y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_segmented_form(device, dtype):
    module, x, y, token_slots, segments = make_problem(device, dtype)
    weights = module.weights("packed")
    ranks, scalings = module.ranks.tolist(), module.scalings.tolist()
    xa = reference.segmented_shrink(x, weights.lora_a[0], *segments, ranks, scalings, 3)
    result = reference.segmented_expand(
        y, xa, weights.lora_b[0], *segments, ranks, module.output_slices
    )
    assert_close(result, allowed(oracle(module, x, y, token_slots), y, dtype))
    idle = (token_slots < 0) | (module.ranks[token_slots.clamp(min=0).long()] == 0)
    assert_same_bits(result[idle], y[idle])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_form(device, dtype):
    module, x, y, token_slots, _ = make_problem(device, dtype)
    order = torch.randperm(60, generator=generator("order")).to(device)
    x, y, token_slots = x[order], y[order], token_slots[order]
    weights = module.weights("packed")
    xa = reference.masked_shrink(
        x, weights.lora_a[0], token_slots, module.ranks, module.scalings, 3
    )
    result = reference.masked_expand(
        y, xa, weights.lora_b[0], token_slots, module.ranks, module.output_slices
    )
    assert_close(result, allowed(oracle(module, x, y, token_slots), y, dtype))
    idle = (token_slots < 0) | (module.ranks[token_slots.clamp(min=0).long()] == 0)
    assert_same_bits(result[idle], y[idle])


def test_forms_agree_on_the_intermediate(device):
    module, x, _, token_slots, segments = make_problem(device)
    a = module.weights("packed").lora_a[0]
    rest = (module.ranks, module.scalings)
    exact = reference.shrink(x, [a], *rest, token_slots, 3, module.max_rank)
    by_segment = reference.segmented_shrink(x, a, *segments, *(t.tolist() for t in rest), 3)
    masked = reference.masked_shrink(x, a, token_slots, *rest, 3)
    for xa in (by_segment, masked):
        torch.testing.assert_close(xa.double(), exact, rtol=1e-4, atol=1e-4)
    idle = token_slots < 0
    assert (by_segment[idle] == 0).all() and (masked[idle] == 0).all()


def test_unused_slot_full_of_nan_is_harmless(device):
    module, x, y, token_slots, segments = make_problem(device)
    token_slots = torch.where(token_slots == 3, -1, token_slots)
    segments = (segments[0], [-1 if slot == 3 else slot for slot in segments[1]])
    for factor in (*module.a[3], *module.b[3]):
        factor.fill_(NAN)
    weights = module.weights("packed")
    a, b, ranks = weights.lora_a[0], weights.lora_b[0], module.ranks
    masked = reference.masked_expand(
        y,
        reference.masked_shrink(x, a, token_slots, ranks, module.scalings, 3),
        b,
        token_slots,
        ranks,
        module.output_slices,
    )
    lists = (ranks.tolist(), module.scalings.tolist())
    by_segment = reference.segmented_expand(
        y,
        reference.segmented_shrink(x, a, *segments, *lists, 3),
        b,
        *segments,
        lists[0],
        module.output_slices,
    )
    want = oracle(module, x, y, token_slots)
    assert_close(masked, allowed(want, y, torch.float32))
    assert_close(by_segment, allowed(want, y, torch.float32))


def test_masked_form_compiles_into_one_graph(device):
    module, x, y, token_slots, _ = make_problem(device, output_slices=(16, 8))
    weights = module.weights("packed")
    a, b = weights.lora_a[0], weights.lora_b[0]

    def layer(x, y, token_slots, ranks, scalings):
        xa = reference.masked_shrink(x, a, token_slots, ranks, scalings, 2)
        return reference.masked_expand(y, xa, b, token_slots, ranks, [16, 8])

    # Fullgraph fails on a host read of device data, which is what this form is free of.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    result = compiled(x, y, token_slots, module.ranks, module.scalings)
    assert_close(result, allowed(oracle(module, x, y, token_slots), y, torch.float32))


def test_plan_of_a_known_batch(device):
    plan = reference.plan([2, 2, -1, 0, 2, 9], 3, 64)
    assert plan.token_slots == [2, 2, -1, 0, 2, -1]
    assert plan.permutation == [3, 0, 1, 4]
    assert plan.slot_indptr == [0, 1, 1, 4]
    assert plan.enabled == [1, 0, 1]
    assert plan.seg_indptr == [0, 2, 3, 4, 5, 6]
    assert plan.seg_slots == [2, -1, 0, 2, -1]
    assert plan.tiles == plan.wide_tiles == [(0, 0, 1), (2, 1, 3)]
    fields = plan.fields()
    assert fields["header"][:6].tolist() == [6, 5, 2, 4, 2, 2]
    assert fields["tiles"].shape == (64 // 16 + 3, 4)
    assert fields["seg_indptr"].tolist() == [0, 2, 3, 4, 5, *[6] * 60]


def test_plan_tiles_split_long_runs(device):
    plan = reference.plan([0, 1], 2, 128, seg_lens=[20, 70])
    assert plan.tiles == [(0, 0, 16), (0, 16, 4)] + [
        (1, s, min(16, 90 - s)) for s in range(20, 90, 16)
    ]
    assert plan.wide_tiles == [(0, 0, 20), (1, 20, 64), (1, 84, 6)]


def test_embedding_is_a_lookup(device):
    gen = generator("lookup")
    table = randn((2, 4, 10), torch.float32, device, gen)
    extra = randn((2, 3, 4), torch.float32, device, gen)
    ranks = torch.tensor([4, 2], dtype=torch.int32, device=device)
    scalings = torch.tensor([1.0, 0.5], device=device)
    slots = torch.tensor([0, 1, 1, -1, 0, 0], dtype=torch.int32, device=device)
    ids = torch.tensor([105, 100, 111, 101, 99, 113], device=device)
    xa = reference.embedding(ids, table, ranks, scalings, slots, 100, extra)
    assert torch.equal(xa[0], table[0, :, 5].double())
    assert torch.equal(xa[1, :2], 0.5 * table[1, :2, 0].double())
    assert torch.equal(xa[2, :2], 0.5 * extra[1, 1, :2].double())
    assert (xa[1:3, 2:] == 0).all() and (xa[3:] == 0).all()

"""What only a GPU has: graphs that follow every change of the batch, and no synchronisation."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from generators import (
    NAN,
    apply_,
    expand_,
    generator,
    make_batch,
    make_module,
    randn,
    random_slots,
    shrink,
)
from lora_ext import ops
from numerics import assert_same_bits
from test_plan_batch import check_plan, fill, int32, new_plan

pytestmark = pytest.mark.gpu

NUM_SLOTS = 8
# Every kind of change: to base only and back, fewer and more adapters, other ranks, padding.
MIXES = {
    "one adapter": [0] * 100,
    "base only": [-1] * 100,
    "all adapters": [t % NUM_SLOTS for t in range(100)],
    "none": [],
    "two adapters, padded": [3] * 40 + [5] * 20,
    "one token": [7],
    "base only again": [-1] * 100,
    "random": random_slots(100, NUM_SLOTS, generator("mix")),
}


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(call):
    """A graph of `call`, warmed up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_plan_follows_its_inputs():
    plan = new_plan(300, NUM_SLOTS, "cuda")
    slots = torch.zeros(64, dtype=torch.int32, device="cuda")
    seg_lens = torch.zeros(64, dtype=torch.int32, device="cuda")
    graph = capture(lambda: ops.plan_batch_(plan, slots, seg_lens, num_slots=NUM_SLOTS))
    gen = generator("graph")
    mixes = [([-1], [300]), ([0], [1]), ([], []), ([7] * 64, [4] * 64), ([3, 3, -1], [0, 0, 9])]
    mixes += [(random_slots(40, NUM_SLOTS, gen), [n % 8 for n in range(40)]) for _ in range(3)]
    for new_slots, new_lens in mixes:
        pad = 64 - len(new_slots)
        slots.copy_(int32([*new_slots, *[-1] * pad], "cuda"))
        seg_lens.copy_(int32([*new_lens, *[0] * pad], "cuda"))
        graph.replay()
        check_plan(plan, NUM_SLOTS, new_slots, seg_lens=new_lens)


def test_plan_clamps_what_it_cannot_refuse():
    slots, seg_lens = [0, 4, -9, 3, 2], [10, 5, 5, 30, 100]
    plan = new_plan(64, 4, "cuda")
    fill(plan, slots, 4, seg_lens=seg_lens)
    check_plan(plan, 4, slots, seg_lens=seg_lens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_one_graph_serves_every_mix(dtype, layout):
    gen = generator("graph", dtype)
    ranks = [16, 64, 0, 3, 128, 8, 1, 33]
    module = make_module(ranks, 256, [96, 32], dtype, "cuda")
    weights = module.weights(layout)
    x = randn((100, 256), dtype, "cuda", gen)
    before = randn((100, 128), dtype, "cuda", gen)
    y, batch = before.clone(), make_batch([0] * 100, NUM_SLOTS, "cuda")
    graph = capture(lambda: apply_(y, x, module, weights, batch.plan))
    for slots in [*MIXES.values(), *reversed(MIXES.values())]:
        fill(batch.plan, slots, NUM_SLOTS)
        y.copy_(before)
        graph.replay()
        eager = before.clone()
        apply_(eager, x, module, weights, make_batch(slots, NUM_SLOTS, "cuda", 100).plan)
        assert_same_bits(y, eager)
        idle = [t for t in range(100) if t >= len(slots) or slots[t] < 0 or ranks[slots[t]] == 0]
        assert_same_bits(y[idle], before[idle])


def test_graph_follows_other_ranks_and_weights_in_place():
    gen = generator("swap")
    module = make_module([16, 64], 128, [64], torch.bfloat16, "cuda", max_rank=64)
    weights = module.weights("packed")
    x = randn((20, 128), torch.bfloat16, "cuda", gen)
    before = randn((20, 64), torch.bfloat16, "cuda", gen)
    y, batch = before.clone(), make_batch([0, 1] * 10, 2, "cuda")
    graph = capture(lambda: apply_(y, x, module, weights, batch.plan))
    for seed, ranks in enumerate([[64, 16], [1, 0], [0, 0], [33, 64]]):
        other = make_module(ranks, 128, [64], torch.bfloat16, "cuda", max_rank=64, seed=seed)
        replacement = other.weights("packed")
        weights.lora_a[0].copy_(replacement.lora_a[0])
        weights.lora_b[0].copy_(replacement.lora_b[0])
        module.ranks.copy_(other.ranks)
        module.scalings.copy_(other.scalings)
        y.copy_(before)
        graph.replay()
        eager = before.clone()
        apply_(eager, x, other, replacement, batch.plan)
        assert_same_bits(y, eager)


def test_graph_of_shrink_expand_and_embedding():
    gen = generator("parts")
    module = make_module([16, 8, 3, 0, 1, 2, 4, 5], 64, [40], torch.bfloat16, "cuda")
    weights = module.weights("packed")
    x = randn((100, 64), torch.bfloat16, "cuda", gen)
    before = randn((100, 40), torch.bfloat16, "cuda", gen)
    table = randn((NUM_SLOTS, 16, 50), torch.bfloat16, "cuda", gen)
    ids = torch.randint(0, 60, (100,), generator=gen).cuda()
    y, batch = before.clone(), make_batch([0] * 100, NUM_SLOTS, "cuda")
    results = {}

    def step(y, plan):
        results["xa"] = shrink(x, module, weights, plan)
        expand_(y, results["xa"], module, weights, plan)
        rest = (table, module.ranks, module.scalings, plan)
        results["embedding"] = ops.lora_embedding(ids, *rest)
        ops.lora_embedding_apply_(y, ids, table, weights.lora_b[0], *rest[1:])

    graph = capture(lambda: step(y, batch.plan))
    captured = dict(results)
    for slots in MIXES.values():
        fill(batch.plan, slots, NUM_SLOTS)
        y.copy_(before)
        graph.replay()
        eager = before.clone()
        step(eager, make_batch(slots, NUM_SLOTS, "cuda", 100).plan)
        assert_same_bits(y, eager)
        for name, value in results.items():
            assert_same_bits(captured[name], value)


def test_graph_of_moe_info():
    ranks = int32([4, 0, 8], "cuda")
    indptr, slots = int32([0] * 5, "cuda"), int32([-1] * 4, "cuda")
    token_slots, enabled = int32([5] * 70, "cuda"), int32([5] * 3, "cuda")
    graph = capture(lambda: ops.moe_lora_info_(token_slots, enabled, indptr, slots, ranks))
    for new_indptr, new_slots in (
        ([0, 3, 3, 50, 60], [2, 0, 1, 0]),
        ([0, 70, 70, 70, 70], [-1, 0, 0, 0]),
        ([0, 1, 2, 3, 4], [0, 0, 2, -1]),
    ):
        indptr.copy_(int32(new_indptr, "cuda"))
        slots.copy_(int32(new_slots, "cuda"))
        graph.replay()
        want = ops.moe_lora_info(indptr.cpu(), slots.cpu(), ranks.cpu(), num_tokens=70)
        assert_same_bits(token_slots.cpu(), want[0])
        assert_same_bits(enabled.cpu(), want[1])


def test_nothing_synchronises():
    gen = generator("sync")
    module = make_module([16, 8], 64, [40, 24], torch.bfloat16, "cuda")
    x = randn((50, 64), torch.bfloat16, "cuda", gen)
    y = randn((50, 64), torch.bfloat16, "cuda", gen)
    packed, flat = module.weights("packed"), module.weights("flat")
    plan = new_plan(50, 2, "cuda")
    slots = int32([0, 1] * 25, "cuda")
    lens, indptr = int32([1] * 50, "cuda"), int32(range(51), "cuda")
    table = randn((2, 16, 50), torch.bfloat16, "cuda", gen)
    ids = torch.arange(50, device="cuda")
    common = (table, module.ranks, module.scalings, plan)
    with no_synchronisation():
        ops.plan_batch_(plan, slots, num_slots=2)
        ops.plan_batch_(plan, slots, lens, num_slots=2)
        ops.plan_batch_(plan, slots, None, indptr, num_slots=2)
        for weights in (packed, flat):
            expand_(y, shrink(x, module, weights, plan), module, weights, plan)
            apply_(y, x, module, weights, plan)
            apply_(y, x, module, weights, plan, batch_invariant=True)
        ops.lora_embedding(ids, *common)
        ops.lora_embedding_apply_(y, ids, table, packed.lora_b[0], *common[1:])
        ops.moe_lora_info(indptr, slots, module.ranks, num_tokens=50)


def test_current_stream_is_used():
    # The op runs behind a slow producer on a side stream: on any other stream it would read NaN.
    gen = generator("stream")
    module = make_module([16], 4096, [4096], torch.bfloat16, "cuda")
    weights, batch = module.weights("packed"), make_batch([0] * 64, 1, "cuda")
    values = randn((64, 4096), torch.bfloat16, "cuda", gen)
    want = torch.zeros(64, 4096, dtype=torch.bfloat16, device="cuda")
    apply_(want, values, module, weights, batch.plan)
    x, y = torch.full_like(values, NAN), torch.zeros_like(want)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(values)
        apply_(y, x, module, weights, batch.plan)
    stream.synchronize()
    assert_same_bits(y, want)


def test_grid_past_65535():
    gen = generator("grid")
    module = make_module([4, 2], 16, [8], torch.bfloat16, "cuda")
    num_tokens = 16 * 70_000
    slots = [t % 2 for t in range(num_tokens)]
    batch = make_batch(slots, 2, "cuda")
    x = randn((num_tokens, 16), torch.bfloat16, "cuda", gen)
    y = torch.zeros(num_tokens, 8, dtype=torch.bfloat16, device="cuda")
    weights = module.weights("packed")
    apply_(y, x, module, weights, batch.plan)
    few = torch.zeros(64, 8, dtype=torch.bfloat16, device="cuda")
    apply_(few, x[-64:], module, weights, make_batch(slots[-64:], 2, "cuda").plan)
    torch.testing.assert_close(y[-64:], few, rtol=2**-7, atol=1e-5)


def test_replay_twice_gives_the_same_bits():
    gen = generator("repeat")
    module = make_module([64, 16, 128], 2048, [512], torch.bfloat16, "cuda")
    weights, batch = module.weights("packed"), make_batch([0, 1, 2, -1] * 20, 3, "cuda")
    x = randn((80, 2048), torch.bfloat16, "cuda", gen)
    before = randn((80, 512), torch.bfloat16, "cuda", gen)
    y = before.clone()
    graph = capture(lambda: apply_(y, x, module, weights, batch.plan))
    y.copy_(before)
    graph.replay()
    first = y.clone()
    for _ in range(100):
        y.copy_(before)
        graph.replay()
        assert_same_bits(y, first)

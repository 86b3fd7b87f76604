"""MoE operators on a GPU: graphs that follow every routing, and no synchronisation."""

from __future__ import annotations

import pytest
import torch

import lora_ext
from generators import HALVES_AND_FP32, NAN, generator, randn, random_slots
from lora_ext import ops
from moe_problems import (
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
from test_moe_lora_align import check_routing
from test_on_device import capture, no_synchronisation

pytestmark = pytest.mark.gpu

NUM_SLOTS, NUM_EXPERTS = 8, 16


def mixes(num_tokens, top_k):
    """(slots, ids) of every kind of change: base only and back, other adapters and experts."""
    gen = generator("mixes", num_tokens)
    some = random_ids(num_tokens, top_k, NUM_EXPERTS, gen)
    missing = random_ids(num_tokens, top_k, NUM_EXPERTS, gen, missing=0.3)
    one = torch.full_like(some, 5)
    return {
        "one adapter": ([0] * num_tokens, some),
        "base only": ([-1] * num_tokens, some),
        "random": (random_slots(num_tokens, NUM_SLOTS, gen), missing),
        "one expert": ([3] * num_tokens, one),
        "padded": ([5] * (num_tokens // 3) + [-1] * (num_tokens - num_tokens // 3), some),
        "nothing routed": ([1] * num_tokens, torch.full_like(some, -1)),
        "random again": (random_slots(num_tokens, NUM_SLOTS, gen), some),
    }


@pytest.mark.parametrize("num_tokens", [1, 20, 100, 700, 3000])
def test_routing_follows_its_inputs(num_tokens):
    ids = torch.zeros(num_tokens, 2, dtype=torch.int64, device="cuda")
    slots = int32([0] * num_tokens, "cuda")
    size = lora_ext.moe_routing_size(num_tokens, 2, NUM_SLOTS, NUM_EXPERTS)
    routing = torch.full((size,), -7777, dtype=torch.int32, device="cuda")
    sizes = dict(num_slots=NUM_SLOTS, num_experts=NUM_EXPERTS)
    graph = capture(lambda: ops.moe_lora_align_(routing, ids, slots, **sizes))
    for new_slots, new_ids in mixes(num_tokens, 2).values():
        slots.copy_(int32(new_slots, "cuda"))
        ids.copy_(new_ids)
        graph.replay()
        check_routing(routing, ids, slots, NUM_SLOTS, NUM_EXPERTS)


@pytest.mark.parametrize("dtype", HALVES_AND_FP32)
@pytest.mark.parametrize("num_tokens", [4, 90])
def test_one_graph_serves_every_routing(dtype, num_tokens):
    gen = generator("graph", dtype)
    ranks = [16, 64, 0, 3, 128, 8, 1, 33]
    module13 = make_moe(ranks, NUM_EXPERTS, 256, [96, 96], dtype, "cuda")
    module2 = make_moe(ranks, NUM_EXPERTS, 96, [256], dtype, "cuda")
    x = randn((num_tokens, 256), dtype, "cuda", gen)
    act = randn((2 * num_tokens, 96), dtype, "cuda", gen)
    before = [randn((2 * num_tokens, n), dtype, "cuda", gen) for n in (192, 256)]
    y = [t.clone() for t in before]
    topk_weights = torch.rand(num_tokens, 2, generator=gen).cuda()
    weights13, weights2 = module13.weights(), module2.weights()
    ids = torch.zeros(num_tokens, 2, dtype=torch.int32, device="cuda")
    batch = route(ids, [0] * num_tokens, module13, "cuda")

    def layer(y):
        ops.moe_lora_align_(
            batch.routing,
            batch.topk_ids,
            batch.token_slots,
            num_slots=NUM_SLOTS,
            num_experts=NUM_EXPERTS,
        )
        apply_(y[0], x, module13, weights13, batch, [1, 0], 2)
        apply_(y[1], act, module2, weights2, batch, topk_weights=topk_weights)

    graph = capture(lambda: layer(y))
    for new_slots, new_ids in mixes(num_tokens, 2).values():
        batch.token_slots.copy_(int32(new_slots, "cuda"))
        batch.topk_ids.copy_(new_ids)
        for one, old in zip(y, before, strict=True):
            one.copy_(old)
        graph.replay()
        eager = [t.clone() for t in before]
        layer(eager)
        fresh = route(new_ids, new_slots, module13, "cuda")
        touched = torch.zeros(2 * num_tokens, dtype=torch.bool)
        for (slot, _), pairs in fresh.groups.items():
            touched[pairs] = ranks[slot] > 0
        for i in range(2):
            assert_same_bits(y[i], eager[i])
            assert_same_bits(y[i][~touched], before[i][~touched])
            assert touched.sum() == 0 or not torch.equal(y[i][touched], before[i][touched])
        check_apply(before[1].clone(), act, module2, fresh, topk_weights=topk_weights)


def test_graph_follows_other_ranks_and_weights_in_place():
    gen = generator("swap")
    module = make_moe([16, 64], 4, 128, [64], torch.bfloat16, "cuda")
    weights = module.weights()
    batch = random_batch(20, 2, module, "cuda", gen)
    before, x = tensors(module, batch, True, gen)
    y = before.clone()
    graph = capture(lambda: apply_(y, x, module, weights, batch))
    for seed, ranks in enumerate([[64, 16], [1, 0], [0, 0], [33, 64]]):
        other = make_moe(ranks, 4, 128, [64], torch.bfloat16, "cuda", max_rank=64, seed=seed)
        for mine, theirs in zip(weights, other.weights(), strict=True):
            mine[0].copy_(theirs[0])
        module.ranks.copy_(other.ranks)
        module.scalings.copy_(other.scalings)
        y.copy_(before)
        graph.replay()
        eager = before.clone()
        apply_(eager, x, other, other.weights(), batch)
        assert_same_bits(y, eager)


def test_nothing_synchronises():
    gen = generator("sync")
    module = make_moe([16, 8], 4, 64, [40, 40], torch.bfloat16, "cuda")
    weights = module.weights()
    for num_tokens in (50, 3000):
        batch = random_batch(num_tokens, 2, module, "cuda", gen)
        y, x = tensors(module, batch, False, gen)
        topk_weights = torch.rand(num_tokens, 2, generator=gen).cuda()
        local = torch.arange(4, dtype=torch.int32, device="cuda")
        call = (batch.topk_ids, batch.token_slots)
        with no_synchronisation():
            ops.moe_lora_align(*call, num_slots=2, num_experts=4, expert_map=local)
            ops.moe_lora_align_(batch.routing, *call, num_slots=2, num_experts=4)
            apply_(y, x, module, weights, batch)
            apply_(y, x, module, weights, batch, [0, 1], 2, topk_weights)


def test_replay_gives_the_same_bits():
    gen = generator("repeat")
    module = make_moe([64, 16, 128], NUM_EXPERTS, 2048, [768, 768], torch.bfloat16, "cuda")
    weights = module.weights()
    for num_tokens in (16, 600):
        batch = random_batch(num_tokens, 4, module, "cuda", gen)
        before, x = tensors(module, batch, False, gen)
        y = before.clone()
        graph = capture(lambda y=y, x=x, batch=batch: apply_(y, x, module, weights, batch))
        first = None
        for _ in range(100):
            y.copy_(before)
            graph.replay()
            first = y.clone() if first is None else first
            assert_same_bits(y, first)


# Qwen3-30B-A3B and Mixtral: hidden, intermediate, experts, top_k.
MODELS = {"qwen3-30b": (2048, 768, 128, 8), "mixtral": (4096, 14336, 8, 2)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_tokens", [1, 33, 300])
@pytest.mark.parametrize("ranks", [[16, 16], [64, 8]], ids=str)
def test_shapes_of_models(model, num_tokens, ranks):
    hidden, inner, experts, top_k = MODELS[model]
    gen = generator("models", model, num_tokens)
    for dtype in (torch.bfloat16, torch.float16):
        module = make_moe(ranks, experts, hidden, [inner, inner], dtype, "cuda")
        batch = random_batch(num_tokens, top_k, module, "cuda", gen, missing=0)
        check_apply(*tensors(module, batch, False, gen), module, batch)
        module = make_moe(ranks, experts, inner, [hidden], dtype, "cuda")
        batch = random_batch(num_tokens, top_k, module, "cuda", gen, missing=0)
        check_apply(*tensors(module, batch, True, gen), module, batch)


def test_current_stream_is_used():
    # The ops run behind a slow producer on a side stream: on any other they would read NaN.
    gen = generator("stream")
    module = make_moe([16, 8], 4, 512, [512], torch.bfloat16, "cuda")
    weights = module.weights()
    batch = random_batch(64, 2, module, "cuda", gen, missing=0)
    y, values = tensors(module, batch, True, gen)
    want = y.clone()
    apply_(want, values, module, weights, batch)
    x, routing = torch.full_like(values, NAN), torch.zeros_like(batch.routing)
    late = type(batch)(batch.topk_ids, batch.token_slots, batch.groups, routing)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(values)
        ops.moe_lora_align_(routing, batch.topk_ids, batch.token_slots, num_slots=2, num_experts=4)
        apply_(y, x, module, weights, late)
    stream.synchronize()
    assert_same_bits(y, want)


def test_more_tiles_than_a_grid_has_rows():
    gen = generator("grid")
    module = make_moe([4, 2], 64, 16, [8], torch.bfloat16, "cuda")
    num_tokens = 64 * 70_000 // 8
    ids = torch.randint(0, 64, (num_tokens, 8), generator=gen).cuda()
    slots = torch.randint(0, 2, (num_tokens,), generator=gen, dtype=torch.int32).cuda()
    x = randn((num_tokens, 16), torch.bfloat16, "cuda", gen)
    y = torch.zeros(num_tokens * 8, 8, dtype=torch.bfloat16, device="cuda")
    common = dict(num_slots=2, num_experts=64)
    rest = dict(top_k=8, output_slices=[8], max_rank=4)
    weights = module.weights()
    routing = ops.moe_lora_align(ids, slots, **common)
    ops.moe_lora_apply_(y, x, *weights, module.ranks, module.scalings, routing, **rest)
    few = torch.zeros(64, 8, dtype=torch.bfloat16, device="cuda")
    routing = ops.moe_lora_align(ids[-8:], slots[-8:], **common)
    ops.moe_lora_apply_(few, x[-8:], *weights, module.ranks, module.scalings, routing, **rest)
    torch.testing.assert_close(y[-64:], few, rtol=2**-7, atol=1e-5)

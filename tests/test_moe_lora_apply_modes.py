"""moe_lora_apply_: the same bits again, torch.compile, errors, and a whole MoE block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from generators import generator, on_devices, randn, random_slots
from lora_ext import ops, reference
from moe_problems import (
    Routed,
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


# ---- the same bits


def test_the_same_bits_again_and_for_any_number_of_threads(device):
    gen = generator("again")
    module = make_moe([64, 16, 33], 8, 2048, [96, 96], torch.bfloat16, device)
    batch = random_batch(200, 4, module, device, gen)
    y, x = tensors(module, batch, False, gen)
    first = y.clone()
    apply_(first, x, module, module.weights(), batch)
    threads = torch.get_num_threads()
    for repeat in range(20):
        torch.set_num_threads(1 + repeat % 2)
        again = y.clone()
        apply_(again, x, module, module.weights(), batch)
        assert_same_bits(again, first)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_tokens", [3, 12, 40])
def test_a_routing_that_was_another_one_just_before(device, num_tokens):
    # The kernels of a small batch look at the routing before the one that writes it has ended.
    gen = generator("another routing", num_tokens)
    module = make_moe([16, 5, 0, 12], 8, 1536, [64, 64], torch.bfloat16, device)
    batches = [random_batch(num_tokens, 2, module, device, gen) for _ in range(8)]
    calls = [tensors(module, batch, False, gen) for batch in batches]
    weights = module.weights()
    wants = [y.clone() for y, _ in calls]
    for want, (_, x), batch in zip(wants, calls, batches, strict=True):
        apply_(want, x, module, weights, batch)
    routing = torch.full_like(batches[0].routing, -1)
    sizes = dict(num_slots=module.num_slots, num_experts=module.num_experts)
    for _ in range(5):
        gots = [y.clone() for y, _ in calls]
        for got, (_, x), batch in zip(gots, calls, batches, strict=True):
            ops.moe_lora_align_(routing, batch.topk_ids, batch.token_slots, **sizes)
            apply_(got, x, module, weights, replace(batch, routing=routing))
        for got, want in zip(gots, wants, strict=True):
            assert_same_bits(got, want)


def test_offsets_beyond_2_to_the_31(device):
    # Strides that only 64-bit offsets survive. What lies between is never touched: on the CPU it
    # takes no memory, on a GPU 4 GB.
    gen = generator("offsets")
    module = make_moe([4], 2, 16, [8], torch.bfloat16, device)
    ids = torch.tensor([[0], [1], [0]])
    batch = route(ids, [0, 0, 0], module, device)
    y, x = tensors(module, batch, False, gen)
    lora_a, lora_b = module.weights()
    want = y.clone()
    apply_(want, x, module, (lora_a, lora_b), batch)
    far = 2**31 + 64

    def spread(tensor, dim):
        sizes, strides = tensor.shape, list(tensor.stride())
        strides[dim] = far
        buffer = torch.empty(
            far * (sizes[dim] - 1) + tensor.numel(), dtype=tensor.dtype, device=device
        )
        view = buffer.as_strided(sizes, strides)
        view.copy_(tensor)
        return view

    got = spread(y[:2], 0)
    two = route(ids[:2], [0, 0], module, device)
    apply_(got, x[:2], module, (lora_a, lora_b), two)
    assert_same_bits(got.contiguous(), want[:2])
    del got
    for weights in (([spread(lora_a[0], 1)], lora_b), (lora_a, [spread(lora_b[0], 1)])):
        got = y.clone()
        apply_(got, x, module, weights, batch)
        assert_same_bits(got, want)


# ---- torch


def test_opcheck(device):
    gen = generator("opcheck")
    module = make_moe([4, 2], 3, 16, [8, 8], torch.float32, device)
    batch = random_batch(5, 2, module, device, gen)
    y, x = tensors(module, batch, False, gen)
    call = (y, x, *module.weights(), module.ranks, module.scalings, batch.routing, 2, [8, 8], 4)
    op = torch.ops.lora_ext.moe_lora_apply_.default
    torch.library.opcheck(op, call)
    weights = torch.rand(5, 2, device=device)
    torch.library.opcheck(op, (*call, [0, 1], 2, weights))


def test_compiled_gives_the_same_bits(device):
    gen = generator("compiled")
    module = make_moe([16, 8], 4, 64, [48, 48], torch.float32, device)
    weights = module.weights()
    base = torch.nn.Linear(64, 96, bias=False, device=device)

    def layer(x, ids, slots, topk_weights):
        routing = ops.moe_lora_align(ids, slots, num_slots=2, num_experts=4)
        y = base(x).repeat_interleave(ids.shape[1], 0)
        ops.moe_lora_apply_(
            y,
            x,
            *weights,
            module.ranks,
            module.scalings,
            routing,
            top_k=ids.shape[1],
            output_slices=[48, 48],
            max_rank=16,
            topk_weights=topk_weights,
        )
        return y * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for num_tokens in (6, 40, 111):
            ids = random_ids(num_tokens, 2, 4, gen, missing=0.1).to(device)
            slots = int32(random_slots(num_tokens, 2, gen), device)
            x = randn((num_tokens, 64), torch.float32, device, gen)
            call = (x, ids, slots, torch.rand(num_tokens, 2, generator=gen).to(device))
            with torch._dynamo.config.patch(error_on_recompile=num_tokens != 6):
                assert_same_bits(compiled(*call), layer(*call))


def test_refuses_what_autograd_would_record(device):
    gen = generator("grad")
    module = make_moe([4], 2, 16, [8], torch.float32, device)
    batch = random_batch(5, 2, module, device, gen)
    y, x = tensors(module, batch, False, gen)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="inference"):
        apply_(y, x, module, module.weights(), batch)
    with torch.no_grad():
        apply_(y, x, module, module.weights(), batch)


def bad_calls(device):
    """What is wrong: (changes to a good call's arguments, what the message must say)."""

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    return {
        "x rows": (dict(x=zeros(4, 16)), ["x", "4", "3", "6"]),
        "x dtype": (dict(x=zeros(3, 16, dtype=torch.bfloat16)), ["lora_a", "dtype"]),
        "x columns": (dict(x=zeros(3, 8)), ["lora_a", "8"]),
        "y dim": (dict(y=zeros(48)), ["y", "[48]"]),
        "y top_k": (dict(y=zeros(2, 3, 16)), ["y", "top_k"]),
        "y columns": (dict(y=zeros(6, 15)), ["slice 1", "15"]),
        "y rows": (dict(y=zeros(7, 16), x=zeros(7, 16)), ["y", "7", "top_k"]),
        "y strides": (dict(y=zeros(3, 4, 16)[:, :2]), ["y", "stride"]),
        "A dim": (dict(lora_a=[zeros(2, 8, 16)]), ["lora_a", "[2, 8, 16]"]),
        "A slots": (dict(lora_a=[zeros(3, 3, 8, 16)]), ["lora_a", "3 slots", "2"]),
        "A rows": (dict(lora_a=[zeros(2, 3, 7, 16)]), ["lora_a", "8"]),
        "A count": (dict(lora_a=[zeros(2, 3, 4, 16)] * 3), ["lora_a", "3"]),
        "B experts": (dict(lora_b=[zeros(2, 4, 16, 4)]), ["lora_b", "4", "3"]),
        "B rows": (dict(lora_b=[zeros(2, 3, 17, 4)]), ["lora_b", "17", "16"]),
        "B rank": (dict(lora_b=[zeros(2, 3, 16, 3)]), ["lora_b", "4"]),
        "B strided": (dict(lora_b=[zeros(2, 3, 4, 16).mT]), ["lora_b", "contiguous"]),
        "ranks": (dict(ranks=zeros(2)), ["ranks", "int32"]),
        "scalings": (dict(scalings=zeros(3)), ["scalings", "3", "2"]),
        "routing": (dict(routing=zeros(3, dtype=torch.int32)), ["routing", "3"]),
        "top_k": (dict(top_k=0), ["top_k", "0"]),
        "max_rank": (dict(max_rank=0), ["max_rank", "0"]),
        "slices": (dict(output_slices=[]), ["output_slices"]),
        "starts": (dict(column_starts=[0]), ["column_starts", "1", "2"]),
        "start": (dict(column_starts=[0, -1]), ["column_starts", "-1"]),
        "stride": (dict(column_stride=0), ["column_stride", "0"]),
        "stride too wide": (dict(column_stride=3), ["slice", "16 columns"]),
        "weights size": (dict(topk_weights=zeros(3, 3)), ["topk_weights", "6"]),
        "weights dtype": (dict(topk_weights=zeros(3, 2).half()), ["topk_weights", "float32"]),
    }


@pytest.mark.parametrize("case", bad_calls("cpu"))
def test_errors_name_the_argument_and_leave_y_alone(device, case):
    module = make_moe([4, 2], 3, 16, [8, 8], torch.float32, device)
    batch = route(torch.tensor([[0, 1], [1, 2], [2, 0]]), [0, 1, 1], module, device)
    lora_a, lora_b = module.weights()
    good = dict(
        y=torch.full((6, 16), 7.0, device=device),
        x=torch.ones(3, 16, device=device),
        lora_a=lora_a,
        lora_b=lora_b,
        ranks=module.ranks,
        scalings=module.scalings,
        routing=batch.routing,
        top_k=2,
        output_slices=[8, 8],
        max_rank=4,
    )
    changes, words = bad_calls(device)[case]
    call = {**good, **changes}
    before = call["y"].clone()
    with pytest.raises(RuntimeError) as error:
        ops.moe_lora_apply_(**call)
    for word in words:
        assert word in str(error.value)
    assert_same_bits(call["y"], before)


@pytest.mark.parametrize("slots, experts", [(1, 3), (2, 2)])
def test_routing_for_other_weights(device, slots, experts):
    # On the CPU an error; on a GPU what the weights do not have is left out.
    gen = generator("other")
    wide = make_moe([4, 2], 3, 16, [8], torch.float32, device)
    narrow = make_moe([4, 2][:slots], experts, 16, [8], torch.float32, device)
    batch = route(torch.tensor([[0, 1], [1, 2], [2, 0]]), [0, 1, 1], wide, device)
    y, x = tensors(narrow, batch, False, gen)
    before = y.clone()
    if device == "cpu":
        with pytest.raises(RuntimeError, match="routing was made for more"):
            apply_(y, x, narrow, narrow.weights(), batch)
        assert_same_bits(y, before)
    else:
        held = {k: v for k, v in batch.groups.items() if k[0] < slots and k[1] < experts}
        check_apply(y, x, narrow, Routed(batch.topk_ids, batch.token_slots, held, batch.routing))


# ---- the whole block


def moe_block(x, router, w13, w2, adapters13, adapters2, apply, top_k=2):
    """A gated MoE block in x's dtype; `apply` adds the deltas to gate/up and to down."""
    weights, ids = (x @ router).softmax(-1).topk(top_k)
    hidden = torch.einsum("tk,tpnk->tpn", x, w13[ids])
    apply(hidden, x, adapters13, ids, None)
    gate, up = hidden.chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    down = torch.einsum("tpi,tpni->tpn", act, w2[ids]) * weights[..., None].to(x.dtype)
    apply(down, act.flatten(0, 1), adapters2, ids, weights)
    return down.sum(1)


def test_whole_block_against_fp64(device):
    gen = generator("block")
    num_tokens, experts, hidden, inner, ranks = 48, 4, 64, 40, [16, 0, 5]
    dtype = torch.float32
    module13 = make_moe(ranks, experts, hidden, [inner, inner], dtype, device)
    module2 = make_moe(ranks, experts, inner, [hidden], dtype, device)
    x = randn((num_tokens, hidden), dtype, device, gen)
    router = randn((hidden, experts), dtype, device, gen)
    w13 = randn((experts, 2 * inner, hidden), dtype, device, gen, hidden**-0.5)
    w2 = randn((experts, hidden, inner), dtype, device, gen, inner**-0.5)
    slots = random_slots(num_tokens, 3, gen)

    def with_ops(y, x, module, ids, topk_weights):
        batch = route(ids, slots, module, device)
        apply_(y, x, module, module.weights(), batch, topk_weights=topk_weights)

    def with_oracle(y, x, module, ids, topk_weights):
        groups = reference.moe_groups(ids, int32(slots, device), 3, experts)
        flat = y.reshape(-1, y.shape[-1])
        rest = (module.ranks, module.scalings, groups, module.output_slices)
        y.copy_(
            reference.moe_apply(
                flat, x, *module.weights(), *rest, topk_weights=topk_weights
            ).view_as(y)
        )

    modules, tensors64 = (module13, module2), [t.double() for t in (x, router, w13, w2)]
    got = moe_block(x, router, w13, w2, *modules, with_ops)
    want = moe_block(*tensors64, *modules, with_oracle)
    base = moe_block(*tensors64, *modules, lambda *_: None)
    assert (want - base).norm() > 0.1 * base.norm()
    assert (got.double() - want).abs().max() < 1e-4

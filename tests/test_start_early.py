"""In a CUDA graph an operator begins while the kernel in front of it is still at work, also where
that lets nothing start before its end; what it writes is read behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moe_problems
from generators import (
    NAN,
    Weights,
    apply_,
    expand_,
    generator,
    make_batch,
    make_module,
    randn,
    random_slots,
    shrink,
)
from linear_site import Site
from lora_ext import ops
from numerics import assert_same_bits
from test_linear_beside import edges_from_a_launch
from test_on_device import capture
from test_plan_batch import new_plan

pytestmark = pytest.mark.gpu

# What an operator reads and updates, and the call, which returns what it computed.
Problem = tuple[list[Tensor], Callable[..., list[Tensor]]]


class Late:
    """Copies of tensors that one kernel writes: a scan, by a thread block that takes a millisecond
    before it comes to them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        words, places = 1 << 20, []
        for tensor in tensors:
            places.append(words)
            words += -(-tensor.nbytes // 256) * 64
        final = torch.zeros(2, words, dtype=torch.int32, device="cuda")
        self.buffer = torch.empty_like(final)
        for view, tensor in zip(self._views(final, places, tensors), tensors, strict=True):
            view.copy_(tensor)
        self.steps = torch.diff(final, prepend=torch.zeros_like(final[:, :1]))
        self.tensors = self._views(self.buffer, places, tensors)

    @staticmethod
    def _views(buffer: Tensor, places: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
        bytes_ = buffer[1].view(torch.uint8)
        return [
            bytes_[4 * place : 4 * place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(places, tensors, strict=True)
        ]

    def write(self) -> None:
        torch.cumsum(self.steps, 1, dtype=torch.int32, out=self.buffer)


def dense(num_tokens: int, rank: int, kind: str) -> Problem:
    module = make_module([rank, 0, rank - 3], 1032, [264, 72], torch.bfloat16, "cuda")
    weights, gen = module.weights("packed"), generator("late", num_tokens, rank)
    x = randn((num_tokens, 1032), torch.bfloat16, "cuda", gen)
    y = randn((num_tokens, 336), torch.bfloat16, "cuda", gen)
    plan = make_batch(random_slots(num_tokens, 3, gen), 3, "cuda").plan
    xa = shrink(x, module, weights, plan)

    def call(x: Tensor, y: Tensor, xa: Tensor, *rest: Tensor) -> list[Tensor]:
        a, b, ranks, scalings, plan = rest
        late = replace(module, ranks=ranks, scalings=scalings)
        if kind == "shrink":
            return [shrink(x, late, Weights([a], [b]), plan)]
        if kind == "expand":
            expand_(y, xa, late, Weights([a], [b]), plan)
        else:
            apply_(y, x, late, Weights([a], [b]), plan)
        return [y]

    rest = [weights.lora_a[0], weights.lora_b[0], module.ranks, module.scalings, plan]
    return [x, y, xa, *rest], call


def linear(num_tokens: int, rank: int, kind: str) -> Problem:
    site = Site(torch.bfloat16, "cuda", in_features=1024, ranks=[rank, 0, rank - 3])
    plan = make_batch(
        random_slots(num_tokens, 3, generator("late", num_tokens, rank)), 3, "cuda"
    ).plan
    module, weights, bias, x = site.module, site.weights, site.bias, site.x(num_tokens)
    assert bias is not None

    def call(x: Tensor, y: Tensor, *rest: Tensor) -> list[Tensor]:
        weight, bias, a, b, ranks, scalings, plan = rest
        late = Site.__new__(Site)
        late.module = replace(module, ranks=ranks, scalings=scalings)
        late.weights, late.weight, late.bias = Weights([a], [b]), weight, bias
        return [late(x, plan) if kind == "product" else late.forked(x, plan, lambda _: y)]

    rest = [weights.lora_a[0], weights.lora_b[0], module.ranks, module.scalings, plan]
    return [x, site.base(x), site.weight, bias, *rest], call


def embedding(num_tokens: int, rank: int, kind: str) -> Problem:
    gen = generator("late", num_tokens, rank)
    a = randn((3, rank, 50), torch.bfloat16, "cuda", gen)
    b = randn((3, 200, rank), torch.bfloat16, "cuda", gen)
    y = randn((num_tokens, 200), torch.bfloat16, "cuda", gen)
    ids = torch.randint(0, 50, (num_tokens,), generator=gen).to("cuda")
    plan = make_batch(random_slots(num_tokens, 3, gen), 3, "cuda").plan
    ranks = torch.tensor([rank, rank - 3, 0], dtype=torch.int32, device="cuda")

    def call(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> list[Tensor]:
        if kind == "gather":
            return [ops.lora_embedding(ids, a, *rest)]
        ops.lora_embedding_apply_(y, ids, a, b, *rest)
        return [y]

    return [y, ids, a, b, ranks, ranks.float(), plan], call


def moe(num_tokens: int, rank: int, kind: str) -> Problem:
    gen = generator("late", num_tokens, rank)
    module = moe_problems.make_moe([rank, 0, rank - 3], 8, 320, [176], torch.bfloat16, "cuda")
    batch = moe_problems.random_batch(num_tokens, 2, module, "cuda", gen)
    rows = num_tokens if kind == "w13" else 2 * num_tokens
    x = randn((rows, 320), torch.bfloat16, "cuda", gen)
    y = randn((2 * num_tokens, 176), torch.bfloat16, "cuda", gen)
    (a,), (b,) = module.weights()

    def call(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> list[Tensor]:
        ranks, scalings, routing = rest
        late = replace(module, ranks=ranks, scalings=scalings)
        moe_problems.apply_(y, x, late, ([a], [b]), replace(batch, routing=routing))
        return [y]

    return [y, x, a, b, module.ranks, module.scalings, batch.routing], call


def plan(num_tokens: int, _: int, kind: str) -> Problem:
    gen = generator("late", num_tokens)
    slots = make_batch(random_slots(num_tokens, 8, gen), 8, "cuda").token_slots
    ids = moe_problems.random_ids(num_tokens, 2, 8, gen).to("cuda")

    def call(slots: Tensor, ids: Tensor, plan: Tensor) -> list[Tensor]:
        if kind == "align":
            return [ops.moe_lora_align(ids, slots, num_slots=8, num_experts=8)]
        ops.plan_batch_(plan, slots, num_slots=8)
        return [plan]

    return [slots, ids, new_plan(num_tokens, 8, "cuda")], call


CASES = [
    *((dense, tokens, rank, "apply") for tokens in (1, 40, 200, 300, 700) for rank in (16, 64)),
    *((dense, tokens, 32, kind) for tokens in (20, 300) for kind in ("shrink", "expand")),
    *((linear, tokens, 16, kind) for tokens in (1, 16, 24, 40) for kind in ("product", "nothing")),
    *((embedding, tokens, 64, kind) for tokens in (1, 30, 300) for kind in ("gather", "apply")),
    *(
        (moe, tokens, rank, kind)
        for tokens in (1, 30, 600)
        for rank in (16, 64)
        for kind in ("w13", "w2")
    ),
    *((plan, tokens, 0, kind) for tokens in (40, 700) for kind in ("plan", "align")),
]


@pytest.mark.parametrize(
    ("make", "num_tokens", "rank", "kind"),
    CASES,
    ids=[f"{make.__name__}-{tokens}-{rank}-{kind}" for make, tokens, rank, kind in CASES],
)
def test_it_reads_what_the_kernel_in_front_has_written(
    make: Callable[[int, int, str], Problem], num_tokens: int, rank: int, kind: str
) -> None:
    tensors, call = make(num_tokens, rank, kind)
    late, results = Late(tensors), []

    def step() -> None:
        late.write()
        results[:] = call(*late.tensors)

    graph = capture(step)
    want = [result.clone() for result in call(*(tensor.clone() for tensor in tensors))]
    for garbage in (0, -1, 0x01010101):
        late.buffer.fill_(garbage)
        for result in results:
            result.fill_(NAN if result.is_floating_point() else garbage)
        graph.replay()
        for result, expected in zip(results, want, strict=True):
            assert_same_bits(result, expected)
    if kind != "shrink":  # in front of which torch fills its result with zeros, as no kernel
        assert edges_from_a_launch(step) >= 1

"""Small problems that reach every CUDA kernel once, for a tool that watches each access:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/every_kernel.py

Without torch's cache every tensor is an allocation of its own, so a read behind its end is found.
What the kernels compute is the tests' business; here it must only be finite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import moe_problems
from generators import apply, apply_, expand_, generator, make_batch, make_module, randn, shrink
from linear_site import Site
from lora_ext import ops

DEVICE = "cuda"
LAYOUTS = ("packed", "per_slice", "flat")


def spread(num_tokens: int, num_slots: int) -> list[int]:
    """Segments of any length, and tokens without an adapter."""
    return sorted((t * 7 % (num_slots + 1)) - 1 for t in range(num_tokens))


def dense(num_tokens: int, ranks: Sequence[int], in_features: int, widths: Sequence[int]) -> None:
    """Both halves alone and together, in every layout; a chain of two, which overlap."""
    for dtype in (torch.bfloat16, torch.float32):
        module = make_module(ranks, in_features, widths, dtype, DEVICE)
        plan = make_batch(spread(num_tokens, len(ranks)), len(ranks), DEVICE).plan
        x = randn((num_tokens, in_features), dtype, DEVICE, generator("x"))
        y = torch.zeros(num_tokens, sum(widths), dtype=dtype, device=DEVICE)
        for layout in LAYOUTS:
            weights = module.weights(layout)
            apply_(y, x, module, weights, plan)
            apply_(y, x, module, weights, plan)
            expand_(y, shrink(x, module, weights, plan), module, weights, plan)
        finite(y)


def gradients(num_tokens: int, ranks: Sequence[int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        module = make_module(ranks, 136, [96, 40], dtype, DEVICE)
        plan = make_batch(spread(num_tokens, len(ranks)), len(ranks), DEVICE).plan
        x = randn((num_tokens, 136), dtype, DEVICE, generator("x")).requires_grad_()
        y = apply(
            torch.zeros(num_tokens, 136, dtype=dtype, device=DEVICE),
            x,
            module,
            module.weights("packed"),
            plan,
        )
        y.sum().backward()
        assert x.grad is not None
        finite(x.grad)


def linear(num_tokens: int, ranks: Sequence[int], in_features: int) -> None:
    site = Site(torch.bfloat16, DEVICE, in_features=in_features, ranks=ranks)
    plan = make_batch(spread(num_tokens, len(ranks)), len(ranks), DEVICE).plan
    x = site.x(num_tokens)
    for overlap in (False, True):
        finite(site(x, plan, overlap=overlap))
        finite(site.forked(x, plan, overlap=overlap))


def embedding(num_tokens: int, rank: int) -> None:
    ranks = torch.tensor([rank, rank - 3, 0], dtype=torch.int32, device=DEVICE)
    batch = make_batch(spread(num_tokens, 3), 3, DEVICE)
    gen = generator("embedding")
    b = randn((3, 200, rank), torch.bfloat16, DEVICE, gen)
    table = randn((3, 50, rank), torch.bfloat16, DEVICE, gen)
    ids = torch.randint(0, 50, (num_tokens,), generator=gen).to(DEVICE)
    y = torch.zeros(num_tokens, 200, dtype=torch.bfloat16, device=DEVICE)
    for a in (table.mT, table.mT.contiguous()):
        rest = (ranks, ranks.float(), batch.plan)
        ops.lora_embedding_apply_(y, ids, a, b, *rest)
        finite(y, ops.lora_embedding(ids, a, *rest))


def moe(num_tokens: int, rank: int, num_experts: int, hidden: int = 320, slots: int = 3) -> None:
    """Gate and up with x per token, then down with x per pair; tokens of the first `slots`."""
    gen = generator("moe")
    for in_features, widths, per_token in ((hidden, [176, 176], True), (176, [hidden], False)):
        module = moe_problems.make_moe(
            [rank, 0, max(rank // 2, 1)], num_experts, in_features, widths, torch.bfloat16, DEVICE
        )
        ids = moe_problems.random_ids(num_tokens, 2, num_experts, gen)
        of_tokens = torch.randint(slots, (num_tokens,), generator=gen).tolist()
        batch = moe_problems.route(ids, of_tokens, module, DEVICE)
        rows = num_tokens if per_token else 2 * num_tokens
        x = randn((rows, in_features), torch.bfloat16, DEVICE, gen)
        y = torch.zeros(2 * num_tokens, sum(widths), dtype=torch.bfloat16, device=DEVICE)
        moe_problems.apply_(y, x, module, module.weights(), batch)
        finite(y)


def finite(*tensors: torch.Tensor) -> None:
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in tensors)


def main() -> int:
    for num_tokens in (1, 9, 40, 200, 300, 700, 2100):
        for rank in (16, 32, 64, 128):
            dense(num_tokens, [rank, rank - 3, 0], 1032, [264, 72])
    dense(30, [300, 8], 72, [40])
    dense(200, [64], 4096, [512])  # wide tiles, and parts of K
    for rank in (16, 32, 64):  # the streaming expands
        dense(40, [rank] * 40, 520, [8000])
    dense(520, [64, 16], 4096, [512])
    for num_tokens in (5, 300):
        gradients(num_tokens, [16, 0, 40])
    for num_tokens in (1, 16, 24, 40):
        linear(num_tokens, [16, 0, 32], 1024)
    for num_tokens in (1, 30, 100, 300):
        for rank in (16, 64):
            embedding(num_tokens, rank)
            moe(num_tokens, rank, 4)
    moe(1500, 32, 8)
    moe(1500, 64, 8)
    moe(5000, 16, 8)
    for rank in (16, 32, 64):  # clusters that share parts of K, of few pairs and of many
        moe(200, rank, 64, 2048, slots=1)
        moe(1000, rank, 64, 2048, slots=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

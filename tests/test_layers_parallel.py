"""The linear layers of which each rank of a group holds a part: together they compute the whole.

Each test runs on every rank, which knows the whole layer too and compares with it in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distributed import Workers, watched, world
from generators import NAN
from layer_problems import (
    DTYPES,
    MAX_RANK,
    NUM_SLOTS,
    RANKS,
    SLOTS,
    Problem,
    make_batch,
    sum_of,
)
from lora_ext.layers import (
    LoRAColumnParallelLinear,
    LoRALMHead,
    LoRAModule,
    LoRAQKVParallelLinear,
    LoRAReplicatedLinear,
    LoRARowParallelLinear,
)
from numerics import Expected, assert_close, assert_same_bits

# ---- column-parallel, stacked, q k v


def check_column_parallel(
    device: str, dtype: torch.dtype, sizes: list[int], make: Callable[[Problem], LoRAModule]
) -> None:
    """This rank's columns are those of the whole layer; nothing is exchanged."""
    problem = Problem.random(40, sizes, dtype, device)
    layer = make(problem)
    problem.load(layer)
    expected = problem.expected()
    with layer.routing.using(make_batch(device)), torch.no_grad(), watched() as seen:
        y = layer(problem.x)
    assert not seen
    columns, start = [], 0
    for shard in layer.outputs:
        columns += range(start + shard.start, start + shard.start + shard.size)
        start += shard.full
    assert_close(y, Expected(expected.value[:, columns], expected.error[:, columns]))
    untouched = [t for t, slot in enumerate(SLOTS) if slot < 0 or RANKS[slot] == 0]
    assert_same_bits(y[untouched], layer.base(problem.x)[untouched].detach())


def check_stacked(
    device: str, dtype: torch.dtype, sizes: list[int], num_shards: list[int] | None
) -> None:
    def make(problem: Problem) -> LoRAModule:
        return LoRAColumnParallelLinear.from_full(
            problem.linear,
            NUM_SLOTS,
            MAX_RANK,
            group=world(),
            output_sizes=sizes,
            num_shards=num_shards,
        )

    check_column_parallel(device, dtype, sizes, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "num_shards"),
    [([48], None), ([30, 30], None), ([32, 8, 20], None), ([24, 9], [2, 1]), ([17], [1])],
    ids=str,
)
def test_column_parallel(
    workers: Workers, dtype: torch.dtype, sizes: list[int], num_shards: list[int] | None
) -> None:
    workers.run(check_stacked, dtype, sizes, num_shards)


def check_qkv(device: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    def make(problem: Problem) -> LoRAModule:
        layer = LoRAQKVParallelLinear.from_full(
            problem.linear,
            NUM_SLOTS,
            MAX_RANK,
            head_size=6,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            group=world(),
        )
        rank, size = dist.get_rank(), dist.get_world_size()
        q, k, v = layer.outputs
        # The kv heads that this rank's q heads attend to, and no others.
        heads_here = range(q.start // 6, (q.start + q.size) // 6)
        wanted = {head * num_kv_heads // num_heads for head in heads_here}
        assert len(heads_here) == num_heads // size and heads_here[0] == rank * len(heads_here)
        assert set(range(k.start // 6, (k.start + k.size) // 6)) == wanted and k == v
        return layer

    sizes = [6 * num_heads, 6 * num_kv_heads, 6 * num_kv_heads]
    check_column_parallel(device, dtype, sizes, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_qkv_with_more_and_fewer_kv_heads_than_ranks(
    workers: Workers, dtype: torch.dtype, num_kv_heads: int
) -> None:
    workers.run(check_qkv, dtype, 4, num_kv_heads)


# ---- row-parallel


def check_row_parallel(device: str, dtype: torch.dtype, bias: bool) -> None:
    problem = Problem.random(48, [40], dtype, device, bias)
    layer = LoRARowParallelLinear.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=world())
    problem.load(layer)
    columns = [slice(i * 24, (i + 1) * 24) for i in range(dist.get_world_size())]
    x = problem.x[:, columns[dist.get_rank()]].contiguous()
    expected = sum_of([problem.expected(c) for c in columns], dtype)
    with layer.routing.using(make_batch(device)), torch.no_grad():
        with watched() as seen:
            y = layer(x)
        # One reduction, of rows that are all written, those of padding too.
        ((kind, buffer),) = seen
        assert kind == "all_reduce" and buffer.shape == y.shape and buffer.isfinite().all()
        assert_close(y, expected)

        # What padding holds reaches no other row.
        x[len(SLOTS) :] = NAN
        padded = layer(x)
        assert_close(
            padded[: len(SLOTS)],
            Expected(expected.value[: len(SLOTS)], expected.error[: len(SLOTS)]),
        )
        assert padded[len(SLOTS) :].isnan().all()
    # Every rank has the same bits.
    whole = y.clone()
    dist.broadcast(whole, 0)
    assert_same_bits(y, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel_reduces_once_over_defined_memory(
    workers: Workers, dtype: torch.dtype, bias: bool
) -> None:
    workers.run(check_row_parallel, dtype, bias)


def check_given_shards(device: str) -> None:
    """A base module that is the shard already: the same as one that is cut out of the whole."""
    problem = Problem.random(48, [40], torch.float32, device)
    rank, size = dist.get_rank(), dist.get_world_size()
    kinds = (LoRAColumnParallelLinear, LoRARowParallelLinear)
    for kind in kinds:
        cut = kind.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=world())
        dim = kinds.index(kind)
        n, k = [(40 // size, 48), (40, 48 // size)][dim]
        base = nn.Linear(k, n, bias=dim == 0 or rank == 0, device=device)
        with torch.no_grad():
            base.weight.copy_(problem.linear.weight.chunk(size, dim)[rank])
            if base.bias is not None:
                base.bias.copy_(
                    problem.linear.bias.chunk(size)[rank] if dim == 0 else problem.linear.bias
                )
        given = kind(base, NUM_SLOTS, MAX_RANK, group=world())
        assert (given.inputs, given.outputs) == (cut.inputs, cut.outputs)
        outputs = []
        for layer in (cut, given):
            problem.load(layer)
            x = problem.x[:, layer.inputs.start : layer.inputs.start + layer.inputs.size]
            with layer.routing.using(make_batch(device)), torch.no_grad():
                outputs.append(layer(x))
        assert_same_bits(*outputs)


def test_base_modules_that_are_shards_already(workers: Workers) -> None:
    workers.run(check_given_shards)


def check_replicated(device: str) -> None:
    """A layer that no rank cuts: the same as one process alone computes, bit for bit."""
    problem = Problem.random(40, [24], torch.float32, device)
    layer = LoRAReplicatedLinear.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=world())
    problem.load(layer)
    with layer.routing.using(make_batch(device)), torch.no_grad(), watched() as seen:
        y = layer(problem.x)
    assert not seen and layer.base is problem.linear
    assert_close(y, problem.expected())
    same = y.clone()
    dist.broadcast(same, 0)
    assert_same_bits(y, same)


def test_replicated(workers: Workers) -> None:
    workers.run(check_replicated)


# ---- what does not divide


def check_refusals(device: str) -> None:
    def linear(n: int, k: int, bias: bool = False) -> nn.Linear:
        return nn.Linear(k, n, bias=bias, device=device)

    column, qkv, row = LoRAColumnParallelLinear, LoRAQKVParallelLinear, LoRARowParallelLinear
    heads = {"head_size": 4, "num_heads": 4, "num_kv_heads": 2}
    cases: list[tuple[str, Callable[..., LoRAModule], nn.Module, dict[str, Any]]] = [
        (r"output_sizes\[0\] is 7, .* into 2 pieces", column.from_full, linear(7, 8), {}),
        (
            r"output_sizes\[1\] is 3, .* into 2 pieces",
            column.from_full,
            linear(7, 8),
            {"output_sizes": [4, 3]},
        ),
        (
            r"output_sizes \[4, 4\] sum to 8, the layer has 7",
            column.from_full,
            linear(7, 8),
            {"output_sizes": [4, 4]},
        ),
        (
            r"base has 8 output features, expected 4: the shard of output_sizes \[4, 4\] on one "
            "of 2",
            column,
            linear(8, 8),
            {"output_sizes": [4, 4]},
        ),
        (
            r"num_shards is \[3\], expected a divisor of the 2 ranks for each of 1 slices",
            column.from_full,
            linear(6, 8),
            {"num_shards": [3]},
        ),
        (
            "3 attention heads do not divide among 2",
            qkv.from_full,
            linear(28, 8),
            {**heads, "num_heads": 3},
        ),
        (
            "3 kv heads do not divide among 2",
            qkv.from_full,
            linear(48, 8),
            {**heads, "num_heads": 6, "num_kv_heads": 3},
        ),
        ("base has 32 output features, expected 16", qkv, linear(32, 8), heads),
        ("in_features is 7, .* into 2 pieces", row.from_full, linear(8, 7), {}),
        (
            "2 times 3 rows have no room for 7",
            LoRALMHead,
            linear(3, 8),
            {"vocab_size": 7},
        ),
        ("cuts nn.Linear, got Sequential", row.from_full, nn.Sequential(), {}),
    ]
    if dist.get_rank() == 1:
        cases.append(("base has a bias on rank 1: expected on rank 0", row, linear(8, 8, True), {}))
    for message, make, base, layout in cases:
        with pytest.raises(ValueError, match=message):
            make(base, NUM_SLOTS, MAX_RANK, group=world(), **layout)


def test_what_does_not_divide_is_refused_with_its_sizes(workers: Workers) -> None:
    workers.run(check_refusals)


def check_no_gradient(device: str) -> None:
    layer = LoRARowParallelLinear.from_full(
        nn.Linear(8, 8, device=device), NUM_SLOTS, MAX_RANK, group=world()
    )
    with pytest.raises(RuntimeError, match="no gradient goes through their exchange"):
        layer(torch.zeros(2, 4, device=device, requires_grad=True))


def test_gradients_are_refused(workers: Workers) -> None:
    workers.run(check_no_gradient)

"""The layers of which each rank of a group holds a part: what they compute together is the whole.

Each test runs on every rank, which knows the whole layer too and compares with it in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import Workers
from generators import NAN, Module, generator, make_module, randn
from lora_ext import LoRABatch
from lora_ext.layers import (
    LoRAColumnParallelLinear,
    LoRAModule,
    LoRAQKVParallelLinear,
    LoRARowParallelLinear,
)
from numerics import (
    Expected,
    assert_close,
    assert_same_bits,
    expected_expand,
    expected_shrink,
    half_ulp,
    sum_error,
)

RANKS = [3, 0, 16, 8]
NUM_SLOTS = len(RANKS)
MAX_RANK = 16
DTYPES = [torch.float32, torch.bfloat16]
SLOTS = [0, 2, -1, 2, 3, 1, 0, -1, 3, 2, 2]  # of the batch's tokens; padding behind it
NUM_PADDING = 5


@dataclass(frozen=True)
class Problem:
    """A whole linear layer with its adapters, and a batch: the same on every rank."""

    linear: nn.Linear
    module: Module
    x: Tensor

    @classmethod
    def random(
        cls,
        in_features: int,
        output_slices: list[int],
        dtype: torch.dtype,
        device: str,
        bias: bool = True,
    ) -> Problem:
        gen = generator("parallel", in_features, output_slices)
        linear = nn.Linear(in_features, sum(output_slices), bias=bias, device=device, dtype=dtype)
        with torch.no_grad():
            for parameter in linear.parameters():
                values = torch.randn(parameter.shape, generator=gen) * in_features**-0.5
                parameter.copy_(values)
        x = randn((len(SLOTS) + NUM_PADDING, in_features), dtype, device, gen)
        module = make_module(RANKS, in_features, output_slices, dtype, device, max_rank=MAX_RANK)
        return cls(linear, module, x)

    def load(self, layer: LoRAModule) -> None:
        """Write all adapters, given whole, into slots that were NaN."""
        layer.lora_a.fill_(NAN)
        layer.lora_b.fill_(NAN)
        for slot, rank in enumerate(RANKS):
            if rank:
                layer.write_slot(
                    slot, torch.cat(self.module.a[slot]), torch.cat(self.module.b[slot])
                )
            layer.set_slot(slot, rank, float(self.module.scalings[slot]))

    def expected(self, columns: slice | None = None, dtype: torch.dtype | None = None) -> Expected:
        """The layer's output from these columns of x (all, if None), rounded once to ``dtype``."""
        columns = slice(None) if columns is None else columns
        x, weight = self.x[:, columns], self.linear.weight[:, columns].detach()
        dtype = x.dtype if dtype is None else dtype
        base = x.double() @ weight.double().T
        magnitude = x.double().abs() @ weight.double().abs().T
        if self.linear.bias is not None and not columns.start:
            base += self.linear.bias.detach().double()
        base_error = sum_error(x.shape[1], magnitude, x.dtype)
        base_error += half_ulp(base.abs() + base_error, dtype)
        slots = torch.tensor(SLOTS + [-1] * NUM_PADDING, device=x.device)
        packed = self.module.weights("packed")
        lora_a = [packed.lora_a[0][..., columns]]
        rest = (self.module.ranks, self.module.scalings, slots)
        num_slices = len(self.module.output_slices)
        xa = expected_shrink(x, lora_a, *rest, num_slices, MAX_RANK)
        y = expected_expand(
            base, xa, packed.lora_b, self.module.ranks, slots, self.module.output_slices
        )
        error = base_error + y.error
        return Expected(y.value, error + half_ulp(y.value.abs() + error, dtype))


def sum_of(parts: list[Expected], dtype: torch.dtype) -> Expected:
    """What an all-reduce makes of the ranks' parts: a rounding for each addition."""
    value, error = parts[0].value, parts[0].error
    for part in parts[1:]:
        value, error = value + part.value, error + part.error
        error = error + half_ulp(value.abs() + error, dtype)
    return Expected(value, error)


def make_batch(device: str) -> LoRABatch:
    batch = LoRABatch(64, NUM_SLOTS, device)
    batch.update(SLOTS)
    return batch


@contextmanager
def watched() -> Iterator[list[tuple[str, Tensor]]]:
    """Record what collectives get; meanwhile memory that nobody has written is NaN."""
    seen: list[tuple[str, Tensor]] = []
    all_reduce, all_gather = dist.all_reduce, dist.all_gather_into_tensor

    def record_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_reduce", tensor.clone()))
        return all_reduce(tensor, *args, **kwargs)

    def record_gather(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(("all_gather", tensor.clone()))
        return all_gather(output, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather_into_tensor = record_reduce, record_gather
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    try:
        assert torch.empty(3).isnan().all()
        yield seen
    finally:
        torch.use_deterministic_algorithms(False)
        dist.all_reduce, dist.all_gather_into_tensor = all_reduce, all_gather


def group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


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
            group=group(),
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
            group=group(),
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
    layer = LoRARowParallelLinear.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=group())
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
        cut = kind.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=group())
        dim = kinds.index(kind)
        n, k = [(40 // size, 48), (40, 48 // size)][dim]
        base = nn.Linear(k, n, bias=dim == 0 or rank == 0, device=device)
        with torch.no_grad():
            base.weight.copy_(problem.linear.weight.chunk(size, dim)[rank])
            if base.bias is not None:
                base.bias.copy_(
                    problem.linear.bias.chunk(size)[rank] if dim == 0 else problem.linear.bias
                )
        given = kind(base, NUM_SLOTS, MAX_RANK, group=group())
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

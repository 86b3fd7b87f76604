"""Random problems for the op tests: pools in every layout, batches, awkward tensors.

Everything that no op may read is NaN: what lies past a slot's rank, the gaps between rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_ext import ops

NAN = float("nan")
LAYOUTS = ["packed", "per_slice", "flat"]
HALVES_AND_FP32 = [torch.bfloat16, torch.float16, torch.float32]
# Everything around the tile sizes and vector widths, and both ends.
RANKS = [0, 1, 3, 4, 8, 12, 16, 33, 64, 96, 100, 128, 256, 512]

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def dtypes_on(device: str) -> list[torch.dtype]:
    """The dtypes of x, A and B that the kernels of a device take."""
    return [*HALVES_AND_FP32, torch.float64] if device == "cpu" else HALVES_AND_FP32


def generator(*seed: object) -> torch.Generator:
    """A generator seeded by what names the problem, on the CPU: all devices get the same."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def randn(
    shape: Sequence[int], dtype: torch.dtype, device: str, gen: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Normal numbers of standard deviation `scale`."""
    return (torch.randn(*shape, generator=gen) * scale).to(device=device, dtype=dtype)


# ---- tensors that are not laid out the simple way


def strided_rows(values: Tensor, gap: int, fill: float = NAN) -> Tensor:
    """The same [rows, columns], with `gap` elements of `fill` in front of every row."""
    rows, columns = values.shape
    buffer = torch.full((rows, columns + gap), fill, dtype=values.dtype, device=values.device)
    view = buffer[:, gap:]
    view.copy_(values)
    return view


def misaligned(values: Tensor) -> Tensor:
    """The same tensor, contiguous, one element past an aligned address."""
    buffer = torch.full((values.numel() + 1,), NAN, dtype=values.dtype, device=values.device)
    view = buffer[1:].view(values.shape)
    view.copy_(values)
    return view


# ---- a module's adapters


@dataclass(frozen=True)
class Weights:
    """One module's adapters in one layout, as the ops take them."""

    lora_a: list[Tensor]
    lora_b: list[Tensor]
    a_offsets: Tensor | None = None
    b_offsets: Tensor | None = None


@dataclass(frozen=True)
class Module:
    """One module's adapters: A[l][i] [r_l, K] and B[l][i] [N_i, r_l] per slot and slice."""

    a: list[list[Tensor]]
    b: list[list[Tensor]]
    ranks: Tensor  # int32 [L]
    scalings: Tensor  # fp32 [L]
    in_features: int
    output_slices: list[int]
    max_rank: int
    dtype: torch.dtype
    device: str

    @property
    def num_slots(self) -> int:
        return self.ranks.numel()

    @property
    def num_slices(self) -> int:
        return len(self.output_slices)

    @property
    def out_features(self) -> int:
        return sum(self.output_slices)

    def weights(self, layout: str, place: Callable[[Tensor], Tensor] = lambda t: t) -> Weights:
        """The weights in a layout, NaN wherever there is no adapter; `place` may move a tensor."""
        if layout == "flat":
            return self._flat(place)
        shape_a = (self.num_slots, self.max_rank, self.in_features)
        if layout == "packed":
            a = self._nan(self.num_slots, self.num_slices * self.max_rank, self.in_features)
            b = self._nan(self.num_slots, self.out_features, self.max_rank)
            for slot, rank in enumerate(self.ranks.tolist()):
                a[slot, : self.num_slices * rank] = torch.cat(self.a[slot])
                b[slot, :, :rank] = torch.cat(self.b[slot])
            return Weights([place(a)], [place(b)])
        list_a = [self._nan(*shape_a) for _ in self.output_slices]
        list_b = [self._nan(self.num_slots, n, self.max_rank) for n in self.output_slices]
        for slot, rank in enumerate(self.ranks.tolist()):
            for i in range(self.num_slices):
                list_a[i][slot, :rank] = self.a[slot][i]
                list_b[i][slot, :, :rank] = self.b[slot][i]
        return Weights([place(a) for a in list_a], [place(b) for b in list_b])

    def _flat(self, place: Callable[[Tensor], Tensor]) -> Weights:
        # In descending order, with gaps that keep some slots misaligned: nothing but the table of
        # offsets says where a slot is.
        buffers, tables = [], []
        for factors in (self.a, self.b):
            offsets, parts, end = [0] * self.num_slots, [], 0
            for slot in reversed(range(self.num_slots)):
                gap = self._nan(8 if slot % 2 == 0 else 3)
                values = torch.cat([f.reshape(-1) for f in factors[slot]])
                offsets[slot] = end + gap.numel()
                parts += [gap, values]
                end += gap.numel() + values.numel()
            buffers.append(torch.cat([*parts, self._nan(1)]))
            tables.append(torch.tensor(offsets, dtype=torch.int64, device=self.device))
        return Weights([place(buffers[0])], [place(buffers[1])], tables[0], tables[1])

    def _nan(self, *shape: int) -> Tensor:
        return torch.full(shape, NAN, dtype=self.dtype, device=self.device)


def make_module(
    ranks: Sequence[int],
    in_features: int,
    output_slices: Sequence[int],
    dtype: torch.dtype,
    device: str,
    *,
    max_rank: int | None = None,
    seed: object = 0,
) -> Module:
    """Random adapters, one per slot; deltas are of the size of y."""
    gen = generator("module", list(ranks), in_features, list(output_slices), seed)

    def factors(shapes: list[tuple[int, int]], scale: float) -> list[Tensor]:
        return [randn(shape, dtype, device, gen, scale) for shape in shapes]

    return Module(
        a=[factors([(r, in_features)] * len(output_slices), in_features**-0.5) for r in ranks],
        b=[factors([(n, r) for n in output_slices], max(r, 1) ** -0.5) for r in ranks],
        ranks=torch.tensor(list(ranks), dtype=torch.int32, device=device),
        scalings=(torch.rand(len(ranks), generator=gen) * 3.75 + 0.25).to(device),
        in_features=in_features,
        output_slices=list(output_slices),
        max_rank=max(1, *ranks) if max_rank is None else max_rank,
        dtype=dtype,
        device=device,
    )


# ---- a batch


@dataclass(frozen=True)
class Batch:
    """Token slots with their plan."""

    slots: list[int]
    token_slots: Tensor  # int32 [T]
    plan: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.slots)


def make_batch(
    slots: Sequence[int], num_slots: int, device: str, max_tokens: int | None = None
) -> Batch:
    """The plan of a batch with a slot per token, in a buffer that held garbage."""
    slots = list(slots)
    size = ops.plan_size(len(slots) if max_tokens is None else max_tokens, num_slots)
    plan = torch.full((size,), -7777, dtype=torch.int32, device=device)
    token_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    ops.plan_batch_(plan, token_slots, num_slots=num_slots)
    return Batch(slots, token_slots, plan)


def random_slots(num_tokens: int, num_slots: int, gen: torch.Generator) -> list[int]:
    """Uniformly random slots, -1 included."""
    return torch.randint(-1, num_slots, (num_tokens,), generator=gen).tolist()


# ---- calls


def shrink(x: Tensor, module: Module, weights: Weights, plan: Tensor) -> Tensor:
    """`lora_shrink` with the arguments of a module."""
    return ops.lora_shrink(
        x,
        weights.lora_a,
        module.ranks,
        module.scalings,
        plan,
        num_slices=module.num_slices,
        max_rank=module.max_rank,
        a_offsets=weights.a_offsets,
    )


def expand_(y: Tensor, xa: Tensor, module: Module, weights: Weights, plan: Tensor) -> None:
    """`lora_expand_` with the arguments of a module."""
    ops.lora_expand_(
        y,
        xa,
        weights.lora_b,
        module.ranks,
        plan,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
        b_offsets=weights.b_offsets,
    )


def apply_arguments(module: Module, weights: Weights, plan: Tensor) -> tuple[Any, ...]:
    """What follows (y, x) in `torch.ops.lora_ext.lora_apply_` and `lora_apply`."""
    return (
        weights.lora_a,
        weights.lora_b,
        module.ranks,
        module.scalings,
        plan,
        module.output_slices,
        module.max_rank,
        weights.a_offsets,
        weights.b_offsets,
    )


def apply(
    y: Tensor, x: Tensor, module: Module, weights: Weights, plan: Tensor, **options: Any
) -> Tensor:
    """`lora_apply` with the arguments of a module."""
    return ops.lora_apply(
        y,
        x,
        weights.lora_a,
        weights.lora_b,
        module.ranks,
        module.scalings,
        plan,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
        a_offsets=weights.a_offsets,
        b_offsets=weights.b_offsets,
        **options,
    )


def apply_(
    y: Tensor, x: Tensor, module: Module, weights: Weights, plan: Tensor, **options: Any
) -> None:
    """`lora_apply_` with the arguments of a module."""
    ops.lora_apply_(
        y,
        x,
        weights.lora_a,
        weights.lora_b,
        module.ranks,
        module.scalings,
        plan,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
        a_offsets=weights.a_offsets,
        b_offsets=weights.b_offsets,
        **options,
    )

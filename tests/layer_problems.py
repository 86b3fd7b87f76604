"""A whole linear layer with adapters and a batch, and what a rank's part of it may compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generators import NAN, Module, generator, make_module, randn
from lora_ext import LoRABatch
from lora_ext.layers import LoRAModule
from numerics import Expected, expected_expand, expected_shrink, half_ulp, sum_error

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

    def expected(
        self,
        columns: slice | None = None,
        dtype: torch.dtype | None = None,
        slots: list[int] | None = None,
    ) -> Expected:
        """The layer's output from these columns of x: rounded to ``dtype``, then the adapters too.

        None: all columns, the dtype of x, the slots of the batch.
        """
        columns = slice(None) if columns is None else columns
        x, weight = self.x[:, columns], self.linear.weight[:, columns].detach()
        dtype = x.dtype if dtype is None else dtype
        base = x.double() @ weight.double().T
        magnitude = x.double().abs() @ weight.double().abs().T
        if self.linear.bias is not None and not columns.start:
            base += self.linear.bias.detach().double()
        base_error = sum_error(x.shape[1], magnitude, x.dtype)
        base_error += half_ulp(base.abs() + base_error, dtype)
        given = SLOTS + [-1] * NUM_PADDING if slots is None else slots
        token_slots = torch.tensor(given, device=x.device)
        packed = self.module.weights("packed")
        lora_a = [packed.lora_a[0][..., columns]]
        rest = (self.module.ranks, self.module.scalings, token_slots)
        num_slices = len(self.module.output_slices)
        xa = expected_shrink(x, lora_a, *rest, num_slices, MAX_RANK)
        y = expected_expand(
            base, xa, packed.lora_b, self.module.ranks, token_slots, self.module.output_slices
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

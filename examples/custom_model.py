"""The operators in a model of one's own: two stacked projections, another adapter for each request.

    python examples/custom_model.py

A server flattens the tokens of all requests into one batch. One plan, made once per batch, tells
every layer which token uses which adapter slot; each layer then adds all adapters with one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import lora_ext

NUM_SLOTS, MAX_RANK = 4, 16
HIDDEN, INTERMEDIATE = 64, 160


class MultiLoRALinear(nn.Module):
    """One matrix for several stacked projections, and the adapters of all slots beside it.

    lora_a is [slots, slices * MAX_RANK, in_features] and lora_b [slots, sum(out_slices), MAX_RANK];
    a slot of rank r holds slice i in rows i * r and following of lora_a. Nothing is read beyond r.
    """

    def __init__(self, in_features: int, out_slices: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.out_slices = out_slices
        out_features, num_slices = sum(out_slices), len(out_slices)
        weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
        lora_a = torch.zeros(NUM_SLOTS, num_slices * MAX_RANK, in_features, dtype=dtype)
        lora_b = torch.zeros(NUM_SLOTS, out_features, MAX_RANK, dtype=dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)
        self.register_buffer("ranks", torch.zeros(NUM_SLOTS, dtype=torch.int32))
        self.register_buffer("scalings", torch.zeros(NUM_SLOTS))

    def forward(self, x: Tensor, plan: Tensor) -> Tensor:
        """x [T, in_features] to [T, sum(out_slices)]."""
        y = functional.linear(x, self.weight)
        torch.ops.lora_ext.lora_apply_(
            y,
            x,
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            plan,
            self.out_slices,
            MAX_RANK,
        )
        return y

    def set_adapter(self, slot: int, a: list[Tensor], b: list[Tensor], scaling: float) -> None:
        """Put A [r, in_features] and B [out, r] of each slice into a slot."""
        rank = a[0].shape[0]
        self.lora_a[slot, : len(a) * rank] = torch.cat(a)
        self.lora_b[slot, :, :rank] = torch.cat(b)
        self.ranks[slot] = rank
        self.scalings[slot] = scaling


class MLP(nn.Module):
    """A Llama's gated MLP: gate and up stacked into one matrix product, then down."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_up = MultiLoRALinear(HIDDEN, [INTERMEDIATE, INTERMEDIATE], dtype)
        self.down = MultiLoRALinear(INTERMEDIATE, [HIDDEN], dtype)

    def forward(self, x: Tensor, plan: Tensor) -> Tensor:
        gate, up = self.gate_up(x, plan).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up, plan)

    def randomize_adapters(self, ranks: list[int]) -> None:
        """Fill slot i with a random adapter of rank ranks[i]."""
        for layer in (self.gate_up, self.down):
            k = layer.weight.shape[1]
            for slot, rank in enumerate(ranks):
                a = [torch.randn(rank, k) / k**0.5 for _ in layer.out_slices]
                b = [torch.randn(n, rank) / rank**0.5 for n in layer.out_slices]
                layer.set_adapter(slot, a, b, scaling=0.5)


def merged(layer: MultiLoRALinear, slot: int) -> Tensor:
    """The layer's weight with one adapter merged into it, in float64: the slow way, to compare."""
    weight = layer.weight.double()
    if slot < 0:
        return weight
    rank, start, parts = int(layer.ranks[slot]), 0, []
    for index, width in enumerate(layer.out_slices):
        a = layer.lora_a[slot, index * rank : (index + 1) * rank].double()
        b = layer.lora_b[slot, start : start + width, :rank].double()
        parts.append(float(layer.scalings[slot]) * b @ a)
        start += width
    return weight + torch.cat(parts)


def one_adapter(model: MLP, x: Tensor, slot: int) -> Tensor:
    """The model for tokens that all use one slot, from merged weights, in float64."""
    gate, up = (x.double() @ merged(model.gate_up, slot).T).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ merged(model.down, slot).T


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = MLP()
    model.randomize_adapters([4, 16, 1])

    slots = [1, -1, 0, 2, 1]  # the adapter of each request; -1: none
    lens = [5, 1, 30, 2, 1]  # the tokens of each request
    batch = lora_ext.LoRABatch(max_tokens=64, num_slots=NUM_SLOTS, device="cpu")
    batch.update(slots, seg_lens=lens)

    x = torch.randn(sum(lens), HIDDEN)
    y = model(x, batch.plan)

    requests = zip(slots, x.split(lens), y.split(lens), strict=True)
    for index, (slot, x_request, y_request) in enumerate(requests):
        expected = one_adapter(model, x_request, slot)
        error = float((y_request - expected).norm() / expected.norm())
        print(f"request {index}: {len(x_request):2} tokens, slot {slot:2}, error {error:.1e}")
        assert error < 1e-5


if __name__ == "__main__":
    main()

"""PEFT's LoRA layers over weights of a pool, without copies where the rank is the pool's."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .case import Unsupported
from .registry import Site
from .workload import Workload


def require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise Unsupported("not installed: pip install peft")


def adapter_name(slot: int) -> str:
    """PEFT's name for the adapter in a slot; "__base__" is its word for none."""
    return f"slot{slot}" if slot >= 0 else "__base__"


class GivenOutput(nn.Linear):
    """A base layer whose product was computed elsewhere: PEFT then adds adapters and no more."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.output = torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        return self.output


def add_adapters(bases: Sequence[nn.Linear], workload: Workload) -> list[nn.Module]:
    """A PEFT layer over each base, with the adapters that the batch uses, without weights yet."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.ModuleDict({f"base{i}": base for i, base in enumerate(bases)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for slot in workload.tokens_of:
            rank = workload.ranks[slot]
            config = LoraConfig(
                r=rank,
                lora_alpha=workload.scalings[slot] * rank,  # type: ignore[arg-type]
                target_modules=[f"base{i}" for i in range(len(bases))],
            )
            inject_adapter_in_model(
                config, holder, adapter_name=adapter_name(slot), low_cpu_mem_usage=True
            )
    return [holder[f"base{i}"].eval() for i in range(len(bases))]


def set_weights(
    layers: Sequence[nn.Module], site: Site, workload: Workload, lora_a: Tensor, lora_b: Tensor
) -> None:
    """Give the layers of a site's slices their views of packed weights."""
    for slot in workload.tokens_of:
        rank, name = workload.ranks[slot], adapter_name(slot)
        for i, (slice_layer, columns) in enumerate(zip(layers, site.columns, strict=True)):
            layer: Any = slice_layer
            a, b = lora_a[slot, i * rank : (i + 1) * rank], lora_b[slot, columns, :rank]
            layer.lora_A[name].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B[name].weight = nn.Parameter(b, requires_grad=False)

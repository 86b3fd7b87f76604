"""MoE layers as transformers had them before version 5: a list of experts, each a small MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ExpertLinear, FusedMoE, LoRAGate, Routing

# gate, up and down of Qwen's experts, and of Mixtral's.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class SparseMoeBlock(nn.Module):
    """A block that routes and has its experts in a list: the same with a FusedMoE for experts.

    Args:
        block: of Qwen2-MoE's, Qwen3-MoE's or Mixtral's kind.
        experts: what takes the place of its list.
    """

    def __init__(self, block: nn.Module, experts: FusedMoE) -> None:
        super().__init__()
        source: Any = block
        self.gate: nn.Module = source.gate
        self.experts = experts
        self.top_k: int = source.top_k
        self.norm_topk_prob: bool = getattr(source, "norm_topk_prob", True)  # Mixtral always does

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, of the shape of ``hidden_states``, and the logits ``[T, E]``."""
        logits = self.gate(hidden_states).flatten(0, -2)
        weights, chosen = torch.topk(logits.softmax(dim=-1, dtype=torch.float32), self.top_k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(hidden_states, chosen, weights.to(hidden_states.dtype)), logits


def is_block(module: nn.Module) -> bool:
    """Whether it is a block that routes and has its experts in a list, which it does not call."""
    experts = getattr(module, "experts", None)
    return (
        type(experts) is nn.ModuleList
        and is_list(experts)
        and not hasattr(module, "shared_expert")
        and isinstance(getattr(module, "gate", None), (nn.Linear, LoRAGate))
        and isinstance(getattr(module, "top_k", None), int)
    )


def is_list(module: nn.Module) -> bool:
    """Whether it is a list of gated experts."""
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(_projections(expert) is not None for expert in module)
    )


def is_fusable(model: nn.Module, name: str) -> bool:
    """Whether a list can be replaced: it is called by itself, or its block is known."""
    parent, _, child = name.rpartition(".")
    is_called = type(model.get_submodule(name)) is not nn.ModuleList
    return is_called or (child == "experts" and is_block(model.get_submodule(parent)))


def fuse_list(
    experts: nn.ModuleList,
    num_slots: int,
    max_rank: int,
    routing: Routing,
    *,
    shared_outer: bool = False,
) -> FusedMoE:
    """Make a FusedMoE of a list of experts, whose weights become views of the fused ones."""
    members: list[Any] = list(experts)
    names = _projections(members[0])
    assert names is not None
    gate, up, down = ([getattr(member, name) for member in members] for name in names)
    act: Callable[[Tensor], Tensor] = members[0].act_fn

    def activation(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    return FusedMoE(
        _fused([gate, up]),
        _fused([down]),
        activation,
        num_slots,
        max_rank,
        routing,
        shared_outer=shared_outer,
    )


def _fused(stacked: Sequence[Sequence[nn.Linear]]) -> ExpertLinear:
    """Put the linear layers of each expert on top of each other, and the experts side by side."""
    of_experts = list(zip(*stacked, strict=True))
    fused = torch.stack(
        [torch.cat([linear.weight.detach() for linear in of_one]) for of_one in of_experts]
    )
    for expert, of_one in enumerate(of_experts):
        rows = torch.split(fused[expert], [linear.out_features for linear in of_one])
        for linear, view in zip(of_one, rows, strict=True):
            linear.weight.data = view  # frees its own memory
    requires_grad = stacked[0][0].weight.requires_grad
    return ExpertLinear(nn.Parameter(fused, requires_grad))


def _projections(expert: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of an expert's linear layers; None where it is another kind of module."""
    if not hasattr(expert, "act_fn"):
        return None
    for names in _PROJECTIONS:
        layers = [getattr(expert, name, None) for name in names]
        if all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
            return names
    return None

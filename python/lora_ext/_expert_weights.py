"""The forms in which PEFT and others save adapters of MoE experts, brought into one.

A layer's experts are adapted by three projections (Mixtral's w1, w3 and w2 are gate, up and down):

*per expert*
    ``experts.3.gate_proj``: A ``[r, K]`` and B ``[N, r]``, as of any linear layer;
*stacked*
    ``experts.gate_proj``: A ``[E or 1, r, K]`` and B ``[E or 1, N, r]``, as SGLang takes them;
*of a parameter*
    ``experts`` and ``experts.base_layer``: A ``[E * r, K]`` and B ``[N, r * E]``, as PEFT saves
    what its ``target_parameters`` name, for gate and up in one (``gate_up_proj``) and for
    ``down_proj``.

Here all of them become stacks under the name of their projection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PROJECTIONS = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_NAME = re.compile(
    rf"(?P<layer>(?:.+\.)?experts)\.(?:(?P<index>\d{{1,6}})\.)?(?P<name>{'|'.join(_PROJECTIONS)})"
)


class ExpertName(NamedTuple):
    """What a module's name says of experts.

    Attributes:
        projection: the layer's experts and the projection, ``...experts.gate_proj``.
        expert: its number; None: a stack of all.
    """

    projection: str
    expert: int | None

    @classmethod
    def parse(cls, module: str) -> ExpertName | None:
        """Read a module's name; None where it names no projection of experts."""
        match = _NAME.fullmatch(module)
        if match is None:
            return None
        projection = f"{match['layer']}.{_PROJECTIONS[match['name']]}"
        return cls(projection, None if match["index"] is None else int(match["index"]))


class ExpertStack(NamedTuple):
    """The adapter of one projection of a layer's experts.

    Attributes:
        lora_a: ``[n, r, K]``, or ``[1, r, K]`` where the experts share it.
        lora_b: ``[n, N, r]``, or ``[1, N, r]``.
        scaling: factor of the product.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def of_parameter(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Stack PEFT's A ``[E * r, K]`` and B ``[N, r * E]`` of a parameter of all experts.

    A has the rows of an expert side by side, B the experts of a rank.

    Raises:
        ValueError: no number of experts fits both.
    """
    if lora_a.dim() != 2 or lora_b.dim() != 2 or rank < 1 or lora_a.shape[0] % rank:
        raise ValueError(f"lora_A is {list(lora_a.shape)}, expected [experts * {rank}, K]")
    if lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"lora_B is {list(lora_b.shape)}, expected [N, {lora_a.shape[0]}] beside lora_A "
            f"{list(lora_a.shape)}"
        )
    stack_a = lora_a.reshape(-1, rank, lora_a.shape[1])
    stack_b = lora_b.reshape(lora_b.shape[0], rank, -1).permute(2, 0, 1)
    return shared(stack_a), shared(stack_b)


def of_experts(sides: Sequence[tuple[Tensor, Tensor, float]]) -> ExpertStack:
    """Stack the adapters (A ``[r, K]``, B ``[N, r]``, scaling) of single experts.

    Ranks may differ: smaller ones are filled up with zeros. So may scalings: the largest counts,
    and B takes the difference.

    Raises:
        ValueError: sizes other than ranks differ.
    """
    _equal_among("K", [lora_a.shape[-1] for lora_a, _, _ in sides])
    _equal_among("N", [lora_b.shape[-2] for _, lora_b, _ in sides])
    rank = max(lora_a.shape[0] for lora_a, _, _ in sides)
    scaling = max((own for _, _, own in sides), key=abs)
    all_a = [_pad_rank(lora_a, rank, 0) for lora_a, _, _ in sides]
    all_b = [_pad_rank(_rescale(lora_b, own, scaling), rank, 1) for _, lora_b, own in sides]
    return ExpertStack(_stack(all_a), _stack(all_b), scaling)


def shared(stack: Tensor) -> Tensor:
    """Reduce a stack to one where all experts have the same."""
    if stack.shape[0] > 1 and bool((stack == stack[:1]).all()):
        return stack[:1].clone()
    return stack


def _pad_rank(side: Tensor, rank: int, dim: int) -> Tensor:
    """Fill the dimension of ranks up with zeros."""
    missing = rank - side.shape[dim]
    if not missing:
        return side
    shape = list(side.shape)
    shape[dim] = missing
    return torch.cat([side, side.new_zeros(shape)], dim)


def _rescale(lora_b: Tensor, own: float, common: float) -> Tensor:
    """Return B for a common scaling: as it is where that is its own."""
    if own == common:
        return lora_b
    return (lora_b.double() * (own / common)).to(lora_b.dtype)


def _stack(sides: Sequence[Tensor]) -> Tensor:
    first = sides[0]
    if len(sides) > 1 and all(torch.equal(first, side) for side in sides[1:]):
        return first[None]
    return torch.stack(list(sides))


def _equal_among(name: str, sizes: Sequence[int]) -> None:
    if len(set(sizes)) != 1:
        raise ValueError(f"its experts differ in {name}: {sorted(set(sizes))}")

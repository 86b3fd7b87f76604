"""A projection of all experts of an MoE layer: the base weights, and the adapters beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..moe import ExpertLoRA
from .base import LoRAModule
from .routing import Routing
from .sharding import Shard

if TYPE_CHECKING:
    from ..adapters import LoRAWeights


class ExpertGroups(NamedTuple):
    """The routed (token, choice) pairs of a layer, sorted by expert; those not routed come last.

    Attributes:
        order: int64 ``[P]``, the pair at each place.
        place: int64 ``[P]``, the place of each pair.
        experts: int64 ``[P]``, the expert at each place; the last one's number for not routed.
        ends: int32 ``[E]``, where each expert's places end.
        routed: bool ``[P]``, of each pair.
    """

    order: Tensor
    place: Tensor
    experts: Tensor
    ends: Tensor
    routed: Tensor

    @classmethod
    def of(
        cls, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None
    ) -> ExpertGroups:
        """Sort pairs ``[T, k]``, without a read from the device; ids out of range are not routed.

        Args:
            topk_ids: routed ids.
            num_experts: E.
            expert_map: an id's index among the E, or -1; None: ids are that.
        """
        ids = topk_ids.reshape(-1).long()
        if expert_map is not None:
            known = (ids >= 0) & (ids < expert_map.numel())
            mapped = expert_map[ids.clamp(0, expert_map.numel() - 1)].long()
            ids = torch.where(known, mapped, -1)
        routed = (ids >= 0) & (ids < num_experts)
        ids, order = torch.where(routed, ids, num_experts).sort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        experts = torch.arange(1, num_experts + 1, device=ids.device)
        ends = torch.searchsorted(ids, experts, out_int32=True)
        return cls(order, place, ids.clamp(max=num_experts - 1), ends, routed)


class ExpertLinear(nn.Module):
    """One linear layer for each expert: ``x @ weight[e].T + bias[e]``.

    Args:
        weight: ``[E, N, K]``, or ``[E, K, N]`` where it is transposed.
        bias: ``[E, N]``.
        transposed: whether the weights are.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.transposed = transposed
        self.num_experts, self.out_features, self.in_features = self._weights().shape

    def cut(self, experts: Shard) -> ExpertLinear:
        """Return a new layer with some of the experts, a copy."""
        parts = [
            None if whole is None else nn.Parameter(experts.of(whole.detach(), 0).clone(), False)
            for whole in (self.weight, self.bias)
        ]
        assert parts[0] is not None
        return ExpertLinear(parts[0], parts[1], transposed=self.transposed)

    def _weights(self) -> Tensor:
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def forward(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """Return ``[P, N]`` for x ``[P, K]`` at the places of ``groups``; of those not routed,
        anything."""
        y = _grouped_mm(x, self._weights(), groups)
        return y if self.bias is None else y + self.bias[groups.experts]


def _grouped_mm(x: Tensor, weights: Tensor, groups: ExpertGroups) -> Tensor:
    if _has_grouped_mm(x, weights):
        return functional.grouped_mm(x, weights.transpose(1, 2), offs=groups.ends)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # A graph cannot ask how many rows an expert has: each row takes its expert's weights along.
        return torch.bmm(weights[groups.experts], x[:, :, None])[:, :, 0]
    parts, start = [], 0
    for expert, end in enumerate(groups.ends.tolist()):
        if end > start:
            parts.append(functional.linear(x[start:end], weights[expert]))
        start = end
    parts.append(x.new_zeros((x.shape[0] - start, weights.shape[1])))
    return torch.cat(parts)


def _has_grouped_mm(x: Tensor, weights: Tensor) -> bool:
    """Whether torch has a kernel that takes the groups as they are on the device."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return False
    # It loads 16 bytes at a time.
    aligned = all(size % 8 == 0 for size in weights.shape[1:])
    return aligned and torch.cuda.get_device_capability(x.device) >= (9, 0)


class LoRAExperts(LoRAModule):
    """The adapters of one projection of all experts; ``FusedMoE`` has one for each.

    Args:
        base: the experts that this process holds.
        output_sizes: N_i of each slice: gate and up, or one.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model.
        experts: which of the layer's experts ``base`` has.
        interleaved: whether the slices' output features take turns (gate 0, up 0, gate 1, ...).
        share_a, share_b: whether all experts of a slot have one A, or one B. Adapters in which
            they differ are then refused.

    Attributes:
        lora_a: ``[L, E or 1, S * R, K]``, slice i of a slot of rank r in rows ``i * r`` and on.
        lora_b: ``[L, E or 1, N, R]``.
    """

    def __init__(
        self,
        base: ExpertLinear,
        output_sizes: Sequence[int],
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        experts: Shard | None = None,
        interleaved: bool = False,
        share_a: bool = False,
        share_b: bool = False,
    ) -> None:
        self.experts = experts if experts is not None else Shard.whole(base.num_experts)
        self.interleaved = interleaved
        self.share_a = share_a
        self.share_b = share_b
        super().__init__(
            base,
            Shard.whole(base.in_features),
            [Shard.whole(size) for size in output_sizes],
            num_slots,
            max_rank,
            routing,
        )

    def _shape_a(self) -> tuple[int, ...]:
        rows = len(self.outputs) * self.max_rank
        return (self.num_slots, self._stack_size(self.share_a), rows, self.in_features)

    def _shape_b(self) -> tuple[int, ...]:
        stack = self._stack_size(self.share_b)
        return (self.num_slots, stack, self.out_features, self.max_rank)

    def _stack_size(self, is_shared: bool) -> int:
        return 1 if is_shared else self.experts.size

    def expand(self, weights: LoRAWeights) -> LoRAWeights:
        """Return an adapter as stacks of all experts of the layer, or of 1 for all.

        Raises:
            ValueError: it is none of experts, or one of other experts.
        """
        lora_a, lora_b = weights.lora_a, weights.lora_b
        if lora_a.dim() != 3:
            raise ValueError(
                f"A is {list(lora_a.shape)}, the model needs a stack of {self.experts.full}"
            )
        if weights.experts is not None and weights.experts != tuple(range(self.experts.full)):
            if max(weights.experts) >= self.experts.full:
                raise ValueError(
                    f"it has an expert {max(weights.experts)}, the model has {self.experts.full}"
                )
            # An expert that is left out has a B of 0; so A may stay shared.
            if lora_a.shape[0] > 1:
                lora_a = self._placed(lora_a, weights.experts)
            lora_b = self._placed(lora_b, weights.experts)
        return weights._replace(lora_a=lora_a, lora_b=lora_b, experts=None)

    def _placed(self, side: Tensor, experts: Sequence[int]) -> Tensor:
        stack = side.new_zeros((self.experts.full, *side.shape[1:]))
        stack[list(experts)] = side
        return stack

    def check_sizes(self, lora_a: Tensor, lora_b: Tensor, index: int | None = None) -> None:
        """Check an adapter's A ``[E or 1, r, K]`` and B ``[E or 1, N, r]``; see the base class."""
        for name, side, is_shared in (("A", lora_a, self.share_a), ("B", lora_b, self.share_b)):
            if side.shape[0] not in (1, self.experts.full):
                raise ValueError(
                    f"{name} is a stack for {side.shape[0]} experts, the model has "
                    f"{self.experts.full}"
                )
            if is_shared and side.shape[0] > 1:
                raise ValueError(
                    f"its experts differ in {name}, and these layers keep one {name} for all "
                    "experts (shared_outer)"
                )
        super().check_sizes(lora_a[0], lora_b[0], index)

    def split_rows(self, lora_b: Tensor) -> Sequence[Tensor]:
        """Return the rows of each slice of a B of all of them."""
        if self.interleaved:
            return [lora_b[:, i :: len(self.outputs)] for i in range(len(self.outputs))]
        return super().split_rows(lora_b)

    def shard(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts that are here of A ``[E or 1, S * r, K]`` and B ``[E or 1, N, r]``."""
        self.check_sizes(lora_a, lora_b)
        a, b = (s if s.shape[0] == 1 else self.experts.of(s, 0) for s in (lora_a, lora_b))
        return a, b

    @torch.no_grad()
    def write_shard(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy what ``shard`` returned into a slot, which must have rank 0."""
        rank = lora_b.shape[-1]
        self.lora_a[slot, :, : len(self.outputs) * rank].copy_(lora_a)
        self.lora_b[slot, :, :, :rank].copy_(lora_b)

    def _part_of_base(self, given: Tensor) -> Tensor | None:
        return None

    def adapters(self) -> ExpertLoRA | None:
        """Return what the operators need of it; None: no slot has an adapter here."""
        source = self.routing.source
        if not self._slots_in_use and not (source is not None and source.static):
            return None
        return ExpertLoRA(
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            self.output_sizes,
            self.max_rank,
            list(range(len(self.outputs))) if self.interleaved else None,
            len(self.outputs) if self.interleaved else 1,
        )

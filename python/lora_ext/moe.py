"""What the adapters of an MoE layer add, and the memory that the layers of a model share for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

# The operator divides K, and makes an intermediate for each part, while that fills a device:
# csrc/kernels/moe_heuristics.h, up to two blocks on each of 160 multiprocessors, 64 pairs a tile.
_MOST_SPLITS = 16
_SPLIT_PAIRS = 2 * 160 * 64

# (x, cache, topk_weights, topk_ids): adds to the cache, in place.
Hook = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class LoRAHooks(NamedTuple):
    """What an MoE layer calls at two points of its forward; None: nothing is to be added.

    Attributes:
        after_gate_up: before the activation. x ``[T, H]``, cache ``[T, k, N]``.
        after_down: before the sum over the k choices. x ``[T * k, I]``, cache ``[T, k, H]``, which
            has been multiplied by the routed weights; so is what is added.
    """

    after_gate_up: Hook | None = None
    after_down: Hook | None = None


class ExpertLoRA(NamedTuple):
    """The adapters of one projection of a layer's experts, as ``moe_lora_apply_`` takes them."""

    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    ranks: Tensor
    scalings: Tensor
    output_slices: Sequence[int]
    max_rank: int
    column_starts: Sequence[int] | None = None
    column_stride: int = 1

    def add(
        self, x: Tensor, cache: Tensor, routing: Tensor, top_k: int, topk_weights: Tensor | None
    ) -> None:
        """Add to the cache ``[T, k, N]`` of a batch that was aligned into ``routing``."""
        x = x.to(self.lora_a[0].dtype)
        if topk_weights is not None:
            known = topk_weights.dtype in (torch.float32, x.dtype)
            topk_weights = (topk_weights if known else topk_weights.float()).contiguous()
        ops.moe_lora_apply_(
            cache,
            x,
            self.lora_a,
            self.lora_b,
            self.ranks,
            self.scalings,
            routing,
            top_k=top_k,
            output_slices=self.output_slices,
            max_rank=self.max_rank,
            column_starts=self.column_starts,
            column_stride=self.column_stride,
            topk_weights=topk_weights,
        )


def align_routing(
    topk_ids: Tensor,
    token_slots: Tensor,
    *,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    buffers: MoEBuffers | None = None,
) -> Tensor:
    """Align a layer's routing, in one launch, for what is added to both of its projections.

    Args:
        topk_ids: int32 or int64 ``[T, k]``, -1 for a choice that is not routed.
        token_slots: int32 ``[>= T]``, -1 for none.
        num_slots: L.
        num_experts: E, of the adapters' weights.
        expert_map: int32, a routed id's index among the E, or -1.
        buffers: hold the result; None: it is allocated.
    """
    num_tokens, top_k = topk_ids.shape
    topk_ids = topk_ids.contiguous()
    if buffers is None:
        return ops.moe_lora_align(
            topk_ids,
            token_slots,
            num_slots=num_slots,
            num_experts=num_experts,
            expert_map=expert_map,
        )
    routing = buffers.routing_for(num_tokens, top_k, num_slots, num_experts)
    ops.moe_lora_align_(
        routing,
        topk_ids,
        token_slots,
        num_slots=num_slots,
        num_experts=num_experts,
        expert_map=expert_map,
    )
    return routing


def lora_hooks(gate_up: ExpertLoRA | None, down: ExpertLoRA | None, routing: Tensor) -> LoRAHooks:
    """Return what adds a layer's adapters, None: none are loaded, after its projections."""

    def after_gate_up(x: Tensor, cache: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        assert gate_up is not None
        gate_up.add(x, cache, routing, topk_ids.shape[1], None)

    def after_down(x: Tensor, cache: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        assert down is not None
        down.add(x, cache, routing, topk_ids.shape[1], topk_weights)

    return LoRAHooks(
        None if gate_up is None else after_gate_up, None if down is None else after_down
    )


class MoEBuffers:
    """Memory of fixed address for the MoE layers of captured graphs, which take turns to use it.

    An engine makes it before it measures how much memory is left for its caches, since a layer
    allocates nothing beside it but the operator's intermediate, which ``nbytes_for`` counts: a
    graph's pool keeps it once for all layers.

    Args:
        max_tokens: the most tokens of a captured batch.
        top_k: experts of a token.
        num_experts: E, of the weights that this process holds.
        num_slots: L.
        device: where the layers run.

    Attributes:
        routing: int32, what ``ops.moe_lora_align_`` fills for each layer.
        token_slots: int32 ``[max_tokens]``, slot of each token, of the batch.
        enabled: int32 ``[L]``, whether the batch uses a slot.
    """

    def __init__(
        self,
        max_tokens: int,
        top_k: int,
        num_experts: int,
        num_slots: int,
        device: torch.device | str = "cuda",
    ) -> None:
        for name, value in (
            ("max_tokens", max_tokens),
            ("top_k", top_k),
            ("num_experts", num_experts),
            ("num_slots", num_slots),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.top_k = top_k
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.device = torch.device(device)
        self._allocate(max_tokens)

    def _allocate(self, max_tokens: int) -> None:
        size = ops.moe_routing_size(max_tokens, self.top_k, self.num_slots, self.num_experts)
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, dtype=torch.int32, device=self.device)
            self.routing = zeros(size)
            self.token_slots = zeros(max_tokens).fill_(-1)
            self.enabled = zeros(self.num_slots)
        self.max_tokens = max_tokens

    @staticmethod
    def nbytes_for(
        max_tokens: int,
        top_k: int,
        num_experts: int,
        num_slots: int,
        *,
        max_rank: int = 0,
        num_slices: int = 2,
    ) -> int:
        """Bytes of such buffers, known before they are made.

        Args:
            max_tokens, top_k, num_experts, num_slots: as for the class.
            max_rank: R; with it, the most that the operator's intermediate takes is counted too:
                float32 ``[P, num_slices * R]`` for P pairs, up to 16 times where they are few.
            num_slices: slices of the widest projection: 2 for gate and up.
        """
        routing = ops.moe_routing_size(max_tokens, top_k, num_slots, num_experts)
        pairs = max_tokens * top_k
        rows = max(pairs, min(_MOST_SPLITS * pairs, _SPLIT_PAIRS))
        intermediate = rows * num_slices * (-(-max_rank // 4) * 4)
        return 4 * (routing + max_tokens + num_slots + intermediate)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.routing.nbytes + self.token_slots.nbytes + self.enabled.nbytes

    def resize(self, max_tokens: int) -> bool:
        """Make room for another number of tokens, such as fewer, once it is known what is captured.

        Returns:
            Whether it was another number. All addresses then change, so it is for before capture.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
        if max_tokens == self.max_tokens:
            return False
        self._allocate(max_tokens)
        return True

    def routing_for(self, num_tokens: int, top_k: int, num_slots: int, num_experts: int) -> Tensor:
        """Return the routing buffer for a layer and its tokens.

        Raises:
            ValueError: it is too small for them.
        """
        needed = ops.moe_routing_size(num_tokens, top_k, num_slots, num_experts)
        if needed > self.routing.numel():
            raise ValueError(
                f"{num_tokens} tokens with {top_k} of {num_experts} experts and {num_slots} slots "
                f"do not fit the MoE buffers, made for {self.max_tokens} tokens with {self.top_k} "
                f"of {self.num_experts} experts and {self.num_slots} slots"
            )
        return self.routing

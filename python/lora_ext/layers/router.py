"""LoRARouter: the gate of an MoE layer, whose weight PEFT's "all-linear" adapts too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .base import LoRAModule, require_inference
from .routing import Routing
from .sharding import Shard

# Hugging Face's routers that take the softmax of all experts' logits first, and then the k highest.
_KNOWN = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


class LoRARouter(LoRAModule):
    """A top-k router plus the adapter of each token, added to its logits.

    Where no adapter is in use it calls its base; what else looks at the base's results, such as
    ``output_router_logits``, sees them there alone.
    """

    def __init__(
        self, base: nn.Module, num_slots: int, max_rank: int, routing: Routing | None = None
    ) -> None:
        if not is_router(base):
            raise ValueError(f"{type(base).__name__} is no router, expected one of {_KNOWN}")
        weight: Any = base.weight
        num_experts, in_features = weight.shape
        super().__init__(
            base,
            Shard.whole(in_features),
            [Shard.whole(num_experts)],
            num_slots,
            max_rank,
            routing,
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``[T, E]``, weights ``[T, k]`` and experts ``[T, k]`` of ``[..., K]``."""
        x = hidden_states.reshape(-1, self.in_features)
        # The rows' tokens come one behind the other: as many rows of one token.
        plan = self._plan(torch.Size((x.shape[0], 1)))
        if plan is None:
            result: tuple[Tensor, Tensor, Tensor] = self.base(hidden_states)
            return result
        logits = functional.linear(x, self.weight)
        require_inference(logits)
        ops.lora_apply_(
            logits,
            x.to(self.lora_a.dtype),
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            plan,
            output_slices=self.output_sizes,
            max_rank=self.max_rank,
        )
        base: Any = self.base
        weights, experts = torch.topk(logits.softmax(dim=-1, dtype=torch.float32), base.top_k)
        is_mixtral = not hasattr(base, "norm_topk_prob")
        if is_mixtral or base.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights if is_mixtral else weights.to(logits.dtype), experts


def is_router(module: nn.Module) -> bool:
    """Whether it is a router whose logits are known to be ``x @ weight.T``."""
    return type(module).__name__ in _KNOWN and isinstance(getattr(module, "weight", None), Tensor)

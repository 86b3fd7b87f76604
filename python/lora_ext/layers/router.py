"""The gate of an MoE layer, which adapters may target too, as PEFT's "all-linear" does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .linear import LoRALinear
from .routing import BatchPlan, Routing, RowPlans
from .sharding import Shard

# Hugging Face's routers that take the softmax of all experts' logits first, and then the k highest.
_KNOWN = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


class LoRAGate(LoRALinear):
    """The linear layer from tokens to experts' logits; blocks give it their tokens flattened."""

    def _plan_from(self, source: RowPlans | BatchPlan, shape: torch.Size) -> Tensor | None:
        # The rows' tokens come one behind the other: as many rows of one token.
        return source.plan(torch.Size((shape.numel(), 1)))


class LoRARouter(LoRAGate):
    """A top-k router plus the adapter of each token, added to its logits.

    Where no adapter is in use it calls its base; what else looks at the base's results, such as
    ``output_router_logits``, sees them there alone.
    """

    def __init__(
        self, base: nn.Module, num_slots: int, max_rank: int, routing: Routing | None = None
    ) -> None:
        if not is_router(base):
            raise ValueError(f"{type(base).__name__} is no router, expected one of {_KNOWN}")
        router: Any = base
        num_experts, in_features = router.weight.shape
        super().__init__(
            router,
            num_slots,
            max_rank,
            routing,
            inputs=Shard.whole(in_features),
            outputs=[Shard.whole(num_experts)],
        )

    def forward(  # type: ignore[override]  # a router's results, not a linear layer's
        self, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``[T, E]``, weights ``[T, k]`` and experts ``[T, k]`` of ``[..., K]``."""
        x = hidden_states.reshape(-1, self.in_features)
        if self._plan(x.shape[:1]) is None:
            result: tuple[Tensor, Tensor, Tensor] = self.base(hidden_states)
            return result
        logits = self._add_adapters(functional.linear(x, self.weight), x)
        base: Any = self.base
        weights, experts = torch.topk(logits.softmax(dim=-1, dtype=torch.float32), base.top_k)
        is_mixtral = not hasattr(base, "norm_topk_prob")
        if is_mixtral or base.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights if is_mixtral else weights.to(logits.dtype), experts


def is_router(module: nn.Module) -> bool:
    """Whether it is a router whose logits are known to be ``x @ weight.T``."""
    return type(module).__name__ in _KNOWN and isinstance(getattr(module, "weight", None), Tensor)

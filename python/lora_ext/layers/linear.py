"""LoRALinear: a linear layer in which every row of the batch has its own adapter, or none."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .base import LoRAModule, require_inference
from .routing import Routing


class LoRALinear(LoRAModule):
    """``nn.Linear`` plus the adapter of each token: y += scaling * (x A^T) B^T, in place.

    ``lora_a`` is ``[L, R, K]``, ``lora_b`` ``[L, N, R]``.
    """

    def __init__(
        self, base: nn.Linear, num_slots: int, max_rank: int, routing: Routing | None = None
    ) -> None:
        super().__init__(base, base.in_features, base.out_features, num_slots, max_rank, routing)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for x ``[..., K]``; tokens are routed by the leading dimensions."""
        y: Tensor = self.base(x)
        plan = self._plan(x.shape[:-1])
        if plan is None:
            return y
        require_inference(y)
        ops.lora_apply_(
            y.view(-1, self.out_features),
            x.reshape(-1, self.in_features).to(self.lora_a.dtype),
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            plan,
            output_slices=[self.out_features],
            max_rank=self.max_rank,
        )
        return y


class LoRALMHead(LoRALinear):
    """The output projection; its rows may be pruned to the tokens whose logits are wanted."""

    def _plan(self, shape: torch.Size) -> Tensor | None:
        # Some models hand over [rows, K]: the last token of each row.
        return super()._plan(torch.Size((*shape, 1)) if len(shape) == 1 else shape)

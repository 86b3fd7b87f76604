"""LoRALinear: a linear layer in which every row of the batch has its own adapter, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import LoRAModule
from .routing import Routing
from .sharding import Shard, TensorParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoRALinear(LoRAModule):
    """``nn.Linear`` plus the adapter of each token: y += scaling * (x A^T) B^T.

    In place, but where autograd records it: x, the base weight and, once ``requires_grad_`` is
    called on them, ``lora_a`` and ``lora_b`` get their gradients.

    Without shards it is a layer that every process has whole, whatever the others do. Subclasses
    say which part of a layer ``base`` is, and what the ranks exchange.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        inputs: Shard | None = None,
        outputs: Sequence[Shard] | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__(
            base,
            inputs if inputs is not None else Shard.whole(base.in_features),
            outputs if outputs is not None else [Shard.whole(base.out_features)],
            num_slots,
            max_rank,
            routing,
            parallel,
        )

    @classmethod
    def _cut(
        cls, full: nn.Linear, group: ProcessGroup | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        return full, {}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for x ``[..., K]``; tokens are routed by the leading dimensions."""
        y = self._with_adapters(x) if self._is_plain_product(x) else None
        return self._add_adapters(self.base(x), x) if y is None else y

    def _is_plain_product(self, x: Tensor) -> bool:
        """Whether ``base`` is nothing but a product with x, which the GPU can do with the adapters
        in one go: on the CPU that would gain nothing."""
        base = self.base
        return (
            x.is_cuda
            and type(base) is nn.Linear
            and "forward" not in vars(base)
            and not (base._forward_hooks or base._forward_pre_hooks)
            and x.dtype == base.weight.dtype == self.lora_a.dtype
            and not torch.is_autocast_enabled("cuda")
            and not ops.records_grad(x, *base.parameters(), self.lora_a, self.lora_b)
        )

    def _with_adapters(self, x: Tensor) -> Tensor | None:
        """Return base output and adapters together; None: there is nothing to add."""
        plan = self._plan(x.shape[:-1])
        if plan is None or not self.out_features:
            return None
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return ops.lora_linear(
            x,
            self.weight,
            bias,
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            plan,
            output_slices=self.output_sizes,
            max_rank=self.max_rank,
        )

    def _add_adapters(self, y: Tensor, x: Tensor) -> Tensor:
        """Add to the base output y ``[..., >= N]``, whose further columns stay as they are."""
        plan = self._plan(x.shape[:-1])
        if plan is None or not self.out_features:
            return y
        self.parallel.require_inference(y, self.lora_a, self.lora_b)
        training = ops.records_grad(y, self.lora_a, self.lora_b)
        result = (ops.lora_apply if training else ops.lora_apply_)(
            y.view(-1, y.shape[-1]),
            x.reshape(-1, self.in_features).to(self.lora_a.dtype),
            [self.lora_a],
            [self.lora_b],
            self.ranks,
            self.scalings,
            plan,
            output_slices=self.output_sizes,
            max_rank=self.max_rank,
        )
        return y if result is None else result.view(y.shape)

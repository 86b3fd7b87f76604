"""LoRAEmbedding: an embedding in which every row of the batch has its own adapter, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .base import LoRAModule, require_inference
from .routing import Routing
from .sharding import Shard, TensorParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoRAEmbedding(LoRAModule):
    """``nn.Embedding`` plus the adapter of each token: y += scaling * A[:, id] B^T, in place.

    ``lora_a`` is ``[L, V, R]``, so that one id's values lie side by side; ``lora_b`` ``[L, D, R]``.
    """

    _whole_type: ClassVar[type[nn.Module]] = nn.Embedding

    def __init__(
        self,
        base: nn.Embedding,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        inputs: Shard | None = None,
        parallel: TensorParallel | None = None,
    ) -> None:
        super().__init__(
            base,
            inputs if inputs is not None else Shard.whole(base.num_embeddings),
            [Shard.whole(base.embedding_dim)],
            num_slots,
            max_rank,
            routing,
            parallel,
        )

    @classmethod
    def _cut(
        cls, full: nn.Embedding, group: ProcessGroup | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        return full, {}

    def _shape_a(self) -> tuple[int, int, int]:
        return (self.num_slots, self.in_features, self.max_rank)

    def _part_of_base(self, given: Tensor) -> Tensor | None:
        if given.shape != (self.inputs.full, self.out_features):
            return None
        return self.inputs.of(given, 0)

    @torch.no_grad()
    def write_shard(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy what ``shard`` returned into a slot, which must have rank 0."""
        rank = lora_b.shape[1]
        self.lora_a[slot, :, :rank].copy_(lora_a.t())
        self.lora_b[slot, :, :rank].copy_(lora_b)

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``[..., D]`` for int32 or int64 ids ``[...]``."""
        return self._add_adapters(self.base(ids), ids)

    def _add_adapters(self, y: Tensor, ids: Tensor) -> Tensor:
        """Add to the base output y ``[..., D]``."""
        plan = self._plan(ids.shape)
        if plan is None:
            return y
        require_inference(y, self.lora_a, self.lora_b)
        ops.lora_embedding_apply_(
            y.view(-1, self.out_features),
            ids.reshape(-1),
            self.lora_a.transpose(1, 2),
            self.lora_b,
            self.ranks,
            self.scalings,
            plan,
            vocab_start=self.inputs.start,
        )
        return y

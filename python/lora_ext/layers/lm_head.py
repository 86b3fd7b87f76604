"""LoRALMHead: the output projection, of whose vocabulary each rank may have a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .linear import LoRALinear
from .routing import BatchPlan, Routing, RowPlans
from .sharding import Shard, TensorParallel, cut_linear, vocabulary_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoRALMHead(LoRALinear):
    """The output projection; its rows may be pruned to the tokens whose logits are wanted.

    Where requests are not told apart by the shape of the input, pruned rows need a batch of their
    own: ``routing.using(batch, lm_head=...)``.

    Args:
        base: this rank's rows of the vocabulary, the same number on all ranks; rows behind the
            vocabulary are padding.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        group: the ranks; None: this process has all of the vocabulary.
        vocab_size: logits of the whole layer; None: the rows of all ranks, without padding.
        logits_dtype: None: that of the weights. float32 over half-precision weights: the product's
            float32 sums are the logits, never rounded to half precision.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        group: ProcessGroup | None = None,
        vocab_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        parallel = TensorParallel(group)
        if vocab_size is None:
            vocab_size = base.out_features * parallel.size
        rows = Shard.of_rows(vocab_size, base.out_features, parallel.size, parallel.rank)
        super().__init__(base, num_slots, max_rank, routing, outputs=[rows], parallel=parallel)
        self.vocab_size = vocab_size
        self.logits_dtype = logits_dtype

    @classmethod
    def _cut(
        cls,
        full: nn.Linear,
        group: ProcessGroup | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> tuple[nn.Linear, dict[str, Any]]:
        parallel = TensorParallel(group)
        rows = vocabulary_rows(full.out_features, parallel.size)
        held = Shard.of_rows(full.out_features, rows, parallel.size, parallel.rank)
        shard = cut_linear(full, Shard.whole(full.in_features), [held], rows=rows)
        vocab_size = full.out_features
        return shard, {"group": group, "vocab_size": vocab_size, "logits_dtype": logits_dtype}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., vocab_size]``, on every rank, for x ``[..., K]``."""
        logits = self.parallel.all_gather(self._add_adapters(self._base_logits(x), x))
        return logits[..., : self.vocab_size]

    def _base_logits(self, x: Tensor) -> Tensor:
        weight, wanted = self.weight, self.logits_dtype
        halves = (torch.bfloat16, torch.float16)
        if (
            type(self.base) is not nn.Linear
            or wanted != torch.float32
            or weight.dtype not in halves
        ):
            y: Tensor = self.base(x)
            return y if wanted is None else y.to(wanted)
        rows = x.reshape(-1, self.in_features).to(weight.dtype)
        if weight.is_cuda:
            logits = torch.mm(rows, weight.t(), out_dtype=wanted)
        else:  # where mm rounds its sums to the inputs' dtype
            logits = rows.to(wanted) @ weight.to(wanted).t()
        if self.base.bias is not None:
            logits += self.base.bias
        return logits.view(*x.shape[:-1], -1)

    def _plan_from(self, source: RowPlans | BatchPlan, shape: torch.Size) -> Tensor | None:
        return source.lm_head_plan(shape)

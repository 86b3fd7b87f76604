"""One linear layer's adapters for the tokens of one batch: behind the base layer, or beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..compat import first_rows
from .batch_info import LoRABatchInfo


class Site(NamedTuple):
    """What is added at a layer.

    Attributes:
        info: the batch that the rows of x belong to.
        x: ``[T, K]``, of the weights' dtype.
        lora_a, lora_b: packed weights.
        widths: output features of each slice.
    """

    info: LoRABatchInfo
    x: Tensor
    lora_a: Tensor
    lora_b: Tensor
    widths: list[int]

    @property
    def is_active(self) -> bool:
        """Whether there is anything to add, now or in a later replay of a graph."""
        return self.lora_b.numel() > 0 and (self.info.use_cuda_graph or self.info.has_active_lora)

    def add_to(self, output: Tensor, *, batch_invariant: bool) -> None:
        """Shrink and expand in one operator."""
        ops.lora_apply_(
            output,
            self.x,
            [self.lora_a],
            [first_rows(self.lora_b, sum(self.widths))],
            self.info.lora_ranks,
            self.info.scalings,
            self.info.plan,
            output_slices=self.widths,
            max_rank=self.lora_b.shape[-1],
            batch_invariant=batch_invariant,
        )

    def run_beside(
        self, base_fn: Callable[[], Tensor], *, batch_invariant: bool, overlap: bool
    ) -> Tensor:
        """Run the base layer with the shrink beside it, and expand into its result; where no graph
        is captured, only with ``overlap``."""
        lora_a = [self.lora_a]
        rest = (self.info.lora_ranks, self.info.scalings, self.info.plan)
        max_rank = self.lora_b.shape[-1]
        forked = ops.lora_fork(
            self.x,
            lora_a,
            *rest,
            output_slices=self.widths,
            max_rank=max_rank,
            batch_invariant=batch_invariant,
            overlap=overlap,
        )
        try:
            output = base_fn()
        except BaseException:
            # A GPU's shrink may be at work on what is freed now. A capture has failed anyway.
            if not self.x.is_cpu:
                with suppress(RuntimeError):
                    torch.accelerator.synchronize(self.x.device)
            raise
        ops.lora_join_(
            output,
            forked,
            self.x,
            lora_a,
            [first_rows(self.lora_b, sum(self.widths))],
            *rest,
            output_slices=self.widths,
            max_rank=max_rank,
            batch_invariant=batch_invariant,
            overlap=overlap,
        )
        return output

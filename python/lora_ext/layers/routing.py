"""Which plan a layer uses: one Routing is shared by all layers of a model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..batch import LoRABatch


class RowPlans:
    """Plans of a batch given as rows: one slot per row, and every token of a row has its slot.

    A layer's input ``[rows, tokens, ...]`` says which plan it needs, so prefill, decode and an
    lm_head that sees only the last tokens of each row all find theirs. Where a batch has grown by
    a factor (beam search, several sequences per prompt), row i became rows i * factor and on.

    Args:
        slots: slot per row, -1 for none.
        num_slots: L, the slots of the layers.
        device: where the layers run.
    """

    KEPT_SHAPES = 8  # shapes whose plans are kept; one forward of a decoder has two

    static = False

    def __init__(self, slots: Sequence[int], num_slots: int, device: torch.device) -> None:
        self._slots = np.asarray(slots, np.int32)
        self._num_slots = num_slots
        self._device = device
        self._active = bool((self._slots >= 0).any())
        self._batches: OrderedDict[int, LoRABatch] = OrderedDict()  # by their tokens

    def plan(self, shape: torch.Size) -> Tensor | None:
        """Return the plan for an input of ``shape`` ``[rows, tokens]``; None: no adapter at all.

        Raises:
            ValueError: the input has no rows, or their number is no multiple of the rows given.
        """
        if not self._active:
            return None
        if len(shape) != 2:
            raise ValueError(
                f"a layer got an input of shape {list(shape)} beside its features, expected "
                "[rows, tokens]: where rows are flattened or regrouped, adapters per row cannot be "
                "told apart (leave such modules out with target_modules, or route a LoRABatch)"
            )
        if shape[0] % len(self._slots):
            raise ValueError(
                f"the batch has {shape[0]} rows, which is no multiple of the {len(self._slots)} "
                "adapters given for its rows"
            )
        return self._batch(shape.numel()).plan

    def token_slots(self, num_tokens: int) -> Tensor | None:
        """Return the slot of each token of rows that were flattened; None: no adapter at all.

        Raises:
            ValueError: the tokens do not divide among the rows given.
        """
        if not self._active:
            return None
        if num_tokens % len(self._slots):
            raise ValueError(
                f"the batch has {num_tokens} tokens, which do not divide among the "
                f"{len(self._slots)} rows that adapters were given for"
            )
        return self._batch(num_tokens).token_slots

    def lm_head_plan(self, shape: torch.Size) -> Tensor | None:
        """Return the plan for lm_head; some models give it ``[rows]``: the last token of each."""
        return self.plan(torch.Size((*shape, 1)) if len(shape) == 1 else shape)

    def _batch(self, num_tokens: int) -> LoRABatch:
        """Return the batch in which each row given has as many of the tokens as any other.

        That is its plan for every shape ``[rows, tokens]``, also where rows have multiplied.
        """
        batch = self._batches.get(num_tokens)
        if batch is None:
            # The oldest buffer serves again where it is large enough: its readers were launched
            # before.
            if len(self._batches) >= self.KEPT_SHAPES:
                batch = self._batches.popitem(last=False)[1]
            if batch is None or batch.max_tokens < num_tokens:
                batch = LoRABatch(num_tokens, self._num_slots, self._device)
            rows = len(self._slots)
            batch.update(self._slots, seg_lens=np.full(rows, num_tokens // rows))
            self._batches[num_tokens] = batch
        return batch


class BatchPlan:
    """The plan of one LoRABatch for every input: flattened tokens, as engines have them.

    Args:
        batch: the tokens that the layers see.
        lm_head: the rows that lm_head sees; None: all of them.
    """

    def __init__(self, batch: LoRABatch, lm_head: LoRABatch | None = None) -> None:
        self._batch = batch
        self._lm_head = lm_head
        self.static = batch.static

    def plan(self, shape: torch.Size) -> Tensor | None:
        """Return the batch's plan; None where the batch uses no adapter and no graph needs it."""
        return _plan_in_force(self._batch)

    def token_slots(self, num_tokens: int) -> Tensor | None:
        """Return the slot of each token; None where ``plan`` has none."""
        return None if _plan_in_force(self._batch) is None else self._batch.token_slots

    def lm_head_plan(self, shape: torch.Size) -> Tensor | None:
        """Return the plan of the rows that lm_head sees.

        Raises:
            ValueError: they are fewer than the batch has tokens, and nobody said which.
        """
        if self._lm_head is not None:
            return _plan_in_force(self._lm_head)
        batch = self._batch
        if not batch.static and batch.num_tokens is not None and shape.numel() < batch.num_tokens:
            raise ValueError(
                f"lm_head got {shape.numel()} rows of a batch of {batch.num_tokens} tokens: give "
                "the slots of those that are left as routing.using(batch, lm_head=...)"
            )
        return self.plan(shape)


def _plan_in_force(batch: LoRABatch) -> Tensor | None:
    return batch.plan if batch.static or batch.has_active_lora else None


class Routing:
    """The source of plans in force, for each thread: without one, layers compute the base model."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()  # a copied model routes on its own

    @property
    def source(self) -> RowPlans | BatchPlan | None:
        """Where the layers get their plans from in this thread."""
        source: RowPlans | BatchPlan | None = getattr(self._local, "source", None)
        return source

    @contextmanager
    def using(
        self, source: RowPlans | LoRABatch, *, lm_head: LoRABatch | None = None
    ) -> Iterator[None]:
        """Route this thread's calls by ``source`` inside a ``with`` block; the innermost counts.

        Args:
            source: of the batch.
            lm_head: beside a LoRABatch, the rows that lm_head sees where those are not all: the
                last token of each request, or any others.
        """
        before = self.source
        if isinstance(source, LoRABatch):
            self._local.source = BatchPlan(source, lm_head)
        elif lm_head is not None:
            raise ValueError("lm_head goes with a LoRABatch: RowPlans know lm_head's rows by shape")
        else:
            self._local.source = source
        try:
            yield
        finally:
            self._local.source = before

"""LoRAVocabParallelEmbedding: an embedding of whose vocabulary each rank has a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..batch import PlanLayout
from .embedding import LoRAEmbedding
from .routing import Routing
from .sharding import Shard, TensorParallel, cut_embedding, vocabulary_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoRAVocabParallelEmbedding(LoRAEmbedding):
    """An embedding of whose vocabulary each rank has a part; one all-reduce puts rows together.

    An id of another rank's part gives exact zeros here, adapter included, so that the sum has the
    bits of the rank that holds it. A is cut along the vocabulary as the base weight is, B is whole.

    Added tokens have the ids behind the vocabulary, and each adapter its own: further columns of A,
    rows of its own in the base's place (``write_added_tokens``), or both. The last rank holds them.
    An id that nobody holds gives zeros.

    Args:
        base: this rank's rows of the vocabulary, the same number on all ranks; rows behind the
            vocabulary are padding.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        group: the ranks; None: this process has all of the vocabulary.
        vocab_size: ids of the whole layer, without added tokens; None: the rows of all ranks,
            without padding.
        num_added_tokens: X, the most tokens that an adapter can add.

    Attributes:
        added_rows: ``[L, X, D]`` on the last rank, where X > 0, else None.
        num_added: int32 ``[L]``, rows of a slot that are in force.
    """

    added_rows: Tensor | None
    num_added: Tensor

    def __init__(
        self,
        base: nn.Embedding,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        group: ProcessGroup | None = None,
        vocab_size: int | None = None,
        num_added_tokens: int = 0,
    ) -> None:
        parallel = TensorParallel(group)
        rows = base.num_embeddings
        if vocab_size is None:
            vocab_size = rows * parallel.size
        held = Shard.of_rows(vocab_size, rows, parallel.size, parallel.rank)
        # The last rank's part ends with the vocabulary, however little it is.
        added = num_added_tokens if parallel.rank == parallel.size - 1 else 0
        inputs = Shard(vocab_size + num_added_tokens, held.start, held.size + added)
        super().__init__(base, num_slots, max_rank, routing, inputs=inputs, parallel=parallel)
        self.vocab_size = vocab_size
        self.num_added_tokens = num_added_tokens
        self._held = held
        weight = self.weight
        with torch.inference_mode(False):
            shape = (num_slots, added, self.out_features)
            added_rows = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            num_added = torch.zeros(num_slots, dtype=torch.int32, device=weight.device)
        self.register_buffer("added_rows", added_rows if added else None, persistent=False)
        self.register_buffer("num_added", num_added, persistent=False)

    @classmethod
    def _cut(
        cls,
        full: nn.Embedding,
        group: ProcessGroup | None = None,
        num_added_tokens: int = 0,
    ) -> tuple[nn.Embedding, dict[str, Any]]:
        parallel = TensorParallel(group)
        vocab_size = full.num_embeddings
        rows = vocabulary_rows(vocab_size, parallel.size)
        held = Shard.of_rows(vocab_size, rows, parallel.size, parallel.rank)
        layout = {"vocab_size": vocab_size, "num_added_tokens": num_added_tokens}
        return cut_embedding(full, held, rows), {"group": group, **layout}

    def _widths_of_a(self) -> range:
        return range(self.vocab_size, self.inputs.full + 1)

    def _cut_a(self, lora_a: Tensor) -> Tensor:
        # A may have columns of added tokens, up to X; those that it lacks are 0.
        here = lora_a[:, self.inputs.start : self.inputs.start + self.inputs.size]
        return nn.functional.pad(here, (0, self.inputs.size - here.shape[1]))

    def _part_of_base(self, given: Tensor) -> Tensor | None:
        if given.shape != (self.vocab_size, self.out_features):
            return None
        return self._held.of(given, 0)

    @torch.no_grad()
    def write_added_tokens(self, slot: int, rows: Tensor) -> None:
        """Put a slot's own rows ``[x, D]`` for ids V to V + x - 1 in force, until it is cleared.

        Raises:
            ValueError: there is no room for as many, or they are of another width.
        """
        if len(rows) > self.num_added_tokens or rows.shape[1] != self.out_features:
            raise ValueError(
                f"the rows of added tokens are {list(rows.shape)}, the model has room for "
                f"[{self.num_added_tokens}, {self.out_features}]"
            )
        if self.added_rows is not None:
            self.added_rows[slot, : len(rows)].copy_(rows)
            self.num_added[slot] = len(rows)
            self._slots_in_use.add(slot)

    @torch.no_grad()
    def set_slot(self, slot: int, rank: int, scaling: float) -> None:
        """Put what a slot holds in force; rank 0 takes it out, rows of added tokens included."""
        super().set_slot(slot, rank, scaling)
        if rank == 0:
            self.num_added[slot] = 0

    def forward(self, ids: Tensor) -> Tensor:
        """Return ``[..., D]``, on every rank, for int32 or int64 ids ``[...]``."""
        local = ids - self._held.start
        held = (local >= 0) & (local < self._held.size)
        # Whatever lies in the row that stands in for the others, padding perhaps, is overwritten.
        y: Tensor = self.base(torch.where(held, local, 0))
        y = y.masked_fill(~held[..., None], 0.0)
        return self.parallel.all_reduce(self._add_adapters(self._with_added_rows(y, ids), ids))

    def _with_added_rows(self, y: Tensor, ids: Tensor) -> Tensor:
        """Return y with the rows of added tokens, which are 0 in it."""
        plan = None if self.added_rows is None else self._plan(ids.shape)
        if plan is None:
            return y
        assert self.added_rows is not None
        layout = PlanLayout.of(ops.plan_max_tokens(plan, self.num_slots), self.num_slots)
        slots = plan[layout.token_slots : layout.token_slots + ids.numel()]
        slot = slots.clamp(min=0).long()
        index = ids.reshape(-1) - self.vocab_size
        theirs = (slots >= 0) & (index >= 0) & (index < self.num_added[slot])
        rows = self.added_rows[slot, index.clamp(0, self.num_added_tokens - 1)]
        return torch.where(theirs[:, None], rows, y.view(rows.shape)).view(y.shape)

"""Which token of a batch uses which adapter, and how large the adapters are."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MIXED_RANKS = (8, 16, 32, 64)
_SCALINGS = (2.0, 1.0, 0.5, 1.5)
MIN_SLOTS = 8


@dataclass(frozen=True)
class Workload:
    """A batch over a pool of slots.

    Attributes:
        label: how the tokens share the adapters, for a problem's name.
        token_slots: slot of each token; -1: none.
        ranks: rank of each slot.
        rank_label: ``ranks`` in a problem's name.
        decode: whether each token is a request of its own (else each run of one slot is).
    """

    label: str
    token_slots: tuple[int, ...]
    ranks: tuple[int, ...]
    rank_label: str
    decode: bool

    def __str__(self) -> str:
        return f"T{self.num_tokens} {self.label} r{self.rank_label}"

    @property
    def num_tokens(self) -> int:
        return len(self.token_slots)

    @property
    def num_slots(self) -> int:
        return len(self.ranks)

    @property
    def max_rank(self) -> int:
        return max(self.ranks)

    @cached_property
    def scalings(self) -> tuple[float, ...]:
        return tuple(_SCALINGS[i % len(_SCALINGS)] for i in range(self.num_slots))

    @cached_property
    def tokens_of(self) -> dict[int, list[int]]:
        """The tokens of each slot in use, by slot in ascending order."""
        tokens: dict[int, list[int]] = {}
        for token, slot in enumerate(self.token_slots):
            if slot >= 0:
                tokens.setdefault(slot, []).append(token)
        return dict(sorted(tokens.items()))

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """(length, slot) of each request."""
        if self.decode:
            return [(1, slot) for slot in self.token_slots]
        merged: list[tuple[int, int]] = []
        for slot in self.token_slots:
            if merged and merged[-1][1] == slot:
                merged[-1] = (merged[-1][0] + 1, slot)
            else:
                merged.append((1, slot))
        return merged


def ranks_of(rank: str, num_slots: int) -> tuple[int, ...]:
    """Rank of each slot: "16" is 16 for all, "mixed" cycles through `MIXED_RANKS`."""
    if rank == "mixed":
        return tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(num_slots))
    return (int(rank),) * num_slots


def make_workload(tokens: int, adapters: int, rank: str, mix: str) -> Workload:
    """A batch of ``tokens`` over ``adapters``; its slots are those of the pool's first ones.

    ``mix``: "even" gives token t the adapter t modulo ``adapters`` (0 adapters: none of them any),
    "zipf" draws with weights 1 / (i + 1), "segments" cuts the batch into one run per adapter, of
    unequal lengths that are multiples of 8 where the batch is large enough.
    """
    num_slots = max(MIN_SLOTS, adapters)
    ranks = ranks_of(rank, num_slots)
    rng = random.Random(tokens * 1000 + adapters)
    if adapters == 0:
        return Workload("base", (-1,) * tokens, ranks, rank, mix != "segments")
    if mix == "even":
        slots = [token % adapters for token in range(tokens)]
        used = min(adapters, tokens)
        label = "shared" if used == 1 else "distinct" if used == tokens else f"{adapters}even"
    elif mix == "zipf":
        weights = [1 / (i + 1) for i in range(adapters)]
        slots, label = rng.choices(range(adapters), weights, k=tokens), f"zipf{adapters}"
    elif mix == "segments":
        slots, label = _segments(tokens, adapters, rng), f"{adapters}seg"
    else:
        raise ValueError(f"mix is {mix!r}, expected 'even', 'zipf' or 'segments'")
    return Workload(label, tuple(slots), ranks, rank, mix != "segments")


def _segments(tokens: int, adapters: int, rng: random.Random) -> list[int]:
    unit = 8 if tokens >= 16 * adapters else 1
    inner: Sequence[int] = range(1, tokens // unit)
    cuts = sorted(rng.sample(inner, min(adapters - 1, len(inner))))
    ends = [*(unit * cut for cut in cuts), tokens]
    return [bisect_right(ends, token) for token in range(tokens)]

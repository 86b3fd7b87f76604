"""What `plan_batch_` and `moe_lora_info` compute, in Python, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

TILE_TOKENS = 16
WIDE_TILE_TOKENS = 64
HEADER_SIZE = 16


@dataclass(frozen=True)
class Plan:
    """A batch plan, field by field as csrc/common/plan.h documents it, without unused ends.

    Tiles are (slot, start, count): tokens `permutation[start : start + count]`.
    """

    max_tokens: int
    num_slots: int
    token_slots: list[int]
    permutation: list[int]
    slot_indptr: list[int]
    seg_indptr: list[int]
    seg_slots: list[int]
    enabled: list[int]
    tiles: list[tuple[int, int, int]]
    wide_tiles: list[tuple[int, int, int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, without padding."""
        return len(self.token_slots)

    def fields(self) -> dict[str, Tensor]:
        """Every field at its full capacity, int32, by its name in csrc/common/plan.h."""
        tokens, slots = self.max_tokens, self.num_slots
        header = [
            self.num_tokens,
            len(self.seg_slots),
            sum(self.enabled),
            len(self.permutation),
            len(self.tiles),
            len(self.wide_tiles),
        ]
        fields = {
            "header": _padded(header, HEADER_SIZE, 0),
            "tiles": _padded_tiles(self.tiles, tokens // TILE_TOKENS + slots),
            "wide_tiles": _padded_tiles(self.wide_tiles, tokens // WIDE_TILE_TOKENS + slots),
            "token_slots": _padded(self.token_slots, tokens, -1),
            "permutation": _padded(self.permutation, tokens, -1),
            "seg_indptr": _padded(self.seg_indptr, tokens + 1, self.num_tokens),
            "seg_slots": _padded(self.seg_slots, tokens, -1),
            "slot_indptr": self.slot_indptr,
            "enabled": self.enabled,
        }
        return {name: torch.tensor(values, dtype=torch.int32) for name, values in fields.items()}


def plan(
    slots: Sequence[int],
    num_slots: int,
    max_tokens: int,
    *,
    seg_lens: Sequence[int] | None = None,
    seg_indptr: Sequence[int] | None = None,
) -> Plan:
    """The plan of a batch: `slots` per token, or per segment with `seg_lens` or `seg_indptr`.

    `max_tokens` is the plan's capacity, a multiple of 64. Tokens beyond it are dropped, and a slot
    that does not exist counts as -1, as on a device, where nothing can be raised.
    """
    if seg_indptr is not None:
        seg_lens = [end - begin for begin, end in pairwise(seg_indptr)]
    if seg_lens is not None:
        slots = [slot for slot, length in zip(slots, seg_lens, strict=True) for _ in range(length)]
    token_slots = [slot if 0 <= slot < num_slots else -1 for slot in slots[:max_tokens]]

    seg_starts = [t for t, slot in enumerate(token_slots) if t == 0 or slot != token_slots[t - 1]]
    counts = [token_slots.count(slot) for slot in range(num_slots)]
    slot_indptr = list(accumulate(counts, initial=0))
    return Plan(
        max_tokens=max_tokens,
        num_slots=num_slots,
        token_slots=token_slots,
        # Sorting is stable: within a slot the tokens keep their order.
        permutation=sorted(
            (t for t, slot in enumerate(token_slots) if slot >= 0), key=token_slots.__getitem__
        ),
        slot_indptr=slot_indptr,
        seg_indptr=[*seg_starts, len(token_slots)],
        seg_slots=[token_slots[t] for t in seg_starts],
        enabled=[int(count > 0) for count in counts],
        tiles=_tiles(slot_indptr, TILE_TOKENS),
        wide_tiles=_tiles(slot_indptr, WIDE_TILE_TOKENS),
    )


def _tiles(slot_indptr: Sequence[int], tile_tokens: int) -> list[tuple[int, int, int]]:
    return [
        (slot, start, min(tile_tokens, end - start))
        for slot, (begin, end) in enumerate(pairwise(slot_indptr))
        for start in range(begin, end, tile_tokens)
    ]


def _padded(values: Sequence[int], size: int, fill: int) -> list[int]:
    return [*values, *[fill] * (size - len(values))]


def _padded_tiles(tiles: Sequence[tuple[int, int, int]], size: int) -> list[list[int]]:
    return [*([*tile, 0] for tile in tiles), *([-1, 0, 0, 0] for _ in range(size - len(tiles)))]


def moe_lora_info(
    seg_indptr: Tensor, seg_slots: Tensor, ranks: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """token_slots [num_tokens] and enabled [L], both int32.

    `token_slots[t]` is the slot of the segment that covers t if its rank is not 0, else -1; also -1
    behind the last segment. `enabled[l]` is 1 where a token has slot l.
    """
    token_slots = torch.full((num_tokens,), -1, dtype=torch.int32, device=ranks.device)
    enabled = torch.zeros(ranks.numel(), dtype=torch.int32, device=ranks.device)
    rank_of, bounds = ranks.tolist(), seg_indptr.tolist()
    for begin, end, slot in zip(bounds, bounds[1:], seg_slots.tolist(), strict=False):
        if slot >= 0 and rank_of[slot] > 0 and begin < min(end, num_tokens):
            token_slots[begin:end] = slot
            enabled[slot] = 1
    return token_slots, enabled

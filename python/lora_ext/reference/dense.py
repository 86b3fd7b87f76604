"""The dense ops and the embedding in fp64, one slot at a time, in any weight layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ---- one adapter's weights, in any layout


def factors_a(
    lora_a: Sequence[Tensor],
    slot: int,
    rank: int,
    num_slices: int,
    in_features: int,
    a_offsets: Tensor | None = None,
) -> list[Tensor]:
    """The S matrices A_i [r, K] of a slot, as views.

    `lora_a` is packed (one [L, S * R, K]), per slice (S of [L, R, K] or [L, 1, R, K]) or flat (one
    1-D buffer with `a_offsets` [L] int64, where the slot's [S * r, K] lie at its offset).
    """
    if a_offsets is not None:
        start = int(a_offsets[slot])
        stacked = lora_a[0][start : start + num_slices * rank * in_features]
    elif len(lora_a) == 1:
        stacked = lora_a[0][slot].reshape(-1, in_features)[: num_slices * rank]
    else:
        return [a[slot].reshape(-1, in_features)[:rank] for a in lora_a]
    return list(stacked.reshape(num_slices, rank, in_features))


def factors_b(
    lora_b: Sequence[Tensor],
    slot: int,
    rank: int,
    output_slices: Sequence[int],
    b_offsets: Tensor | None = None,
) -> list[Tensor]:
    """The S matrices B_i [N_i, r] of a slot, as views.

    `lora_b` is packed (one [L, N, R]), per slice (S of [L, N_i, R] or [L, 1, N_i, R]) or flat (one
    1-D buffer with `b_offsets` [L] int64, where the slot's [N, r] lie at its offset).
    """
    if b_offsets is not None:
        start = int(b_offsets[slot])
        stacked = lora_b[0][start : start + sum(output_slices) * rank].reshape(-1, rank)
    elif len(lora_b) == 1:
        stacked = lora_b[0][slot].reshape(sum(output_slices), lora_b[0].shape[-1])[:, :rank]
    else:
        widths = zip(lora_b, output_slices, strict=True)
        return [b[slot].reshape(width, b.shape[-1])[:, :rank] for b, width in widths]
    return list(torch.split(stacked, list(output_slices)))


# ---- fp64, one slot at a time


def shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    num_slices: int,
    max_rank: int,
    a_offsets: Tensor | None = None,
) -> Tensor:
    """The intermediate [T, S * R] in fp64: scaling_l * (x A_i^T), l being the token's slot."""
    xa = x.new_zeros(x.shape[0], num_slices * max_rank, dtype=torch.float64)
    for slot, rank, tokens in _active(token_slots, ranks):
        a = torch.cat(factors_a(lora_a, slot, rank, num_slices, x.shape[1], a_offsets))
        xa[tokens, : num_slices * rank] = float(scalings[slot]) * (
            x[tokens].double() @ a.double().T
        )
    return xa


def expand(
    y: Tensor,
    xa: Tensor,
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    output_slices: Sequence[int],
    b_offsets: Tensor | None = None,
) -> Tensor:
    """y [T, >= N] plus xa_i B_i^T in the columns of slice i, in fp64. `xa` is [T, S * R]."""
    result = y.to(torch.float64, copy=True)
    for slot, rank, tokens in _active(token_slots, ranks):
        column = 0
        for i, b in enumerate(factors_b(lora_b, slot, rank, output_slices, b_offsets)):
            delta = xa[tokens, i * rank : (i + 1) * rank].double() @ b.double().T
            result[tokens, column : column + b.shape[0]] += delta
            column += b.shape[0]
    return result


def apply(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    b_offsets: Tensor | None = None,
) -> Tensor:
    """y [T, >= N] with every token's adapter added, in fp64: `expand` of `shrink`."""
    num_slices = len(output_slices)
    xa = shrink(x, lora_a, ranks, scalings, token_slots, num_slices, max_rank, a_offsets)
    return expand(y, xa, lora_b, ranks, token_slots, output_slices, b_offsets)


def embedding(
    ids: Tensor,
    lora_a: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    vocab_start: int = 0,
    extra_a: Tensor | None = None,
) -> Tensor:
    """The intermediate [T, R] of an embedding in fp64: scaling_l * A[l, :, id].

    `lora_a` is A [L, R, V], for the ids from `vocab_start` on; `extra_a` [L, X, R] holds the X ids
    behind those. Other ids give zeros.
    """
    _, max_rank, vocab = lora_a.shape
    xa = torch.zeros(ids.numel(), max_rank, dtype=torch.float64, device=ids.device)
    num_extra = 0 if extra_a is None else extra_a.shape[1]
    for slot, rank, tokens in _active(token_slots, ranks):
        for token in tokens.tolist():
            local = int(ids[token]) - vocab_start
            if 0 <= local < vocab:
                row = lora_a[slot, :rank, local]
            elif extra_a is not None and vocab <= local < vocab + num_extra:
                row = extra_a[slot, local - vocab, :rank]
            else:
                continue
            xa[token, :rank] = float(scalings[slot]) * row.double()
    return xa


def _active(token_slots: Tensor, ranks: Tensor) -> list[tuple[int, int, Tensor]]:
    """(slot, rank, token indices) of every slot that adds anything."""
    rank_of = ranks.tolist()
    slots = sorted(set(token_slots.tolist()) - {-1})
    return [
        (slot, rank_of[slot], (token_slots == slot).nonzero().flatten())
        for slot in slots
        if rank_of[slot] > 0
    ]

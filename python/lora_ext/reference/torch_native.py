"""The two forms in which inference engines run LoRA in plain torch, right for mixed ranks.

Per segment with `addmm`, where the batch's shape is on the host; and masked over all slots, where
nothing may be read from the device (a captured graph). Packed weights: A `[L, S * R, K]`, B
`[L, N, R]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

# ---- per segment, with addmm


def segmented_shrink(
    x: Tensor,
    lora_a: Tensor,
    seg_lens: Sequence[int],
    seg_slots: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    num_slices: int,
) -> Tensor:
    """The intermediate [T, S * R] in fp32, one addmm (beta 0, alpha = scaling) per segment.

    All of the batch's shape is on the host, so this cannot be captured in a CUDA graph.
    """
    xa = x.new_zeros(x.shape[0], lora_a.shape[1], dtype=torch.float32)
    for start, length, slot in _segments(seg_lens, seg_slots):
        columns = num_slices * ranks[slot]
        if columns == 0:
            continue
        rows = xa[start : start + length, :columns]
        a = lora_a[slot, :columns].float()
        x_rows = x[start : start + length].float()
        rows.copy_(torch.addmm(rows, x_rows, a.T, beta=0, alpha=scalings[slot]))
    return xa


def segmented_expand(
    y: Tensor,
    xa: Tensor,
    lora_b: Tensor,
    seg_lens: Sequence[int],
    seg_slots: Sequence[int],
    ranks: Sequence[int],
    output_slices: Sequence[int],
) -> Tensor:
    """A new y [T, >= N] of y's dtype, one addmm (fp32, beta 1) per segment and slice."""
    result = y.clone()
    for start, length, slot in _segments(seg_lens, seg_slots):
        rank = ranks[slot]
        if rank == 0:
            continue
        column = 0
        for i, width in enumerate(output_slices):
            rows = result[start : start + length, column : column + width]
            b = lora_b[slot, column : column + width, :rank].float()
            # A slice of a slot lies at multiples of its own rank, not of the maximum rank.
            delta_in = xa[start : start + length, i * rank : (i + 1) * rank]
            rows.copy_(torch.addmm(rows.float(), delta_in, b.T))
            column += width
    return result


def _segments(seg_lens: Sequence[int], seg_slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first token, length, slot) of the segments that have tokens and a slot."""
    starts = accumulate(seg_lens, initial=0)
    segments = zip(starts, seg_lens, seg_slots, strict=False)
    return [segment for segment in segments if segment[1] > 0 and segment[2] >= 0]


# ---- masked, over all slots


def masked_shrink(
    x: Tensor, lora_a: Tensor, token_slots: Tensor, ranks: Tensor, scalings: Tensor, num_slices: int
) -> Tensor:
    """The intermediate [T, S * R] in fp32: every slot over every token, the right ones kept.

    Kept by `where`, not by a product with a mask: what lies past a slot's rank, or in a slot that
    nobody uses, may be NaN, and NaN times zero is NaN.
    """
    xa = x.new_zeros(x.shape[0], lora_a.shape[1], dtype=torch.float32)
    columns = torch.arange(lora_a.shape[1], device=x.device)
    for slot in range(lora_a.shape[0]):
        keep = (token_slots == slot)[:, None] & (columns < num_slices * ranks[slot])
        product = scalings[slot] * (x.float() @ lora_a[slot].float().T)
        xa = torch.where(keep, product, xa)
    return xa


def masked_expand(
    y: Tensor,
    xa: Tensor,
    lora_b: Tensor,
    token_slots: Tensor,
    ranks: Tensor,
    output_slices: Sequence[int],
) -> Tensor:
    """A new y [T, >= N] of y's dtype, by the same masks."""
    num_slots, _, max_rank = lora_b.shape
    result = y.float()
    within = torch.arange(max_rank, device=y.device)
    for slot in range(num_slots):
        rank = ranks[slot]
        mine = (token_slots == slot)[:, None]
        column = 0
        for i, width in enumerate(output_slices):
            in_rank = within < rank
            # Both factors are masked: a NaN in either's tail would survive the other's zero.
            source = (i * rank + within).clamp(max=xa.shape[1] - 1).expand(xa.shape[0], -1)
            left = torch.where(in_rank, xa.gather(1, source), 0.0)
            right = torch.where(in_rank, lora_b[slot, column : column + width].float(), 0.0)
            old = result[:, column : column + width]
            updated = torch.where(mine & (rank > 0), old + left @ right.T, old)
            result = torch.cat([result[:, :column], updated, result[:, column + width :]], dim=1)
            column += width
    return torch.where((token_slots >= 0)[:, None], result.to(y.dtype), y)

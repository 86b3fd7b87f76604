"""What the MoE ops compute: routing in Python, deltas in fp64, one (slot, expert) at a time.

T tokens, k choices each: pair p is choice p % k of token p // k, P = T * k. The other symbols are
those of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lora_ext.reference.dense import factors_a, factors_b

TILE_PAIRS = 64
HEADER_SIZE = 16


def moe_groups(
    topk_ids: Tensor,
    token_slots: Tensor,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
) -> dict[tuple[int, int], list[int]]:
    """The routed pairs of every (slot, expert) that has any, in ascending order of both.

    `topk_ids` is [T, k], -1 for a choice that is not routed; `expert_map` takes it to an index of
    the weights' experts, or -1. What is out of range counts as -1, as on a device.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    top_k = topk_ids.shape[1]
    slots, local = token_slots.tolist(), None if expert_map is None else expert_map.tolist()
    for pair, chosen in enumerate(topk_ids.flatten().tolist()):
        slot, expert = slots[pair // top_k], chosen
        if local is not None:
            expert = local[expert] if 0 <= expert < len(local) else -1
        if 0 <= slot < num_slots and 0 <= expert < num_experts:
            groups.setdefault((slot, expert), []).append(pair)
    return dict(sorted(groups.items()))


def moe_routing(
    groups: dict[tuple[int, int], list[int]], num_pairs: int, num_slots: int, num_experts: int
) -> dict[str, Tensor]:
    """The sections of a routing buffer by their name in csrc/common/moe_routing.h, int32.

    `tiles` [capacity, 4] holds (slot, start, count, expert).
    """
    capacity = min(num_pairs, num_pairs // TILE_PAIRS + num_slots * num_experts)
    permutation = [pair for pairs in groups.values() for pair in pairs]
    starts = accumulate((len(pairs) for pairs in groups.values()), initial=0)
    tiles = [
        [slot, first + at, min(TILE_PAIRS, len(pairs) - at), expert]
        for first, ((slot, expert), pairs) in zip(starts, groups.items(), strict=False)
        for at in range(0, len(pairs), TILE_PAIRS)
    ]
    header = [len(permutation), len(groups), len(tiles), HEADER_SIZE + 4 * capacity]
    sections = {
        "header": header + [0] * (HEADER_SIZE - len(header)),
        "tiles": tiles + [[-1, 0, 0, 0]] * (capacity - len(tiles)),
        "permutation": permutation + [-1] * (num_pairs - len(permutation)),
    }
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in sections.items()}


def moe_apply(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    groups: dict[tuple[int, int], list[int]],
    output_slices: Sequence[int],
    column_starts: Sequence[int] | None = None,
    column_stride: int = 1,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """y [P, columns] with the delta of every pair of `groups` added, in fp64.

    `x` is [T, K] or [P, K]. A `[L, E or 1, S * R, K]` (slice i of slot l in rows `i * r_l` and
    following) or S of `[L, E or 1, R, K]`; B `[L, E or 1, N, R]` or S of `[L, E or 1, N_i, R]`.
    """
    result = y.to(torch.float64, copy=True)
    repeats = y.shape[0] // max(x.shape[0], 1)
    if column_starts is None:
        column_starts = list(accumulate(output_slices, initial=0))[:-1]
    for (slot, expert), pairs in groups.items():
        rank = int(ranks[slot])
        if rank == 0:
            continue
        a = factors_a(of_expert(lora_a, expert), slot, rank, len(output_slices), x.shape[1])
        b = factors_b(of_expert(lora_b, expert), slot, rank, output_slices)
        rows = torch.tensor(pairs, device=x.device)
        weights = float(scalings[slot]) * torch.ones(len(pairs), 1, dtype=torch.float64)
        weights = weights.to(x.device)
        if topk_weights is not None:
            weights = weights * topk_weights.flatten()[rows].double()[:, None]
        for i, width in enumerate(output_slices):
            xa = weights * (x[rows // repeats].double() @ a[i].double().T)
            columns = column_starts[i] + column_stride * torch.arange(width, device=x.device)
            result[rows[:, None], columns] += xa @ b[i].double().T
    return result


def of_expert(tensors: Sequence[Tensor], expert: int) -> list[Tensor]:
    """One expert's weights of all slots, in the layouts of the dense ops."""
    return [t[:, expert if t.shape[1] > 1 else 0] for t in tensors]

"""The operators of mixture-of-experts layers; :mod:`lora_ext.ops` is where callers find them.

T tokens choose k of E experts each, which makes P = T * k pairs: pair p is choice ``p % k`` of
token ``p // k``. A pair uses the adapter of its (slot, expert). Other symbols as in
:mod:`lora_ext.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import _library as _library  # registers the operators, or says why it cannot

# As in csrc/common/moe_routing.h.
_TILE_PAIRS = 64
_SHARED_PAIRS = 2048
_HEADER_SIZE = 16

_moe_lora_align = torch.ops.lora_ext.moe_lora_align.default
_moe_lora_align_ = torch.ops.lora_ext.moe_lora_align_.default
_moe_lora_apply_ = torch.ops.lora_ext.moe_lora_apply_.default


def moe_routing_size(max_tokens: int, top_k: int, num_slots: int, num_experts: int) -> int:
    """Elements of a routing buffer for up to ``max_tokens`` tokens (csrc/common/moe_routing.h).

    With P = ``max_tokens * top_k`` that is ``16 + 4 * min(P, P // 64 + num_slots * num_experts) +
    P``, and another ``4 * P`` of scratch where P is above 2,048: never more than a multiple of P,
    however many slots and experts there are.
    """
    pairs = max_tokens * top_k
    tiles = min(pairs, pairs // _TILE_PAIRS + num_slots * num_experts)
    permutation = _HEADER_SIZE + 4 * tiles
    if pairs <= _SHARED_PAIRS:
        return permutation + pairs
    return (permutation + pairs + 1) // 2 * 2 + 4 * pairs


def moe_lora_align(
    topk_ids: Tensor,
    token_slots: Tensor,
    *,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Group the routed pairs of one MoE layer by (slot, expert): int32 ``[moe_routing_size(T, k,
    num_slots, num_experts)]``, which the layer's :func:`moe_lora_apply_` calls share.

    ``topk_ids``
        int32 or int64 ``[T, k]``, contiguous; -1: not routed.
    ``token_slots``
        int32 ``[>= T]``, from :func:`moe_lora_info` or the plan; -1: no adapter, or padding.
    ``num_experts``
        E, the experts that the weights of this process hold.
    ``expert_map``
        int32, global expert id to index of the weights or -1 (expert parallelism); without it
        ``topk_ids`` are such indices.

    Within a group the pairs keep their order, so equal routings give equal bits. Memory grows with
    the pairs alone (:func:`moe_routing_size`), and so does the work. On the CPU bad ids raise; on a
    GPU, where looking would synchronise, what is out of range counts as not routed.
    """
    routing: Tensor = _moe_lora_align(topk_ids, token_slots, num_slots, num_experts, expert_map)
    return routing


def moe_lora_align_(
    routing: Tensor,
    topk_ids: Tensor,
    token_slots: Tensor,
    *,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
) -> None:
    """:func:`moe_lora_align` into a buffer of at least ``moe_routing_size(T, k, num_slots,
    num_experts)`` elements, which all layers can share, as they run in turn."""
    _moe_lora_align_(routing, topk_ids, token_slots, num_slots, num_experts, expert_map)


def moe_lora_apply_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    routing: Tensor,
    *,
    top_k: int,
    output_slices: Sequence[int],
    max_rank: int,
    column_starts: Sequence[int] | None = None,
    column_stride: int = 1,
    topk_weights: Tensor | None = None,
) -> None:
    """``y[p, slice i] += weight_p * scaling_l (x A_{l,e,i}ᵀ) B_{l,e,i}ᵀ`` in place, with the slot l
    and the expert e of pair p.

    ``y``
        ``[T * k, columns]`` or ``[T, k, columns]`` of any of the dtypes; rows may be strided. Rows
        of pairs that are not routed, or have no adapter here, keep their bits.
    ``x``
        ``[T, K]``, one row per token (gate and up), or ``[T * k, K]``, one per pair (down).
    ``lora_a``, ``lora_b``
        Either one tensor: A ``[L, E or 1, S * R, K]``, packed as in the dense ops (slice i of slot
        l in rows ``i * r_l`` and following), B ``[L, E or 1, sum N_i, R]``; or S tensors, A_i ``[L,
        E or 1, R, K]`` (of a pool whose slices lie R rows apart: its views ``a[:, :, i * R : (i +
        1) * R]``), B_i ``[L, E or 1, N_i, R]``. Size 1 or stride 0 in the expert dimension means
        that the experts share it; nothing is ever copied.
    ``ranks``, ``scalings``
        int32 and float32 ``[L]``, of the module: all its experts have one rank.
    ``routing``
        Of :func:`moe_lora_align` for the layer, with the same L and E.
    ``column_starts``, ``column_stride``
        Slice i's column j is ``y[:, column_starts[i] + column_stride * j]``. Without them the
        slices follow each other; swapped gate and up are ``[N, 0]``, interleaved ones ``[0, 1]``
        with a stride of 2.
    ``topk_weights``
        float32 or x's dtype ``[T, k]``, contiguous: the delta of each pair is multiplied by it.

    The intermediate is float32; y is read once, added to in float32 and rounded once. Inference
    only: raises where autograd would record it.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *lora_a, *lora_b)):
        raise RuntimeError(
            "moe_lora_apply_ writes in place and is for inference, but an argument requires grad; "
            "run under torch.no_grad()"
        )
    _moe_lora_apply_(
        y,
        x,
        lora_a,
        lora_b,
        ranks,
        scalings,
        routing,
        top_k,
        output_slices,
        max_rank,
        column_starts,
        column_stride,
        topk_weights,
    )


# ---- fake implementations: the checks of csrc/ops that need no data, and the results' metadata


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _fake_align(topk_ids: Tensor, token_slots: Tensor, expert_map: Tensor | None) -> None:
    _check(
        topk_ids.dim() == 2 and topk_ids.dtype in (torch.int32, torch.int64),
        f"topk_ids must be an int32 or int64 tensor [tokens, top_k], got {topk_ids}",
    )
    for name, tensor in (("token_slots", token_slots), ("expert_map", expert_map)):
        _check(
            tensor is None or (tensor.dim() == 1 and tensor.dtype == torch.int32),
            f"{name} must be a 1-D int32 tensor, got {tensor}",
        )


@torch.library.register_fake("lora_ext::moe_lora_align")
def _(
    topk_ids: Tensor,
    token_slots: Tensor,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
) -> Tensor:
    _fake_align(topk_ids, token_slots, expert_map)
    size = _symbolic_size(topk_ids.shape[0] * topk_ids.shape[1], num_slots * num_experts)
    return token_slots.new_empty((size,))


def _symbolic_size(pairs: int, groups: int) -> int:
    """:func:`moe_routing_size` without a branch on the number of pairs, which would compile anew on
    either side."""
    permutation = _HEADER_SIZE + 4 * torch.sym_min(pairs, pairs // _TILE_PAIRS + groups)
    scratch = (permutation + pairs + 1) // 2 * 2 + 4 * pairs
    size: int = torch.sym_ite(pairs <= _SHARED_PAIRS, permutation + pairs, scratch)
    return size


@torch.library.register_fake("lora_ext::moe_lora_align_")
def _(
    routing: Tensor,
    topk_ids: Tensor,
    token_slots: Tensor,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
) -> None:
    _fake_align(topk_ids, token_slots, expert_map)
    _check(
        routing.dim() == 1 and routing.dtype == torch.int32,
        f"routing must be a 1-D int32 tensor, got {routing}",
    )


@torch.library.register_fake("lora_ext::moe_lora_apply_")
def _(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    routing: Tensor,
    top_k: int,
    output_slices: Sequence[int],
    max_rank: int,
    column_starts: Sequence[int] | None = None,
    column_stride: int = 1,
    topk_weights: Tensor | None = None,
) -> None:
    _check(y.dim() in (2, 3), f"y must be 2-D or 3-D, got {y.dim()} dimensions")
    _check(x.dim() == 2, f"x must be 2-D, [rows, features], got {x.dim()} dimensions")
    for name, tensor, dtype in (
        ("ranks", ranks, torch.int32),
        ("scalings", scalings, torch.float32),
        ("routing", routing, torch.int32),
    ):
        _check(
            tensor.dim() == 1 and tensor.dtype == dtype,
            f"{name} must be a 1-D {dtype} tensor, got {tensor}",
        )
    for name, tensors in (("lora_a", lora_a), ("lora_b", lora_b)):
        _check(
            len(tensors) in (1, len(output_slices)),
            f"{name} must be one packed tensor or one tensor per slice ({len(output_slices)}), "
            f"got {len(tensors)} tensors",
        )
        for tensor in tensors:
            _check(
                tensor.dim() == 4 and tensor.dtype == x.dtype,
                f"{name} must be [slots, experts or 1, rows, columns] of x's dtype, got {tensor}",
            )

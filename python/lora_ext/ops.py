"""Typed functions over ``torch.ops.lora_ext.*``.

Symbols: T tokens of the flattened batch, K input features, S slices of a stacked layer (qkv 3,
gate_up 2, else 1), N_i output features of slice i, L adapter slots, R the pool's maximum rank, r_l
the rank of slot l.

Arguments that all functions share:

``plan``
    int32 ``[plan_size(max_tokens, L)]``, filled by :func:`plan_batch_`; which token uses which
    slot.
``ranks``, ``scalings``
    int32 ``[L]`` and float32 ``[L]``, of the module. A slot of rank 0 has no adapter here.
``lora_a``, ``lora_b``
    The module's adapters in one of three layouts, read in place (x, A and B share one dtype):
    *packed*, one tensor each: A ``[L, S * R, K]`` with slice i of slot l in rows ``i * r_l`` and
    following, B ``[L, sum N_i, R]``;
    *per slice*, S tensors each: A_i ``[L, R, K]``, B_i ``[L, N_i, R]``, dimensions of size 1 behind
    L allowed;
    *flat*, one 1-D buffer each, with int64 ``[L]`` element offsets: slot l holds A ``[S * r_l, K]``
    and B ``[sum N_i, r_l]``.

All ops run on the current stream, never synchronise, allocate nothing whose size depends on device
data, and raise ``RuntimeError`` before anything is launched or written. CPU tensors may be float64
as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_ext import _library as _library  # registers the operators, or says why it cannot
from lora_ext.linear_ops import lora_fork as lora_fork
from lora_ext.linear_ops import lora_join_ as lora_join_
from lora_ext.linear_ops import lora_linear as lora_linear
from lora_ext.moe_ops import moe_lora_align as moe_lora_align
from lora_ext.moe_ops import moe_lora_align_ as moe_lora_align_
from lora_ext.moe_ops import moe_lora_apply_ as moe_lora_apply_
from lora_ext.moe_ops import moe_routing_size as moe_routing_size

MAX_SLICES = 8
MAX_RANK = 1024
_TILE_TOKENS = 16
_WIDE_TILE_TOKENS = 64
_HEADER_SIZE = 16

_ops = torch.ops.lora_ext
_plan_batch_ = _ops.plan_batch_.default
_lora_shrink = _ops.lora_shrink.default
_lora_expand_ = _ops.lora_expand_.default
_lora_apply_ = _ops.lora_apply_.default
_lora_apply = _ops.lora_apply.default
_lora_embedding = _ops.lora_embedding.default
_lora_embedding_apply_ = _ops.lora_embedding_apply_.default
_moe_lora_info = _ops.moe_lora_info.default
_moe_lora_info_ = _ops.moe_lora_info_.default


def round_up_tokens(max_tokens: int) -> int:
    """The capacity M that a plan for ``max_tokens`` has: the next multiple of 64."""
    return -(-max_tokens // _WIDE_TILE_TOKENS) * _WIDE_TILE_TOKENS


def plan_size(max_tokens: int, num_slots: int) -> int:
    """Elements of the plan tensor for up to ``max_tokens`` tokens and ``num_slots`` slots (see
    csrc/common/plan.h)."""
    m = round_up_tokens(max_tokens)
    tiles = 4 * (m // _TILE_TOKENS + num_slots) + 4 * (m // _WIDE_TILE_TOKENS + num_slots)
    return _HEADER_SIZE + tiles + 4 * m + 4 + 2 * num_slots + 4


def plan_max_tokens(plan: Tensor, num_slots: int) -> int:
    """The capacity M of a plan tensor; ValueError where its size fits no capacity."""
    rest = plan.numel() - plan_size(0, num_slots)
    per_block = plan_size(_WIDE_TILE_TOKENS, 0) - plan_size(0, 0)
    if rest < 0 or rest % per_block:
        raise ValueError(
            f"plan has {plan.numel()} elements, which is no plan_size(max_tokens, {num_slots})"
        )
    return rest // per_block * _WIDE_TILE_TOKENS


def plan_batch_(
    plan: Tensor,
    slots: Tensor,
    seg_lens: Tensor | None = None,
    seg_indptr: Tensor | None = None,
    *,
    num_slots: int,
) -> None:
    """Fill ``plan`` in place from int32 ``slots``: per token, or per segment with ``seg_lens [n]``
    or ``seg_indptr [n + 1]``.

    Slot -1 means no adapter. On the CPU bad values raise; on a GPU, where looking would
    synchronise, a slot out of
    range counts as -1 and tokens past the plan's capacity are dropped (:class:`lora_ext.LoRABatch`
    checks on the host).
    """
    _plan_batch_(plan, slots, seg_lens, seg_indptr, num_slots)
    if not torch.compiler.is_compiling():
        # A backward pass that saved the plan must find the batch it was made for, or raise.
        torch.autograd.graph.increment_version(plan)


def lora_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    num_slices: int = 1,
    max_rank: int,
    a_offsets: Tensor | None = None,
) -> Tensor:
    """``scaling_l * x A_lᵀ`` per token: x ``[T, K]`` to float32 ``[T, S * R]``, slice i of slot l
    in columns ``i * r_l`` and following.

    Columns that no adapter reaches are 0 (float64 result where x is float64).
    """
    xa: Tensor = _lora_shrink(x, lora_a, ranks, scalings, plan, num_slices, max_rank, a_offsets)
    return xa


def lora_expand_(
    y: Tensor,
    xa: Tensor,
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    plan: Tensor,
    *,
    output_slices: Sequence[int],
    max_rank: int,
    b_offsets: Tensor | None = None,
) -> None:
    """``y[:, slice i] += xa_i B_{l,i}ᵀ`` in place; xa float32 ``[T, S * R]`` as :func:`lora_shrink`
    returns it, y ``[T, >= sum N_i]``.

    y is read once, added to in float32 and rounded once; rows without an adapter keep their bits.
    """
    _refuse_grad("lora_expand_", y, xa, *lora_b)
    _lora_expand_(y, xa, lora_b, ranks, plan, output_slices, max_rank, b_offsets)


def lora_apply_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    b_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """``y[t, slice i] += scaling_l (x[t] A_{l,i}ᵀ) B_{l,i}ᵀ`` in place: shrink and expand in one
    op, the fast path.

    x ``[T, K]``, y ``[T, >= sum N_i]`` (any of the dtypes); rows may be strided. The intermediate
    is float32.
    ``batch_invariant``: a row's bits do not depend on what else is in the batch.
    Inference only: raises where autograd would record it; :func:`lora_apply` is the functional
    form.
    """
    _refuse_grad("lora_apply_", y, x, *lora_a, *lora_b)
    _lora_apply_(
        y,
        x,
        lora_a,
        lora_b,
        ranks,
        scalings,
        plan,
        output_slices,
        max_rank,
        a_offsets,
        b_offsets,
        batch_invariant,
    )


def lora_apply(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    b_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """:func:`lora_apply_` out of place: returns y plus the delta, y is left alone.

    Differentiable (once) in y, x, ``lora_a`` and ``lora_b``, not in ``scalings``, which raises. The
    gradients of the weights have their layout, with zeros in slots that no token uses and behind a
    slot's rank; in the flat layout, slots must not overlap. The plan must not be refilled before
    the backward pass, which then raises.
    """
    out: Tensor = _lora_apply(
        y,
        x,
        lora_a,
        lora_b,
        ranks,
        scalings,
        plan,
        output_slices,
        max_rank,
        a_offsets,
        b_offsets,
        batch_invariant,
    )
    return out


def lora_embedding(
    ids: Tensor,
    lora_a: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    vocab_start: int = 0,
    extra_a: Tensor | None = None,
) -> Tensor:
    """``scaling_l * A_l[:, id]`` per token: int32 or int64 ids ``[T]`` to float32 ``[T, R]``.

    ``lora_a`` is ``[L, R, V]`` with any strides (a transposed ``[L, V, R]`` reads one cache line
    per token) and covers ids
    ``vocab_start`` to ``vocab_start + V - 1``; ``extra_a [L, X, R]`` covers the X added tokens
    behind. Other ids give 0.
    """
    xa: Tensor = _lora_embedding(ids, lora_a, ranks, scalings, plan, vocab_start, extra_a)
    return xa


def lora_embedding_apply_(
    y: Tensor,
    ids: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    vocab_start: int = 0,
    extra_a: Tensor | None = None,
) -> None:
    """``y += lora_embedding(ids) B_lᵀ`` in place: y ``[T, N]``, ``lora_b [L, N, R]``; ids as in
    :func:`lora_embedding`."""
    _refuse_grad("lora_embedding_apply_", y, lora_a, lora_b)
    _lora_embedding_apply_(y, ids, lora_a, lora_b, ranks, scalings, plan, vocab_start, extra_a)


def moe_lora_info(
    seg_indptr: Tensor, seg_slots: Tensor, ranks: Tensor, *, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Token to adapter map ``[num_tokens]`` (-1: none, rank 0, or padding) and enabled flags
    ``[L]``, both int32.

    ``seg_indptr [n + 1]`` and ``seg_slots [n]`` are int32; slot -1 is legal. Every token is
    written, whatever the segments.
    """
    result: tuple[Tensor, Tensor] = _moe_lora_info(seg_indptr, seg_slots, ranks, num_tokens)
    return result


def moe_lora_info_(
    token_slots: Tensor, enabled: Tensor, seg_indptr: Tensor, seg_slots: Tensor, ranks: Tensor
) -> None:
    """:func:`moe_lora_info` into given buffers: ``token_slots`` (its whole length, padding
    included) and ``enabled [L]``."""
    _moe_lora_info_(token_slots, enabled, seg_indptr, seg_slots, ranks)


def records_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an op on these tensors, which must then not write in place."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _refuse_grad(op: str, *tensors: Tensor) -> None:
    """In-place custom ops leave no trace in autograd: without this the gradients would be silently
    wrong."""
    if records_grad(*tensors):
        raise RuntimeError(
            f"{op} writes in place and is for inference, but an argument requires grad; "
            "use lora_ext.ops.lora_apply, which is functional, or run under torch.no_grad()"
        )


# ---- fake implementations: the shape checks of csrc/ops, and the results' metadata


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _fake_slots(ranks: Tensor, plan: Tensor, like: Tensor) -> None:
    _check(
        ranks.dim() == 1 and ranks.dtype == torch.int32,
        f"ranks must be a 1-D int32 tensor, got {ranks}",
    )
    _check(
        plan.dim() == 1 and plan.dtype == torch.int32,
        f"plan must be a 1-D int32 tensor, got {plan}",
    )
    _check(
        plan.device == like.device,
        f"plan is on {plan.device}, but the other arguments are on {like.device}",
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_factors(
    x: Tensor,
    lora_a: Sequence[Tensor],
    num_slices: int,
    max_rank: int,
    offsets: Tensor | None,
    name: str,
) -> None:
    _check(
        1 <= num_slices <= MAX_SLICES,
        f"num_slices must be between 1 and {MAX_SLICES}, got {num_slices}",
    )
    _check(1 <= max_rank <= MAX_RANK, f"max_rank must be between 1 and {MAX_RANK}, got {max_rank}")
    _check(
        len(lora_a) in ((1,) if offsets is not None else (1, num_slices)),
        f"{name} must be one packed tensor or one tensor per slice ({num_slices}), "
        f"got {len(lora_a)} tensors",
    )
    for tensor in lora_a:
        _check(
            tensor.dtype == x.dtype,
            f"{name} is {tensor.dtype}, but x, A and B must share one dtype ({x.dtype})",
        )


@torch.library.register_fake("lora_ext::plan_batch_")
def _(
    plan: Tensor, slots: Tensor, seg_lens: Tensor | None, seg_indptr: Tensor | None, num_slots: int
) -> None:
    _check(seg_lens is None or seg_indptr is None, "give seg_lens or seg_indptr, not both")
    _check(plan.dtype == torch.int32 and slots.dtype == torch.int32, "plan and slots must be int32")


@torch.library.register_fake("lora_ext::lora_shrink")
def _(
    x: Tensor,
    lora_a: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    num_slices: int,
    max_rank: int,
    a_offsets: Tensor | None = None,
) -> Tensor:
    _check(x.dim() == 2, f"x must be 2-D, [tokens, features], got {x.dim()} dimensions")
    _fake_slots(ranks, plan, x)
    _fake_factors(x, lora_a, num_slices, max_rank, a_offsets, "lora_a")
    return x.new_empty((x.shape[0], num_slices * max_rank), dtype=_accumulator(x.dtype))


@torch.library.register_fake("lora_ext::lora_expand_")
def _(
    y: Tensor,
    xa: Tensor,
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    plan: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    b_offsets: Tensor | None = None,
) -> None:
    _check(
        y.dim() == 2 and xa.dim() == 2,
        f"y and xa must be 2-D, got {y.dim()} and {xa.dim()} dimensions",
    )
    _fake_slots(ranks, plan, y)
    _check(len(lora_b) > 0, "lora_b is empty")
    _fake_factors(lora_b[0], lora_b, len(output_slices), max_rank, b_offsets, "lora_b")


def _fake_apply_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    b_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    _check(
        y.dim() == 2 and x.dim() == 2,
        f"y and x must be 2-D, got {y.dim()} and {x.dim()} dimensions",
    )
    _fake_slots(ranks, plan, x)
    _fake_factors(x, lora_a, len(output_slices), max_rank, a_offsets, "lora_a")
    _fake_factors(x, lora_b, len(output_slices), max_rank, b_offsets, "lora_b")


torch.library.register_fake("lora_ext::lora_apply_", _fake_apply_)


@torch.library.register_fake("lora_ext::lora_apply")
def _(y: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    _fake_apply_(y, x, *args, **kwargs)  # type: ignore[arg-type]
    return torch.empty_like(y)


def _fake_ids(ids: Tensor, lora_a: Tensor, ranks: Tensor, plan: Tensor) -> None:
    _check(
        ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64),
        "ids must be a 1-D int32 or int64 tensor",
    )
    _check(lora_a.dim() == 3, f"lora_a must be [L, R, V], got {lora_a.dim()} dimensions")
    _fake_slots(ranks, plan, ids)


@torch.library.register_fake("lora_ext::lora_embedding")
def _(
    ids: Tensor,
    lora_a: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    vocab_start: int = 0,
    extra_a: Tensor | None = None,
) -> Tensor:
    _fake_ids(ids, lora_a, ranks, plan)
    return lora_a.new_empty((ids.shape[0], lora_a.shape[1]), dtype=_accumulator(lora_a.dtype))


@torch.library.register_fake("lora_ext::lora_embedding_apply_")
def _(
    y: Tensor,
    ids: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    vocab_start: int = 0,
    extra_a: Tensor | None = None,
) -> None:
    _fake_ids(ids, lora_a, ranks, plan)


@torch.library.register_fake("lora_ext::moe_lora_info")
def _(
    seg_indptr: Tensor, seg_slots: Tensor, ranks: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    return ranks.new_empty((num_tokens,)), ranks.new_empty(ranks.shape)


@torch.library.register_fake("lora_ext::moe_lora_info_")
def _(
    token_slots: Tensor, enabled: Tensor, seg_indptr: Tensor, seg_slots: Tensor, ranks: Tensor
) -> None:
    return None

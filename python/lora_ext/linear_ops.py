"""A base layer together with its adapters; :mod:`lora_ext.ops` is where callers find these.

The shrink needs x alone, as the base layer does, and may run beside it. Symbols and arguments as in
:mod:`lora_ext.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lora_ext import _library as _library  # registers the operators, or says why it cannot

_ops = torch.ops.lora_ext
_lora_linear = _ops.lora_linear.default
_lora_fork = _ops.lora_fork.default
_lora_join_ = _ops.lora_join_.default


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    overlap: bool = False,
) -> Tensor:
    """``x Wᵀ + bias`` plus the adapter of each token: x ``[..., K]`` to a new ``[..., N]``.

    The tokens are x's leading dimensions, flattened. ``weight [N, K]`` and ``bias [N]`` have x's
    dtype; N may be more than the slices cover. Where autograd would record it, the base product and
    :func:`lora_ext.ops.lora_apply` are called instead.

    Up to 16 tokens in half precision on a GPU of sm_90 or later are one stream of the weights,
    which takes the adapters along and rounds once; the bits of a row without an adapter do not
    depend on the other rows' adapters, but are not those of torch's product. Elsewhere, and where
    ``batch_invariant`` or ``overlap`` is asked for, they are.

    Args:
        overlap: on a GPU, whether the shrink of up to 256 tokens runs beside the base product, on
            a stream of its own that starts and ends with this op. The bits are those of torch's
            product and ``lora_apply_`` behind it. In a CUDA graph the shrink runs beside the
            product's end whether asked for or not.
    """
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, *lora_a, *lora_b)
    ):
        y = functional.linear(x, weight, bias)
        result: Tensor = _ops.lora_apply(
            y.reshape(-1, y.shape[-1]),
            x.reshape(-1, x.shape[-1]),
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
        return result.view(y.shape)
    result = _lora_linear(
        x,
        weight,
        bias,
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
        overlap,
    )
    return result


def lora_fork(
    x: Tensor,
    lora_a: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    batch_invariant: bool = False,
    overlap: bool = False,
) -> Tensor:
    """Make ready for an apply whose first half runs beside the base layer that is queued next.

    For base layers that are no plain product (quantised ones): fork, run the base layer, then
    :func:`lora_join_`. In a CUDA graph the first half begins as soon as the last thread block of
    the base layer's last kernel has, or, where that is a reduction which itself began early, of the
    one before it. The result is for ``lora_join_`` alone: its size and layout
    are the kernels' own. Until then it, x and ``lora_a`` must not be freed or written to; where the
    base layer fails, synchronise before they are.

    Args:
        overlap: whether it begins now, on a second stream, where no graph is captured. Not in a
            compiled function, whose compiler moves memory about without knowing of that stream.
    """
    forked: Tensor = _lora_fork(
        x,
        lora_a,
        ranks,
        scalings,
        plan,
        output_slices,
        max_rank,
        a_offsets,
        batch_invariant,
        overlap and not torch.compiler.is_compiling(),
    )
    return forked


def lora_join_(
    y: Tensor,
    forked: Tensor,
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
    overlap: bool = False,
) -> None:
    """Add the adapters to ``y [T, >= sum N_i]``, with the bits of ``lora_apply_``; what
    :func:`lora_fork` started is waited for on the device.

    The arguments are those of the fork, on the same current stream. Inference only.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *lora_a, *lora_b)):
        raise RuntimeError(
            "lora_join_ writes in place and is for inference, but an argument requires grad; "
            "use lora_ext.ops.lora_apply, which is functional, or run under torch.no_grad()"
        )
    _lora_join_(
        y,
        forked,
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
        overlap and not torch.compiler.is_compiling(),
    )


# ---- fake implementations: the checks are those of lora_apply_'s


def _refuse_overlap(op: str, overlap: bool) -> None:
    if overlap:
        raise RuntimeError(f"{op} cannot be traced with overlap=True")


@torch.library.register_fake("lora_ext::lora_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    overlap: bool = False,
) -> Tensor:
    y: Tensor = functional.linear(x, weight, bias)
    _ops.lora_apply_(
        y.view(-1, y.shape[-1]),
        x.reshape(-1, x.shape[-1]),
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
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("lora_ext::lora_fork")
def _(
    x: Tensor,
    lora_a: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None = None,
    batch_invariant: bool = False,
    overlap: bool = False,
) -> Tensor:
    _refuse_overlap("lora_fork", overlap)
    num_slices = len(output_slices)
    _ops.lora_shrink(x, lora_a, ranks, scalings, plan, num_slices, max_rank, a_offsets)
    size = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((size,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("lora_ext::lora_join_")
def _(
    y: Tensor,
    forked: Tensor,
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
    overlap: bool = False,
) -> None:
    _refuse_overlap("lora_join_", overlap)
    _ops.lora_apply_(
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

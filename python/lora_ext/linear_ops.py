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
        overlap: on a GPU, whether the shrink runs beside the base product, on a stream of its own
            that starts and ends with this op. The bits are those of torch's product and
            ``lora_apply_`` behind it. The fork and the join cost more than that saves in the layers
            measured so far (docs/kernels.md).
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
) -> Tensor:
    """Start the first half of an apply on a second stream, beside what is queued next.

    For base layers that are no plain product (quantised ones): fork, run the base layer, then
    :func:`lora_join_`. The result is for ``lora_join_`` alone: its size and layout are the kernels'
    own. Until then it, x and ``lora_a`` must not be freed or written to; where the base layer
    fails, synchronise before they are.
    """
    forked: Tensor = _lora_fork(
        x, lora_a, ranks, scalings, plan, output_slices, max_rank, a_offsets
    )
    return forked


def lora_join_(
    y: Tensor,
    forked: Tensor,
    x: Tensor,
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    *,
    output_slices: Sequence[int],
    max_rank: int,
    b_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    """Wait, on the device, for what :func:`lora_fork` started, and add it to ``y [T, >= sum N_i]``.

    The arguments are those of the fork, on the same current stream. Inference only.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *lora_b)):
        raise RuntimeError(
            "lora_join_ writes in place and is for inference, but an argument requires grad; "
            "use lora_ext.ops.lora_apply, which is functional, or run under torch.no_grad()"
        )
    _lora_join_(
        y,
        forked,
        x,
        lora_b,
        ranks,
        scalings,
        plan,
        output_slices,
        max_rank,
        b_offsets,
        batch_invariant,
    )


# ---- fake implementations: the checks are those of lora_apply_'s


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
) -> Tensor:
    num_slices = len(output_slices)
    _ops.lora_shrink(x, lora_a, ranks, scalings, plan, num_slices, max_rank, a_offsets)
    size = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((size,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("lora_ext::lora_join_")
def _(
    y: Tensor,
    forked: Tensor,
    x: Tensor,
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    b_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    xa = y.new_empty((y.shape[0], len(output_slices) * max_rank), dtype=forked.dtype)
    _ops.lora_expand_(y, xa, lora_b, ranks, plan, output_slices, max_rank, b_offsets)

"""What makes ``lora_ext.ops.lora_apply`` differentiable: its gradient, an op of its own.

The output is y plus the delta, so y's gradient is that of the output; x, A and B get theirs from
``torch.ops.lora_ext.lora_apply_backward``: segmented kernels over the batch's plan, whatever the
mix of adapters. Nothing is kept between the two passes but the arguments; ``x Aᵀ`` is computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext.ops import _fake_apply_

_lora_apply_backward = torch.ops.lora_ext.lora_apply_backward.default


@torch.library.register_fake("lora_ext::lora_apply_backward")
def _(
    dy: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    plan: Tensor,
    output_slices: Sequence[int],
    max_rank: int,
    a_offsets: Tensor | None,
    b_offsets: Tensor | None,
    needs_dx: bool,
    needs_da: bool,
    needs_db: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _fake_apply_(
        dy,
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
    )
    return (
        x.new_empty(x.shape if needs_dx else (0,)),
        [a.new_empty(a.shape) for a in lora_a] if needs_da else [],
        [b.new_empty(b.shape) for b in lora_b] if needs_db else [],
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, lora_a, lora_b, ranks, scalings, plan, output_slices, max_rank, *offsets, _ = inputs
    if scalings.requires_grad:
        raise RuntimeError(
            "scalings requires grad, but lora_apply has gradients for y, x, lora_a and lora_b only"
        )
    ctx.save_for_backward(x, *lora_a, *lora_b, ranks, scalings, plan, *offsets)
    ctx.num_a = len(lora_a)
    ctx.output_slices = output_slices
    ctx.max_rank = max_rank


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *factors, ranks, scalings, plan, a_offsets, b_offsets = ctx.saved_tensors
    needs_y, needs_x, needs_a, needs_b, *rest = ctx.needs_input_grad
    dx, da, db = _lora_apply_backward(
        dy.contiguous(),  # the gradient of a sum is one number, expanded
        x,
        factors[: ctx.num_a],
        factors[ctx.num_a :],
        ranks,
        scalings,
        plan,
        ctx.output_slices,
        ctx.max_rank,
        a_offsets,
        b_offsets,
        needs_x,
        any(needs_a),
        any(needs_b),
    )
    return (
        dy if needs_y else None,
        dx if needs_x else None,
        [da[i] if needed else None for i, needed in enumerate(needs_a)],
        [db[i] if needed else None for i, needed in enumerate(needs_b)],
        *[None] * len(rest),  # fewer where arguments were left at their defaults
    )


def _refuse_twice(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("lora_apply can be differentiated once, not twice")


torch.library.register_autograd("lora_ext::lora_apply", _backward, setup_context=_setup_context)
torch.library.register_autograd("lora_ext::lora_apply_backward", _refuse_twice)

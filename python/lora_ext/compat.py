"""SGLang's torch-native functions over lora_ext's operators, for code that calls them by name.

They take a batch info (``lora_ext.backend.LoRABatchInfo``, or anything with a plan, ranks and
scalings) where the originals take segments, ranks and scalings one by one. The intermediate is
float32 ``[T, S * R]`` as ``lora_ext.ops.lora_shrink`` makes it: slice i of a token whose slot has
rank r lies in columns ``i * r`` to ``(i + 1) * r``, and is scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from . import ops


class BatchInfo(Protocol):
    """Which token uses which slot, and the slots' ranks and scalings."""

    @property
    def plan(self) -> Tensor:
        """The plan of the batch."""

    @property
    def lora_ranks(self) -> Tensor:
        """Rank of each slot: int32 ``[L]``."""

    @property
    def scalings(self) -> Tensor:
        """Scaling of each slot: fp32 ``[L]``."""


def sgemm_lora_a_fwd(
    inputs: Tensor, weights: Tensor, batch_info: BatchInfo, num_slices: int = 1
) -> Tensor:
    """``scaling * x Aᵀ`` for each token.

    Args:
        inputs: x ``[T, K]``, converted to the dtype of the weights.
        weights: A ``[L, S * R, K]``, packed: slice i of slot l in rows ``i * r_l`` and following.
        batch_info: slots, ranks and scalings.
        num_slices: S.

    Returns:
        float32 ``[T, S * R]``.
    """
    if weights.shape[1] % num_slices:
        raise ValueError(f"lora_a has {weights.shape[1]} rows, no multiple of {num_slices} slices")
    if weights.numel() == 0:
        return _accumulator(weights, inputs.shape[0], weights.shape[1])
    return ops.lora_shrink(
        inputs.to(weights.dtype),
        [weights],
        batch_info.lora_ranks,
        batch_info.scalings,
        batch_info.plan,
        num_slices=num_slices,
        max_rank=weights.shape[1] // num_slices,
    )


def sgemm_lora_b_fwd(
    inputs: Tensor,
    weights: Tensor,
    batch_info: BatchInfo,
    slice_offsets: Sequence[int] | Tensor | None = None,
    base_output: Tensor | None = None,
) -> Tensor:
    """``base_output += xa Bᵀ`` in place.

    Args:
        inputs: xa ``[T, S * R]``, packed as :func:`sgemm_lora_a_fwd` returns it; converted to
            float32.
        weights: B ``[L, sum N_i, R]``.
        batch_info: slots and ranks.
        slice_offsets: first column of each slice and the end, ``S + 1`` numbers or more, on the
            host; with one slice it may be left out.
        base_output: ``[T, >= sum N_i]``; None: zeros in the dtype of the weights.

    Returns:
        ``base_output``.
    """
    max_rank = weights.shape[-1]
    num_slices = inputs.shape[1] // max_rank if max_rank else 1
    widths = slice_widths(slice_offsets, num_slices, weights)
    output = base_output
    if output is None:
        output = weights.new_zeros((inputs.shape[0], sum(widths)))
    if weights.numel() == 0:
        return output
    ops.lora_expand_(
        output,
        inputs.to(_accumulator_dtype(weights)),
        [first_rows(weights, sum(widths))],
        batch_info.lora_ranks,
        batch_info.plan,
        output_slices=widths,
        max_rank=max_rank,
    )
    return output


def sgemm_lora_a_embedding_fwd(
    inputs: Tensor,
    weights: Tensor,
    batch_info: BatchInfo,
    vocab_size: int,
    extra_embeddings: Tensor | None = None,
) -> Tensor:
    """``scaling * A[:, id]`` for each token.

    Args:
        inputs: ids ``[T]``, int32 or int64; those beyond every table give 0.
        weights: A ``[L, R, >= vocab_size]`` with any strides; columns behind ``vocab_size`` belong
            to added tokens.
        batch_info: slots, ranks and scalings.
        vocab_size: ids from here on are added tokens.
        extra_embeddings: ``[L, X, R]``, A of the added tokens, in place of columns behind
            ``vocab_size``.

    Returns:
        float32 ``[T, R]``.
    """
    if extra_embeddings is not None:
        if extra_embeddings.shape[-1] != weights.shape[1]:
            raise ValueError(
                f"extra_embeddings has {extra_embeddings.shape[-1]} values for each token, lora_a "
                f"has max_rank {weights.shape[1]} (rows that replace the embedding are for "
                "run_extra_token_embedding)"
            )
        weights = weights[:, :, :vocab_size]
    if weights.numel() == 0:
        return _accumulator(weights, inputs.numel(), weights.shape[1])
    return ops.lora_embedding(
        inputs.reshape(-1),
        weights,
        batch_info.lora_ranks,
        batch_info.scalings,
        batch_info.plan,
        extra_a=extra_embeddings,
    )


def slice_widths(
    offsets: Sequence[int] | Tensor | None, num_slices: int, lora_b: Tensor
) -> list[int]:
    """Return the widths of the first ``num_slices`` slices, without reading from a device.

    Raises:
        ValueError: there are too few offsets, they fall or do not start at 0, or they are on a
            device where reading them would synchronise.
    """
    if offsets is None or (isinstance(offsets, Tensor) and not offsets.is_cpu):
        if num_slices == 1:
            return [lora_b.shape[1]]
        raise ValueError(
            f"the widths of {num_slices} slices must be known on the host, where reading them does "
            "not wait for the device: pass output_offset_cpu"
        )
    values = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    if len(values) <= num_slices or values[0] != 0:
        raise ValueError(
            f"offsets are {values}, expected 0 and the ends of at least {num_slices} slices"
        )
    widths = [end - start for start, end in pairwise(values[: num_slices + 1])]
    if min(widths) < 0:
        raise ValueError(f"offsets are {values}, expected rising numbers")
    return widths


def first_rows(lora_b: Tensor, num_rows: int) -> Tensor:
    """Return B ``[L, num_rows, R]``: a pool may have more rows than the slices of a layer."""
    return lora_b if lora_b.shape[1] == num_rows else lora_b[:, :num_rows]


def _accumulator_dtype(weights: Tensor) -> torch.dtype:
    return torch.float64 if weights.dtype == torch.float64 else torch.float32


def _accumulator(weights: Tensor, rows: int, columns: int) -> Tensor:
    return weights.new_zeros((rows, columns), dtype=_accumulator_dtype(weights))

"""The error model: how far a result may lie from the fp64 oracle, element by element.

A result is one rounding of y plus the delta, so half a unit in the last place of y's dtype; the
sums in front of it are fp32 (fp64 for fp64 inputs), and the intermediate keeps 16 bits or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext import reference

# Bits of the significand, the implied one included, and the exponent of the smallest normal number.
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
_MIN_EXPONENT = {
    torch.bfloat16: -126,
    torch.float16: -14,
    torch.float32: -126,
    torch.float64: -1022,
}
# Random errors of a sum of K terms grow with sqrt(K); the factor covers the tails over the millions
# of elements that the tests look at, and hardware that truncates where IEEE arithmetic rounds.
_SAFETY = 2.0
# What passing an fp32 intermediate as a sum of two halves may lose.
_SPLIT = 2.0**-16


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around `value` (fp64)."""
    exponent = torch.frexp(value)[1].clamp(min=_MIN_EXPONENT[dtype] + 1).double()
    return torch.exp2(exponent - 1 - _PRECISION[dtype])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are summed, which is also that of the intermediate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_error(num_terms: int, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum of products of `dtype` may miss; `magnitude` sums their absolute values."""
    eps = torch.finfo(accumulator(dtype)).eps
    return _SAFETY * max(num_terms, 1) ** 0.5 * eps * magnitude


@dataclass(frozen=True)
class Expected:
    """An fp64 result with the error that is allowed, both of the result's shape."""

    value: Tensor
    error: Tensor


def expected_shrink(
    x: Tensor,
    lora_a: list[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    num_slices: int,
    max_rank: int,
    a_offsets: Tensor | None = None,
) -> Expected:
    """The intermediate [T, S * R]; arguments as `reference.shrink`."""
    rest = (ranks, scalings, token_slots, num_slices, max_rank, a_offsets)
    value = reference.shrink(x, lora_a, *rest)
    magnitude = reference.shrink(x.abs(), [a.abs() for a in lora_a], *rest).abs()
    return Expected(value, sum_error(x.shape[1], magnitude, x.dtype))


def expected_expand(
    y: Tensor,
    xa: Expected,
    lora_b: list[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    output_slices: list[int],
    b_offsets: Tensor | None = None,
) -> Expected:
    """y after the expand, from an intermediate with its own error; as `reference.expand`."""
    dtype = lora_b[0].dtype
    rest = (ranks, token_slots, output_slices, b_offsets)
    value = reference.expand(y, xa.value, lora_b, *rest)
    absolute = [b.abs() for b in lora_b]
    zeros = torch.zeros_like(y, dtype=torch.float64)
    magnitude = reference.expand(zeros, xa.value.abs(), absolute, *rest)
    inherited = reference.expand(zeros, xa.error, absolute, *rest)
    max_rank = int(ranks.max()) if ranks.numel() else 0
    error = inherited + sum_error(max_rank, magnitude, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        error += _SPLIT * magnitude
    # The addition of y, in the accumulator's dtype, and the rounding to y's own.
    error += torch.finfo(accumulator(dtype)).eps * (value.abs() + magnitude)
    return Expected(value, error + half_ulp(value.abs() + error, y.dtype))


def assert_close(actual: Tensor, expected: Expected) -> None:
    """Every element within its allowance, and finite where the oracle is; names the worst one."""
    got = actual.double()
    assert got.shape == expected.value.shape, f"{tuple(got.shape)} != {tuple(expected.value.shape)}"
    if got.numel() == 0:
        return
    misplaced = (got.isfinite() != expected.value.isfinite()).nonzero()
    assert misplaced.numel() == 0, (
        f"{len(misplaced)} elements are finite in one of result and oracle, "
        f"first {misplaced[0].tolist()}"
    )
    excess = ((got - expected.value).abs() - expected.error).nan_to_num(nan=0.0, neginf=0.0)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, (
        f"{int((excess > 0).sum())} of {excess.numel()} elements are off; worst at "
        f"{[int(i) for i in worst]}: got {got[worst]}, expected {expected.value[worst]} "
        f"within {expected.error[worst]}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, NaN and the sign of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.is_floating_point():
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
        actual, expected = actual.contiguous().view(as_int), expected.contiguous().view(as_int)
    different = (actual != expected).nonzero()
    assert different.numel() == 0, (
        f"{len(different)} of {actual.numel()} elements differ, first at {different[0].tolist()}"
    )

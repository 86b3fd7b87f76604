"""A base layer with adapters, held against the fp64 oracle: what tests of lora_linear share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from generators import (
    NAN,
    Module,
    Weights,
    apply_arguments,
    generator,
    make_batch,
    make_module,
    randn,
    random_slots,
)
from lora_ext import ops
from numerics import (
    Expected,
    assert_close,
    assert_same_bits,
    expected_expand,
    expected_shrink,
    half_ulp,
    sum_error,
)
from test_on_device import capture
from test_plan_batch import fill

RANKS = [16, 3, 0, 64, 8]
# Up to so many tokens a GPU takes base layer and adapters in one stream, where nothing hinders it.
STREAMED_TOKENS = 16


class Site:
    """A base layer wider than its slices, and the adapters of all slots."""

    streamed_tokens = STREAMED_TOKENS

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        *,
        in_features: int = 192,
        slices: Sequence[int] = (96, 32),
        extra: int = 24,
        bias: bool = True,
        ranks: Sequence[int] = RANKS,
    ) -> None:
        gen = generator("site", in_features, list(slices))
        width = sum(slices) + extra
        self.module: Module = make_module(ranks, in_features, slices, dtype, device)
        self.weights: Weights = self.module.weights("packed")
        self.weight = randn((width, in_features), dtype, device, gen, in_features**-0.5)
        self.bias = randn((width,), dtype, device, gen) if bias else None

    def x(self, *leading: int) -> Tensor:
        shape = (*leading, self.module.in_features)
        gen = generator("x", shape)
        return randn(shape, self.module.dtype, self.module.device, gen)

    def arguments(self, plan: Tensor) -> tuple[Any, ...]:
        """What follows x in the operator."""
        return (self.weight, self.bias, *apply_arguments(self.module, self.weights, plan))

    def __call__(self, x: Tensor, plan: Tensor, **options: Any) -> Tensor:
        module, weights = self.module, self.weights
        return ops.lora_linear(
            x,
            self.weight,
            self.bias,
            weights.lora_a,
            weights.lora_b,
            module.ranks,
            module.scalings,
            plan,
            output_slices=module.output_slices,
            max_rank=module.max_rank,
            a_offsets=weights.a_offsets,
            b_offsets=weights.b_offsets,
            **options,
        )

    def base(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def forked(
        self,
        x: Tensor,
        plan: Tensor,
        base: Callable[[Tensor], Tensor] | None = None,
        **options: bool,
    ) -> Tensor:
        """The same as a call, of torch's base product or another base layer."""
        module, weights = self.module, self.weights
        rest = (module.ranks, module.scalings, plan)
        sizes = {"output_slices": module.output_slices, "max_rank": module.max_rank}
        half = ops.lora_fork(
            x, weights.lora_a, *rest, **sizes, a_offsets=weights.a_offsets, **options
        )
        y = self.base(x) if base is None else base(x)
        ops.lora_join_(
            y,
            half,
            x,
            weights.lora_a,
            weights.lora_b,
            *rest,
            **sizes,
            a_offsets=weights.a_offsets,
            b_offsets=weights.b_offsets,
            **options,
        )
        return y

    def is_streamed(self, x: Tensor, overlap: bool = False, batch_invariant: bool = False) -> bool:
        """Whether the base product of x is not torch's."""
        return (
            x.is_cuda
            and torch.cuda.get_device_capability() >= (9, 0)
            and x.dtype in (torch.bfloat16, torch.float16)
            and x[..., 0].numel() <= self.streamed_tokens
            and self.module.in_features % 8 == 0
            and not (overlap or batch_invariant)
        )

    def check(self, y: Tensor, x: Tensor, slots: Sequence[int], **options: bool) -> None:
        """Compare with the fp64 oracle. What has no adapter has the base layer's bits, but where
        the base product is not torch's: there every element has one rounding."""
        module, weights = self.module, self.weights
        streamed = self.is_streamed(x, **options)
        base, x = self.base(x).flatten(0, -2), x.flatten(0, -2)
        y, padded = y.flatten(0, -2), [*slots, *[-1] * (len(x) - len(slots))]
        of_token = torch.tensor(padded, dtype=torch.int32, device=y.device)
        rest = (module.ranks, module.scalings, of_token, module.num_slices, module.max_rank)
        xa = expected_shrink(x, weights.lora_a, *rest, weights.a_offsets)
        covered = module.out_features
        exact = self.exact_base(x) if streamed else Expected(base, torch.zeros_like(base))
        want = expected_expand(
            exact.value[:, :covered].to(torch.float64 if streamed else base.dtype),
            xa,
            weights.lora_b,
            module.ranks,
            of_token,
            module.output_slices,
            weights.b_offsets,
        )
        if streamed:
            value = torch.cat([want.value, exact.value[:, covered:]], dim=1)
            error = exact.error.clone()
            error[:, :covered] += want.error
            assert_close(y, Expected(value, error + half_ulp(value.abs() + error, y.dtype)))
            return
        assert_close(y[:, :covered], want)
        assert_same_bits(y[:, covered:], base[:, covered:])
        idle = [t for t, s in enumerate(padded) if s < 0 or int(module.ranks[s]) == 0]
        assert_same_bits(y[idle], base[idle])

    def exact_base(self, x: Tensor) -> Expected:
        """The base layer in fp64, and what fp32 sums may miss of it."""
        bias = 0 if self.bias is None else self.bias.double()
        value = linear(x.double(), self.weight.double()) + bias
        magnitude = linear(x.double().abs(), self.weight.double().abs()) + value.abs()
        return Expected(value, sum_error(x.shape[-1], magnitude, x.dtype))


def check_chain(sites: Sequence[Site], num_tokens: int) -> None:
    """Sites one behind the other, twice, in a graph: each kernel begins before the one in front has
    ended, and reads what that wrote. Bit for bit as with a stop behind each."""
    num_slots, device = sites[0].module.num_slots, sites[0].module.device
    batch = make_batch([0] * num_tokens, num_slots, device)
    x, outputs = sites[0].x(num_tokens), []

    def steps(plan: Tensor, synchronise: bool = False) -> list[Tensor]:
        results = [x]
        for site in [*sites, *sites]:
            results.append(site(results[-1], plan))
            if synchronise:
                torch.cuda.synchronize()
        return results

    def captured_steps() -> None:
        outputs[:] = steps(batch.plan)

    graph = capture(captured_steps)
    for seed in range(4):
        slots = random_slots(num_tokens, num_slots, generator("chain", seed))
        fill(batch.plan, slots, num_slots)
        for output in outputs[1:]:
            output.fill_(NAN)
        graph.replay()
        want = steps(make_batch(slots, num_slots, device).plan, synchronise=True)
        for output, expected in zip(outputs, want, strict=True):
            assert_same_bits(output, expected)

"""lora_linear of few tokens on a GPU: one stream of the weights, which takes the adapters along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from generators import LAYOUTS, generator, make_batch, random_slots
from linear_site import RANKS, Site, check_chain
from numerics import assert_same_bits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("in_features", "slices", "extra"),
    [
        (4096, [1024, 256, 256], 0),
        (200, [72, 41, 7], 5),  # odd rows, slices that share a block of 16
        (4104, [9000], 24),  # several passes for each multiprocessor, K behind whole steps
        (8, [3], 0),
        (14336, [100], 60),
    ],
)
def test_a_stream_of_weights_rounds_once(
    dtype: torch.dtype, layout: str, in_features: int, slices: list[int], extra: int
) -> None:
    ranks = [16, 3, 0, 64, 8, 33, 1]
    sizes: Any = {"in_features": in_features, "slices": slices, "extra": extra}
    site = Site(dtype, "cuda", **sizes, bias=True, ranks=ranks)
    site.weights, bias = site.module.weights(layout), site.bias
    for with_bias, num_tokens in zip([True, False] * 4, [1, 2, 5, 8, 9, 13, 15, 16], strict=True):
        site.bias = bias if with_bias else None
        slots = random_slots(num_tokens, len(ranks), generator("few", num_tokens))
        x = site.x(num_tokens)
        site.check(site(x, make_batch(slots, len(ranks), "cuda").plan), x, slots)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [[130, 70], [200, 0]], ids=str)
def test_a_stream_of_weights_and_ranks_of_several_steps(ranks: list[int]) -> None:
    site = Site(torch.bfloat16, "cuda", in_features=1024, slices=[512], ranks=ranks)
    for slots in ([0], [1, 0, -1, 1, 0, 0]):
        x = site.x(len(slots))
        site.check(site(x, make_batch(slots, 2, "cuda").plan), x, slots)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("max_rank", [8, 16, 24, 64, 72])
def test_tokens_of_few_adapters(max_rank: int, dtype: torch.dtype) -> None:
    """Slots of one token and of all of them, at ranks below the pool's and at its own."""
    ranks = [max_rank, max_rank // 2, 5]
    site = Site(dtype, "cuda", in_features=2048, slices=[1000, 520], ranks=ranks)
    for num_tokens in (7, 16):
        for slots in (
            [0] * num_tokens,
            [2] * num_tokens,
            [1] * (num_tokens - 1) + [0],
            [0, 2] + [-1] * (num_tokens - 4) + [1, 0],
        ):
            x = site.x(num_tokens)
            site.check(site(x, make_batch(slots, 3, "cuda").plan), x, slots)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_of_one_adapter_stays_there(poison: float) -> None:
    site = Site(torch.bfloat16, "cuda", in_features=1024)
    slots = [3, 1, 0, -1, 3, 4, 1, 3, 0, 2, 4, 3]
    x, plan = site.x(len(slots)), make_batch(slots, len(RANKS), "cuda").plan
    clean = site(x, plan)
    others = [t for t, slot in enumerate(slots) if slot != 3]
    for side in (site.weights.lora_a, site.weights.lora_b):
        weights = side[0][3].clone()
        side[0][3] = poison
        y = site(x, plan)
        side[0][3] = weights
        assert_same_bits(y[others], clean[others])
        assert not y[[t for t, slot in enumerate(slots) if slot == 3]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [6, 14])
def test_a_row_without_adapter_has_its_bits_whatever_the_others_have(num_tokens: int) -> None:
    site = Site(torch.bfloat16, "cuda", in_features=1024)
    x = site.x(num_tokens)
    plan = make_batch([-1] * num_tokens, len(RANKS), "cuda").plan
    alone = site(x, plan)
    for seed in range(5):
        slots = random_slots(num_tokens, len(RANKS), generator("others", seed))
        y = site(x, make_batch(slots, len(RANKS), "cuda").plan)
        idle = [t for t, slot in enumerate(slots) if slot < 0 or RANKS[slot] == 0]
        assert_same_bits(y[idle], alone[idle])


@pytest.mark.gpu
def test_few_tokens_of_a_plan_for_many() -> None:
    """A call with fewer rows than its plan has tokens: the rows beyond are nobody's."""
    site = Site(torch.bfloat16, "cuda", in_features=1024)
    slots = random_slots(60, len(RANKS), generator("pruned"))
    batch = make_batch(slots, len(RANKS), "cuda", 64)
    x = site.x(64)
    assert torch.isfinite(site(x[:13], batch.plan)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 16])
def test_streams_of_weights_one_behind_the_other(num_tokens: int) -> None:
    """Each kernel begins before the one in front has ended, and reads what that wrote."""
    ranks = [16, 64, 0, 3, 8]
    sites = [
        Site(torch.bfloat16, "cuda", in_features=k, slices=[n], extra=0, ranks=ranks, bias=False)
        for k, n in [(2048, 6144), (6144, 1024), (1024, 2048)]
    ]
    check_chain(sites, num_tokens)

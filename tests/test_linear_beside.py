"""lora_linear in a CUDA graph: the shrink begins before the base layer's product has ended."""

from __future__ import annotations

import pytest
import torch

from generators import NAN, generator, make_batch, random_slots
from linear_site import Site, check_chain
from numerics import assert_same_bits
from test_on_device import capture

RANKS = [16, 3, 0, 64, 8]

pytestmark = pytest.mark.gpu


def make_site(
    in_features: int,
    slices: list[int],
    dtype: torch.dtype = torch.bfloat16,
    ranks: list[int] = RANKS,
    bias: bool = False,
) -> Site:
    return Site(
        dtype, "cuda", in_features=in_features, slices=slices, extra=0, bias=bias, ranks=ranks
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [33, 48, 100, 256, 300])
def test_one_behind_the_other(dtype: torch.dtype, num_tokens: int) -> None:
    shapes = [(2048, [9216]), (9216, [1024, 512]), (1536, [1024, 512, 512])]
    check_chain([make_site(k, slices, dtype) for k, slices in shapes], num_tokens)


@pytest.mark.parametrize("ranks", [[16] * 32, [16], [8, 0, 16]], ids=["many", "one", "few"])
def test_ranks_of_one_step(ranks: list[int]) -> None:
    shapes = [(1024, [14336, 14336]), (28672, [1024])]
    check_chain([make_site(k, slices, ranks=ranks) for k, slices in shapes], 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [[64], [33, 0, 128]], ids=["one", "few"])
def test_wide_tiles(ranks: list[int], dtype: torch.dtype) -> None:
    shapes = [(6144, [4096]), (4096, [14336, 14336]), (28672, [6144])]
    check_chain([make_site(k, slices, dtype, ranks=ranks) for k, slices in shapes], 250)


@pytest.mark.parametrize("mix", ["nobody", "one", "all"])
def test_what_comes_next_waits_for_the_product(mix: str) -> None:
    """Also where none of the adapters' thread blocks has anything to wait for."""
    site = make_site(8192, [14336], bias=True)
    slots = {"nobody": [-1] * 200, "one": [-1] * 199 + [0], "all": [0] * 200}[mix]
    x, plan = site.x(200), make_batch(slots, len(RANKS), "cuda").plan
    results: list[torch.Tensor] = []

    def step() -> None:
        y = site(x, plan)
        results[:] = [y, y.clone()]
        x.zero_()

    clean = x.clone()
    graph = capture(step)
    for _ in range(5):
        for result in results:
            result.fill_(NAN)
        x.copy_(clean)
        graph.replay()
        want = site(clean, plan)
        for result in results:
            assert_same_bits(result, want)
        assert not x.any()


def test_temporary_memory_of_the_product() -> None:
    """torch copies such an x for its product, and the copy's memory is free again in the capture
    when the shrink begins, which the product is still reading."""
    site = make_site(4096, [6144])
    slots = random_slots(150, len(RANKS), generator("strided"))
    plan = make_batch(slots, len(RANKS), "cuda").plan
    x = torch.stack([site.x(3, 50), site.x(3, 50)], dim=1)[:, 0]  # rows of no one stride
    want = site(x, plan)
    results: list[torch.Tensor] = []
    graph = capture(lambda: results.__setitem__(slice(None), [site(x, plan) for _ in range(3)]))
    for _ in range(5):
        graph.replay()
        for result in results:
            assert_same_bits(result, want)

"""lora_linear of a few dozen tokens on sm_90a: one product, which takes the adapters along."""

from __future__ import annotations

import pytest
import torch

from generators import generator, make_batch, random_slots
from linear_site import Site, check_chain
from numerics import assert_same_bits

RANKS = [16, 3, 0, 8, 12, 1, 16]
TOKENS = 32  # at most

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="a kernel of sm_90a",
    ),
]


def make_site(
    in_features: int,
    slices: list[int],
    extra: int = 0,
    ranks: list[int] = RANKS,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
) -> Site:
    sizes = {"in_features": in_features, "slices": slices, "extra": extra}
    site = Site(dtype, "cuda", **sizes, bias=bias, ranks=ranks)  # type: ignore[arg-type]
    site.streamed_tokens = TOKENS
    return site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "per_slice"])
@pytest.mark.parametrize(
    ("in_features", "slices", "extra", "ranks"),
    [
        (4096, [4096, 1024, 1024], 0, RANKS),  # clusters of four
        (4104, [6000, 41, 2103], 57, RANKS),  # slices that share a tile, K behind whole steps
        (264, [9001], 23, RANKS),  # no clusters, odd rows
        (14336, [1500], 36, RANKS),  # clusters of six
        (1024, [14336, 14336], 0, RANKS),
        (2048, [8192], 8, [8, 3, 0, 5]),  # rows of B of 16 bytes
        (2048, [5000, 3200], 0, [32, 17, 0, 16, 5]),
        (4096, [6144], 0, [24, 7]),
    ],
)
def test_rounds_once(
    dtype: torch.dtype,
    layout: str,
    in_features: int,
    slices: list[int],
    extra: int,
    ranks: list[int],
) -> None:
    site = make_site(in_features, slices, extra, ranks, dtype, bias=True)
    site.weights, bias = site.module.weights(layout), site.bias
    for with_bias, num_tokens in zip([True, False] * 3, [17, 20, 24, 29, 31, 32], strict=True):
        site.bias = bias if with_bias else None
        slots = random_slots(num_tokens, len(ranks), generator("dozens", num_tokens))
        x = site.x(num_tokens)
        site.check(site(x, make_batch(slots, len(ranks), "cuda").plan), x, slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize(
    ("in_features", "slices"), [(4096, [4096, 1024, 1024]), (14336, [1500]), (264, [9001])]
)
def test_from_nine_tokens_on_in_a_pool_of_one_slot(
    dtype: torch.dtype, rank: int, in_features: int, slices: list[int]
) -> None:
    site = make_site(in_features, slices, ranks=[rank], dtype=dtype)
    for num_tokens in (8, 9, 12, 16, 17):
        for share in (1, 2, 5):
            slots = [0 if t % share == 0 else -1 for t in range(num_tokens)]
            x, plan = site.x(num_tokens), make_batch(slots, 1, "cuda").plan
            site.check(site(x, plan), x, slots)


@pytest.mark.parametrize("mix", ["shared", "distinct", "nobody", "last"])
def test_mixes(mix: str) -> None:
    ranks = [16] * 32
    site = make_site(2048, [6144], ranks=ranks)
    for num_tokens in (17, 26, 32):
        slots = {
            "shared": [5] * num_tokens,
            "distinct": list(range(num_tokens))[::-1],
            "nobody": [-1] * num_tokens,
            "last": [-1] * (num_tokens - 1) + [31],
        }[mix]
        x = site.x(num_tokens)
        plan = make_batch(slots, len(ranks), "cuda").plan
        y = site(x, plan)
        site.check(y, x, slots)
        # It is this product that is tested here: torch's rounds otherwise.
        assert not torch.equal(y, site(x, plan, batch_invariant=True))


def test_a_row_without_adapter_has_its_bits_whatever_the_others_have() -> None:
    site = make_site(4096, [4096, 1024, 1024])
    x = site.x(27)
    alone = site(x, make_batch([-1] * 27, len(RANKS), "cuda").plan)
    for seed in range(5):
        slots = random_slots(27, len(RANKS), generator("others", seed))
        y = site(x, make_batch(slots, len(RANKS), "cuda").plan)
        idle = [t for t, slot in enumerate(slots) if slot < 0 or RANKS[slot] == 0]
        assert_same_bits(y[idle], alone[idle])
        assert_same_bits(site(x, make_batch(slots, len(RANKS), "cuda").plan), y)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_of_one_adapter_stays_there(poison: float) -> None:
    site = make_site(2048, [6144])
    slots = random_slots(32, len(RANKS), generator("poison"))
    x, plan = site.x(32), make_batch(slots, len(RANKS), "cuda").plan
    clean = site(x, plan)
    for side in (site.weights.lora_a, site.weights.lora_b):
        weights = side[0][3].clone()
        side[0][3] = poison
        y = site(x, plan)
        side[0][3] = weights
        others = [t for t, slot in enumerate(slots) if slot != 3]
        assert_same_bits(y[others], clean[others])
        assert not y[[t for t, slot in enumerate(slots) if slot == 3]].isfinite().all()


def test_some_tokens_of_a_plan_for_many() -> None:
    """A call with fewer rows than its plan has tokens: the rows beyond are nobody's."""
    site = make_site(1024, [9000])
    slots = random_slots(60, len(RANKS), generator("pruned"))
    batch = make_batch(slots, len(RANKS), "cuda", 64)
    assert torch.isfinite(site(site.x(64)[:21], batch.plan)).all()


def test_one_behind_the_other() -> None:
    sites = [make_site(k, [n]) for k, n in [(2048, 9216), (9216, 1536), (1536, 2048)]]
    check_chain(sites, 30)

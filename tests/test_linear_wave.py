"""lora_linear of 128 or 256 tokens on sm_90a where W is one wave: the adapters are steps of K."""

from __future__ import annotations

import pytest
import torch

from generators import generator, make_batch, random_slots
from linear_site import Site, check_chain
from numerics import assert_same_bits

RANKS = [16, 3, 0, 8, 12, 1, 16]
TOKENS = 256  # at most

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="a kernel of sm_90a",
    ),
]


def wave() -> int:
    """Rows of W for which every SM has as many as it can take."""
    return 224 * torch.cuda.get_device_properties(0).multi_processor_count


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
@pytest.mark.parametrize("shape", ["even", "odd", "many slices", "short"])
def test_rounds_once(dtype: torch.dtype, layout: str, shape: str) -> None:
    rows = wave()
    in_features, slices, extra = {
        "even": (2048, [rows // 2, rows // 2], 0),
        # Slices that share a CTA, rows that nobody has, K behind whole steps.
        "odd": (1096, [rows // 2 - 3, 41, rows // 2 - 2237], 223),
        "many slices": (1024, [2000, 100, 7, 93, rows - 3000], 800),
        "short": (1024, [rows * 61 // 64 // 8 * 8], 0),
    }[shape]
    extra += -(sum(slices) + extra) % 8
    site = make_site(in_features, slices, extra, dtype=dtype, bias=True)
    site.weights, bias = site.module.weights(layout), site.bias
    for with_bias, num_tokens in zip(
        [True, False] * 3, [120, 127, 128, 240, 251, 256], strict=True
    ):
        site.bias = bias if with_bias else None
        slots = random_slots(num_tokens, len(RANKS), generator("wave", num_tokens))
        x = site.x(num_tokens)
        site.check(site(x, make_batch(slots, len(RANKS), "cuda").plan), x, slots)


@pytest.mark.parametrize("mix", ["shared", "eight", "nobody", "last", "runs"])
def test_mixes(mix: str) -> None:
    ranks = [16] * 8
    site = make_site(1024, [wave()], ranks=ranks)
    for num_tokens in (121, 128, 247, 256):
        slots = {
            "shared": [5] * num_tokens,
            "eight": [t * 5 % 8 for t in range(num_tokens)],
            "nobody": [-1] * num_tokens,
            "last": [-1] * (num_tokens - 1) + [7],
            "runs": [t * 9 // num_tokens - 1 for t in range(num_tokens)],
        }[mix]
        x = site.x(num_tokens)
        plan = make_batch(slots, len(ranks), "cuda").plan
        y = site(x, plan)
        site.check(y, x, slots)
        # It is this product that is tested here: torch's rounds otherwise.
        assert not torch.equal(y, site(x, plan, batch_invariant=True))


def test_a_row_without_adapter_has_its_bits_whatever_the_others_have() -> None:
    site = make_site(1024, [wave()])
    x = site.x(250)
    alone = site(x, make_batch([-1] * 250, len(RANKS), "cuda").plan)
    for seed in range(5):
        slots = random_slots(250, len(RANKS), generator("others", seed))
        y = site(x, make_batch(slots, len(RANKS), "cuda").plan)
        idle = [t for t, slot in enumerate(slots) if slot < 0 or RANKS[slot] == 0]
        assert_same_bits(y[idle], alone[idle])
        assert_same_bits(site(x, make_batch(slots, len(RANKS), "cuda").plan), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_of_one_adapter_stays_there(dtype: torch.dtype, poison: float) -> None:
    rows = wave()
    site = make_site(1024, [rows // 2 + 40, rows // 2 - 40], dtype=dtype)
    slots = random_slots(125, len(RANKS), generator("poison"))
    own = [t for t, slot in enumerate(slots) if slot == 3]
    others = [t for t, slot in enumerate(slots) if slot != 3]
    x, plan = site.x(125), make_batch(slots, len(RANKS), "cuda").plan
    clean = site(x, plan)
    for side in (site.weights.lora_a, site.weights.lora_b):
        weights = side[0][3].clone()
        side[0][3] = poison
        y = site(x, plan)
        side[0][3] = weights
        assert_same_bits(y[others], clean[others])
        assert not y[own].isfinite().any()
    # One value of B: one column of its own tokens.
    b = site.weights.lora_b[0][3]
    value = b[77, 5].clone()
    b[77, 5] = poison
    y = site(x, plan)
    b[77, 5] = value
    assert not y[own, 77].isfinite().any()
    y[own, 77] = clean[own, 77]
    assert_same_bits(y, clean)


def test_some_tokens_of_a_plan_for_many() -> None:
    """A call with fewer rows than its plan has tokens: the rows beyond are nobody's."""
    site = make_site(1024, [wave()])
    slots = random_slots(300, len(RANKS), generator("pruned"))
    batch = make_batch(slots, len(RANKS), "cuda", 320)
    x = site.x(300)[:125]
    assert torch.isfinite(site(x, batch.plan)).all()


def test_one_behind_the_other() -> None:
    rows = wave()
    sites = [make_site(k, [n]) for k, n in [(2048, rows), (rows, 1536), (1536, 2048)]]
    check_chain(sites, 248)

"""Gradients of lora_apply: gradcheck, and the fp64 oracle that autograd makes of the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from generators import (
    HALVES_AND_FP32,
    LAYOUTS,
    NAN,
    apply,
    dtypes_on,
    generator,
    make_batch,
    make_module,
    misaligned,
    on_devices,
    randn,
    random_slots,
    strided_rows,
)
from lora_ext import reference
from numerics import _SPLIT, Expected, assert_close, assert_same_bits, half_ulp, sum_error

# ---- the oracle


def reference_gradients(dy, x, module, weights, batch):
    """(dx, da, db) in fp64: what autograd makes of the reference, one slot at a time."""
    with torch.enable_grad():
        wide_x, *factors = (
            t.detach().double().requires_grad_() for t in (x, *weights.lora_a, *weights.lora_b)
        )
        count = len(weights.lora_a)
        y = reference.apply(
            torch.zeros_like(dy, dtype=torch.float64).requires_grad_(),
            wide_x,
            factors[:count],
            factors[count:],
            module.ranks,
            module.scalings,
            batch.token_slots,
            module.output_slices,
            module.max_rank,
            weights.a_offsets,
            weights.b_offsets,
        )
        dx, *rest = torch.autograd.grad(
            y, (wide_x, *factors), dy.double(), allow_unused=True, materialize_grads=True
        )
    return [dx, *rest]


def expected_gradients(dy, x, module, weights, batch):
    """The oracle's (dx, *da, *db), each with the error that is allowed.

    Each is a sum of products with one operand that is a sum itself, accumulated in fp32 (fp64).
    """
    values = reference_gradients(dy, x, module, weights, batch)
    magnitudes = reference_gradients(
        dy.abs(),
        x.abs(),
        module,
        replace(
            weights,
            lora_a=[a.abs() for a in weights.lora_a],
            lora_b=[b.abs() for b in weights.lora_b],
        ),
        batch,
    )
    rank = max(module.ranks.tolist(), default=0) * module.num_slices
    terms = module.in_features + module.out_features + len(batch.slots) + rank
    result = []
    for value, magnitude in zip(values, magnitudes, strict=True):
        error = sum_error(terms, magnitude, x.dtype)
        if x.dtype in (torch.bfloat16, torch.float16):
            error += _SPLIT * magnitude
        error += half_ulp(value.abs() + error, x.dtype)
        # Exactly 0 where nothing is added: in unused slots and behind the ranks, where NaN lies.
        result.append(Expected(value, torch.where(magnitude == 0, 0.0, error)))
    return result


def gradients(y, x, module, weights, plan, dy):
    """(dy as y gets it, dx, *da, *db) of the op."""
    leaves = [t.detach().requires_grad_() for t in (y, x, *weights.lora_a, *weights.lora_b)]
    y, x, *factors = leaves
    count = len(weights.lora_a)
    with_grad = replace(weights, lora_a=factors[:count], lora_b=factors[count:])
    return torch.autograd.grad(apply(y, x, module, with_grad, plan), leaves, dy)


def random_problem(module, slots, gen, y_dtype=None, extra_columns=0):
    """(y, x, dy, batch) for token slots."""
    batch = make_batch(slots, module.num_slots, module.device)
    dtype = module.dtype if y_dtype is None else y_dtype
    x = randn((len(slots), module.in_features), module.dtype, module.device, gen)
    shape = (len(slots), module.out_features + extra_columns)
    y, dy = (randn(shape, dtype, module.device, gen) for _ in range(2))
    return y, x, dy, batch


def check_gradients(y, x, dy, module, batch, layout, place=lambda t: t):
    """Runs the op and its backward pass and compares all gradients with the oracle's."""
    weights = module.weights(layout, place)
    want = expected_gradients(dy, x, module, weights, batch)
    passed_on, *got = gradients(y, x, module, weights, batch.plan, dy)
    assert_same_bits(passed_on, dy)
    for actual, expected in zip(got, want, strict=True):
        assert actual.dtype == x.dtype
        assert_close(actual, expected)


# ---- gradcheck


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("output_slices", "extra_columns"), [([5], 0), ([6, 2, 3], 0), ([4, 1], 3)], ids=str
)
def test_gradcheck(layout, output_slices, extra_columns):
    gen = generator("gradcheck")
    module = make_module([3, 0, 2, 4, 5], 7, output_slices, torch.float64, "cpu")  # 4 is unused
    weights = module.weights(layout)  # NaN behind the ranks
    slots = [0, -1, 3, 3, 2, 0, 1, 0, -1]
    y, x, _, batch = random_problem(module, slots, gen, extra_columns=extra_columns)
    count = len(weights.lora_a)

    def function(y, x, *factors):
        changed = replace(weights, lora_a=list(factors[:count]), lora_b=list(factors[count:]))
        return apply(y, x, module, changed, batch.plan)

    leaves = [t.requires_grad_() for t in (y, x, *weights.lora_a, *weights.lora_b)]
    assert torch.autograd.gradcheck(function, leaves)


# ---- against the oracle


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_slices", [[96], [64, 33, 7]], ids=["1", "3"])
def test_mixed_ranks(device, layout, output_slices):
    ranks = [0, 1, 3, 8, 16, 33, 64, 100]
    for dtype in dtypes_on(device):
        gen = generator("grad", output_slices)
        module = make_module(ranks, 160, output_slices, dtype, device)
        slots = [*random_slots(90, len(ranks), gen), *[7] * 40, *[4] * 150]
        y, x, dy, batch = random_problem(module, slots, gen)
        check_gradients(y, x, dy, module, batch, layout)


@on_devices
@pytest.mark.parametrize("rank", [1, 16, 65, 256, 1000])
def test_one_rank_for_all(device, rank):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("grad rank", rank)
        module = make_module([rank] * 3, 100, [70], dtype, device)
        y, x, dy, batch = random_problem(module, [0, 0, 1, -1, 2, 1, *[2] * 70], gen)
        check_gradients(y, x, dy, module, batch, "packed")


@on_devices
@pytest.mark.parametrize("in_features", [1, 7, 31, 64, 129, 1000])
def test_any_in_features(device, in_features):
    for dtype in dtypes_on(device):
        gen = generator("grad K", in_features)
        module = make_module([3, 16, 0, 40], in_features, [24, 8], dtype, device)
        y, x, dy, batch = random_problem(module, random_slots(41, 4, gen), gen)
        check_gradients(y, x, dy, module, batch, "packed")


@on_devices
@pytest.mark.parametrize("width", [1, 3, 15, 64, 129, 4097])
def test_any_width(device, width):
    for dtype in dtypes_on(device):
        gen = generator("grad N", width)
        module = make_module([3, 16, 0, 40], 48, [width], dtype, device)
        y, x, dy, batch = random_problem(module, random_slots(31, 4, gen), gen)
        check_gradients(y, x, dy, module, batch, "packed")


@on_devices
@pytest.mark.parametrize("y_dtype", HALVES_AND_FP32)
def test_any_dtype_of_y(device, y_dtype):
    for dtype in dtypes_on(device):
        gen = generator("grad y", y_dtype)
        module = make_module([16, 5], 64, [100], dtype, device)
        y, x, dy, batch = random_problem(module, random_slots(70, 2, gen), gen, y_dtype)
        check_gradients(y, x, dy, module, batch, "packed")


SITUATIONS = {
    "no tokens": [],
    "one token": [2],
    "one token without adapter": [-1],
    "all without adapter": [-1] * 33,
    "interleaved": [-1, 0, -1, 1, -1, 2, -1, 3] * 5,
    "one adapter": [1] * 300,
    "runs": [0] * 17 + [-1] * 3 + [1] * 64 + [0] * 5 + [3] * 65 + [-1],
    "long and short": [1] * 3000 + [0, 2, -1] * 7,
}


@on_devices
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(device, situation):
    for dtype in (torch.bfloat16, torch.float32):
        gen = generator("grad situation", situation)
        module = make_module([16, 8, 33, 0], 72, [40, 24], dtype, device)
        y, x, dy, batch = random_problem(module, SITUATIONS[situation], gen)
        check_gradients(y, x, dy, module, batch, "packed")


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_sums(device, dtype):
    # Sums that several thread blocks share: over N, and over the tokens of a slot.
    gen = generator("grad long")
    module = make_module([16, 64], 256, [3000, 1100], dtype, device)
    y, x, dy, batch = random_problem(module, [0] * 1500 + [1, 0, -1] * 300, gen)
    check_gradients(y, x, dy, module, batch, "per_slice")


@on_devices
def test_many_slots(device):
    gen = generator("grad many")
    ranks = [(7 * slot) % 20 for slot in range(300)]
    module = make_module(ranks, 64, [32], torch.bfloat16, device)
    y, x, dy, batch = random_problem(module, random_slots(700, 300, gen), gen)
    check_gradients(y, x, dy, module, batch, "flat")


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_and_strided(device, layout):
    for dtype in dtypes_on(device):
        gen = generator("grad misaligned")
        module = make_module([16, 33, 3], 128, [64, 40], dtype, device)
        y, x, dy, batch = random_problem(module, random_slots(40, 3, gen), gen)
        for move in (misaligned, lambda t: strided_rows(t, 8), lambda t: strided_rows(t, 3)):
            check_gradients(move(y), move(x), move(dy), module, batch, layout, misaligned)


@on_devices
def test_unit_dimensions_and_strided_pools(device):
    # Pools as engines have them: [L, 1, R, K] per slice, views into a larger one.
    gen = generator("grad unit")
    module = make_module([16, 5], 64, [32, 24], torch.float32, device)
    y, x, dy, batch = random_problem(module, random_slots(25, 2, gen), gen)
    plain = module.weights("per_slice")

    def engine_pool(t):
        larger = t.new_full((t.shape[0], 3, t.shape[1] + 2, t.shape[2] + 8), NAN)
        view = larger[:, 1:2, : t.shape[1], 8:]
        view.copy_(t[:, None])
        return view

    views = replace(
        plain,
        lora_a=[engine_pool(a) for a in plain.lora_a],
        lora_b=[engine_pool(b) for b in plain.lora_b],
    )
    want = gradients(y, x, module, plain, batch.plan, dy)
    for actual, expected in zip(gradients(y, x, module, views, batch.plan, dy), want, strict=True):
        assert_same_bits(actual.reshape(expected.shape), expected)


@on_devices
def test_expanded_gradient_and_wider_y(device):
    # The gradient of a sum has stride 0; y may have columns of nobody's.
    gen = generator("grad wider")
    module = make_module([16, 4], 64, [48], torch.float32, device)
    y, x, _, batch = random_problem(module, random_slots(30, 2, gen), gen, extra_columns=5)
    dy = torch.ones((), device=device).expand(y.shape)
    check_gradients(y, x, dy, module, batch, "packed")


@on_devices
def test_plan_with_other_tokens(device):
    # Padding behind the plan's tokens, and a call that has only the first of them.
    gen = generator("grad padding")
    module = make_module([16, 4], 64, [48], torch.float32, device)
    y, x, dy, _ = random_problem(module, [0] * 300, gen)
    slots = [0] * 250 + [1, -1] * 10
    x[270:] = NAN
    weights = module.weights("packed")
    longer = make_batch(slots, 2, device, max_tokens=500)
    _, dx, *_ = got = gradients(y, x, module, weights, longer.plan, dy)
    assert (dx[270:] == 0).all()
    short = make_batch(slots, 2, device)
    for actual, expected in zip(
        got, gradients(y[:270], x[:270], module, weights, short.plan, dy[:270]), strict=True
    ):
        assert_same_bits(actual[:270], expected)
    order = [1] * 3 + [0] * 297
    whole = make_batch(order[::-1], 2, device)
    x[270:] = 0
    part = make_batch(order[::-1][:5], 2, device)
    for actual, expected in zip(
        gradients(y[:5], x[:5], module, weights, whole.plan, dy[:5]),
        gradients(y[:5], x[:5], module, weights, part.plan, dy[:5]),
        strict=True,
    ):
        assert_same_bits(actual, expected)


@on_devices
@pytest.mark.parametrize("wanted", ["y", "x", "a", "b", "xa", "ab", "one of a"])
def test_only_what_is_wanted(device, wanted):
    gen = generator("grad wanted")
    module = make_module([16, 4, 8], 64, [48, 16], torch.float32, device)
    y, x, dy, batch = random_problem(module, random_slots(50, 3, gen), gen)
    weights = module.weights("per_slice")
    names = ["y", "x", "a", "one of a" if wanted == "one of a" else "a", "b", "b"]
    every = gradients(y, x, module, weights, batch.plan, dy)
    leaves = [t.detach().clone() for t in (y, x, *weights.lora_a, *weights.lora_b)]
    chosen = [
        i for i, name in enumerate(names) if name == wanted or (len(name) == 1 and name in wanted)
    ]
    if wanted == "one of a":
        chosen = [3]
    for i in chosen:
        leaves[i].requires_grad_()
    with_grad = replace(weights, lora_a=leaves[2:4], lora_b=leaves[4:])
    result = apply(leaves[0], leaves[1], module, with_grad, batch.plan)
    result.backward(dy)
    for i, leaf in enumerate(leaves):
        if i in chosen:
            assert_same_bits(leaf.grad, every[i])
        else:
            assert leaf.grad is None


@on_devices
def test_nan_of_one_adapter_reaches_no_other_gradient(device):
    for dtype in dtypes_on(device):
        gen = generator("grad nan")
        module = make_module([16, 16, 16, 16], 64, [48, 16], dtype, device)
        slots = [0, 1, 2, 3, -1] * 9
        y, x, dy, batch = random_problem(module, slots, gen)
        clean = gradients(y, x, module, module.weights("packed"), batch.plan, dy)
        module.a[1][0].fill_(NAN)
        module.b[2][1].fill_(float("inf"))
        x[4::5] = NAN
        dy[0] = NAN
        dirty = gradients(y, x, module, module.weights("packed"), batch.plan, dy)
        assert_same_bits(dirty[1][3::5], clean[1][3::5])
        for factor in (2, 3):
            assert_same_bits(dirty[factor][3], clean[factor][3])
        assert (dirty[1][4::5] == 0).all()
        assert dirty[1][0].isnan().all() and dirty[2][0].isnan().all()


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic(device, dtype):
    gen = generator("grad deterministic")
    module = make_module([16, 64, 3, 0, 128], 512, [200, 56], dtype, device)
    y, x, dy, batch = random_problem(module, random_slots(200, 5, gen), gen)
    weights = module.weights("packed")
    first = gradients(y, x, module, weights, batch.plan, dy)
    for _ in range(20 if device == "cuda" else 5):
        for again, before in zip(
            gradients(y, x, module, weights, batch.plan, dy), first, strict=True
        ):
            assert_same_bits(again, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_for_any_number_of_threads(dtype):
    gen = generator("grad threads")
    module = make_module([16, 64, 3], 300, [200, 56], dtype, "cpu")
    y, x, dy, batch = random_problem(module, random_slots(200, 3, gen), gen)
    weights = module.weights("packed")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(gradients(y, x, module, weights, batch.plan, dy))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@on_devices
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_problem(device, data):
    ranks = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=6), "ranks")
    slots = data.draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=150), "slots")
    output_slices = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=8), "slices")
    in_features = data.draw(st.integers(1, 300), "K")
    dtype = data.draw(st.sampled_from(dtypes_on(device)), "dtype")
    y_dtype = data.draw(st.sampled_from(HALVES_AND_FP32), "dtype of y")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    module = make_module(ranks, in_features, output_slices, dtype, device)
    y, x, dy, batch = random_problem(module, slots, generator("grad any"), y_dtype)
    check_gradients(y, x, dy, module, batch, layout)

"""lora_linear, lora_fork and lora_join_: a base layer and its adapters, behind or beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from generators import (
    HALVES_AND_FP32,
    LAYOUTS,
    NAN,
    apply_,
    generator,
    make_batch,
    make_module,
    on_devices,
    random_slots,
    strided_rows,
)
from linear_site import RANKS, Site
from lora_ext import ops
from numerics import assert_same_bits
from test_on_device import MIXES, NUM_SLOTS, capture, no_synchronisation
from test_plan_batch import fill

WAYS = pytest.mark.parametrize("overlap", [False, True], ids=["behind", "beside"])


# ---- what it computes


@on_devices
@WAYS
@pytest.mark.parametrize("dtype", HALVES_AND_FP32, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_the_oracle(device: str, overlap: bool, dtype: torch.dtype, layout: str) -> None:
    site = Site(dtype, device)
    site.weights = site.module.weights(layout)
    slots = random_slots(45, len(RANKS), generator("slots"))
    x = site.x(45)
    y = site(x, make_batch(slots, len(RANKS), device).plan, overlap=overlap)
    site.check(y, x, slots, overlap=overlap)


@on_devices
@WAYS
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 16, 17, 300, 1500])
def test_any_number_of_tokens(device: str, overlap: bool, num_tokens: int) -> None:
    site = Site(torch.bfloat16, device, bias=False)
    slots = random_slots(num_tokens, len(RANKS), generator("many"))
    x = site.x(num_tokens)
    y = site(x, make_batch(slots, len(RANKS), device).plan, overlap=overlap)
    assert y.shape == (num_tokens, 152)
    site.check(y, x, slots, overlap=overlap)


@on_devices
@WAYS
def test_leading_dimensions_are_tokens(device: str, overlap: bool) -> None:
    site = Site(torch.float32, device)
    slots = [0, 3, -1, 4, 1, 1]
    plan = make_batch(slots, len(RANKS), device).plan
    for x in (site.x(2, 3), site.x(3, 1, 2), site.x(3, 2).transpose(0, 1)):
        y = site(x, plan, overlap=overlap)
        assert y.shape == (*x.shape[:-1], 152)
        site.check(y, x, slots, overlap=overlap)
    one = site.x()
    y = site(one, make_batch([3], len(RANKS), device).plan, overlap=overlap)
    assert y.shape == (152,)
    site.check(y[None], one[None], [3], overlap=overlap)
    gaps = strided_rows(site.x(6), 8)
    site.check(site(gaps, plan, overlap=overlap), gaps, slots, overlap=overlap)


@on_devices
@WAYS
def test_a_layer_without_outputs_or_slots_in_use_is_its_base(device: str, overlap: bool) -> None:
    site = Site(torch.bfloat16, device, slices=[0], extra=40)
    x = site.x(5)
    plan = make_batch([0, 1, 2, 3, 4], len(RANKS), device).plan
    assert_same_bits(site(x, plan, overlap=overlap), site.base(x))
    site, slots = Site(torch.bfloat16, device), [-1, 2, -1, 2, -1]
    y = site(x, make_batch(slots, len(RANKS), device).plan, overlap=overlap)
    site.check(y, x, slots, overlap=overlap)


@on_devices
@WAYS
@pytest.mark.parametrize("num_tokens", [11, 60])
def test_deterministic(device: str, overlap: bool, num_tokens: int) -> None:
    site = Site(torch.bfloat16, device, in_features=1024)
    x, slots = site.x(num_tokens), random_slots(num_tokens, len(RANKS), generator("same"))
    plan = make_batch(slots, len(RANKS), device).plan
    first = site(x, plan, overlap=overlap)
    for _ in range(50 if device == "cuda" else 5):
        assert_same_bits(site(x, plan, overlap=overlap), first)


@on_devices
@WAYS
@pytest.mark.parametrize("num_tokens", [60, 300])
@pytest.mark.parametrize("ranks", [RANKS, [64]], ids=["few a slot", "wide tiles"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_is_lora_apply_behind_the_base_layer(
    device: str, overlap: bool, num_tokens: int, ranks: list[int], batch_invariant: bool
) -> None:
    """Bit for bit, whichever stream its first half runs on, and with any base layer between."""
    site = Site(torch.bfloat16, device, in_features=1024, ranks=ranks)
    x = site.x(num_tokens)
    slots = random_slots(num_tokens, len(ranks), generator("behind"))
    plan = make_batch(slots, len(ranks), device).plan
    want = site.base(x)
    apply_(want, x, site.module, site.weights, plan, batch_invariant=batch_invariant)
    options = {"overlap": overlap, "batch_invariant": batch_invariant}
    assert_same_bits(site(x, plan, **options), want)
    assert_same_bits(site.forked(x, plan, **options), want)


# ---- torch


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device: str, layout: str) -> None:
    site = Site(torch.float32, device, in_features=24, slices=[8, 5], extra=3, ranks=[7, 7])
    site.weights = site.module.weights(layout)
    plan = make_batch([0, 1, 0, 1], 2, device).plan
    x, arguments = site.x(2, 2), site.arguments(plan)
    op = torch.ops.lora_ext.lora_linear.default
    for bias in (site.bias, None):
        torch.library.opcheck(op, (x, site.weight, bias, *arguments[2:]))
    torch.library.opcheck(op, (x, *arguments, False, True))
    a, b, *rest, a_offsets, b_offsets = arguments[2:]
    rows = x.flatten(0, 1)
    # Not its values: before the join another stream may still be writing them.
    half = torch.ops.lora_ext.lora_fork(rows, a, *rest, a_offsets)
    torch.library.opcheck(
        torch.ops.lora_ext.lora_fork.default,
        (rows, a, *rest, a_offsets),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.lora_ext.lora_join_.default,
        (torch.zeros(4, 16, device=device), half, rows, a, b, *rest, a_offsets, b_offsets),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="overlap"):
        torch.ops.lora_ext.lora_fork(rows, a, *rest, a_offsets, False, True)


@on_devices
def test_the_operator_leaves_no_trace_of_the_base_layer_alone_in_autograd(device: str) -> None:
    """The base product's gradient without the adapters' would be wrong without a word."""
    site = Site(torch.float32, device)
    site.weight.requires_grad_()
    plan = make_batch([0, 1, -1], len(RANKS), device).plan
    x = site.x(3).requires_grad_()
    y = torch.ops.lora_ext.lora_linear(x, *site.arguments(plan))
    with pytest.warns(UserWarning, match="autograd kernel"):
        y.sum().backward()
    assert x.grad is None or (x.grad == 0).all()


@on_devices
@WAYS
def test_where_gradients_are_wanted_it_is_the_differentiable_form(
    device: str, overlap: bool
) -> None:
    site = Site(torch.float32, device)
    slots = [0, 1, -1, 3]
    plan = make_batch(slots, len(RANKS), device).plan
    x = site.x(4)
    with torch.no_grad():
        want = site(x, plan, overlap=overlap)
    x.requires_grad_()
    y = site(x, plan, overlap=overlap)
    assert y.requires_grad
    assert_same_bits(y.detach(), want)


def bad_calls() -> list[tuple[str, dict[str, Any], list[str]]]:
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("x width", dict(x=torch.zeros(4, 23)), ["lora_a", "23"]),
        ("x scalar", dict(x=torch.zeros(())), ["x", "features"]),
        ("x strided", dict(x=torch.zeros(24, 4).T), ["x", "contiguous"]),
        ("capacity", dict(x=torch.zeros(65, 24)), ["65", "64"]),
        ("weight dim", dict(weight=torch.zeros(24)), ["weight", "[24]"]),
        ("weight width", dict(weight=torch.zeros(16, 25)), ["weight", "[16, 25]", "24"]),
        ("weight rows", dict(weight=torch.zeros(12, 24)), ["weight", "12", "13"]),
        ("weight dtype", dict(weight=torch.zeros(16, 24).half()), ["weight", "Half"]),
        ("bias width", dict(bias=torch.zeros(15)), ["bias", "[15]", "[16, 24]"]),
        ("bias dtype", dict(bias=torch.zeros(16).half()), ["bias", "Half"]),
        ("B dtype", dict(lora_b=[torch.zeros(2, 13, 7).half()]), ["lora_b", "dtype"]),
        ("ranks", dict(ranks=torch.zeros(2).long()), ["ranks", "int32"]),
    ]


@on_devices
@WAYS
@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument(device: str, overlap: bool, case: Any) -> None:
    module = make_module([4, 7], 24, [8, 5], torch.float32, device)
    weights = module.weights("packed")
    good = dict(
        x=torch.ones(4, 24),
        weight=torch.zeros(16, 24),
        bias=torch.zeros(16),
        lora_a=weights.lora_a,
        lora_b=weights.lora_b,
        ranks=module.ranks,
        scalings=module.scalings,
        plan=make_batch([0, 1, -1, 1], 2, device).plan,
        output_slices=[8, 5],
        max_rank=7,
    )

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device) if isinstance(value, Tensor) else value

    _, changes, words = case
    with pytest.raises(RuntimeError) as error:
        ops.lora_linear(
            **{name: move(v) for name, v in {**good, **changes}.items()}, overlap=overlap
        )
    for word in words:
        assert word in str(error.value)


@on_devices
def test_join_refuses_what_no_fork_returned(device: str) -> None:
    site = Site(torch.float32, device)
    x, plan = site.x(4), make_batch([0, 1, -1, 1], len(RANKS), device).plan
    a, b, *rest, a_offsets, b_offsets = site.arguments(plan)[2:]
    y = torch.zeros(4, 152, device=device)
    half = torch.ops.lora_ext.lora_fork(x, a, *rest, a_offsets)
    with pytest.raises(RuntimeError, match=r"forked is .* expected what lora_fork returned"):
        torch.ops.lora_ext.lora_join_(y, half[1:], x, a, b, *rest, a_offsets, b_offsets)
    assert (y == 0).all()
    torch.ops.lora_ext.lora_join_(y, half, x, a, b, *rest, a_offsets, b_offsets)


# ---- what only a GPU has


CALLS: dict[str, Callable[[Site, Tensor, Tensor], Tensor]] = {
    "behind": lambda site, x, plan: site(x, plan, overlap=False),
    "beside": lambda site, x, plan: site(x, plan, overlap=True),
    "forked": lambda site, x, plan: site.forked(x, plan),
    "forked, beside": lambda site, x, plan: site.forked(x, plan, overlap=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_graph_serves_every_mix(call: Any, dtype: torch.dtype) -> None:
    """Other adapters and ranks, none at all, fewer tokens, a slot reloaded in place; with two
    sites one behind the other, so that the second stream is forked and joined twice."""
    ranks = [16, 64, 0, 3, 128, 8, 1, 33]
    up = Site(dtype, "cuda", in_features=2048, ranks=ranks)
    down = Site(dtype, "cuda", in_features=152, slices=[2048], extra=0, ranks=ranks)
    x, batch = up.x(100), make_batch([0] * 100, NUM_SLOTS, "cuda")
    outputs: dict[str, Tensor] = {}

    def step(plan: Tensor) -> tuple[Tensor, Tensor]:
        middle = call(up, x, plan)
        return middle, call(down, middle, plan)

    def captured_step() -> None:
        outputs["middle"], outputs["y"] = step(batch.plan)

    graph = capture(captured_step)
    for round_ in range(2):
        for slots in MIXES.values():
            fill(batch.plan, slots, NUM_SLOTS)
            for output in outputs.values():
                output.fill_(NAN)
            graph.replay()
            middle, y = step(make_batch(slots, NUM_SLOTS, "cuda", 100).plan)
            assert_same_bits(outputs["middle"], middle)
            assert_same_bits(outputs["y"], y)
            up.check(outputs["middle"], x, slots)
            down.check(outputs["y"], outputs["middle"], slots)
        if round_ == 0:
            for site in (up, down):
                reload_in_place(site)


def reload_in_place(site: Site) -> None:
    """Other weights, ranks and scalings at the same addresses."""
    module = site.module
    other = make_module(
        [3, 128, 16, 0, 64, 2, 33, 1],
        module.in_features,
        module.output_slices,
        module.dtype,
        module.device,
        seed="reloaded",
    )
    weights = other.weights("packed")
    site.weights.lora_a[0].copy_(weights.lora_a[0])
    site.weights.lora_b[0].copy_(weights.lora_b[0])
    module.ranks.copy_(other.ranks)
    module.scalings.copy_(other.scalings)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [12, 64])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_it_runs_behind_what_was_queued_and_before_what_comes(call: Any, num_tokens: int) -> None:
    """x appears late, and is destroyed right after the call; so is freed memory, by a caller that
    allocates much. On any other order of the two streams NaN would be read."""
    site = Site(torch.bfloat16, "cuda", in_features=4096, slices=[4096], extra=0)
    slots = [0, 1, 3, 4] * (num_tokens // 4)
    values, plan = site.x(num_tokens), make_batch(slots, len(RANKS), "cuda").plan
    want = call(site, values, plan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for target in (torch.cuda.current_stream(), stream):
        with torch.cuda.stream(target):
            for _ in range(20):
                x = torch.full_like(values, NAN)
                torch.cuda._sleep(2_000_000)
                x.copy_(values)
                y = call(site, x, plan)
                x.fill_(NAN)
                del x
                poison = [torch.full((1 << size,), NAN, device="cuda") for size in range(6, 20)]
                del poison
                assert_same_bits(y, want)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_streams_do_not_disturb_each_other(call: Any) -> None:
    site = Site(torch.bfloat16, "cuda", in_features=4096, slices=[1024], extra=0)
    plan = make_batch([0, 1, 3, 4] * 4, len(RANKS), "cuda").plan
    inputs = [site.x(16) * (i + 1) for i in range(4)]
    want = [call(site, x, plan) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(site, x, plan))
        torch.cuda.synchronize()
        for y, expected in zip(results, want, strict=True):
            assert_same_bits(y, expected)


@pytest.mark.gpu
def test_a_capture_that_is_the_first_call_of_its_stream() -> None:
    site = Site(torch.bfloat16, "cuda", in_features=2048)
    x, plan = site.x(9), make_batch([0, 1, 3] * 3, len(RANKS), "cuda").plan
    want = site(x, plan, overlap=True)
    torch.cuda.synchronize()
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            y = site(x, plan, overlap=True)
        y.fill_(NAN)
        graph.replay()
        assert_same_bits(y, want)


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_synchronises(call: Any) -> None:
    site = Site(torch.bfloat16, "cuda", in_features=2048)
    x, plan = site.x(9), make_batch([0, 1, 3] * 3, len(RANKS), "cuda").plan
    call(site, x, plan)
    with no_synchronisation():
        call(site, x, plan)

"""lora_apply_: determinism, batch invariance, torch.compile, autograd, threads and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generators import (
    LAYOUTS,
    apply_,
    apply_arguments,
    expand_,
    generator,
    make_batch,
    make_module,
    on_devices,
    randn,
    random_slots,
    shrink,
)
from lora_ext import ops
from numerics import assert_same_bits

devices = on_devices


def problem(device, dtype=torch.bfloat16, num_tokens=60, in_features=512, **kwargs):
    """(module, weights, x, y, slots) with ranks that take different paths."""
    gen = generator("modes", num_tokens)
    module = make_module([16, 64, 3, 0, 128], in_features, [200, 56], dtype, device, **kwargs)
    x = randn((num_tokens, in_features), dtype, device, gen)
    y = randn((num_tokens, 256), dtype, device, gen)
    return module, module.weights("packed"), x, y, random_slots(num_tokens, 5, gen)


def applied(y, x, module, weights, plan, **options):
    result = y.clone()
    apply_(result, x, module, weights, plan, **options)
    return result


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic(device, dtype):
    module, weights, x, y, slots = problem(device, dtype)
    plan = make_batch(slots, 5, device).plan
    first = applied(y, x, module, weights, plan)
    for _ in range(100 if device == "cuda" else 20):
        assert_same_bits(applied(y, x, module, weights, plan), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_for_any_number_of_threads(dtype):
    module, weights, x, y, slots = problem("cpu", dtype, in_features=1000)
    plan = make_batch(slots, 5, "cpu").plan
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(applied(y, x, module, weights, plan))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_is_shrink_then_expand_on_the_cpu():
    # Bit for bit, where on a GPU one kernel may do both and sum in another order.
    module, weights, x, y, slots = problem("cpu")
    plan = make_batch(slots, 5, "cpu").plan
    apart = y.clone()
    expand_(apart, shrink(x, module, weights, plan), module, weights, plan)
    assert_same_bits(applied(y, x, module, weights, plan), apart)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_invariant_rows_do_not_depend_on_the_batch(device, dtype, layout):
    module, _, x, y, slots = problem(device, dtype, num_tokens=150, in_features=1024)
    weights = module.weights(layout)

    def rows(tokens, batch_slots, max_tokens=None):
        plan = make_batch(batch_slots, 5, device, max_tokens).plan
        return applied(y[tokens], x[tokens], module, weights, plan, batch_invariant=True)

    everything = rows(list(range(150)), slots)
    for token in range(0, 150, 13):
        assert_same_bits(rows([token], [slots[token]])[0], everything[token])
        assert_same_bits(rows([token], [slots[token]], 1000)[0], everything[token])
    for tokens in (list(range(70)), list(range(149, -1, -1)), list(range(0, 150, 2))):
        assert_same_bits(rows(tokens, [slots[t] for t in tokens]), everything[tokens])
    # Alone among many tokens of its own adapter, and of another one.
    for other in (1, 4):
        token = slots.index(1)
        batch_slots = [other] * 150
        batch_slots[token] = 1
        assert_same_bits(rows(list(range(150)), batch_slots)[token], everything[token])


@devices
def test_functional_form_leaves_y_alone(device):
    module, weights, x, y, slots = problem(device)
    plan = make_batch(slots, 5, device).plan
    before = y.clone()
    result = ops.lora_apply(
        y,
        x,
        weights.lora_a,
        weights.lora_b,
        module.ranks,
        module.scalings,
        plan,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
    )
    assert_same_bits(y, before)
    assert_same_bits(result, applied(y, x, module, weights, plan))
    assert result.data_ptr() != y.data_ptr()


@devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    module = make_module([4, 7], 24, [8, 5], torch.float32, device)
    weights = module.weights(layout)
    plan = make_batch([0, 1, -1, 1], 2, device).plan
    x, y = torch.ones(4, 24, device=device), torch.zeros(4, 13, device=device)
    arguments = (y, x, *apply_arguments(module, weights, plan))
    for op in (torch.ops.lora_ext.lora_apply_.default, torch.ops.lora_ext.lora_apply.default):
        torch.library.opcheck(op, arguments)
        torch.library.opcheck(op, (*arguments, True))


@devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gives_the_same_bits(device, dynamic):
    module, weights, x, _, slots = problem(device, torch.float32)
    base = torch.nn.Linear(512, 256, bias=False, device=device)

    def layer(x, plan):
        result = base(x)
        apply_(result, x, module, weights, plan)
        return result * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch_slots in (slots, [-1] * 60, [1] * 60):
            plan = make_batch(batch_slots, 5, device).plan
            with torch._dynamo.config.patch(error_on_recompile=batch_slots is not slots):
                assert_same_bits(compiled(x, plan), layer(x, plan))


@devices
def test_compiled_slices_of_a_packed_result(device):
    module, weights, x, y, slots = problem(device, torch.float32)
    plan = make_batch(slots, 5, device).plan

    def layer(x, y):
        parts = y + 1
        apply_(parts[:, :256], x, module, weights, plan)
        return parts.sum(0), parts

    with torch.no_grad():
        wide = torch.cat([y, y], dim=1)
        for actual, want in zip(
            torch.compile(layer, fullgraph=True)(x, wide), layer(x, wide), strict=True
        ):
            torch.testing.assert_close(actual, want)


@devices
def test_in_place_form_refuses_what_needs_gradients(device):
    module, weights, x, y, slots = problem(device, torch.float32)
    plan = make_batch(slots, 5, device).plan
    before = y.clone()
    with pytest.raises(RuntimeError, match="requires grad"):
        apply_(y, x.requires_grad_(), module, weights, plan)
    assert_same_bits(y, before)
    with torch.no_grad():
        apply_(y, x, module, weights, plan)


def bad_calls():
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("x dim", dict(x=torch.zeros(4)), ["x", "2-D", "[4]"]),
        ("y dim", dict(y=torch.zeros(13)), ["y", "2-D", "[13]"]),
        ("x strided", dict(x=torch.zeros(24, 4).T), ["x", "contiguous"]),
        ("y strided", dict(y=torch.zeros(13, 4).T), ["y", "contiguous"]),
        ("y too narrow", dict(y=torch.zeros(4, 12)), ["y", "12", "13"]),
        ("tokens", dict(x=torch.zeros(5, 24)), ["x", "5", "4"]),
        ("capacity", dict(x=torch.zeros(65, 24), y=torch.zeros(65, 13)), ["65", "64"]),
        ("x width", dict(x=torch.zeros(4, 23)), ["lora_a", "23"]),
        ("x dtype", dict(x=torch.zeros(4, 24).int()), ["x", "float"]),
        ("mixed dtypes", dict(x=torch.zeros(4, 24).half()), ["lora_a", "dtype"]),
        ("B dtype", dict(lora_b=[torch.zeros(2, 13, 7).half()]), ["lora_b", "dtype"]),
        ("B rows", dict(lora_b=[torch.zeros(2, 12, 7)]), ["lora_b", "12"]),
        ("A rows", dict(lora_a=[torch.zeros(2, 13, 24)]), ["lora_a", "13", "14"]),
        ("A count", dict(lora_a=[torch.zeros(2, 7, 24)] * 3), ["lora_a", "2", "3"]),
        ("B per slice", dict(lora_b=[torch.zeros(2, 5, 7)] * 2), ["lora_b[0]", "5", "8"]),
        ("max_rank", dict(max_rank=0), ["max_rank", "0"]),
        ("slices", dict(output_slices=[-8, 5]), ["output_slices[0]", "-8"]),
        ("scalings", dict(scalings=torch.zeros(2).half()), ["scalings", "float32"]),
        ("ranks", dict(ranks=torch.zeros(2).long()), ["ranks", "int32"]),
        ("plan", dict(plan=torch.zeros(99).int()), ["plan", "99"]),
        ("a_offsets", dict(a_offsets=torch.zeros(2).long()), ["lora_a", "1-D"]),
        ("b_offsets", dict(b_offsets=torch.zeros(2).int()), ["lora_b"]),
    ]


@devices
@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument_and_leave_y_alone(device, case):
    module = make_module([4, 7], 24, [8, 5], torch.float32, device)
    weights = module.weights("packed")
    good = dict(
        y=torch.zeros(4, 13),
        x=torch.ones(4, 24),
        lora_a=weights.lora_a,
        lora_b=weights.lora_b,
        ranks=module.ranks,
        scalings=module.scalings,
        plan=make_batch([0, 1, -1, 1], 2, device).plan,
        output_slices=[8, 5],
        max_rank=7,
    )

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    _, changes, words = case
    call = {name: move(value) for name, value in {**good, **changes}.items()}
    with pytest.raises(RuntimeError) as error:
        ops.lora_apply_(**call)
    for word in words:
        assert word in str(error.value)
    assert (call["y"] == 0).all()


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa):
    # The choice is made once per process, so the oracle tests run again in another one.
    here = Path(__file__).parent
    tests = ["test_lora_apply.py", "test_lora_shrink.py", "test_lora_expand.py"]
    selection = "cpu and (all_ranks or any_width or any_in_features or widens or rounds or dtype)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
        + [str(here / name) for name in tests],
        env={**os.environ, "LORA_EXT_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]

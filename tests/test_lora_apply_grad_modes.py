"""Autograd around lora_apply: what is compiled, what is recorded, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from generators import (
    LAYOUTS,
    apply,
    apply_,
    apply_arguments,
    generator,
    make_batch,
    make_module,
    on_devices,
    randn,
)
from lora_ext import LoRABatch, ops
from numerics import assert_same_bits
from test_lora_apply_grad import random_problem


def problem(device, layout="packed"):
    gen = generator("grad modes", layout)
    module = make_module([4, 7], 24, [8, 5], torch.float32, device)
    y, x, dy, batch = random_problem(module, [0, 1, -1, 1], gen)
    return module, module.weights(layout), y, x, dy, batch


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    module, weights, y, x, dy, batch = problem(device, layout)
    for tensor in (y, x, *weights.lora_a, *weights.lora_b):
        tensor.nan_to_num_(nan=0.0).requires_grad_()
    arguments = apply_arguments(module, weights, batch.plan)
    torch.library.opcheck(torch.ops.lora_ext.lora_apply.default, (y, x, *arguments))
    backward = torch.ops.lora_ext.lora_apply_backward.default
    with torch.no_grad():
        for needs in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(backward, (dy, x.detach(), *arguments, *needs))


@on_devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_training_step(device, dynamic):
    # Forward and backward without a graph break, and without a recompile for another batch.
    module, weights, *_ = problem(device)
    base = torch.nn.Linear(24, 13, device=device)
    head = torch.nn.Linear(13, 3, device=device)
    factors = [t.detach().requires_grad_() for t in (*weights.lora_a, *weights.lora_b)]
    leaves = [*factors, *base.parameters(), *head.parameters()]
    with_grad = replace(weights, lora_a=factors[:1], lora_b=factors[1:])

    def loss(x, plan):
        return head(torch.relu(apply(base(x), x, module, with_grad, plan))).square().sum()

    torch._dynamo.reset()
    # Inductor (torch 2.11) doubles some of the head's gradient in place with more threads than it
    # has elements, and one thread may then read what another has written: the sum over it, the
    # gradient of the bias, comes out wrong, without this library too.
    compiled = torch.compile(
        loss, fullgraph=True, dynamic=dynamic, options={"inplace_buffers": False}
    )
    batches = [[0, 1, -1, 1, 1, 0], [1] * 6, [-1] * 6]
    if dynamic:
        batches += [[0, 1] * 5, [1, -1, 0] * 13]
    gen = generator("grad compile")
    for number, slots in enumerate(batches):
        batch = make_batch(slots, 2, device, max_tokens=64)
        x = randn((len(slots), 24), torch.float32, device, gen).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = torch.autograd.grad(compiled(x, batch.plan), [x, *leaves])
        want = torch.autograd.grad(loss(x, batch.plan), [x, *leaves])
        for actual, expected in zip(got, want, strict=True):
            # By norm: the compiler's products and sums have another order than eager ones, and a
            # single element may be what is left of large ones.
            assert (actual - expected).norm() <= 1e-5 * expected.norm()


@on_devices
def test_without_gradients_nothing_is_recorded(device):
    module, weights, y, x, _, batch = problem(device)
    assert not apply(y, x, module, weights, batch.plan).requires_grad
    with torch.no_grad():
        assert not apply(y, x.requires_grad_(), module, weights, batch.plan).requires_grad


@on_devices
def test_in_place_form_names_the_functional_one(device):
    module, weights, y, x, _, batch = problem(device)
    before = y.clone()
    for tensor in (y, x, *weights.lora_a, *weights.lora_b):
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match=r"in place.*use lora_ext\.ops\.lora_apply,"):
            apply_(y, x, module, weights, batch.plan)
        tensor.requires_grad_(False)
    assert_same_bits(y, before)


@on_devices
def test_a_second_derivative_is_refused(device):
    module, weights, y, x, _, batch = problem(device)
    result = apply(y, x.requires_grad_(), module, weights, batch.plan)
    (dx,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        torch.autograd.grad(dx.sum(), x)


@on_devices
def test_scalings_are_not_trainable(device):
    module, weights, y, x, _, batch = problem(device)
    module.scalings.requires_grad_()
    with pytest.raises(RuntimeError, match="scalings requires grad"):
        apply(y, x, module, weights, batch.plan)


@on_devices
@pytest.mark.parametrize("inference_mode", [False, True])
def test_a_plan_refilled_before_the_backward_pass_is_noticed(device, inference_mode):
    module, weights, y, x, _, _ = problem(device)
    batch = LoRABatch(64, 2, device)
    batch.update([0, 1, -1, 1])
    result = apply(y, x.requires_grad_(), module, weights, batch.plan)
    with torch.inference_mode(inference_mode):
        batch.update([1, 1, 1, 1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@on_devices
def test_errors_name_the_argument(device):
    module, weights, _, x, dy, batch = problem(device)
    arguments = apply_arguments(module, weights, batch.plan)
    for bad, words in [
        (dy[:, :12], ["dy", "12", "13"]),
        (dy[:3], ["dy", "3", "4"]),
        (dy.t(), ["dy", "contiguous"]),
        (dy.int(), ["dy", "float"]),
    ]:
        with pytest.raises(RuntimeError) as error:
            torch.ops.lora_ext.lora_apply_backward(bad, x, *arguments, True, True, True)
        for word in words:
            assert word in str(error.value)


def test_typed_function_and_op_agree():
    module, weights, y, x, _, batch = problem("cpu")
    op = torch.ops.lora_ext.lora_apply
    arguments = apply_arguments(module, weights, batch.plan)
    x.requires_grad_()
    first = torch.autograd.grad(op(y, x, *arguments).sum(), x)[0]
    assert_same_bits(
        torch.autograd.grad(apply(y, x, module, weights, batch.plan).sum(), x)[0], first
    )
    assert ops.lora_apply is not op

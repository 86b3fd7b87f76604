"""lora_shrink: against the fp64 oracle; ranks, layouts, shapes, strides, what may not be read."""

from __future__ import annotations

import pytest
import torch

from generators import (
    LAYOUTS,
    NAN,
    RANKS,
    dtypes_on,
    generator,
    make_batch,
    make_module,
    misaligned,
    on_devices,
    randn,
    random_slots,
    shrink,
    strided_rows,
)
from lora_ext import ops
from numerics import assert_close, assert_same_bits, expected_shrink

pytestmark = on_devices


def check_shrink(x, module, batch, layout):
    """Runs the op and compares it with the oracle."""
    weights = module.weights(layout)
    xa = shrink(x, module, weights, batch.plan)
    expected = expected_shrink(
        x,
        weights.lora_a,
        module.ranks,
        module.scalings,
        batch.token_slots,
        module.num_slices,
        module.max_rank,
        weights.a_offsets,
    )
    assert_close(xa, expected)
    return xa


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 8])
def test_all_ranks_in_one_batch(device, layout, num_slices):
    for dtype in dtypes_on(device):
        gen = generator("shrink", num_slices)
        module = make_module(RANKS, 136, [8] * num_slices, dtype, device)
        batch = make_batch(random_slots(90, len(RANKS), gen), len(RANKS), device)
        x = randn((90, 136), dtype, device, gen)
        xa = check_shrink(x, module, batch, layout)
        assert xa.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("in_features", [1, 2, 7, 16, 31, 64, 100, 129, 1000, 4096, 11008])
def test_any_in_features(device, in_features):
    for dtype in dtypes_on(device):
        gen = generator("K", in_features)
        module = make_module([3, 16, 0, 40], in_features, [8, 8], dtype, device)
        batch = make_batch(random_slots(21, 4, gen), 4, device)
        x = randn((21, in_features), dtype, device, gen)
        check_shrink(x, module, batch, "packed")


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 15, 16, 17, 63, 64, 65, 200, 1000])
def test_any_number_of_tokens(device, num_tokens):
    gen = generator("T", num_tokens)
    for slots in ([1] * num_tokens, random_slots(num_tokens, 3, gen)):
        module = make_module([8, 16, 5], 72, [8], torch.bfloat16, device)
        x = randn((num_tokens, 72), torch.bfloat16, device, gen)
        check_shrink(x, module, make_batch(slots, 3, device), "packed")


# Long batches have kernels of their own: slots that fill tiles or leave them partly filled, blocks
# of rows of all sizes, K that ends within a step, and so short that CTAs of a cluster have none.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("ranks", [[16, 8, 1, 0], [64, 40, 7, 64], [128, 65, 3, 9]])
@pytest.mark.parametrize("in_features", [40, 1000])
def test_long_batches(device, layout, num_slices, ranks, in_features):
    for dtype in [torch.bfloat16, torch.float16]:
        gen = generator("long", ranks, in_features)
        module = make_module(ranks, in_features, [8] * num_slices, dtype, device)
        slots = [0] * 300 + [1] * 70 + [-1] * 9 + [2] * 16 + [3] * 128 + random_slots(100, 4, gen)
        x = randn((len(slots), in_features), dtype, device, gen)
        check_shrink(x, module, make_batch(slots, 4, device), layout)


def test_no_tokens(device):
    module = make_module([8], 16, [8], torch.float32, device)
    x = torch.empty(0, 16, device=device)
    xa = shrink(x, module, module.weights("packed"), make_batch([], 1, device).plan)
    assert xa.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts_and_addresses_do_not_change_a_bit(device, dtype):
    gen = generator("layouts", dtype)
    module = make_module([16, 64, 3], 256, [8, 16], dtype, device)
    batch = make_batch(random_slots(40, 3, gen), 3, device)
    x = randn((40, 256), dtype, device, gen)
    packed = module.weights("packed")
    xa = shrink(x, module, packed, batch.plan)
    for layout in LAYOUTS:
        assert_same_bits(shrink(x, module, module.weights(layout), batch.plan), xa)
    for gap in (8, 3):
        assert_same_bits(shrink(strided_rows(x, gap), module, packed, batch.plan), xa)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_pointers(device, layout):
    for dtype in dtypes_on(device):
        gen = generator("misaligned")
        module = make_module([16, 33, 3], 128, [8, 16], dtype, device)
        batch = make_batch(random_slots(40, 3, gen), 3, device)
        x = randn((40, 128), dtype, device, gen)
        check_shrink(misaligned(x), module, batch, layout)
        weights = module.weights(layout, place=misaligned)
        xa = shrink(x, module, weights, batch.plan)
        rest = (module.ranks, module.scalings, batch.token_slots, 2, 33, weights.a_offsets)
        assert_close(xa, expected_shrink(x, weights.lora_a, *rest))


def test_rows_without_adapter_are_zero_whatever_x_holds(device):
    module = make_module([8, 0], 32, [8, 8], torch.bfloat16, device)
    slots = [-1, 0, 1, -1, 0]
    x = randn((5, 32), torch.bfloat16, device, generator("zeros"))
    x[[0, 2, 3]] = NAN
    xa = shrink(x, module, module.weights("packed"), make_batch(slots, 2, device).plan)
    assert (xa[[0, 2, 3]] == 0).all()
    assert xa[[1, 4]].isfinite().all() and (xa[[1, 4]] != 0).all()


def test_columns_past_the_rank_are_zero(device):
    module = make_module([5], 32, [8, 8], torch.float32, device, max_rank=16)
    x = randn((3, 32), torch.float32, device, generator("tail"))
    xa = shrink(x, module, module.weights("packed"), make_batch([0] * 3, 1, device).plan)
    assert xa.shape == (3, 32)
    assert (xa[:, 10:] == 0).all() and (xa[:, :10] != 0).all()


def test_nan_and_inf_stay_with_their_token_and_adapter(device):
    for dtype in dtypes_on(device):
        gen = generator("nan")
        module = make_module([16, 16, 16, 16], 64, [8], dtype, device)
        slots = [0, 1, 2, 3] * 9
        x = randn((36, 64), dtype, device, gen)
        clean = shrink(x, module, module.weights("packed"), make_batch(slots, 4, device).plan)
        module.a[1][0].fill_(NAN)
        module.a[2][0].fill_(float("inf"))
        x[0] = NAN
        xa = shrink(x, module, module.weights("packed"), make_batch(slots, 4, device).plan)
        mine = [t for t in range(36) if slots[t] in (0, 3) and t != 0]
        assert_same_bits(xa[mine], clean[mine])
        assert xa[[1, 2, 0]].isfinite().sum() == 0


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16])
def test_every_half_widens_exactly(device, bits):
    # With K = 1 and A = 1 the intermediate is x itself, in fp32.
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(bits)
    x = x[x.isfinite()].view(-1, 1).to(device)
    module = make_module([1], 1, [1], bits, device)
    module.a[0][0].fill_(1.0)
    module.scalings.fill_(1.0)
    batch = make_batch([0] * len(x), 1, device)
    assert torch.equal(shrink(x, module, module.weights("packed"), batch.plan), x.float())


def test_deterministic(device):
    gen = generator("deterministic")
    module = make_module([64, 16], 1024, [8, 8], torch.bfloat16, device)
    batch = make_batch(random_slots(100, 2, gen), 2, device)
    x = randn((100, 1024), torch.bfloat16, device, gen)
    weights = module.weights("packed")
    first = shrink(x, module, weights, batch.plan)
    for _ in range(20):
        assert_same_bits(shrink(x, module, weights, batch.plan), first)


def test_offsets_past_32_bits(device):
    # Only a few rows are touched; the rest of the buffers is address space.
    stride = 2**30 + 8
    try:
        x = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
        a = torch.empty(2 * stride + 8 * 64, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    x, a = x.as_strided((3, 64), (stride, 1)), a.as_strided((3, 8, 64), (stride, 64, 1))
    module = make_module([8] * 3, 64, [8], torch.bfloat16, device)
    dense = randn((3, 64), torch.bfloat16, device, generator("far"))
    near = module.weights("packed")
    x.copy_(dense)
    a.copy_(near.lora_a[0])
    batch = make_batch([2, 0, 1], 3, device)
    common = (module.ranks, module.scalings, batch.plan)
    far = ops.lora_shrink(x, [a], *common, num_slices=1, max_rank=8)
    assert_same_bits(far, shrink(dense, module, near, batch.plan))


def test_opcheck(device):
    for layout in LAYOUTS:
        module = make_module([4, 7], 24, [8, 8], torch.float32, device)
        weights = module.weights(layout)
        batch = make_batch([0, 1, -1, 1], 2, device)
        x = randn((4, 24), torch.float32, device, generator("opcheck"))
        torch.library.opcheck(
            torch.ops.lora_ext.lora_shrink.default,
            (x, weights.lora_a, module.ranks, module.scalings, batch.plan, 2, 7, weights.a_offsets),
        )


def bad_calls():
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("x dim", dict(x=torch.zeros(4)), ["x", "2-D", "[4]"]),
        ("x width", dict(x=torch.zeros(4, 25)), ["lora_a", "25"]),
        ("too many tokens", dict(x=torch.zeros(65, 24)), ["x", "65", "64"]),
        ("x dtype", dict(x=torch.zeros(4, 24, dtype=torch.int32)), ["x", "float"]),
        ("mixed dtypes", dict(x=torch.zeros(4, 24).bfloat16()), ["lora_a", "dtype"]),
        ("max_rank 0", dict(max_rank=0), ["max_rank", "0"]),
        ("max_rank 2000", dict(max_rank=2000), ["max_rank", "1024", "2000"]),
        ("max_rank past the pool", dict(max_rank=8), ["lora_a", "max_rank", "8"]),
        ("num_slices", dict(num_slices=9), ["9", "8"]),
        ("ranks dtype", dict(ranks=torch.zeros(2, dtype=torch.int64)), ["ranks", "int32"]),
        ("ranks length", dict(ranks=torch.zeros(3, dtype=torch.int32)), ["plan", "3"]),
        ("scalings dtype", dict(scalings=torch.zeros(2).double()), ["scalings", "float32"]),
        ("scalings length", dict(scalings=torch.zeros(3)), ["scalings", "3", "2"]),
        ("plan dtype", dict(plan=torch.zeros(500)), ["plan", "int32"]),
        ("plan size", dict(plan=torch.zeros(500, dtype=torch.int32)), ["plan", "500"]),
        ("no weights", dict(lora_a=[]), ["lora_a", "0"]),
        ("three tensors", dict(lora_a=[torch.zeros(2, 7, 24)] * 3), ["lora_a", "3"]),
        ("two slots' A", dict(lora_a=[torch.zeros(3, 14, 24)]), ["lora_a", "3", "2"]),
        ("offsets dtype", dict(a_offsets=torch.zeros(2).int()), ["lora_a", "1-D"]),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument_and_its_value(device, case):
    module = make_module([4, 7], 24, [8, 8], torch.float32, device)
    good = dict(
        x=torch.zeros(4, 24),
        lora_a=module.weights("packed").lora_a,
        ranks=module.ranks,
        scalings=module.scalings,
        plan=make_batch([0, 1, -1, 1], 2, device).plan,
        num_slices=2,
        max_rank=7,
    )

    def move(value):
        if isinstance(value, list):
            return [move(item) for item in value]
        return value.to(device) if isinstance(value, torch.Tensor) else value

    _, changes, words = case
    with pytest.raises(RuntimeError) as error:
        ops.lora_shrink(**{name: move(value) for name, value in {**good, **changes}.items()})
    for word in words:
        assert word in str(error.value)

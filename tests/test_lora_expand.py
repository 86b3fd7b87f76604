"""lora_expand_: against the fp64 oracle; dtypes of y, strides, and what must stay as it is."""

from __future__ import annotations

import pytest
import torch

from generators import (
    HALVES_AND_FP32,
    LAYOUTS,
    NAN,
    RANKS,
    dtypes_on,
    expand_,
    generator,
    make_batch,
    make_module,
    misaligned,
    on_devices,
    randn,
    random_slots,
    strided_rows,
)
from lora_ext import ops
from numerics import Expected, accumulator, assert_close, assert_same_bits, expected_expand

pytestmark = on_devices


def make_intermediate(module, batch, gen):
    """A random [T, S * R]; NaN where no adapter reaches, which no op may read."""
    xa = torch.full((batch.num_tokens, module.num_slices * module.max_rank), NAN)
    ranks = module.ranks.tolist()
    for token, slot in enumerate(batch.slots):
        if slot >= 0:
            columns = module.num_slices * ranks[slot]
            xa[token, :columns] = torch.randn(columns, generator=gen)
    return xa.to(device=module.device, dtype=accumulator(module.dtype))


def expected(y, xa, module, weights, batch):
    exact = Expected(xa.double(), torch.zeros_like(xa, dtype=torch.float64))
    return expected_expand(
        y,
        exact,
        weights.lora_b,
        module.ranks,
        batch.token_slots,
        module.output_slices,
        weights.b_offsets,
    )


def check_expand(y, xa, module, batch, layout):
    """Runs the op on y and compares it with the oracle; rows without an adapter keep their bits."""
    weights = module.weights(layout)
    before = y.clone()
    want = expected(y, xa, module, weights, batch)
    expand_(y, xa, module, weights, batch.plan)
    assert_close(y, want)
    ranks = module.ranks.tolist()
    idle = [t for t, slot in enumerate(batch.slots) if slot < 0 or ranks[slot] == 0]
    assert_same_bits(y[idle], before[idle])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "output_slices", [[64], [40, 24], [48, 16, 16], [33, 1, 7, 8], [8, 0, 16, 5, 1, 2, 3, 64]]
)
def test_all_ranks_in_one_batch(device, layout, output_slices):
    for dtype in dtypes_on(device):
        gen = generator("expand", output_slices)
        module = make_module(RANKS, 8, output_slices, dtype, device)
        batch = make_batch(random_slots(90, len(RANKS), gen), len(RANKS), device)
        xa = make_intermediate(module, batch, gen)
        y = randn((90, sum(output_slices)), dtype, device, gen)
        check_expand(y, xa, module, batch, layout)


@pytest.mark.parametrize("y_dtype", HALVES_AND_FP32)
def test_any_dtype_of_y(device, y_dtype):
    for dtype in dtypes_on(device):
        gen = generator("y", y_dtype)
        module = make_module([16, 5], 8, [100], dtype, device)
        batch = make_batch(random_slots(37, 2, gen), 2, device)
        xa = make_intermediate(module, batch, gen)
        check_expand(randn((37, 100), y_dtype, device, gen), xa, module, batch, "packed")


@pytest.mark.parametrize("width", [1, 2, 3, 7, 15, 16, 17, 31, 64, 100, 129, 1000, 4097])
def test_any_width(device, width):
    for dtype in dtypes_on(device):
        gen = generator("N", width)
        module = make_module([3, 16, 0, 40], 8, [width], dtype, device)
        batch = make_batch(random_slots(21, 4, gen), 4, device)
        xa = make_intermediate(module, batch, gen)
        check_expand(randn((21, width), dtype, device, gen), xa, module, batch, "packed")


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 15, 16, 17, 63, 64, 65, 200, 1000])
def test_any_number_of_tokens(device, num_tokens):
    gen = generator("T", num_tokens)
    for slots in ([1] * num_tokens, random_slots(num_tokens, 3, gen)):
        module = make_module([8, 16, 5], 8, [72], torch.bfloat16, device)
        batch = make_batch(slots, 3, device)
        xa = make_intermediate(module, batch, gen)
        y = randn((num_tokens, 72), torch.bfloat16, device, gen)
        check_expand(y, xa, module, batch, "packed")


# Long batches have kernels of their own: slots that fill tiles, leave them partly filled or share
# them with none, ranks up to what registers hold and beyond, slices that end within a step.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "ranks", [[16, 8, 1, 0], [32, 24, 0, 17], [64, 40, 7, 64], [128, 65, 3, 9]]
)
@pytest.mark.parametrize("y_dtype", HALVES_AND_FP32)
def test_long_batches(device, layout, ranks, y_dtype):
    for dtype in [torch.bfloat16, torch.float16]:
        gen = generator("long", ranks)
        module = make_module(ranks, 8, [200, 64, 8, 328], dtype, device)
        slots = [0] * 300 + [1] * 70 + [-1] * 9 + [2] * 16 + [3] * 128 + random_slots(100, 4, gen)
        batch = make_batch(slots, 4, device)
        xa = make_intermediate(module, batch, gen)
        check_expand(randn((len(slots), 600), y_dtype, device, gen), xa, module, batch, layout)


def test_no_tokens_and_no_columns(device):
    module = make_module([8], 8, [16], torch.float32, device)
    batch = make_batch([], 1, device)
    y = torch.empty(0, 16, device=device)
    expand_(y, torch.empty(0, 8, device=device), module, module.weights("packed"), batch.plan)
    module = make_module([8], 8, [0], torch.float32, device)
    batch = make_batch([0], 1, device)
    y = torch.empty(1, 0, device=device)
    expand_(y, torch.zeros(1, 8, device=device), module, module.weights("packed"), batch.plan)


def test_columns_behind_the_slices_keep_their_bits(device):
    for dtype in HALVES_AND_FP32:
        gen = generator("wider")
        module = make_module([16, 4], 8, [24, 9], dtype, device)
        batch = make_batch(random_slots(30, 2, gen), 2, device)
        xa = make_intermediate(module, batch, gen)
        wide = randn((30, 64), dtype, device, gen)
        wide[:, 40] = NAN
        before = wide.clone()
        expand_(wide, xa, module, module.weights("packed"), batch.plan)
        assert_same_bits(wide[:, 33:], before[:, 33:])
        narrow = before[:, :33].contiguous()
        expand_(narrow, xa, module, module.weights("packed"), batch.plan)
        assert_same_bits(wide[:, :33], narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts_and_addresses_do_not_change_a_bit(device, dtype):
    gen = generator("layouts", dtype)
    module = make_module([16, 64, 3], 8, [64, 32], dtype, device)
    batch = make_batch(random_slots(40, 3, gen), 3, device)
    xa = make_intermediate(module, batch, gen)
    before = randn((40, 96), dtype, device, gen)
    packed = module.weights("packed")
    first = before.clone()
    expand_(first, xa, module, packed, batch.plan)
    for layout in LAYOUTS:
        y = before.clone()
        expand_(y, xa, module, module.weights(layout), batch.plan)
        assert_same_bits(y, first)
    for gap in (8, 3):
        y = strided_rows(before, gap)
        expand_(y, strided_rows(xa, gap), module, packed, batch.plan)
        assert_same_bits(y, first)
        assert y._base[:, :gap].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_misaligned_pointers(device, layout):
    for dtype in dtypes_on(device):
        gen = generator("misaligned")
        module = make_module([16, 33, 3], 8, [64, 40], dtype, device)
        batch = make_batch(random_slots(40, 3, gen), 3, device)
        xa = misaligned(make_intermediate(module, batch, gen))
        y = misaligned(randn((40, 104), dtype, device, gen))
        weights = module.weights(layout, place=misaligned)
        want = expected(y, xa, module, weights, batch)
        expand_(y, xa, module, weights, batch.plan)
        assert_close(y, want)


def test_nan_and_inf_stay_with_their_adapter(device):
    for dtype in dtypes_on(device):
        gen = generator("nan")
        module = make_module([16, 16, 16, 16], 8, [48], dtype, device)
        batch = make_batch([0, 1, 2, 3] * 9, 4, device)
        xa = make_intermediate(module, batch, gen)
        before = randn((36, 48), dtype, device, gen)
        clean = before.clone()
        expand_(clean, xa, module, module.weights("packed"), batch.plan)
        module.b[1][0].fill_(NAN)
        module.b[2][0].fill_(float("inf"))
        y = before.clone()
        expand_(y, xa, module, module.weights("packed"), batch.plan)
        mine = [t for t in range(36) if batch.slots[t] in (0, 3)]
        assert_same_bits(y[mine], clean[mine])
        assert not y[1::4].isfinite().any() and not y[2::4].isfinite().any()


@pytest.mark.parametrize("special", [NAN, float("inf"), -float("inf"), -0.0])
def test_special_values_of_y(device, special):
    for dtype in HALVES_AND_FP32:
        module = make_module([4], 8, [16], dtype, device)
        batch = make_batch([0, -1], 1, device)
        xa = torch.zeros(2, 4, device=device)
        y = torch.full((2, 16), special, dtype=dtype, device=device)
        before = y.clone()
        expand_(y, xa, module, module.weights("packed"), batch.plan)
        assert_same_bits(y[1], before[1])
        assert torch.equal(y[0].isnan(), before[0].isnan())
        assert torch.equal(y[0].nan_to_num(), before[0].nan_to_num())


@pytest.mark.parametrize("y_dtype", [torch.float16, torch.bfloat16])
def test_rounds_once_to_nearest_even(device, y_dtype):
    # y + 1 * B with B chosen around the ties between neighbours of y's dtype, for every binade.
    if device == "cuda":
        y_values = torch.tensor([1.0, 1.5, 2.0, 100.0, -3.0])
    else:
        y_values = torch.arange(-(2**15), 2**15).to(torch.int16).view(y_dtype).float()
        y_values = y_values[y_values.isfinite()][::7]
    module = make_module([1], 8, [5], torch.float32, device)
    module.b[0][0].copy_(torch.tensor([[0.0], [2.0**-9], [-(2.0**-12)], [0.3], [1.0]]))
    y = y_values.to(y_dtype).view(-1, 1).repeat(1, 5).to(device)
    batch = make_batch([0] * len(y), 1, device)
    xa = torch.ones(len(y), 1, device=device)
    want = (y.float() + module.b[0][0].view(1, -1)).to(y_dtype)
    expand_(y, xa, module, module.weights("packed"), batch.plan)
    assert torch.equal(y, want)


def test_deterministic(device):
    gen = generator("deterministic")
    module = make_module([64, 16], 8, [500], torch.bfloat16, device)
    batch = make_batch(random_slots(100, 2, gen), 2, device)
    xa = make_intermediate(module, batch, gen)
    before = randn((100, 500), torch.bfloat16, device, gen)
    weights = module.weights("packed")
    results = []
    for _ in range(20):
        y = before.clone()
        expand_(y, xa, module, weights, batch.plan)
        results.append(y)
    for y in results[1:]:
        assert_same_bits(y, results[0])


def test_offsets_past_32_bits(device):
    stride = 2**30 + 8
    try:
        y = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
        b = torch.empty(2 * stride + 8 * 64, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    y, b = y.as_strided((3, 64), (stride, 1)), b.as_strided((3, 64, 8), (stride, 8, 1))
    gen = generator("far")
    module = make_module([8] * 3, 8, [64], torch.bfloat16, device)
    batch = make_batch([2, 0, 1], 3, device)
    xa = make_intermediate(module, batch, gen)
    near_y = randn((3, 64), torch.bfloat16, device, gen)
    near = module.weights("packed")
    y.copy_(near_y)
    b.copy_(near.lora_b[0])
    ops.lora_expand_(y, xa, [b], module.ranks, batch.plan, output_slices=[64], max_rank=8)
    expand_(near_y, xa, module, near, batch.plan)
    assert_same_bits(y, near_y)


def test_opcheck(device):
    for layout in LAYOUTS:
        module = make_module([4, 7], 8, [8, 5], torch.float32, device)
        weights = module.weights(layout)
        batch = make_batch([0, 1, -1, 1], 2, device)
        xa = torch.ones(4, 14, device=device)
        arguments = (weights.lora_b, module.ranks, batch.plan, [8, 5], 7, weights.b_offsets)
        torch.library.opcheck(
            torch.ops.lora_ext.lora_expand_.default,
            (torch.zeros(4, 13, device=device), xa, *arguments),
        )


def bad_calls():
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("y dim", dict(y=torch.zeros(4)), ["y", "2-D", "[4]"]),
        ("y too narrow", dict(y=torch.zeros(4, 12)), ["y", "12", "13"]),
        ("y strided", dict(y=torch.zeros(13, 4).T), ["y", "contiguous"]),
        ("tokens", dict(y=torch.zeros(5, 13)), ["4", "5"]),
        ("y dtype", dict(y=torch.zeros(4, 13, dtype=torch.int8)), ["y", "float"]),
        ("xa dtype", dict(xa=torch.zeros(4, 14).half()), ["xa", "float32"]),
        ("xa width", dict(xa=torch.zeros(4, 13)), ["xa", "13", "14"]),
        ("no slices", dict(output_slices=[]), ["output_slices", "0"]),
        ("nine slices", dict(output_slices=[1] * 9), ["output_slices", "9"]),
        ("negative slice", dict(output_slices=[8, -5]), ["output_slices[1]", "-5"]),
        ("max_rank", dict(max_rank=1025), ["max_rank", "1025"]),
        ("B rows", dict(lora_b=[torch.zeros(2, 14, 7)]), ["lora_b", "14"]),
        ("B columns", dict(lora_b=[torch.zeros(2, 13, 6)]), ["lora_b", "6", "7"]),
        ("B slots", dict(lora_b=[torch.zeros(3, 13, 7)]), ["lora_b", "3", "2"]),
        ("no B", dict(lora_b=[]), ["lora_b"]),
        ("B of integers", dict(lora_b=[torch.zeros(2, 13, 7).int()]), ["lora_b", "float"]),
        ("plan size", dict(plan=torch.zeros(77, dtype=torch.int32)), ["plan", "77"]),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument_and_leave_y_alone(device, case):
    module = make_module([4, 7], 8, [8, 5], torch.float32, device)
    good = dict(
        y=torch.zeros(4, 13),
        xa=torch.ones(4, 14),
        lora_b=module.weights("packed").lora_b,
        ranks=module.ranks,
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
        ops.lora_expand_(**call)
    for word in words:
        assert word in str(error.value)
    assert (call["y"] == 0).all()

"""plan_batch_: every field of the plan against the reference, for every way to describe a batch."""

from __future__ import annotations

from itertools import accumulate, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generators import generator, on_devices, random_slots
from lora_ext import ops, reference
from numerics import assert_same_bits

pytestmark = on_devices

GARBAGE = -7777


def plan_fields(plan, num_slots):
    """The sections of a plan tensor by name, at the offsets of csrc/common/plan.h."""
    max_tokens = ops.plan_max_tokens(plan, num_slots)
    tiles, wide_tiles = max_tokens // 16 + num_slots, max_tokens // 64 + num_slots
    sections = [
        ("header", 16),
        ("tiles", 4 * tiles),
        ("wide_tiles", 4 * wide_tiles),
        ("token_slots", max_tokens),
        ("permutation", max_tokens),
        ("seg_indptr", max_tokens + 1),
        ("unused", 3),
        ("seg_slots", max_tokens),
        ("slot_indptr", num_slots + 1),
        ("enabled", num_slots),
        ("unused", 3),
    ]
    ends = list(accumulate(size for _, size in sections))
    assert ends[-1] == plan.numel()
    fields = {
        name: plan[end - size : end] for (name, size), end in zip(sections, ends, strict=True)
    }
    fields.pop("unused")
    fields["tiles"] = fields["tiles"].view(-1, 4)
    fields["wide_tiles"] = fields["wide_tiles"].view(-1, 4)
    return fields


def int32(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def new_plan(max_tokens, num_slots, device):
    size = ops.plan_size(max_tokens, num_slots)
    return torch.full((size,), GARBAGE, dtype=torch.int32, device=device)


def fill(plan, slots, num_slots, seg_lens=None, seg_indptr=None):
    device = plan.device
    ops.plan_batch_(
        plan,
        int32(slots, device),
        int32(seg_lens, device),
        int32(seg_indptr, device),
        num_slots=num_slots,
    )


def check_plan(plan, num_slots, slots, seg_lens=None, seg_indptr=None):
    """Compares every field of a plan with the reference's."""
    max_tokens = ops.plan_max_tokens(plan, num_slots)
    want = reference.plan(slots, num_slots, max_tokens, seg_lens=seg_lens, seg_indptr=seg_indptr)
    got = plan_fields(plan, num_slots)
    for name, values in want.fields().items():
        assert got[name].tolist() == values.tolist(), name


def segments_of(slots):
    """(slot per segment, seg_lens) of token slots."""
    runs = [(slot, len(list(run))) for slot, run in groupby(slots)]
    return [slot for slot, _ in runs], [length for _, length in runs]


@pytest.mark.parametrize("num_slots", [1, 4, 256, 300])
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 63, 64, 65, 256, 1000, 4096])
def test_tokens(device, num_tokens, num_slots):
    slots = random_slots(num_tokens, num_slots, generator("plan", num_tokens))
    for max_tokens in (num_tokens, num_tokens + 1, num_tokens + 200):
        plan = new_plan(max_tokens, num_slots, device)
        fill(plan, slots, num_slots)
        check_plan(plan, num_slots, slots)


SEGMENTS = {
    "none": ([], []),
    "all empty": ([0, 1, -1], [0, 0, 0]),
    "empty among others": ([0, 1, 2, 0, 1], [3, 0, 4, 0, 2]),
    "all without adapter": ([-1, -1], [5, 9]),
    "interleaved": ([-1, 0, -1, 1], [1, 2, 3, 4]),
    "merging": ([0, 0, 1], [3, 5, 4]),
    "merging over empty ones": ([2, 1, 2], [7, 0, 7]),
    "descending": ([3, 2, 1, 0], [1, 16, 17, 64]),
    "300 decodes of one adapter": ([1] * 300, [1] * 300),
    "300 and 100": ([1] * 300 + [2] * 100, [1] * 400),
    "one of 30000 tokens": ([3], [30000]),
    "4096 requests": ([r % 5 - 1 for r in range(4096)], [1] * 4096),
    "ragged requests": ([r % 4 for r in range(64)], [r % 17 for r in range(64)]),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(device, name):
    slots, seg_lens = SEGMENTS[name]
    seg_indptr = list(accumulate(seg_lens, initial=0))
    plan = new_plan(seg_indptr[-1], 4, device)
    fill(plan, slots, 4, seg_lens=seg_lens)
    check_plan(plan, 4, slots, seg_lens=seg_lens)
    by_indptr = new_plan(seg_indptr[-1], 4, device)
    fill(by_indptr, slots, 4, seg_indptr=seg_indptr)
    check_plan(by_indptr, 4, slots, seg_indptr=seg_indptr)


def test_consecutive_segments_of_one_slot_become_one(device):
    plan = new_plan(12, 2, device)
    fill(plan, [0, 0, 1], 2, seg_lens=[3, 5, 4])
    fields = plan_fields(plan, 2)
    assert fields["header"][:4].tolist() == [12, 2, 2, 12]
    assert fields["seg_indptr"][:3].tolist() == [0, 8, 12]
    assert fields["seg_slots"][:2].tolist() == [0, 1]


@settings(max_examples=100, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 6), max_size=200),
    extra_slots=st.integers(0, 3),
    room=st.integers(0, 100),
)
def test_any_batch(device, slots, extra_slots, room):
    num_slots = max([0, *slots]) + 1 + extra_slots
    plan = new_plan(len(slots) + room, num_slots, device)
    fill(plan, slots, num_slots)
    check_plan(plan, num_slots, slots)
    by_segment = new_plan(len(slots) + room, num_slots, device)
    seg_slots, seg_lens = segments_of(slots)
    fill(by_segment, seg_slots, num_slots, seg_lens=seg_lens)
    for name, values in plan_fields(by_segment, num_slots).items():
        assert_same_bits(values, plan_fields(plan, num_slots)[name])


def test_refresh_in_place_leaves_nothing_of_the_old_batch(device):
    plan = new_plan(700, 9, device)
    gen = generator("refresh")
    batches = [random_slots(n, 9, gen) for n in (700, 3, 0, 650, 64)] + [[-1] * 700, [8] * 700]
    for slots in [*batches, *reversed(batches)]:
        fill(plan, slots, 9)
        check_plan(plan, 9, slots)


@pytest.mark.parametrize("num_slots", [1, 5, 64])
def test_size_and_capacity_agree(device, num_slots):
    for max_tokens in (0, 1, 64, 65, 1000, 4096):
        plan = new_plan(max_tokens, num_slots, device)
        capacity = ops.plan_max_tokens(plan, num_slots)
        assert max_tokens <= capacity < max_tokens + 64 and capacity % 64 == 0
        with pytest.raises(ValueError, match=str(plan.numel() + 1)):
            ops.plan_max_tokens(torch.cat([plan, plan[:1]]), num_slots)


def bad_calls():
    """(what is wrong, slots, seg_lens, seg_indptr, what the message must say)"""
    return [
        ("slot too large", [0, 4], None, None, ["slots[1]", "4", "3"]),
        ("slot too small", [-2], None, None, ["slots[0]", "-2"]),
        ("negative length", [0, 1], [3, -1], None, ["seg_lens[1]", "-1"]),
        ("falling indptr", [0, 1], None, [0, 5, 4], ["seg_indptr", "5", "4"]),
        ("indptr from 2", [0], None, [2, 5], ["seg_indptr", "0"]),
        ("too many tokens by length", [0, 1], [60, 5], None, ["65", "64"]),
        ("too many tokens by indptr", [0], None, [0, 65], ["65", "64"]),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_bad_values(device, case):
    # On a GPU nobody looks at the values: they are clamped, and nothing is written out of bounds.
    _, slots, seg_lens, seg_indptr, words = case
    plan = new_plan(64, 4, device)
    if device == "cuda":
        fill(plan, slots, 4, seg_lens, seg_indptr)
        torch.cuda.synchronize()
        return
    with pytest.raises(RuntimeError) as error:
        fill(plan, slots, 4, seg_lens, seg_indptr)
    for word in words:
        assert word in str(error.value)
    assert (plan == GARBAGE).all()


def bad_shapes(device):
    """(arguments of plan_batch_, what the message must say)"""
    plan, slots = new_plan(64, 4, device), int32([0, 1], device)
    two = int32([1, 1], device)
    three = int32([0, 1, 2], device)
    return [
        ((plan, slots, two, three, 4), ["seg_lens", "seg_indptr"]),
        ((plan, slots.long(), None, None, 4), ["slots", "int32"]),
        ((plan, slots, three, None, 4), ["seg_lens", "3", "2"]),
        ((plan, slots, None, two, 4), ["seg_indptr", "2", "3"]),
        ((plan[:-1], slots, None, None, 4), ["plan", str(plan.numel() - 1)]),
        ((plan.long(), slots, None, None, 4), ["plan", "int32"]),
        ((plan, slots, None, None, 3), ["plan", "3"]),
        ((plan, slots, None, None, -1), ["num_slots", "-1"]),
        ((plan, int32([0] * 65, device), None, None, 4), ["slots", "65", "64"]),
        ((plan, slots.view(1, 2), None, None, 4), ["slots", "1-D"]),
        ((plan, slots.repeat(2)[::2], None, None, 4), ["slots", "contiguous"]),
    ]


@pytest.mark.parametrize("index", range(11))
def test_errors_name_the_argument_and_leave_the_plan_alone(device, index):
    arguments, words = bad_shapes(device)[index]
    with pytest.raises(RuntimeError) as error:
        torch.ops.lora_ext.plan_batch_(*arguments)
    for word in words:
        assert word in str(error.value)
    assert (arguments[0] == GARBAGE).all()


def test_opcheck(device):
    op = torch.ops.lora_ext.plan_batch_.default
    slots = int32([0, 1, -1], device)
    torch.library.opcheck(op, (torch.zeros_like(new_plan(64, 2, device)), slots, None, None, 2))
    lens, indptr = int32([3, 0, 9], device), int32([0, 3, 3, 12], device)
    torch.library.opcheck(op, (torch.zeros_like(new_plan(64, 2, device)), slots, lens, None, 2))
    torch.library.opcheck(op, (torch.zeros_like(new_plan(64, 2, device)), slots, None, indptr, 2))


def test_compiled(device):
    @torch.compile(fullgraph=True)
    def make(plan, slots, seg_lens):
        ops.plan_batch_(plan, slots, seg_lens, num_slots=3)
        return plan + 0

    plan = new_plan(64, 3, device)
    for slots, seg_lens in (([0, 2], [3, 8]), ([1, -1], [30, 1])):
        make(plan, int32(slots, device), int32(seg_lens, device))
        check_plan(plan, 3, slots, seg_lens=seg_lens)

"""moe_lora_info: token map and enabled flags, from segments, in new tensors or in given ones."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generators import on_devices
from lora_ext import ops, reference
from numerics import assert_same_bits

pytestmark = on_devices


def int32(values, device):
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def check_info(seg_lens, seg_slots, ranks, num_tokens, device):
    """Both forms against the reference; the in-place one over buffers that held garbage."""
    indptr = int32(accumulate(seg_lens, initial=0), device)
    arguments = (indptr, int32(seg_slots, device), int32(ranks, device))
    want = reference.moe_lora_info(*arguments, num_tokens)
    got = ops.moe_lora_info(*arguments, num_tokens=num_tokens)
    buffers = int32([77] * num_tokens, device), int32([77] * len(ranks), device)
    ops.moe_lora_info_(*buffers, *arguments)
    for result in (got, buffers):
        assert_same_bits(result[0], want[0])
        assert_same_bits(result[1], want[1])


SITUATIONS = {
    "one": ([5], [0], 5),
    "padding tail": ([5, 3], [1, 0], 64),
    "slot -1": ([2, 3, 4], [-1, 0, -1], 9),
    "all without adapter": ([3, 4], [-1, -1], 10),
    "rank 0": ([3, 4, 1], [2, 0, 2], 8),
    "only rank 0": ([4], [2], 6),
    "empty segments": ([0, 3, 0, 0, 2, 0], [1, 0, 1, 0, -1, 1], 5),
    "no segments": ([], [], 7),
    "no tokens": ([0, 0], [0, 1], 0),
    "300 decodes of one adapter": ([1] * 300, [0] * 300, 512),
    "300 and 100": ([300, 100], [0, 1], 400),
    "one long segment": ([30000], [3], 32768),
    "4096 requests": ([1] * 4096, [r % 4 for r in range(4096)], 4096),
    "more segments than tokens fit": ([10, 10, 10], [0, 1, 3], 15),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(device, situation):
    seg_lens, seg_slots, num_tokens = SITUATIONS[situation]
    check_info(seg_lens, seg_slots, [8, 16, 0, 4], num_tokens, device)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_batch(device, data):
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=300), "ranks")
    segment = st.tuples(st.integers(0, 40), st.integers(-1, len(ranks) - 1))
    segments = data.draw(st.lists(segment, max_size=30), "segments")
    num_tokens = data.draw(st.integers(0, 1500), "num_tokens")
    check_info([s[0] for s in segments], [s[1] for s in segments], ranks, num_tokens, device)


def test_opcheck(device):
    indptr, slots, ranks = int32([0, 3, 5], device), int32([1, -1], device), int32([4, 8], device)
    packet = torch.ops.lora_ext
    torch.library.opcheck(packet.moe_lora_info.default, (indptr, slots, ranks, 9))
    buffers = int32([0] * 9, device), int32([0, 0], device)
    torch.library.opcheck(packet.moe_lora_info_.default, (*buffers, indptr, slots, ranks))


def test_compiled(device):
    indptr, slots, ranks = int32([0, 3, 5], device), int32([1, -1], device), int32([4, 8], device)

    def info(indptr, slots):
        return ops.moe_lora_info(indptr, slots, ranks, num_tokens=9)

    compiled = torch.compile(info, fullgraph=True)(indptr, slots)
    for got, want in zip(compiled, info(indptr, slots), strict=True):
        assert_same_bits(got, want)


def bad_calls():
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("indptr length", dict(seg_indptr=torch.zeros(4).int()), ["seg_indptr", "4", "3"]),
        ("indptr dtype", dict(seg_indptr=torch.zeros(3).long()), ["seg_indptr", "int32"]),
        ("slots dtype", dict(seg_slots=torch.zeros(2)), ["seg_slots", "int32"]),
        ("ranks dtype", dict(ranks=torch.zeros(2).long()), ["ranks", "int32"]),
        ("enabled length", dict(enabled=torch.zeros(3).int()), ["enabled", "3", "2"]),
        ("enabled dtype", dict(enabled=torch.zeros(2).bool()), ["enabled", "int32"]),
        ("tokens dtype", dict(token_slots=torch.zeros(9).long()), ["token_slots", "int32"]),
        ("tokens dim", dict(token_slots=torch.zeros(3, 3).int()), ["token_slots", "1-D"]),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument_and_leave_the_buffers_alone(device, case):
    good = dict(
        token_slots=torch.full((9,), 77).int(),
        enabled=torch.full((2,), 77).int(),
        seg_indptr=torch.tensor([0, 3, 5]).int(),
        seg_slots=torch.tensor([1, 0]).int(),
        ranks=torch.tensor([4, 8]).int(),
    )
    _, changes, words = case
    call = {name: value.to(device) for name, value in {**good, **changes}.items()}
    before = {name: value.clone() for name, value in call.items()}
    with pytest.raises(RuntimeError) as error:
        ops.moe_lora_info_(**call)
    for word in words:
        assert word in str(error.value)
    for name, value in call.items():
        assert torch.equal(value, before[name])


def test_negative_number_of_tokens(device):
    arguments = int32([0], device), int32([], device), int32([4], device)
    with pytest.raises(RuntimeError, match="-1"):
        ops.moe_lora_info(*arguments, num_tokens=-1)

"""moe_lora_align: every section of the routing against the reference, for every kind of routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_ext
from generators import generator, on_devices, random_slots
from lora_ext import ops, reference
from moe_problems import int32, random_ids
from numerics import assert_same_bits

pytestmark = on_devices

GARBAGE = -7777


def check_routing(routing, topk_ids, token_slots, num_slots, num_experts, expert_map=None):
    """All sections, and nothing behind them."""
    pairs = topk_ids.numel()
    groups = reference.moe_groups(topk_ids, token_slots, num_slots, num_experts, expert_map)
    want = reference.moe_routing(groups, pairs, num_slots, num_experts)
    at = 0
    for name, values in want.items():
        got = routing[at : at + values.numel()].view(values.shape).cpu()
        assert got.tolist() == values.tolist(), name
        at += values.numel()


def check_align(topk_ids, token_slots, num_slots, num_experts, device, expert_map=None):
    """Both forms, for both dtypes of the ids; the in-place one over a buffer of garbage."""
    token_slots = int32(token_slots, device)
    arguments = dict(num_slots=num_slots, num_experts=num_experts, expert_map=expert_map)
    size = lora_ext.moe_routing_size(*topk_ids.shape, num_slots, num_experts)
    buffer = torch.full((size + 50,), GARBAGE, dtype=torch.int32, device=device)
    for dtype in (torch.int32, torch.int64):
        ids = topk_ids.to(device, dtype)
        routing = ops.moe_lora_align(ids, token_slots, **arguments)
        assert routing.numel() == size and routing.dtype == torch.int32
        check_routing(routing, ids, token_slots, num_slots, num_experts, expert_map)
        ops.moe_lora_align_(buffer, ids, token_slots, **arguments)
        check_routing(buffer, ids, token_slots, num_slots, num_experts, expert_map)
        assert (buffer[size:] == GARBAGE).all()
    return routing


# tokens, top_k, slots, experts: decode and prefill of the usual models, and both ends.
SHAPES = [
    (1, 1, 1, 1),
    (1, 8, 8, 128),
    (8, 8, 8, 128),
    (16, 2, 8, 8),
    (31, 8, 8, 128),
    (32, 8, 8, 128),
    (33, 8, 8, 128),
    (100, 1, 3, 1),
    (100, 6, 33, 160),
    (127, 10, 4, 512),
    (128, 8, 8, 128),
    (300, 4, 4, 32),
    (64, 16, 64, 1024),
    (512, 8, 8, 128),
    (767, 8, 8, 128),
    (769, 8, 1, 8),
    (2048, 2, 8, 8),
    (2048, 8, 8, 128),
    (1500, 8, 100, 1024),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, shape):
    num_tokens, top_k, num_slots, num_experts = shape
    gen = generator("align", shape)
    ids = random_ids(num_tokens, top_k, num_experts, gen, missing=0.1)
    check_align(ids, random_slots(num_tokens, num_slots, gen), num_slots, num_experts, device)


SITUATIONS = {
    "no tokens": ([], [[]]),
    "300 decodes of one adapter": ([0] * 300, [[t % 7, 7] for t in range(300)]),
    "300 and 100": ([0] * 300 + [1] * 100, [[t % 7, 7] for t in range(400)]),
    "all without adapter": ([-1] * 50, [[0, 1]] * 50),
    "interleaved": ([-1, 1] * 50, [[0, 1]] * 100),
    "nothing routed": ([0] * 70, [[-1, -1]] * 70),
    "one expert gets all": ([1] * 1000, [[3, -1]] * 1000),
    "one adapter, one expert, full tiles": ([1] * 128, [[3, -1]] * 128),
    "one pair in the last group": ([-1] * 99 + [2], [[0, 1]] * 99 + [[-1, 7]]),
    "the same expert twice": ([0, 1, 2], [[4, 4], [4, 4], [-1, 4]]),
    "one segment of 5,000 tokens": ([1] * 5000, [[t % 8, (t + 1) % 8] for t in range(5000)]),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(device, situation):
    slots, ids = SITUATIONS[situation]
    topk_ids = torch.tensor(ids, dtype=torch.int64).reshape(-1, 2)
    check_align(topk_ids, slots, 3, 8, device)


def test_no_slots_no_experts_no_choices(device):
    check_align(torch.full((4, 2), -1), [-1] * 4, 0, 8, device)
    check_align(torch.full((4, 2), -1), [-1] * 4, 2, 0, device)
    check_align(torch.empty(4, 0, dtype=torch.int64), [0] * 4, 2, 3, device)


@pytest.mark.parametrize("num_tokens", [5, 90, 1100])
def test_expert_map(device, num_tokens):
    gen = generator("map", num_tokens)
    ids = random_ids(num_tokens, 4, 64, gen, missing=0.1)
    local = torch.full((64,), -1, dtype=torch.int32)
    mine = torch.randperm(64, generator=gen)[:16]
    local[mine] = torch.randperm(16, generator=gen).int()
    slots = random_slots(num_tokens, 5, gen)
    check_align(ids, slots, 5, 16, device, local.to(device))
    check_align(ids, slots, 5, 16, device, torch.full((64,), -1).int().to(device))


def test_more_token_slots_than_tokens(device):
    ids = torch.tensor([[0, 1], [1, 0]])
    check_align(ids, [0, 1, 0, 0, 5, -9], 2, 2, device)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_routing(device, data):
    num_slots = data.draw(st.integers(1, 20), "num_slots")
    num_experts = data.draw(st.integers(1, 200), "num_experts")
    top_k = data.draw(st.integers(1, 9), "top_k")
    num_tokens = data.draw(st.integers(0, 300), "num_tokens")
    gen = generator("any", data.draw(st.integers(0, 1000), "seed"))
    ids = torch.randint(-1, num_experts, (num_tokens, top_k), generator=gen)
    check_align(ids, random_slots(num_tokens, num_slots, gen), num_slots, num_experts, device)


def test_memory_does_not_grow_with_slots_times_pairs(device):
    ids, slots = torch.zeros(1024, 8, dtype=torch.int64, device=device), int32([0] * 1024, device)
    routing = ops.moe_lora_align(ids, slots, num_slots=10_000, num_experts=128)
    assert routing.numel() <= 10 * ids.numel()


def test_opcheck(device):
    ids = torch.tensor([[0, 1], [-1, 2], [2, 0]], device=device)
    slots, local = int32([1, 0, -1], device), int32([0, -1, 1], device)
    packet = torch.ops.lora_ext
    torch.library.opcheck(packet.moe_lora_align.default, (ids, slots, 2, 2, local))
    buffer = int32([0] * lora_ext.moe_routing_size(3, 2, 2, 3), device)
    torch.library.opcheck(packet.moe_lora_align_.default, (buffer, ids, slots, 2, 3))


def test_compiled_once_for_all_sizes(device):
    def align(ids, slots):
        return ops.moe_lora_align(ids, slots, num_slots=3, num_experts=8) + 0

    compiled = torch.compile(align, fullgraph=True, dynamic=True)
    gen = generator("compiled")
    for num_tokens in (5, 17, 900, 4000):
        ids = random_ids(num_tokens, 2, 8, gen).to(device)
        slots = int32(random_slots(num_tokens, 3, gen), device)
        with torch._dynamo.config.patch(error_on_recompile=num_tokens != 5):
            check_routing(compiled(ids, slots), ids, slots, 3, 8)


# What is wrong: (changes to a good call's arguments, what the message must say).
BAD_CALLS = {
    "ids dim": (dict(topk_ids=torch.zeros(6).long()), ["topk_ids", "[6]"]),
    "ids dtype": (dict(topk_ids=torch.zeros(3, 2)), ["topk_ids", "int32 or int64"]),
    "ids strided": (dict(topk_ids=torch.zeros(2, 3).long().T), ["topk_ids", "contiguous"]),
    "few slots": (dict(token_slots=torch.zeros(2).int()), ["token_slots", "2", "3"]),
    "slots dtype": (dict(token_slots=torch.zeros(3).long()), ["token_slots", "int32"]),
    "map dtype": (dict(expert_map=torch.zeros(3).long()), ["expert_map", "int32"]),
    "routing size": (dict(routing=torch.zeros(30).int()), ["routing", "30"]),
    "routing dtype": (dict(routing=torch.zeros(99).long()), ["routing", "int32"]),
    "negative": (dict(num_experts=-1), ["num_experts", "-1"]),
    "too many": (dict(num_experts=2**30, num_slots=4), ["num_experts", "2^31"]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_name_the_argument_and_leave_the_buffer_alone(device, case):
    good = dict(
        routing=torch.full((99,), GARBAGE).int(),
        topk_ids=torch.tensor([[0, 1], [1, 2], [2, 0]]),
        token_slots=torch.tensor([0, 1, 1]).int(),
        num_slots=2,
        num_experts=3,
    )
    changes, words = BAD_CALLS[case]
    call = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**good, **changes}.items()
    }
    before = call["routing"].clone()
    with pytest.raises(RuntimeError) as error:
        ops.moe_lora_align_(**call)
    for word in words:
        assert word in str(error.value)
    assert_same_bits(call["routing"], before)


def test_routing_must_be_aligned(device):
    ids, slots = torch.zeros(3, 2, dtype=torch.int64, device=device), int32([0] * 3, device)
    routing = int32([0] * 99, device)
    with pytest.raises(RuntimeError, match="16 bytes"):
        ops.moe_lora_align_(routing[1:], ids, slots, num_slots=2, num_experts=3)


CPU_ONLY = [
    ("id", [[0, 1], [1, 3], [2, 0]], [0, 1, 1], None, ["topk_ids[1, 1]", "3"]),
    ("negative id", [[0, 1], [1, 2], [-2, 0]], [0, 1, 1], None, ["topk_ids[2, 0]", "-2"]),
    ("slot", [[0, 1], [1, 2], [2, 0]], [0, 2, 1], None, ["token_slots[1]", "2"]),
    ("map", [[0, 1], [1, 2], [2, 0]], [0, 1, 1], [0, 1, 7], ["expert_map[2]", "7"]),
]


@pytest.mark.parametrize("case", CPU_ONLY, ids=lambda case: case[0])
def test_bad_values_raise_on_the_cpu_and_count_as_not_routed_on_a_gpu(device, case):
    _, ids, slots, local, words = case
    expert_map = None if local is None else int32(local, device)
    call = (torch.tensor(ids, device=device), int32(slots, device))
    arguments = dict(num_slots=2, num_experts=3, expert_map=expert_map)
    if device == "cpu":
        with pytest.raises(RuntimeError) as error:
            ops.moe_lora_align(*call, **arguments)
        for word in words:
            assert word in str(error.value)
    else:
        check_routing(ops.moe_lora_align(*call, **arguments), *call, 2, 3, expert_map)


def test_ids_of_padding_tokens_do_not_matter(device):
    ids = torch.tensor([[0, 1], [10**6, -(10**6)]], device=device)
    routing = ops.moe_lora_align(ids, int32([0, -1], device), num_slots=1, num_experts=2)
    check_routing(routing, ids, int32([0, -1], device), 1, 2)

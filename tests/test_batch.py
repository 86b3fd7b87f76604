"""LoRABatch: the plan of a batch from host or device input, checked, refreshed at its address."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from generators import on_devices
from lora_ext import LoRABatch, ops

NUM_SLOTS = 5


def check(batch: LoRABatch, token_slots: Sequence[int]) -> None:
    """Compare the views of a plan with what the slot of every token says."""
    tokens = len(token_slots)
    assert batch.token_slots[:tokens].tolist() == list(token_slots)
    assert (batch.token_slots[tokens:] == -1).all()

    runs = [(slot, len(list(run))) for slot, run in groupby(token_slots)]
    assert int(batch.num_segments) == len(runs)
    assert batch.weight_indices[: len(runs)].tolist() == [slot for slot, _ in runs]
    assert batch.seg_lens[: len(runs)].tolist() == [length for _, length in runs]
    starts = np.cumsum([0, *(length for _, length in runs)])
    assert batch.seg_indptr[: len(runs) + 1].tolist() == starts.tolist()

    by_slot = [
        [token for token, of_token in enumerate(token_slots) if of_token == slot]
        for slot in range(batch.num_slots)
    ]
    grouped = list(chain(*by_slot))
    assert int(batch.num_lora_tokens) == len(grouped)
    assert batch.permutation[: len(grouped)].tolist() == grouped
    assert (batch.permutation[len(grouped) :] == -1).all()
    assert batch.slot_indptr.tolist() == np.cumsum([0, *map(len, by_slot)]).tolist()
    assert batch.enabled.tolist() == [int(bool(tokens)) for tokens in by_slot]
    assert int(batch.num_active_slots) == sum(map(bool, by_slot))


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    n = draw(st.integers(0, 40))
    slots = draw(st.lists(st.integers(-1, NUM_SLOTS - 1), min_size=n, max_size=n))
    lens = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    return slots, lens


@given(st.lists(requests(), min_size=1, max_size=3))
def test_update_by_requests(batches: list[tuple[list[int], list[int]]]) -> None:
    batch = LoRABatch(360, NUM_SLOTS)
    address = batch.plan.data_ptr()
    for slots, lens in batches:
        token_slots = np.repeat(slots, lens).astype(int).tolist()
        indptr = [0, *np.cumsum(lens, dtype=int).tolist()]
        for segments in ({"seg_lens": lens}, {"seg_indptr": indptr}):
            batch.update(slots, **segments)
            check(batch, token_slots)
            assert batch.num_tokens == len(token_slots)
            assert batch.num_requests == len(slots)
            assert batch.has_active_lora or all(slot < 0 for slot in token_slots)
        batch.update(token_slots)
        check(batch, token_slots)
    assert batch.plan.data_ptr() == address


@on_devices
@pytest.mark.parametrize("num_requests", [1, 300, 4096])
def test_update_on_each_device(device: str, num_requests: int) -> None:
    """More updates than there are staging buffers, each read back: none is overwritten early."""
    batch = LoRABatch(4 * num_requests, NUM_SLOTS, device)
    rng = np.random.default_rng(0)
    for _ in range(20):
        slots = rng.integers(-1, NUM_SLOTS, num_requests)
        lens = rng.integers(0, 5, num_requests)
        batch.update(slots, seg_lens=lens)
        check(batch, np.repeat(slots, lens).tolist())


@on_devices
def test_a_new_batch_has_no_tokens(device: str) -> None:
    check(LoRABatch(100, NUM_SLOTS, device), [])
    check(LoRABatch.for_cuda_graph(64, 1, device), [])
    check(LoRABatch(0, 1, device), [])


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        lambda values: np.array(values, np.int32),
        lambda values: np.array(values, np.int8),
        lambda values: np.array(values, ">i4"),
        lambda values: np.repeat(np.array(values), 2)[::2],
        lambda values: np.frombuffer(np.array(values).tobytes(), np.int64),  # read-only
        lambda values: torch.tensor(values).repeat_interleave(2)[::2],
        torch.tensor,
        lambda values: torch.tensor(values, dtype=torch.int32),
    ],
)
def test_host_input_of_any_kind(kind: Any) -> None:
    batch = LoRABatch(16, NUM_SLOTS)
    batch.update(kind([2, -1, 2]), seg_lens=kind([3, 1, 2]))
    check(batch, [2, 2, 2, -1, 2, 2])
    batch.update(kind([2, -1]), seg_indptr=kind([0, 3, 4]))
    check(batch, [2, 2, 2, -1])
    batch.update(kind([0, 1, 1]))
    check(batch, [0, 1, 1])


@on_devices
@pytest.mark.parametrize("special", [{}, {700: 4}, {0: -1}, {699: 300}], ids=str)
def test_long_lists(device: str, special: dict[int, int]) -> None:
    """They go through bytes where their values allow it."""
    batch, slots, lens = LoRABatch(4000, 400, device), [3, 0, 1] * 300, [2, 0, 1] * 300
    for at, slot in special.items():
        slots[at] = slot
    batch.update(slots, seg_lens=lens)
    check(batch, np.repeat(slots, lens).tolist())
    lens[5] = 300
    batch.update(tuple(slots), seg_lens=lens)
    check(batch, np.repeat(slots, lens).tolist())
    before = batch.plan.clone()
    for wrong in (400, -2, 2**31, 0.5, None, "7"):
        with pytest.raises(ValueError, match="slots"):
            batch.update([*slots[:-1], wrong])
    assert torch.equal(batch.plan, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_host_input_that_is_pinned(dtype: torch.dtype) -> None:
    batch = LoRABatch(64, NUM_SLOTS, "cuda")
    for slots, lens in (([2, -1, 2], [3, 1, 2]), ([0, 4], [60, 4])):
        pinned = [torch.tensor(v, dtype=dtype).pin_memory() for v in (slots, lens)]
        batch.update(pinned[0], seg_lens=pinned[1])
        for tensor in pinned:
            tensor.fill_(1)  # it was read when `update` returned
        check(batch, np.repeat(slots, lens).tolist())


@pytest.mark.gpu
def test_a_batch_that_is_gone_is_still_read() -> None:
    """Its rows of pinned memory are nobody else's until the device has read them."""
    batch = LoRABatch(64, NUM_SLOTS, "cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # the update below waits for this on the device
    batch.update([2] * 64)
    token_slots = batch.token_slots
    del batch
    for _ in range(3):
        LoRABatch(64, NUM_SLOTS, "cuda").update([1] * 64)
    assert token_slots.tolist() == [2] * 64


def test_more_requests_than_room_for_tokens() -> None:
    batch = LoRABatch(4, NUM_SLOTS)
    batch.update([0, 1] * 500, seg_lens=[0] * 997 + [2, 0, 1])
    check(batch, [1, 1, 1])
    assert batch.num_requests == 1000
    batch.update(np.array([0, 1] * 500), seg_indptr=[0] * 998 + [2, 2, 3])
    check(batch, [1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": [0] * 1000}, "1000 tokens, max_tokens is 4"),
        ({"slots": [0] * 1000, "seg_lens": [1] * 1000}, "1000 tokens, max_tokens is 4"),
        ({"slots": [9] * 1000, "seg_lens": [0] * 1000}, r"slots\[0\] is 9"),
        ({"slots": [0] * 1000, "seg_lens": [0] * 999}, "999 segments for 1000 slots"),
        ({"slots": [0] * 1000, "seg_lens": [-1] * 1000}, "segment 0 has -1 tokens"),
        ({"slots": [0] * 1000, "seg_indptr": [1] * 1001}, "must start at 0"),
        ({"slots": [0.5] * 1000, "seg_lens": [0] * 1000}, "integer dtype, got float64"),
    ],
)
def test_more_wrong_requests_than_room_for_tokens(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRABatch(4, NUM_SLOTS).update(**arguments)


@pytest.mark.gpu
def test_update_from_device_tensors() -> None:
    def on_device(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    batch = LoRABatch(64, NUM_SLOTS, "cuda")
    batch.update(on_device([1, -1]), seg_lens=on_device([3, 2]))
    check(batch, [1, 1, 1, -1, -1])
    assert batch.num_tokens is None and batch.has_active_lora
    batch.update(on_device([1, 4]))
    check(batch, [1, 4])
    assert batch.num_tokens == 2
    with pytest.raises(ValueError, match="all on the host or all on the device"):
        batch.update([1], seg_lens=on_device([1]))


@pytest.mark.gpu
def test_update_never_waits_for_the_device() -> None:
    batch = LoRABatch(4096, NUM_SLOTS, "cuda")
    slots, lens = [1, -1] * 128, [1, 3] * 128
    batch.update(slots, seg_lens=lens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            batch.update(slots, seg_lens=lens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(batch, np.repeat(slots, lens).tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": [0, 5]}, r"slots\[1\] is 5, expected -1 to 4"),
        ({"slots": [-2]}, r"slots\[0\] is -2"),
        ({"slots": [0, 1], "seg_lens": [1]}, "seg_lens has 1 entries, expected 2"),
        ({"slots": [0, 1], "seg_indptr": [0, 1]}, "seg_indptr has 2 entries, expected 3"),
        ({"slots": [0], "seg_indptr": [1, 2]}, "start at 0, got 1"),
        ({"slots": [0], "seg_indptr": [0, 65]}, "65 tokens, max_tokens is 64"),
        ({"slots": [0, 1], "seg_indptr": [0, 99, 2]}, "segment 1 has -97 tokens"),
        ({"slots": [0, 1], "seg_indptr": [0, 2**31 - 1, -(2**31)]}, "segment 1 has -4294967295"),
        ({"slots": [0, 1], "seg_indptr": [0, 3, 2]}, "segment 1 has -1 tokens"),
        ({"slots": [0, 1], "seg_lens": [2, -1]}, "segment 1 has -1 tokens"),
        ({"slots": [0], "seg_lens": [65]}, "65 tokens, max_tokens is 64"),
        ({"slots": [0] * 65}, "65 tokens, max_tokens is 64"),
        ({"slots": [0, 0], "seg_lens": [2**31 - 1, 2**31 - 1]}, "4294967294 tokens"),
        ({"slots": [0, 0], "seg_indptr": np.array([0, 2**63 - 1, -(2**63)])}, "do not fit int32"),
        ({"slots": [0, 0], "seg_lens": np.array([2**63 - 1, 2])}, "do not fit int32"),
        ({"slots": [0, 0], "seg_lens": np.array([2**62, -(2**62)])}, "do not fit int32"),
        ({"slots": np.array([2**63 - 1, -(2**63)])}, "do not fit int32"),
        ({"slots": np.array([2**32, 2**32 - 1])}, "do not fit int32"),
        ({"slots": [2**31]}, "slots must hold whole numbers that fit int32"),
        ({"slots": np.array([2**31])}, "do not fit int32"),
        ({"slots": [0.5]}, "slots must hold whole numbers"),
        ({"slots": [None]}, "slots must hold whole numbers"),
        ({"slots": np.zeros(2)}, "integer dtype, got float64"),
        ({"slots": torch.zeros(1, 1, dtype=torch.int32)}, "slots must be 1-D"),
        ({"slots": [0], "seg_lens": [1], "seg_indptr": [0, 1]}, "not both"),
    ],
)
@on_devices
def test_wrong_input_leaves_the_plan(device: str, arguments: Any, message: str) -> None:
    batch = LoRABatch(64, NUM_SLOTS, device)
    batch.update([3, -1], seg_lens=[2, 1])
    before = batch.plan.clone()
    with pytest.raises(ValueError, match=message):
        batch.update(**arguments)
    assert torch.equal(batch.plan, before)
    assert (batch.num_tokens, batch.num_requests, batch.has_active_lora) == (3, 2, True)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens >= 0"):
        LoRABatch(-1, 2)
    with pytest.raises(ValueError, match="num_slots >= 1"):
        LoRABatch(1, 0)


@pytest.mark.parametrize(("max_tokens", "num_slots"), [(0, 1), (1, 1), (64, 7), (1000, 64)])
def test_the_views_end_where_the_plan_ends(max_tokens: int, num_slots: int) -> None:
    batch = LoRABatch(max_tokens, num_slots)
    assert batch._layout.size == batch.plan.numel() == ops.plan_size(max_tokens, num_slots)

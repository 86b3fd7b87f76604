"""lora_embedding and its applied form: an exact gather, whatever the ids and the strides of A."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generators import (
    HALVES_AND_FP32,
    NAN,
    RANKS,
    dtypes_on,
    generator,
    make_batch,
    on_devices,
    randn,
    random_slots,
)
from lora_ext import ops, reference
from numerics import (
    Expected,
    accumulator,
    assert_close,
    assert_same_bits,
    expected_expand,
)

pytestmark = on_devices


def make_tables(ranks, vocab, num_extra, dtype, device, gen):
    """A [L, R, V] and extra A [L, X, R] (None for no X), NaN past each rank."""
    max_rank = max(1, *ranks)
    table = randn((len(ranks), max_rank, vocab), dtype, device, gen)
    extra = randn((len(ranks), num_extra, max_rank), dtype, device, gen) if num_extra else None
    for slot, rank in enumerate(ranks):
        table[slot, rank:] = NAN
        if extra is not None:
            extra[slot, :, rank:] = NAN
    return table, extra


def vectors(ranks, device, gen):
    scalings = torch.rand(len(ranks), generator=gen) + 0.5
    return torch.tensor(ranks, dtype=torch.int32, device=device), scalings.to(device)


def check_embedding(ids, table, ranks, scalings, batch, vocab_start=0, extra=None):
    """Runs the op; a product of two numbers is exact up to its one rounding."""
    xa = ops.lora_embedding(
        ids, table, ranks, scalings, batch.plan, vocab_start=vocab_start, extra_a=extra
    )
    rest = (ranks, scalings, batch.token_slots, vocab_start, extra)
    want = reference.embedding(ids, table, *rest)
    dtype = accumulator(table.dtype)
    assert xa.dtype == dtype
    assert_close(xa, Expected(want, torch.finfo(dtype).eps * want.abs()))
    return xa


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_ranks_in_one_batch(device, ids_dtype, transposed):
    for dtype in dtypes_on(device):
        gen = generator("embedding")
        table, _ = make_tables(RANKS, 61, 0, dtype, device, gen)
        if transposed:
            table = table.transpose(1, 2).contiguous().transpose(1, 2)
        ranks, scalings = vectors(RANKS, device, gen)
        batch = make_batch(random_slots(100, len(RANKS), gen), len(RANKS), device)
        ids = torch.randint(0, 61, (100,), generator=gen).to(device, ids_dtype)
        check_embedding(ids, table, ranks, scalings, batch)


@pytest.mark.parametrize("num_extra", [0, 1, 5])
@pytest.mark.parametrize("vocab_start", [0, 40, 2**33])
def test_sharded_vocabulary_and_added_tokens(device, vocab_start, num_extra):
    for dtype in dtypes_on(device):
        gen = generator("sharded")
        table, extra = make_tables([8, 3, 16], 20, num_extra, dtype, device, gen)
        ranks, scalings = vectors([8, 3, 16], device, gen)
        # Every id around the shard and the added tokens, for every slot.
        ids = torch.arange(-3, 30).repeat(4) + vocab_start
        slots = [slot for slot in (-1, 0, 1, 2) for _ in range(33)]
        batch = make_batch(slots, 3, device)
        check_embedding(ids.to(device), table, ranks, scalings, batch, vocab_start, extra)


def test_extreme_ids_give_zeros(device):
    gen = generator("extreme")
    table, extra = make_tables([4], 10, 2, torch.float32, device, gen)
    ranks, scalings = vectors([4], device, gen)
    for dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        ids = torch.tensor([limits.min, -1, 12, limits.max], dtype=dtype, device=device)
        plan = make_batch([0] * 4, 1, device).plan
        for start in (0, 7, 2**40):
            xa = ops.lora_embedding(
                ids, table, ranks, scalings, plan, vocab_start=start, extra_a=extra
            )
            assert (xa[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 1000])
def test_any_number_of_tokens(device, num_tokens):
    gen = generator("T", num_tokens)
    table, _ = make_tables([8, 0, 33], 50, 0, torch.bfloat16, device, gen)
    ranks, scalings = vectors([8, 0, 33], device, gen)
    batch = make_batch(random_slots(num_tokens, 3, gen), 3, device, num_tokens + 100)
    ids = torch.randint(0, 50, (num_tokens,), generator=gen).to(device)
    assert check_embedding(ids, table, ranks, scalings, batch).shape == (num_tokens, 33)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_problem(device, data):
    ranks = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5), "ranks")
    slots = data.draw(st.lists(st.integers(-1, len(ranks) - 1), max_size=40), "slots")
    vocab = data.draw(st.integers(0, 30), "V")
    num_extra = data.draw(st.integers(0, 4), "X")
    start = data.draw(st.integers(0, 100), "vocab_start")
    ids = data.draw(st.lists(st.integers(-5, 140), min_size=len(slots), max_size=len(slots)), "ids")
    dtype = data.draw(st.sampled_from(dtypes_on(device)), "dtype")
    gen = generator("any embedding")
    table, extra = make_tables(ranks, vocab, num_extra, dtype, device, gen)
    rank_tensor, scalings = vectors(ranks, device, gen)
    ids = torch.tensor(ids, dtype=torch.int64, device=device)
    batch = make_batch(slots, len(ranks), device)
    check_embedding(ids, table, rank_tensor, scalings, batch, start, extra)


@pytest.mark.parametrize("num_extra", [0, 3])
@pytest.mark.parametrize("width", [1, 40, 129])
def test_applied_form(device, width, num_extra):
    for dtype in dtypes_on(device):
        for y_dtype in HALVES_AND_FP32:
            gen = generator("applied", width)
            ranks_list = [8, 0, 33, 16]
            table, extra = make_tables(ranks_list, 30, num_extra, dtype, device, gen)
            ranks, scalings = vectors(ranks_list, device, gen)
            b = randn((4, width, 33), dtype, device, gen)
            for slot, rank in enumerate(ranks_list):
                b[slot, :, rank:] = NAN
            batch = make_batch(random_slots(50, 4, gen), 4, device)
            ids = torch.randint(0, 36, (50,), generator=gen).to(device)
            y = randn((50, width + 3), y_dtype, device, gen)
            before = y.clone()
            rest = (ranks, scalings, batch.token_slots, 2, extra)
            want = reference.embedding(ids, table, *rest)
            xa = Expected(want, torch.finfo(accumulator(dtype)).eps * want.abs())
            expected = expected_expand(y, xa, [b], ranks, batch.token_slots, [width])
            ops.lora_embedding_apply_(
                y, ids, table, b, ranks, scalings, batch.plan, vocab_start=2, extra_a=extra
            )
            assert_close(y, expected)
            idle = [t for t, slot in enumerate(batch.slots) if slot in (-1, 1)]
            assert_same_bits(y[idle], before[idle])
            assert_same_bits(y[:, width:], before[:, width:])


@pytest.mark.parametrize("whole", [True, False], ids=["vocabulary-major", "rank-major"])
@pytest.mark.parametrize("tokens", [1, 7, 13, 40, 64, 150, 260, 700])
@pytest.mark.parametrize(
    "ranks_list",
    [[16, 8, 0, 3], [32, 20, 0, 7], [64, 40, 0, 33], [128, 72, 0, 5]],
    ids=["r16", "r32", "r64", "r128"],
)
def test_applied_form_of_aligned_tensors(device, ranks_list, tokens, whole):
    """What the kernels by tokens, slots and tiles take, and what they must leave alone."""
    width, max_rank = 200, ranks_list[0]
    for dtype in (torch.bfloat16, torch.float16):
        gen = generator("aligned", max_rank, tokens)
        table, extra = make_tables(ranks_list, 50, 3, dtype, device, gen)
        if whole:
            table = table.transpose(1, 2).contiguous().transpose(1, 2)
        ranks, scalings = vectors(ranks_list, device, gen)
        b = randn((4, width, max_rank), dtype, device, gen)
        for slot, rank in enumerate(ranks_list):
            b[slot, :, rank:] = NAN
        # Few tokens of one slot, many of another (64: all of one); a plan for more tokens than the
        # call has.
        slots = [0] * 64 if tokens == 64 else random_slots(tokens // 3, 4, gen)
        slots += [2 * (t % 2) - (t % 7 == 0) for t in range(len(slots), tokens + 5)]
        batch = make_batch(slots, 4, device, tokens + 30)
        token_slots = batch.token_slots[:tokens]
        ids = torch.randint(-1, 58, (tokens,), generator=gen)
        ids = ids.to(device, torch.int32 if tokens % 2 else torch.int64)
        y = randn((tokens, width + 8), dtype, device, gen)
        before = y.clone()
        rest = (ranks, scalings, token_slots, 1, extra)
        want = reference.embedding(ids, table, *rest)
        xa = Expected(want, torch.finfo(torch.float32).eps * want.abs())
        expected = expected_expand(y, xa, [b], ranks, token_slots, [width])
        again = y.clone()
        for result in (y, again):
            ops.lora_embedding_apply_(
                result, ids, table, b, ranks, scalings, batch.plan, vocab_start=1, extra_a=extra
            )
        assert_close(y, expected)
        assert_same_bits(again, y)
        idle = [t for t, slot in enumerate(slots[:tokens]) if slot in (-1, 2)]
        assert_same_bits(y[idle], before[idle])
        assert_same_bits(y[:, width:], before[:, width:])


def test_offsets_past_32_bits(device):
    stride = 2**30 + 8
    try:
        far = torch.empty(2 * stride + 8 * 20, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")
    gen = generator("far")
    table, _ = make_tables([8] * 3, 20, 0, torch.bfloat16, device, gen)
    ranks, scalings = vectors([8] * 3, device, gen)
    far = far.as_strided((3, 8, 20), (stride, 20, 1))
    far.copy_(table)
    plan = make_batch([2, 0, 1], 3, device).plan
    ids = torch.tensor([19, 3, 7], device=device)
    near = ops.lora_embedding(ids, table, ranks, scalings, plan)
    assert_same_bits(ops.lora_embedding(ids, far, ranks, scalings, plan), near)


def test_opcheck(device):
    gen = generator("opcheck")
    table, extra = make_tables([4, 2], 10, 3, torch.float32, device, gen)
    ranks, scalings = vectors([4, 2], device, gen)
    plan = make_batch([0, 1, -1], 2, device).plan
    ids = torch.tensor([1, 11, 3], device=device)
    b, y = torch.zeros(2, 5, 4, device=device), torch.zeros(3, 5, device=device)
    packet = torch.ops.lora_ext
    rest = (ranks, scalings, plan, 1, extra)
    torch.library.opcheck(packet.lora_embedding.default, (ids, table, *rest))
    torch.library.opcheck(packet.lora_embedding_apply_.default, (y, ids, table, b, *rest))


def test_compiled(device):
    gen = generator("compiled")
    table, extra = make_tables([4, 2], 10, 3, torch.float32, device, gen)
    ranks, scalings = vectors([4, 2], device, gen)
    plan = make_batch([0, 1, -1], 2, device).plan
    ids = torch.tensor([1, 11, 3], device=device)
    b = torch.nan_to_num(randn((2, 5, 4), torch.float32, device, gen))
    weight = randn((20, 5), torch.float32, device, gen)

    def layer(ids):
        y = torch.nn.functional.embedding(ids, weight)
        ops.lora_embedding_apply_(y, ids, table, b, ranks, scalings, plan, extra_a=extra)
        return y

    assert_same_bits(torch.compile(layer, fullgraph=True)(ids), layer(ids))


def bad_calls():
    """(what is wrong, changes to a good call's keyword arguments, what the message must say)"""
    return [
        ("ids dtype", dict(ids=torch.zeros(3)), ["ids", "int32"]),
        ("ids dim", dict(ids=torch.zeros(1, 3).long()), ["ids", "1-D"]),
        ("tokens", dict(ids=torch.zeros(4).long()), ["4", "3"]),
        ("A dim", dict(lora_a=torch.zeros(2, 4)), ["lora_a"]),
        ("A slots", dict(lora_a=torch.zeros(3, 4, 10)), ["lora_a", "3", "2"]),
        ("extra width", dict(extra_a=torch.zeros(2, 3, 5)), ["extra_a", "5", "4"]),
        ("extra slots", dict(extra_a=torch.zeros(1, 3, 4)), ["extra_a", "1", "2"]),
        ("extra dtype", dict(extra_a=torch.zeros(2, 3, 4).half()), ["extra_a", "dtype"]),
        ("B width", dict(lora_b=torch.zeros(2, 6, 4)), ["5", "6"]),
        ("B rank", dict(lora_b=torch.zeros(2, 5, 3)), ["lora_b", "3", "4"]),
        ("B dtype", dict(lora_b=torch.zeros(2, 5, 4).half()), ["lora_b", "dtype"]),
        ("scalings", dict(scalings=torch.zeros(3)), ["scalings", "3", "2"]),
        ("plan", dict(plan=torch.zeros(41).int()), ["plan", "41"]),
    ]


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case[0])
def test_errors_name_the_argument_and_leave_y_alone(device, case):
    good = dict(
        y=torch.zeros(3, 5),
        ids=torch.zeros(3).long(),
        lora_a=torch.ones(2, 4, 10),
        lora_b=torch.ones(2, 5, 4),
        ranks=torch.tensor([4, 2], dtype=torch.int32),
        scalings=torch.ones(2),
        plan=make_batch([0, 1, -1], 2, device).plan,
        extra_a=torch.ones(2, 3, 4),
    )
    _, changes, words = case
    call = {name: value.to(device) for name, value in {**good, **changes}.items()}
    with pytest.raises(RuntimeError) as error:
        ops.lora_embedding_apply_(**call)
    for word in words:
        assert word in str(error.value)
    assert (call["y"] == 0).all()

"""Embedding and output projection of which each rank holds a part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from distributed import Workers, watched, world
from generators import NAN, generator, make_module, on_devices, randn
from layer_problems import DTYPES, MAX_RANK, NUM_SLOTS, RANKS, SLOTS, Problem, make_batch
from lora_ext import LoRABatch
from lora_ext.layers import LoRALMHead, LoRAVocabParallelEmbedding
from numerics import Expected, assert_close, assert_same_bits, expected_expand, half_ulp

# The last rank has part of its rows, one row, none.
VOCABULARIES = [131, 65, 20, 1]
WIDTH = 24
NUM_ADDED = 3


# ---- the embedding


@dataclass(frozen=True)
class Table:
    """A whole embedding with adapters, some of which add tokens, in each of the ways there are."""

    embedding: nn.Embedding
    a: list[Tensor]  # [r, V + x]: as many columns as the adapter has
    b: list[Tensor]
    rows: list[Tensor]  # [x, D]
    scalings: Tensor

    @classmethod
    def random(cls, vocab_size: int, dtype: torch.dtype, device: str) -> Table:
        gen = generator("table", vocab_size)
        embedding = nn.Embedding(vocab_size, WIDTH, device=device, dtype=dtype)
        with torch.no_grad():
            embedding.weight.copy_(torch.randn(vocab_size, WIDTH, generator=gen))
        module = make_module(RANKS, vocab_size + NUM_ADDED, [WIDTH], dtype, device)
        num_columns = [NUM_ADDED, 0, 2, 0]
        num_rows = [2, 3, 0, 1]  # slot 1, of rank 0, has nothing but rows
        return cls(
            embedding,
            [a[:, : vocab_size + n] for (a,), n in zip(module.a, num_columns, strict=True)],
            [b for (b,) in module.b],
            [randn((n, WIDTH), dtype, device, gen) for n in num_rows],
            module.scalings,
        )

    def load(self, layer: LoRAVocabParallelEmbedding) -> None:
        for buffer in (layer.lora_a, layer.lora_b, layer.added_rows):
            if buffer is not None:
                buffer.fill_(NAN)
        with torch.no_grad():
            layer.weight[layer._held.size :] = NAN  # padding
        for slot, rank in enumerate(RANKS):
            if rank:
                layer.write_slot(slot, self.a[slot], self.b[slot])
            layer.set_slot(slot, rank, float(self.scalings[slot]))
            layer.write_added_tokens(slot, self.rows[slot])

    def base_row(self, token: int, slot: int) -> Tensor:
        vocab_size = self.embedding.num_embeddings
        if token < vocab_size:
            return self.embedding.weight[token].detach()
        if slot >= 0 and token - vocab_size < len(self.rows[slot]):
            return self.rows[slot][token - vocab_size]
        return self.embedding.weight.new_zeros(WIDTH)

    def expected(self, ids: list[int], slots: list[int], like: Tensor) -> Expected:
        base = torch.stack([self.base_row(i, s) for i, s in zip(ids, slots, strict=True)]).double()
        device, dtype = like.device, like.dtype
        xa = torch.zeros(len(ids), MAX_RANK, dtype=torch.float64, device=device)
        for t, (token, slot) in enumerate(zip(ids, slots, strict=True)):
            if slot >= 0 and token < self.a[slot].shape[1]:
                xa[t, : RANKS[slot]] = self.scalings[slot] * self.a[slot][:, token].double()
        lora_b = torch.zeros(NUM_SLOTS, WIDTH, MAX_RANK, dtype=dtype, device=device)
        for slot, rank in enumerate(RANKS):
            lora_b[slot, :, :rank] = self.b[slot]
        error = torch.finfo(torch.float32).eps * xa.abs()
        ranks = torch.tensor(RANKS, dtype=torch.int32, device=device)
        token_slots = torch.tensor(slots, device=device)
        y = expected_expand(base, Expected(xa, error), [lora_b], ranks, token_slots, [WIDTH])
        return Expected(y.value, y.error + half_ulp(y.value.abs() + y.error, dtype))


def check_embedding(
    device: str, dtype: torch.dtype, vocab_size: int, id_dtype: torch.dtype
) -> None:
    table = Table.random(vocab_size, dtype, device)
    layer = LoRAVocabParallelEmbedding.from_full(
        table.embedding, NUM_SLOTS, MAX_RANK, group=world(), num_added_tokens=NUM_ADDED
    )
    table.load(layer)
    rank, size = layer.parallel.rank, layer.parallel.size
    rows = layer.base.num_embeddings
    edges = {0, rows - 1, rows, vocab_size - 1, vocab_size // 2}
    tokens = sorted(i for i in edges if i < vocab_size)
    tokens += [*range(vocab_size, vocab_size + NUM_ADDED), vocab_size + 7, 10**6]
    ids = [token for token in tokens for _ in range(NUM_SLOTS + 1)]
    slots = list(range(-1, NUM_SLOTS)) * len(tokens)
    given = torch.tensor(ids, dtype=id_dtype, device=device)
    batch = LoRABatch(128, NUM_SLOTS, device)
    batch.update(slots)
    with layer.routing.using(batch), torch.no_grad(), watched() as seen:
        y = layer(given)
    assert_close(y, table.expected(ids, slots, y))
    # One reduction, in which a token that another rank holds counts for exactly nothing.
    assert [kind for kind, _ in seen] == ["all_reduce"] * (size > 1)
    holder = [min(token // rows, size - 1) if token < vocab_size else size - 1 for token in ids]
    elsewhere = [t for t, owner in enumerate(holder) if owner != rank]
    assert bool(elsewhere) == (size > 1)
    for _, buffer in seen:
        assert_same_bits(buffer[elsewhere], torch.zeros_like(buffer[elsewhere]))
    # Without adapter: the base's bits.
    untouched = [t for t, slot in enumerate(slots) if slot < 0]
    rows_of_base = [table.base_row(ids[t], -1) for t in untouched]
    assert_same_bits(y[untouched], torch.stack(rows_of_base))

    # A slot that is cleared keeps no added token.
    layer.set_slot(0, 0, 0.0)
    layer.set_slot(1, 0, 0.0)
    with layer.routing.using(batch), torch.no_grad():
        y = layer(given)
    cleared = [t for t, slot in enumerate(slots) if slot in (0, 1)]
    assert_same_bits(y[cleared], torch.stack([table.base_row(ids[t], -1) for t in cleared]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_embedding(workers: Workers, dtype: torch.dtype, vocab_size: int) -> None:
    id_dtype = torch.int32 if vocab_size == 65 else torch.int64
    workers.run(check_embedding, dtype, vocab_size, id_dtype)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_of_one_process(device: str, dtype: torch.dtype) -> None:
    check_embedding(device, dtype, 65, torch.int64)


# ---- the output projection


def check_lm_head(
    device: str,
    dtype: torch.dtype,
    vocab_size: int,
    in_features: int,
    logits_dtype: torch.dtype | None,
    bias: bool,
) -> None:
    problem = Problem.random(in_features, [vocab_size], dtype, device, bias)
    layer = LoRALMHead.from_full(
        problem.linear, NUM_SLOTS, MAX_RANK, group=world(), logits_dtype=logits_dtype
    )
    problem.load(layer)
    with torch.no_grad():
        layer.weight[layer.out_features :] = NAN  # padding
    with layer.routing.using(make_batch(device)), torch.no_grad(), watched() as seen:
        logits = layer(problem.x)
    assert [kind for kind, _ in seen] == ["all_gather"] * (layer.parallel.size > 1)
    wanted = dtype if logits_dtype is None else logits_dtype
    assert logits.dtype == wanted and logits.shape == (len(problem.x), vocab_size)
    assert_close(logits, problem.expected(dtype=wanted))
    untouched = [t for t, slot in enumerate(SLOTS) if slot < 0 or RANKS[slot] == 0]
    with torch.no_grad():
        base = layer(problem.x)
    assert_same_bits(logits[untouched], base[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_lm_head(workers: Workers, dtype: torch.dtype, vocab_size: int) -> None:
    workers.run(check_lm_head, dtype, vocab_size, 40, None, vocab_size == 65)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_float32_logits_are_never_rounded_to_half_precision(
    workers: Workers, dtype: torch.dtype, bias: bool
) -> None:
    workers.run(check_lm_head, dtype, 131, 40, torch.float32, bias)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_logits_of_one_process(device: str, dtype: torch.dtype) -> None:
    check_lm_head(device, dtype, 131, 40, torch.float32, True)


def test_lm_head_of_a_large_vocabulary(workers: Workers) -> None:
    workers.run(check_lm_head, torch.float32, 262_145, 8, None, False)


def check_pruned_rows(device: str) -> None:
    problem = Problem.random(40, [131], torch.float32, device, False)
    layer = LoRALMHead.from_full(problem.linear, NUM_SLOTS, MAX_RANK, group=world())
    problem.load(layer)
    lens = [4, 1, 3, 2, 1]
    slots = [2, -1, 0, 3, 2]
    batch = LoRABatch(64, NUM_SLOTS, device)
    batch.update(slots, seg_lens=lens)
    whole = Problem(problem.linear, problem.module, problem.x[: sum(lens)])
    of_tokens = [s for s, n in zip(slots, lens, strict=True) for _ in range(n)]
    expected = whole.expected(slots=of_tokens)
    head = LoRABatch(64, NUM_SLOTS, device)

    def check(rows: list[int]) -> None:
        with layer.routing.using(batch, lm_head=head), torch.no_grad():
            logits = layer(whole.x[rows])
        assert_close(logits, Expected(expected.value[rows], expected.error[rows]))

    head.update(slots)  # the last token of each request
    check([sum(lens[: i + 1]) - 1 for i in range(len(lens))])
    rows = [8, 0, 5, 4, 1]  # any rows, by the slots that the device has
    head.update(batch.token_slots[torch.tensor(rows, device=device)])
    check(rows)
    head.update([0, 0, 3, 3], seg_lens=[1, 1, 1, 1])
    check([5, 6, 8, 9])

    with layer.routing.using(batch), torch.no_grad():
        assert_close(layer(whole.x), expected)  # all rows need no batch of their own
        with pytest.raises(ValueError, match="got 5 rows of a batch of 11 tokens: give the slots"):
            layer(whole.x[:5])


def test_pruned_rows_have_their_own_adapters(workers: Workers) -> None:
    workers.run(check_pruned_rows)


@on_devices
def test_pruned_rows_in_one_process(device: str) -> None:
    check_pruned_rows(device)

"""LoRABackend in an engine's life: replays, embeddings, added tokens, sharding, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from generators import NAN, generator, make_module, on_devices, randn
from lora_ext import LoRABackend, compat, reference
from lora_ext.backend import ForwardBatch, ForwardMode
from numerics import assert_same_bits
from test_backend import RANKS, Layer, captured
from test_on_device import no_synchronisation

NUM_SLOTS = len(RANKS)
VOCAB, NUM_EXTRA, EMBED = 50, 4, 24


# ---- replays


@on_devices
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_graph_holds_for_every_later_batch(device: str, phase: str) -> None:
    """Other adapters and ranks, none at all, fewer tokens, a slot reloaded in place, and back."""
    layer = Layer.random(16, [48, 16, 16], torch.bfloat16, device)
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(16, 1)
    backend.init_prefill_cuda_graph_batch_info(16)
    assert backend.prefill_cuda_graph_max_bs == backend.prefill_cuda_graph_max_tokens == 16
    flags = (True, False) if phase == "decode" else (False, True)

    def prepare(slots: list[int]) -> None:
        n = len(slots)
        batch = ForwardBatch.decode(n) if phase == "decode" else ForwardBatch.extend([1] * n)
        backend.prepare_lora_batch(batch, slots, *layer.table(), *flags)
        assert backend.batch_info is not None
        backend.batch_info.has_active_lora = False  # which a graph does not look at

    prepare([-1] * 16)
    replay = captured(lambda: layer.forward(backend), device)
    mixes = [[0] * 16, [1, 3, 0, -1] * 4, [-1] * 16, [3] * 5, [2] * 16, [], [4, 0] * 8]
    for slots in [*mixes, *reversed(mixes)]:
        prepare(slots)
        replay()
        layer.check(layer.y, slots)
    reloaded = make_module([16, 4, 8, 0, 2], 64, [48, 16, 16], torch.bfloat16, device, max_rank=16)
    weights = reloaded.weights("packed")
    layer.a.copy_(weights.lora_a[0])
    layer.b.copy_(weights.lora_b[0])
    layer.module = reloaded
    for slots in mixes:
        prepare(slots)
        replay()
        layer.check(layer.y, slots)


@on_devices
@torch.no_grad()
def test_a_layer_compiles_once_for_every_batch_and_number_of_tokens(device: str) -> None:
    """A graph break, or a read from the device, would fail: fullgraph."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    layer = Layer.random(20, [48, 24, 8], torch.bfloat16, device)
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(20, 1)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def forward(x: Tensor, base: Tensor) -> Tensor:
        return backend.forward_with_base(
            None, x, lambda: base * 1, layer.a, layer.b, None, layer.offsets
        )

    for slots in ([0] * 20, [1, 3, 0, -1] * 5, [-1] * 20, [3] * 7, [2, 1], []):
        batch = ForwardBatch.decode(len(slots))
        backend.prepare_lora_batch(batch, slots, *layer.table(), True)
        layer.check(forward(layer.x, layer.base), slots)
        part = Layer(layer.module, layer.x[:7], layer.base[:7])
        part.check(forward(part.x, part.base), slots[:7])
    assert counters["stats"]["unique_graphs"] == 1


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_beside_the_base_layer_or_behind_it(device: str, dtype: torch.dtype) -> None:
    """Whether the first half runs on a second stream; eager and captured."""
    layer = Layer.random(16, [48, 16, 16], dtype, device)
    results: list[Tensor] = []
    for overlap in (True, False):
        backend = layer.backend(overlap=overlap)
        backend.init_decode_cuda_graph_batch_info(16, 1)
        backend.prepare_lora_batch(ForwardBatch.decode(16), [-1] * 16, *layer.table(), True)
        replay = captured(lambda backend=backend: layer.forward(backend), device)
        for slots in ([1, 3, 0, -1] * 4, [2] * 16, [4] * 3):
            batch = ForwardBatch.decode(len(slots))
            backend.prepare_lora_batch(batch, slots, *layer.table(), True)
            replay()
            layer.check(layer.y, slots)
            graph = layer.y.clone()
            assert_same_bits(layer.forward(backend), graph)
            results.append(graph)
    for beside, behind in zip(results[:3], results[3:], strict=True):
        assert_same_bits(beside, behind)


@on_devices
def test_a_base_layer_that_fails_beside_the_shrink(device: str) -> None:
    layer = Layer.random(4, [24, 24], torch.bfloat16, device)
    backend = layer.backend(overlap=True)
    backend.prepare_lora_batch(ForwardBatch.decode(4), [0, 1, 3, 4], *layer.table(), False)

    def fails() -> Tensor:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            backend.forward_with_base(None, layer.x, fails, layer.a, layer.b, None, layer.offsets)
        layer.check(layer.forward(backend), [0, 1, 3, 4])


@on_devices
@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_beside_the_base_layer_compiled(device: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = Layer.random(20, [48, 24, 8], torch.bfloat16, device)
    lora = layer.backend(overlap=True)
    lora.init_decode_cuda_graph_batch_info(20, 1)
    weight = randn((80, 64), torch.bfloat16, device, generator("base"), 0.125)

    def forward(x: Tensor) -> Tensor:
        y = lora.forward_with_base(
            None, x, lambda: x @ weight.T, layer.a, layer.b, None, layer.offsets
        )
        return y * 2

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    for index, slots in enumerate(([0] * 20, [1, 3, 0, -1] * 5, [-1] * 20, [3] * 7)):
        lora.prepare_lora_batch(ForwardBatch.decode(len(slots)), slots, *layer.table(), True)
        for x in (layer.x, layer.x[:7]):
            with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
                assert_same_bits(compiled(x), forward(x))


@on_devices
def test_a_batch_without_adapters_changes_no_bit(device: str) -> None:
    layer = Layer.random(4, [24, 24], torch.bfloat16, device)
    backend = layer.backend()
    for slots in ([-1] * 4, [2] * 4):
        backend.prepare_lora_batch(ForwardBatch.decode(4), slots, *layer.table(), False)
        assert backend.batch_info is not None and not backend.batch_info.has_active_lora
        assert_same_bits(layer.forward(backend), layer.base)
    backend.reset_batch_state()
    assert backend.get_batch_info() is None
    assert_same_bits(layer.forward(backend), layer.base)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_a9_nothing_waits_for_the_device(overlap: bool) -> None:
    layer = Layer.random(12, [24, 24], torch.bfloat16, "cuda")
    table, extra = embedding_weights("cuda"), extra_rows("cuda", EMBED)
    ids, embedded = torch.arange(44, 56, device="cuda"), torch.zeros(12, EMBED, device="cuda")
    backend = layer.backend(logprobs_chunk_size=4, overlap=overlap)
    backend.is_moe_lora = True
    backend.init_decode_cuda_graph_batch_info(12, 1)
    ranks, scalings = layer.table()

    def step() -> None:
        for batch, in_graph in (
            (ForwardBatch.decode(12), False),
            (ForwardBatch.decode(12), True),
            (ForwardBatch.extend([1] * 12, logprob_starts=[0] * 12), False),
        ):
            backend.prepare_lora_batch(batch, [0, 1, -1] * 4, ranks, scalings, in_graph)
            layer.forward(backend)
            backend.run_lora_a_embedding(ids, table[0], VOCAB)
            backend.run_extra_token_embedding(ids, embedded, extra, VOCAB)

    step()
    with no_synchronisation():
        step()


# ---- batches


@on_devices
def test_token_segments(device: str) -> None:
    slots, lens = [0, 0, -1, 3, 1], [3, 2, 700, 0, 800]
    of_tokens = [slot for slot, n in zip(slots, lens, strict=True) for _ in range(n)]
    layer = Layer.random(sum(lens), [40], torch.float32, device)  # more than the first capacity
    backend = layer.backend()
    ranks, scalings = layer.table()
    backend.prepare_lora_token_segments(
        segment_lens=lens, weight_indices=slots, lora_ranks=ranks, scalings=scalings
    )
    info = backend.batch_info
    assert info is not None and (info.bs, info.num_segments, info.max_len) == (5, 3, 800)
    assert info.permutation is None and info.expected_tokens == 1505
    layer.check(layer.forward(backend), of_tokens)
    info.has_active_lora = False  # an engine may know better
    info.is_prefill = True
    assert_same_bits(layer.forward(backend), layer.base)


@on_devices
def test_b1_slot_minus_one_in_the_routing_of_moe_layers(device: str) -> None:
    backend = LoRABackend(3, device)
    backend.is_moe_lora = True
    backend.init_decode_cuda_graph_batch_info(4, 1)
    for slots, want, enabled in (
        ([-1, 2, -1], [-1, 2, -1], [0, 0, 1]),
        ([-1, -1, -1, -1], [-1] * 4, [0, 0, 0]),
        ([0, 1], [0, -1], [1, 0, 0]),
        ([], [], [0, 0, 0]),
    ):
        batch = ForwardBatch.decode(len(slots))
        backend.prepare_lora_batch(batch, slots, [4, 0, 8], [1.0, 1.0, 1.0], True)
        assert backend.batch_info is not None
        moe = backend.batch_info.moe_lora_info
        assert moe is not None and moe.adapter_enabled.tolist() == enabled
        assert moe.token_lora_mapping.tolist() == want + [-1] * (64 - len(want))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_indices": [0, 5]}, r"slots\[1\] is 5"),
        ({"weight_indices": [0]}, "got 1 weight_indices for 2 requests"),
        ({"lora_ranks": [1] * 4}, "got 4 lora_ranks and 5 scalings"),
        ({"lora_ranks": [1, 1, 1, 1, -1]}, "lora_ranks must be from 0"),
        ({"forward_batch": ForwardBatch.extend([1, -1])}, "segment 1 has -1 tokens"),
        ({"forward_batch": ForwardBatch.extend([3, 1], logprob_starts=[0, 2])}, "logprobs start"),
        ({"forward_batch": ForwardBatch(2, ForwardMode.EXTEND)}, "without extend_seq_lens_cpu"),
        ({"forward_batch": ForwardBatch(2, ForwardMode.TARGET_VERIFY)}, "draft_token_num"),
    ],
)
@pytest.mark.parametrize("use_decode_cuda_graph", [False, True])
@on_devices
def test_wrong_input_leaves_the_batch(
    device: str, use_decode_cuda_graph: bool, arguments: dict[str, Any], message: str
) -> None:
    layer = Layer.random(2, [40], torch.float32, device)
    ranks, scalings = layer.table()
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(4, 2)
    right: dict[str, Any] = {
        "forward_batch": ForwardBatch.decode(2),
        "weight_indices": [3, 1],
        "lora_ranks": ranks,
        "scalings": scalings,
        "use_decode_cuda_graph": use_decode_cuda_graph,
    }
    backend.prepare_lora_batch(**right)
    info = backend.batch_info
    with pytest.raises(ValueError, match=message):
        backend.prepare_lora_batch(**{**right, "scalings": [9.0] * NUM_SLOTS, **arguments})
    assert backend.batch_info is info
    layer.check(layer.forward(backend), [3, 1])


def test_what_is_missing_is_said() -> None:
    layer = Layer.random(2, [40], torch.float32, "cpu")
    backend = layer.backend()
    with pytest.raises(RuntimeError, match="call prepare_lora_batch"):
        backend.run_lora_a_sgemm(layer.x, layer.a)
    with pytest.raises(RuntimeError, match="call init_prefill_cuda_graph_batch_info"):
        backend.prepare_lora_batch(ForwardBatch.decode(2), [0, 1], *layer.table(), False, True)
    with pytest.raises(NotImplementedError, match="layers of sink_down"):
        layer.forward(backend, kind="sink_down")
    with pytest.raises(NotImplementedError, match="DP attention"):
        backend.prepare_global_lora_batch(None)


# ---- embeddings and added tokens


def embedding_weights(device: str, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """A [L, R, vocab] and B [L, EMBED, R] with NaN behind each slot's rank, and base rows."""
    gen = generator("embedding")
    a = randn((NUM_SLOTS, 16, vocab), torch.float32, device, gen)
    b = randn((NUM_SLOTS, EMBED, 16), torch.float32, device, gen)
    for slot, rank in enumerate(RANKS):
        a[slot, rank:], b[slot, :, rank:] = NAN, NAN
    return a, b, randn((vocab, EMBED), torch.float32, device, gen)


def extra_rows(device: str, width: int) -> Tensor:
    return randn((NUM_SLOTS, NUM_EXTRA, width), torch.float32, device, generator("extra", width))


@on_devices
@pytest.mark.parametrize("added", ["none", "columns", "values", "rows"])
def test_b13_embedding_with_ids_beyond_the_vocabulary(device: str, added: str) -> None:
    """Added tokens as further columns of A, as values of their own, as rows that replace.

    The latter two count although A has further columns.
    """
    a, b, base = embedding_weights(device, VOCAB if added == "none" else VOCAB + NUM_EXTRA)
    extra = {"values": extra_rows(device, 16), "rows": extra_rows(device, EMBED)}.get(added)
    ids = torch.tensor([0, 49, 50, 53, 50, 54, 1000, 51, 52, 7], device=device)
    slots = [0, 1, 1, 3, -1, 1, 0, 2, 4, 4]
    ranks, scalings = RANKS, [0.5, 2.0, 1.0, 1.5, 0.25]
    backend = LoRABackend(NUM_SLOTS, device)
    backend.init_decode_cuda_graph_batch_info(10, 1)
    layer = SimpleNamespace(vocab_size=VOCAB, new_embeddings_buffer=extra)
    before = base[ids.clamp(max=VOCAB - 1)]
    y = before.clone()
    decode = ForwardBatch.decode(10)
    backend.prepare_lora_batch(decode, [-1] * 10, ranks, scalings, True)
    replay = captured(
        lambda: backend.forward_with_base(
            layer, ids, lambda: y.copy_(before), a, b, None, [0, EMBED], kind="embedding"
        ),
        device,
    )
    backend.prepare_lora_batch(decode, slots, ranks, scalings, True)
    replay()

    want = before.clone()
    for t, (token, slot) in enumerate(zip(ids.tolist(), slots, strict=True)):
        rank = ranks[slot] if slot >= 0 else 0
        is_added = VOCAB <= token < VOCAB + NUM_EXTRA
        if rank == 0:
            continue
        if token < VOCAB or (is_added and added == "columns"):
            column = a[slot, :rank, token]
        elif is_added and added == "values":
            column = extra[slot, token - VOCAB, :rank]
            extra[slot, :, rank:] = NAN
        elif is_added and added == "rows":
            want[t] = extra[slot, token - VOCAB]
            continue
        else:
            continue
        want[t] += scalings[slot] * b[slot, :, :rank] @ column
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert_same_bits(y[[4, 5, 6, 7]], before[[4, 5, 6, 7]])

    if added != "rows":  # the two steps that layers of an engine may take
        xa = backend.run_lora_a_embedding(ids, a, VOCAB, extra)
        assert xa.dtype == torch.float32 and xa.shape == (10, 16)
        in_steps = backend.run_lora_b_sgemm(xa, b, base_output=before.clone())
        torch.testing.assert_close(in_steps, want, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="run_extra_token_embedding"):
            backend.run_lora_a_embedding(ids, a, VOCAB, extra)


# ---- sharding, slices that cover a part, other dtypes


@on_devices
def test_a_row_parallel_layer_reduces_once(device: str) -> None:
    """Two shards of the input features: the sum of their outputs is that of the whole layer."""
    slots = [0, 1, -1, 3, 4]
    layer = Layer.random(5, [40], torch.float32, device)
    weight = randn((40, 64), torch.float32, device, generator("weight"))
    backend = layer.backend()
    backend.prepare_lora_batch(ForwardBatch.decode(5), slots, *layer.table(), False)
    shards, calls = [], []
    for columns in (slice(0, 32), slice(32, 64)):
        x = layer.x[:, columns].contiguous()
        partial = backend.forward_with_base(
            None,
            x,
            lambda x=x, columns=columns: x @ weight[:, columns].T,
            layer.a[:, :, columns].contiguous(),
            layer.b,
            None,
            [0, 40],
            all_reduce=lambda t: calls.append(t) or t,
        )
        shards.append(partial)
    assert len(calls) == 2 and calls[0] is shards[0]
    whole = backend.forward_with_base(
        None, layer.x, lambda: layer.x @ weight.T, layer.a, layer.b, None, [0, 40]
    )
    torch.testing.assert_close(shards[0] + shards[1], whole, rtol=1e-5, atol=1e-4)
    backend.reset_batch_state()
    backend.forward_with_base(
        None, layer.x, lambda: layer.base, layer.a, layer.b, None, [0, 40], all_reduce=calls.append
    )
    assert len(calls) == 3


@on_devices
def test_adapters_of_the_first_partitions_only(device: str) -> None:
    """Five partitions of which two have adapters, as a Mamba's in_proj; y of another dtype."""
    slots = [0, 1, -1, 3]
    layer = Layer.random(4, [24, 16], torch.bfloat16, device)
    layer.offsets = [0, 24, 40, 48, 56, 64]
    layer.base = randn((4, 64), torch.float32, device, generator("wide"))
    layer.y = layer.base.clone()
    layer.check(layer.eager(ForwardBatch.decode(4), slots), slots)
    assert_same_bits(layer.y[:, 40:], layer.base[:, 40:])


@on_devices
def test_without_base_output_there_is_the_delta(device: str) -> None:
    slots = [0, 1, -1, 3]
    layer = Layer.random(4, [24, 24], torch.bfloat16, device)
    backend = layer.backend()
    backend.prepare_lora_batch(ForwardBatch.decode(4), slots, *layer.table(), False)
    layer.base = torch.zeros_like(layer.base)
    layer.check(backend.run_gate_up_lora(layer.x, layer.a, layer.b), slots)
    xa = backend.run_lora_a_sgemm(layer.x.float(), layer.a, stack_num=2)  # x in another dtype
    layer.check(backend.run_lora_b_sgemm(xa, layer.b, output_offset_cpu=layer.offsets), slots)
    assert not layer.y.equal(layer.base)


# ---- the functions of SGLang's torch-native backend


@on_devices
def test_the_functions_of_the_torch_native_backend(device: str) -> None:
    slots, lens = [0, 1, -1, 3, 2], [3, 1, 2, 4, 1]
    layer = Layer.random(11, [24, 16], torch.float32, device)
    ranks, scalings = layer.table()
    backend = layer.backend()
    backend.prepare_lora_batch(ForwardBatch.extend(lens), slots, ranks, scalings, False)
    info = backend.batch_info
    assert info is not None
    xa = compat.sgemm_lora_a_fwd(layer.x, layer.a, info, num_slices=2)
    wanted = reference.segmented_shrink(layer.x, layer.a, lens, slots, ranks, scalings, 2)
    torch.testing.assert_close(xa, wanted, rtol=1e-5, atol=1e-5)
    y = compat.sgemm_lora_b_fwd(xa, layer.b, info, layer.offsets, layer.base.clone())
    wanted = reference.segmented_expand(layer.base, wanted, layer.b, lens, slots, ranks, [24, 16])
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    ids = torch.arange(40, 51, device=device)
    table = embedding_weights(device)[0]
    got = compat.sgemm_lora_a_embedding_fwd(ids, table, info, VOCAB)
    of_tokens = info.token_slots[:11].cpu()
    wanted = reference.embedding(
        ids.cpu(), table.cpu(), info.lora_ranks.cpu(), info.scalings.cpu(), of_tokens
    )
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_pool_of_rank_zero_adds_nothing() -> None:
    layer = Layer.random(3, [24, 24], torch.float32, "cpu")
    backend = layer.backend()
    backend.prepare_lora_batch(ForwardBatch.decode(3), [0, 1, 3], *layer.table(), False)
    layer.a, layer.b = layer.a[:, :0], layer.b[:, :, :0]
    assert_same_bits(layer.forward(backend), layer.base)
    xa = backend.run_lora_a_sgemm(layer.x, layer.a, stack_num=2)
    assert xa.shape == (3, 0)
    assert_same_bits(
        backend.run_lora_b_sgemm(xa, layer.b, base_output=layer.base.clone()), layer.base
    )

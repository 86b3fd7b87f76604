"""LoRABackend where other engines' backends go wrong: eager and captured, by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from generators import NAN, Module, generator, make_module, on_devices, randn
from lora_ext import LoRABackend
from lora_ext.backend import ForwardBatch
from numerics import assert_close, assert_same_bits, expected_expand, expected_shrink
from test_on_device import capture

RANKS = [3, 16, 0, 8, 1]  # max_rank is 16: every slot but one is packed more tightly
SLICES = [[40], [24, 24], [48, 16, 16], [8, 32, 16, 24]]
HALF_AND_FP32 = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


class Layer:
    """A stacked layer's pool, the base output of a batch, and the calls of an engine's layer."""

    def __init__(self, module: Module, x: Tensor, base: Tensor) -> None:
        weights = module.weights("packed")
        self.module, self.x, self.base = module, x, base
        self.a, self.b = weights.lora_a[0], weights.lora_b[0]
        self.offsets = [0, *accumulate(module.output_slices)]
        self.y = base.clone()

    @classmethod
    def random(
        cls,
        num_tokens: int,
        slices: Sequence[int],
        dtype: torch.dtype,
        device: str,
        ranks: Sequence[int] = RANKS,
    ) -> Layer:
        module = make_module(ranks, 64, slices, dtype, device, max_rank=16)
        gen = generator("layer", num_tokens, slices)
        x = randn((num_tokens, 64), dtype, device, gen)
        return cls(module, x, randn((num_tokens, sum(slices)), dtype, device, gen))

    def backend(self, **options: object) -> LoRABackend:
        return LoRABackend(self.module.num_slots, self.x.device, **options)  # type: ignore[arg-type]

    def table(self) -> tuple[list[int], list[float]]:
        """lora_ranks and scalings, as an engine has them."""
        return self.module.ranks.tolist(), self.module.scalings.tolist()

    def forward(self, backend: LoRABackend, **options: object) -> Tensor:
        return backend.forward_with_base(
            None, self.x, self._base_output, self.a, self.b, None, self.offsets, **options
        )

    def _base_output(self) -> Tensor:
        return self.y.copy_(self.base)

    def eager(self, batch: ForwardBatch, slots: Sequence[int]) -> Tensor:
        """A new backend's result."""
        backend = self.backend()
        backend.prepare_lora_batch(batch, slots, *self.table(), False)
        return self.forward(backend).clone()

    def check(self, y: Tensor, token_slots: Sequence[int]) -> None:
        """Compare with the fp64 oracle; what has no adapter keeps its bits."""
        slots = [*token_slots, *[-1] * (len(y) - len(token_slots))]
        m, of_token = self.module, torch.tensor(slots, dtype=torch.int32, device=y.device)
        xa = expected_shrink(
            self.x, [self.a], m.ranks, m.scalings, of_token, m.num_slices, m.max_rank
        )
        want = expected_expand(self.base, xa, [self.b], m.ranks, of_token, m.output_slices)
        assert_close(y, want)
        idle = [t for t, slot in enumerate(slots) if slot < 0 or int(m.ranks[slot]) == 0]
        assert_same_bits(y[idle], self.base[idle])


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A CUDA graph's replay; on the CPU, where there is no graph, the call itself."""
    return call if device == "cpu" else capture(call).replay


@on_devices
@HALF_AND_FP32
@pytest.mark.parametrize("slices", SLICES, ids=str)
def test_a1_stacked_slices_of_mixed_ranks_are_the_same_eagerly_and_captured(
    device: str, dtype: torch.dtype, slices: list[int]
) -> None:
    slots = [0, 1, 3, 4, 2, -1, 0, 3]
    layer = Layer.random(len(slots), slices, dtype, device)
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(len(slots), 1)
    backend.prepare_lora_batch(ForwardBatch.decode(8), [-1] * 8, *layer.table(), True)
    replay = captured(lambda: layer.forward(backend), device)
    backend.prepare_lora_batch(ForwardBatch.decode(8), slots, *layer.table(), True)
    replay()
    layer.check(layer.y, slots)
    graph = layer.y.clone()
    assert_same_bits(graph, layer.eager(ForwardBatch.decode(8), slots))

    offsets = torch.tensor(layer.offsets, dtype=torch.int32)
    stacked = backend.run_qkv_lora(
        layer.x,
        layer.a,
        layer.b,
        offsets.to(device),
        offsets,
        max(slices),
        base_output=layer.base.clone(),
        n_slices=len(slices),
    )
    assert_same_bits(stacked, graph)
    xa = backend.run_lora_a_sgemm(layer.x, layer.a, stack_num=len(slices))
    assert xa.dtype == torch.float32 and xa.shape == (8, len(slices) * 16)
    layer.check(
        backend.run_lora_b_sgemm(xa, layer.b, None, offsets, base_output=layer.base.clone()), slots
    )


@on_devices
def test_a2_a_reused_slot_leaks_nothing_of_the_adapter_before(device: str) -> None:
    layer = Layer.random(6, [48, 16, 16], torch.bfloat16, device)
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(6, 1)
    decode, slots = ForwardBatch.decode(6), [1] * 6
    backend.prepare_lora_batch(decode, slots, *layer.table(), True)
    replay = captured(lambda: layer.forward(backend), device)
    replay()
    before = layer.y.clone()

    smaller = make_module([3, 2, 0, 8, 1], 64, [48, 16, 16], torch.bfloat16, device, max_rank=16)
    new = smaller.weights("packed")  # written as a pool does: the first rows, the old tail stays
    layer.a[1, :6] = new.lora_a[0][1, :6]
    layer.b[1, :, :2] = new.lora_b[0][1, :, :2]
    layer.module = smaller
    backend.prepare_lora_batch(decode, slots, *layer.table(), True)
    replay()
    layer.check(layer.y, slots)
    assert not torch.equal(layer.y, before)
    reused = layer.y.clone()
    layer.a, layer.b = new.lora_a[0], new.lora_b[0]
    assert_same_bits(reused, layer.eager(decode, slots))


@on_devices
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_a3_nan_and_inf_of_one_adapter_stay_in_its_rows(device: str, poison: float) -> None:
    for slots in ([0, 3, -1, 4, 2, 0], [0, 3, 1, 4, -1, 1]):  # slot 1 unused, and used
        layer = Layer.random(6, [24, 24], torch.bfloat16, device)
        clean = layer.eager(ForwardBatch.decode(6), slots)
        layer.a[1], layer.b[1] = poison, poison
        backend = layer.backend()
        backend.init_decode_cuda_graph_batch_info(6, 1)
        backend.prepare_lora_batch(ForwardBatch.decode(6), slots, *layer.table(), True)
        captured(lambda: layer.forward(backend), device)()  # noqa: B023
        others = [t for t, slot in enumerate(slots) if slot != 1]
        assert_same_bits(layer.y[others], clean[others])
        assert layer.y[slots.index(1)].isnan().all() if 1 in slots else layer.y.isfinite().all()


@on_devices
@pytest.mark.parametrize("in_graph", [False, True])
def test_a4_lm_head_on_pruned_rows_uses_their_adapters(device: str, in_graph: bool) -> None:
    slots, lens = [0, 1, -1, 3], [5, 2, 4, 1]
    layer = Layer.random(4, [80], torch.bfloat16, device)
    backend = layer.backend()
    backend.init_prefill_cuda_graph_batch_info(64, 8)
    prefill, others = ForwardBatch.extend(lens), ([1] * len(RANKS), [9.0] * len(RANKS))
    backend.prepare_lora_batch(prefill, slots[::-1], *others, False, not in_graph)
    backend.prepare_lora_batch(prefill, slots, *layer.table(), False, in_graph)
    info = backend.lm_head_batch_info
    assert info is not None and info.expected_tokens == 4 and not info.use_cuda_graph
    layer.check(layer.forward(backend, kind="lm_head", pruned_batch_info=info), slots)
    xa = backend.run_lora_a_sgemm(layer.x, layer.a, pruned_batch_info=info)
    y = backend.run_lora_b_sgemm(
        xa, layer.b, base_output=layer.base.clone(), pruned_batch_info=info
    )
    layer.check(y, slots)
    if not in_graph:  # rows are missing, and nobody said which
        with pytest.raises(ValueError, match="x has 4 rows, the batch has 12"):
            layer.forward(backend)


@on_devices
def test_a4_logprobs_of_prompts_in_several_passes(device: str) -> None:
    slots, lens, starts = [3, 0, 1], [6, 3, 5], [2, 3, 0]
    of_rows = [3] * 4 + [0] * 1 + [1] * 5
    layer = Layer.random(10, [80], torch.float32, device)
    backend = layer.backend(logprobs_chunk_size=4)
    batch = ForwardBatch.extend(lens, logprob_starts=starts)
    backend.prepare_lora_batch(batch, slots, *layer.table(), False)
    assert backend.lm_head_batch_info is not None
    layer.check(layer.forward(backend, pruned_batch_info=backend.lm_head_batch_info), of_rows)
    passes = backend.lm_head_pass_batch_infos
    assert passes is not None and [info.expected_tokens for info in passes] == [4, 4, 2]
    for first, info in zip((0, 4, 8), passes, strict=True):
        rows = slice(first, first + info.expected_tokens)
        part = Layer(layer.module, layer.x[rows], layer.base[rows])
        part.check(part.forward(backend, pruned_batch_info=info), of_rows[rows])
    backend.prepare_lora_batch(ForwardBatch.decode(3), slots, *layer.table(), False)
    assert backend.lm_head_batch_info is None and backend.lm_head_pass_batch_infos is None


@on_devices
def test_a5_graphs_are_sized_by_tokens(device: str) -> None:
    """Several tokens for each request, as speculative decoding has them: uniform and ragged."""
    layer = Layer.random(20, [40], torch.bfloat16, device)
    backend = layer.backend()
    backend.init_decode_cuda_graph_batch_info(5, 4)
    batches: list[tuple[ForwardBatch, list[int], list[int]]] = [
        (ForwardBatch.verify(5, 4), [0, 1, -1, 3, 3], [4] * 5),
        (ForwardBatch.verify(2, 4), [3, 0], [4] * 2),
        (ForwardBatch.extend([4, 1, 3, 2, 4], all_logits=True), [1, 0, 0, 2, 3], [4, 1, 3, 2, 4]),
        (ForwardBatch.decode(5), [4, 3, 2, 1, 0], [1] * 5),
        (ForwardBatch.extend([20], all_logits=True), [1], [20]),
    ]
    backend.prepare_lora_batch(ForwardBatch.verify(5, 4), [-1] * 5, *layer.table(), True)
    info = backend.batch_info
    assert info is not None and (info.bs, info.num_segments, info.max_len) == (5, 5, 20)
    addresses = [t.data_ptr() for t in (info.plan, info.lora_ranks, info.scalings)]
    replay = captured(lambda: layer.forward(backend), device)
    for batch, slots, lens in batches:
        backend.prepare_lora_batch(batch, slots, *layer.table(), True)
        assert backend.batch_info is info
        assert [t.data_ptr() for t in (info.plan, info.lora_ranks, info.scalings)] == addresses
        of_tokens = [slot for slot, n in zip(slots, lens, strict=True) for _ in range(n)]
        assert info.token_slots.tolist() == of_tokens + [-1] * (64 - len(of_tokens))
        replay()
        layer.check(layer.y, of_tokens)
    for batch, slots, message in (
        (ForwardBatch.verify(5, 5), [0] * 5, "25 tokens, max_tokens is 20"),
        (ForwardBatch.decode(6), [0] * 6, "6 requests, the graph's batch info 5"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.prepare_lora_batch(batch, slots, *layer.table(), True)


@on_devices
def test_a6_offsets_on_the_host_are_needed_for_several_slices_only(device: str) -> None:
    layer = Layer.random(3, [40], torch.bfloat16, device)
    backend = layer.backend()
    backend.prepare_lora_batch(ForwardBatch.decode(3), [0, 1, 3], *layer.table(), False)
    xa = backend.run_lora_a_sgemm(layer.x, layer.a)
    elsewhere = torch.empty(2, dtype=torch.int32, device="meta")
    for offsets in ({}, {"output_offset": elsewhere}):
        y = backend.run_lora_b_sgemm(
            x=xa, weights=layer.b, base_output=layer.base.clone(), **offsets
        )
        layer.check(y, [0, 1, 3])
    layer = Layer.random(3, [24, 24], torch.bfloat16, device)
    backend.prepare_lora_batch(ForwardBatch.decode(3), [0, 1, 3], *layer.table(), False)
    xa = backend.run_lora_a_sgemm(layer.x, layer.a, stack_num=2)
    with pytest.raises(ValueError, match="2 slices must be known on the host"):
        backend.run_lora_b_sgemm(xa, layer.b, elsewhere, base_output=layer.y)
    assert_same_bits(layer.y, layer.base)
    y = backend.run_gate_up_lora(layer.x, layer.a, layer.b, elsewhere, base_output=layer.y)
    assert y is layer.y
    layer.check(y, [0, 1, 3])


@on_devices
@pytest.mark.parametrize("use_cuda_graph", [False, True])
def test_a7_merged_segments_cover_every_token(device: str, use_cuda_graph: bool) -> None:
    for slots in ([0] * 300, [0] * 300 + [1] * 100, [0] * 300 + [2] * 50 + [-1] * 50):
        layer = Layer.random(len(slots), [40], torch.bfloat16, device)
        backend = layer.backend()
        backend.is_moe_lora = True
        backend.init_decode_cuda_graph_batch_info(400, 1)
        batch = ForwardBatch.decode(len(slots))
        backend.prepare_lora_batch(batch, slots, *layer.table(), use_cuda_graph)
        info = backend.batch_info
        assert info is not None and info.moe_lora_info is not None
        layer.check(layer.forward(backend), slots)

        merged = len(set(slots))
        assert info.seg_lens[: merged + 1].tolist() == [
            *(slots.count(slot) for slot in dict.fromkeys(slots)),
            0,
        ]
        assert info.weight_indices[:merged].tolist() == list(dict.fromkeys(slots))
        if not use_cuda_graph:
            assert (info.bs, info.num_segments, info.max_len) == (len(slots), merged, 300)
        # Slots without an adapter and padding count as none: the map has no entry left out.
        mapping = info.moe_lora_info.token_lora_mapping.tolist()
        want = [slot if slot in (0, 1) else -1 for slot in slots]
        assert mapping == want + [-1] * (len(mapping) - len(want))
        enabled = info.moe_lora_info.adapter_enabled.tolist()
        assert enabled == [int(slot in want) for slot in range(len(RANKS))]


@on_devices
def test_a8_the_result_is_rounded_once(device: str) -> None:
    """A backend that rounds the product, its scaled value and the sum misses the error model."""
    slots = [0, 1, 3, 4] * 16
    layer = Layer.random(64, [40], torch.bfloat16, device)
    y = layer.eager(ForwardBatch.decode(64), slots)
    layer.check(y, slots)
    rounded_often = layer.base.clone()
    for t, slot in enumerate(slots):
        rank, scaling = int(layer.module.ranks[slot]), float(layer.module.scalings[slot])
        xa = (layer.x[t] @ layer.a[slot, :rank].T) * scaling
        rounded_often[t] += layer.b[slot, :, :rank] @ xa
    with pytest.raises(AssertionError, match="elements are off"):
        layer.check(rounded_often, slots)

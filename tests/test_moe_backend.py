"""LoRABackend's MoE side: buffers, routing of the batch, hooks for an engine's MoE layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from generators import NAN, generator, on_devices, randn
from lora_ext import LoRABackend, ops
from lora_ext.backend import ExpertLoRA, ForwardBatch, LoRAHooks, MoEBuffers, build_lora_hooks
from moe_problems import MoeModule, expected, make_moe, random_ids, route
from numerics import assert_close, assert_same_bits
from test_backend import captured

E, TOP_K, HIDDEN, WIDTH = 6, 2, 40, 24
RANKS, MAX_RANK = [3, 8, 0, 1], 8
ENGINE_LAYER = SimpleNamespace(base_layer=SimpleNamespace(top_k=TOP_K, num_experts=E))
MIXES = [[0] * 12, [1, 3, 0, -1] * 3, [-1] * 12, [3] * 5, [2] * 12, [], [0, 1] * 4]


def adapters_of(module: MoeModule) -> ExpertLoRA:
    weights = module.weights()
    slices = module.output_slices
    return ExpertLoRA(*weights, module.ranks, module.scalings, slices, module.max_rank)


@dataclass
class Layer:
    """Adapters of gate and up, and of down; inputs and base outputs of a batch."""

    gate_up: MoeModule
    down: MoeModule
    ids: Tensor
    weights: Tensor
    x: tuple[Tensor, Tensor]
    base: tuple[Tensor, Tensor]
    y: tuple[Tensor, Tensor]

    @classmethod
    def random(
        cls, num_tokens: int, device: str, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> Layer:
        gen = generator("moe layer", num_tokens)
        common = {"max_rank": MAX_RANK, **options}
        gate_up = make_moe(RANKS, E, HIDDEN, [WIDTH, WIDTH], dtype, device, **common)
        down = make_moe(RANKS, E, WIDTH, [HIDDEN], dtype, device, **common)
        base = tuple(randn((num_tokens, TOP_K, n), dtype, device, gen) for n in (2 * WIDTH, HIDDEN))
        x = tuple(
            randn(shape, dtype, device, gen)
            for shape in ((num_tokens, HIDDEN), (num_tokens * TOP_K, WIDTH))
        )
        return cls(
            gate_up,
            down,
            random_ids(num_tokens, TOP_K, E, gen, missing=0.1).to(device),
            torch.rand(num_tokens, TOP_K, generator=gen).to(device),
            x,
            base,
            tuple(values.clone() for values in base),
        )

    def table(self) -> tuple[list[int], list[float]]:
        return self.gate_up.ranks.tolist(), self.gate_up.scalings.tolist()

    def forward(self, hooks: LoRAHooks) -> None:
        """What an engine does: the base outputs, and the hooks behind each."""
        for y, base in zip(self.y, self.base, strict=True):
            y.copy_(base)
        for hook, x, y in zip(hooks, self.x, self.y, strict=True):
            if hook is not None:
                hook(x, y, self.weights, self.ids)

    @cached_property
    def lora(self) -> tuple[ExpertLoRA, ExpertLoRA]:
        return adapters_of(self.gate_up), adapters_of(self.down)

    def run(self, backend: LoRABackend) -> None:
        self.forward(backend.moe_hooks(*self.lora, self.ids, num_experts=E))

    def check(self, slots: Sequence[int]) -> None:
        """Compare with the fp64 oracle; what has no adapter keeps its bits."""
        slots = [*slots, *[-1] * (len(self.ids) - len(slots))]
        for i, module in enumerate((self.gate_up, self.down)):
            batch = route(self.ids, slots, module, self.ids.device)
            weights = self.weights if module is self.down else None
            base, got = self.base[i].flatten(0, 1), self.y[i].flatten(0, 1)
            want = expected(base, self.x[i], module, module.weights(), batch, topk_weights=weights)
            assert_close(got.cpu(), want)
            idle = want.error == 0
            assert_same_bits(got.cpu()[idle], base.cpu()[idle])


def moe_backend(device: str) -> LoRABackend:
    backend = LoRABackend(len(RANKS), device)
    backend.is_moe_lora = True
    return backend


@on_devices
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("has_buffers", [True, False], ids=["buffers", "without"])
def test_a_graph_holds_for_every_later_batch(device: str, phase: str, has_buffers: bool) -> None:
    """Other adapters, none at all, fewer tokens, another routing, and back."""
    layer = Layer.random(12, device)
    backend = moe_backend(device)
    in_prefill = phase == "prefill"
    if has_buffers:
        backend.init_cuda_graph_moe_buffers(
            12, len(RANKS), torch.bfloat16, ENGINE_LAYER, prefill=in_prefill
        )
    backend.init_decode_cuda_graph_batch_info(12, 1)
    backend.init_prefill_cuda_graph_batch_info(12)
    flags = (False, True) if in_prefill else (True, False)

    def prepare(slots: Sequence[int]) -> None:
        n = len(slots)
        batch = ForwardBatch.extend([1] * n) if in_prefill else ForwardBatch.decode(n)
        backend.prepare_lora_batch(batch, slots, *layer.table(), *flags)

    prepare([-1] * 12)
    replay = captured(lambda: layer.run(backend), device)
    for seed, slots in enumerate([*MIXES, *reversed(MIXES)]):
        gen = generator("other routing", seed)
        layer.ids.copy_(random_ids(12, TOP_K, E, gen, missing=0.1))
        prepare(slots)
        replay()
        layer.check(slots)
    graph = [y.clone() for y in layer.y]
    eager = moe_backend(device)
    eager.prepare_lora_batch(ForwardBatch.decode(12), MIXES[0], *layer.table(), False)
    layer.run(eager)
    assert all(map(torch.equal, graph, layer.y))


@on_devices
def test_more_tokens_than_requests(device: str) -> None:
    layer = Layer.random(15, device)
    backend = moe_backend(device)
    backend.init_cuda_graph_moe_buffers(15, len(RANKS), torch.bfloat16, ENGINE_LAYER)
    backend.init_decode_cuda_graph_batch_info(5, 3)
    for in_graph in (True, False):
        batch = ForwardBatch.verify(5, 3)
        backend.prepare_lora_batch(batch, [1, -1, 0, 1, 3], *layer.table(), in_graph)
        layer.run(backend)
        layer.check([slot for slot in [1, -1, 0, 1, 3] for _ in range(3)])


@on_devices
def test_merged_requests_leave_no_token_out(device: str) -> None:
    """300 decodes of one adapter, and 300 + 100: they are one and two segments."""
    backend = moe_backend(device)
    for slots in ([1] * 300, [0] * 300 + [1] * 100):
        backend.prepare_lora_batch(ForwardBatch.decode(len(slots)), slots, RANKS, [1.0] * 4, False)
        info = backend.batch_info
        assert info is not None and info.moe_lora_info is not None
        assert info.moe_lora_info.token_lora_mapping[: len(slots)].tolist() == slots


@on_devices
def test_flags_and_mapping_are_refreshed_in_place(device: str) -> None:
    backend = moe_backend(device)
    backend.init_cuda_graph_moe_buffers(8, len(RANKS), torch.bfloat16, ENGINE_LAYER)
    backend.init_decode_cuda_graph_batch_info(8, 1)
    buffers = backend.moe_cg_buffers
    before = {name: buffers[name].data_ptr() for name in ("adapter_enabled", "token_lora_mapping")}
    for slots, enabled, active in (
        ([0, 0, 1, -1], [1, 1, 0, 0], True),
        ([2, -1], [0, 0, 0, 0], False),
        ([], [0, 0, 0, 0], False),
        ([3] * 8, [0, 0, 0, 1], True),
    ):
        batch = ForwardBatch.decode(len(slots))
        backend.prepare_lora_batch(batch, slots, RANKS, [1.0] * 4, True)
        info = backend.batch_info
        assert info is not None and info.moe_lora_info is not None
        moe = info.moe_lora_info
        assert moe.adapter_enabled.tolist() == enabled and info.has_active_lora == active
        with_adapter = [slot if RANKS[slot] and slot >= 0 else -1 for slot in slots]
        assert moe.token_lora_mapping.tolist() == with_adapter + [-1] * (8 - len(slots))
        assert moe.adapter_enabled.data_ptr() == before["adapter_enabled"]
        assert moe.token_lora_mapping.data_ptr() == before["token_lora_mapping"]


def test_without_an_active_adapter_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer.random(4, "cpu")
    backend = moe_backend("cpu")
    calls: list[str] = []
    for name in ("moe_lora_align", "moe_lora_apply_"):
        original = getattr(ops, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            calls.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(ops, name, counted)
    decode = ForwardBatch.decode(4)
    for slots in ([-1] * 4, [2] * 4):
        backend.prepare_lora_batch(decode, slots, *layer.table(), False)
        layer.run(backend)
        assert all(map(torch.equal, layer.y, layer.base))
    backend.reset_batch_state()
    layer.run(backend)
    assert not calls
    backend.prepare_lora_batch(decode, [0, -1, 1, 0], *layer.table(), False)
    layer.run(backend)
    assert calls == ["moe_lora_align", "moe_lora_apply_", "moe_lora_apply_"]
    down = adapters_of(layer.down)
    hooks = backend.moe_hooks(None, down, layer.ids, num_experts=E)
    assert hooks.after_gate_up is None and hooks.after_down is not None
    calls.clear()
    assert backend.moe_hooks(None, None, layer.ids, num_experts=E) == LoRAHooks() and not calls


def test_hooks_without_moe_layers_are_refused() -> None:
    layer = Layer.random(4, "cpu")
    backend = LoRABackend(len(RANKS), "cpu")
    backend.prepare_lora_batch(ForwardBatch.decode(4), [0] * 4, *layer.table(), False)
    with pytest.raises(RuntimeError, match="set is_moe_lora first"):
        layer.run(backend)


@on_devices
def test_expert_parallel_maps(device: str) -> None:
    """Global ids, of which this process has every other one: the others' choices are left out."""
    layer = Layer.random(12, device)
    global_ids = layer.ids * 2 + 1
    expert_map = torch.tensor([i // 2 if i % 2 else -1 for i in range(2 * E)], dtype=torch.int32)
    missing = layer.ids < 0
    global_ids[missing] = 4  # an expert of another process
    backend = moe_backend(device)
    backend.prepare_lora_batch(ForwardBatch.decode(12), MIXES[1], *layer.table(), False)
    hooks = backend.moe_hooks(
        adapters_of(layer.gate_up),
        adapters_of(layer.down),
        global_ids,
        num_experts=E,
        expert_map=expert_map.to(device),
    )
    layer.forward(hooks)
    layer.check(MIXES[1])


# ---- buffers


@on_devices
def test_buffers_are_accounted_for_before_they_are_made(device: str) -> None:
    sizes = {"max_tokens": 100, "top_k": 4, "num_experts": 60, "num_slots": 9}
    buffers = MoEBuffers(**sizes, device=device)
    assert buffers.nbytes == MoEBuffers.nbytes_for(**sizes)
    with_op = MoEBuffers.nbytes_for(**sizes, max_rank=16, num_slices=2)
    assert with_op - buffers.nbytes == 16 * 100 * 4 * 2 * 16 * 4  # few pairs: up to 16 times
    many = {**sizes, "max_tokens": 10000}
    rank_13 = MoEBuffers.nbytes_for(**many, max_rank=13) - MoEBuffers.nbytes_for(**many)
    assert rank_13 == 10000 * 4 * 2 * 16 * 4
    assert buffers.routing.device.type == device and (buffers.token_slots == -1).all()
    before = buffers.nbytes
    assert buffers.resize(40) and buffers.nbytes < before
    assert buffers.nbytes == MoEBuffers.nbytes_for(**{**sizes, "max_tokens": 40})
    assert not buffers.resize(40) and len(buffers.token_slots) == 40
    with pytest.raises(ValueError, match="max_tokens is 0"):
        buffers.resize(0)
    assert buffers.max_tokens == 40
    with pytest.raises(ValueError, match="top_k is 0, expected at least 1"):
        MoEBuffers(8, 0, 4, 2, device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300, 2000, 9000])
@pytest.mark.parametrize("shape", [(1, 1), (8, 4), (2, 128)], ids=str)
def test_the_operator_takes_no_more_than_was_said(num_tokens: int, shape: tuple[int, int]) -> None:
    """Few and many pairs, of few and of many (slot, expert), with a K that is worth dividing."""
    num_slots, num_experts = shape
    top_k = min(2, num_experts)
    gen = generator("memory", num_tokens, shape)
    slices, ranks = [64, 64], [13] * num_slots
    module = make_moe(ranks, num_experts, 8192, slices, torch.bfloat16, "cuda")
    ids = random_ids(num_tokens, top_k, num_experts, gen).cuda()
    slots = torch.randint(num_slots, (num_tokens,), generator=gen, dtype=torch.int32).cuda()
    sizes = {"num_slots": num_slots, "num_experts": num_experts}
    routing = ops.moe_lora_align(ids, slots, **sizes)
    x = randn((num_tokens, 8192), torch.bfloat16, "cuda", gen)
    y = randn((num_tokens, top_k, 128), torch.bfloat16, "cuda", gen)
    lora = adapters_of(module)
    lora.add(x, y, routing, top_k, None)
    torch.cuda.synchronize()
    # What is asked for: a block that the allocator gives may be larger by up to a megabyte.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    lora.add(x, y, routing, top_k, None)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    common = {"max_tokens": num_tokens, "top_k": top_k, **sizes}
    said = MoEBuffers.nbytes_for(**common, max_rank=13) - MoEBuffers.nbytes_for(**common)
    assert 0 < taken <= said


@on_devices
def test_buffers_are_made_first_and_resized_to_what_is_captured(device: str) -> None:
    layer = Layer.random(12, device)
    backend = moe_backend(device)
    assert not backend.resize_cuda_graph_moe_buffers(8)  # there are none
    backend.init_cuda_graph_moe_buffers(64, len(RANKS), torch.float16, ENGINE_LAYER)
    larger = backend.moe_cg_buffers["moe_buffers"].nbytes
    assert backend.resize_cuda_graph_moe_buffers(12)
    assert not backend.resize_cuda_graph_moe_buffers(12)
    assert backend.moe_cg_buffers["moe_buffers"].nbytes < larger
    assert backend.moe_cg_buffers["token_lora_mapping"].numel() == 12
    backend.init_decode_cuda_graph_batch_info(16, 1)
    backend.prepare_lora_batch(ForwardBatch.decode(12), MIXES[1], *layer.table(), True)
    layer.run(backend)
    layer.check(MIXES[1])
    info = backend.batch_info
    with pytest.raises(ValueError, match="13 tokens, the MoE buffers 12"):
        backend.prepare_lora_batch(ForwardBatch.decode(13), [0] * 13, *layer.table(), True)
    assert backend.batch_info is info
    layer.run(backend)
    layer.check(MIXES[1])
    with pytest.raises(ValueError, match="max_loras is 5, the backend has 4 slots"):
        backend.init_cuda_graph_moe_buffers(64, 5, torch.float16, ENGINE_LAYER)


def test_add_moe_lora_info_as_engines_call_it() -> None:
    backend = LoRABackend(len(RANKS), "cpu")
    backend.prepare_lora_batch(ForwardBatch.decode(2), [1, 0], RANKS, [1.0] * 4, False)
    info = backend.batch_info
    assert info is not None
    assert backend._add_moe_lora_info(None, info) is info and info.moe_lora_info is None
    backend.is_moe_lora = True
    assert backend._add_moe_lora_info(None, info) is info
    assert info.moe_lora_info is not None
    assert info.moe_lora_info.token_lora_mapping[:2].tolist() == [1, 0]


# ---- SGLang's hooks


def engine_info(layer: Layer, backend: LoRABackend, **options: Any) -> SimpleNamespace:
    """SGLang's LoRAInfo: R-spaced slices, the scaling in B."""
    info = backend.batch_info
    assert info is not None and info.moe_lora_info is not None
    (gate_up_a, gate_up_b), (down_a, down_b) = (
        [torch.cat(side, dim=2) for side in module.weights("rank_strided")]
        for module in (layer.gate_up, layer.down)
    )
    fields = {
        "gate_up_lora_a_weights": gate_up_a,
        "gate_up_lora_b_weights": gate_up_b,
        "down_lora_a_weights": down_a,
        "down_lora_b_weights": down_b,
        "lora_ranks": info.lora_ranks,
        "token_lora_mapping": info.moe_lora_info.token_lora_mapping,
        "adapter_enabled": info.moe_lora_info.adapter_enabled,
        "max_lora_rank": MAX_RANK,
        "num_experts": E,
        "has_active_lora": info.has_active_lora,
        "cg_buffers": backend.moe_cg_buffers or None,
    }
    return SimpleNamespace(**{**fields, **options})


def of_engine(num_tokens: int, device: str, **options: Any) -> Layer:
    layer = Layer.random(num_tokens, device, **options)
    ones = torch.ones_like(layer.gate_up.scalings)
    layer.gate_up = replace(layer.gate_up, scalings=ones)
    layer.down = replace(layer.down, scalings=ones)
    return layer


@on_devices
@pytest.mark.parametrize("shared", [False, True], ids=["per expert", "shared outer"])
def test_hooks_in_place_of_sglangs(device: str, shared: bool) -> None:
    layer = of_engine(12, device)
    if shared:
        common = ([WIDTH, WIDTH], torch.bfloat16, device)
        gate_up = make_moe(RANKS, E, HIDDEN, *common, max_rank=MAX_RANK, shared_a=True)
        down = make_moe(RANKS, E, WIDTH, [HIDDEN], *common[1:], max_rank=MAX_RANK, shared_b=True)
        layer.gate_up = replace(gate_up, scalings=layer.gate_up.scalings)
        layer.down = replace(down, scalings=layer.down.scalings)
    backend = moe_backend(device)
    backend.init_cuda_graph_moe_buffers(12, len(RANKS), torch.bfloat16, ENGINE_LAYER)
    backend.init_decode_cuda_graph_batch_info(12, 1)

    def prepare(slots: Sequence[int], in_graph: bool) -> None:
        batch = ForwardBatch.decode(len(slots))
        backend.prepare_lora_batch(batch, slots, *layer.table(), in_graph)

    for slots in (MIXES[1], [-1] * 12):
        prepare(slots, False)
        layer.forward(build_lora_hooks(layer.x[0], engine_info(layer, backend), layer.ids))
        layer.check(slots)
    prepare([-1] * 12, True)
    if device == "cuda":  # without an adapter, and yet to be captured
        info = engine_info(layer, backend)
        replay = captured(
            lambda: layer.forward(build_lora_hooks(layer.x[0], info, layer.ids)), device
        )
        for slots in MIXES:
            prepare(slots, True)
            replay()
            layer.check(slots)


@on_devices
def test_padded_caches_and_layers_without_a_gate(device: str) -> None:
    layer = of_engine(12, device)
    backend = moe_backend(device)
    backend.prepare_lora_batch(ForwardBatch.decode(12), MIXES[1], *layer.table(), False)
    info = engine_info(layer, backend)
    hooks = build_lora_hooks(layer.x[0], info, layer.ids)
    layer.forward(hooks)
    padded = 32  # features of gate, and of up, of which 24 are in use
    cache = torch.full((12, TOP_K, 2 * padded), NAN, dtype=torch.bfloat16, device=device)
    cache[..., :WIDTH] = layer.base[0][..., :WIDTH]
    cache[..., padded : padded + WIDTH] = layer.base[0][..., WIDTH:]
    x = torch.full((12 * TOP_K, padded), NAN, dtype=torch.bfloat16, device=device)
    x[:, :WIDTH] = layer.x[1]
    assert hooks.after_gate_up is not None and hooks.after_down is not None
    hooks.after_gate_up(layer.x[0], cache, layer.weights, layer.ids)
    assert_same_bits(cache[..., :WIDTH], layer.y[0][..., :WIDTH])
    assert_same_bits(cache[..., padded : padded + WIDTH], layer.y[0][..., WIDTH:])
    assert cache[..., WIDTH:padded].isnan().all()
    down = layer.base[1].clone()
    hooks.after_down(x, down, layer.weights, layer.ids)
    assert_same_bits(down, layer.y[1])

    one = make_moe(RANKS, E, HIDDEN, [WIDTH], torch.bfloat16, device, max_rank=MAX_RANK)
    one = replace(one, scalings=torch.ones_like(one.scalings))
    (lora_a,), (lora_b,) = one.weights()
    info.gate_up_lora_a_weights, info.gate_up_lora_b_weights = lora_a, lora_b
    y = layer.base[0][..., :WIDTH].contiguous()
    hook = build_lora_hooks(layer.x[0], info, layer.ids).after_gate_up
    assert hook is not None
    hook(layer.x[0], y, layer.weights, layer.ids)
    batch = route(layer.ids, MIXES[1], one, device)
    base = layer.base[0][..., :WIDTH].flatten(0, 1)
    assert_close(y.flatten(0, 1).cpu(), expected(base, layer.x[0], one, one.weights(), batch))


def test_sglang_without_adapters() -> None:
    layer = of_engine(12, "cpu")
    backend = moe_backend("cpu")
    backend.prepare_lora_batch(ForwardBatch.decode(12), [0] * 12, *layer.table(), False)
    for info in (
        None,
        engine_info(layer, backend, has_active_lora=False),
        engine_info(layer, backend, max_lora_rank=0),
    ):
        assert build_lora_hooks(layer.x[0], info, layer.ids) == LoRAHooks()
    with pytest.raises(ValueError, match="fully_sharded"):
        build_lora_hooks(layer.x[0], engine_info(layer, backend, fully_sharded=True), layer.ids)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    from test_on_device import no_synchronisation

    layer = of_engine(12, "cuda")
    backend = moe_backend("cuda")
    backend.init_cuda_graph_moe_buffers(12, len(RANKS), torch.bfloat16, ENGINE_LAYER)
    backend.init_decode_cuda_graph_batch_info(12, 1)
    gate_up, down = layer.lora
    ranks, scalings = layer.table()

    def step() -> None:
        for in_graph in (True, False):
            backend.prepare_lora_batch(ForwardBatch.decode(12), MIXES[1], ranks, scalings, in_graph)
            layer.forward(backend.moe_hooks(gate_up, down, layer.ids, num_experts=E))

    step()
    with no_synchronisation():
        step()

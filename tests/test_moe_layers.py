"""FusedMoE: every token's experts with its adapter; eager, compiled and captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generators import NAN, generator, on_devices, randn
from lora_ext import Adapter, AdapterError, AdapterPool, LoRABatch, layers
from lora_ext.adapters import LoRAWeights
from lora_ext.layers import ExpertLinear, FusedMoE
from lora_ext.layers.experts import ExpertGroups
from lora_ext.moe import MoEBuffers

E, TOP_K, H, WIDTH = 6, 2, 40, 24
NUM_SLOTS, MAX_RANK = 4, 8
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by waiting for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def gated_in_turns(gate_up: Tensor) -> Tensor:
    return nn.functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


def stacked(
    n_a: int, n_b: int, out_features: int, in_features: int, rank: int, scaling: float, seed: object
) -> LoRAWeights:
    gen = generator("stack", seed, rank)
    lora_a = torch.randn(n_a, rank, in_features, generator=gen) * in_features**-0.5
    lora_b = torch.randn(n_b, out_features, rank, generator=gen) * rank**-0.5
    return LoRAWeights(lora_a, lora_b, rank, scaling)


def adapter(rank: int, seed: int, *, outer: int = E, form: str = "halves") -> Adapter:
    """An adapter of all projections; ``outer`` 1: with one A of gate and up, one B of down."""
    down = {"moe.down_proj": stacked(E, outer, H, WIDTH, rank, 0.5, (seed, "down"))}
    if form == "fused":
        fused = stacked(outer, E, 2 * WIDTH, H, rank, 2.0, (seed, "gate_up"))
        return Adapter({"moe.gate_up_proj": fused} | down)
    gate = stacked(outer, E, WIDTH, H, rank, 2.0, (seed, "gate"))
    up = stacked(outer, E, WIDTH, H, max(1, rank - 1), -1.0, (seed, "up"))
    return Adapter({"moe.gate_proj": gate, "moe.up_proj": up} | down)


def deltas(adapter: Adapter | None, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """What an adapter adds to the two stacks of weights, in fp64."""
    gate_up = torch.zeros(E, 2 * WIDTH, H, dtype=torch.float64)
    down = torch.zeros(E, H, WIDTH, dtype=torch.float64)
    halves = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (
        slice(0, WIDTH),
        slice(WIDTH, None),
    )  # fmt: skip
    rows = {"gate_proj": halves[0], "up_proj": halves[1], "gate_up_proj": slice(None)}
    for name, weights in ({} if adapter is None else adapter.modules).items():
        delta = weights.scaling * weights.lora_b.double() @ weights.lora_a.double()
        where = weights.experts if weights.experts is not None else range(E)
        part = name.removeprefix("moe.")
        if part == "down_proj":
            down[list(where)] += delta
        else:
            gate_up[list(where), rows[part]] += delta
    return gate_up, down


@dataclass
class Layer:
    """A FusedMoE with a pool, and the adapters in it."""

    moe: FusedMoE
    pool: AdapterPool
    loaded: dict[int, Adapter]
    interleaved: bool

    @classmethod
    def make(
        cls, device: str = "cpu", dtype: torch.dtype = torch.float32, *, bias: bool = False,
        transposed: bool = False, interleaved: bool = False, **options: Any,
    ) -> Layer:  # fmt: skip
        gen = generator("moe", H, WIDTH)
        weights = [
            randn((E, 2 * WIDTH, H), dtype, device, gen, H**-0.5),
            randn((E, H, WIDTH), dtype, device, gen, WIDTH**-0.5),
        ]
        biases = [randn((E, n), dtype, device, gen) if bias else None for n in (2 * WIDTH, H)]
        bases = [
            ExpertLinear(
                nn.Parameter(w.transpose(1, 2).contiguous() if transposed else w, False),
                None if b is None else nn.Parameter(b, False),
                transposed=transposed,
            )
            for w, b in zip(weights, biases, strict=True)
        ]
        if parallel := options.get("expert_parallel"):
            bases = [base.cut(parallel.experts) for base in bases]
        activation = gated_in_turns if interleaved else gated
        moe = FusedMoE(
            bases[0], bases[1], activation, NUM_SLOTS, MAX_RANK, interleaved=interleaved, **options
        )
        for part in (moe.gate_up, moe.down):  # what no adapter has written is never read
            part.lora_a.fill_(NAN)
            part.lora_b.fill_(NAN)
        targets = {f"moe.{name}": target for name, target in moe.targets.items()}
        return cls(moe, AdapterPool(targets), {}, interleaved)

    def load(self, adapter: Adapter, *, name: str | None = None) -> int:
        name = name or f"adapter {len(self.loaded)}"
        slot = self.pool.load(name, adapter, replace=name in self.pool)
        self.loaded[slot] = adapter
        return slot

    def oracle(self, x: Tensor, ids: Tensor, weights: Tensor, slots: Sequence[int]) -> Tensor:
        """Each token through its experts' weights with its adapter merged in, in fp64."""
        gate_up, down = (
            (p.base.weight.transpose(1, 2) if p.base.transposed else p.base.weight).double().cpu()
            for p in (self.moe.gate_up, self.moe.down)
        )
        biases = [
            torch.zeros(E, 1).double() if p.base.bias is None else p.base.bias.double().cpu()
            for p in (self.moe.gate_up, self.moe.down)
        ]
        x, weights = x.double().cpu(), weights.double().cpu()
        result = torch.zeros(len(slots), H, dtype=torch.float64)
        of_token = torch.tensor(slots, dtype=torch.int64)
        for slot in sorted(set(slots)):
            extra = deltas(self.loaded.get(slot), interleaved=self.interleaved)
            for e in range(E):
                token, choice = ((ids.cpu() == e) & (of_token == slot)[:, None]).nonzero().T
                hidden = x[token] @ (gate_up[e] + extra[0][e]).T + biases[0][e]
                y = self.moe.activation(hidden) @ (down[e] + extra[1][e]).T + biases[1][e]
                result.index_add_(0, token, weights[token, choice, None] * y)
        return result


def routed(
    num_tokens: int, device: str, dtype: torch.dtype, seed: object = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights of a batch; weights float32, as Mixtral's router gives them."""
    gen = generator("routed", num_tokens, seed)
    x = randn((num_tokens, H), dtype, device, gen)
    ids = torch.rand(num_tokens, E, generator=gen).topk(TOP_K).indices.to(device)
    weights = torch.rand(num_tokens, TOP_K, generator=gen).to(device)
    return x, ids, weights


def run(layer: Layer, slots: Sequence[int], batch: Any, **options: Any) -> Tensor:
    plan = LoRABatch(max(len(slots), 1), NUM_SLOTS, batch[0].device)
    plan.update(slots)
    with layer.moe.routing.using(plan), torch.no_grad():
        result: Tensor = layer.moe(*batch, **options)
    return result


MIXES = {
    "mixed": [0, 2, -1, 1, 1, 3, -1, 0, 2],
    "one": [2],
    "none": [-1] * 5,
    "nobody's": [3] * 4,
    "empty": [],
    "300 decodes of one adapter": [1] * 300,
    "300 and 100": [0] * 300 + [2] * 100,
}
FORMS = {
    "plain": {},
    "bias, transposed, interleaved": {"bias": True, "transposed": True, "interleaved": True},
    "shared outer": {"shared_outer": True},
}


def loaded(device: str, dtype: torch.dtype, **form: Any) -> Layer:
    """Adapters in slots 0 to 2; slot 3 has none."""
    layer = Layer.make(device, dtype, **form)
    outer = 1 if form.get("shared_outer") else E
    layer.load(adapter(3, 0, outer=outer))
    layer.load(adapter(8, 1, outer=outer, form="fused"))
    only = {k: v for k, v in adapter(1, 2, outer=outer).modules.items() if k != "moe.up_proj"}
    layer.load(Adapter(only))
    return layer


@on_devices
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_each_token_has_its_adapter(device: str, dtype: torch.dtype, form: str) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the CUDA kernels take no float64")
    layer = loaded(device, dtype, **FORMS[form])
    for slots in MIXES.values():
        batch = routed(len(slots), device, dtype)
        ours, wanted = run(layer, slots, batch), layer.oracle(*batch, slots)
        assert ours.dtype == dtype
        assert (ours.double().cpu() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()
        base = layer.moe(*batch)
        for i, slot in enumerate(slots):  # slot 3 and -1: bit for bit the base
            assert (slot in layer.loaded) != torch.equal(ours[i], base[i])


@on_devices
def test_choices_that_are_not_routed(device: str) -> None:
    layer = loaded(device, torch.float32)
    slots = MIXES["mixed"]
    x, ids, weights = routed(len(slots), device, torch.float32)
    ids[0, 0] = ids[3] = ids[2, 1] = -1
    ours = run(layer, slots, (x, ids, weights))
    wanted = layer.oracle(x, ids, weights, slots)
    assert (ours.double().cpu() - wanted).norm() <= 2e-6 * wanted.norm()
    assert torch.equal(ours[3], torch.zeros_like(ours[3]))
    assert torch.equal(run(layer, slots, (x, ids.int(), weights)), ours)


@on_devices
def test_another_adapter_and_its_nan_reach_no_other_row(device: str) -> None:
    layer = loaded(device, torch.bfloat16)
    slots = MIXES["mixed"]
    batch = routed(len(slots), device, torch.bfloat16)
    before = run(layer, slots, batch)
    for part in (layer.moe.gate_up, layer.moe.down):
        part.lora_a[1] = NAN
        part.lora_b[1] = NAN
    after = run(layer, slots, batch)
    for i, slot in enumerate(slots):
        assert torch.equal(after[i], before[i]) == (slot != 1)
        assert bool(after[i].isnan().any()) == (slot == 1)


@on_devices
def test_a_slot_is_loaded_anew(device: str) -> None:
    """Nothing is left of an adapter of a higher rank, or with more projections."""
    layer = loaded(device, torch.float32)
    slots, batch = MIXES["mixed"], routed(9, device, torch.float32)
    first = run(layer, slots, batch)
    few = stacked(2, 2, WIDTH, H, 2, 1.0, "few")._replace(experts=(1, 4))
    layer.load(Adapter({"moe.up_proj": few}), name="adapter 1")
    again = run(layer, slots, batch)
    wanted = layer.oracle(*batch, slots)
    assert (again.double().cpu() - wanted).norm() <= 2e-6 * wanted.norm()
    for i, slot in enumerate(slots):
        assert slot == 1 or torch.equal(again[i], first[i])
    layer.pool.remove("adapter 1")
    layer.loaded.pop(1)
    removed, base = run(layer, slots, batch), layer.moe(*batch)
    assert all(torch.equal(removed[i], base[i]) for i, slot in enumerate(slots) if slot == 1)


@on_devices
def test_the_same_rows_give_the_same_bits(device: str) -> None:
    layer = loaded(device, torch.bfloat16)
    slots, batch = MIXES["300 and 100"], routed(400, device, torch.bfloat16)
    first = run(layer, slots, batch)
    assert all(torch.equal(run(layer, slots, batch), first) for _ in range(20))


def test_given_buffers_are_used_and_too_small_ones_refused() -> None:
    buffers = MoEBuffers(9, TOP_K, E, NUM_SLOTS, "cpu")
    layer, plain = loaded("cpu", torch.float32, buffers=buffers), loaded("cpu", torch.float32)
    slots, batch = MIXES["mixed"], routed(9, "cpu", torch.float32)
    assert torch.equal(run(layer, slots, batch), run(plain, slots, batch))
    assert int(buffers.routing[0]) == 7 * TOP_K  # tokens with a slot
    with pytest.raises(ValueError, match=r"300 tokens .* made for 9 tokens with 2 of 6 experts"):
        run(layer, MIXES["300 decodes of one adapter"], routed(300, "cpu", torch.float32))


def test_shared_outer_is_kept_once_and_others_are_refused() -> None:
    layer = loaded("cpu", torch.float32, shared_outer=True)
    assert layer.moe.gate_up.lora_a.shape == (NUM_SLOTS, 1, 2 * MAX_RANK, H)
    assert layer.moe.down.lora_b.shape == (NUM_SLOTS, 1, H, MAX_RANK)
    before = {name: buffer.clone() for name, buffer in layer.moe.named_buffers()}
    with pytest.raises(
        AdapterError, match=r"'moe.gate_proj': its experts differ in A.*shared_outer"
    ):
        layer.load(adapter(3, 7))
    with pytest.raises(AdapterError, match=r"'moe.down_proj': its experts differ in B"):
        layer.load(Adapter({"moe.down_proj": adapter(3, 7).modules["moe.down_proj"]}))
    after = dict(layer.moe.named_buffers())
    for name, buffer in before.items():
        assert torch.equal(buffer.nan_to_num(), after[name].nan_to_num())


def bad_adapters() -> list[Any]:
    plain = LoRAWeights(torch.zeros(2, H), torch.zeros(WIDTH, 2), 2, 1.0)
    return [
        ("no stack", {"moe.gate_proj": plain}, "needs a stack of 6"),
        (
            "fewer experts",
            {"moe.up_proj": stacked(4, 4, WIDTH, H, 2, 1.0, 0)},
            "stack for 4 experts",
        ),
        (
            "an expert too many",
            {"moe.up_proj": stacked(1, 1, WIDTH, H, 2, 1.0, 0)._replace(experts=(6,))},
            "an expert 6, the model has 6",
        ),
        (
            "K",
            {"moe.up_proj": stacked(E, E, WIDTH, H + 1, 2, 1.0, 0)},
            r"A is \[2, 41\].*\[2, 40\]",
        ),
        ("N", {"moe.down_proj": stacked(E, E, H + 1, WIDTH, 2, 1.0, 0)}, r"B is \[41, 2\]"),
        ("N of both", {"moe.gate_up_proj": stacked(1, E, WIDTH, H, 2, 1.0, 0)}, r"B is \[24, 2\]"),
        (
            "rank",
            {"moe.up_proj": stacked(E, E, WIDTH, H, 9, 1.0, 0)},
            "its rank is 9, max_rank is 8",
        ),
        (
            "twice",
            {
                "moe.up_proj": stacked(E, E, WIDTH, H, 2, 1.0, 0),
                "moe.gate_up_proj": stacked(E, E, 2 * WIDTH, H, 2, 1.0, 0),
            },
            "another module has weights for the same projection",
        ),
        ("name", {"moe.w1": stacked(E, E, WIDTH, H, 2, 1.0, 0)}, "no layer of this name"),
    ]


@pytest.mark.parametrize("case", bad_adapters(), ids=lambda case: case[0])
def test_adapters_that_do_not_fit_are_refused(case: Any) -> None:
    _, modules, message = case
    layer = loaded("cpu", torch.float32)
    slots, batch = MIXES["mixed"], routed(9, "cpu", torch.float32)
    before = run(layer, slots, batch)
    with pytest.raises(AdapterError, match=message):
        layer.load(Adapter(modules))
    assert torch.equal(run(layer, slots, batch), before) and len(layer.pool) == 3


def test_weights_of_experts_for_a_linear_layer_are_refused() -> None:
    pool = AdapterPool({"up": layers.LoRALinear(nn.Linear(H, WIDTH), 2, 4)})
    with pytest.raises(AdapterError, match="the model has no experts here"):
        pool.load("a", Adapter({"up": stacked(E, E, WIDTH, H, 2, 1.0, 0)}))


def test_grad_is_refused_where_adapters_are_added() -> None:
    layer = loaded("cpu", torch.float32)
    x, ids, weights = routed(3, "cpu", torch.float32)
    layer.moe(x.requires_grad_(), ids, weights).sum().backward()  # the base's own
    assert x.grad is not None and x.grad.norm() > 0
    plan = LoRABatch(3, NUM_SLOTS)
    plan.update([0, 1, -1])
    with (
        layer.moe.routing.using(plan),
        pytest.raises(RuntimeError, match="are for inference"),
    ):
        layer.moe(x, ids, weights)


# ---- compiled and captured


def gathered_mm(x: Tensor, weights: Tensor, groups: ExpertGroups) -> Tensor:
    """The base product without a question how many rows an expert has."""
    return torch.bmm(weights[groups.experts], x[:, :, None])[:, :, 0]


@on_devices
@torch.no_grad()
def test_compiled_once_for_every_routing_and_mix(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU the base product is a stand-in: torch's own is a loop over experts there."""
    if device == "cpu":
        monkeypatch.setattr(layers.experts, "_grouped_mm", gathered_mm)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    layer = loaded(device, torch.bfloat16)
    compiled = torch.compile(layer.moe, fullgraph=True, dynamic=True, backend="aot_eager")
    plan = LoRABatch(40, NUM_SLOTS, device, static=True)
    for seed, slots in enumerate([[0, 2, -1, 1] * 3, [1] * 40, [-1] * 7, [2, 0, 3] * 10]):
        batch = routed(len(slots), device, torch.bfloat16, seed)
        plan.update(slots)
        with layer.moe.routing.using(plan):
            assert torch.equal(compiled(*batch), layer.moe(*batch))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["buffers", "graph's own memory"])
@torch.no_grad()
def test_a_captured_layer_holds_for_every_later_batch(dtype: torch.dtype, given: bool) -> None:
    """Other routings, adapters and numbers of tokens, none at all, and a slot loaded in place."""
    num_tokens = 16
    buffers = MoEBuffers(num_tokens, TOP_K, E, NUM_SLOTS) if given else None
    layer = loaded("cuda", dtype, buffers=buffers)
    plan = LoRABatch.for_cuda_graph(num_tokens, NUM_SLOTS)
    static = routed(num_tokens, "cuda", dtype)
    with layer.moe.routing.using(plan):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer.moe(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # captured while the batch has no adapter
            y = layer.moe(*static)

    def check(slots: Sequence[int], seed: int) -> None:
        batch = routed(num_tokens, "cuda", dtype, seed)
        for into, values in zip(static, batch, strict=True):
            into.copy_(values)
        plan.update(slots)
        y.fill_(NAN)
        graph.replay()
        n = len(slots)
        wanted = layer.oracle(*(values[:n] for values in batch), slots)
        assert (y[:n].double().cpu() - wanted).norm() <= TOLERANCES[dtype] * max(1, wanted.norm())

    mixes = [[0, 1, 2, 3, -1] * 3, [-1] * 16, [2] * 16, [], [1], [3] * 7, [0, 2] * 8]
    for seed, slots in enumerate([*mixes, *reversed(mixes)]):
        check(slots, seed)
    layer.load(adapter(5, 11, form="fused"), name="adapter 0")
    check([0, 1] * 5, 100)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the base product of experts waits before Hopper")
    from test_on_device import no_synchronisation

    layer = loaded("cuda", torch.bfloat16)
    batch = routed(9, "cuda", torch.bfloat16)
    plan = LoRABatch(9, NUM_SLOTS, "cuda")
    with layer.moe.routing.using(plan), torch.no_grad():
        for _ in range(2):
            with no_synchronisation():
                plan.update(MIXES["mixed"])
                layer.moe(*batch)

"""The layers on their own: routed by a LoRABatch or by rows; eager, compiled and captured alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from generators import on_devices
from lora_ext import LoRABatch
from lora_ext.layers import LoRAEmbedding, LoRALinear, LoRALMHead, LoRAModule, Routing, RowPlans

NUM_SLOTS = 3
MAX_RANK = 4
RANKS = {0: 1, 1: 4}  # slot 2 has no adapter
VOCABULARY = 20


class Model(nn.Module):
    """An embedding and two linear layers, whose slots 0 and 1 hold adapters."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routing = Routing()
        bases: dict[str, tuple[type[LoRAModule], nn.Module]] = {
            "embedding": (LoRAEmbedding, nn.Embedding(VOCABULARY, 8)),
            "up": (LoRALinear, nn.Linear(8, 12)),
            "head": (LoRALMHead, nn.Linear(12, VOCABULARY, bias=False)),
        }
        for name, (kind, base) in bases.items():
            base.requires_grad_(False).to(device, dtype)
            layer = kind(base, NUM_SLOTS, MAX_RANK, self.routing)  # type: ignore[call-arg,arg-type]
            layer.lora_a.fill_(float("nan"))  # what no adapter has written is never read
            layer.lora_b.fill_(float("nan"))
            for slot, rank in RANKS.items():
                lora_a = torch.randn(rank, layer.in_features)
                lora_b = torch.randn(layer.out_features, rank)
                layer.write_slot(slot, lora_a, lora_b)
                layer.set_slot(slot, rank, 0.5 + slot)
            self.add_module(name, layer)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.up(self.embedding(ids))))
        return logits


def by_definition(model: Model, ids: Tensor, slots: list[int]) -> Tensor:
    """Each token through dense weights with its adapter merged in, in float64."""

    def merged(layer: LoRAModule, slot: int) -> Tensor:
        weight = layer.weight.double()
        rank = int(layer.ranks[slot]) if slot >= 0 else 0
        if rank == 0:
            return weight
        lora_a, lora_b = layer.lora_a[slot].double(), layer.lora_b[slot].double()
        if isinstance(layer, LoRAEmbedding):
            return weight + layer.scalings[slot] * lora_a[:, :rank] @ lora_b[:, :rank].T
        return weight + layer.scalings[slot] * lora_b[:, :rank] @ lora_a[:rank]

    rows = []
    for token, slot in zip(ids.tolist(), slots, strict=True):
        hidden = merged(model.embedding, slot)[token]
        hidden = torch.relu(merged(model.up, slot) @ hidden + model.up.base.bias.double())
        rows.append(merged(model.head, slot) @ hidden)
    return torch.stack(rows)


MIXES = [[0, -1, 1, 1, 2], [1], [-1, -1, -1], [2, 2], [1, 0, -1, 0, 1, 0, 2]]


@on_devices
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
@torch.no_grad()
def test_each_token_has_its_adapter(device: str, dtype: torch.dtype, tolerance: float) -> None:
    model = Model(device, dtype)
    batch = LoRABatch(64, NUM_SLOTS, device)
    for slots in MIXES:
        ids = torch.randint(0, VOCABULARY, (len(slots),), device=device)
        batch.update(slots)
        with model.routing.using(batch):
            ours = model(ids)
        wanted = by_definition(model, ids, slots)
        assert (ours.double() - wanted).norm() <= tolerance * wanted.norm()
        # A GPU's few half-precision tokens have another base product where adapters may be added:
        # theirs are the bits of a batch in which nobody has one.
        batch.update([-1] * len(slots))
        with model.routing.using(batch):
            nobody = model(ids)
        bases = [nobody] if device == "cuda" and dtype != torch.float32 else [nobody, model(ids)]
        for base in bases:
            for i, slot in enumerate(slots):
                assert slot in RANKS or torch.equal(ours[i], base[i])


@torch.no_grad()
def test_lm_head_on_one_token_of_each_row() -> None:
    model = Model()
    ids = torch.randint(0, VOCABULARY, (3, 4))
    with model.routing.using(RowPlans([1, -1, 0], NUM_SLOTS, torch.device("cpu"))):
        hidden = torch.relu(model.up(model.embedding(ids)))
        full = model.head(hidden)
        torch.testing.assert_close(model.head(hidden[:, -1]), full[:, -1])


@torch.no_grad()
def test_a_copied_model_routes_on_its_own() -> None:
    model = Model()
    other = copy.deepcopy(model)
    assert other.up.routing is other.head.routing is other.routing is not model.routing
    batch = LoRABatch(64, NUM_SLOTS)
    batch.update([1, 1])
    ids = torch.tensor([3, 4])
    with model.routing.using(batch):
        assert torch.equal(other(ids), Model()(ids))
        assert not torch.equal(other(ids), model(ids))


def replays_right(model: Model, batch: LoRABatch, call: Callable[[Tensor], Tensor]) -> None:
    """Compare a compiled or captured call with eager mode, bit for bit, for every mix."""
    for slots in [*MIXES, MIXES[0]]:
        padded = torch.randint(0, VOCABULARY, (batch.max_tokens,), device=batch.device)
        batch.update(slots)
        with model.routing.using(batch):
            assert torch.equal(call(padded)[: len(slots)], model(padded)[: len(slots)])
    layer = model.up  # reloaded in place, with another rank
    layer.set_slot(0, 0, 0.0)
    layer.write_slot(0, torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3))
    layer.set_slot(0, 3, 2.0)
    batch.update([0, 1])
    ids = torch.randint(0, VOCABULARY, (batch.max_tokens,), device=batch.device)
    with model.routing.using(batch):
        assert torch.equal(call(ids)[:2], model(ids)[:2])


@torch.no_grad()
def test_compiled_once_for_every_mix() -> None:
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = LoRABatch(16, NUM_SLOTS, static=True)
    replays_right(model, batch, compiled)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_graph_holds_for_every_later_mix() -> None:
    model = Model("cuda")
    batch = LoRABatch.for_cuda_graph(16, NUM_SLOTS)
    ids = torch.zeros(16, dtype=torch.int64, device="cuda")
    with model.routing.using(batch):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids)  # warm up
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # captured while the batch has no adapter at all
            logits = model(ids)

    def replay(given: Tensor) -> Tensor:
        ids.copy_(given)
        graph.replay()
        return logits

    replays_right(model, batch, replay)

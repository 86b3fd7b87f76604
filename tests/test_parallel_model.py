"""A model of layers that hold shards, compiled and captured: the exchange is part of the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distributed import Workers, world
from lora_ext import LoRABatch
from lora_ext.layers import (
    LoRAColumnParallelLinear,
    LoRALMHead,
    LoRAModule,
    LoRARowParallelLinear,
    LoRAVocabParallelEmbedding,
    Routing,
)
from numerics import assert_same_bits

VOCABULARY = 70
NUM_ADDED = 2
WIDTH = 16
NUM_SLOTS = 3
MAX_RANK = 4
MAX_TOKENS = 16
MIXES = [[1, -1, 1], [0, 1], [-1] * 5, [2, 1, 0, 1], [1] * MAX_TOKENS]  # slot 2 has no adapter


class Model(nn.Module):
    """Every kind of exchange: two all-reduces and an all-gather, of float32 over bfloat16."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routing = Routing()
        options = {"num_slots": NUM_SLOTS, "max_rank": MAX_RANK, "routing": self.routing}
        self.embedding = LoRAVocabParallelEmbedding.from_full(
            nn.Embedding(VOCABULARY, WIDTH, device=device),
            **options,
            group=world(),
            num_added_tokens=NUM_ADDED,
        )
        self.up = LoRAColumnParallelLinear.from_full(
            nn.Linear(WIDTH, 24, device=device), **options, group=world()
        )
        self.down = LoRARowParallelLinear.from_full(
            nn.Linear(24, WIDTH, device=device), **options, group=world()
        )
        self.head = LoRALMHead.from_full(
            nn.Linear(WIDTH, VOCABULARY, device=device, dtype=torch.bfloat16),
            **options,
            group=world(),
            logits_dtype=torch.float32,
        )
        for slot in range(2):
            self.load(slot, rank=1 + 2 * slot)
        self.embedding.write_added_tokens(1, torch.randn(NUM_ADDED, WIDTH))

    def load(self, slot: int, rank: int) -> None:
        for layer in self.children():
            assert isinstance(layer, LoRAModule)
            lora_a = torch.randn(rank, layer.inputs.full)
            lora_b = torch.randn(sum(shard.full for shard in layer.outputs), rank)
            layer.set_slot(slot, 0, 0.0)
            layer.write_slot(slot, lora_a, lora_b)
            layer.set_slot(slot, rank, 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.down(torch.relu(self.up(self.embedding(ids))))
        logits: Tensor = self.head(hidden.bfloat16())
        return logits


def holds_for_every_mix(
    model: Model, batch: LoRABatch, call: Callable[[Tensor], Tensor], device: str
) -> None:
    for i, slots in enumerate([*MIXES, MIXES[0], MIXES[1]]):
        if i == len(MIXES):
            model.load(0, rank=4)
        ids = torch.randint(0, VOCABULARY + NUM_ADDED, (MAX_TOKENS,)).to(device)
        batch.update(slots)
        with model.routing.using(batch):
            got, wanted = call(ids)[: len(slots)], model(ids)[: len(slots)]
        assert wanted.isfinite().all()
        assert_same_bits(got, wanted)


@torch.no_grad()
def check_compiled(device: str) -> None:
    model = Model(device)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    holds_for_every_mix(
        model, LoRABatch(MAX_TOKENS, NUM_SLOTS, device, static=True), compiled, device
    )
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_once_for_every_mix(workers: Workers) -> None:
    workers.run(check_compiled)


@torch.no_grad()
def check_captured(device: str) -> None:
    model = Model(device)
    batch = LoRABatch.for_cuda_graph(MAX_TOKENS, NUM_SLOTS, device)
    ids = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=device)
    with model.routing.using(batch):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # the first collectives set their channels up
                model(ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(ids)

    def replay(given: Tensor) -> Tensor:
        ids.copy_(given)
        graph.replay()
        return logits

    holds_for_every_mix(model, batch, replay, device)


@pytest.mark.parametrize("workers", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_captured_graph_holds_for_every_later_mix(workers: Workers) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    workers.run(check_captured)

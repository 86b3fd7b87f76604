"""An inference engine in small: requests come and go, each with its adapter, over LoRABackend.

    python examples/engine_loop.py

New requests are prefilled together, eagerly, with lm_head on the last token of each. Running ones
decode in a batch of fixed size; on a GPU that is one captured CUDA graph, replayed whatever the
requests' adapters are. Each request must get the tokens that a model with its adapter merged gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_ext import LoRABackend
from lora_ext.backend import ForwardBatch, LoRABatchInfo

VOCABULARY, HIDDEN, INTERMEDIATE = 100, 32, 48
NUM_SLOTS, MAX_RANK, MAX_BATCH = 4, 8, 4
RANKS, SCALINGS = [8, 2, 0, 5], [0.5, 2.0, 0.0, 1.0]  # slot 2 is empty
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Layer(nn.Module):
    """Stacked projections, or an embedding, with the adapters of all slots beside the weight."""

    def __init__(self, kind: str, in_features: int, *out_slices: int) -> None:
        super().__init__()
        self.kind, self.vocab_size = kind, in_features
        self.offsets = [0]
        for width in out_slices:
            self.offsets.append(self.offsets[-1] + width)
        self.num_slices, out_features = len(out_slices), sum(out_slices)
        self.weight = torch.randn(out_features, in_features, device=DEVICE)
        self.lora_a = torch.zeros(NUM_SLOTS, len(out_slices) * MAX_RANK, in_features, device=DEVICE)
        self.lora_b = torch.zeros(NUM_SLOTS, out_features, MAX_RANK, device=DEVICE)
        for slot, rank in enumerate(RANKS):  # slice i of a slot in rows i * rank and following
            self.lora_a[slot, : len(out_slices) * rank].normal_()
            self.lora_b[slot, :, :rank].normal_()

    def forward(
        self, backend: LoRABackend, x: Tensor, pruned: LoRABatchInfo | None = None
    ) -> Tensor:
        """x [T, in_features], or ids [T] of an embedding, to [T, out_features]."""

        def base() -> Tensor:
            if self.kind == "embedding":
                return functional.embedding(x, self.weight.T)
            return functional.linear(x, self.weight)

        return backend.forward_with_base(
            self,
            x,
            base,
            self.lora_a,
            self.lora_b,
            None,
            self.offsets,
            kind=self.kind,
            pruned_batch_info=pruned,
        )

    def merged(self, slot: int) -> Tensor:
        """The weight of one adapter, in float64."""
        weight = self.weight.double()
        if slot < 0 or RANKS[slot] == 0:
            return weight
        rank, deltas = RANKS[slot], []
        for i in range(self.num_slices):
            a = self.lora_a[slot, i * rank : (i + 1) * rank].double()
            b = self.lora_b[slot, self.offsets[i] : self.offsets[i + 1], :rank].double()
            deltas.append(SCALINGS[slot] * b @ a)
        return weight + torch.cat(deltas)


class Model(nn.Module):
    """A gated MLP between an embedding and an lm_head: the next token follows from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Layer("embedding", VOCABULARY, HIDDEN)
        self.gate_up = Layer("linear", HIDDEN, INTERMEDIATE, INTERMEDIATE)
        self.down = Layer("linear", INTERMEDIATE, HIDDEN)
        self.lm_head = Layer("lm_head", HIDDEN, VOCABULARY)

    def hidden(self, backend: LoRABackend, ids: Tensor) -> Tensor:
        """Ids [T] to [T, HIDDEN]."""
        gate, up = self.gate_up(backend, self.embedding(backend, ids)).chunk(2, dim=-1)
        return self.down(backend, functional.silu(gate) * up)

    def next_of_one(self, token: int, slot: int) -> int:
        """The token behind `token` by the merged weights of one adapter."""
        x = self.embedding.merged(slot)[:, token]
        gate, up = (self.gate_up.merged(slot) @ x).chunk(2)
        x = self.down.merged(slot) @ (functional.silu(gate) * up)
        return int((self.lm_head.merged(slot) @ x).argmax())


@dataclass
class Request:
    slot: int  # -1: no adapter
    prompt: list[int]
    num_new: int
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Prefills and decodes the requests that it is given."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.backend = LoRABackend(NUM_SLOTS, DEVICE)
        self.backend.init_decode_cuda_graph_batch_info(MAX_BATCH, num_tokens_per_req=1)
        self.ids = torch.zeros(MAX_BATCH, dtype=torch.int64, device=DEVICE)
        self.next_ids = torch.zeros(MAX_BATCH, dtype=torch.int64, device=DEVICE)
        self.replay = self._capture()

    def _decode_step(self) -> None:
        hidden = self.model.hidden(self.backend, self.ids)
        logits = self.model.lm_head(self.backend, hidden)
        torch.argmax(logits, dim=-1, out=self.next_ids)

    def _capture(self) -> Callable[[], None]:
        self._prepare(ForwardBatch.decode(MAX_BATCH), [-1] * MAX_BATCH, in_graph=True)
        if DEVICE == "cpu":
            return self._decode_step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode_step()
        return graph.replay

    def _prepare(self, batch: ForwardBatch, slots: list[int], *, in_graph: bool) -> None:
        self.backend.prepare_lora_batch(batch, slots, RANKS, SCALINGS, in_graph)

    def prefill(self, requests: list[Request]) -> None:
        """Run the prompts, and take the first new token of each."""
        lens = [len(r.prompt) for r in requests]
        self._prepare(ForwardBatch.extend(lens), [r.slot for r in requests], in_graph=False)
        ids = torch.tensor([token for r in requests for token in r.prompt], device=DEVICE)
        hidden = self.model.hidden(self.backend, ids)
        last = torch.tensor(lens, device=DEVICE).cumsum(0) - 1
        logits = self.model.lm_head(self.backend, hidden[last], self.backend.lm_head_batch_info)
        for request, token in zip(requests, logits.argmax(-1).tolist(), strict=True):
            request.tokens.append(token)

    def decode(self, requests: list[Request]) -> None:
        """Take one more token of each; the rest of the batch is padding without an adapter."""
        self._prepare(ForwardBatch.decode(len(requests)), [r.slot for r in requests], in_graph=True)
        self.ids[: len(requests)] = torch.tensor([r.tokens[-1] for r in requests], device=DEVICE)
        self.replay()
        for request, token in zip(requests, self.next_ids.tolist(), strict=False):
            request.tokens.append(token)

    def serve(self, waiting: list[Request]) -> None:
        """Run until every request has its tokens."""
        running: list[Request] = []
        while waiting or running:
            free = MAX_BATCH - len(running)
            new, waiting = waiting[:free], waiting[free:]
            if new:
                self.prefill(new)
            running = [r for r in running + new if len(r.tokens) < r.num_new]
            if running:
                self.decode(running)
            running = [r for r in running if len(r.tokens) < r.num_new]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    requests = [
        Request(slot=slot, prompt=[7 * i + j for j in range(1 + i % 3)], num_new=3 + 2 * i)
        for i, slot in enumerate([0, -1, 3, 1, 0, 2, 1])
    ]
    Engine(model).serve(requests)
    for request in requests:
        token, expected = request.prompt[-1], []
        for _ in range(request.num_new):
            token = model.next_of_one(token, request.slot)
            expected.append(token)
        print(f"slot {request.slot:2}: {request.prompt} -> {request.tokens}")
        assert request.tokens == expected


if __name__ == "__main__":
    main()

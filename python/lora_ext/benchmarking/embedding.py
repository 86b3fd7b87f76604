"""Problems of embeddings: gather A's column of each token's id, and expand it into y."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .case import Candidate, Case, Cost, Setting, relative_error
from .engines import Vllm
from .providers import DenseProvider, LoRAExt, TorchGrouped, TorchLoop
from .registry import Site
from .workload import Workload


@dataclass(frozen=True)
class EmbeddingProblem:
    """y += scaling A[:, id] B^T, A being kept vocabulary-major by every provider."""

    grid: str
    vocab_size: int
    hidden_size: int
    workload: Workload

    @property
    def name(self) -> str:
        return f"embed {self.workload}"

    def cost(self, dtype: torch.dtype) -> Cost:
        """B of the adapters in use once, one row of A and one id per token, y read and written."""
        size, hidden = dtype.itemsize, self.hidden_size
        cost_bytes = operations = 0
        for slot, tokens in self.workload.tokens_of.items():
            rank = self.workload.ranks[slot]
            cost_bytes += size * (hidden * rank + len(tokens) * (rank + 2 * hidden))
            cost_bytes += 8 * len(tokens)
            operations += 2 * len(tokens) * hidden * rank
        return Cost(cost_bytes, operations)

    def prepare(self, setting: Setting) -> Case:
        """A is too large to have once per set: its copies and B's rotate independently."""
        workload, size = self.workload, setting.element_size
        pool = size * workload.num_slots * workload.max_rank
        outputs = size * workload.num_tokens * self.hidden_size
        num_sets = setting.sets_for(
            self.cost(setting.dtype).bytes, pool * self.hidden_size + outputs
        )
        tables = min(num_sets, max(1, setting.rotation_bytes // (pool * self.vocab_size)))
        data = EmbeddingData.random(self, setting, num_sets, tables)
        makers: dict[str, Callable[[], Candidate]] = {
            "lora_ext": partial(self._own, data),
            **{
                provider.name: partial(self._gather_expand, data, provider)
                for provider in (TorchLoop, TorchGrouped, Vllm)
            },
        }
        return Case(makers, data.error, setting.tolerance, num_sets)

    def _own(self, data: EmbeddingData) -> Candidate:
        provider = LoRAExt(data.site, self.workload, data.y0.device, data.y0.dtype)
        lora_a = [a.transpose(1, 2) for a in data.lora_a]

        def run(i: int) -> None:
            ops.lora_embedding_apply_(
                data.y[i],
                data.ids[i],
                lora_a[i % len(lora_a)],
                data.lora_b[i],
                provider.ranks,
                provider.scalings,
                provider.plan,
            )

        return _candidate(data, run)

    def _gather_expand(self, data: EmbeddingData, provider_class: type[DenseProvider]) -> Candidate:
        """torch's embedding over all slots' tables as one, then a linear provider's expand."""
        device, dtype = data.y0.device, data.y0.dtype
        provider = provider_class(data.site, self.workload, device, dtype)
        no_a = torch.empty(self.workload.num_slots, self.workload.max_rank, 1).to(data.y0)
        weights = [provider.load(no_a, b) for b in data.lora_b]
        tables = [a.flatten(0, 1) for a in data.lora_a]
        first_row = data.token_slots.clamp(min=0).long() * self.vocab_size
        order = getattr(provider, "tokens", None)

        def run(i: int) -> None:
            xa = F.embedding(data.ids[i] + first_row, tables[i % len(tables)])
            if isinstance(provider, TorchLoop):
                parts = [
                    xa[rows] if isinstance(rows, slice) else xa.index_select(0, rows)
                    for _, rows in provider.groups
                ]
                provider.expand(data.y[i], parts, weights[i])
            elif isinstance(provider, Vllm):
                provider.expand(data.y[i], xa.unsqueeze(0), weights[i])
            else:
                gathered = xa if order is None else xa.index_select(0, order)
                provider.expand(data.y[i], gathered, weights[i])

        return _candidate(data, run)


@dataclass(frozen=True)
class EmbeddingData:
    """Sets of ids, B and y; fewer copies of A, vocabulary-major."""

    site: Site
    workload: Workload
    lora_a: Tensor  # [tables, L, V, R]
    lora_b: Tensor  # [sets, L, N, R]
    ids: Tensor  # [sets, T] int64
    y: Tensor  # [sets, T, N]
    y0: Tensor

    @classmethod
    def random(
        cls, problem: EmbeddingProblem, setting: Setting, num_sets: int, tables: int
    ) -> EmbeddingData:
        workload = problem.workload
        vocab, hidden = problem.vocab_size, problem.hidden_size
        slots, rank, tokens = workload.num_slots, workload.max_rank, workload.num_tokens

        def normal(*shape: int) -> Tensor:
            out = torch.empty(shape, dtype=setting.dtype, device=setting.device)
            return out.normal_()

        lora_a = normal(tables, slots, vocab, rank)
        lora_b = normal(num_sets, slots, hidden, rank).mul_(rank**-0.5)
        for slot, own in enumerate(workload.ranks):
            lora_a[:, slot, :, own:] = 0
            lora_b[:, slot, :, own:] = 0
        y0 = normal(tokens, hidden)
        return cls(
            Site("embed", vocab, (hidden,)),
            workload,
            lora_a,
            lora_b,
            torch.randint(vocab, (num_sets, tokens), device=setting.device),
            y0.expand(num_sets, -1, -1).contiguous(),
            y0,
        )

    @cached_property
    def token_slots(self) -> Tensor:
        return torch.tensor(self.workload.token_slots, dtype=torch.int32, device=self.y0.device)

    def error(self, i: int, actual: Tensor) -> float:
        delta = torch.zeros_like(self.y0, dtype=torch.float32)
        table = self.lora_a[i % len(self.lora_a)]
        for slot, tokens in self.workload.tokens_of.items():
            rows = torch.tensor(tokens, device=delta.device)
            xa = table[slot].index_select(0, self.ids[i].index_select(0, rows)).float()
            delta[rows] = self.workload.scalings[slot] * xa @ self.lora_b[i, slot].float().T
        return relative_error(actual.float() - self.y0.float(), delta)


def _candidate(data: EmbeddingData, run: Callable[[int], None]) -> Candidate:
    def result(i: int) -> Tensor:
        data.y[i].copy_(data.y0)
        run(i)
        return data.y[i]

    return Candidate(run, result, len(data.y))

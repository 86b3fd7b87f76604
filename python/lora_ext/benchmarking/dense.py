"""Problems of linear layers: apply, and its two halves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .case import Candidate, Case, Cost, Setting, relative_error
from .providers import DenseProvider, dense_providers
from .registry import Site
from .workload import Workload

APPLY, SHRINK, EXPAND = "apply", "shrink", "expand"


@dataclass(frozen=True)
class DenseProblem:
    """y += scaling (x A^T) B^T for one site; ``op`` SHRINK or EXPAND: that half alone."""

    grid: str
    site: Site
    workload: Workload
    op: str = APPLY

    @property
    def name(self) -> str:
        return f"{self.site.name} {self.workload}"

    def cost(self, dtype: torch.dtype) -> Cost:
        """The adapters in use at their own ranks once, x once, y read and written once."""
        site, workload, size = self.site, self.workload, dtype.itemsize
        cost_bytes = operations = 0
        for slot, tokens in workload.tokens_of.items():
            rank = workload.ranks[slot]
            a, b = rank * site.num_slices * site.in_features, rank * site.out_features
            xa_bytes = 4 * len(tokens) * site.num_slices * rank
            if self.op != EXPAND:
                cost_bytes += size * (a + len(tokens) * site.in_features)
                operations += 2 * len(tokens) * a
            if self.op != SHRINK:
                cost_bytes += size * (b + 2 * len(tokens) * site.out_features)
                operations += 2 * len(tokens) * b
            if self.op != APPLY:
                cost_bytes += xa_bytes
        return Cost(cost_bytes, operations)

    def prepare(self, setting: Setting) -> Case:
        site, workload = self.site, self.workload
        per_slot = site.num_slices * site.in_features + site.out_features
        weights = workload.num_slots * workload.max_rank * per_slot
        inputs = workload.num_tokens * (site.in_features + site.out_features)
        memory = setting.element_size * (weights + inputs)
        num_sets = setting.sets_for(self.cost(setting.dtype).bytes, memory)
        data = DenseData.random(site, workload, setting, num_sets)
        makers: dict[str, Callable[[], Candidate]] = {
            name: partial(self._candidate, data, provider)
            for name, provider in dense_providers().items()
        }
        return Case(makers, data.error, setting.tolerance, num_sets)

    def _candidate(self, data: DenseData, provider_class: type[DenseProvider]) -> Candidate:
        provider = provider_class(data.site, data.workload, data.y0.device, data.y0.dtype)
        num_sets = min(len(data.x), provider.max_sets or len(data.x))
        weights = [provider.load(data.lora_a[i], data.lora_b[i]) for i in range(num_sets)]

        def apply(i: int) -> None:
            provider.apply(data.y[i], data.x[i], weights[i])

        def halves(i: int) -> None:
            provider.expand(data.y[i], provider.shrink(data.x[i], weights[i]), weights[i])

        def result(i: int) -> Tensor:
            data.y[i].copy_(data.y0)
            (apply if self.op == APPLY else halves)(i)
            return data.y[i]

        run: Callable[[int], object] = apply
        if self.op == SHRINK:
            run = lambda i: provider.shrink(data.x[i], weights[i])  # noqa: E731
        elif self.op == EXPAND:
            xa = [provider.shrink(data.x[i], weights[i]) for i in range(num_sets)]
            run = lambda i: provider.expand(data.y[i], xa[i], weights[i])  # noqa: E731
        return Candidate(run, result, num_sets, provider.captured)


@dataclass(frozen=True)
class DenseData:
    """Sets of weights, inputs and outputs of one site, each at addresses of its own."""

    site: Site
    workload: Workload
    lora_a: Tensor  # [sets, L, S * R, K], packed
    lora_b: Tensor  # [sets, L, N, R]
    x: Tensor  # [sets, T, K]
    y: Tensor  # [sets, T, N]
    y0: Tensor  # [T, N]: y before

    @classmethod
    def random(cls, site: Site, workload: Workload, setting: Setting, num_sets: int) -> DenseData:
        """Weights of a size that keeps the result near 1; zeros behind each rank."""

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            out = torch.empty(shape, dtype=setting.dtype, device=setting.device)
            return out.normal_(std=std)

        rank, slots, tokens = workload.max_rank, workload.num_slots, workload.num_tokens
        height = site.num_slices * rank
        lora_a = normal(num_sets, slots, height, site.in_features, std=site.in_features**-0.5)
        lora_b = normal(num_sets, slots, site.out_features, rank, std=rank**-0.5)
        for slot, own in enumerate(workload.ranks):
            lora_a[:, slot, site.num_slices * own :] = 0
            lora_b[:, slot, :, own:] = 0
        y0 = normal(tokens, site.out_features)
        y = y0.expand(num_sets, -1, -1).contiguous()
        return cls(
            site, workload, lora_a, lora_b, normal(num_sets, tokens, site.in_features), y, y0
        )

    def error(self, i: int, actual: Tensor) -> float:
        """Relative error of what was added to y, against float32 arithmetic."""
        return relative_error(actual.float() - self.y0.float(), self.delta(i))

    def delta(self, i: int) -> Tensor:
        """What set i must add to y, in float32."""
        site, workload = self.site, self.workload
        delta = torch.zeros_like(self.y0, dtype=torch.float32)
        for slot, tokens in workload.tokens_of.items():
            rank = workload.ranks[slot]
            rows = torch.tensor(tokens, device=delta.device)
            x = self.x[i].index_select(0, rows).float()
            part = torch.zeros(len(tokens), site.out_features, device=delta.device)
            for s, columns in enumerate(site.columns):
                a = self.lora_a[i, slot, s * rank : (s + 1) * rank].float()
                b = self.lora_b[i, slot, columns, :rank].float()
                part[:, columns] = workload.scalings[slot] * (x @ a.T) @ b.T
            delta[rows] = part
        return delta

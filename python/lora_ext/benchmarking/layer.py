"""A whole layer: its base GEMMs alone, and with LoRA in every one of them.

What a user feels of LoRA is not the time of an operator but what it adds to a layer: the shrink
needs only x and can run beside the base GEMM, and a launch costs more where the GEMM is short. All
sites of a layer are one graph; each site has inputs of its own, attention and activations are left
out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import report
from .case import Candidate, Case, Cost, Setting, relative_error
from .command import settings_of
from .dense import DenseData
from .options import OWN
from .providers import DenseProvider, LoRAExt, LoRALinear, site_providers
from .registry import MODELS, Model
from .runner import Row, measure
from .workload import Workload, make_workload

GRID = "layer"
BASE, BASE_ONLY, LINEAR_ONLY = "base", "base_only", "linear_only"
BATCHES = ((1, 1), (8, 8), (32, 1), (32, 32), (256, 1), (256, 32))


@dataclass(frozen=True)
class LayerProblem:
    """The linear sites of a decoder layer for one batch.

    Providers: BASE is the GEMMs alone; "lora_ext" and others add their adapters after each GEMM;
    "lora_linear" is lora_ext's operator for GEMM and adapters together; BASE_ONLY and LINEAR_ONLY
    are "lora_ext" and "lora_linear" for a batch in which nobody has an adapter.
    """

    grid: str
    model: Model
    workload: Workload

    @property
    def name(self) -> str:
        return f"layer {self.workload}"

    @property
    def weight_elements(self) -> int:
        """Elements of the base weights."""
        return sum(site.in_features * site.out_features for site in self.model.sites.values())

    def lora_cost(self, dtype: torch.dtype) -> Cost:
        """The adapters' weights alone, each in use once: x and y are the GEMMs' already."""
        elements = operations = 0
        for slot, tokens in self.workload.tokens_of.items():
            for site in self.model.sites.values():
                per_rank = site.num_slices * site.in_features + site.out_features
                elements += self.workload.ranks[slot] * per_rank
                operations += 2 * len(tokens) * self.workload.ranks[slot] * per_rank
        return Cost(elements * dtype.itemsize, operations)

    def cost(self, dtype: torch.dtype) -> Cost:
        tokens, lora = self.workload.num_tokens, self.lora_cost(dtype)
        sites = self.model.sites.values()
        activations = tokens * sum(site.in_features + site.out_features for site in sites)
        elements = self.weight_elements + activations
        return Cost(
            elements * dtype.itemsize + lora.bytes,
            2 * tokens * self.weight_elements + lora.operations,
        )

    def prepare(self, setting: Setting) -> Case:
        sites = list(self.model.sites.values())
        num_sets = setting.sets_for(self.weight_elements * setting.element_size, 0)
        data = [DenseData.random(site, self.workload, setting, num_sets) for site in sites]
        weights = [
            torch.empty(
                num_sets,
                site.out_features,
                site.in_features,
                dtype=setting.dtype,
                device=setting.device,
            ).normal_(std=site.in_features**-0.5)
            for site in sites
        ]
        layer = _Layer(self.workload, data, weights)
        makers: dict[str, Callable[[], Candidate]] = {
            BASE: layer.base,
            BASE_ONLY: partial(layer.without_adapters, LoRAExt),
            LINEAR_ONLY: partial(layer.without_adapters, LoRALinear),
        }
        for name, provider in site_providers().items():
            makers[name] = partial(layer.with_lora, provider, self.workload)
        return Case(makers, layer.error, max(setting.tolerance, 1e-4), num_sets)


@dataclass(frozen=True)
class _Layer:
    workload: Workload
    data: list[DenseData]
    weights: list[Tensor]  # per site [sets, N, K]

    def candidate(self, run: Callable[[int], list[Tensor]], has_lora: bool) -> Candidate:
        def result(i: int) -> Tensor:
            # Without adapters the deltas are added here, so that all are held against one result.
            outputs = [y.float() for y in run(i)]
            if not has_lora:
                pairs = zip(outputs, self.data, strict=True)
                outputs = [y + data.delta(i) for y, data in pairs]
            return torch.cat(outputs, dim=1)

        return Candidate(run, result, len(self.weights[0]))

    def base(self) -> Candidate:
        sites = list(zip(self.data, self.weights, strict=True))
        return self.candidate(
            lambda i: [F.linear(data.x[i], weight[i]) for data, weight in sites], has_lora=False
        )

    def with_lora(self, provider_class: type[DenseProvider], workload: Workload) -> Candidate:
        first = self.data[0].y0
        sites = []
        for data, weight in zip(self.data, self.weights, strict=True):
            provider = provider_class(data.site, workload, first.device, first.dtype)
            lora = [provider.load(a, b) for a, b in zip(data.lora_a, data.lora_b, strict=True)]
            sites.append((provider, data.x, weight, lora))
        return self.candidate(
            lambda i: [
                provider.linear(x[i], weight[i], lora[i]) for provider, x, weight, lora in sites
            ],
            has_lora=bool(workload.tokens_of),
        )

    def without_adapters(self, provider_class: type[DenseProvider]) -> Candidate:
        slots = (-1,) * self.workload.num_tokens
        return self.with_lora(provider_class, replace(self.workload, token_slots=slots))

    def error(self, i: int, actual: Tensor) -> float:
        outputs = [
            data.x[i].float() @ weight[i].float().T + data.delta(i)
            for data, weight in zip(self.data, self.weights, strict=True)
        ]
        return relative_error(actual, torch.cat(outputs, dim=1))


def layer_problems(model: str, ranks: Sequence[str] = ("16", "64")) -> list[LayerProblem]:
    """The batches of the layer table, for each rank."""
    return [
        LayerProblem(GRID, MODELS[model], make_workload(tokens, adapters, rank, "even"))
        for rank in ranks
        for tokens, adapters in BATCHES
    ]


def run_layers(
    problems: Sequence[LayerProblem],
    args: argparse.Namespace,
    device: torch.device,
    emit: Callable[[str], Any],
) -> list[Row]:
    """Measure layers; each line is the GEMMs' time, and what each provider adds to it."""
    setting, limits = settings_of(args, device)
    wanted = None
    if args.providers:
        wanted = {*args.providers.split(","), BASE, BASE_ONLY, LINEAR_ONLY, LoRALinear.name, OWN}
    where = report.machine(setting, limits)
    rows: list[Row] = []
    columns: list[str] = []
    for problem in problems:
        row = measure(problem, setting, limits, providers=wanted, replays=args.replays)
        rows.append(row)
        if not columns:
            columns = [name for name in row.providers if name != BASE]
            emit(f"{where['device']}, {where['dtype']}, {problem.model.name}: added by LoRA, in %")
            titles = "".join(f" {name:>13}" for name in columns)
            emit(f"{'problem':<28} {'base µs':>8} {'bytes':>6}{titles}")
        emit(_line(problem, row, columns, setting.dtype))
        if args.json:
            report.write(args.json, rows, where)
    for text in report.notes(rows):
        emit(text)
    return rows


def _line(problem: LayerProblem, row: Row, columns: Sequence[str], dtype: torch.dtype) -> str:
    base = row.providers[BASE].us
    share = 100 * problem.lora_cost(dtype).bytes / (problem.weight_elements * dtype.itemsize)
    cells = [f"{problem.name:<28} {'-' if base is None else f'{base:.1f}':>8} {share:>+6.1f}"]
    for name in columns:
        measured = row.providers.get(name)
        us = measured.us if measured else None
        added = None if us is None or base is None else 100 * (us / base - 1)
        cells.append(f"{'-' if added is None else f'{added:+.1f}':>13}")
    return " ".join(cells)

"""A model's decode step in one CUDA graph: without LoRA, with it, and with other providers' LoRA.

All linear layers of all decoder layers have adapters. The step is that of `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Candidate, Case, Cost, Setting, Unsupported, relative_error
from .decoder import Decoder, Linear
from .providers import DenseProvider, LoRAExt, LoRALinear, site_providers
from .workload import Workload, make_workload

GRID = "end to end"
NONE, BASE_ONLY, LINEAR_ONLY = "without", "base_only", "linear_only"
PEFT_MIXED, PEFT_ONE = "peft", "peft_one"
# Rounding adds up over the layers; without its adapters a step is wrong by about 1.
TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 2e-2}
FP32_TOLERANCE = 1e-3


class Adapters:
    """Random adapters of all slots for every site of every layer, packed."""

    def __init__(self, decoder: Decoder, workload: Workload) -> None:
        like, rank, slots = decoder.embedding, workload.max_rank, workload.num_slots

        def normal(*shape: int, std: float) -> Tensor:
            return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(std=std)

        self.layers: list[dict[str, tuple[Tensor, Tensor]]] = []
        for _ in range(decoder.num_layers):
            weights = {}
            for name, site in decoder.model.sites.items():
                k, n = site.in_features, site.out_features
                a = normal(slots, site.num_slices * rank, k, std=k**-0.5)
                weights[name] = (a, normal(slots, n, rank, std=0.5 * rank**-0.5))
            self.layers.append(weights)


@dataclass(frozen=True)
class StepProblem:
    """One decode step of a batch.

    Providers: NONE is the model alone; "lora_ext" and others add adapters after each GEMM;
    "lora_linear" is lora_ext's operator for GEMM and adapters together; BASE_ONLY and LINEAR_ONLY
    are "lora_ext" and "lora_linear" for a batch in which nobody has one; PEFT_MIXED is PEFT's own
    layers with ``adapter_names``, eager; PEFT_ONE, where the batch has one adapter, PEFT's without
    names, captured.
    """

    grid: str
    decoder: Decoder
    adapters: Adapters
    workload: Workload

    @property
    def name(self) -> str:
        return f"step {self.workload}"

    def cost(self, dtype: torch.dtype) -> Cost:
        """Base weights, head and cache once, adapters in use once; no activations."""
        decoder, sites = self.decoder, self.decoder.model.sites.values()
        layer = sum(site.in_features * site.out_features for site in sites)
        elements = decoder.num_layers * layer + decoder.head.numel()
        operations = 2 * self.workload.num_tokens * elements
        elements += sum(keys.numel() + values.numel() for keys, values in decoder.caches)
        for slot, tokens in self.workload.tokens_of.items():
            per_rank = sum(site.num_slices * site.in_features + site.out_features for site in sites)
            adapter = self.workload.ranks[slot] * per_rank * decoder.num_layers
            elements += adapter
            operations += 2 * len(tokens) * adapter
        return Cost(elements * dtype.itemsize, operations)

    def prepare(self, setting: Setting) -> Case:
        steps = _Steps(self.decoder, self.adapters, self.workload)
        makers: dict[str, Callable[[], Candidate]] = {
            NONE: steps.without,
            BASE_ONLY: partial(steps.base_only, LoRAExt),
            LINEAR_ONLY: partial(steps.base_only, LoRALinear),
        }
        for name, provider in site_providers().items():
            makers[name] = partial(steps.with_lora, provider, self.workload)
        makers[PEFT_MIXED] = partial(steps.peft, mixed=True)
        makers[PEFT_ONE] = partial(steps.peft, mixed=False)
        tolerance = TOLERANCE.get(setting.dtype, FP32_TOLERANCE)
        return Case(makers, steps.error, tolerance, 1)


class _Steps:
    def __init__(self, decoder: Decoder, adapters: Adapters, workload: Workload) -> None:
        self.decoder, self.adapters, self.workload = decoder, adapters, workload
        ids = torch.arange(workload.num_tokens, device=decoder.embedding.device)
        self.ids = ids * 7919 % decoder.model.vocab_size

    def candidate(self, linear: Linear, captured: bool = True, has_lora: bool = True) -> Candidate:
        def result(i: int) -> Tensor:
            logits = self.decoder.step(self.ids, linear).float()
            # A step without adapters is held against a reference of its own.
            return logits if has_lora else logits - self.reference_without + self.reference

        return Candidate(
            lambda i: self.decoder.step(self.ids, linear), result, num_sets=1, captured=captured
        )

    def without(self) -> Candidate:
        return self.candidate(self.decoder.base_linear, has_lora=False)

    def base_only(self, provider_class: type[DenseProvider]) -> Candidate:
        slots = (-1,) * self.workload.num_tokens
        return self.with_lora(provider_class, replace(self.workload, token_slots=slots))

    def with_lora(self, provider_class: type[DenseProvider], workload: Workload) -> Candidate:
        """A provider's adapters at each site; its batch's metadata is shared by the layers."""
        like, sites = self.decoder.embedding, self.decoder.model.sites
        providers = {
            name: provider_class(site, workload, like.device, like.dtype)
            for name, site in sites.items()
        }
        weights = [
            {name: providers[name].load(a, b) for name, (a, b) in layer.items()}
            for layer in self.adapters.layers
        ]

        def linear(layer: int, site: str, x: Tensor) -> Tensor:
            base = self.decoder.weights[layer][site]
            return providers[site].linear(x, base, weights[layer][site])

        return self.candidate(linear, has_lora=bool(workload.tokens_of))

    def peft(self, mixed: bool) -> Candidate:
        """PEFT's layers over views of the base weights; stacked slices are layers of their own."""
        from .peft_layers import adapter_name, add_adapters, require_peft, set_weights

        require_peft()
        if not mixed and len(self.workload.tokens_of) != 1:
            raise Unsupported("PEFT without adapter_names has one adapter for all rows")
        sites = self.decoder.model.sites
        bases = [
            _view_of(weight, columns)
            for layer in self.decoder.weights
            for name, weight in layer.items()
            for columns in sites[name].columns
        ]
        every = iter(add_adapters(bases, self.workload))
        layers: list[dict[str, list[Any]]] = []
        for weights in self.adapters.layers:
            layers.append({})
            for name, (a, b) in weights.items():
                mine = [next(every) for _ in sites[name].columns]
                set_weights(mine, sites[name], self.workload, a, b)
                layers[-1][name] = mine
        options: dict[str, Any] = {}
        if mixed:
            names = [adapter_name(slot) for slot in self.workload.token_slots]
            options = {"adapter_names": names}

        def linear(layer: int, site: str, x: Tensor) -> Tensor:
            parts = [part(x, **options) for part in layers[layer][site]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

        return self.candidate(linear, captured=not mixed)

    @cached_property
    def reference(self) -> Tensor:
        return self.decoder.step(self.ids, self._reference_linear, torch.float32)

    @cached_property
    def reference_without(self) -> Tensor:
        def linear(layer: int, site: str, x: Tensor) -> Tensor:
            return F.linear(x, self.decoder.weights[layer][site].float())

        return self.decoder.step(self.ids, linear, torch.float32)

    def _reference_linear(self, layer: int, site: str, x: Tensor) -> Tensor:
        y = F.linear(x, self.decoder.weights[layer][site].float())
        a, b = self.adapters.layers[layer][site]
        for slot, tokens in self.workload.tokens_of.items():
            rank, rows = self.workload.ranks[slot], torch.tensor(tokens, device=y.device)
            for i, columns in enumerate(self.decoder.model.sites[site].columns):
                down = a[slot, i * rank : (i + 1) * rank].float()
                up = b[slot, columns, :rank].float()
                delta = self.workload.scalings[slot] * (x[rows] @ down.T) @ up.T
                y[rows[:, None], torch.arange(columns.start, columns.stop, device=y.device)] += (
                    delta
                )
        return y

    def error(self, i: int, actual: Tensor) -> float:
        return relative_error(actual, self.reference)


def _view_of(weight: Tensor, rows: slice) -> nn.Linear:
    base = nn.Linear(weight.shape[1], rows.stop - rows.start, bias=False, device="meta")
    base.weight = nn.Parameter(weight[rows], requires_grad=False)
    return base


def step_workloads(batch: int, adapters: Iterable[int], rank: str) -> list[Workload]:
    """The batches of one size: over each number of adapters that it has requests for.

    All have slots for the largest number, so that one set of adapters serves them.
    """
    counts = sorted({min(batch, count) for count in adapters})
    widest = make_workload(batch, max(adapters), rank, "even")
    return [
        replace(make_workload(batch, count, rank, "even"), ranks=widest.ranks) for count in counts
    ]

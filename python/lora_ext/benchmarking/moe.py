"""Problems of mixtures of experts: adapters of w13 and w2, and the routing they share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .case import Candidate, Case, Cost, Setting, Unsupported, relative_error
from .providers import check_grouped_mm, grouped_mm
from .registry import Experts
from .workload import Workload

W13, W2, ALIGN = "w13", "w2", "align"


@dataclass(frozen=True)
class MoeProblem:
    """One stage for tokens that are each routed to top_k experts; ALIGN: the routing itself.

    w13 adds to [T * k, 2 * intermediate] from x [T, hidden], one row per token; w2 adds to
    [T * k, hidden] from [T * k, intermediate], weighted.
    """

    grid: str
    model: str
    experts: Experts
    workload: Workload
    stage: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.stage} {self.workload}"

    @property
    def in_features(self) -> int:
        experts = self.experts
        return experts.intermediate_size if self.stage == W2 else experts.hidden_size

    @property
    def output_slices(self) -> tuple[int, ...]:
        experts = self.experts
        return (experts.hidden_size,) if self.stage == W2 else (experts.intermediate_size,) * 2

    @property
    def columns(self) -> list[slice]:
        """Where each slice goes in a row of y."""
        if self.stage == W2:
            return [slice(0, self.experts.hidden_size)]
        wide = self.experts.intermediate_size
        if self.experts.interleaved:
            return [slice(0, 2 * wide, 2), slice(1, 2 * wide, 2)]
        return [slice(0, wide), slice(wide, 2 * wide)]

    @cached_property
    def topk_ids(self) -> list[list[int]]:
        """Experts of each token: distinct, uniformly drawn."""
        rng = random.Random(self.workload.num_tokens)
        everyone = range(self.experts.num_experts)
        return [rng.sample(everyone, self.experts.top_k) for _ in self.workload.token_slots]

    @cached_property
    def groups(self) -> dict[tuple[int, int], list[int]]:
        """The routed pairs (token * k + choice) of each (slot, expert) in use."""
        groups: dict[tuple[int, int], list[int]] = {}
        for token, slot in enumerate(self.workload.token_slots):
            for choice, expert in enumerate(self.topk_ids[token]):
                if slot >= 0:
                    pair = token * self.experts.top_k + choice
                    groups.setdefault((slot, expert), []).append(pair)
        return groups

    def cost(self, dtype: torch.dtype) -> Cost:
        """Each (adapter, expert) in use once, x once, y read and written once."""
        size, top_k, width = dtype.itemsize, self.experts.top_k, sum(self.output_slices)
        live = sum(slot >= 0 for slot in self.workload.token_slots)
        pairs = live * top_k
        if self.stage == ALIGN:
            tokens = self.workload.num_tokens
            return Cost(4 * (2 * tokens * top_k + tokens), 0)
        cost_bytes = size * ((pairs if self.stage == W2 else live) * self.in_features)
        cost_bytes += size * 2 * pairs * width
        operations = 0
        for (slot, _), members in self.groups.items():
            rank = self.workload.ranks[slot]
            elements = rank * (len(self.output_slices) * self.in_features + width)
            cost_bytes += size * elements
            operations += 2 * len(members) * elements
        return Cost(cost_bytes, operations)

    def prepare(self, setting: Setting) -> Case:
        if self.stage == ALIGN:
            data = MoeData.random(self, setting, 1, 1)
            return Case({"lora_ext": partial(_align, data)}, data.align_error, 1e-9, 1)
        per_expert = len(self.output_slices) * self.in_features + sum(self.output_slices)
        pool = self.workload.num_slots * self.experts.num_experts * self.workload.max_rank
        pool *= per_expert * setting.element_size
        num_sets = setting.sets_for(self.cost(setting.dtype).bytes, 0)
        weight_sets = max(1, min(num_sets, setting.memory_bytes // pool))
        data = MoeData.random(self, setting, num_sets, weight_sets)
        makers: dict[str, Callable[[], Candidate]] = {
            "lora_ext": partial(_own, data),
            "torch_grouped": partial(_grouped, data),
            "torch_loop": partial(_loop, data),
        }
        return Case(makers, data.error, setting.tolerance, num_sets)


@dataclass(frozen=True)
class MoeData:
    """Sets of inputs and outputs, and of weights as far as the memory reaches.

    Where there are fewer sets of weights, later sets use them anew with every expert's number
    shifted, and so touch others of their weights; the mix of adapters and experts stays as it is.
    """

    problem: MoeProblem
    lora_a: Tensor  # [weight sets, L, E, S * R, K], packed
    lora_b: Tensor  # [weight sets, L, E, N, R]
    x: Tensor  # [sets, T or T * k, K]
    y: Tensor  # [sets, T * k, N]
    y0: Tensor
    topk_weights: Tensor  # [T, k] float32

    @classmethod
    def random(
        cls, problem: MoeProblem, setting: Setting, num_sets: int, weight_sets: int
    ) -> MoeData:
        workload, experts = problem.workload, problem.experts

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            out = torch.empty(shape, dtype=setting.dtype, device=setting.device)
            return out.normal_(std=std)

        slots, rank, k = workload.num_slots, workload.max_rank, problem.in_features
        tokens, num_slices = workload.num_tokens, len(problem.output_slices)
        pairs, width = tokens * experts.top_k, sum(problem.output_slices)
        shape = (weight_sets, slots, experts.num_experts)
        lora_a = normal(*shape, num_slices * rank, k, std=k**-0.5)
        lora_b = normal(*shape, width, rank, std=rank**-0.5)
        for slot, own in enumerate(workload.ranks):
            lora_a[:, slot, :, num_slices * own :] = 0
            lora_b[:, slot, :, :, own:] = 0
        y0 = normal(pairs, width)
        x = normal(num_sets, pairs if problem.stage == W2 else tokens, k)
        y = y0.expand(num_sets, -1, -1).contiguous()
        weights = torch.rand(tokens, experts.top_k, device=setting.device) + 0.5
        return cls(problem, lora_a, lora_b, x, y, y0, weights)

    @property
    def num_shifts(self) -> int:
        return -(-len(self.y) // len(self.lora_a))

    def weights(self, i: int) -> tuple[Tensor, Tensor, int]:
        """A and B of set i, and by how much its experts are shifted."""
        j = i % len(self.lora_a)
        return self.lora_a[j], self.lora_b[j], i // len(self.lora_a)

    def shifted(self, expert: int, shift: int) -> int:
        return (expert + shift) % self.problem.experts.num_experts

    def int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.y0.device)

    def rows_of(self, pairs: Tensor) -> Tensor:
        """The rows of x that pairs read."""
        return pairs if self.problem.stage == W2 else pairs // self.problem.experts.top_k

    def weights_of(self, pairs: Tensor) -> Tensor | None:
        """What the delta of each pair is multiplied by, as a column; None: nothing."""
        if self.problem.stage != W2:
            return None
        return self.topk_weights.flatten().index_select(0, pairs)[:, None]

    def error(self, i: int, actual: Tensor) -> float:
        problem, workload = self.problem, self.problem.workload
        lora_a, lora_b, shift = self.weights(i)
        delta = torch.zeros_like(self.y0, dtype=torch.float32)
        for (slot, routed_to), members in problem.groups.items():
            pairs, rank = self.int32(members), workload.ranks[slot]
            x = self.x[i].index_select(0, self.rows_of(pairs)).float()
            expert = self.shifted(routed_to, shift)
            xa = workload.scalings[slot] * x @ lora_a[slot, expert].float().T
            start = 0
            part = torch.zeros(len(members), delta.shape[1], device=delta.device)
            for s, (width, columns) in enumerate(
                zip(problem.output_slices, problem.columns, strict=True)
            ):
                b = lora_b[slot, expert, start : start + width, :rank].float()
                part[:, columns] = xa[:, s * rank : (s + 1) * rank] @ b.T
                start += width
            scale = self.weights_of(pairs)
            delta[pairs.long()] = part if scale is None else part * scale
        return relative_error(actual.float() - self.y0.float(), delta)

    def align_error(self, i: int, actual: Tensor) -> float:
        """The routing's layout is its own: that it is right is seen in what w13 computes."""
        return 0.0


def _candidate(data: MoeData, run: Callable[[int], None]) -> Candidate:
    def result(i: int) -> Tensor:
        data.y[i].copy_(data.y0)
        run(i)
        return data.y[i]

    return Candidate(run, result, len(data.y))


def _op(name: str) -> Any:
    if not hasattr(torch.ops.lora_ext, name):
        raise Unsupported(f"this build has no {name}")
    return getattr(torch.ops.lora_ext, name)


def _routing_args(data: MoeData, shift: int) -> tuple[Tensor, Tensor, int, int]:
    problem = data.problem
    topk_ids = [[data.shifted(expert, shift) for expert in ids] for ids in problem.topk_ids]
    return (
        data.int32(topk_ids),
        data.int32(problem.workload.token_slots),
        problem.workload.num_slots,
        problem.experts.num_experts,
    )


def _align(data: MoeData) -> Candidate:
    args = _routing_args(data, 0)
    routing: Tensor = _op("moe_lora_align")(*args)
    align = _op("moe_lora_align_")

    def result(i: int) -> Tensor:
        align(routing, *args)
        return routing

    return Candidate(result, result, 1)


def _own(data: MoeData) -> Candidate:
    problem, workload = data.problem, data.problem.workload
    apply = _op("moe_lora_apply_")
    align = _op("moe_lora_align")
    routings = [align(*_routing_args(data, shift)) for shift in range(data.num_shifts)]
    ranks = data.int32(workload.ranks)
    scalings = torch.tensor(workload.scalings, device=data.y0.device)
    interleaved = problem.stage == W13 and problem.experts.interleaved
    weights = data.topk_weights if problem.stage == W2 else None

    def run(i: int) -> None:
        lora_a, lora_b, shift = data.weights(i)
        apply(
            data.y[i],
            data.x[i],
            [lora_a],
            [lora_b],
            ranks,
            scalings,
            routings[shift],
            problem.experts.top_k,
            problem.output_slices,
            workload.max_rank,
            column_starts=[0, 1] if interleaved else None,
            column_stride=2 if interleaved else 1,
            topk_weights=weights,
        )

    return _candidate(data, run)


def _grouped(data: MoeData) -> Candidate:
    """Per adapter one grouped GEMM over its experts; pairs gathered by expert, scattered back."""
    problem, workload = data.problem, data.problem.workload
    check_grouped_mm(data.y0.device, data.y0.dtype)
    if len(set(workload.ranks)) > 1:
        raise Unsupported("one rank for all adapters only")
    rank = workload.max_rank
    plans = [
        [_grouped_plan(data, slot, shift) for slot in workload.tokens_of]
        for shift in range(data.num_shifts)
    ]

    def run(i: int) -> None:
        lora_a, lora_b, shift = data.weights(i)
        for slot, pairs, rows, ends, factor in plans[shift]:
            x = data.x[i].index_select(0, rows)
            xa = grouped_mm(x, lora_a[slot].transpose(1, 2), ends)
            start = 0
            for s, (width, columns) in enumerate(
                zip(problem.output_slices, problem.columns, strict=True)
            ):
                b = lora_b[slot, :, start : start + width]
                part = grouped_mm(xa[:, s * rank : (s + 1) * rank], b.transpose(1, 2), ends)
                data.y[i][:, columns].index_add_(0, pairs, part * factor)
                start += width

    return _candidate(data, run)


def _grouped_plan(
    data: MoeData, slot: int, shift: int
) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
    """The pairs of an adapter by expert, their rows of x, where experts end, and the factors."""
    problem = data.problem
    mine: list[list[int]] = [[] for _ in range(problem.experts.num_experts)]
    for (of_slot, expert), members in problem.groups.items():
        if of_slot == slot:
            mine[data.shifted(expert, shift)] = members
    pairs = data.int32([pair for members in mine for pair in members])
    ends = data.int32([len(members) for members in mine]).cumsum(0).int()
    scale = data.weights_of(pairs)
    factor = torch.ones(len(pairs), 1, device=pairs.device) if scale is None else scale
    factor = (factor * problem.workload.scalings[slot]).to(data.y0.dtype)
    return slot, pairs, data.rows_of(pairs), ends, factor


def _loop(data: MoeData) -> Candidate:
    """One (adapter, expert) after the other with torch's matrix products."""
    problem, workload = data.problem, data.problem.workload
    if len(problem.groups) > 512:
        raise Unsupported(f"{len(problem.groups)} pairs of adapter and expert are too many")
    plan = []
    for (slot, expert), members in problem.groups.items():
        pairs = data.int32(members)
        plan.append((slot, expert, pairs, data.rows_of(pairs), data.weights_of(pairs)))

    def run(i: int) -> None:
        lora_a, lora_b, shift = data.weights(i)
        for slot, routed_to, pairs, rows, scale in plan:
            rank, x = workload.ranks[slot], data.x[i].index_select(0, rows)
            height, expert = rank * len(problem.output_slices), data.shifted(routed_to, shift)
            xa = x @ lora_a[slot, expert, :height].T * workload.scalings[slot]
            if scale is not None:
                xa = (xa * scale).to(x.dtype)
            start = 0
            for s, (width, columns) in enumerate(
                zip(problem.output_slices, problem.columns, strict=True)
            ):
                b = lora_b[slot, expert, start : start + width, :rank]
                part = xa[:, s * rank : (s + 1) * rank] @ b.T
                data.y[i][:, columns].index_add_(0, pairs, part)
                start += width

    return _candidate(data, run)

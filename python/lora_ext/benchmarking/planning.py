"""Problems of the batch plan: which token uses which slot, made once per batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops, reference
from ..batch import PlanLayout
from .case import Candidate, Case, Cost, Setting
from .workload import Workload


@dataclass(frozen=True)
class PlanProblem:
    """`plan_batch_` from a batch's requests, given as segments."""

    grid: str
    workload: Workload

    @property
    def name(self) -> str:
        requests = len(self.workload.segments)
        return f"plan T{self.workload.num_tokens} {requests} requests {self.workload.label}"

    def cost(self, dtype: torch.dtype) -> Cost:
        """The plan written once, the segments read once."""
        plan = ops.plan_size(self.workload.num_tokens, self.workload.num_slots)
        return Cost(4 * (plan + 2 * len(self.workload.segments) + 1), 0)

    def prepare(self, setting: Setting) -> Case:
        workload, device = self.workload, setting.device
        lens = [length for length, _ in workload.segments]
        slots = torch.tensor(
            [slot for _, slot in workload.segments], dtype=torch.int32, device=device
        )
        seg_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        num_tokens, num_slots = workload.num_tokens, workload.num_slots
        layout = PlanLayout.of(ops.round_up_tokens(num_tokens), num_slots)
        plan = torch.empty(layout.size, dtype=torch.int32, device=device)

        def own(i: int) -> Tensor:
            ops.plan_batch_(plan, slots, seg_lens, num_slots=num_slots)
            return plan

        def own_result(i: int) -> Tensor:
            own(i)
            sections = (layout.token_slots, layout.permutation)
            return torch.stack([plan[start : start + num_tokens] for start in sections])

        def with_torch(i: int) -> Tensor:
            """The two sections that any provider's kernels need, no tiles."""
            token_slots = slots.repeat_interleave(seg_lens, output_size=num_tokens)
            keys = torch.where(token_slots < 0, num_slots, token_slots)
            in_order, order = keys.sort(stable=True)
            permutation = torch.where(in_order < num_slots, order, -1)
            return torch.stack([token_slots, permutation.int()])

        want = reference.plan(
            [slot for _, slot in workload.segments], num_slots, layout.max_tokens, seg_lens=lens
        ).fields()
        names = ("token_slots", "permutation")
        expected = torch.stack([want[name][:num_tokens] for name in names]).to(device)

        def error(i: int, actual: Tensor) -> float:
            return 0.0 if torch.equal(actual, expected) else float("inf")

        makers = {
            "lora_ext": lambda: Candidate(own, own_result, 1),
            "torch_sort": lambda: Candidate(with_torch, with_torch, 1),
        }
        return Case(makers, error, 1e-9, 1)

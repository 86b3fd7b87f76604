"""Random MoE problems: adapters for each expert, routings, and the oracle's y with its error."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from generators import NAN, generator, randn, random_slots
from lora_ext import ops, reference
from numerics import Expected, assert_close, assert_same_bits, expected_expand, expected_shrink

LAYOUTS = ["packed", "per_slice", "rank_strided"]


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_ids(num_tokens, top_k, num_ids, gen, missing=0.0):
    """Distinct ids per token, as a router gives them; some of them -1."""
    ids = torch.rand(num_tokens, num_ids, generator=gen).argsort(1)[:, :top_k]
    return torch.where(torch.rand(ids.shape, generator=gen) < missing, -1, ids)


@dataclass(frozen=True)
class MoeModule:
    """Adapters A[l][e][i] [r_l, K] and B[l][e][i] [N_i, r_l]; one expert where all share it."""

    a: list[list[list[Tensor]]]
    b: list[list[list[Tensor]]]
    ranks: Tensor
    scalings: Tensor
    num_experts: int
    in_features: int
    output_slices: list[int]
    max_rank: int

    @property
    def num_slots(self):
        return self.ranks.numel()

    def weights(self, layout="packed", place=lambda t: t, expanded=False):
        """(lora_a, lora_b), NaN wherever there is no adapter; shared sides have size 1, or stride 0
        where `expanded`."""
        like, num_slices = self.a[0][0][0], len(self.output_slices)
        experts_a, experts_b = len(self.a[0]), len(self.b[0])

        def pool(*shape):
            return torch.full(shape, NAN, dtype=like.dtype, device=like.device)

        rows = num_slices * self.max_rank
        a = pool(self.num_slots, experts_a, rows, self.in_features)
        b = pool(self.num_slots, experts_b, sum(self.output_slices), self.max_rank)
        for slot, rank in enumerate(self.ranks.tolist()):
            for expert, factors in enumerate(self.a[slot]):
                for i, factor in enumerate(factors):
                    first = i * (rank if layout == "packed" else self.max_rank)
                    a[slot, expert, first : first + rank] = factor
            for expert, factors in enumerate(self.b[slot]):
                b[slot, expert, :, :rank] = torch.cat(factors)
        a, b = place(a), place(b)
        if expanded:
            a = a if experts_a > 1 else a.expand(-1, self.num_experts, -1, -1)
            b = b if experts_b > 1 else b.expand(-1, self.num_experts, -1, -1)
        if layout == "packed":
            return [a], [b]
        list_a = [a[:, :, i * self.max_rank : (i + 1) * self.max_rank] for i in range(num_slices)]
        list_b = list(b.split(self.output_slices, dim=2))
        if layout == "per_slice":
            list_a, list_b = [t.contiguous() for t in list_a], [t.contiguous() for t in list_b]
        return list_a, list_b


def make_moe(
    ranks,
    num_experts,
    in_features,
    output_slices,
    dtype,
    device,
    *,
    max_rank=None,
    shared_a=False,
    shared_b=False,
    seed=0,
):
    """Random adapters; deltas are of the size of y."""
    gen = generator("moe", ranks, num_experts, in_features, output_slices, seed)
    experts_a, experts_b = (1 if shared else num_experts for shared in (shared_a, shared_b))

    def factors(experts, shapes, scale):
        return [
            [randn(shape, dtype, device, gen, scale) for shape in shapes] for _ in range(experts)
        ]

    return MoeModule(
        a=[
            factors(experts_a, [(r, in_features)] * len(output_slices), in_features**-0.5)
            for r in ranks
        ],
        b=[factors(experts_b, [(n, r) for n in output_slices], max(r, 1) ** -0.5) for r in ranks],
        ranks=int32(list(ranks), device),
        scalings=(torch.rand(len(ranks), generator=gen) * 3.75 + 0.25).to(device),
        num_experts=num_experts,
        in_features=in_features,
        output_slices=list(output_slices),
        max_rank=max(1, *ranks) if max_rank is None else max_rank,
    )


@dataclass(frozen=True)
class Routed:
    """A batch with its routing."""

    topk_ids: Tensor
    token_slots: Tensor
    groups: dict[tuple[int, int], list[int]]
    routing: Tensor

    @property
    def num_pairs(self):
        return self.topk_ids.numel()

    @property
    def top_k(self):
        return self.topk_ids.shape[1]


def route(topk_ids, slots, module, device, expert_map=None):
    topk_ids, slots = topk_ids.to(device), int32(slots, device)
    sizes = dict(num_slots=module.num_slots, num_experts=module.num_experts, expert_map=expert_map)
    groups = reference.moe_groups(topk_ids, slots, *sizes.values())
    return Routed(topk_ids, slots, groups, ops.moe_lora_align(topk_ids, slots, **sizes))


def random_batch(num_tokens, top_k, module, device, gen, missing=0.1):
    ids = random_ids(num_tokens, top_k, module.num_experts, gen, missing)
    return route(ids, random_slots(num_tokens, module.num_slots, gen), module, device)


def expected(y, x, module, weights, batch, starts=None, stride=1, topk_weights=None):
    """The oracle's y with the error that is allowed: the dense ops' error model, group by group."""
    lora_a, lora_b = ([t.cpu() for t in side] for side in weights)
    y, x = y.cpu(), x.cpu()
    slices = module.output_slices
    starts = list(accumulate(slices, initial=0))[:-1] if starts is None else starts
    columns = torch.cat([s + stride * torch.arange(n) for s, n in zip(starts, slices, strict=True)])
    value, error = y.double(), torch.zeros(y.shape, dtype=torch.float64)
    repeats = batch.num_pairs // max(x.shape[0], 1)
    ranks, scalings = module.ranks.cpu(), module.scalings.cpu()
    for (slot, expert), pairs in batch.groups.items():
        rows = torch.tensor(pairs)
        slots = torch.full((len(pairs),), slot)
        a, b = (reference.moe.of_expert(side, expert) for side in (lora_a, lora_b))
        xa = expected_shrink(
            x[rows // repeats], a, ranks, scalings, slots, len(slices), module.max_rank
        )
        if topk_weights is not None:
            w = topk_weights.cpu().flatten()[rows].double()[:, None]
            # The weighting is one more rounding of the intermediate.
            eps = torch.finfo(torch.float32 if x.dtype != torch.float64 else x.dtype).eps
            xa = Expected(xa.value * w, (xa.error + eps * xa.value.abs()) * w.abs())
        result = expected_expand(y[rows[:, None], columns], xa, b, ranks, slots, slices)
        if int(ranks[slot]) > 0:
            value[rows[:, None], columns] = result.value
            error[rows[:, None], columns] = result.error
    return Expected(value, error)


def apply_(y, x, module, weights, batch, starts=None, stride=1, topk_weights=None):
    ops.moe_lora_apply_(
        y,
        x,
        *weights,
        module.ranks,
        module.scalings,
        batch.routing,
        top_k=batch.top_k,
        output_slices=module.output_slices,
        max_rank=module.max_rank,
        column_starts=starts,
        column_stride=stride,
        topk_weights=topk_weights,
    )


def check_apply(y, x, module, batch, layout="packed", expanded=False, weights=None, **options):
    """Runs the op on y and compares with the oracle; what no pair adds to keeps its bits."""
    weights = module.weights(layout, expanded=expanded) if weights is None else weights
    before = y.clone()
    flat = y.reshape(batch.num_pairs, y.shape[-1])
    want = expected(flat, x, module, weights, batch, **options)
    apply_(y, x, module, weights, batch, **options)
    got = y.reshape(batch.num_pairs, y.shape[-1]).cpu()
    assert_close(got, want)
    idle = want.error == 0
    assert_same_bits(got[idle], before.reshape(got.shape).cpu()[idle])
    return y


def tensors(module, batch, per_pair, gen, y_dtype=None, columns=None):
    """(y, x) for a batch."""
    dtype, device = module.a[0][0][0].dtype, module.ranks.device
    rows = batch.num_pairs if per_pair else batch.topk_ids.shape[0]
    columns = sum(module.output_slices) if columns is None else columns
    x = randn((rows, module.in_features), dtype, device, gen)
    y = randn((batch.num_pairs, columns), dtype if y_dtype is None else y_dtype, device, gen)
    return y, x

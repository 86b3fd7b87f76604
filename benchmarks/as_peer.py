"""lora_ext as one more column of a harness that times engines' LoRA kernels side by side.

The harness runs this file with ``P`` (its peer classes) and ``bench`` as globals.
"""

# ruff: noqa: F821
import torch

from lora_ext import ops


def make_plan(slots, num_slots, device):
    """The batch plan for per-token slots."""
    plan = torch.empty(ops.plan_size(len(slots), num_slots), dtype=torch.int32, device=device)
    ops.plan_batch_(
        plan, torch.tensor(slots, dtype=torch.int32, device=device), num_slots=num_slots
    )
    return plan


class LoraExt(P.Peer):
    name = "lora_ext"

    def prepare(self):
        p = self.p
        self.plan = make_plan(p.slots, p.L, P.DEV)
        self.ranks, self.scalings = P.T32(p.ranks), torch.tensor(p.scalings, device=P.DEV)

    def shrink(self, i):
        p = self.p
        return ops.lora_shrink(
            self.x[i],
            [self.A[i]],
            self.ranks,
            self.scalings,
            self.plan,
            num_slices=p.S,
            max_rank=p.R,
        )

    def expand(self, i, xa):
        p = self.p
        ops.lora_expand_(
            self.y[i], xa, [self.B[i]], self.ranks, self.plan, output_slices=p.slices, max_rank=p.R
        )

    def run(self, i):
        p = self.p
        ops.lora_apply_(
            self.y[i],
            self.x[i],
            [self.A[i]],
            [self.B[i]],
            self.ranks,
            self.scalings,
            self.plan,
            output_slices=p.slices,
            max_rank=p.R,
        )
        return self.y[i]


class EmbedLoraExt(P.EmbedPeer):
    dense = LoraExt

    def bind(self, d):
        super().bind(d)
        # A vocabulary-major, as a pool of this library keeps it, seen as [L, R, V].
        self.A = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in self.w.A]

    def shrink(self, i):
        return ops.lora_embedding(
            self.ids[i], self.A[i % self.w.n], self.d.ranks, self.d.scalings, self.d.plan
        )

    def run(self, i):
        d = self.d
        ops.lora_embedding_apply_(
            self.y[i], self.ids[i], self.A[i % self.w.n], d.B[i], d.ranks, d.scalings, d.plan
        )
        return self.y[i]


class MoeLoraExt(P.MoePeer):
    """Gate/up and down; as for all peers here, the routing is made outside the timed region."""

    name = "lora_ext"

    def setup(self):
        p = self.p
        self.routing = [
            ops.moe_lora_align(ids, slots, num_slots=p.L, num_experts=p.E)
            for ids, slots in zip(self.ids, self.slots, strict=True)
        ]
        self.ranks, self.scalings = P.T32([p.R] * p.L), torch.ones(p.L, device=P.DEV)

    def apply(self, i, y, x, lora_a, lora_b, slices, topk_weights=None):
        p = self.p
        ops.moe_lora_apply_(
            y,
            x,
            [lora_a],
            [lora_b],
            self.ranks,
            self.scalings,
            self.routing[i],
            top_k=p.top_k,
            output_slices=slices,
            max_rank=p.R,
            topk_weights=topk_weights,
        )
        return y

    def w13(self, i):
        j, x, _, y, _ = self.io(i)
        return self.apply(i, y, x, self.w.A13[j], self.w.B13[j], [self.p.I] * 2)

    def w2(self, i):
        j, _, act, _, y = self.io(i)
        return self.apply(i, y, act, self.w.A2[j], self.w.B2[j], [self.p.H], self.topw)


def moe_metadata_calls(p, peers=P.moe_metadata_calls):
    """The peers' kernels of this kind, and moe_lora_align, which each layer runs once."""
    calls = peers(p)
    ids, slots = P.T32(p.topk[0]), P.T32(p.slots[0])
    sizes = dict(num_slots=p.L, num_experts=p.E)
    routing = ops.moe_lora_align(ids, slots, **sizes)
    calls["lora_ext"] = lambda i: ops.moe_lora_align_(routing, ids, slots, **sizes)
    return calls


P.moe_metadata_calls = moe_metadata_calls
P.DENSE.append(LoraExt)
P.MOE.append(MoeLoraExt)
P.EMBED.append(EmbedLoraExt)

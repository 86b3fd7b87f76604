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


P.DENSE.append(LoraExt)
P.EMBED.append(EmbedLoraExt)

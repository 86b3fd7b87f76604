"""Who applies adapters to a linear layer: lora_ext and what torch and PEFT offer.

Every provider reads the same weights, canonically in lora_ext's packed layout (see
`lora_ext.ops`), and may bring them into its own beforehand; what it prepares once per batch is not
timed either. ``engines`` adds those of inference engines.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .case import Unsupported
from .registry import Site
from .workload import Workload


class DenseProvider:
    """Adds ``scaling (x A^T) B^T`` to y in place, for one batch over layers of one shape.

    Raises `Unsupported` where it cannot.
    """

    name: ClassVar[str]
    captured: ClassVar[bool] = True
    max_sets: ClassVar[int | None] = None

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.site = site
        self.workload = workload
        self.device = device
        self.dtype = dtype

    def load(self, lora_a: Tensor, lora_b: Tensor) -> Any:
        """Bring A ``[L, S * R, K]`` and B ``[L, N, R]``, packed, into the provider's layout."""
        return lora_a, lora_b

    def shrink(self, x: Tensor, weights: Any) -> Any:
        raise Unsupported("does both halves at once")

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        raise Unsupported("does both halves at once")

    def apply(self, y: Tensor, x: Tensor, weights: Any) -> None:
        self.expand(y, self.shrink(x, weights), weights)

    def linear(self, x: Tensor, weight: Tensor, weights: Any) -> Tensor:
        """The whole site: the base product with ``weight [N, K]``, and the adapters."""
        y = F.linear(x, weight)
        self.apply(y, x, weights)
        return y

    def int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


class LoRAExt(DenseProvider):
    """This library: `lora_apply_`, or its two halves."""

    name = "lora_ext"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, workload, device, dtype)
        self.plan = make_plan(workload, device)
        self.ranks = self.int32(workload.ranks)
        self.scalings = torch.tensor(workload.scalings, device=device)

    def shrink(self, x: Tensor, weights: Any) -> Tensor:
        return ops.lora_shrink(
            x,
            [weights[0]],
            self.ranks,
            self.scalings,
            self.plan,
            num_slices=self.site.num_slices,
            max_rank=self.workload.max_rank,
        )

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        ops.lora_expand_(
            y,
            xa,
            [weights[1]],
            self.ranks,
            self.plan,
            output_slices=self.site.output_slices,
            max_rank=self.workload.max_rank,
        )

    def apply(self, y: Tensor, x: Tensor, weights: Any) -> None:
        ops.lora_apply_(
            y,
            x,
            [weights[0]],
            [weights[1]],
            self.ranks,
            self.scalings,
            self.plan,
            output_slices=self.site.output_slices,
            max_rank=self.workload.max_rank,
        )


class LoRALinear(LoRAExt):
    """This library's operator for base product and adapters together, for whole sites."""

    name = "lora_linear"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        if not hasattr(torch.ops.lora_ext, "lora_linear"):
            raise Unsupported("this build has no lora_linear")
        super().__init__(site, workload, device, dtype)

    def linear(self, x: Tensor, weight: Tensor, weights: Any) -> Tensor:
        y: Tensor = torch.ops.lora_ext.lora_linear(
            x,
            weight,
            None,
            [weights[0]],
            [weights[1]],
            self.ranks,
            self.scalings,
            self.plan,
            self.site.output_slices,
            self.workload.max_rank,
        )
        return y


class LoRAForked(LoRAExt):
    """This library's adapters around a base product that it does not see, for whole sites."""

    name = "lora_forked"

    def linear(self, x: Tensor, weight: Tensor, weights: Any) -> Tensor:
        rest = (self.ranks, self.scalings, self.plan)
        slices, max_rank = self.site.output_slices, self.workload.max_rank
        a, b = [weights[0]], [weights[1]]
        forked = ops.lora_fork(x, a, *rest, output_slices=slices, max_rank=max_rank)
        y = torch.mm(x, weight.T)
        ops.lora_join_(y, forked, x, a, b, *rest, output_slices=slices, max_rank=max_rank)
        return y


class TorchLoop(DenseProvider):
    """One adapter after the other with torch's matrix products (cuBLAS on a GPU).

    Tokens of an adapter that lie together are used in place, others gathered and scattered.
    """

    name = "torch_loop"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, workload, device, dtype)
        self.groups: list[tuple[int, slice | Tensor]] = []
        for slot, tokens in workload.tokens_of.items():
            together = tokens[-1] - tokens[0] + 1 == len(tokens)
            rows = slice(tokens[0], tokens[-1] + 1) if together else self.int32(tokens)
            self.groups.append((slot, rows))

    def shrink(self, x: Tensor, weights: Any) -> list[Tensor]:
        results = []
        for slot, rows in self.groups:
            picked = x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
            height = self.site.num_slices * self.workload.ranks[slot]
            results.append(torch.mm(picked, weights[0][slot, :height].T))
        return results

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        for (slot, rows), part in zip(self.groups, xa, strict=True):
            rank, scaling = self.workload.ranks[slot], self.workload.scalings[slot]
            in_place = isinstance(rows, slice)
            out = y[rows] if in_place else y.new_empty(part.shape[0], self.site.out_features)
            for i, columns in enumerate(self.site.columns):
                left = part[:, i * rank : (i + 1) * rank]
                right = weights[1][slot, columns, :rank].T
                target = out[:, columns]
                torch.addmm(target, left, right, beta=in_place, alpha=scaling, out=target)
            if isinstance(rows, Tensor):
                y[:, : self.site.out_features].index_add_(0, rows, out)


class TorchGrouped(DenseProvider):
    """torch's grouped GEMM over all slots at once, tokens sorted by adapter."""

    name = "torch_grouped"

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, workload, device, dtype)
        check_grouped_mm(device, dtype)
        tokens = [token for group in workload.tokens_of.values() for token in group]
        counts = [len(workload.tokens_of.get(slot, ())) for slot in range(workload.num_slots)]
        self.ends = self.int32(list(accumulate(counts)))
        in_order = tokens == list(range(workload.num_tokens))
        self.tokens = None if in_order else self.int32(tokens)

    def load(self, lora_a: Tensor, lora_b: Tensor) -> Any:
        scalings = torch.tensor(self.workload.scalings, dtype=lora_b.dtype, device=lora_b.device)
        return unpack_a(lora_a, self.site, self.workload), lora_b * scalings[:, None, None]

    def shrink(self, x: Tensor, weights: Any) -> Tensor:
        picked = x if self.tokens is None else x.index_select(0, self.tokens)
        return grouped_mm(picked, weights[0].transpose(1, 2), self.ends)

    def expand(self, y: Tensor, xa: Any, weights: Any) -> None:
        rank = self.workload.max_rank
        for i, columns in enumerate(self.site.columns):
            left = xa[:, i * rank : (i + 1) * rank]
            delta = grouped_mm(left, weights[1][:, columns].transpose(1, 2), self.ends)
            if self.tokens is None:
                y[:, columns].add_(delta)
            else:
                y[:, columns].index_add_(0, self.tokens, delta)


class Peft(DenseProvider):
    """PEFT's linear layers with ``adapter_names``, its way to mix adapters in one batch.

    Runs eagerly: it copies index lists to the device in every call. Stacked slices are layers of
    their own, as in PEFT's models.
    """

    name = "peft"
    captured = False
    max_sets = 2  # a set takes a module per adapter and slice, and the host is what limits it

    def __init__(
        self, site: Site, workload: Workload, device: torch.device, dtype: torch.dtype
    ) -> None:
        from .peft_layers import adapter_name, require_peft

        require_peft()
        if not workload.tokens_of:
            raise Unsupported("has no LoRA layers where no adapter is in use")
        super().__init__(site, workload, device, dtype)
        self.names = [adapter_name(slot) for slot in workload.token_slots]

    def load(self, lora_a: Tensor, lora_b: Tensor) -> Any:
        from .peft_layers import GivenOutput, add_adapters, set_weights

        bases = [GivenOutput(self.site.in_features, n) for n in self.site.output_slices]
        layers = add_adapters(bases, self.workload)
        set_weights(layers, self.site, self.workload, lora_a, lora_b)
        return layers, bases

    def apply(self, y: Tensor, x: Tensor, weights: Any) -> None:
        for layer, base, columns in zip(*weights, self.site.columns, strict=True):
            base.output = y[:, columns]
            result = layer(x, adapter_names=self.names)
            if result is not base.output:
                base.output.copy_(result)


TORCH_PROVIDERS: tuple[type[DenseProvider], ...] = (LoRAExt, TorchLoop, TorchGrouped, Peft)


def dense_providers() -> dict[str, type[DenseProvider]]:
    """All providers by name; one that is not installed says so when it is made."""
    from .engines import ENGINE_PROVIDERS

    return {provider.name: provider for provider in (*TORCH_PROVIDERS, *ENGINE_PROVIDERS)}


def site_providers() -> dict[str, type[DenseProvider]]:
    """Those that can stand behind or take over a base product inside a model."""
    after = {name: provider for name, provider in dense_providers().items() if name != Peft.name}
    return {LoRALinear.name: LoRALinear, LoRAForked.name: LoRAForked, **after}


def make_plan(workload: Workload, device: torch.device) -> Tensor:
    """The batch plan of a workload."""
    size = ops.plan_size(workload.num_tokens, workload.num_slots)
    plan = torch.empty(size, dtype=torch.int32, device=device)
    slots = torch.tensor(workload.token_slots, dtype=torch.int32, device=device)
    ops.plan_batch_(plan, slots, num_slots=workload.num_slots)
    return plan


def unpack_a(lora_a: Tensor, site: Site, workload: Workload) -> Tensor:
    """A with slice i of every slot at rows ``i * R``, zeros behind each rank.

    Where all ranks are R that is ``lora_a`` itself.
    """
    top = workload.max_rank
    if all(rank == top for rank in workload.ranks):
        return lora_a
    spaced = torch.zeros_like(lora_a)
    for slot, rank in enumerate(workload.ranks):
        for i in range(site.num_slices):
            rows = lora_a[slot, i * rank : (i + 1) * rank]
            spaced[slot, i * top : i * top + rank] = rows
    return spaced


def check_grouped_mm(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise Unsupported("torch._grouped_mm needs compute capability 8.0")
    if dtype != torch.bfloat16:
        raise Unsupported("torch._grouped_mm takes bfloat16 alone")


def grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Rows of ``left`` up to ``ends[g]``, from the group before, times ``right[g]``."""
    result: Tensor = torch._grouped_mm(left, right, offs=ends)
    return result

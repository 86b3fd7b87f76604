"""LoRAModule: a base module with the adapters of all slots beside it, at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .routing import Routing

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LoRAModule(nn.Module):
    """What the layers have in common: slots, their ranks and scalings, and the routing.

    Args:
        base: the module that stays in force; its parameters are shared, not copied.
        in_features: K, columns of an adapter's A.
        out_features: N, rows of an adapter's B.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.

    Attributes:
        lora_a, lora_b: the weights of all slots, in the dtype and on the device of the base weight.
        ranks: int32 ``[L]``; 0: the slot has no adapter here.
        scalings: fp32 ``[L]``.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: Tensor
    scalings: Tensor

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        num_slots: int,
        max_rank: int,
        routing: Routing | None,
    ) -> None:
        super().__init__()
        weight = base.weight
        if not isinstance(weight, Tensor) or weight.dtype not in SUPPORTED_DTYPES:
            dtype = getattr(weight, "dtype", None)
            raise ValueError(
                f"{type(base).__name__} has weights of {dtype}, expected one of {SUPPORTED_DTYPES}"
            )
        if num_slots < 1 or max_rank < 1:
            raise ValueError(
                f"expected num_slots >= 1 and max_rank >= 1, got {num_slots} and {max_rank}"
            )
        self.base = base
        self.in_features = in_features
        self.out_features = out_features
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.routing = routing if routing is not None else Routing()
        self._slots_in_use: set[int] = set()
        with torch.inference_mode(False):
            lora_a = torch.zeros(self._shape_a(), dtype=weight.dtype, device=weight.device)
            lora_b = torch.zeros(
                (num_slots, out_features, max_rank), dtype=weight.dtype, device=weight.device
            )
            ranks = torch.zeros(num_slots, dtype=torch.int32, device=weight.device)
            scalings = torch.zeros(num_slots, dtype=torch.float32, device=weight.device)
        self.register_buffer("lora_a", lora_a, persistent=False)
        self.register_buffer("lora_b", lora_b, persistent=False)
        self.register_buffer("ranks", ranks, persistent=False)
        self.register_buffer("scalings", scalings, persistent=False)

    def _shape_a(self) -> tuple[int, int, int]:
        return (self.num_slots, self.max_rank, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The base module's weight, which code around a layer may look at."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def write_slot(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy an adapter's A ``[r, K]`` and B ``[N, r]`` into a slot, which must have rank 0."""
        rank = lora_a.shape[0]
        self.lora_a[slot, :rank].copy_(lora_a)
        self.lora_b[slot, :, :rank].copy_(lora_b)

    @torch.no_grad()
    def set_slot(self, slot: int, rank: int, scaling: float) -> None:
        """Put what a slot holds in force: its first ``rank`` rows; rank 0 takes it out."""
        self.scalings[slot] = scaling
        self.ranks[slot] = rank
        if rank:
            self._slots_in_use.add(slot)
        else:
            self._slots_in_use.discard(slot)

    def _plan(self, shape: torch.Size) -> Tensor | None:
        """Return the plan for an input of ``shape`` ``[rows, tokens]``; None: nothing to add."""
        source = self.routing.source
        if source is None or not (self._slots_in_use or source.static):
            return None
        return source.plan(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAModule:
        scalings = self.scalings
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Scalings stay fp32 when a model is moved to another dtype.
        self.scalings = scalings.to(self.ranks.device)
        return self


def require_inference(y: Tensor) -> None:
    """Raise where adding in place would give wrong gradients without a word."""
    if y.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "lora_ext's layers add adapters in place and are for inference: call the model under "
            "torch.no_grad() or torch.inference_mode(); for training use lora_ext.ops.lora_apply"
        )

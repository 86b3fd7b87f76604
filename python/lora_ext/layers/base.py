"""LoRAModule: a base module with the adapters of all slots beside it, at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..ops import records_grad
from .routing import BatchPlan, Routing, RowPlans
from .sharding import Shard, TensorParallel, cut_rows

if TYPE_CHECKING:
    from ..adapters import LoRAWeights

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Layer = TypeVar("Layer", bound="LoRAModule")


@dataclass(frozen=True)
class LoRASlice:
    """One projection of a layer in which several are stacked; None: all of them."""

    layer: LoRAModule
    index: int | None


class LoRAModule(nn.Module):
    """What the layers have in common: slots, their ranks and scalings, shards and the routing.

    A layer may be stacked, several slices of output features side by side (gate and up), and it may
    hold a part of each: A is cut along its columns as ``inputs`` says, B along the rows of each
    slice as ``outputs`` says. Adapters are always given whole.

    Args:
        base: the module that stays in force; its parameters are shared, not copied.
        inputs: which of the K columns of an adapter's A are here.
        outputs: for each slice, which of the N_i rows of an adapter's B are here.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        parallel: the processes that hold the other parts; None: there are none.

    Attributes:
        in_features, out_features: columns of A and rows of B that are here.
        lora_a, lora_b: the weights of all slots, in the dtype and on the device of the base weight:
            ``[L, S * R, in_features]`` with slice i of a slot of rank r in rows ``i * r`` and
            following, and ``[L, out_features, R]``.
        ranks: int32 ``[L]``; 0: the slot has no adapter here.
        scalings: fp32 ``[L]``.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: Tensor
    scalings: Tensor
    _whole_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        base: nn.Module,
        inputs: Shard,
        outputs: Sequence[Shard],
        num_slots: int,
        max_rank: int,
        routing: Routing | None,
        parallel: TensorParallel | None = None,
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
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.in_features = inputs.size
        self.output_sizes = [shard.size for shard in outputs]
        self.out_features = sum(self.output_sizes)
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.parallel = parallel if parallel is not None else TensorParallel(None)
        self.routing = routing if routing is not None else Routing()
        self._slots_in_use: set[int] = set()
        with torch.inference_mode(False):
            lora_a = torch.zeros(self._shape_a(), dtype=weight.dtype, device=weight.device)
            lora_b = torch.zeros(self._shape_b(), dtype=weight.dtype, device=weight.device)
            ranks = torch.zeros(num_slots, dtype=torch.int32, device=weight.device)
            scalings = torch.zeros(num_slots, dtype=torch.float32, device=weight.device)
        self.register_buffer("lora_a", lora_a, persistent=False)
        self.register_buffer("lora_b", lora_b, persistent=False)
        self.register_buffer("ranks", ranks, persistent=False)
        self.register_buffer("scalings", scalings, persistent=False)

    @classmethod
    def from_full(
        cls: type[Layer],
        full: nn.Module,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        **layout: Any,
    ) -> Layer:
        """Make the layer from a whole base module, of which it holds a copy of this rank's part.

        Args:
            full: the same on all ranks.
            num_slots, max_rank, routing, layout: as the class has them, the sizes of the whole
                being those of ``full``.

        Raises:
            ValueError: as the class, or ``full`` is of a type that only its author can cut.
        """
        if type(full) is not cls._whole_type:
            raise ValueError(
                f"from_full cuts nn.{cls._whole_type.__name__}, got {type(full).__name__}: cut it "
                "yourself, and give the shard as base"
            )
        base, layout = cls._cut(full, **layout)
        make: Callable[..., Layer] = cls
        return make(base, num_slots, max_rank, routing, **layout)

    @classmethod
    def _cut(cls, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Return this rank's shard of a whole base module, and the layer's keyword arguments."""
        raise NotImplementedError(f"{cls.__name__} does not cut its base module")

    def _shape_a(self) -> tuple[int, ...]:
        return (self.num_slots, len(self.outputs) * self.max_rank, self.in_features)

    def _shape_b(self) -> tuple[int, ...]:
        return (self.num_slots, self.out_features, self.max_rank)

    @property
    def weight(self) -> Tensor:
        """The base module's weight, which code around a layer may look at."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def slices(self) -> tuple[LoRASlice, ...]:
        """Each slice by itself: what an AdapterPool gives the name of its projection."""
        return tuple(LoRASlice(self, i) for i in range(len(self.outputs)))

    def expand(self, weights: LoRAWeights) -> LoRAWeights:
        """Return an adapter in the form of this layer.

        Raises:
            ValueError: it is for another kind of layer.
        """
        if weights.lora_a.dim() != 2:
            raise ValueError(f"A is {list(weights.lora_a.shape)}, the model has no experts here")
        return weights

    def split_rows(self, lora_b: Tensor) -> Sequence[Tensor]:
        """Return the rows of each slice of a whole B of all of them."""
        return torch.split(lora_b, [shard.full for shard in self.outputs], dim=-2)

    def check_sizes(self, lora_a: Tensor, lora_b: Tensor, index: int | None = None) -> None:
        """Check an adapter's whole A ``[r, K]`` and B ``[N, r]`` against one slice, or all of them.

        Raises:
            ValueError: they have other sizes.
        """
        widths = self._widths_of_a()
        if lora_a.shape[1] not in widths:
            wanted = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
            raise ValueError(
                f"A is {list(lora_a.shape)}, the model needs [{lora_a.shape[0]}, {wanted}]"
            )
        chosen = self.outputs if index is None else (self.outputs[index],)
        rows = sum(shard.full for shard in chosen)
        if lora_b.shape[0] != rows:
            raise ValueError(
                f"B is {list(lora_b.shape)}, the model needs [{rows}, {lora_b.shape[1]}]"
            )

    def _widths_of_a(self) -> range:
        return range(self.inputs.full, self.inputs.full + 1)

    def shard(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of an adapter's whole A ``[S * r, K]`` and B ``[sum N_i, r]``.

        Raises:
            ValueError: they have other sizes, or a rank above R.
        """
        self.check_sizes(lora_a, lora_b)
        num_slices, rank = len(self.outputs), lora_b.shape[1]
        if lora_a.shape[0] != num_slices * rank or rank > self.max_rank:
            raise ValueError(
                f"A has {lora_a.shape[0]} rows for {num_slices} slices and B of rank {rank}, "
                f"expected {num_slices} * r and r with r <= {self.max_rank}"
            )
        return self._cut_a(lora_a), cut_rows(lora_b, self.outputs)

    def _cut_a(self, lora_a: Tensor) -> Tensor:
        return self.inputs.of(lora_a, 1)

    def write_slot(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy this rank's part of an adapter into a slot, which must have rank 0.

        Args:
            slot: where to.
            lora_a: whole, ``[S * r, K]`` with slice i in rows ``i * r`` and following.
            lora_b: whole, ``[sum N_i, r]``.

        Raises:
            ValueError: as ``shard``; the slot is as it was.
        """
        self.write_shard(slot, *self.shard(lora_a, lora_b))

    @torch.no_grad()
    def write_shard(self, slot: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Copy what ``shard`` returned into a slot, which must have rank 0."""
        rank = lora_b.shape[1]
        self.lora_a[slot, : len(self.outputs) * rank].copy_(lora_a)
        self.lora_b[slot, :, :rank].copy_(lora_b)

    def has_base_weight(self, given: Tensor) -> bool:
        """Whether a whole base weight is the one in force; asks all ranks, so all must call it."""
        part = self._part_of_base(given)
        same = part is not None and _equal(self.weight.detach()[: len(part)], part)
        return self.parallel.all_agree(same)

    def _part_of_base(self, given: Tensor) -> Tensor | None:
        """Return this rank's part of a whole base weight; None where it is of another shape."""
        if given.shape != (sum(shard.full for shard in self.outputs), self.inputs.full):
            return None
        return self.inputs.of(cut_rows(given, self.outputs), 1)

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
        return self._plan_from(source, shape)

    def _plan_from(self, source: RowPlans | BatchPlan, shape: torch.Size) -> Tensor | None:
        return source.plan(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAModule:
        scalings = self.scalings
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Scalings stay fp32 when a model is moved to another dtype.
        self.scalings = scalings.to(self.ranks.device)
        return self


def require_inference(*tensors: Tensor) -> None:
    """Raise where adding in place would give wrong gradients without a word."""
    if records_grad(*tensors):
        raise RuntimeError(
            "embeddings and expert layers add adapters in place and are for inference, but what "
            "they add to, or their adapters, requires grad: freeze it, or call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )


def _equal(own: Tensor, given: Tensor) -> bool:
    given = given.to(own.device)
    # Either may have been stored with fewer digits.
    return torch.equal(own, given.to(own.dtype)) or torch.equal(own.to(given.dtype), given)

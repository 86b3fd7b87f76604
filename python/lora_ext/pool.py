"""AdapterPool: adapters by name in the slots of a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, AdapterError, LoRAWeights
from .layers import LoRAEmbedding, LoRAModule


class AdapterInfo(NamedTuple):
    """What is known of a loaded adapter.

    Attributes:
        slot: its slot in every layer.
        rank: the highest rank of its modules.
        num_modules: modules that it adapts.
        num_bytes: bytes of its weights in the layers' dtype.
        in_use: whether a batch that uses it is running.
        num_batches: batches that used it since its name was loaded; replacing does not reset it.
        num_rows: rows of those batches that used it.
    """

    slot: int
    rank: int
    num_modules: int
    num_bytes: int
    in_use: bool
    num_batches: int
    num_rows: int


@dataclass
class _Entry:
    slot: int
    rank: int = 0
    num_modules: int = 0
    num_bytes: int = 0
    last_used: int = 0
    users: int = 0
    num_batches: int = 0
    num_rows: int = 0


class UnknownAdapterError(KeyError):
    """No adapter of this name is loaded; the message names those that are."""

    def __str__(self) -> str:
        return str(self.args[0])


class _Staged(NamedTuple):
    """One module's weights in the dtype and on the device of its layer."""

    module: LoRAModule
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class AdapterPool:
    """Loads adapters into the slots of layers, which share the number of slots and the rank limit.

    An adapter is checked against all layers, and brought to their device and dtype, before anything
    is written; while its slot is written, the slot has rank 0 in every layer. Loading and removing
    are ordered with the layers' work by the current stream, and may happen between two forwards.

    Args:
        modules: layer by the name of its base module in the model, the name adapters use.
        evict_lru: where all slots are taken, drop the adapter unused for longest rather than raise.
            Adapters of a running batch are never dropped.

    Raises:
        ValueError: there are no layers, or they differ in slots or rank limit.
    """

    def __init__(self, modules: Mapping[str, LoRAModule], *, evict_lru: bool = False) -> None:
        limits = {(module.num_slots, module.max_rank) for module in modules.values()}
        if len(limits) != 1:
            raise ValueError(
                f"expected layers of one (num_slots, max_rank), got {sorted(limits) or 'no layers'}"
            )
        (self.max_adapters, self.max_rank) = limits.pop()
        self.evict_lru = evict_lru
        self._modules = dict(modules)
        self._entries: dict[str, _Entry] = {}
        self._clock = count()
        self._lock = RLock()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, in the order of loading."""
        with self._lock:
            return {
                name: AdapterInfo(
                    slot=entry.slot,
                    rank=entry.rank,
                    num_modules=entry.num_modules,
                    num_bytes=entry.num_bytes,
                    in_use=entry.users > 0,
                    num_batches=entry.num_batches,
                    num_rows=entry.num_rows,
                )
                for name, entry in self._entries.items()
            }

    def load(self, name: str, adapter: Adapter, *, replace: bool = False) -> int:
        """Put an adapter into a slot and return the slot.

        A name that is loaded keeps its slot when it is replaced, also while a batch uses it: the
        next forward has the new weights.

        Raises:
            AdapterError: the adapter does not fit the layers.
            ValueError: the name is taken and ``replace`` is False, or it is no name.
            RuntimeError: all slots are taken, and none may be evicted.
            In each case all adapters are as they were.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"an adapter's name must be a non-empty string, got {name!r}")
        with self._lock:
            old = self._entries.get(name)
            if old is not None and not replace:
                raise ValueError(f"adapter {name!r} is loaded already; replace=True replaces it")
            staged = self._stage(adapter)
            slot = old.slot if old is not None else self._free_slot()
            entry = old if old is not None else _Entry(slot)
            self._write(entry, staged)
            entry.last_used = next(self._clock)
            self._entries[name] = entry
            return slot

    def remove(self, name: str) -> None:
        """Free an adapter's slot.

        Raises:
            UnknownAdapterError: no adapter of this name is loaded.
            RuntimeError: a running batch uses it.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.users:
                raise RuntimeError(f"adapter {name!r} is in use by a running batch")
            self._clear(entry.slot)
            del self._entries[name]

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[list[int]]:
        """Keep the adapters of a batch in their slots inside a ``with`` block; count their use.

        Args:
            names: adapter per row; None: no adapter.

        Yields:
            The slot per row, -1 for none.

        Raises:
            UnknownAdapterError: a name is not loaded.
        """
        with self._lock:
            slots = [-1 if name is None else self._entry(name).slot for name in names]
            used = {name: names.count(name) for name in names if name is not None}
            for name, rows in used.items():
                entry = self._entries[name]
                entry.users += 1
                entry.num_batches += 1
                entry.num_rows += rows
                entry.last_used = next(self._clock)
        try:
            yield slots
        finally:
            with self._lock:
                for name in used:
                    self._entries[name].users -= 1

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            loaded = ", ".join(map(repr, self._entries)) or "none"
            raise UnknownAdapterError(f"no adapter named {name!r} is loaded; loaded: {loaded}")
        return entry

    def _free_slot(self) -> int:
        taken = {entry.slot for entry in self._entries.values()}
        for slot in range(self.max_adapters):
            if slot not in taken:
                return slot
        idle = [name for name, entry in self._entries.items() if not entry.users]
        if not self.evict_lru or not idle:
            why = "all of them are in use" if self.evict_lru else "remove one first"
            raise RuntimeError(
                f"all {self.max_adapters} slots are taken, by "
                f"{', '.join(map(repr, self._entries))}: {why}"
            )
        oldest = min(idle, key=lambda name: self._entries[name].last_used)
        return self._entries.pop(oldest).slot

    def _write(self, entry: _Entry, staged: Sequence[_Staged]) -> None:
        """Fill a slot; should the device fail on the way, the slot is left without an adapter."""
        entry.rank = entry.num_modules = entry.num_bytes = 0
        self._clear(entry.slot)
        try:
            for part in staged:
                part.module.write_slot(entry.slot, part.lora_a, part.lora_b)
            for part in staged:
                part.module.set_slot(entry.slot, part.lora_a.shape[0], part.scaling)
        except BaseException:
            self._clear(entry.slot)
            raise
        entry.rank = max(part.lora_a.shape[0] for part in staged)
        entry.num_modules = len(staged)
        entry.num_bytes = sum(part.lora_a.nbytes + part.lora_b.nbytes for part in staged)

    def _clear(self, slot: int) -> None:
        for module in self._modules.values():
            module.set_slot(slot, 0, 0.0)

    def _stage(self, adapter: Adapter) -> list[_Staged]:
        """Check the whole adapter and bring it to the layers' device and dtype; writes nothing."""
        for name, weights in adapter.modules.items():
            self._check(adapter.source, name, weights)
        for name, tensor in adapter.base_weights.items():
            self._check_base_weight(adapter.source, name, tensor)
        staged = []
        for name, weights in adapter.modules.items():
            module = self._modules[name]
            like = module.lora_a
            sides = []
            for side, tensor in (("A", weights.lora_a), ("B", weights.lora_b)):
                moved = tensor.detach().to(like.device, like.dtype)
                if moved.dtype == torch.float16 and not bool(torch.isfinite(moved).all()):
                    raise AdapterError(
                        f"{adapter.source}: module {name!r}: {side} has values too large for the "
                        "model's float16"
                    )
                sides.append(moved)
            staged.append(_Staged(module, sides[0], sides[1], weights.scaling))
        return staged

    def _check(self, source: str, name: str, weights: LoRAWeights) -> None:
        where = f"{source}: module {name!r}"
        module = self._modules.get(name)
        if module is None:
            raise AdapterError(f"{where}: the model has no layer of this name that takes adapters")
        if weights.is_embedding != isinstance(module, LoRAEmbedding):
            kind = "an embedding" if weights.is_embedding else "a linear layer"
            raise AdapterError(f"{where}: its weights are for {kind}, the model's is another kind")
        if weights.rank > self.max_rank:
            raise AdapterError(f"{where}: its rank is {weights.rank}, max_rank is {self.max_rank}")
        if weights.lora_a.shape[1] != module.in_features:
            raise AdapterError(
                f"{where}: A is {list(weights.lora_a.shape)}, the model needs "
                f"[{weights.rank}, {module.in_features}]"
            )
        if weights.lora_b.shape[0] != module.out_features:
            raise AdapterError(
                f"{where}: B is {list(weights.lora_b.shape)}, the model needs "
                f"[{module.out_features}, {weights.rank}]"
            )

    def _check_base_weight(self, source: str, name: str, tensor: Tensor) -> None:
        """PEFT would put such a weight in place of the model's: fine where they are equal."""
        module = self._modules.get(name)
        if module is not None:
            own, given = module.weight.detach(), tensor.to(module.weight.device)
            # Either may have been stored with fewer digits.
            if own.shape == given.shape and (
                torch.equal(own, given.to(own.dtype)) or torch.equal(own.to(given.dtype), given)
            ):
                return
        raise AdapterError(
            f"{source}: it brings its own base weight {list(tensor.shape)} for {name!r}, which is "
            "not the model's (an embedding that was resized or trained?)"
        )

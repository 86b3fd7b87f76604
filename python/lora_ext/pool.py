"""AdapterPool: adapters by name in the slots of a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import NamedTuple

from ._placement import Placement, place
from .adapters import Adapter
from .layers import LoRAModule, LoRASlice


class AdapterInfo(NamedTuple):
    """What is known of a loaded adapter.

    Attributes:
        slot: its slot in every layer.
        rank: the highest rank of its modules.
        num_modules: modules that it adapts.
        num_bytes: bytes of its weights in the layers, as far as this process holds them.
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


class AdapterPool:
    """Loads adapters into the slots of layers, which share the number of slots and the rank limit.

    An adapter is checked against all layers, and brought to their device and dtype, before anything
    is written; while its slot is written, the slot has rank 0 in every layer. Loading and removing
    are ordered with the layers' work by the current stream, and may happen between two forwards.

    Adapters are given whole. Where layers hold shards, every rank loads the same adapters in the
    same order, and each layer takes its part.

    Args:
        modules: layer by the name of its base module in the model, the name adapters use; for a
            stacked layer each of its ``slices`` by the name of its projection, and the layer itself
            by its own name, if there are adapters of all slices in one.
        evict_lru: where all slots are taken, drop the adapter unused for longest rather than raise.
            Adapters of a running batch are never dropped.

    Attributes:
        layers: the layers, each once.
        version: counts the changes of what slots hold.

    Raises:
        ValueError: there are no layers, or they differ in slots or rank limit.
    """

    def __init__(
        self, modules: Mapping[str, LoRAModule | LoRASlice], *, evict_lru: bool = False
    ) -> None:
        self._targets = {
            name: target if isinstance(target, LoRASlice) else LoRASlice(target, None)
            for name, target in modules.items()
        }
        self.layers = list(dict.fromkeys(target.layer for target in self._targets.values()))
        limits = {(layer.num_slots, layer.max_rank) for layer in self.layers}
        if len(limits) != 1:
            raise ValueError(
                f"expected layers of one (num_slots, max_rank), got {sorted(limits) or 'no layers'}"
            )
        (self.max_adapters, self.max_rank) = limits.pop()
        self.evict_lru = evict_lru
        self.version = 0
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
            placed = place(adapter, self._targets, self.max_rank)
            slot = old.slot if old is not None else self._free_slot()
            entry = old if old is not None else _Entry(slot)
            self._write(entry, adapter, placed)
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

    def _write(self, entry: _Entry, adapter: Adapter, placed: Placement) -> None:
        """Fill a slot; should the device fail on the way, the slot is left without an adapter."""
        entry.rank = entry.num_modules = entry.num_bytes = 0
        self._clear(entry.slot)
        try:
            for part in placed.weights:
                part.layer.write_shard(entry.slot, part.lora_a, part.lora_b)
            for part in placed.weights:
                part.layer.set_slot(entry.slot, part.rank, part.scaling)
            for layer, rows in placed.added_rows:
                layer.write_added_tokens(entry.slot, rows)
        except BaseException:
            self._clear(entry.slot)
            raise
        entry.rank = adapter.max_rank
        entry.num_modules = len(adapter.modules)
        tensors = [t for part in placed.weights for t in (part.lora_a, part.lora_b)]
        tensors += [part.rows for part in placed.added_rows]
        entry.num_bytes = sum(tensor.nbytes for tensor in tensors)

    def _clear(self, slot: int) -> None:
        self.version += 1
        for layer in self.layers:
            layer.set_slot(slot, 0, 0.0)

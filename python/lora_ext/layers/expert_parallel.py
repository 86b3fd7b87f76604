"""ExpertParallel: experts divided among processes, where a token's adapter goes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..pool import AdapterPool

# (x, topk_ids, topk_weights, token_slots, expert_map): each choice's weighted output [T, k, H].
Compute = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


class ExpertParallel:
    """This process's share of the experts, and the exchange of tokens with the others.

    Every process has a batch of its own and an adapter pool of its own, in which the same adapter
    may have another slot. So what travels with a token is the adapter's number in a list that all
    processes agree on, and each translates it to the slot it has. A process whose batch has no
    adapter, or no token, still computes its experts for the tokens of the others, with their
    adapters.

    Args:
        group: the processes; all of them call the layers, in the same order.
        num_experts: experts of a layer; each process holds as many, in the order of ranks.
        device: where the layers run.
        max_tokens: tokens that each process sends, the rest being filled up: nothing then waits for
            the device, and calls can be captured. None: the processes first tell each other how
            many they have.

    Attributes:
        experts: which experts this process holds.
        expert_map: int32 ``[num_experts]``, their index here, or -1.

    Raises:
        ValueError: experts do not divide among the processes, or it is none of them.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        device: torch.device | str,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is no member of the group")
        self.experts = Shard.piece("num_experts", num_experts, self.size, self.rank)
        self.max_tokens = max_tokens
        indices = torch.arange(num_experts, dtype=torch.int32) - self.experts.start
        outside = (indices < 0) | (indices >= self.experts.size)
        self.expert_map = torch.where(outside, -1, indices).to(device)
        self._pool: AdapterPool | None = None
        self._version = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self  # a copied layer has the same processes to talk to

    def agree(self, pool: AdapterPool) -> None:
        """Tell each other which adapter has which slot; all processes call it, with their pools.

        To be called before the first batch and whenever adapters were loaded, replaced or removed.
        Captured graphs stay right.

        Raises:
            ValueError: an adapter is not loaded on all processes, or not the same one; raised on
                all of them, and what was agreed before is still in force.
        """
        loaded = pool.adapters.items()
        own = {name: (info.slot, info.rank, info.num_modules) for name, info in loaded}
        everywhere: list[dict[str, tuple[int, int, int]]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everywhere, own, group=self.group)
        names = sorted(set().union(*everywhere))
        for name in names:
            missing = [rank for rank, known in enumerate(everywhere) if name not in known]
            if missing:
                raise ValueError(
                    f"adapter {name!r} is not loaded on rank {', '.join(map(str, missing))}, whose "
                    "experts need it for the tokens of the others"
                )
            sizes = [known[name][1:] for known in everywhere]
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"adapter {name!r} is not the same one everywhere: on each rank, (rank, "
                    f"modules) are {sizes}"
                )
        if self._pool is not pool:
            self._pool = pool
            # Number of the adapter in a slot, and slot of an adapter; the last entry, which is
            # what -1 leads to, says "none".
            self._number_of_slot = torch.full_like(self.expert_map[:1], -1).repeat(
                pool.max_adapters + 1
            )
            self._slot_of_number = self._number_of_slot.clone()
        numbers, slots = [-1] * (pool.max_adapters + 1), [-1] * (pool.max_adapters + 1)
        for number, name in enumerate(names):
            numbers[own[name][0]], slots[number] = number, own[name][0]
        self._number_of_slot.copy_(torch.tensor(numbers, dtype=torch.int32))
        self._slot_of_number.copy_(torch.tensor(slots, dtype=torch.int32))
        self._version = pool.version

    def run(
        self,
        compute: Compute,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        token_slots: Tensor | None,
    ) -> Tensor:
        """Send each token where its experts are, and sum up what they make of it.

        Args:
            compute: the layer of the experts that are here.
            x: ``[T, H]``, of this process's batch, as the rest.
            topk_ids, topk_weights: ``[T, k]``, experts of the whole layer.
            token_slots: int32 ``[>= T]``; None: no token has an adapter.

        Returns:
            ``[T, H]``.

        Raises:
            RuntimeError: adapters have changed since ``agree``, or more than ``max_tokens`` tokens.
        """
        if self._pool is None or self._pool.version != self._version:
            raise RuntimeError(
                "adapters were loaded or removed since the processes last agreed on them: call "
                "ExpertParallel.agree on all of them"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "expert-parallel layers are for inference, no gradient goes through their "
                "exchange: call the model under torch.no_grad() or torch.inference_mode()"
            )
        num_tokens = x.shape[0]
        room = self._room(num_tokens)
        if token_slots is None:
            numbers = topk_ids.new_full((num_tokens,), -1, dtype=torch.int32)
        else:
            numbers = self._number_of_slot[token_slots[:num_tokens].long()]
        y = compute(
            self._gather(x, room, 0),
            self._gather(topk_ids, room, -1),
            self._gather(topk_weights, room, 0),
            self._slot_of_number[self._gather(numbers, room, -1).long()],
            self.expert_map,
        )
        # Parts of half precision are not rounded before they are summed up.
        accumulated = torch.promote_types(y.dtype, torch.float32)
        own = y.new_empty((room, x.shape[1]), dtype=accumulated)
        dist.reduce_scatter_tensor(own, y.sum(dim=1, dtype=accumulated), group=self.group)
        return own[:num_tokens].to(x.dtype)

    def _room(self, num_tokens: int) -> int:
        """How many tokens each process sends."""
        if self.max_tokens is None:
            counts = torch.zeros(self.size, dtype=torch.int64, device=self.expert_map.device)
            own = torch.full_like(counts[:1], num_tokens)
            dist.all_gather_into_tensor(counts, own, group=self.group)
            return int(counts.max())
        if num_tokens > self.max_tokens:
            raise RuntimeError(
                f"the batch has {num_tokens} tokens, max_tokens is {self.max_tokens}"
            )
        return self.max_tokens

    def _gather(self, values: Tensor, room: int, fill: int) -> Tensor:
        """Return the rows of all processes, each filled up to ``room``: ``[size * room, ...]``."""
        sent = values.contiguous()
        if values.shape[0] < room:
            sent = values.new_full((room, *values.shape[1:]), fill)
            sent[: values.shape[0]] = values
        received = values.new_empty((self.size * room, *values.shape[1:]))
        dist.all_gather_into_tensor(received, sent, group=self.group)
        return received

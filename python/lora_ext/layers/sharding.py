"""How a layer is cut among the ranks of a tensor-parallel group, and what the ranks exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import records_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# The first is its name since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shard(NamedTuple):
    """The stretch of a dimension that a rank holds.

    Attributes:
        full: size of the whole dimension.
        start: where the stretch begins.
        size: its length.
    """

    full: int
    start: int
    size: int

    @classmethod
    def whole(cls, full: int) -> Shard:
        """Make the stretch that is all of it."""
        return cls(full, 0, full)

    @classmethod
    def piece(cls, name: str, full: int, num_pieces: int, index: int) -> Shard:
        """Make piece ``index`` of equal pieces; ValueError where ``full`` does not divide."""
        size, rest = divmod(full, num_pieces)
        if rest:
            raise ValueError(f"{name} is {full}, which does not divide into {num_pieces} pieces")
        return cls(full, index * size, size)

    @classmethod
    def of_rows(cls, full: int, rows: int, num_ranks: int, rank: int) -> Shard:
        """Make what is in ``rows`` rows of each rank: fewer, or none, in the last ones.

        Raises:
            ValueError: they have no room for ``full``.
        """
        if rows * num_ranks < full:
            raise ValueError(f"{num_ranks} times {rows} rows have no room for {full}")
        start = min(rank * rows, full)
        return cls(full, start, min(rows, full - start))

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the stretch of a whole tensor's dimension, as a view."""
        return tensor.narrow(dim, self.start, self.size)


class TensorParallel:
    """This process among those of a group; without a group, on its own.

    Attributes:
        rank: this process, from 0.
        size: processes.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is no member of the group")

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorParallel:
        return self  # a copied layer has the same ranks to talk to

    def require_inference(self, *tensors: Tensor) -> None:
        """Raise where there are other ranks, to which no gradient would find its way."""
        if self.size > 1 and records_grad(*tensors):
            raise RuntimeError(
                "tensor-parallel layers are for inference, no gradient goes through their "
                "exchange: call the model under torch.no_grad() or torch.inference_mode()"
            )

    def all_reduce(self, y: Tensor) -> Tensor:
        """Return the sum over all ranks; y may be written to."""
        if self.size > 1:
            self.require_inference(y)
            y = y.contiguous()
            dist.all_reduce(y, group=self.group)
        return y

    def all_gather(self, y: Tensor) -> Tensor:
        """Return the ranks' y ``[..., n]`` side by side, ``[..., size * n]``."""
        if self.size == 1:
            return y
        self.require_inference(y)
        rows = y.reshape(-1, y.shape[-1])
        parts = y.new_empty((self.size * rows.shape[0], y.shape[-1]))
        _all_gather(parts, rows.contiguous(), group=self.group)
        side_by_side = parts.view(self.size, *y.shape).movedim(0, -2)
        return side_by_side.reshape(*y.shape[:-1], self.size * y.shape[-1])

    def all_agree(self, verdict: bool) -> bool:
        """Whether every rank says yes; the ranks wait for each other."""
        if self.size == 1:
            return verdict
        votes = [False] * self.size
        dist.all_gather_object(votes, verdict, group=self.group)
        return all(votes)


def vocabulary_rows(vocab_size: int, num_ranks: int) -> int:
    """Rows of a vocabulary on each rank: as many on all, together a multiple of 64.

    So it is in inference engines, and matrix products are fastest.
    """
    multiple = math.lcm(num_ranks, 64)
    return -(-vocab_size // multiple) * multiple // num_ranks


def cut_linear(
    linear: nn.Linear,
    inputs: Shard,
    outputs: Sequence[Shard],
    *,
    rows: int | None = None,
    bias: bool = True,
) -> nn.Linear:
    """Return a new layer with these columns and, of each stacked slice, these rows of ``linear``.

    Args:
        rows: rows of the result, the ones behind those cut out being 0; None: no more.
        bias: whether the result has the bias too.
    """
    weight = inputs.of(cut_rows(linear.weight.detach(), outputs, rows), 1)
    kept = cut_rows(linear.bias.detach(), outputs, rows) if linear.bias is not None else None
    shard = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    shard.weight = _frozen(weight)
    if bias and kept is not None:
        shard.bias = _frozen(kept)
    return shard


def cut_embedding(embedding: nn.Embedding, vocabulary: Shard, rows: int) -> nn.Embedding:
    """Return a new embedding with the rows of ``vocabulary``, and 0 up to ``rows``."""
    if embedding.max_norm is not None:
        raise ValueError(f"the embedding has max_norm {embedding.max_norm}, expected None")
    shard = nn.Embedding(rows, embedding.embedding_dim, device="meta")
    shard.weight = _frozen(cut_rows(embedding.weight.detach(), [vocabulary], rows))
    return shard


def cut_rows(tensor: Tensor, shards: Sequence[Shard], rows: int | None = None) -> Tensor:
    """Return the shards' rows of slices that are stacked in ``tensor``, and 0 up to ``rows``."""
    slices = torch.split(tensor, [shard.full for shard in shards])
    parts = [shard.of(part, 0) for shard, part in zip(shards, slices, strict=True)]
    missing = 0 if rows is None else rows - sum(shard.size for shard in shards)
    if missing:
        parts.append(tensor.new_zeros((missing, *tensor.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _frozen(values: Tensor) -> nn.Parameter:
    # A copy, so that the whole tensor can be freed.
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad=False)

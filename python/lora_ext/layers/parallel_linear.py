"""Linear layers of which each rank of a tensor-parallel group holds a part (Megatron's scheme).

Column-parallel layers give each rank some of the output features, and nothing is exchanged: A is
whole on every rank, B is cut as the base weight is. A row-parallel layer behind takes such features
as they are: A is cut along K as the base weight is, B is whole, and since the expand is linear, the
partial products of the ranks add up like those of the base, in the same all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from .linear import LoRALinear
from .routing import Routing
from .sharding import Shard, TensorParallel, cut_linear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoRAColumnParallelLinear(LoRALinear):
    """A linear layer, or several stacked ones, of whose output features each rank has a part.

    Args:
        base: this rank's shard, its slices one behind the other.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        group: the ranks; None: this process has all of the layer.
        output_sizes: N_i of the whole slices; None: one slice.
        num_shards: into how many pieces each slice is cut: as many as there are ranks (None), or a
            divisor of that, and then neighbouring ranks hold the same piece.

    Raises:
        ValueError: sizes that do not divide, or that are not those of ``base``.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        group: ProcessGroup | None = None,
        output_sizes: Sequence[int] | None = None,
        num_shards: Sequence[int] | None = None,
    ) -> None:
        parallel = TensorParallel(group)
        if output_sizes is None:
            pieces = parallel.size if num_shards is None else num_shards[0]
            output_sizes = [base.out_features * pieces]
        outputs = _column_shards(parallel, output_sizes, num_shards)
        rows = sum(shard.size for shard in outputs)
        if base.out_features != rows:
            raise ValueError(
                f"base has {base.out_features} output features, expected {rows}: the shard of "
                f"output_sizes {list(output_sizes)} on one of {parallel.size} ranks"
            )
        super().__init__(base, num_slots, max_rank, routing, outputs=outputs, parallel=parallel)

    @classmethod
    def _cut(
        cls,
        full: nn.Linear,
        group: ProcessGroup | None = None,
        output_sizes: Sequence[int] | None = None,
        num_shards: Sequence[int] | None = None,
    ) -> tuple[nn.Linear, dict[str, Any]]:
        if output_sizes is None:
            output_sizes = [full.out_features]
        if sum(output_sizes) != full.out_features:
            raise ValueError(
                f"output_sizes {list(output_sizes)} sum to {sum(output_sizes)}, the layer has "
                f"{full.out_features} output features"
            )
        outputs = _column_shards(TensorParallel(group), output_sizes, num_shards)
        shard = cut_linear(full, Shard.whole(full.in_features), outputs)
        return shard, {"group": group, "output_sizes": output_sizes, "num_shards": num_shards}


class LoRAQKVParallelLinear(LoRAColumnParallelLinear):
    """The stacked q, k and v projections: each rank has some of the heads.

    Where there are fewer kv heads than ranks, neighbouring ranks hold the same one.

    Args:
        base: this rank's shard: its heads of q, then of k, then of v.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        head_size: features of a head.
        num_heads: q heads of the whole layer.
        num_kv_heads: k heads, and v heads, of the whole layer.
        group: the ranks; None: this process has all of the layer.

    Raises:
        ValueError: heads that do not divide among the ranks, or that are not those of ``base``.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        group: ProcessGroup | None = None,
    ) -> None:
        stacked = _stacked_heads(group, head_size, num_heads, num_kv_heads)
        super().__init__(base, num_slots, max_rank, routing, group=group, **stacked)

    @classmethod
    def _cut(  # type: ignore[override]
        cls,
        full: nn.Linear,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        group: ProcessGroup | None = None,
    ) -> tuple[nn.Linear, dict[str, Any]]:
        stacked = _stacked_heads(group, head_size, num_heads, num_kv_heads)
        shard, _ = LoRAColumnParallelLinear._cut(full, group, **stacked)
        heads = {"head_size": head_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        return shard, {"group": group, **heads}


class LoRARowParallelLinear(LoRALinear):
    """A linear layer of whose input features each rank has a part; one all-reduce sums them up.

    ``forward`` takes this rank's features, as a column-parallel layer gives them, and returns the
    whole sum on every rank. It is of the layer's dtype, so each rank rounds its part once.

    Args:
        base: this rank's shard. A bias belongs to rank 0 alone, so that it is added once.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        group: the ranks; None: this process has all of the layer.

    Raises:
        ValueError: there is a bias on another rank; input features do not divide.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        parallel = TensorParallel(group)
        if parallel.rank > 0 and getattr(base, "bias", None) is not None:
            raise ValueError(
                f"base has a bias on rank {parallel.rank}: expected on rank 0 alone, since the "
                "ranks' outputs are summed up"
            )
        inputs = Shard.piece(
            "in_features", base.in_features * parallel.size, parallel.size, parallel.rank
        )
        super().__init__(base, num_slots, max_rank, routing, inputs=inputs, parallel=parallel)

    @classmethod
    def _cut(
        cls, full: nn.Linear, group: ProcessGroup | None = None
    ) -> tuple[nn.Linear, dict[str, Any]]:
        parallel = TensorParallel(group)
        inputs = Shard.piece("in_features", full.in_features, parallel.size, parallel.rank)
        outputs = [Shard.whole(full.out_features)]
        shard = cut_linear(full, inputs, outputs, bias=parallel.rank == 0)
        return shard, {"group": group}

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., N]`` for this rank's x ``[..., in_features]``."""
        return self.parallel.all_reduce(super().forward(x))


def head_shards(num_ranks: int, num_heads: int, num_kv_heads: int) -> list[int]:
    """Into how many pieces q, k and v are cut; ValueError where heads do not divide."""
    if num_heads % num_ranks:
        raise ValueError(f"{num_heads} attention heads do not divide among {num_ranks} ranks")
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} kv heads do not divide among {num_ranks} ranks, nor ranks among heads"
        )
    kv_shards = min(num_ranks, num_kv_heads)
    return [num_ranks, kv_shards, kv_shards]


class _Stacked(TypedDict):
    output_sizes: list[int]
    num_shards: list[int]


def _stacked_heads(
    group: ProcessGroup | None, head_size: int, num_heads: int, num_kv_heads: int
) -> _Stacked:
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return {
        "output_sizes": [head_size * n for n in heads],
        "num_shards": head_shards(TensorParallel(group).size, num_heads, num_kv_heads),
    }


def _column_shards(
    parallel: TensorParallel, output_sizes: Sequence[int], num_shards: Sequence[int] | None
) -> list[Shard]:
    if num_shards is None:
        num_shards = [parallel.size] * len(output_sizes)
    if len(num_shards) != len(output_sizes) or any(n < 1 or parallel.size % n for n in num_shards):
        raise ValueError(
            f"num_shards is {list(num_shards)}, expected a divisor of the {parallel.size} ranks "
            f"for each of {len(output_sizes)} slices"
        )
    return [
        Shard.piece(f"output_sizes[{i}]", size, pieces, parallel.rank * pieces // parallel.size)
        for i, (size, pieces) in enumerate(zip(output_sizes, num_shards, strict=True))
    ]

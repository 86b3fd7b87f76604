"""FusedMoE: the experts of an MoE layer, in which every token has its own adapter, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import LoRAHooks, MoEBuffers, align_routing, lora_hooks
from .base import LoRAModule, LoRASlice, require_inference
from .expert_parallel import ExpertParallel
from .experts import ExpertGroups, ExpertLinear, LoRAExperts
from .routing import Routing
from .sharding import Shard


class FusedMoE(nn.Module):
    """Gated experts plus the adapter of each token, added before the activation and before the sum.

    ``forward`` has the arguments of Hugging Face's expert modules. Nothing in it waits for the
    device with bfloat16 weights on Hopper and later; elsewhere the base product asks how many
    tokens an expert has, and in a graph it gathers each pair's weights instead.

    Args:
        gate_up: w13, with the gate's N output features in front of up's, or in turns.
        down: w2.
        activation: makes ``[P, N]`` of ``[P, 2 * N]``.
        num_slots: L.
        max_rank: R.
        routing: shared by all layers of a model; None: one of its own.
        interleaved: whether gate's and up's output features take turns.
        shared_outer: all experts of a slot have one A in gate and up and one B in down, which saves
            their memory; adapters in which they differ are refused.
        buffers: what the layers of captured graphs share; None: each call allocates its routing.
        expert_parallel: the processes that hold the other experts; None: all are here.

    Attributes:
        gate_up, down: the projections, with their slots.
    """

    def __init__(
        self,
        gate_up: ExpertLinear,
        down: ExpertLinear,
        activation: Callable[[Tensor], Tensor],
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        interleaved: bool = False,
        shared_outer: bool = False,
        buffers: MoEBuffers | None = None,
        expert_parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        if gate_up.num_experts != down.num_experts or gate_up.out_features % 2:
            raise ValueError(
                f"gate_up is for {gate_up.num_experts} experts with {gate_up.out_features} output "
                f"features, down for {down.num_experts}: expected equal numbers of experts, and "
                "gate and up of equal width"
            )
        experts = Shard.whole(gate_up.num_experts)
        if expert_parallel is not None:
            experts = expert_parallel.experts
            if gate_up.num_experts != experts.size:
                raise ValueError(
                    f"gate_up has {gate_up.num_experts} experts, expected this process's "
                    f"{experts.size} of {experts.full}"
                )
        routing = routing if routing is not None else Routing()
        width = gate_up.out_features // 2
        self.gate_up = LoRAExperts(
            gate_up,
            [width, width],
            num_slots,
            max_rank,
            routing,
            experts=experts,
            interleaved=interleaved,
            share_a=shared_outer,
        )
        self.down = LoRAExperts(
            down,
            [down.out_features],
            num_slots,
            max_rank,
            routing,
            experts=experts,
            share_b=shared_outer,
        )
        self.activation = activation
        self.routing = routing
        self.moe_buffers = buffers
        self.expert_parallel = expert_parallel

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        num_slots: int,
        max_rank: int,
        routing: Routing | None = None,
        *,
        expert_parallel: ExpertParallel | None = None,
        **options: Any,
    ) -> FusedMoE:
        """Make the layer of a Hugging Face expert module.

        It shares the module's parameters; of the whole module of an expert-parallel layer it copies
        those of this process's experts.

        Raises:
            ValueError: the module is of another kind.
        """
        if not is_experts(experts):
            raise ValueError(
                f"{type(experts).__name__} is no module of gated experts with 3-D parameters "
                "gate_up_proj and down_proj"
            )
        module: Any = experts
        transposed = getattr(module, "is_transposed", False)
        gate_up, down = (
            ExpertLinear(
                getattr(module, name), getattr(module, f"{name}_bias", None), transposed=transposed
            )
            for name in ("gate_up_proj", "down_proj")
        )
        interleaved = not getattr(module, "is_concatenated", True)
        if expert_parallel is not None and gate_up.num_experts == expert_parallel.experts.full:
            gate_up = gate_up.cut(expert_parallel.experts)
            down = down.cut(expert_parallel.experts)
        return cls(
            gate_up,
            down,
            getattr(module, "_apply_gate", None) or _Gated(module.act_fn),
            num_slots,
            max_rank,
            routing,
            interleaved=interleaved,
            expert_parallel=expert_parallel,
            **options,
        )

    @property
    def targets(self) -> dict[str, LoRAModule | LoRASlice]:
        """What an AdapterPool loads into, by what follows the layer's name in an adapter."""
        gate, up = self.gate_up.slices
        return {
            "gate_up_proj": self.gate_up,
            "gate_proj": gate,
            "up_proj": up,
            "down_proj": self.down,
        }

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: ``[..., H]``, tokens of all rows one behind the other.
            top_k_index: ``[T, k]`` experts; a number that is none, such as -1, is left out.
            top_k_weights: ``[T, k]``.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        slots = self._token_slots(x.shape[0])
        if self.expert_parallel is None:
            y = self._of_experts(x, top_k_index, top_k_weights, slots).sum(dim=1).to(x.dtype)
        else:
            y = self.expert_parallel.run(self._of_experts, x, top_k_index, top_k_weights, slots)
        return y.view_as(hidden_states)

    def _token_slots(self, num_tokens: int) -> Tensor | None:
        """Return the slot of each token; None: there is nothing to add."""
        source = self.routing.source
        return None if source is None else source.token_slots(num_tokens)

    def _of_experts(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        token_slots: Tensor | None,
        expert_map: Tensor | None = None,
    ) -> Tensor:
        """Return ``[T, k, H]``, weighted: what the experts that are here make of the tokens."""
        num_tokens, top_k = topk_ids.shape
        num_experts = self.gate_up.experts.size
        groups = ExpertGroups.of(topk_ids, num_experts, expert_map)
        hooks = LoRAHooks()
        gate_up, down = self.gate_up.adapters(), self.down.adapters()
        if token_slots is not None and (gate_up is not None or down is not None):
            routing = align_routing(
                topk_ids,
                token_slots,
                num_slots=self.gate_up.num_slots,
                num_experts=num_experts,
                expert_map=expert_map,
                buffers=self.moe_buffers,
            )
            hooks = lora_hooks(gate_up, down, routing)

        hidden = self.gate_up.base(x[groups.order // top_k], groups)[groups.place]
        if hooks.after_gate_up is not None:
            require_inference(hidden)
            hooks.after_gate_up(
                x, hidden.view(num_tokens, top_k, hidden.shape[1]), topk_weights, topk_ids
            )
        hidden = self.activation(hidden)
        y = self.down.base(hidden[groups.order], groups)[groups.place]
        # Rows that are not routed hold anything.
        y = torch.where(groups.routed[:, None], y * topk_weights.reshape(-1, 1), 0)
        y = y.view(num_tokens, top_k, y.shape[1])
        if hooks.after_down is not None:
            require_inference(y)
            hooks.after_down(hidden, y, topk_weights, topk_ids)
        return y


class _Gated:
    """The usual gate: ``act(gate) * up``."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self._act = act

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._act(gate) * up


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of gated experts with their weights in two 3-D parameters."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)
        and not getattr(module, "has_post_expert_norm", False)
        and (hasattr(module, "_apply_gate") or hasattr(module, "act_fn"))
    )

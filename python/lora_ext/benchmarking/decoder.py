"""A decoder of a registry's shape with random weights: one decode step, for end-to-end times.

Simplified where LoRA plays no part: attention reads a static cache in which every request has the
same number of tokens, all at the last position, and nothing is sampled: a step ends with logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Model

# Does a linear layer: (layer number, site, x [B, K]) to y [B, N].
Linear = Callable[[int, str, Tensor], Tensor]


@dataclass
class Decoder:
    """Weights and cache for decode steps of ``batch`` requests with ``context`` tokens each."""

    model: Model
    num_layers: int
    weights: list[dict[str, Tensor]]  # per layer, by site: [N, K]
    embedding: Tensor  # [V, H]
    head: Tensor  # [V, H]
    norm: Tensor  # [H]
    caches: list[tuple[Tensor, Tensor]]  # per layer keys and values: [B, KV heads, context, D]
    cos: Tensor  # [D] of the position that is decoded
    sin: Tensor

    @classmethod
    def random(
        cls, model: Model, num_layers: int, device: torch.device, dtype: torch.dtype
    ) -> Decoder:
        """A decoder without a cache; `start` gives it one."""
        if model.experts is not None:
            raise ValueError(f"{model.name} has experts, expected a dense model")

        def normal(*shape: int, std: float) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(std=std)

        hidden = model.hidden_size
        weights = [
            {
                name: normal(site.out_features, site.in_features, std=site.in_features**-0.5)
                for name, site in model.sites.items()
            }
            for _ in range(num_layers)
        ]
        embedding = normal(model.vocab_size, hidden, std=1.0)
        head = normal(model.vocab_size, hidden, std=hidden**-0.5)
        norm = torch.ones(hidden, dtype=dtype, device=device)
        nothing = torch.empty(0, device=device)
        return cls(model, num_layers, weights, embedding, head, norm, [], nothing, nothing)

    def start(self, batch: int, context: int) -> None:
        """Fill the cache for ``batch`` requests; the step decodes their last token."""
        model, like = self.model, self.embedding
        self.caches.clear()
        shape = (batch, model.num_kv_heads, context, model.head_dim)
        for _ in range(self.num_layers):
            keys, values = (like.new_empty(shape).normal_() for _ in range(2))
            self.caches.append((keys, values))
        half = torch.arange(0, model.head_dim, 2, device=like.device) / model.head_dim
        angles = (context - 1) * 500000.0**-half
        angles = torch.cat([angles, angles])
        self.cos, self.sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def base_linear(self, layer: int, site: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[layer][site])

    def step(self, ids: Tensor, linear: Linear, dtype: torch.dtype | None = None) -> Tensor:
        """Decode one token of each request: ids ``[B]`` to logits ``[B, V]``.

        ``dtype``: do everything but ``linear`` in it, on copies of the cache; for a reference.
        """
        hidden = F.embedding(ids, self.embedding)
        hidden = hidden if dtype is None else hidden.to(dtype)
        for layer in range(self.num_layers):
            hidden = hidden + self._attention(layer, self._normed(hidden), linear)
            gate, up = linear(layer, "gate_up", self._normed(hidden)).chunk(2, dim=-1)
            hidden = hidden + linear(layer, "down", F.silu(gate) * up)
        return F.linear(self._normed(hidden), self.head.to(hidden.dtype))

    def _normed(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.norm.shape, self.norm.to(hidden.dtype), 1e-5)

    def _attention(self, layer: int, hidden: Tensor, linear: Linear) -> Tensor:
        model, batch = self.model, hidden.shape[0]
        widths = model.sites["qkv"].output_slices
        q, k, v = torch.split(linear(layer, "qkv", hidden), list(widths), dim=-1)
        q = self._rotated(q.view(batch, model.num_heads, model.head_dim))
        k = self._rotated(k.view(batch, model.num_kv_heads, model.head_dim))
        keys, values = (cache.to(hidden.dtype) for cache in self.caches[layer])
        keys[:, :, -1] = k
        values[:, :, -1] = v.view(batch, model.num_kv_heads, model.head_dim)
        # The query heads that share a key head stand where a longer input's tokens would.
        grouped = q.view(batch, model.num_kv_heads, -1, model.head_dim)
        out = F.scaled_dot_product_attention(grouped, keys, values)
        return linear(layer, "o", out.reshape(batch, -1))

    def _rotated(self, heads: Tensor) -> Tensor:
        left, right = heads.chunk(2, dim=-1)
        swapped = torch.cat([-right, left], dim=-1)
        return heads * self.cos.to(heads.dtype) + swapped * self.sin.to(heads.dtype)

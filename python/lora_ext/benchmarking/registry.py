"""Shapes of the models whose layers are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """A linear layer as engines run it: K input features, stacked slices of N_i output features."""

    name: str
    in_features: int
    output_slices: tuple[int, ...]

    @property
    def num_slices(self) -> int:
        return len(self.output_slices)

    @property
    def out_features(self) -> int:
        return sum(self.output_slices)

    @property
    def columns(self) -> list[slice]:
        """The columns of the output that each slice has."""
        starts = [sum(self.output_slices[:i]) for i in range(self.num_slices)]
        return [slice(o, o + n) for o, n in zip(starts, self.output_slices, strict=True)]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: w13 is hidden to 2 * intermediate, w2 is intermediate to hidden."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    interleaved: bool = False  # gate and up in alternate columns of w13's output


@dataclass(frozen=True)
class Model:
    """A decoder; ``intermediate_size`` is 0 where its MLPs are ``experts``."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    experts: Experts | None = None

    @property
    def sites(self) -> dict[str, Site]:
        """The linear layers of one decoder layer, by name; those of experts are not among them."""
        hidden, heads, kv = self.hidden_size, self.num_heads, self.num_kv_heads
        queries, keys = heads * self.head_dim, kv * self.head_dim
        sites = [
            Site("qkv", hidden, (queries, keys, keys)),
            Site("o", queries, (hidden,)),
        ]
        if self.experts is None:
            wide = self.intermediate_size
            sites += [Site("gate_up", hidden, (wide, wide)), Site("down", wide, (hidden,))]
        return {site.name: site for site in sites}


_ALL = (
    Model("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
    Model("llama-3-70b", 8192, 28672, 80, 64, 8, 128, 128256),
    Model("qwen3-8b", 4096, 12288, 36, 32, 8, 128, 151936),
    Model("qwen3-32b", 5120, 25600, 64, 64, 8, 128, 151936),
    Model("qwen3-30b-a3b", 2048, 0, 48, 32, 4, 128, 151936, Experts(128, 8, 2048, 768)),
    Model("mixtral-8x7b", 4096, 0, 32, 32, 8, 128, 32000, Experts(8, 2, 4096, 14336)),
    Model("gpt-oss-20b", 2880, 0, 24, 64, 8, 64, 201088, Experts(32, 4, 2880, 2880, True)),
    Model("gpt-oss-120b", 2880, 0, 36, 64, 8, 64, 201088, Experts(128, 4, 2880, 2880, True)),
    # Small enough for a test on any machine.
    Model("tiny", 64, 176, 2, 4, 2, 16, 320),
    Model("tiny-moe", 64, 0, 2, 4, 2, 16, 320, Experts(6, 2, 64, 48, True)),
)
MODELS = {model.name: model for model in _ALL}

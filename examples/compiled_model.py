"""The operators under torch.compile and in a CUDA graph: one program for every mix of adapters.

    python examples/compiled_model.py

The plan lives in one tensor of fixed address, and its contents alone say which token uses which
adapter. So another mix is neither another compilation nor another capture.
"""

from __future__ import annotations

import torch
from custom_model import HIDDEN, MLP, NUM_SLOTS
from torch import Tensor

import lora_ext

MAX_TOKENS = 64
MIXES = ([0, 1, 2, -1], [2, 2, 2, 2], [-1, -1, -1, -1], [1, -1, 1, 0])


def compiled(model: MLP, batch: lora_ext.LoRABatch) -> None:
    """Run several mixes and batch sizes through one compilation."""
    program = torch.compile(model, fullgraph=True, dynamic=True)
    for index, (tokens_each, mix) in enumerate(zip((3, 5, 12, 7), MIXES, strict=True)):
        batch.update(mix, seg_lens=[tokens_each] * len(mix))
        x = torch.randn(tokens_each * len(mix), HIDDEN, device=batch.device)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            y = program(x, batch.plan)
        torch.testing.assert_close(y, model(x, batch.plan))
    print(f"torch.compile on {batch.device}: one graph served {len(MIXES)} mixes of adapters")


def captured(model: MLP) -> None:
    """Capture once, without any adapter in the batch; replay with all of them."""
    batch = lora_ext.LoRABatch.for_cuda_graph(MAX_TOKENS, NUM_SLOTS)
    x = torch.randn(MAX_TOKENS, HIDDEN, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x, batch.plan)  # warm-up, as every capture needs it
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y: Tensor = model(x, batch.plan)
    for mix in MIXES:
        batch.update(mix, seg_lens=[10] * len(mix))  # the other 24 tokens are padding
        x.normal_()
        graph.replay()
        assert torch.equal(y, model(x, batch.plan))
    print(f"one CUDA graph served {len(MIXES)} mixes of adapters")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = MLP()
    model.randomize_adapters([4, 16, 1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    compiled(model, lora_ext.LoRABatch(MAX_TOKENS, NUM_SLOTS, device))
    if device == "cuda":
        captured(model)


if __name__ == "__main__":
    main()

"""A Hugging Face model cut among two processes: each holds half of it, and of every adapter.

    python examples/tensor_parallel.py

Runs on two GPUs where there are two (NCCL), else on the CPU (gloo). The model is a small Llama
with random weights, so that the example needs no download; its adapters are made and saved by PEFT.
The logits are compared with those of the whole model in one process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mixed_batch import ADAPTERS, CONFIG, make_model, save_adapters

import lora_ext
from lora_ext.integrations.hf_parallel import parallelize

NUM_RANKS = 2
PROMPTS = torch.randint(1, CONFIG.vocab_size, (4, 6), generator=torch.Generator().manual_seed(0))
ROWS = ["translate", None, "summarize", "translate"]
OPTIONS = {"max_adapters": 8, "max_rank": 16}


def load_adapters(model: lora_ext.LoRAModel, directory: Path) -> lora_ext.LoRAModel:
    for name in ADAPTERS:
        model.load_adapter(name, directory / name)
    return model


@torch.no_grad()
def main(rank: int, directory: Path) -> None:
    """What each process runs: the same on all of them."""
    on_gpus = torch.cuda.device_count() >= NUM_RANKS
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=(directory / "store").as_uri(),
        rank=rank,
        world_size=NUM_RANKS,
    )
    assert dist.group.WORLD is not None

    model = parallelize(make_model(), dist.group.WORLD, **OPTIONS)
    model.model.to(device)
    load_adapters(model, directory)
    prompts = PROMPTS.to(device)
    logits = model(prompts, adapters=ROWS).logits
    tokens = model.generate(prompts, adapters=ROWS, max_new_tokens=8, do_sample=False)

    whole = load_adapters(lora_ext.wrap(make_model().to(device), **OPTIONS), directory)
    torch.testing.assert_close(logits, whole(prompts, adapters=ROWS).logits, rtol=1e-4, atol=1e-4)

    held = sum(parameter.numel() for parameter in model.model.parameters())
    of_all = sum(parameter.numel() for parameter in whole.model.parameters())
    print(
        f"rank {rank} on {device}: {held:,} of {of_all:,} parameters; logits as of the whole model"
    )
    dist.barrier()
    if rank == 0:
        for adapter, row in zip(ROWS, tokens[:, PROMPTS.shape[1] :].tolist(), strict=True):
            print(f"{adapter or '(no adapter)':12} {row}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(Path(folder))
        mp.spawn(main, (Path(folder),), nprocs=NUM_RANKS)

"""lora_embedding_apply_: gather and expand for the embedding of Llama-3-8B."""

from __future__ import annotations

import sys

from lora_ext.benchmarking import grids
from lora_ext.benchmarking.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, grids.embed()))

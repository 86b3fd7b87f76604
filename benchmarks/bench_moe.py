"""moe_lora_apply_ on w13 and w2 of Qwen3-30B-A3B and Mixtral-8x7B, and moe_lora_align."""

from __future__ import annotations

import sys

from lora_ext.benchmarking import grids
from lora_ext.benchmarking.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, grids.moe()))

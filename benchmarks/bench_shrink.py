"""lora_shrink alone, over the decode and prefill grids: x A^T of every token's adapter."""

from __future__ import annotations

import sys

from lora_ext.benchmarking import grids
from lora_ext.benchmarking.command import main
from lora_ext.benchmarking.dense import SHRINK

if __name__ == "__main__":
    sys.exit(main(__doc__, [*grids.decode(SHRINK), *grids.prefill(SHRINK)]))

"""lora_expand_ alone, over the decode and prefill grids: adds xa B^T of every token's adapter."""

from __future__ import annotations

import sys

from lora_ext.benchmarking import grids
from lora_ext.benchmarking.command import main
from lora_ext.benchmarking.dense import EXPAND

if __name__ == "__main__":
    sys.exit(main(__doc__, [*grids.decode(EXPAND), *grids.prefill(EXPAND)]))

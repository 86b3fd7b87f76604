"""plan_batch_ on the device: the plan that all layers of a batch share.

Beside it torch's sort makes the two sections that any kernel needs, without tiles.
"""

from __future__ import annotations

import sys

from lora_ext.benchmarking import grids
from lora_ext.benchmarking.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, grids.plan()))

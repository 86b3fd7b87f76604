"""A Llama-3-8B layer's four linear sites in one CUDA graph: what LoRA adds to the base GEMMs.

lora_ext after each GEMM, lora_linear in its place, lora_forked around it, other providers after it,
and the first two for a batch in which nobody has an adapter (base_only, linear_only).
"""

from __future__ import annotations

import sys

from lora_ext.benchmarking.command import device_of, script_parser
from lora_ext.benchmarking.layer import layer_problems, run_layers


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="llama-3-8b", help="whose shapes (default: llama-3-8b)")
    parser.add_argument("--rank", default="16,64", help="comma-separated (default: 16,64)")
    args = parser.parse_args()
    problems = layer_problems(args.model, args.rank.split(","))
    run_layers(problems, args, device_of(args), print)
    return 0


if __name__ == "__main__":
    sys.exit(main())

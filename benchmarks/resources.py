"""Registers, spills and shared memory of every kernel, from the log of a build.

The build prints what ptxas says (-Xptxas=-v): `ninja -v | tee build.log`, or the build.log that
`pip install .` leaves in the build folder. Dynamic shared memory is not in the log: that is asked
for at the launch.

    python benchmarks/resources.py build.log --output benchmarks/results/resources.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
PROPERTIES = re.compile(r"Function properties for (\S+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32", "double": "fp64"}


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture; bytes are per thread but for shared memory."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


def parse(lines: Iterable[str]) -> list[Kernel]:
    """The kernels of a log, with mangled names, in its order."""
    kernels: list[Kernel] = []
    described = ""
    for line in lines:
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2]))
        elif properties := PROPERTIES.search(line):
            described = properties[1]
        elif not kernels:
            continue
        elif (frame := FRAME.search(line)) and described == kernels[-1].name:
            stack, stores, loads = map(int, frame.groups())
            kernels[-1] = replace(kernels[-1], stack=stack, spill_stores=stores, spill_loads=loads)
        elif used := USED.search(line):
            shared = SHARED.search(line)
            kernels[-1] = replace(
                kernels[-1], registers=int(used[1]), shared=int(shared[1]) if shared else 0
            )
    return kernels


def demangle(names: list[str]) -> list[str]:
    """C++ names by binutils' c++filt."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def short(name: str) -> str:
    """A demangled kernel without return type, namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    # The parameter list is the last pair of parentheses outside template arguments.
    depth = 0
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\b\w+::", "", name)
    for long, brief in TYPES.items():
        name = re.sub(rf"\b{long}\b", brief, name)
    return re.sub(r"\((?:bool|int|unsigned int)\)", "", name)


def table(kernels: list[Kernel]) -> str:
    """The kernels as a Markdown table, and how many of them spill."""
    spilling = sum(bool(kernel.spill_stores or kernel.spill_loads) for kernel in kernels)
    lines = [
        "# What the kernels take",
        "",
        f"{len(kernels)} kernels, {spilling} with spills. Registers, and bytes per thread that are"
        " spilled (stores + loads); bytes of static shared memory.",
        "",
        "| kernel | architecture | registers | spills | shared memory |",
        "|---|---|---|---|---|",
    ]
    for k in sorted(kernels, key=lambda k: (k.architecture, k.name)):
        spills = f"{k.spill_stores} + {k.spill_loads}" if k.spill_stores or k.spill_loads else "0"
        lines.append(f"| `{k.name}` | {k.architecture} | {k.registers} | {spills} | {k.shared} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, nargs="+", help="of a build")
    parser.add_argument("--output", type=Path, help="default: print")
    args = parser.parse_args()
    kernels = [k for log in args.log for k in parse(log.read_text(errors="replace").splitlines())]
    if not kernels:
        print("no kernel in the log: was it built with -Xptxas=-v?", file=sys.stderr)
        return 1
    names = demangle([kernel.name for kernel in kernels])
    # A log that was appended to has a kernel more than once: the last build counts.
    named = {
        (name, kernel.architecture): replace(kernel, name=short(name))
        for name, kernel in zip(names, kernels, strict=True)
    }
    text = table(list(named.values()))
    if args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

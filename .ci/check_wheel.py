"""Checks a built wheel: its tag, its files, what its library needs from outside, and that it loads.

usage: check_wheel.py WHEEL {cuda,cpu}
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

REQUIRED = {
    "lora_ext/_C.so",
    "lora_ext/__init__.py",
    "lora_ext/_build_info.py",
    "lora_ext/_build_info.pyi",
    "lora_ext/py.typed",
}
SYSTEM_LIBRARIES = r"libtorch|libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux.*"

STREAM_GETTER = "aoti_torch_get_current_cuda_stream"


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_files(wheel: Path, names: set[str]) -> None:
    """A tag for every Python, every file of the package, and nothing that belongs elsewhere."""
    assert re.fullmatch(r"lora_ext-[^-]+-py3-none-(many)?linux_\w+\.whl", wheel.name), wheel.name
    package = Path("python/lora_ext")
    sources = {str(p.relative_to("python")) for p in package.rglob("*.py")}
    assert not (missing := (REQUIRED | sources) - names), f"missing from the wheel: {missing}"
    strays = {n for n in names if not n.startswith(("lora_ext/", "lora_ext-"))}
    strays |= {n for n in names if n.endswith(".so")} - {"lora_ext/_C.so"}
    assert not strays, f"in the wheel, but not part of the package: {strays}"


def check_library(library: Path) -> None:
    """One library for every torch and Python: it needs libtorch's C shims and the system only."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", str(library)))
    assert "libtorch.so" in needed, f"libtorch.so is not among {needed}"
    foreign = [n for n in needed if not re.fullmatch(rf"({SYSTEM_LIBRARIES})\.so[.\d]*", n)]
    assert not foreign, f"the library needs {foreign}"
    symbols = [line.split()[-2:] for line in output_of("nm", "-D", str(library)).splitlines()]
    # Symbols of glibc and libstdc++ carry a version, torch's and Python's do not.
    undefined = {name for kind, name in symbols if kind == "U" and "@" not in name}
    unstable = {name for name in undefined if not re.match(r"aoti_torch_|torch_", name)}
    assert not unstable, f"not of the stable ABI: {unstable}"
    assert STREAM_GETTER not in undefined, f"{STREAM_GETTER}, of libtorch_cuda, must be weak"


def main() -> None:
    wheel, kind = Path(sys.argv[1]), sys.argv[2]
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as directory:
        check_files(wheel, set(archive.namelist()))
        build_info = archive.read("lora_ext/_build_info.py").decode()
        assert (kind == "cpu") == ('CUDA_VERSION = ""' in build_info), build_info
        library = Path(archive.extract("lora_ext/_C.so", directory))
        check_library(library)
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        print(f"{wheel.name} ({kind}): {library.stat().st_size / 2**20:.1f} MiB, loads in torch")


main()

"""Builds the C++/CUDA library with CMake and packs it as one wheel for every Python and torch.

Environment variables: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and NVCC_THREADS mean what they
mean to torch; LORA_EXT_NO_CUDA=1 builds for the CPU only; LORA_EXT_TEST_BUILD=1 adds the pybind11
module with which the tests reach host-side C++ that is no operator.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from _build_backend import cuda_architectures, find_nvcc, find_torch

ROOT = Path(__file__).resolve().parent
# An environment's cmake and ninja serve its pip also where it is not activated.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
TEST_BUILD = os.environ.get("LORA_EXT_TEST_BUILD") == "1"


def run_logged(command: list[str], log: Path) -> None:
    """Run ``command``; ptxas' register and spill report goes to ``log`` only."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if not re.match(r"ptxas info|\s+\d+ bytes stack frame", line):
                print(line, end="", flush=True)
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")


class CMakeBuild(build_ext):
    """Builds everything in one CMake project, and installs what it made into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library: its name carries no Python version.
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise RuntimeError("no torch is installed: pip install 'torch>=2.10'")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # Named each time: the one in CMake's cache may be from an isolated build, gone by now.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "LORA_EXT_VERSION": self.distribution.get_version(),
            "LORA_EXT_TEST_BUILD": "ON" if TEST_BUILD else "OFF",
            "TORCH_DIR": torch,
        }
        if TEST_BUILD:
            import pybind11

            options["Python_EXECUTABLE"] = sys.executable
            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        nvcc = find_nvcc()
        options["LORA_EXT_CUDA"] = "ON" if nvcc else "OFF"
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures()
            options["LORA_EXT_NVCC_THREADS"] = os.environ.get("NVCC_THREADS", "")
        # A build without CUDA shares nothing with one that has it, not even the cache of options.
        self.build_dir = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        self.build_dir.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(self.build_dir)]
        subprocess.run([*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        build = ["cmake", "--build", str(self.build_dir), "-j", jobs]
        run_logged(build, self.build_dir / "build.log")
        self.install_into(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        # Editable installs: setuptools would copy the library alone.
        self.install_into(ROOT / "python" / "lora_ext")

    def install_into(self, package: Path) -> None:
        prefix = ["--prefix", str(package.resolve())]
        subprocess.run(["cmake", "--install", str(self.build_dir), *prefix], check=True)


class StableWheel(bdist_wheel):
    """Tags the wheel for every Python: the library has no Python symbol."""

    def run(self) -> None:
        # Left over from another build, files that no longer belong would be packed too.
        build = self.get_finalized_command("build")
        shutil.rmtree(build.build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if TEST_BUILD else ("py3", "none", platform)


setup(
    ext_modules=[Extension("lora_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)

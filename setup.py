"""Drives CMakeLists.txt, the only description of the native build. Everything else is in pyproject.toml.

Options are CMake's own: CMAKE_ARGS ("-DCMAKE_CUDA_ARCHITECTURES=90a-real"), CXX, CUDACXX, CMAKE_BUILD_PARALLEL_LEVEL.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BYTES_PER_JOB = 1 << 30  # the largest compiler process stays below this


def tool(name: str) -> str:
    """Path of cmake or ninja: of its Python package (whose console script fails inside build isolation), or on PATH."""
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        found = shutil.which(name, path=folder) if folder else None
        if found:
            return found
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is not installed: it builds the kernels of hdit_kernels; run `pip install {name}`")
    return found


def parallel_jobs() -> int:
    """As many compilers as there are cores, but no more than free memory can hold."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return cores
    return max(1, min(cores, free // BYTES_PER_JOB))


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = [] if os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") else ["--parallel", str(parallel_jobs())]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C", *jobs], check=True)


setup(ext_modules=[Extension("hdit_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

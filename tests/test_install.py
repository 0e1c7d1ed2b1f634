"""sdist → wheel → import in another directory, offline and without PyTorch in the build."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import setuptools.build_meta as backend, sys; print(backend.build_{}(sys.argv[1]))"
# -S and -I: the wheel alone, without the site-packages of this environment and without the current directory
IMPORT = """
import importlib.util, pathlib, sys
folder = pathlib.Path(sys.argv[1], "hdit_kernels")
path, = folder.glob("_C.*")
spec = importlib.util.spec_from_file_location("hdit_kernels._C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
import array
x, y = array.array("f", [2.0, 3.0, 0.5, -1.0]), array.array("f", [0.0, 0.0])
module.cpu.geglu_forward(x.buffer_info()[0], y.buffer_info()[0], 1, 2, 4, module.dtypes["float32"], 1)
print(*y)
"""


def build(kind: str, source: Path, target: Path) -> Path:
    """What pip does after it has prepared the build environment; here that is this environment."""
    command = [sys.executable, "-c", BUILD.format(kind), str(target)]
    one_architecture = {
        **os.environ,
        "CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES=80-real",
    }  # halves the time, where nvcc is
    result = subprocess.run(command, cwd=source, env=one_architecture, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked_wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    wheel = build("wheel", source, tmp_path_factory.mktemp("wheel"))
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def tracked_like(folder: str, *suffixes: str) -> set[str]:
    return {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.suffix in suffixes}


def test_sdist_has_everything_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"}
    needed |= tracked_like("csrc", ".h", ".cuh", ".cpp", ".cu", ".py")
    assert needed - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyd", ".o"))]


def test_build_requirements_name_no_torch():
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"\[build-system\]\nrequires = \[(.*?)\]", text, re.DOTALL)[1]
    assert re.findall(r'"([\w-]+)', requires) == ["setuptools", "pybind11", "ninja", "cmake"]
    for source in [ROOT / "setup.py", ROOT / "CMakeLists.txt", *(ROOT / "csrc").iterdir()]:
        code = re.sub(r"//.*|#.*|\"\"\".*?\"\"\"", "", source.read_text() if source.is_file() else "", flags=re.DOTALL)
        assert not re.search(r"\b(torch|ATen|c10)\b", code), source


def test_wheel_computes_where_nothing_else_is_installed(unpacked_wheel, tmp_path):
    command = [sys.executable, "-I", "-S", "-c", IMPORT, str(unpacked_wheel)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = map(float, result.stdout.split())
    # 2·gelu(0.5) and 3·gelu(−1), from tables of the normal distribution: Φ(0.5) = 0.6914625, Φ(−1) = 0.1586553
    assert (first, second) == pytest.approx((2 * 0.5 * 0.6914625, 3 * -1 * 0.1586553), rel=1e-6)


def test_wheel_carries_both_packages_and_their_data(unpacked_wheel):
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    for package in ("hdit", "hdit_kernels"):
        built, source = files(unpacked_wheel / package), files(ROOT / package)
        assert {name for name in source if not name.endswith((".so", ".pyd"))} - built == set()
        assert "py.typed" in built
    (metadata,) = unpacked_wheel.glob("hdit-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "hdit = hdit.__main__:main" in (metadata / "entry_points.txt").read_text()
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", (metadata / "METADATA").read_text(), re.MULTILINE)
    assert set(required) == {"torch", "numpy", "einops", "safetensors", "tqdm", "tyro", "pillow"}


def test_module_needs_neither_a_driver_nor_a_cuda_runtime(unpacked_wheel):
    (module,) = (unpacked_wheel / "hdit_kernels").glob("_C.*")
    listing = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"^\s*(?:/\S*/)?(\w[\w+-]*)[\w.]*\.so", listing, re.MULTILINE))
    assert libraries - {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64"} <= {
        "libgomp",  # by its plain name, so that it is the one that PyTorch has loaded
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libpthread",
        "libdl",
        "librt",
    }
    assert "libc" in libraries

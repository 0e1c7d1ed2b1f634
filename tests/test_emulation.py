"""The emulation that runs CUDA kernels on a CPU (csrc/emulation.h): primitives do what the instructions do, and
mistakes planted into small kernels (tests/emulation.cu) are found, whatever the order of threads."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    compiler = os.environ.get("CXX", "c++")
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fopenmp", "-DHDIT_EMULATION", "-Wno-unknown-pragmas"]
    source = ["-I", str(ROOT / "csrc"), "-x", "c++", str(ROOT / "tests" / "emulation.cu")]
    subprocess.run([compiler, *options, *source, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    for name in ("product", "matrices", "shuffle", "mistake", "mistake_name", "count_strides"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.c_void_p)


def as_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers that bfloat16 holds."""
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_products(library, kind):
    depth = 8 if kind == "tf32" else 16
    # few bits, so that every product and sum is exact in each format
    a, b = (RNG.integers(-8, 8, shape).astype(np.float32) / 4 for shape in ((16, depth), (depth, 8)))
    bits = as_bf16 if kind == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
    a16, b16 = (np.ascontiguousarray(bits(x)) for x in (a, b))
    d = np.full((16, 8), np.nan, np.float32)
    arguments = (pointer(x) for x in (a16, b16, a, b, d))
    assert library.product(["bf16", "f16", "tf32"].index(kind), *arguments) is None
    np.testing.assert_array_equal(d, a @ b + 1)


def test_tf32_drops_the_low_bits(library):
    a = (1 + RNG.integers(0, 2**23, (16, 8)) / 2**23).astype(np.float32)
    b, d = np.eye(8, dtype=np.float32), np.empty((16, 8), np.float32)
    assert library.product(2, None, None, pointer(a), pointer(b), pointer(d)) is None
    exact = (a.view(np.uint32) & 0xFFFFE000).view(np.float32)
    np.testing.assert_array_equal(d, exact + np.float32(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_shared_memory(library, transposed):
    matrices = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    r = np.zeros((32, 4), np.uint32)
    assert library.matrices(transposed, pointer(matrices), pointer(r)) is None
    given = matrices.transpose(0, 2, 1) if transposed else matrices
    pairs = given.reshape(4, 32, 2).astype(np.uint32)  # lane 4·row + i holds elements 2i, 2i + 1 of the row
    np.testing.assert_array_equal(r, (pairs[:, :, 0] | pairs[:, :, 1] << 16).T)


@pytest.mark.parametrize("mask", [1, 2, 16, 31])
def test_shuffles(library, mask):
    x, y = RNG.standard_normal(32).astype(np.float32), np.empty(32, np.float32)
    assert library.shuffle(pointer(x), mask, pointer(y)) is None
    np.testing.assert_array_equal(y, x[np.arange(32) ^ mask])


def test_functions_and_conversions(library):
    """Within the errors that the PTX manual states, and not exact: kernels must live with the errors."""
    x = np.concatenate([RNG.uniform(0.01, 30, 2000), RNG.uniform(8000, 1e6, 200)]).astype(np.float32)
    y = np.empty((10, len(x)), np.float32)
    library.functions(pointer(x), len(x), pointer(y))
    wide = x.astype(np.float64)
    small = slice(2000)
    half, ulp = 2**-24, np.spacing(np.float32(1))

    def worst(row, exact, part=small):
        return float(np.max(np.abs(y[row][part] - exact[part]) / np.abs(exact[part])))

    with np.errstate(over="ignore"):
        assert 1.6e-7 < worst(0, np.exp2(wide)) < 1.7e-7 + half
    assert worst(2, wide**-0.5) < 1.3e-7 + half and worst(3, 1 / wide) < ulp + half
    assert np.max(np.abs(y[1] - np.log2(wide))) < 1.6e-7 * 20 + ulp * 10
    assert np.max(np.abs(y[4] - np.cos(wide))) < 2 * ulp and np.max(np.abs(y[5] - np.sin(wide))) < 2 * ulp
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y[6], x.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(y[7], -x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(y[8], torch.tensor(x).bfloat16().float().numpy())
    np.testing.assert_array_equal(y[9], -y[8])


EITHER_WARP_FIRST = "race: (read after a write by thread|write after a read by another warp).* without a barrier"
MISTAKES = {
    "no_barrier": EITHER_WARP_FIRST,
    "no_warp_barrier": "race: read after a write by thread .* of the same warp without __syncwarp",
    "early_overwrite": EITHER_WARP_FIRST,
    "never_waits": "returned without waiting for its cp.async",
    "shared_overrun": "shared memory overrun, offset 1024 of 1024",
    "shared_misaligned": "misaligned access of 8 bytes to shared memory",
    "global_overrun": "global memory overrun: 4 bytes outside of every tensor",
    "global_underrun": "global memory overrun: 4 bytes outside of every tensor",
    "global_misaligned": "misaligned access of 16 bytes to global memory",
    "written_twice": "race in global memory: write after a write by thread .* of block 0",
    "written_by_two_blocks": "race in global memory: write after a write by thread .* of block",
    "read_of_anothers": "race in global memory: read after a write",
    "branch": "divergence: lanes of a warp are at different warp instructions, emulation.cu:.* and emulation.cu:",
    "returned_lane": "divergence: a (lane returned while others wait|warp instruction after a lane)",
    "two_barriers": "divergence: threads are at the barriers of emulation.cu:.* and emulation.cu:",
    "returned_warp": "divergence: 32 threads wait at the barrier of emulation.cu:.*, the others have returned",
    "barrier_against_shuffle": "divergence: the warp instruction at emulation.cu:.* waits for lanes at a barrier",
    "not_uniform": r"uniform\(\) of different values",
}
UNDEFINED = ("no_wait", "short_wait", "unwritten")  # not seen as such, but what was read is NaN


def run(library, name, order=0, races=True):
    names = []
    while (found := library.mistake_name(len(names))) is not None:
        names.append(found.decode())
    assert set(names) == {"right", *MISTAKES, *UNDEFINED}
    x, y = RNG.standard_normal(64).astype(np.float32), np.zeros(64, np.float32)
    error = library.mistake(names.index(name), order, races, pointer(x), pointer(y))
    return None if error is None else error.decode(), x, y


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", ["right", *MISTAKES, *UNDEFINED])
def test_mistakes_are_found(library, name, order):
    error, x, y = run(library, name, order)
    if name == "right":
        assert error is None
        np.testing.assert_array_equal(y, x[::-1])
    elif name in UNDEFINED:
        assert error is None and np.isnan(y).all()
    else:
        assert error is not None and error.startswith(f"{name} failed: ")
        assert re.search(MISTAKES[name], error), error


def test_a_race_is_what_the_shadow_finds(library):
    """Without it the launch passes, in forward order with the right result."""
    error, x, y = run(library, "no_warp_barrier", order=1, races=False)
    assert error is None and not np.array_equal(y, x.reshape(32, 2)[:, ::-1].ravel())


@pytest.mark.parametrize("words, conflicts, sectors", [(1, 1, 4), (2, 2, 8), (8, 8, 32), (31, 1, 32), (0, 1, 1)])
def test_bank_conflicts_and_sectors(library, words, conflicts, sectors):
    x, y, units = aligned(1024), aligned(32), np.zeros(5, np.int64)
    assert library.count_strides(words, pointer(x), pointer(y), pointer(units)) is None
    shared_read, shared_write, global_read, global_write, sectors_read = units
    assert (shared_read, shared_write, global_read, global_write) == (conflicts, 32, sectors, 4)
    assert sectors_read == sectors


def aligned(count: int) -> np.ndarray:
    """Ones from a multiple of 128 bytes on."""
    memory = np.ones(count + 32, np.float32)
    start = -memory.ctypes.data % 128 // 4
    return memory[start : start + count]

"""GEGLU in Triton: the activation, forward and backward in one pass each, and the projection with the activation as its
epilogue (for inference: the (…, 2n) tensor between the two is never written).

The activation is bound by memory. A program takes a block of rows × columns of the value half and the same block of the
gate half; where widths and strides are multiples of 16, every thread moves 16 bytes at a time. Arithmetic is float32.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import triton_launch
from hdit_kernels.geglu import rows

# Elements of a block for 4 warps: 16 a thread, two accesses of 16 bytes in a 16-bit dtype; a small block has fewer.
# Predicted from the instructions of the compiled kernels, not measured on a GPU.
BLOCK = 2048
COLUMNS = (1024, 512, 256, 128)


class Tile(NamedTuple):
    """What a program of the projection computes, and how."""

    rows: int
    columns: int  # of the output: each stands for two of the weight's rows
    depth: int  # of a step of the sum
    num_warps: int
    num_stages: int
    least: int = 0  # depth of the whole sum from where on it is worth its size


# The largest first, by architecture and bytes of an element. Predicted (registers, shared memory, no spill), not
# measured on a GPU: 128 × 64 leaves room for two programs on an H100's processor, so that one multiplies while the
# other writes; where there is more to multiply, 128 × 128 reads a quarter less from L2. sm_80's serve every other
# NVIDIA GPU too, and fit the 99 KB of the small ones.
SMALL = Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4)
TILES = {
    ("sm_90", 2): (Tile(128, 128, 64, 8, 3, least=256), Tile(128, 64, 64, 8, 3), *SMALL),
    ("sm_90", 4): (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
    ("sm_80", 2): (Tile(128, 128, 64, 8, 3, least=256), *SMALL),
    ("sm_80", 4): (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
    ("hip", 2): (Tile(128, 128, 32, 8, 2, least=256), Tile(64, 64, 64, 4, 2), Tile(64, 32, 64, 4, 2)),
    ("hip", 4): (Tile(128, 64, 32, 8, 2), Tile(64, 32, 32, 4, 2)),
    ("interpreter", 2): (Tile(16, 16, 16, 1, 1),),
    ("interpreter", 4): (Tile(16, 16, 16, 1, 1),),
}
GROUP = 8  # blocks of rows that go through the weight together


@triton.jit
def distribution(gate):
    """Φ(gate) of the standard normal distribution, the ½·(1 + erf(gate/√2)) of GELU.

    Φ(−t) = 2^−q(t) for t ≥ 0, where q is a polynomial of degree 8: the weighted minimax fit on [0, 5.5] of those that
    keep growing beyond. gelu is off by 5e-8 and the rounding of exp2, where PyTorch's in float32 is off by 1e-6, in
    half the instructions of erff, with which the forward kernel would be bound by arithmetic and not by memory.
    """
    t = tl.abs(gate)
    q = 1.745023155308445e-06
    q = q * t - 2.6576261006994173e-05
    q = q * t + 0.000126658080262132
    q = q * t + 0.0002772298757918179
    q = q * t - 0.007241551764309406
    q = q * t + 0.052615419030189514
    q = q * t + 0.45917025208473206
    q = q * t + 1.1511096954345703
    q = q * t + 0.9999998807907104
    below = tl.exp2(-q)
    return tl.where(gate < 0, below, 1.0 - below)


@triton.jit
def block(count, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """(rows, columns, which of them exist) of this program's block of a (count, n) matrix."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    across = tl.cdiv(n, COLUMNS)
    row = (program // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < count) & (column < n)


@triton.jit
def forward_kernel(x, y, count, n, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row, column, inside = block(count, n, ROWS, COLUMNS, WIDE)
    at = x + row * x_row + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + column, value * (gate * distribution(gate)), mask=inside)


@triton.jit
def backward_kernel(x, dy, dx, count, n, x_row, dy_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    row, column, inside = block(count, n, ROWS, COLUMNS, WIDE)
    at = x + row * x_row + column
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(at + n, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(dy + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
    below = distribution(gate)
    slope = below + gate * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * gate * gate)  # 1/√(2π), log2(e)/2
    at = dx + row * (2 * n) + column
    tl.store(at, upstream * (gate * below), mask=inside)
    tl.store(at + n, upstream * value * slope, mask=inside)


@triton.jit
def linear_kernel(
    x, weight, bias, y, count, n, depth, x_row, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # GROUP blocks of rows go through all columns together, so that what they read stays in L2.
    down, across = tl.cdiv(count, ROWS), tl.cdiv(n, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    program %= GROUP * across
    row_block, column_block = first + program % height, program // height
    if WIDE:
        row_block, column_block = row_block.to(tl.int64), column_block.to(tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    # A value's row of the weight lies beside its gate's in the block: both come out in the same thread. Rows past the
    # end repeat the last one, and nothing of them is stored.
    pair = tl.arange(0, 2 * COLUMNS)
    weight_at = tl.minimum(column_block * COLUMNS + pair // 2, n - 1) + pair % 2 * n
    deep = tl.arange(0, DEPTH)
    left = x + tl.minimum(row, count - 1)[:, None] * x_row + deep[None, :]
    right = weight + weight_at[None, :] * weight_row + deep[:, None]
    total = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, mask=(deep < depth - k)[None, :], other=0.0)
            b = tl.load(right, mask=(deep < depth - k)[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += DEPTH
        right += DEPTH
    value, gate = tl.split(tl.reshape(total, (ROWS, COLUMNS, 2)))
    column = (column_block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    if bias is not None:
        value += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)
        gate += tl.load(bias + n + column, mask=column < n, other=0.0).to(tl.float32)
    row = row[:, None]
    tl.store(y + row * n + column, value * (gate * distribution(gate)), mask=(row < count) & (column < n))


def tile(count: int, n: int) -> dict[str, int]:
    """The block of a (count, n) matrix that leaves the fewest lanes idle."""
    columns = min(COLUMNS, key=lambda c: (triton.cdiv(n, c) * c, -c))
    columns = min(columns, triton.next_power_of_2(n))
    height = min(BLOCK // columns, triton.next_power_of_2(max(1, count)))
    return {"ROWS": height, "COLUMNS": columns, "num_warps": max(1, 4 * height * columns // BLOCK)}


def run(kernel, tensors: tuple[Tensor, ...], count: int, n: int, strides: tuple[int, ...], moved: int) -> None:
    shape = tile(count, n)
    programs = triton.cdiv(count, shape["ROWS"]) * triton.cdiv(n, shape["COLUMNS"])
    wide = triton_launch.wide_offsets(*tensors)
    triton_launch.launch(kernel, programs, *tensors, count, n, *strides, **shape, WIDE=wide, moved=moved)


def forward(inputs, outputs, params) -> None:
    x, y = rows(inputs[0]), outputs[0]
    run(forward_kernel, (x, y), len(x), y.shape[-1], (x.stride(0),), 3 * y.nbytes)


def backward(grad_outputs, inputs, saved, grads, params) -> None:
    x, dy, dx = rows(inputs[0]), rows(grad_outputs[0]), grads[0]
    run(backward_kernel, (x, dy, dx), *dy.shape, (x.stride(0), dy.stride(0)), 5 * dy.nbytes)


def projection_tile(count: int, n: int, depth: int, x: Tensor) -> Tile:
    """The largest tile that leaves every processor a program; else the smallest."""
    backend, arch, processors = triton_launch.target(x)
    family = {"cuda": "sm_90" if arch in ("90", "100", "103") else "sm_80"}.get(backend, backend)
    tiles = [t for t in TILES[family, x.itemsize] if depth >= t.least]
    enough = (t for t in tiles if triton.cdiv(count, t.rows) * triton.cdiv(n, t.columns) >= processors)
    return next(enough, tiles[-1])


def linear_forward(inputs, outputs, params) -> None:
    """The projection and the gate at once. float32 keeps its digits: three TF32 products where there are TF32 units."""
    x, weight, bias = inputs
    y, (width, depth) = outputs[0], weight.shape
    n, count = width // 2, math.prod(x.shape[:-1])
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.reshape(count, depth), weight))
    tile = projection_tile(count, n, depth, x)
    nvidia = triton_launch.target(x).backend == "cuda"
    triton_launch.launch(
        linear_kernel, triton.cdiv(count, tile.rows) * triton.cdiv(n, tile.columns),
        x, weight, None if bias is None else bias.contiguous(), y, count, n, depth, x.stride(0), weight.stride(0),
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=GROUP, EVEN=depth % tile.depth == 0,
        PRECISION="tf32x3" if nvidia and x.dtype is torch.float32 else "ieee",
        UPCAST=triton_launch.INTERPRETED, WIDE=triton_launch.wide_offsets(x, weight, y),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        trips=(triton.cdiv(depth, tile.depth),), moved=x.nbytes + weight.nbytes + y.nbytes,
    )  # fmt: skip

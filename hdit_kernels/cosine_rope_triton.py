"""Cosine normalisation and axial RoPE in Triton: q' and k' in one launch and one pass, and their gradients likewise.

A program takes one head of a block of rows × columns of tokens. It holds a head in three pieces, each contiguous in
memory: `first` and `second`, whose features turn together in pairs (i, i + 2r), and `rest`, which does not turn.
With n = rsqrt(Σx² + 1e-6), y = scale·n·R(x) and g = the gradient turned back by R, dx = scale·n·(g − x·n²·Σx·g) and
dscale = Σ n·Σx·g over tokens: within a program, then over programs in a fixed order. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import triton_launch
from hdit_kernels.cosine_rope import EPS, dense

# Elements of q, and of k, in a program of 2 warps: 32 a thread, so that each piece moves 16 bytes at a time. Predicted
# from the compiled kernels, not measured on a GPU.
BLOCK = 2048
TOKENS = 64  # at most, for small heads


def turns(height_angles: Tensor, width_angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles of the rows, then of the columns: each (H + W, heads, r), float32, contiguous.

    They are taken in the angles' own dtype and rounded after, so that float64 angles of many turns keep their digits.
    """
    angles = torch.cat([height_angles, width_angles])
    return angles.cos().float(), angles.sin().float()


@triton.jit
def block(height, width, heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """(batch item, rows, columns, head) of this program's tokens; heads lie next to each other in memory and here."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    head = program % heads
    program //= heads
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    token = tl.arange(0, ROWS * COLUMNS)
    column = program % across * COLUMNS + token % COLUMNS
    program //= across
    return program // down, program % down * ROWS + token // COLUMNS, column, head


@triton.jit
def read(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def read_head(at, exists, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    """The three pieces of a head of each token, (tokens, PAIRS), (tokens, PAIRS) and (tokens, REST)."""
    pair, rest = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :]
    at, turning = at[:, None], exists[:, None] & (pair < 2 * R)
    first, second = read(at + pair, turning), read(at + 2 * R + pair, turning)
    return first, second, read(at + 4 * R + rest, exists[:, None] & (rest < DIM - 4 * R))


@triton.jit
def write_head(
    at, first, second, remainder, exists, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr
):
    pair, rest = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :]
    at, turning = at[:, None], exists[:, None] & (pair < 2 * R)
    tl.store(at + pair, first, mask=turning)
    tl.store(at + 2 * R + pair, second, mask=turning)
    tl.store(at + 4 * R + rest, remainder, mask=exists[:, None] & (rest < DIM - 4 * R))


@triton.jit
def read_turns(cos, sin, row, column, head, exists, height, heads, R: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin for `first` and `second`, (tokens, PAIRS): r angles of the token's row, then r of its column."""
    pair = tl.arange(0, PAIRS)[None, :]
    place = tl.where(pair < R, row[:, None], height + column[:, None])
    at = (place * heads + head) * R + pair % (R if R > 0 else 1)
    turning = exists[:, None] & (pair < 2 * R)
    return read(cos + at, turning), read(sin + at, turning)


@triton.jit
def total(first, second, rest):
    """The sum over a head's features, (tokens, 1)."""
    return (tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(rest, 1))[:, None]


@triton.jit
def prepare(
    x, y, factor, cos, sin, exists,
    EPS: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    first, second, rest = read_head(x, exists, DIM, R, PAIRS, REST)
    norm = factor * tl.rsqrt(total(first * first, second * second, rest * rest) + EPS)
    first, second, rest = first * norm, second * norm, rest * norm
    write_head(y, first * cos - second * sin, second * cos + first * sin, rest, exists, DIM, R, PAIRS, REST)


@triton.jit
def differentiate(
    x, dy, dx, factor, cos, sin, exists,
    EPS: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Writes dx (unless it is None); returns n·Σx·g of each token, (tokens, 1)."""
    first, second, rest = read_head(x, exists, DIM, R, PAIRS, REST)
    turned, other, slope_rest = read_head(dy, exists, DIM, R, PAIRS, REST)
    slope_first, slope_second = turned * cos + other * sin, other * cos - turned * sin
    norm = tl.rsqrt(total(first * first, second * second, rest * rest) + EPS)
    along = norm * total(first * slope_first, second * slope_second, rest * slope_rest)
    if dx is not None:
        back, scaled = norm * along, norm * factor
        first = scaled * (slope_first - first * back)
        second = scaled * (slope_second - second * back)
        write_head(dx, first, second, scaled * (slope_rest - rest * back), exists, DIM, R, PAIRS, REST)
    return along


@triton.jit
def forward_kernel(
    cos, sin, scale, q, k, q_out, k_out, height, width, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    EPS: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    batch, row, column, head = block(height, width, heads, ROWS, COLUMNS, WIDE)
    exists = (row < height) & (column < width)
    turn_cos, turn_sin = read_turns(cos, sin, row, column, head, exists, height, heads, R, PAIRS)
    out = (((batch * height + row) * width + column) * heads + head) * DIM
    q += batch * q_batch + row * q_row + column * q_column + head * q_head
    k += batch * k_batch + row * k_row + column * k_column + head * k_head
    prepare(q, q_out + out, tl.load(scale + head), turn_cos, turn_sin, exists, EPS, DIM, R, PAIRS, REST)
    prepare(k, k_out + out, 1.0, turn_cos, turn_sin, exists, EPS, DIM, R, PAIRS, REST)


@triton.jit
def backward_kernel(
    cos, sin, scale, q, k, q_grad, k_grad, dq, dk, parts, height, width, heads,
    q_batch, q_row, q_column, q_head, k_batch, k_row, k_column, k_head,
    q_grad_batch, q_grad_row, q_grad_column, q_grad_head, k_grad_batch, k_grad_row, k_grad_column, k_grad_head,
    EPS: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    batch, row, column, head = block(height, width, heads, ROWS, COLUMNS, WIDE)
    exists = (row < height) & (column < width)
    turn_cos, turn_sin = read_turns(cos, sin, row, column, head, exists, height, heads, R, PAIRS)
    out = (((batch * height + row) * width + column) * heads + head) * DIM
    if q_grad is not None:
        x = q + batch * q_batch + row * q_row + column * q_column + head * q_head
        dy = q_grad + batch * q_grad_batch + row * q_grad_row + column * q_grad_column + head * q_grad_head
        dx = dq if dq is None else dq + out
        along = differentiate(x, dy, dx, tl.load(scale + head), turn_cos, turn_sin, exists, EPS, DIM, R, PAIRS, REST)
        if parts is not None:
            tl.store(parts + tl.program_id(0), tl.sum(along))
    if k_grad is not None:
        x = k + batch * k_batch + row * k_row + column * k_column + head * k_head
        dy = k_grad + batch * k_grad_batch + row * k_grad_row + column * k_grad_column + head * k_grad_head
        differentiate(x, dy, dk + out, 1.0, turn_cos, turn_sin, exists, EPS, DIM, R, PAIRS, REST)


def constants(q: Tensor, r: int) -> dict[str, int]:
    """The pieces of a head, and the block of tokens that leaves the fewest lanes idle."""
    _, height, width, _, dim = q.shape
    power = triton.next_power_of_2
    count = max(1, min(TOKENS, BLOCK // power(dim), power(height) * power(width)))
    cover = lambda c: triton.cdiv(height, count // c) * (count // c) * triton.cdiv(width, c) * c  # noqa: E731
    columns = min((2**i for i in range(count.bit_length())), key=lambda c: (cover(c), -c))
    pieces = {"DIM": dim, "R": r, "PAIRS": power(max(1, 2 * r)), "REST": power(max(1, dim - 4 * r))}
    warps = 2 if dim <= BLOCK else 8
    return {**pieces, "EPS": EPS, "ROWS": count // columns, "COLUMNS": columns, "num_warps": warps}


def programs(q: Tensor, shape: dict[str, int]) -> int:
    batch, height, width, heads, _ = q.shape
    return batch * triton.cdiv(height, shape["ROWS"]) * triton.cdiv(width, shape["COLUMNS"]) * heads


def forward(inputs, outputs, params) -> None:
    q, k, cosine_scale, *angles = inputs
    q, k = dense(q), dense(k)
    cos, sin = turns(*angles)
    shape = constants(q, cos.shape[-1])
    triton_launch.launch(
        forward_kernel, programs(q, shape), cos, sin, cosine_scale.float().contiguous(), q, k, *outputs,
        *q.shape[1:4], *q.stride()[:4], *k.stride()[:4],
        **shape, WIDE=triton_launch.wide_offsets(cos, q, k, *outputs), moved=4 * outputs[0].nbytes,
    )  # fmt: skip


def backward(grad_outputs, inputs, saved, grads, params) -> None:
    """A gradient that is wanted is written where its output was used; otherwise it is zero, and not this page's."""
    q, k, cosine_scale, *angles = inputs
    q, k, q_grad, k_grad = (dense(t) for t in (q, k, *grad_outputs))
    dq, dk, dscale = grads
    if dq is None and dscale is None:
        q_grad = None
    if dk is None:
        k_grad = None
    cos, sin = turns(*angles)
    shape = constants(q, cos.shape[-1])
    count = programs(q, shape)
    parts = None if dscale is None else q.new_empty((count // max(1, len(dscale)), len(dscale)), dtype=torch.float32)
    strides = [t.stride()[:4] if t is not None else (0,) * 4 for t in (q, k, q_grad, k_grad)]
    moved = (dq, dk, q_grad, k_grad, q if q_grad is not None else None, k if k_grad is not None else None)
    triton_launch.launch(
        backward_kernel, count, cos, sin, cosine_scale.float().contiguous(), q, k, q_grad, k_grad, dq, dk, parts,
        *q.shape[1:4], *(s for four in strides for s in four),
        **shape, WIDE=triton_launch.wide_offsets(cos, q, k, q_grad, k_grad, dq, dk),
        moved=sum(t.nbytes for t in moved if t is not None),
    )  # fmt: skip
    if dscale is not None:
        dscale.copy_(parts.sum(0))

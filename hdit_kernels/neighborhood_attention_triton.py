"""Neighborhood attention in Triton: what its kernels are compiled for and how they are launched, forward and backward.

The kernels are on two pages: neighborhood_attention_triton_forward.py (and what both passes share) and
neighborhood_attention_triton_backward.py. Without a GPU they have been run in Triton's interpreter, compiled, and their
time predicted (`make triton-check`); not yet run on a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hdit_kernels import triton_launch
from hdit_kernels.cosine_rope import dense
from hdit_kernels.cosine_rope_triton import turns
from hdit_kernels.neighborhood_attention_triton_backward import (
    extras_segments,
    keys_tiles,
    queries_strips,
    queries_tiles,
)
from hdit_kernels.neighborhood_attention_triton_forward import forward_strips, forward_tiles


class Tokens(NamedTuple):
    """(B, H, W, heads, dim) or, with row 0, (B, S, heads, dim): the address, and the strides in elements."""

    data: Any
    batch: int
    row: int
    column: int
    head: int


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    rows: int  # the window
    columns: int
    row_stride: int
    column_stride: int
    row_dilation: int
    column_dilation: int
    causal_rows: bool
    causal_columns: bool
    dim: int
    v_dim: int
    r: int  # angles for each axis
    piece: int  # width of a piece of a head; without angles the head is one piece
    width: int  # of a whole head as it is held
    v_width: int
    ty: int  # a tile of ty rows × tx columns …
    tx: int
    step: int  # … against blocks of step rows × keys columns
    keys: int
    cosine: bool
    masked: bool
    running: bool  # the softmax keeps a running maximum
    alone: bool  # a query has one key at most
    split: bool  # prepared queries and keys are held as sums of two, for logits of twice the digits
    exact: bool  # the backward pass divides by what its weights add up to, so that lse may be rounded
    wide: bool  # offsets within a batch item need 64 bits
    held: Any  # type of prepared queries and keys
    upcast: bool
    precision: str


# Rows of keys in a block of a strip, where it is not 2. Predicted, not yet measured on a GPU: with 2, registers spill.
STEPS = {("cuda", "80"): {"queries": 1}, ("cuda", "86"): {"queries": 1}, ("cuda", "89"): {"queries": 1}}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tokens(x: Tensor | None) -> Tokens:
    """x as kernels take it; where there is none, something that is never read."""
    if x is None:
        return None
    batch, *grid, column, head, _ = x.stride()
    return Tokens(x, batch, grid[0] if grid else 0, column, head)


class Call:
    """What the launchers of both passes begin with: inputs as kernels read them, and what no tile size changes."""

    def __init__(self, inputs, params):
        q, k, v, cosine_scale, height_angles, width_angles, extra_k, extra_v, key_mask = inputs
        (self.window, self.stride, self.dilation, self.causal), self.scale = map(tuple, params[:4]), params[4]
        self.q, self.k, self.v, self.extra_k, self.extra_v = (dense(t) for t in (q, k, v, extra_k, extra_v))
        self.batch, self.height, self.width, self.heads, self.dim = q.shape
        self.v_dim, self.extras = v.shape[4], 0 if extra_k is None else extra_k.shape[1]
        self.cosine_scale = None if cosine_scale is None else cosine_scale.float().contiguous()
        self.cos, self.sin = (None, None) if height_angles is None else turns(height_angles, width_angles)
        if self.cos is not None and q.dtype is torch.bfloat16:  # rounded no more than what they turn, and half to fetch
            self.cos, self.sin = self.cos.half(), self.sin.half()
        self.key_mask = None if key_mask is None else key_mask.contiguous()
        self.r = 0 if height_angles is None else height_angles.shape[-1]
        self.target = triton_launch.target(q)
        self.split = cosine_scale is not None and q.dtype is torch.float16  # unit heads, which may be steep
        self.plain = self.stride == (1, 1) == self.dilation and not any(self.causal) and not self.extras

    def shape(self, ty: int, tx: int, step: int, keys: int, wide: bool) -> Shape:
        dtype, cosine = self.q.dtype, self.cosine_scale is not None
        rest = self.dim - 4 * self.r
        piece = power_of_2(max(16, 2 * self.r, (rest + 1) // 2) if self.r else max(16, self.dim))
        held = torch.float16 if cosine and dtype is torch.bfloat16 else dtype
        alone = self.window == (1, 1) and not self.extras
        return Shape(
            *self.window, *self.stride, *self.dilation, *self.causal, self.dim, self.v_dim, self.r,
            piece, 4 * piece if self.r else piece, power_of_2(max(16, self.v_dim)), ty, tx, step, keys,
            cosine, self.key_mask is not None, not cosine or dtype is torch.float16, alone, self.split,
            dtype is torch.float32, wide, TYPES[held],
            self.target.backend == "interpreter", "tf32x3" if self.target.backend == "cuda" else "ieee",
        )  # fmt: skip

    def strips(self) -> bool:
        """Whether the march down strips takes this call: what it holds must fit into registers."""
        small = max(self.dim, self.v_dim) <= 64 and self.q.dtype is not torch.float32
        return self.plain and small and not self.split and max(self.window) <= 9

    def tile(self, kernel: str) -> tuple[int, int, int, int]:
        """ty, tx, step, keys for a kernel that holds one tile, "forward", "queries" or "keys": as many tokens as fit
        into registers (compiled for sm_80 and sm_90a; no size has been measured on a GPU yet)."""
        single = self.q.dtype is torch.float32
        longest = max(self.dim, self.v_dim) * (4 if single else 1)
        held = 64 if longest <= 128 else 32 if longest <= 256 and not (single and kernel != "forward") else 16
        block = 32 if longest <= 256 and not self.split else 16
        rows, columns = (-(-n // d) for n, d in zip((self.height, self.width), self.dilation, strict=True))
        ty = min(8 if held == 64 else 4, power_of_2(rows))
        tx = held // ty
        keys = min(block, power_of_2(min(tx + self.window[1] - 1, columns)))
        return ty, tx, block // keys, keys

    def strip_tile(self, kernel: str) -> tuple[int, int, int, int]:
        """ty, tx, step, keys for "forward" or "queries" (of the backward pass)."""
        return 8, 8, STEPS.get((self.target.backend, self.target.arch), {}).get(kernel, 2), 16

    def trips(self, ty: int, tx: int, step: int, keys: int) -> tuple[float, ...]:
        """How often the loops of a kernel that holds one tile run: over additional tokens, over columns, over rows."""
        rows, columns = (
            min(t + w - 1, n) for t, w, n in zip((ty, tx), self.window, (self.height, self.width), strict=True)
        )
        grid = -(-columns // keys), -(-rows // step)
        return (-(-self.extras // (step * keys)), *grid) if self.extras else grid

    def programs(self, ty: int, tx: int) -> int:
        """Of one tile each."""
        rows, columns = (-(-n // d) for n, d in zip((self.height, self.width), self.dilation, strict=True))
        classes = self.dilation[0] * self.dilation[1]
        return -(-rows // ty) * -(-columns // tx) * classes * self.heads * self.batch

    def segments(self, ty: int, tx: int) -> tuple[int, int]:
        """(tiles in a segment of a strip, segments of a strip): enough programs for the device, and no more, since
        each segment fetches the keys around its ends again."""
        down, strips = -(-self.height // ty), -(-self.width // tx) * self.heads * self.batch
        wanted = -(-4 * self.target.processors // max(strips, 1))
        tiles = max(1, down // max(1, min(wanted, down)))
        return tiles, -(-down // tiles)


def forward(inputs, outputs, params) -> None:
    """Writes outputs (out, lse) of inputs and params as the op has them."""
    call = Call(inputs, params)
    q, k, v = tokens(call.q), tokens(call.k), tokens(call.v)
    out, lse = outputs
    wide = triton_launch.wide_offsets(call.q, call.k, call.v, out)
    grid = call.height, call.width, call.heads
    tables = call.cosine_scale, call.cos, call.sin, call.key_mask, call.scale
    size = call.q.element_size()
    moved = call.batch * call.height * call.width * call.heads * (2 * (call.dim + call.v_dim) * size + 4)
    if call.strips():
        ty, tx, step, keys = call.strip_tile("forward")
        tiles, segments = call.segments(ty, tx)
        shape = call.shape(ty, tx, step, keys, wide)
        strips = -(-call.width // tx)
        both = -(-(call.window[0] - 1) // step)
        trips = (tiles + 1, both, ty // step - both)
        triton_launch.launch(
            forward_strips, strips * segments * call.heads * call.batch, q, k, v, out, lse, *tables, *grid,
            tiles, segments, S=shape, num_warps=4, trips=trips if shape.running else (0, 0, 0, *trips), moved=moved,
        )  # fmt: skip
    else:
        ty, tx, step, keys = call.tile("forward")
        triton_launch.launch(
            forward_tiles, call.programs(ty, tx), q, k, v, tokens(call.extra_k), tokens(call.extra_v),
            out, lse, *tables, *grid, call.extras, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
            trips=call.trips(ty, tx, step, keys), moved=moved,
        )  # fmt: skip


def backward(grad_outputs, inputs, saved, grads, params) -> None:
    """Writes the gradients that are wanted."""
    call = Call(inputs, params)
    (out, lse), (dout, dlse), (dq, dk, dv, dcosine_scale, dextra_k, dextra_v) = saved, grad_outputs, grads
    dout = torch.zeros_like(out) if dout is None else dense(dout)
    dlse = None if dlse is None else dlse.contiguous()
    notes = lse.new_empty((*lse.shape, 4))  # what pass 2 takes from pass 1
    wide = triton_launch.wide_offsets(call.q, call.k, call.v, out, dout, dq, dk, dv)
    grid = call.height, call.width, call.heads
    tables = call.cosine_scale, call.cos, call.sin, call.key_mask, call.scale
    q, k, v, extra_k, extra_v = (tokens(t) for t in (call.q, call.k, call.v, call.extra_k, call.extra_v))
    dq = call.q.new_empty(call.q.shape) if dq is None else dq  # delta has to be computed all the same
    results = tokens(out), tokens(dout), lse, dlse, notes
    size = call.q.element_size()
    heads = call.batch * call.height * call.width * call.heads
    moved = heads * (3 * (call.dim + call.v_dim) * size + 16)  # of each pass: six tensors and the notes
    if call.strips():
        ty, tx, step, keys = call.strip_tile("queries")
        tiles, segments = call.segments(ty, tx)
        programs = -(-call.width // tx) * segments * call.heads * call.batch
        parts = lse.new_empty(programs)  # of cosine_scale's gradient
        both = -(-(call.window[0] - 1) // step)
        triton_launch.launch(
            queries_strips, programs, q, k, v, *results, tokens(dq), parts, *tables, *grid,
            tiles, segments, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
            trips=(tiles + 1, both, ty // step - both), moved=moved,
        )  # fmt: skip
    else:
        ty, tx, step, keys = call.tile("queries")
        programs = call.programs(ty, tx)
        parts = lse.new_empty(programs)  # of cosine_scale's gradient
        triton_launch.launch(
            queries_tiles, programs, q, k, v, extra_k, extra_v, *results, tokens(dq), parts,
            *tables, *grid, call.extras, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
            trips=call.trips(ty, tx, step, keys), moved=moved,
        )  # fmt: skip
    if dcosine_scale is not None:
        if call.batch * call.height * call.width == 0:
            dcosine_scale.zero_()
        else:
            dcosine_scale.copy_(parts.view(call.batch, call.heads, -1).double().sum((0, 2)))
    if dk is not None or dv is not None:
        ty, tx, step, keys = call.tile("keys")
        triton_launch.launch(
            keys_tiles, call.programs(ty, tx), q, k, v, tokens(dout), notes,
            tokens(dk), tokens(dv), *tables, *grid, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
            trips=call.trips(ty, tx, step, keys)[-2:], moved=moved,
        )  # fmt: skip
    if call.extras and (dextra_k is not None or dextra_v is not None):
        backward_of_extras(call, q, extra_k, extra_v, tokens(dout), notes, dextra_k, dextra_v, wide)


def backward_of_extras(call, q, extra_k, extra_v, dout, notes, dextra_k, dextra_v, wide) -> None:
    """The additional tokens' gradients: sums over segments of the queries, added up in a fixed order."""
    ty, tx, step, keys = call.tile("keys")
    blocks = -(-call.height * call.width // (step * keys))
    read = call.batch * call.height * call.width * call.heads * (call.dim + call.v_dim)  # queries and dout
    moved = read * call.q.element_size()
    tokens_across = -(-call.extras // (ty * tx))
    wanted = -(-4 * call.target.processors // max(1, tokens_across * call.heads * call.batch))
    per_segment = -(-blocks // max(1, min(wanted, blocks)))
    segments = -(-blocks // per_segment)
    sums = [None if g is None else notes.new_empty((call.batch, segments, *g.shape[1:])) for g in (dextra_k, dextra_v)]
    triton_launch.launch(
        extras_segments, tokens_across * segments * call.heads * call.batch, q, extra_k, extra_v, dout, notes,
        *(tokens(t) for t in sums), call.cosine_scale, call.cos, call.sin, call.scale, call.height, call.width,
        call.heads, call.extras, per_segment, segments, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
        trips=(per_segment,), moved=moved,
    )  # fmt: skip
    for gradient, parts in zip((dextra_k, dextra_v), sums, strict=True):
        if gradient is not None:
            gradient.copy_(parts.sum(1))

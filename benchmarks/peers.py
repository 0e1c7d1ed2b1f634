"""Neighborhood attention with cosine similarity and axial RoPE as one can write it in PyTorch alone, as fast as we can.

A peer is made for a grid and an odd kernel size, without dilation, stride or masks, and takes what
`hdit_kernels.neighborhood_attention_qkvpacked` takes: qkv (B, H, W, 3, heads, dim), cosine_scale, rope. Each is one
graph of `torch.compile` with everything in it, the preparation of q and k too. `errors` compares with the reference.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hdit_kernels import cases, neighborhood_attention_qkvpacked
from hdit_kernels.cosine_rope import prepare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 8  # queries a side that share their keys in tiled attention: 8 was best of 4×8, 8×8, 4×16, 8×16, 16×16
BLOCK = 64  # of FlexAttention: as fast as 32, faster than 128


def prepared(qkv, cosine_scale, rope):
    """q', k', v, heads first: (B, heads, H, W, dim), in float32."""
    q, k, v = (t.float() for t in qkv.unbind(3))
    q, k = prepare(q, k, cosine_scale, *rope)
    return [t.permute(0, 3, 1, 2, 4) for t in (q, k, v)]


def tokens_first(out, like):
    return out.permute(0, 2, 3, 1, 4).to(like.dtype)


def first_key(i, length: int, kernel: int):
    """Of the window of token i: the window is shifted inward at the border."""
    return torch.clamp(i - kernel // 2, 0, length - kernel)


# ---- k² shifted products --------------------------------------------------------------------------------------------


def wrap(x, axis: int, kernel: int):
    """Half a window more at both ends, such that the shifted window becomes the centred one: a softmax does not care
    about the order of its keys, so before the first row stand rows k//2 + 1 … k − 1, and the same from the end."""
    half, length = kernel // 2, x.shape[axis]
    before, after = x.narrow(axis, kernel - half, half), x.narrow(axis, length - kernel, half)
    return torch.cat([before, x, after], axis)


def unwrap(x, axis: int, kernel: int):
    """The transpose of `wrap`: what was copied is added to where it came from."""
    half, length = kernel // 2, x.shape[axis] - kernel // 2 * 2

    def placed(piece, start):
        return F.pad(piece, [0, 0] * (x.ndim - 1 - axis) + [start, length - half - start])

    before, inside, after = x.split([half, length, half], axis)
    return inside + placed(before, kernel - half) + placed(after, length - kernel)


def shifted(x, grid, a: int, b: int):
    return x[:, :, a : a + grid[0], b : b + grid[1]]


class ShiftedProducts(torch.autograd.Function):
    """softmax(q·k)·v with one product a place in the window. The backward pass is written out because PyTorch's own
    pads every one of the k² gradients of k and v to the whole grid: 21 ms against 16, forward and backward at 64².

    `bound` is at least the largest logit, so that no maximum has to be looked for.
    """

    @staticmethod
    def forward(ctx, q, k, v, bound, kernel: int):
        grid, places = q.shape[2:4], [(a, b) for a in range(kernel) for b in range(kernel)]
        k, v = (wrap(wrap(t, 2, kernel), 3, kernel) for t in (k, v))
        weights = [torch.exp((q * shifted(k, grid, *at)).sum(-1, keepdim=True) - bound) for at in places]
        total = sum(weights)
        out = sum(w * shifted(v, grid, *at) for w, at in zip(weights, places, strict=True)) / total
        ctx.save_for_backward(q, k, v, out, torch.cat(weights, -1) / total)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        (q, k, v, out, weights), kernel = ctx.saved_tensors, ctx.kernel
        grid, places = q.shape[2:4], [(a, b) for a in range(kernel) for b in range(kernel)]
        mean = (dout * out).sum(-1, keepdim=True)
        dlogits = [
            weights[..., j : j + 1] * ((dout * shifted(v, grid, *at)).sum(-1, keepdim=True) - mean)
            for j, at in enumerate(places)
        ]
        dq = sum(d * shifted(k, grid, *at) for d, at in zip(dlogits, places, strict=True))
        # A key gathers from the queries whose window it is in: the same shifts, the other way.
        whole = grid[0] + kernel - 1, grid[1] + kernel - 1
        back = [(kernel - 1 - a, kernel - 1 - b) for a, b in places]
        padding = (0, 0, *(kernel - 1,) * 4)
        dlogits, weights, q, dout = (F.pad(t, padding) for t in (torch.cat(dlogits, -1), weights, q, dout))

        def gathered(factors, tokens):
            moved = (shifted(factors[..., j : j + 1], whole, *at) for j, at in enumerate(back))
            total = sum(f * shifted(tokens, whole, *at) for f, at in zip(moved, back, strict=True))
            return unwrap(unwrap(total, 3, kernel), 2, kernel)

        return dq, gathered(dlogits, q), gathered(weights, dout), None, None


def shifted_products(grid, kernel: int):
    def attention(qkv, cosine_scale, rope):
        bound = cosine_scale.detach().abs().float()[:, None, None, None]
        out = ShiftedProducts.apply(*prepared(qkv, cosine_scale, rope), bound, kernel)
        return tokens_first(out, qkv)

    return torch.compile(attention, fullgraph=True, dynamic=False)


# ---- tiles ----------------------------------------------------------------------------------------------------------


def tiled_attention(grid, kernel: int):
    """`scaled_dot_product_attention` of tiles of queries with all keys that any of them sees, and a mask."""
    with torch.device(DEVICE):
        (key_rows, row_mask), (key_columns, column_mask) = (tiles_of(length, kernel) for length in grid)
    mask = row_mask[:, None, :, None, :, None] & column_mask[None, :, None, :, None, :]
    mask = mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]  # (tiles, 1, queries, keys)
    rows, columns = len(key_rows), len(key_columns)

    def attention(qkv, cosine_scale, rope):
        q, k, v = (t.to(qkv.dtype) for t in prepared(qkv, cosine_scale, rope))
        batch, heads, _, _, dim = q.shape

        def by_tile(t):  # (B, heads, rows, tokens, columns, tokens, dim) → (tiles, heads, tokens, dim)
            return t.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

        queries = by_tile(q.reshape(batch, heads, rows, TILE, columns, TILE, dim))
        keys, values = (by_tile(t[:, :, key_rows][:, :, :, :, key_columns]) for t in (k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, mask.repeat(batch, 1, 1, 1), scale=1.0)
        out = out.reshape(batch, rows, columns, heads, TILE, TILE, dim).permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(batch, *grid, heads, dim)

    return torch.compile(attention, fullgraph=True, dynamic=False)


def tiles_of(length: int, kernel: int):
    """(keys of each tile (tiles, keys), which of them each query sees (tiles, TILE, keys)) along one dimension."""
    start = torch.arange(0, length, TILE)
    span = min(TILE + kernel - 1, length)
    keys = torch.clamp(start - kernel // 2, 0, length - span)[:, None] + torch.arange(span)
    first = first_key(start[:, None] + torch.arange(TILE), length, kernel)[:, :, None]
    return keys, (keys[:, None] >= first) & (keys[:, None] < first + kernel)


# ---- FlexAttention --------------------------------------------------------------------------------------------------


def compiled_flex_attention(grid, kernel: int):
    """On a CPU forward only: "FlexAttention does not support backward" there."""
    block_mask = window_mask(grid, kernel)

    def attention(qkv, cosine_scale, rope):
        q, k, v = (t.to(qkv.dtype).flatten(2, 3).contiguous() for t in prepared(qkv, cosine_scale, rope))
        out = flex_attention(q, k, v, block_mask=block_mask, scale=1.0)
        return tokens_first(out.unflatten(2, grid), qkv)

    return torch.compile(attention, fullgraph=True, dynamic=False)


@functools.lru_cache(maxsize=1)  # 15 seconds at 128²
def window_mask(grid, kernel: int):
    height, width = grid

    def sees(batch, head, query, key):
        down = key // width - first_key(query // width, height, kernel)
        right = key % width - first_key(query % width, width, kernel)
        return (down >= 0) & (down < kernel) & (right >= 0) & (right < kernel)

    tokens = height * width
    size = BLOCK if DEVICE == "cpu" else 128
    compiled = DEVICE == "cuda"  # else all pairs of tokens are made, which at 256² are 4 GB
    return create_block_mask(sees, None, None, tokens, tokens, device=DEVICE, BLOCK_SIZE=size, _compile=compiled)


# ---- NATTEN ---------------------------------------------------------------------------------------------------------


def natten_attention(grid, kernel: int):
    """Where NATTEN is installed (GPUs only): its kernel behind a compiled preparation of q and k."""
    import natten

    prepare_all = torch.compile(
        lambda qkv, *others: [t.permute(0, 2, 3, 1, 4).to(qkv.dtype).contiguous() for t in prepared(qkv, *others)]
    )

    def attention(qkv, cosine_scale, rope):
        return natten.na2d(*prepare_all(qkv, cosine_scale, rope), kernel_size=kernel, scale=1.0)

    return attention


class Peer(NamedTuple):
    make: Callable  # (grid, kernel size) → function(qkv, cosine_scale, rope)
    trains: bool = True


PEERS = {
    "shifted products": Peer(shifted_products),
    "tiled SDPA": Peer(tiled_attention),
    "FlexAttention": Peer(compiled_flex_attention, trains=DEVICE == "cuda"),
}
if DEVICE == "cuda" and importlib.util.find_spec("natten"):
    PEERS["NATTEN"] = Peer(natten_attention)


# ---- the comparison -------------------------------------------------------------------------------------------------


def results(function, case: cases.Case, dtype, dout=None, *, exact=False, train=True) -> list[torch.Tensor]:
    """Of function(qkv, cosine_scale=, rope=): the output, dout, and with `train` the gradients of qkv and cosine_scale.

    A random dout alone would make the gradient of cosine_scale a sum of as many positive as negative terms, which
    says nothing; with the output added to it, each token's part is positive (a larger scale makes a longer output).
    """
    widen = (lambda t: t.double()) if exact else (lambda t: t)
    (qkv,), options = case.arguments(dtype, DEVICE)
    leaves = [widen(qkv).requires_grad_(train), widen(options["cosine_scale"]).requires_grad_(train)]
    out = function(leaves[0], cosine_scale=leaves[1], rope=type(options["rope"])(*map(widen, options["rope"])))
    if not train:
        return [out]
    if dout is None:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, dtype=out.dtype).to(out.device) + 4 * out.detach()
    dout = dout.to(dtype)
    return [out.detach(), dout, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@functools.lru_cache(maxsize=1)
def references(case: cases.Case, dtype) -> list[list[torch.Tensor]]:
    """In float64, and rounded to dtype; unlike those of `cases.compare` in bounded memory."""
    reference = functools.partial(neighborhood_attention_qkvpacked, backend="reference")
    exact = results(reference, case, dtype, exact=True)
    return [exact, results(reference, case, dtype, exact[1])]


def errors(function, case: cases.Case, dtype, train=True) -> dict[str, float]:
    """`cases.error` of the output and, with `train`, of each gradient: 1 is what is allowed."""
    exact, rounded = references(case, dtype)
    got = results(function, case, dtype, exact[1], train=train)
    names = ("output", "", "gradient of qkv", "gradient of cosine_scale")
    compared = zip(names, got, exact, rounded, strict=False)
    return {name: cases.error(g, e, r, dtype) for name, g, e, r in compared if name}

"""Adaptive RMSNorm in Triton: y = x·n·s with n = rsqrt(mean x² + eps), forward and backward in one pass each.

A program takes a block of tokens of one batch item, so that it needs one row of scales, and keeps it in registers
between the mean and the product. With g = dy·s the gradients are dx = n·(g − x·n²·mean(x·g)) and, summed over an
item's tokens, dscale = Σ dy·x·n: a program of the backward pass goes through several blocks of one item, writes its
part of that sum, and the parts are added up afterwards, always in the same order. Rows longer than LONGEST are read
twice, in pieces, by kernels of their own. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import triton_launch
from hdit_kernels.ada_rms_norm import tokens

# Predicted from the compiled kernels' registers and the bytes they keep in flight, not measured on a GPU.
FORWARD_BLOCK = 4096  # bytes for 4 warps: two accesses of 16 bytes a thread; longer rows have more warps
BACKWARD_BLOCK = 2048  # one of x and one of dy, and those of the next block are on their way
LONGEST = 16384  # bytes of a row that is one block
PIECE = 2048  # channels at a time of a longer one
WARPS = 20  # of the backward pass that a processor holds at the same time, at up to 96 registers a thread


@triton.jit
def block(count, tokens, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """(batch item, first token) of this program, `count` of which share an item."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program // count, program % count * TOKENS


@triton.jit
def read(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def reciprocal_rms(squares, channels, eps, exists):
    """n of each token; 1 for tokens that do not exist, where eps = 0 would make it infinite and sums NaN."""
    return tl.rsqrt(tl.where(exists, squares / channels + eps, 1.0))


@triton.jit
def forward_kernel(
    x, scale, y, tokens, channels, x_item, x_token, scale_item, eps,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item, first = block(tl.cdiv(tokens, TOKENS), tokens, TOKENS, WIDE)
    token = (first + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (token < tokens) & (channel < channels)
    values = read(x + item * x_item + token * x_token + channel, inside)
    factor = read(scale + item * scale_item + channel, channel < channels)
    norm = reciprocal_rms(tl.sum(values * values, 1)[:, None], channels, eps, token < tokens)
    tl.store(y + (item * tokens + token) * channels + channel, values * norm * factor, mask=inside)


@triton.jit
def backward_kernel(
    x, scale, dy, dx, parts, tokens, channels, count, x_item, x_token, dy_item, dy_token, scale_item, eps,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    item, first = block(count, tokens, TOKENS, WIDE)
    channel = tl.arange(0, CHANNELS)[None, :]
    factor = read(scale + item * scale_item + channel, channel < channels)
    x += item * x_item + channel
    dy += item * dy_item + channel
    token = (first + tl.arange(0, TOKENS))[:, None]
    inside = (token < tokens) & (channel < channels)
    ahead, dy_ahead = tl.load(x + token * x_token, inside, 0.0), tl.load(dy + token * dy_token, inside, 0.0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for start in range(first, tokens, count * TOKENS):
        token = (start + tl.arange(0, TOKENS))[:, None]
        values, upstream = ahead.to(tl.float32), dy_ahead.to(tl.float32)
        later = token + count * TOKENS  # is on its way while this block is summed
        inside = (later < tokens) & (channel < channels)
        ahead, dy_ahead = tl.load(x + later * x_token, inside, 0.0), tl.load(dy + later * dy_token, inside, 0.0)
        slope = upstream * factor
        squares, products = tl.sum(values * values, 1)[:, None], tl.sum(values * slope, 1)[:, None]
        norm = reciprocal_rms(squares, channels, eps, token < tokens)
        values *= norm
        if dx is not None:
            along = norm * products / channels
            at = dx + (item * tokens + token) * channels + channel
            tl.store(at, norm * (slope - values * along), mask=(token < tokens) & (channel < channels))
        total += upstream * values
    if parts is not None:
        at = parts + tl.program_id(0).to(tl.int64) * channels + channel
        tl.store(at, tl.sum(total, 0)[None, :], mask=channel < channels)


@triton.jit
def long_forward_kernel(
    x, scale, y, tokens, channels, x_item, x_token, scale_item, eps,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token a program, CHANNELS at a time."""
    item, token = block(tokens, tokens, TOKENS, WIDE)
    x += item * x_item + token * x_token
    squares = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        values = read(x + channel, channel < channels)
        squares += values * values
    norm = reciprocal_rms(tl.sum(squares, 0), channels, eps, True)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < channels
        values = read(x + channel, inside) * norm * read(scale + item * scale_item + channel, inside)
        tl.store(y + (item * tokens + token) * channels + channel, values, mask=inside)


@triton.jit
def long_backward_kernel(
    x, scale, dy, dx, parts, tokens, channels, count, x_item, x_token, dy_item, dy_token, scale_item, eps,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token at a time; this program's row of `parts`, zeros at first, is where its sum grows."""
    item, first = block(count, tokens, TOKENS, WIDE)
    scale += item * scale_item
    for token in range(first, tokens, count):
        x_at, dy_at = x + item * x_item + token * x_token, dy + item * dy_item + token * dy_token
        squares = tl.zeros((CHANNELS,), tl.float32)
        products = tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < channels
            values = read(x_at + channel, inside)
            squares += values * values
            products += values * read(dy_at + channel, inside) * read(scale + channel, inside)
        norm = reciprocal_rms(tl.sum(squares, 0), channels, eps, True)
        along = norm * tl.sum(products, 0) / channels
        for start in range(0, channels, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < channels
            values = read(x_at + channel, inside) * norm
            upstream = read(dy_at + channel, inside)
            if dx is not None:
                at = dx + (item * tokens + token) * channels + channel
                tl.store(at, norm * (upstream * read(scale + channel, inside) - values * along), mask=inside)
            if parts is not None:
                at = parts + tl.program_id(0).to(tl.int64) * channels + channel
                tl.store(at, tl.load(at, mask=inside) + upstream * values, mask=inside)
        tl.debug_barrier()  # what a thread reads of `parts` next may be what another wrote


def tile(x: Tensor, size: int) -> tuple[bool, dict[str, int]]:
    """Whether rows are longer than a block, and what a program takes: about `size` bytes."""
    _, length, channels = x.shape
    if channels * x.itemsize > LONGEST:
        return True, {"TOKENS": 1, "CHANNELS": PIECE, "num_warps": 4}
    width = triton.next_power_of_2(channels)
    height = max(1, min(size // (width * x.itemsize), triton.next_power_of_2(length)))
    warps = 4 * height * width * x.itemsize // size
    return False, {"TOKENS": height, "CHANNELS": width, "num_warps": min(16, max(1, warps))}


def dense(scale: Tensor) -> Tensor:
    """scale with a contiguous last axis. Its first stride leads to the next batch item, if it has one for each."""
    return scale if scale.stride(-1) == 1 or scale.shape[-1] == 1 else scale.contiguous()


def forward(inputs, outputs, params) -> None:
    x, (y,) = tokens(*inputs), outputs
    if not y.numel():
        return
    scale = dense(inputs[1])
    items, length, channels = x.shape
    long, shape = tile(x, FORWARD_BLOCK)
    triton_launch.launch(
        long_forward_kernel if long else forward_kernel, items * triton.cdiv(length, shape["TOKENS"]),
        x, scale, y, length, channels, *x.stride()[:2], scale.stride(0), *params,
        **shape, WIDE=triton_launch.wide_offsets(x, scale, y), moved=2 * y.nbytes,
        trips=(triton.cdiv(channels, PIECE),) * 2 if long else (),
    )  # fmt: skip


def backward(grad_outputs, inputs, saved, grads, params) -> None:
    """Where there are tokens: without any, dscale is zero and dx empty."""
    x, dy = tokens(*inputs), tokens(grad_outputs[0], inputs[1])
    scale, (dx, dscale) = dense(inputs[1]), grads
    items, length, channels = x.shape
    long, shape = tile(x, BACKWARD_BLOCK)
    blocks = triton.cdiv(length, shape["TOKENS"])
    programs = triton_launch.target(x).processors * (WARPS // shape["num_warps"])
    count = max(1, min(blocks, programs // items))  # programs that share an item
    if dscale is None:
        parts = None
    elif count == 1 and not long:
        parts = dscale
    else:
        parts = (x.new_zeros if long else x.new_empty)((items, count, channels), dtype=torch.float32)
    pieces = triton.cdiv(channels, PIECE)
    triton_launch.launch(
        long_backward_kernel if long else backward_kernel, items * count,
        x, scale, dy, dx, parts, length, channels, count, *x.stride()[:2], *dy.stride()[:2], scale.stride(0), *params,
        **shape, WIDE=triton_launch.wide_offsets(x, scale, dy, dx),
        trips=(blocks / count, pieces, pieces) if long else (blocks / count,),
        moved=x.nbytes + dy.nbytes + sum(0 if t is None else t.nbytes for t in (dx, parts)),
    )  # fmt: skip
    if parts is not dscale:
        target = dscale.view(items, channels)
        if dscale.dtype is torch.float32:
            torch.sum(parts, 1, out=target)
        else:
            target.copy_(parts.sum(1))

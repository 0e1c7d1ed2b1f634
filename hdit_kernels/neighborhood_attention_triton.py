"""Neighborhood attention in Triton: what both passes share, and the forward pass. The backward pass has its own page.

Two kernels. Both hold a tile of queries against blocks of keys, `step` rows × `keys` columns, and multiply on tensor
cores; keys of a block that a query does not see are masked.

* `forward_strips` (stride 1, dilation 1, not causal): a program owns a strip of columns and marches down it, a tile of
  rows at a time. Two tiles of queries are open, the one that begins at this row and the one above, which still needs
  the first window − 1 rows; so every key is fetched, normalised and rotated once per strip. It has no borders: a
  softmax does not care about the order of its keys, and a window shifted inward at a border holds the same keys as one
  that runs over it, if row −1 is taken to be row window − 1, and row H to be row H − window.
* `forward_tiles`, for everything else: a program owns one tile of queries and walks over all keys that any of them
  sees. With dilation d, every d-th token makes a grid of its own, a class, and a tile lies within a class.

A head is held in four pieces of equal width, [tokens, 4 · piece]: the first features of the pairs that turn together,
their second features, and the rest in two. A product over features does not care about their order either.

With cosine_scale no logit exceeds |scale · cosine_scale|: unless a head is steep, no running maximum is needed.
(float16 always keeps one: its weights would underflow. bfloat16 has its unit queries and keys in float16, which is 8
times finer; float16 has them as sums of two.) A NaN or an infinity in k or v may reach queries that share a block with
those that see it: a matrix unit multiplies what is masked by zero.

Without a GPU these kernels have been run in Triton's interpreter and compiled; not yet run on a GPU.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdit_kernels import triton_launch
from hdit_kernels.cosine_rope import dense
from hdit_kernels.cosine_rope_triton import turns

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STEEP = tl.constexpr(57.0)  # of logits to base 2: exp2(57), summed over 65² keys and multiplied by values, is a float32
LOWEST = tl.constexpr(-1e30)  # where a running maximum begins: −inf less −inf is no number
EPS = tl.constexpr(1e-6)


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


# ---- what both passes share: tokens ---------------------------------------------------------------------------------


@triton.jit
def dot(a, b, sums, S: tl.constexpr):
    """sums + a·b. (upcast: the interpreter's products of bfloat16 are silently wrong.)"""
    if S.upcast:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision=S.precision)


@triton.jit
def offset(row, column, row_stride, column_stride, S: tl.constexpr):
    if S.wide:
        return row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    else:
        return row * row_stride + column * column_stride


@triton.jit
def heads_at(x, row, column, batch, head, S: tl.constexpr):
    """Addresses of the heads of tokens: [tokens]"""
    return x.data + (batch * x.batch + head * x.head) + offset(row, column, x.row, x.column, S)


@triton.jit
def read(x, feature, shown, LIMIT: tl.constexpr, MASKED: tl.constexpr):
    """Features of which LIMIT exist; zeros for the others and, if MASKED, for tokens that are not shown."""
    if MASKED:
        return tl.load(x, mask=shown[:, None] & (feature < LIMIT)[None, :], other=0.0)
    elif feature.shape[0] > LIMIT:
        return tl.load(x, mask=(feature < LIMIT)[None, :], other=0.0)
    else:
        return tl.load(x)


@triton.jit
def pieces(x, shown, S: tl.constexpr, MASKED: tl.constexpr):
    """The four pieces of heads that begin at x: [tokens], in float32."""
    feature = tl.arange(0, S.piece)
    x = x[:, None] + feature[None, :]
    first = read(x, feature, shown, 2 * S.r, MASKED).to(tl.float32)
    second = read(x + 2 * S.r, feature, shown, 2 * S.r, MASKED).to(tl.float32)
    third = read(x + 4 * S.r, feature, shown, S.dim - 4 * S.r, MASKED).to(tl.float32)
    fourth = read(x + 4 * S.r + S.piece, feature, shown, S.dim - 4 * S.r - S.piece, MASKED).to(tl.float32)
    return first, second, third, fourth


@triton.jit
def angles_at(cos, sin, row, column, height, head, heads, S: tl.constexpr):
    """cos and sin [tokens, piece] of tokens; the tables hold the columns' angles behind the rows'."""
    feature = tl.arange(0, S.piece)
    place = tl.where((feature < S.r)[None, :], row[:, None], (height + column)[:, None])
    place = (place * heads + head) * S.r + (feature % S.r)[None, :]
    return read(cos + place, feature, row, 2 * S.r, False), read(sin + place, feature, row, 2 * S.r, False)


@triton.jit
def prepared(
    x, cos, sin, row, column, height, head, heads, shown,
    S: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Heads that begin at x: [tokens], normalised if S.cosine, rotated if TURNED, as one tile of TYPE."""
    N: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = S.width
    unit = tl.zeros([N], tl.float32) + 1.0
    if S.r == 0:
        feature = tl.arange(0, S.piece)
        whole = read(x[:, None] + feature[None, :], feature, shown, S.dim, MASKED)
        if S.cosine:
            whole = whole.to(tl.float32)
            unit = tl.rsqrt(tl.sum(whole * whole, 1) + EPS)
            whole *= unit[:, None]
        return whole.to(TYPE)
    else:
        first, second, third, fourth = pieces(x, shown, S, MASKED)
        if S.cosine:
            square = first * first + second * second + third * third + fourth * fourth
            unit = tl.rsqrt(tl.sum(square, 1) + EPS)
            third *= unit[:, None]
            fourth *= unit[:, None]
        if TURNED:
            cosine, sine = angles_at(cos, sin, row, column, height, head, heads, S)
            if S.cosine:
                cosine *= unit[:, None]
                sine *= unit[:, None]
            turned = first * cosine - second * sine
            second = second * cosine + first * sine
        else:
            turned = first * unit[:, None]
            second *= unit[:, None]
        left = tl.join(turned.to(TYPE), third.to(TYPE))
        right = tl.join(second.to(TYPE), fourth.to(TYPE))
        return tl.reshape(tl.join(left, right), [N, WIDTH])


@triton.jit
def prepared_parts(
    x, cos, sin, row, column, height, head, heads, shown, S: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr
):
    """`prepared`, and what its rounding left over if S.split (else the same again, which is not used)."""
    if S.split:
        exact = prepared(x, cos, sin, row, column, height, head, heads, shown, S, MASKED, TURNED, tl.float32)
        high = exact.to(S.held)
        return high, (exact - high.to(tl.float32)).to(S.held)
    else:
        high = prepared(x, cos, sin, row, column, height, head, heads, shown, S, MASKED, TURNED, S.held)
        return high, high


# ---- what both passes share: windows --------------------------------------------------------------------------------


@triton.jit
def wrapped(i, n, WINDOW: tl.constexpr):
    """Row (column) i of a grid on which a window that runs over a border holds the keys of the one shifted inward."""
    i = tl.where(i < 0, i + WINDOW, i)
    i = tl.where(i >= n, i - WINDOW, i)
    return tl.minimum(tl.maximum(i, 0), n - 1)  # what no query sees may lie anywhere


@triton.jit
def window_start(place, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key of a query's window along one axis of a class of n tokens."""
    if CAUSAL:
        return tl.maximum(tl.minimum(place // STRIDE * STRIDE + (STRIDE - 1), n - 1) - (WINDOW - 1), 0)
    else:
        leader = tl.minimum(place // STRIDE * STRIDE + STRIDE // 2, n - 1)
        return tl.minimum(tl.maximum(leader - WINDOW // 2, 0), n - WINDOW)


@triton.jit
def window_end(place, start, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """One past its last key."""
    if CAUSAL:
        return place + 1
    else:
        return start + WINDOW


@triton.jit
def class_size(n, member, DILATION: tl.constexpr):
    """How many of n tokens along an axis lie in the class that begins at `member`."""
    return (n - member + DILATION - 1) // DILATION


@triton.jit
def strip_of_program(height, width, heads, segments, S: tl.constexpr):
    """(first column, segment of the strip, head, batch item): neighbours in memory run at the same time."""
    strips = (width + S.tx - 1) // S.tx
    program = tl.program_id(0)
    strip = program % strips
    program = program // strips
    segment = program % segments
    program = program // segments
    return strip * S.tx, segment, program % heads, (program // heads).to(tl.int64)


@triton.jit
def tile_of_program(height, width, heads, S: tl.constexpr):
    """(class of rows, of columns, first place of the tile in each, head, batch item)"""
    down = ((height + S.row_dilation - 1) // S.row_dilation + S.ty - 1) // S.ty
    across = ((width + S.column_dilation - 1) // S.column_dilation + S.tx - 1) // S.tx
    program = tl.program_id(0)
    column = program % across
    program = program // across
    column_class = program % S.column_dilation
    program = program // S.column_dilation
    row = program % down
    program = program // down
    row_class = program % S.row_dilation
    program = program // S.row_dilation
    return row_class, column_class, row * S.ty, column * S.tx, program % heads, (program // heads).to(tl.int64)


# ---- the softmax over a block of keys -------------------------------------------------------------------------------


@triton.jit
def products(a, a_low, b, b_low, S: tl.constexpr):
    """Every token of a times every one of b, in float32."""
    result = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), S)
    if S.split:
        result = dot(a_low, tl.trans(b), result, S)
        result = dot(a, tl.trans(b_low), result, S)
    return result


@triton.jit
def unless(seen):
    """What to add to logits: −inf where a key is not seen. (One addition each for rows and for columns costs less than
    a selection by both.)"""
    return tl.where(seen, 0.0, -float("inf"))


@triton.jit
def absorb(
    q, q_low, k, k_low, v, out, total, top, row_bias, column_bias, factor, S: tl.constexpr, RUNNING: tl.constexpr
):
    """One more block of keys and values in a tile's softmax: its sum of weighted values, its denominator, its maximum.

    Not RUNNING: 0 serves as the maximum."""
    logits = products(q, q_low, k, k_low, S) * factor + row_bias + column_bias
    if RUNNING:
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        out *= shrink[:, None]
        total *= shrink
        top = higher
        logits -= top[:, None]
    weights = tl.exp2(logits)
    total += tl.sum(weights, 1)
    return dot(weights.to(v.dtype), v, out, S), total, top


@triton.jit
def block_of_keys(k, v, cos, sin, key_mask, row, column, inside, height, width, batch, head, heads, S: tl.constexpr):
    """Keys and values [keys, …] of tokens, and which of them are inside and shown."""
    shown = inside
    if S.masked:
        hidden = tl.load(key_mask + batch * height * width + offset(row, column, width, 1, S), mask=inside, other=0)
        shown = inside & (hidden != 0)
    keys = heads_at(k, row, column, batch, head, S)
    keys, low = prepared_parts(keys, cos, sin, row, column, height, head, heads, shown, S, S.masked, True)
    feature = tl.arange(0, S.v_width)
    values = heads_at(v, row, column, batch, head, S)[:, None] + feature[None, :]
    return keys, low, read(values, feature, shown, S.v_dim, S.masked), shown


@triton.jit
def finish(out, lse, place, sums, total, top, inside, S: tl.constexpr):
    """Writes a tile. place: of its tokens' heads in lse. A query without any key gives 0 and −inf."""
    feature = tl.arange(0, S.v_width)
    empty = total == 0.0
    result = (sums / tl.where(empty, 1.0, total)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + (place[:, None] * S.v_dim + feature[None, :]), result, inside[:, None] & (feature < S.v_dim)[None, :]
    )
    tl.store(lse + place, tl.where(empty, -float("inf"), (tl.log2(total) + top) * LN2), inside)


# ---- strips ---------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of_strip(below, S: tl.constexpr):
    """What keys add for the tile above, and for this one; below: rows from the first that a query of this tile sees."""
    return unless(below + S.ty < S.rows), unless((below >= 0) & (below < S.rows))


@triton.jit
def columns_of_strip(in_columns, shown, S: tl.constexpr):
    return unless(in_columns & shown[None, :] if S.masked else in_columns)


@triton.jit
def march(
    q, k, v, out, lse, cos, sin, key_mask, factor, height, width, batch, head, heads, x0, begin, end,
    S: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """Tiles begin … end − 1 of a strip. A block of keys serves the tile that begins at its row, and the tile above."""
    BOTH: tl.constexpr = (S.rows - 1 + S.step - 1) // S.step  # so many of its blocks are seen by the tile above
    START: tl.constexpr = LOWEST if RUNNING else 0.0
    M: tl.constexpr = S.ty * S.tx
    WIDTH: tl.constexpr = S.width
    V_WIDTH: tl.constexpr = S.v_width
    query, key = tl.arange(0, M), tl.arange(0, S.step * S.keys)
    y, x = query // S.tx, x0 + query % S.tx
    x_read = tl.minimum(x, width - 1)
    key_y, key_x = key // S.keys, wrapped(x0 - S.columns // 2 + key % S.keys, width, S.columns)
    aside = (key % S.keys)[None, :] - (query % S.tx)[:, None]
    below = key_y[None, :] - y[:, None]
    in_columns = (aside >= 0) & (aside < S.columns)

    q_above = tl.zeros([M, WIDTH], S.held)
    out_above = tl.zeros([M, V_WIDTH], tl.float32)
    total_above = tl.zeros([M], tl.float32)
    top_above = tl.zeros([M], tl.float32) + START
    for tile in tl.range(begin, end + 1, num_stages=1):
        row = tl.minimum(tile * S.ty + y, height - 1)
        here = heads_at(q, row, x_read, batch, head, S)
        here = prepared(here, cos, sin, row, x_read, height, head, heads, row, S, False, True, S.held)
        sums = tl.zeros([M, V_WIDTH], tl.float32)
        total = tl.zeros([M], tl.float32)
        top = tl.zeros([M], tl.float32) + START
        for step in tl.range(0, BOTH, num_stages=1):
            key_row = wrapped(tile * S.ty + step * S.step - S.rows // 2 + key_y, height, S.rows)
            keys, low, values, shown = block_of_keys(
                k, v, cos, sin, key_mask, key_row, key_x, key >= 0, height, width, batch, head, heads, S
            )
            row_bias_above, row_bias = rows_of_strip(below + step * S.step, S)
            column_bias = columns_of_strip(in_columns, shown, S)
            out_above, total_above, top_above = absorb(
                q_above,
                q_above,
                keys,
                low,
                values,
                out_above,
                total_above,
                top_above,
                row_bias_above,
                column_bias,
                factor,
                S,
                RUNNING,
            )
            sums, total, top = absorb(
                here, here, keys, low, values, sums, total, top, row_bias, column_bias, factor, S, RUNNING
            )
        for step in tl.range(BOTH, S.ty // S.step, num_stages=1):
            key_row = wrapped(tile * S.ty + step * S.step - S.rows // 2 + key_y, height, S.rows)
            keys, low, values, shown = block_of_keys(
                k, v, cos, sin, key_mask, key_row, key_x, key >= 0, height, width, batch, head, heads, S
            )
            row_bias_above, row_bias = rows_of_strip(below + step * S.step, S)
            column_bias = columns_of_strip(in_columns, shown, S)
            sums, total, top = absorb(
                here, here, keys, low, values, sums, total, top, row_bias, column_bias, factor, S, RUNNING
            )
        row = (tile - 1) * S.ty + y
        place = batch * height * width * heads + head + offset(row, x_read, width * heads, heads, S)
        inside = (tile > begin) & (row < height) & (x < width)
        finish(out, lse, place, out_above, total_above, top_above, inside, S)
        q_above, out_above, total_above, top_above = here, sums, total, top


@triton.jit
def forward_strips(
    q, k, v, out, lse, cosine_scale, cos, sin, key_mask, scale, height, width, heads, tiles, segments, S: tl.constexpr
):
    """`tiles` tiles of ty ≥ rows − 1 rows × tx ≤ keys + 1 − columns columns, one below the other."""
    x0, segment, head, batch = strip_of_program(height, width, heads, segments, S)
    factor = scale * LOG2E
    if S.cosine:
        factor *= tl.load(cosine_scale + head)
    begin = segment * tiles
    end = tl.minimum(begin + tiles, (height + S.ty - 1) // S.ty)
    if S.running:
        march(q, k, v, out, lse, cos, sin, key_mask, factor, height, width, batch, head, heads, x0, begin, end, S, True)
    else:  # two loops, and not a branch in one: the program that runs is then free of the other
        if tl.abs(factor) > STEEP:
            march(
                q,
                k,
                v,
                out,
                lse,
                cos,
                sin,
                key_mask,
                factor,
                height,
                width,
                batch,
                head,
                heads,
                x0,
                begin,
                end,
                S,
                True,
            )
        else:
            march(
                q,
                k,
                v,
                out,
                lse,
                cos,
                sin,
                key_mask,
                factor,
                height,
                width,
                batch,
                head,
                heads,
                x0,
                begin,
                end,
                S,
                False,
            )


# ---- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def extra_tokens(extra_k, extra_v, token, extras, batch, head, heads, S: tl.constexpr):
    """Additional keys and values, of which `extras` exist, and which of them do."""
    inside = token < extras
    keys = heads_at(extra_k, token, token, batch, head, S)
    keys, low = prepared_parts(keys, extra_k.data, extra_k.data, token, token, 0, head, heads, inside, S, True, False)
    feature = tl.arange(0, S.v_width)
    values = heads_at(extra_v, token, token, batch, head, S)[:, None] + feature[None, :]
    return keys, low, read(values, feature, inside, S.v_dim, True), inside


@triton.jit
def windows_of_tile(height, width, row_class, column_class, row, column, S: tl.constexpr):
    """Of a tile of queries at places row, column of a class: the class's size, and the keys that its windows span."""
    n_rows = class_size(height, row_class, S.row_dilation)
    n_columns = class_size(width, column_class, S.column_dilation)
    last_row, last_column = tl.minimum(row + S.ty, n_rows) - 1, tl.minimum(column + S.tx, n_columns) - 1
    top = window_start(row, n_rows, S.rows, S.row_stride, S.causal_rows)
    left = window_start(column, n_columns, S.columns, S.column_stride, S.causal_columns)
    bottom = window_start(last_row, n_rows, S.rows, S.row_stride, S.causal_rows)
    bottom = window_end(last_row, bottom, S.rows, S.causal_rows)
    right = window_start(last_column, n_columns, S.columns, S.column_stride, S.causal_columns)
    right = window_end(last_column, right, S.columns, S.causal_columns)
    return n_rows, n_columns, top, bottom, left, right


@triton.jit
def in_window(key, query, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether the queries (one axis of the tensor) see the keys (the other), along one axis of the grid."""
    start = window_start(query, n, WINDOW, STRIDE, CAUSAL)
    return (key >= start) & (key < window_end(query, start, WINDOW, CAUSAL))


@triton.jit
def forward_tiles(
    q, k, v, extra_k, extra_v, out, lse, cosine_scale, cos, sin, key_mask, scale, height, width, heads, extras,
    S: tl.constexpr,
):  # fmt: skip
    """One tile of ty rows × tx columns of a class."""
    M: tl.constexpr = S.ty * S.tx
    N: tl.constexpr = S.step * S.keys
    V_WIDTH: tl.constexpr = S.v_width
    row_class, column_class, row0, column0, head, batch = tile_of_program(height, width, heads, S)
    n_rows, n_columns, top_key, bottom, left, right = windows_of_tile(
        height, width, row_class, column_class, row0, column0, S
    )
    if row0 < n_rows and column0 < n_columns:  # a class may be smaller than the largest by one
        factor = scale * LOG2E
        if S.cosine:
            factor *= tl.load(cosine_scale + head)
        query, key = tl.arange(0, M), tl.arange(0, N)
        row, column = row0 + query // S.tx, column0 + query % S.tx
        inside = (row < n_rows) & (column < n_columns)
        row, column = tl.minimum(row, n_rows - 1), tl.minimum(column, n_columns - 1)
        y, x = row_class + row * S.row_dilation, column_class + column * S.column_dilation
        here = heads_at(q, y, x, batch, head, S)
        here, here_low = prepared_parts(here, cos, sin, y, x, height, head, heads, inside, S, False, True)
        sums = tl.zeros([M, V_WIDTH], tl.float32)
        total = tl.zeros([M], tl.float32)
        top = tl.zeros([M], tl.float32) + LOWEST
        if extra_k is not None:
            for start in tl.range(0, extras, N, num_stages=1):
                keys, low, values, shown = extra_tokens(extra_k, extra_v, start + key, extras, batch, head, heads, S)
                sums, total, top = absorb(
                    here, here_low, keys, low, values, sums, total, top, unless(shown[None, :]), 0.0, factor, S, True
                )
        for across in tl.range(left, right, S.keys, num_stages=1):
            key_column = across + key % S.keys
            in_columns = in_window(
                key_column[None, :], column[:, None], n_columns, S.columns, S.column_stride, S.causal_columns
            )
            in_grid = key_column < n_columns
            key_x = column_class + tl.minimum(key_column, n_columns - 1) * S.column_dilation
            for down in tl.range(top_key, bottom, S.step, num_stages=1):
                key_row = down + key // S.keys
                in_rows = in_window(key_row[None, :], row[:, None], n_rows, S.rows, S.row_stride, S.causal_rows)
                key_y = row_class + tl.minimum(key_row, n_rows - 1) * S.row_dilation
                keys, low, values, shown = block_of_keys(
                    k, v, cos, sin, key_mask, key_y, key_x, in_grid & (key_row < n_rows),
                    height, width, batch, head, heads, S,
                )  # fmt: skip
                column_bias = columns_of_strip(in_columns, shown, S)
                sums, total, top = absorb(
                    here, here_low, keys, low, values, sums, total, top, unless(in_rows), column_bias, factor, S, True
                )
        place = batch * height * width * heads + head + offset(y, x, width * heads, heads, S)
        finish(out, lse, place, sums, total, top, inside, S)


# ---- launching ------------------------------------------------------------------------------------------------------

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
        self.key_mask = None if key_mask is None else key_mask.contiguous()
        self.r = 0 if height_angles is None else height_angles.shape[-1]
        self.target = triton_launch.target(q)
        self.plain = self.stride == (1, 1) == self.dilation and not any(self.causal) and not self.extras

    def shape(self, ty: int, tx: int, step: int, keys: int, wide: bool) -> Shape:
        dtype, cosine = self.q.dtype, self.cosine_scale is not None
        rest = self.dim - 4 * self.r
        piece = power_of_2(max(16, 2 * self.r, (rest + 1) // 2) if self.r else max(16, self.dim))
        split = cosine and dtype is torch.float16  # unit queries, of a head that may be steep
        held = torch.float16 if cosine and dtype is torch.bfloat16 else dtype
        alone = self.window == (1, 1) and not self.extras
        return Shape(
            *self.window, *self.stride, *self.dilation, *self.causal, self.dim, self.v_dim, self.r,
            piece, 4 * piece if self.r else piece, power_of_2(max(16, self.v_dim)), ty, tx, step, keys,
            cosine, self.key_mask is not None, not cosine or dtype is torch.float16, alone, split, dtype is torch.float32,
            wide, TYPES[held],
            self.target.backend == "interpreter", "tf32x3" if self.target.backend == "cuda" else "ieee",
        )  # fmt: skip

    def strips(self) -> bool:
        """Whether the march down strips takes this call: what it holds must fit into registers."""
        small = max(self.dim, self.v_dim) <= 64 and self.q.dtype is not torch.float32
        split = self.cosine_scale is not None and self.q.dtype is torch.float16
        return self.plain and small and not split and max(self.window) <= 9

    def tile(self) -> tuple[int, int, int, int]:
        """ty, tx, step, keys for a kernel that holds one tile: fewer queries the longer the heads are."""
        longest = max(self.dim, self.v_dim) * (2 if self.q.dtype is torch.float32 else 1)
        queries = 64 if longest <= 128 else 32 if longest <= 256 else 16
        rows, columns = (-(-n // d) for n, d in zip((self.height, self.width), self.dilation, strict=True))
        ty = min(8 if queries == 64 else 4, power_of_2(rows))
        tx = queries // ty
        keys = min(32, power_of_2(min(tx + self.window[1] - 1, columns)))
        return ty, tx, max(1, (32 if longest <= 256 else 16) // keys), max(keys, 16 if longest > 256 else 1)

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
        ty, tx, step, keys = call.tile()
        triton_launch.launch(
            forward_tiles, call.programs(ty, tx), q, k, v, tokens(call.extra_k), tokens(call.extra_v), out, lse,
            *tables, *grid, call.extras, S=call.shape(ty, tx, step, keys, wide), num_warps=4,
            trips=call.trips(ty, tx, step, keys), moved=moved,
        )  # fmt: skip

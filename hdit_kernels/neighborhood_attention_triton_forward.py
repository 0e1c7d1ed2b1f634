"""Neighborhood attention in Triton: the forward pass, and what the backward pass (its own page) shares with it.

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
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
STEEP = tl.constexpr(57.0)  # of logits to base 2: exp2(57), summed over 65² keys and multiplied by values, is a float32
LOWEST = tl.constexpr(-1e30)  # where a running maximum begins: −inf less −inf is no number
EPS = tl.constexpr(1e-6)


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
    cosine = read(cos + place, feature, row, 2 * S.r, False).to(tl.float32)
    return cosine, read(sin + place, feature, row, 2 * S.r, False).to(tl.float32)


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
    total = tl.where(empty, 1.0, total)
    result = (sums / total[:, None]).to(out.dtype.element_ty)
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
def columns_seen(in_columns, shown, S: tl.constexpr):
    """What keys add because of their columns, or because they are masked."""
    return unless(in_columns & shown[None, :] if S.masked else in_columns)


@triton.jit
def places_of_strip(x0, width, S: tl.constexpr):
    """Of a tile's queries y, x and an x that exists, of a block's keys y and x, and how each key lies to each query."""
    query, key = tl.arange(0, S.ty * S.tx), tl.arange(0, S.step * S.keys)
    y, x = query // S.tx, x0 + query % S.tx
    key_y, key_x = key // S.keys, wrapped(x0 - S.columns // 2 + key % S.keys, width, S.columns)
    aside = (key % S.keys)[None, :] - (query % S.tx)[:, None]
    return y, x, tl.minimum(x, width - 1), key_y, key_x, key_y[None, :] - y[:, None], (aside >= 0) & (aside < S.columns)


@triton.jit
def block_of_strip(
    k, v, cos, sin, key_mask, tile, step, key_y, key_x, below, in_columns, height, width, batch, head, heads,
    S: tl.constexpr,
):  # fmt: skip
    """Keys and values of a step of a tile; what they add by rows for the tile above and for it, and by columns."""
    key_row = wrapped(tile * S.ty + step * S.step - S.rows // 2 + key_y, height, S.rows)
    keys, low, values, shown = block_of_keys(
        k, v, cos, sin, key_mask, key_row, key_x, key_y >= 0, height, width, batch, head, heads, S
    )
    row_bias_above, row_bias = rows_of_strip(below + step * S.step, S)
    return keys, low, values, row_bias_above, row_bias, columns_seen(in_columns, shown, S)


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
    y, x, x_read, key_y, key_x, below, in_columns = places_of_strip(x0, width, S)

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
            keys, low, values, row_bias_above, row_bias, column_bias = block_of_strip(
                k, v, cos, sin, key_mask, tile, step, key_y, key_x, below, in_columns, height, width, batch, head,
                heads, S,
            )  # fmt: skip
            out_above, total_above, top_above = absorb(
                q_above, q_above, keys, low, values, out_above, total_above, top_above, row_bias_above, column_bias,
                factor, S, RUNNING,
            )  # fmt: skip
            sums, total, top = absorb(
                here, here, keys, low, values, sums, total, top, row_bias, column_bias, factor, S, RUNNING
            )
        for step in tl.range(BOTH, S.ty // S.step, num_stages=1):
            keys, low, values, row_bias_above, row_bias, column_bias = block_of_strip(
                k, v, cos, sin, key_mask, tile, step, key_y, key_x, below, in_columns, height, width, batch, head,
                heads, S,
            )  # fmt: skip
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
                q, k, v, out, lse, cos, sin, key_mask, factor, height, width, batch, head, heads, x0, begin, end,
                S, True,
            )  # fmt: skip
        else:
            march(
                q, k, v, out, lse, cos, sin, key_mask, factor, height, width, batch, head, heads, x0, begin, end,
                S, False,
            )  # fmt: skip


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
def columns_of_tile(across, key, column, column_class, n_columns, S: tl.constexpr):
    """Of keys in columns from `across` on: which the queries see, which exist, and x."""
    key_column = across + key % S.keys
    in_columns = in_window(
        key_column[None, :], column[:, None], n_columns, S.columns, S.column_stride, S.causal_columns
    )
    key_x = column_class + tl.minimum(key_column, n_columns - 1) * S.column_dilation
    return in_columns, key_column < n_columns, key_x


@triton.jit
def block_of_tile(
    k, v, cos, sin, key_mask, down, key, key_x, in_columns, in_grid, row, row_class, n_rows, height, width, batch, head,
    heads, S: tl.constexpr,
):  # fmt: skip
    """Keys and values of rows from `down` on; what they add by rows and by columns."""
    key_row = down + key // S.keys
    in_rows = in_window(key_row[None, :], row[:, None], n_rows, S.rows, S.row_stride, S.causal_rows)
    key_y = row_class + tl.minimum(key_row, n_rows - 1) * S.row_dilation
    keys, low, values, shown = block_of_keys(
        k, v, cos, sin, key_mask, key_y, key_x, in_grid & (key_row < n_rows), height, width, batch, head, heads, S
    )
    return keys, low, values, unless(in_rows), columns_seen(in_columns, shown, S)


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
            in_columns, in_grid, key_x = columns_of_tile(across, key, column, column_class, n_columns, S)
            for down in tl.range(top_key, bottom, S.step, num_stages=1):
                keys, low, values, row_bias, column_bias = block_of_tile(
                    k, v, cos, sin, key_mask, down, key, key_x, in_columns, in_grid, row, row_class, n_rows,
                    height, width, batch, head, heads, S,
                )  # fmt: skip
                sums, total, top = absorb(
                    here, here_low, keys, low, values, sums, total, top, row_bias, column_bias, factor, S, True
                )
        place = batch * height * width * heads + head + offset(y, x, width * heads, heads, S)
        finish(out, lse, place, sums, total, top, inside, S)

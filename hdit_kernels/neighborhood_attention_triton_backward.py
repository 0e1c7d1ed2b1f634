"""The backward pass of neighborhood attention in Triton: two passes, no atomics, the same bits every time.

1. Over queries: dq, `delta` = Σ dout·out − dlse of each query (what the softmax's gradient subtracts), and the parts of
   cosine_scale's gradient. `queries_strips` marches as `forward_strips` does; `queries_tiles` serves everything else.
2. Over keys: dk and dv. The queries that see a key are a contiguous range of rows and of columns (longer at a border),
   so `keys_tiles` walks over the range of its tile. `extras_segments` walks over all queries, for additional tokens.

Both compute the softmax again from lse, and end with the gradients of the rotation and of the normalisation.
"""

import triton
import triton.language as tl

from hdit_kernels.neighborhood_attention_triton_forward import (
    EPS,
    LOG2E,
    angles_at,
    block_of_keys,
    block_of_strip,
    block_of_tile,
    class_size,
    columns_of_tile,
    dot,
    extra_tokens,
    heads_at,
    in_window,
    offset,
    pieces,
    places_of_strip,
    prepared_parts,
    products,
    read,
    strip_of_program,
    tile_of_program,
    unless,
    windows_of_tile,
)

# ---- what both passes share -----------------------------------------------------------------------------------------


@triton.jit
def write(x, value, feature, inside, LIMIT: tl.constexpr):
    tl.store(
        x[:, None] + feature[None, :],
        value.to(x.dtype.element_ty),
        inside[:, None] & (feature < LIMIT)[None, :],
    )


@triton.jit
def write_gradient(
    x, dx, gradient, cos, sin, row, column, height, head, heads, factor, shown, inside,
    S: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Gradient of the heads at x from that of the prepared ones over `factor`; returns ⟨unit head, gradient⟩: [tokens].

    y = x·n with n = rsqrt(Σx² + ε) has dx = n·(g − y·⟨y, g⟩). x is read again: registers are scarcer. What is inside
    and not shown is not read, and gets zeros."""
    N: tl.constexpr = gradient.shape[0]
    PIECE: tl.constexpr = S.piece
    feature = tl.arange(0, PIECE)
    along = tl.zeros([N], tl.float32)
    if S.r == 0:
        if S.cosine:
            whole = read(x[:, None] + feature[None, :], feature, shown, S.dim, True).to(tl.float32)
            n = tl.rsqrt(tl.sum(whole * whole, 1) + EPS)
            along = tl.sum(whole * gradient, 1) * n
            gradient = (gradient - whole * (n * along)[:, None]) * n[:, None]
        write(dx, gradient * factor, feature, inside, S.dim)
    else:
        left, right = tl.split(tl.reshape(gradient, [N, PIECE, 2, 2]))
        turned, third = tl.split(left)
        second, fourth = tl.split(right)
        if TURNED:
            cosine, sine = angles_at(cos, sin, row, column, height, head, heads, S)
            first = turned * cosine + second * sine
            second = second * cosine - turned * sine
        else:
            first = turned
        if S.cosine:
            a, b, c, d = pieces(x, shown, S, True)
            n = tl.rsqrt(tl.sum(a * a + b * b + c * c + d * d, 1) + EPS)
            along = tl.sum(a * first + b * second + c * third + d * fourth, 1) * n
            length = (n * along)[:, None]
            unit = n[:, None]
            first = (first - a * length) * unit
            second = (second - b * length) * unit
            third = (third - c * length) * unit
            fourth = (fourth - d * length) * unit
        write(dx, first * factor, feature, inside, 2 * S.r)
        write(dx + 2 * S.r, second * factor, feature, inside, 2 * S.r)
        write(dx + 4 * S.r, third * factor, feature, inside, S.dim - 4 * S.r)
        write(dx + 4 * S.r + PIECE, fourth * factor, feature, inside, S.dim - 4 * S.r - PIECE)
    return along


@triton.jit
def outputs_of(out, dout, lse, dlse, row, column, place, batch, head, S: tl.constexpr):
    """dout, `level`, `delta` and dlse of queries. level: what logits to base 2 lose for exp2 to give weights."""
    feature = tl.arange(0, S.v_width)
    given = heads_at(dout, row, column, batch, head, S)[:, None] + feature[None, :]
    given = read(given, feature, row, S.v_dim, False)
    result = heads_at(out, row, column, batch, head, S)[:, None] + feature[None, :]
    result = read(result, feature, row, S.v_dim, False)
    change = tl.zeros([row.shape[0]], tl.float32)
    delta = change if S.alone else tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    if dlse is not None:
        change = tl.load(dlse + place)
    level = tl.load(lse + place)
    level = tl.where(level == -float("inf"), 0.0, level * LOG2E)  # without any key: anything finite
    return given, level, delta - change, change


@triton.jit
def change_of_weights(a, b, S: tl.constexpr):
    """⟨dout, value⟩ of every pair. A window of one key has the constant weight 1, whatever rounding says."""
    result = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    return result if S.alone else dot(a, tl.trans(b), result, S)


@triton.jit
def softmax_gradient(q, q_low, dout, level, delta, k, k_low, v, row_bias, column_bias, factor, S: tl.constexpr):
    """[queries, keys]: logits (before factor), weights, and the gradient of logits · factor."""
    logits = products(q, q_low, k, k_low, S)
    weights = tl.exp2(logits * factor + (row_bias - level[:, None]) + column_bias)
    return logits, weights, weights * (change_of_weights(dout, v, S) - delta[:, None])


@triton.jit
def add_to_keys(
    k, k_low, v, dk, dv, q, q_low, dout, level, delta, weight, row_bias, column_bias, factor, S: tl.constexpr
):
    """dk, dv + Σ over queries; biases: [keys, queries]"""
    logits = products(k, k_low, q, q_low, S)
    weights = tl.exp2(logits * factor - level[None, :] + row_bias + column_bias)
    if S.exact:
        weights *= weight[None, :]
    dv = dot(weights.to(v.dtype), dout, dv, S)
    dlogits = (weights * (change_of_weights(v, dout, S) - delta[None, :])).to(v.dtype)
    return dot(dlogits, q.to(v.dtype), dk, S), dv


@triton.jit
def write_notes(notes, place, level, delta, norm, inside):
    """What pass 2 has to know of queries: four numbers each, of which the last is not used."""
    four = tl.reshape(tl.join(tl.join(level, norm), tl.join(delta, norm)), [place.shape[0], 4])  # level, delta, norm …
    tl.store(notes + (place[:, None] * 4 + tl.arange(0, 4)[None, :]), four, inside[:, None])


@triton.jit
def read_notes(notes, place, N: tl.constexpr):
    """level, delta, norm. (One load of 16 bytes: three of 4 would be made by every thread for itself, since Triton
    takes a load of fewer elements than threads for cheap.)"""
    four = tl.load(notes + (place[:, None] * 4 + tl.arange(0, 4)[None, :]))
    left, right = tl.split(tl.reshape(four, [N, 2, 2]))
    level, norm = tl.split(left)
    delta, unused = tl.split(right)
    return level, delta, norm


# ---- over queries ---------------------------------------------------------------------------------------------------


@triton.jit
def queries_strips(
    q, k, v, out, dout, lse, dlse, notes, dq, parts, cosine_scale, cos, sin, key_mask, scale, height, width,
    heads, tiles, segments, S: tl.constexpr,
):  # fmt: skip
    """As `forward_strips`. parts: one number of cosine_scale's gradient for each program."""
    M: tl.constexpr = S.ty * S.tx
    WIDTH: tl.constexpr = S.width
    V_WIDTH: tl.constexpr = S.v_width
    BOTH: tl.constexpr = (S.rows - 1 + S.step - 1) // S.step
    x0, segment, head, batch = strip_of_program(height, width, heads, segments, S)
    factor = scale
    if S.cosine:
        factor *= tl.load(cosine_scale + head)
    begin = segment * tiles
    end = tl.minimum(begin + tiles, (height + S.ty - 1) // S.ty)
    y, x, x_read, key_y, key_x, below, in_columns = places_of_strip(x0, width, S)
    first_place = batch * height * width * heads + head

    q_above = tl.zeros([M, WIDTH], S.held)
    dout_above = tl.zeros([M, V_WIDTH], v.data.dtype.element_ty)
    level_above = tl.zeros([M], tl.float32)
    delta_above = tl.zeros([M], tl.float32)
    sums_above = tl.zeros([M, WIDTH], tl.float32)
    part = scale * 0.0
    for tile in tl.range(begin, end + 1, num_stages=1):
        row = tl.minimum(tile * S.ty + y, height - 1)
        here = heads_at(q, row, x_read, batch, head, S)
        here, here_low = prepared_parts(here, cos, sin, row, x_read, height, head, heads, row, S, False, True)
        place = first_place + offset(row, x_read, width * heads, heads, S)
        given, level, delta, change = outputs_of(out, dout, lse, dlse, row, x_read, place, batch, head, S)
        inside = (tile < end) & (tile * S.ty + y < height) & (x < width)
        write_notes(notes, place, level, delta, level, inside)
        sums = tl.zeros([M, WIDTH], tl.float32)
        for step in tl.range(0, BOTH, num_stages=1):
            keys, low, values, row_bias_above, row_bias, column_bias = block_of_strip(
                k, v, cos, sin, key_mask, tile, step, key_y, key_x, below, in_columns, height, width, batch, head,
                heads, S,
            )  # fmt: skip
            logits, weights, dlogits = softmax_gradient(
                q_above, q_above, dout_above, level_above, delta_above, keys, low, values, row_bias_above, column_bias,
                factor * LOG2E, S,
            )  # fmt: skip
            sums_above = dot(dlogits.to(values.dtype), keys.to(values.dtype), sums_above, S)
            logits, weights, dlogits = softmax_gradient(
                here, here, given, level, delta, keys, low, values, row_bias, column_bias, factor * LOG2E, S
            )
            sums = dot(dlogits.to(values.dtype), keys.to(values.dtype), sums, S)
        for step in tl.range(BOTH, S.ty // S.step, num_stages=1):
            keys, low, values, row_bias_above, row_bias, column_bias = block_of_strip(
                k, v, cos, sin, key_mask, tile, step, key_y, key_x, below, in_columns, height, width, batch, head,
                heads, S,
            )  # fmt: skip
            logits, weights, dlogits = softmax_gradient(
                here, here, given, level, delta, keys, low, values, row_bias, column_bias, factor * LOG2E, S
            )
            sums = dot(dlogits.to(values.dtype), keys.to(values.dtype), sums, S)
        row = (tile - 1) * S.ty + y
        inside = (tile > begin) & (row < height) & (x < width)
        row = tl.minimum(tl.maximum(row, 0), height - 1)
        along = write_gradient(
            heads_at(q, row, x_read, batch, head, S), heads_at(dq, row, x_read, batch, head, S), sums_above,
            cos, sin, row, x_read, height, head, heads, factor, inside, inside, S, True,
        )  # fmt: skip
        part += tl.sum(tl.where(inside, along, 0.0), 0)
        q_above, dout_above, level_above, delta_above = here, given, level, delta
        sums_above = sums
    tl.store(parts + tl.program_id(0), part * scale)


@triton.jit
def queries_tiles(
    q, k, v, extra_k, extra_v, out, dout, lse, dlse, notes, dq, parts, cosine_scale, cos, sin, key_mask,
    scale, height, width, heads, extras, S: tl.constexpr,
):  # fmt: skip
    """As `forward_tiles`; parts as in `queries_strips`.

    The gradients of a query's logits add up to dlse, but for what rounding did to delta: that is `slip`. Where a
    softmax is steep, all gradients are small differences and feel it; delta and ⟨gradient, query⟩ are corrected."""
    M: tl.constexpr = S.ty * S.tx
    N: tl.constexpr = S.step * S.keys
    WIDTH: tl.constexpr = S.width
    row_class, column_class, row0, column0, head, batch = tile_of_program(height, width, heads, S)
    n_rows, n_columns, top, bottom, left, right = windows_of_tile(
        height, width, row_class, column_class, row0, column0, S
    )
    factor = scale
    if S.cosine:
        factor *= tl.load(cosine_scale + head)
    here = (row0 < n_rows) & (column0 < n_columns)
    part = 0.0
    if here:
        query, key = tl.arange(0, M), tl.arange(0, N)
        row, column = row0 + query // S.tx, column0 + query % S.tx
        inside = (row < n_rows) & (column < n_columns)
        row, column = tl.minimum(row, n_rows - 1), tl.minimum(column, n_columns - 1)
        y, x = row_class + row * S.row_dilation, column_class + column * S.column_dilation
        held = heads_at(q, y, x, batch, head, S)
        held, held_low = prepared_parts(held, cos, sin, y, x, height, head, heads, inside, S, False, True)
        place = batch * height * width * heads + head + offset(y, x, width * heads, heads, S)
        given, level, delta, change = outputs_of(out, dout, lse, dlse, y, x, place, batch, head, S)
        sums = tl.zeros([M, WIDTH], tl.float32)
        slip = tl.zeros([M], tl.float32)
        mean = tl.zeros([M], tl.float32)
        total = tl.zeros([M], tl.float32)
        if extra_k is not None:
            for start in tl.range(0, extras, N, num_stages=1):
                keys, low, values, shown = extra_tokens(extra_k, extra_v, start + key, extras, batch, head, heads, S)
                logits, weights, dlogits = softmax_gradient(
                    held,
                    held_low,
                    given,
                    level,
                    delta,
                    keys,
                    low,
                    values,
                    unless(shown[None, :]),
                    0.0,
                    factor * LOG2E,
                    S,
                )
                slip, mean, total = (
                    slip + tl.sum(dlogits, 1),
                    mean + tl.sum(weights * logits, 1),
                    total + tl.sum(weights, 1),
                )
                sums = dot(dlogits.to(values.dtype), keys.to(values.dtype), sums, S)
        for across in tl.range(left, right, S.keys, num_stages=1):
            in_columns, in_grid, key_x = columns_of_tile(across, key, column, column_class, n_columns, S)
            for down in tl.range(top, bottom, S.step, num_stages=1):
                keys, low, values, row_bias, column_bias = block_of_tile(
                    k, v, cos, sin, key_mask, down, key, key_x, in_columns, in_grid, row, row_class, n_rows,
                    height, width, batch, head, heads, S,
                )  # fmt: skip
                logits, weights, dlogits = softmax_gradient(
                    held, held_low, given, level, delta, keys, low, values, row_bias, column_bias, factor * LOG2E, S
                )
                slip, mean, total = (
                    slip + tl.sum(dlogits, 1),
                    mean + tl.sum(weights * logits, 1),
                    total + tl.sum(weights, 1),
                )
                sums = dot(dlogits.to(values.dtype), keys.to(values.dtype), sums, S)
        norm = tl.zeros([M], tl.float32) + 1.0
        if S.exact:
            norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
            sums *= norm[:, None]
            slip *= norm
            mean *= norm
        slip -= change
        write_notes(notes, place, level, delta + slip, norm, inside)
        along = write_gradient(
            heads_at(q, y, x, batch, head, S), heads_at(dq, y, x, batch, head, S), sums,
            cos, sin, y, x, height, head, heads, factor, inside, inside, S, True,
        )  # fmt: skip
        part += tl.sum(tl.where(inside, along - slip * mean, 0.0), 0) * scale
    tl.store(parts + tl.program_id(0), part)


# ---- over keys ------------------------------------------------------------------------------------------------------


@triton.jit
def first_reader(key, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query of a class of n tokens that sees a key, along one axis."""
    if CAUSAL:
        return key
    else:
        leader = key - (WINDOW - 1) + WINDOW // 2
        first = (leader - STRIDE // 2 + STRIDE - 1) // STRIDE * STRIDE
        return tl.where(key < WINDOW, 0, tl.maximum(first, 0))


@triton.jit
def last_reader(key, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The last one."""
    if CAUSAL:
        last = (key + WINDOW - STRIDE) // STRIDE * STRIDE + STRIDE - 1
    else:
        last = (key + WINDOW // 2 - STRIDE // 2 + STRIDE) // STRIDE * STRIDE - 1
    return tl.where(key >= n - WINDOW, n - 1, tl.minimum(last, n - 1))  # the last group of a stride may be short


@triton.jit
def block_of_queries(q, dout, notes, cos, sin, row, column, exists, height, width, batch, head, heads, S: tl.constexpr):
    """Prepared queries, dout, level, delta and what their weights add up to, inverted: [queries, …] of tokens."""
    here = heads_at(q, row, column, batch, head, S)
    here, low = prepared_parts(here, cos, sin, row, column, height, head, heads, exists, S, False, True)
    feature = tl.arange(0, S.v_width)
    given = heads_at(dout, row, column, batch, head, S)[:, None] + feature[None, :]
    given = read(given, feature, exists, S.v_dim, False)
    place = batch * height * width * heads + head + offset(row, column, width * heads, heads, S)
    level, delta, norm = read_notes(notes, place, row.shape[0])
    return here, low, given, tl.where(exists, level, float("inf")), delta, norm  # no weight for what does not exist


@triton.jit
def keys_tiles(
    q,
    k,
    v,
    dout,
    notes,
    dk,
    dv,
    cosine_scale,
    cos,
    sin,
    key_mask,
    scale,
    height,
    width,
    heads,
    S: tl.constexpr,
):
    """dk and dv of one tile of ty × tx keys of a class, from the queries that see any of them."""
    M: tl.constexpr = S.ty * S.tx
    WIDTH: tl.constexpr = S.width
    V_WIDTH: tl.constexpr = S.v_width
    row_class, column_class, row0, column0, head, batch = tile_of_program(height, width, heads, S)
    n_rows = class_size(height, row_class, S.row_dilation)
    n_columns = class_size(width, column_class, S.column_dilation)
    if row0 < n_rows and column0 < n_columns:
        factor = scale
        if S.cosine:
            factor *= tl.load(cosine_scale + head)
        key, query = tl.arange(0, M), tl.arange(0, S.step * S.keys)
        row, column = row0 + key // S.tx, column0 + key % S.tx
        inside = (row < n_rows) & (column < n_columns)
        row, column = tl.minimum(row, n_rows - 1), tl.minimum(column, n_columns - 1)
        y, x = row_class + row * S.row_dilation, column_class + column * S.column_dilation
        keys, keys_low, values, shown = block_of_keys(
            k, v, cos, sin, key_mask, y, x, inside, height, width, batch, head, heads, S
        )
        dkeys = tl.zeros([M, WIDTH], tl.float32)
        dvalues = tl.zeros([M, V_WIDTH], tl.float32)
        top = first_reader(row0, n_rows, S.rows, S.row_stride, S.causal_rows)
        bottom = last_reader(tl.minimum(row0 + S.ty, n_rows) - 1, n_rows, S.rows, S.row_stride, S.causal_rows) + 1
        left = first_reader(column0, n_columns, S.columns, S.column_stride, S.causal_columns)
        right = tl.minimum(column0 + S.tx, n_columns) - 1
        right = last_reader(right, n_columns, S.columns, S.column_stride, S.causal_columns) + 1
        for across in tl.range(left, right, S.keys, num_stages=1):
            query_column = across + query % S.keys
            in_grid = query_column < n_columns
            query_column = tl.minimum(query_column, n_columns - 1)
            in_columns = in_window(
                column[:, None], query_column[None, :], n_columns, S.columns, S.column_stride, S.causal_columns
            )
            in_columns = in_columns & in_grid[None, :] & shown[:, None]
            column_bias = unless(in_columns)
            query_x = column_class + query_column * S.column_dilation
            for down in tl.range(top, bottom, S.step, num_stages=1):
                query_row = down + query // S.keys
                exists = in_grid & (query_row < n_rows)
                query_row = tl.minimum(query_row, n_rows - 1)
                in_rows = in_window(row[:, None], query_row[None, :], n_rows, S.rows, S.row_stride, S.causal_rows)
                here, low, given, level, delta, norm = block_of_queries(
                    q, dout, notes, cos, sin, row_class + query_row * S.row_dilation, query_x, exists,
                    height, width, batch, head, heads, S,
                )  # fmt: skip
                dkeys, dvalues = add_to_keys(
                    keys, keys_low, values, dkeys, dvalues, here, low, given, level, delta, norm, unless(in_rows),
                    column_bias, factor * LOG2E, S,
                )  # fmt: skip
        if dv is not None:
            write(heads_at(dv, y, x, batch, head, S), dvalues, tl.arange(0, V_WIDTH), inside, S.v_dim)
        if dk is not None:
            from_, to = heads_at(k, y, x, batch, head, S), heads_at(dk, y, x, batch, head, S)
            write_gradient(from_, to, dkeys, cos, sin, y, x, height, head, heads, factor, shown, inside, S, True)


@triton.jit
def extras_segments(
    q, extra_k, extra_v, dout, notes, dk, dv, cosine_scale, cos, sin, scale, height, width, heads,
    extras, blocks, segments, S: tl.constexpr,
):  # fmt: skip
    """What `blocks` blocks of queries add to the gradients of ty · tx additional tokens; a segment's sum for itself."""
    M: tl.constexpr = S.ty * S.tx
    N: tl.constexpr = S.step * S.keys
    WIDTH: tl.constexpr = S.width
    V_WIDTH: tl.constexpr = S.v_width
    across = (extras + M - 1) // M
    program = tl.program_id(0)
    token = program % across * M + tl.arange(0, M)
    program = program // across
    segment = program % segments
    program = program // segments
    head, batch = program % heads, (program // heads).to(tl.int64)
    factor = scale
    if S.cosine:
        factor *= tl.load(cosine_scale + head)
    keys, keys_low, values, inside = extra_tokens(extra_k, extra_v, token, extras, batch, head, heads, S)
    dkeys = tl.zeros([M, WIDTH], tl.float32)
    dvalues = tl.zeros([M, V_WIDTH], tl.float32)
    for block in tl.range(segment * blocks, (segment + 1) * blocks, num_stages=1):
        query = block * N + tl.arange(0, N)
        exists = query < height * width
        query = tl.minimum(query, height * width - 1)
        here, low, given, level, delta, norm = block_of_queries(
            q, dout, notes, cos, sin, query // width, query % width, exists,
            height, width, batch, head, heads, S,
        )  # fmt: skip
        dkeys, dvalues = add_to_keys(
            keys, keys_low, values, dkeys, dvalues, here, low, given, level, delta, norm,
            unless(inside[:, None]), 0.0, factor * LOG2E, S,
        )  # fmt: skip
    # (gradients lie as (B, segments, S, heads, dim), so that a segment is a row)
    if dv is not None:
        to = heads_at(dv, token * 0 + segment, token, batch, head, S)
        write(to, dvalues, tl.arange(0, V_WIDTH), inside, S.v_dim)
    if dk is not None:
        from_ = heads_at(extra_k, token, token, batch, head, S)
        to = heads_at(dk, token * 0 + segment, token, batch, head, S)
        write_gradient(from_, to, dkeys, cos, sin, token, token, 0, head, heads, factor, inside, inside, S, False)

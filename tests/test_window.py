"""Neighborhood attention on random geometries against an independent brute force: a loop over queries in NumPy."""

import math
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import hdit_kernels
from hdit_kernels import cases


def window(length, kernel, stride, dilation, causal, i):
    """The keys of query i along one dimension, as NATTEN defines them."""
    group, place = i % dilation, i // dilation
    members = range(group, length, dilation)
    n = len(members)
    if causal:
        leader = min((place // stride) * stride + stride - 1, n - 1)
        low, high = max(leader - kernel + 1, 0), place + 1
    else:
        leader = min((place // stride) * stride + stride // 2, n - 1)
        low = min(max(leader - kernel // 2, 0), n - kernel)
        high = low + kernel
    return [members[j] for j in range(low, high)]


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def turn(x, angles):
    """Rotate pairs (i, i + half) of the last axis."""
    half = len(angles)
    pairs = x[:half] + 1j * x[half : 2 * half]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[2 * half :]])


def brute_force(q, k, v, sizes, scale, cosine_scale, rope, extra_keys, extra_values, mask):
    batch, height, width, heads, _ = q.shape
    out, lse = np.zeros((*q.shape[:4], v.shape[4])), np.full(q.shape[:4], -math.inf)
    if cosine_scale is not None:
        q, k = unit(q), unit(k)
        extra_keys = None if extra_keys is None else unit(extra_keys)
    place = lambda y, x, h: np.concatenate([rope[0][y, h], rope[1][x, h]])  # noqa: E731
    for b, y, x, h in np.ndindex(batch, height, width, heads):
        query = q[b, y, x, h] if rope is None else turn(q[b, y, x, h], place(y, x, h))
        keys, values = [], []
        for i in window(height, *(s[0] for s in sizes), y):
            for j in window(width, *(s[1] for s in sizes), x):
                if mask is None or mask[b, i, j]:
                    keys.append(k[b, i, j, h] if rope is None else turn(k[b, i, j, h], place(i, j, h)))
                    values.append(v[b, i, j, h])
        if extra_keys is not None:
            keys += list(extra_keys[b, :, h])
            values += list(extra_values[b, :, h])
        if not keys:
            continue
        logits = np.array(keys) @ query * scale * (1.0 if cosine_scale is None else cosine_scale[h])
        weights = np.exp(logits - logits.max())
        out[b, y, x, h] = weights @ np.array(values) / weights.sum()
        lse[b, y, x, h] = logits.max() + math.log(weights.sum())
    return out, lse


@st.composite
def geometries(draw):
    sizes, grid = [], []
    for _ in range(2):
        kernel = draw(st.integers(1, 6))
        dilation = draw(st.integers(1, 3))
        length = draw(st.integers(kernel * dilation, kernel * dilation + 5))
        sizes.append((kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans())))
        grid.append(length)
    dim = draw(st.integers(1, 9))
    return dict(
        grid=(draw(st.integers(1, 2)), *grid),
        sizes=tuple(zip(*sizes, strict=True)),
        heads=draw(st.integers(1, 3)),
        dim=dim,
        v_dim=draw(st.integers(1, 9)),
        angles=draw(st.integers(0, dim // 4)),
        rope=draw(st.booleans()),
        cosine=draw(st.booleans()),
        extra=draw(st.integers(0, 2)),
        mask=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, -0.7, 2.0])),
        layout=draw(st.permutations([0, 1, 2, 3])),
        seed=draw(st.integers(0, 2**30)),
    )


def call(g, dtype=torch.float64):
    """(arguments of the public function, arguments of the brute force)"""
    generator = torch.Generator().manual_seed(g["seed"])

    def random(*shape, order=None):
        if order is None:
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        order = [*order, 4]  # a tensor whose first four axes lie in memory in this order
        lain = torch.randn([shape[i] for i in order], generator=generator, dtype=torch.float64)
        return lain.permute([order.index(i) for i in range(5)])

    (b, h, w), heads, dim, v_dim = g["grid"], g["heads"], g["dim"], g["v_dim"]
    q, k = (random(b, h, w, heads, dim, order=g["layout"]) for _ in range(2))
    v = random(b, h, w, heads, v_dim, order=g["layout"][::-1])
    cosine_scale = 3 * random(heads) if g["cosine"] else None
    rope = (4 * random(h, heads, g["angles"]), 4 * random(w, heads, g["angles"])) if g["rope"] else None
    extra = (random(b, g["extra"], heads, dim), random(b, g["extra"], heads, v_dim)) if g["extra"] else (None, None)
    mask = torch.rand(b, h, w, generator=generator) > 0.5 if g["mask"] else None
    options = dict(
        cosine_scale=cosine_scale,
        rope=None if rope is None else hdit_kernels.AxialRope(*rope),
        additional_keys=extra[0],
        additional_values=extra[1],
        key_mask=mask,
        return_lse=True,
    )
    scale = g["scale"] if g["scale"] is not None else (1.0 if g["cosine"] else dim**-0.5)
    array = lambda t: None if t is None else t.numpy()  # noqa: E731
    plain = (*map(array, (q, k, v)), g["sizes"], scale, array(cosine_scale))
    plain += (None if rope is None else tuple(map(array, rope)), array(extra[0]), array(extra[1]), array(mask))
    return (q, k, v, *g["sizes"], g["scale"]), options, plain


@given(geometries())
def test_random_geometries(g):
    args, options, plain = call(g)
    out, lse = hdit_kernels.neighborhood_attention(*args, **options)
    exact_out, exact_lse = (torch.from_numpy(a) for a in brute_force(*plain))
    assert cases.error(out, exact_out, exact_out, torch.float64) <= 1
    assert cases.error(lse, exact_lse, exact_lse, torch.float64) <= 1


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_the_window_of_every_query(length, kernel, stride, dilation, causal):
    """The rule itself, and the promise that a query has exactly kernel_size different keys where it is not causal."""
    kernel = min(kernel, length // dilation)
    if kernel < 1:
        return
    stride = min(stride, kernel)
    page = sys.modules["hdit_kernels.neighborhood_attention"]
    index, valid = page.window(length, kernel, stride, dilation, causal)
    for i in range(length):
        keys = index[i].tolist() if valid is None else index[i][valid[i]].tolist()
        assert keys == window(length, kernel, stride, dilation, causal, i)
        assert causal or len(set(keys)) == kernel
        assert min(keys) >= 0 and max(keys) < length
        if valid is not None:  # a slot without a key points at the query itself, which is always attended
            assert (index[i][~valid[i]] == i).all() and i in keys

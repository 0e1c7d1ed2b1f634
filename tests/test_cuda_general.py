"""The general path of neighborhood attention in CUDA C++ (csrc/neighborhood_attention/general*), in its emulation:
random geometries over all that it accepts, remainders of tiles, sizes of heads, additional tokens, hidden keys."""

import math
import random

import pytest
import torch

import hdit_kernels
from hdit_kernels import cases, extension

ORDERS = ("forward", "reverse", "shuffled")
# Emulated, these do more or less than the tests of all backends: on a GPU tests/test_ops.py runs the same kernels.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no emulation")


def errors(case, dtype, seed=0, order="shuffled"):
    extension.emulated.set(order=order, seed=seed + 1)
    try:
        return cases.compare(case, dtype, backend="cuda", seed=seed)
    finally:
        extension.emulated.set()


def check(case, dtype, seed=0, order="shuffled", allowed=1.0):
    found = errors(case, dtype, seed, order)
    # The gradient of a head's scale is a sum over all pairs, of which almost everything cancels, also in the reference:
    # few numbers, whose own errors say little about each other.
    limits = {what: 4.0 if "cosine_scale" in what else allowed for what in found}
    wrong = {what: error for what, error in found.items() if not error <= limits[what]}
    assert not wrong, f"{case}, {dtype}, threads {order}: times the allowed error: {wrong}"


def attention(grid, heads, dim, **options):
    return cases.attention_case(f"{grid} {heads} {dim} {options}", grid, heads, dim, **options)


def draw(generator: random.Random):
    """One geometry that strips decline, and its dtype."""

    def axis():
        kernel, dilation = generator.choice((1, 2, 3, 4, 5, 7, 8, 11)), generator.choice((1, 1, 1, 2, 3))
        length = kernel * dilation + generator.choice((0, 1, 2, 3, 5, 9, 17))
        stride = generator.randint(1, kernel) if generator.random() < 0.4 else 1
        return length, kernel, stride, dilation, generator.random() < 0.25

    rows, columns = axis(), axis()
    while rows[0] * columns[0] > 260:
        rows, columns = axis(), axis()
    names = ("kernel_size", "stride", "dilation", "is_causal")
    options = dict(zip(names, list(zip(rows, columns, strict=True))[1:], strict=True))
    dim = generator.choice((1, 3, 8, 17, 24, 33, 64, 64, 72, 100))
    layout = generator.choice(("plain", "packed", "heads first", "expanded", "every second feature"))
    options |= dict(
        v_dim=dim if layout == "packed" else generator.choice((dim, 1, 9, 40, 64, 80)),
        rope=generator.choice((0, generator.randint(0, dim // 4), dim // 8)),
        cosine=generator.random() < 0.6,
        extra=generator.choice((0, 0, 0, 1, 3, 70)),
        mask=generator.random() < 0.3,
        layout=layout,
    )
    if generator.random() < 0.3:
        options["scale"] = generator.choice((-0.6, 0.0, 0.1))
    plain = (
        options["stride"] == options["dilation"] == (1, 1) and not any(options["is_causal"]) and not options["extra"]
    )
    dtypes = (torch.float32,) if plain else (torch.float32, torch.bfloat16, torch.float16)
    case = attention((generator.choice((1, 1, 2)), rows[0], columns[0]), generator.choice((1, 2, 3)), dim, **options)
    return case, generator.choice(dtypes)


@pytest.mark.parametrize("part", range(4))
def test_random_geometries(part, poisoned):
    generator = random.Random(part)
    for seed in range(12):
        case, dtype = draw(generator)
        check(case, dtype, seed, ORDERS[seed % 3], allowed=1.5)


FULL = dict(cosine=True, rope=2)


@pytest.mark.parametrize("grid", [(1, 16, 8), (1, 17, 15), (1, 9, 33), (1, 3, 65), (1, 65, 3), (1, 24, 23)], ids=str)
def test_remainders_of_tiles(grid, poisoned):
    """Tiles of 8×8, 4×16, … tokens that just fit, and that are cut by one."""
    check(attention(grid, 1, 8, kernel_size=3, **FULL), torch.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "length, kernel, stride, dilation", [(10, 8, 8, 1), (21, 5, 3, 2), (17, 6, 4, 1), (12, 4, 4, 3)]
)
def test_the_last_group_of_a_stride_may_be_short(length, kernel, stride, dilation, causal, poisoned):
    """Its windows end where the grid does: keys are seen by queries that no full group would let see them."""
    options = dict(kernel_size=(kernel, 2), stride=(stride, 1), dilation=(dilation, 1), is_causal=(causal, False))
    check(attention((1, length, 5), 1, 8, **options), torch.float32, allowed=1.5)


HEADS = [
    (1, 1, 0),
    (3, 2, 0),
    (20, 36, 2),
    (17, 65, 3),
    (64, 64, 8),
    (100, 36, 25),
    (256, 64, 64),
    (136, 100, 17),
    (64, 512, 16),
]


@pytest.mark.parametrize("dim, v_dim, rope", HEADS)
def test_sizes_of_heads(dim, v_dim, rope, poisoned):
    """Heads of a part of a chunk and of several, pairs that turn together in one chunk and in two."""
    options = dict(v_dim=v_dim, rope=rope, cosine=dim > 1, extra=2, kernel_size=(3, 4))
    for dtype in (torch.float32, torch.bfloat16) if dim < 100 else (torch.float32,):
        check(attention((1, 5, 9), 2, dim, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("extra", [1, 64, 70])
def test_additional_tokens(extra, dtype, poisoned):
    """Less than a tile of them, one and more, seen by more queries than one segment has, in several batch items."""
    options = dict(extra=extra, kernel_size=5, dilation=(1, 2), is_causal=(False, True), mask=True, **FULL)
    check(attention((2, 9, 20), 2, 16, **options), dtype)


def test_queries_without_keys_among_others(poisoned):
    """out is 0, lse −inf, gradients are finite and 0 where nothing flows, whatever is hidden; the others are right."""
    case = attention((1, 12, 11), 2, 16, kernel_size=3, dilation=(2, 1), mask=True, **FULL)
    (q, k, v), kwargs = case.arguments(torch.float32)
    kwargs["key_mask"][:, :8, :7] = False
    kwargs["key_mask"][:, 8:, 7:] = True
    spoilt = [t.clone() for t in (k, v)]
    for t in spoilt:  # what is hidden may hold anything
        t[~kwargs["key_mask"]] = math.nan
    results = {}
    for backend, tensors in (("cuda", (q, *spoilt)), ("reference", (q, *spoilt))):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, lse = hdit_kernels.neighborhood_attention(*leaves, **kwargs, backend=backend)
        empty = lse == -math.inf
        loss = (out * torch.linspace(-1, 1, 16)).sum() + lse.masked_fill(empty, 0.0).sum()
        results[backend] = (out, lse, *torch.autograd.grad(loss, leaves))
    out, lse, dq, *_ = results["cuda"]
    empty = lse == -math.inf
    assert 0 < empty.sum() < empty.numel()
    assert out[empty].eq(0).all() and dq[empty].eq(0).all()
    for got, exact in zip(results["cuda"], results["reference"], strict=True):
        torch.testing.assert_close(got, exact, rtol=2e-5, atol=2e-5)


def test_a_nan_stays_in_its_tile():
    """It reaches every query that sees it, and no query farther than a tile and a window."""
    q, k, v = torch.randn(3, 1, 40, 40, 1, 8).unbind()
    for spoilt in (k, v):
        spoilt[0, 20, 20] = math.nan
        bad = hdit_kernels.neighborhood_attention(q, k, v, 3, backend="cuda").isnan().any(-1)[0, :, :, 0]
        spoilt[0, 20, 20] = 0.0
        assert bad[19:22, 19:22].all() and not bad[:4].any() and not bad[36:].any() and not bad[:, :4].any()


@pytest.mark.parametrize("options", [dict(extra=5, kernel_size=(4, 3), mask=True), dict(kernel_size=7)], ids=str)
def test_the_same_bits_in_every_order_of_threads(options, poisoned):
    case = attention((2, 9, 19), 2, 64, cosine=True, rope=8, **options)
    results = []
    for order in ORDERS:
        extension.emulated.set(order=order, seed=11)
        results.append(cases.run(case, torch.float32, backend="cuda"))
    extension.emulated.set()
    for other in results[1:]:
        assert all(torch.equal(other[name].nan_to_num(), t.nan_to_num()) for name, t in results[0].items())


@pytest.mark.parametrize("wanted", ["argument 0", "argument 1", "argument 2", "cosine_scale", "additional_values"])
def test_gradients_alone_have_the_same_bits(wanted, poisoned):
    """A gradient does not depend on which others are asked for, and passes that nobody wants write nothing."""
    case = attention((1, 9, 10), 2, 16, extra=3, kernel_size=3, v_dim=24, **FULL)
    args, kwargs = case.arguments(torch.float32)
    names = ["argument 0", "argument 1", "argument 2", "cosine_scale", "additional_keys", "additional_values"]
    tensors = [*args, *(kwargs.pop(name) for name in names[3:])]

    def gradients(which):
        leaves = [t.detach().clone().requires_grad_(name in which) for name, t in zip(names, tensors, strict=True)]
        more = dict(zip(names[3:], leaves[3:], strict=True))
        out, lse = hdit_kernels.neighborhood_attention(*leaves[:3], **more, **kwargs, backend="cuda")
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad((out * weights).sum() + lse.sum(), chosen)
        return dict(zip([n for n in names if n in which], found, strict=True))

    assert torch.equal(gradients([wanted])[wanted], gradients(names)[wanted])


@pytest.mark.parametrize("scale", [80.0, -40.0])
def test_steep_logits(scale, poisoned):
    """Weights of one key at a time: a running maximum has to move, and lse to be exact."""
    check(attention((1, 9, 18), 1, 16, kernel_size=5, scale=scale, is_causal=(True, False), **FULL), torch.float16)
    check(attention((1, 9, 18), 1, 16, kernel_size=5, scale=scale / 4, **FULL), torch.float32, allowed=2.0)
    # Several chunks: blocks that make different parts of a gradient must agree on the logits to the bit.
    check(attention((1, 8, 12), 1, 136, kernel_size=5, scale=scale / 32), torch.float32, allowed=2.0)


def test_the_rounding_of_out_does_not_reach_the_keys(poisoned):
    """With values far from 0, bfloat16's rounding of `out` is a few percent of what a key's gradient is made of."""
    case = attention((1, 10, 12), 2, 16, kernel_size=5, dilation=(2, 1), **FULL)
    (q, k, v), kwargs = case.arguments(torch.bfloat16)
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    def gradients(backend, widen):
        given = [widen(t) for t in (q, k, v + 16)]
        key, scale = (t.clone().requires_grad_() for t in (given[1], widen(kwargs["cosine_scale"])))
        more = {**kwargs, "cosine_scale": scale, "return_lse": False}
        if widen is torch.Tensor.double:
            more["rope"] = hdit_kernels.AxialRope(*(t.double() for t in kwargs["rope"]))
        out = hdit_kernels.neighborhood_attention(given[0], key, given[2], **more, backend=backend)
        return torch.autograd.grad((out * widen(weights)).sum(), (key, scale))

    exact = gradients("reference", torch.Tensor.double)
    for got, right in zip(gradients("cuda", lambda t: t), exact, strict=True):
        assert (got - right).abs().max() <= 2**-7 * right.abs().max()

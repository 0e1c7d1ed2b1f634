"""The fast forward path of neighborhood attention in CUDA (strips_forward_cuda.cu): marching strips, executed on a CPU
with races looked for, against the float64 result of the CPU kernel for the same values."""

import random
from pathlib import Path

import pytest
import torch

import hdit_kernels
from hdit_kernels import AxialRope, cases, extension

STRIPS = "neighborhood_attention_strips_forward"
ORDERS = ("forward", "reverse", "shuffled")


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    if extension.emulated is None:  # there is a GPU
        monkeypatch.setattr(extension, "emulated", None)
        extension.load_emulated(Path(__file__).parent.parent / "build/emulated")
    emulate()
    yield
    extension.emulated.set()


def emulate(**settings):
    """Which kernel ran is told for launches that are counted."""
    extension.emulated.set(count=True, **settings)


def place(x, layout):
    """x: (B, H, W, heads, dim) with these values and another order in memory."""
    b, h, w, n, d = x.shape
    if layout == "packed":
        return x.new_empty(b, h, w, 3, n, d).copy_(x[:, :, :, None].expand(b, h, w, 3, n, d)).unbind(3)[1]
    if layout == "heads first":
        return x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    if layout == "columns first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1, :, :, :1].expand(x.shape)
    if layout == "padded":
        return torch.cat([x, x.new_full((b, h, w, n, 8), float("nan"))], -1)[..., :d]
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def inputs(grid, heads=1, dim=64, *, dtype=torch.bfloat16, factor=10.0, rope=True, spread=1.0, layout="plain", seed=0):
    """q, k, v and the keyword arguments; factor: about what cosine_scale is, or None."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    b, h, w = grid
    q, k, v = (place((s * normal(b, h, w, heads, dim)).to(dtype), layout) for s in (spread, spread, 1.0))
    more = {}
    if factor is not None:
        more["cosine_scale"] = factor * (1 + 0.1 * normal(heads))
    if rope:
        more["rope"] = AxialRope(10 * normal(h, heads, dim // 8), 10 * normal(w, heads, dim // 8))
    return (q, k, v), more


def widened(value):
    return AxialRope(*map(widened, value)) if isinstance(value, AxialRope) else value.double()


def attend(tokens, kernel, more, **options):
    """out and lse of backend "cuda", and whether strips made them."""
    extension.emulated.take_launches()
    results = hdit_kernels.neighborhood_attention(*tokens, kernel, return_lse=True, backend="cuda", **more, **options)
    launches = extension.emulated.take_launches()
    return results, all(launch["call"].startswith(STRIPS) for launch in launches)


def steepness(tokens, more, scale=None, **_):
    """What no logit exceeds."""
    if "cosine_scale" in more:
        return abs(scale or 1.0) * more["cosine_scale"].abs().max().item()
    longest = [t.float().norm(dim=-1).max().item() for t in tokens[:2]]
    return (tokens[0].shape[-1] ** -0.5 if scale is None else abs(scale)) * longest[0] * longest[1]


def check(tokens, kernel, more, strips=True, **options):
    results, taken = attend(tokens, kernel, more, **options)
    assert taken == strips
    wide = {name: widened(value) for name, value in more.items()}
    exact = hdit_kernels.neighborhood_attention(
        *(t.double() for t in tokens), kernel, return_lse=True, backend="cpu", **wide, **options
    )
    dtype, out, lse = tokens[0].dtype, *results
    assert cases.error(out, exact[0], exact[0].to(dtype), dtype) <= 1
    # Weights are rounded to dtype, by eps/2 at most. Queries and keys (float16 if of length 1), cosines and sines are
    # rounded by eps/2 each, but sums over a head's features keep a fraction of that.
    held = torch.float16 if "cosine_scale" in more else dtype
    off = torch.finfo(dtype).eps / 2 + torch.finfo(held).eps / 3 * steepness(tokens, more, **options)
    assert (lse - exact[1]).abs().max() <= off
    return results


@pytest.mark.parametrize("width", range(7, 34))
def test_every_remainder_of_the_width(width):
    """Strips of 24 columns, of which 8 are a tile; heights over all remainders of a step of 4 rows."""
    check(*with_kernel(7, inputs((1, 7 + width % 8, width), seed=width)))


def with_kernel(kernel, made):
    return made[0], kernel, made[1]


@pytest.mark.parametrize("rows", range(2, 10))
def test_windows(rows):
    """Every pair of a window's rows and columns, odd and even, on grids as small as it and a little larger."""
    for columns in range(2, 10):
        n = 8 * rows + columns
        emulate(order=ORDERS[n % 3], seed=n)
        dtype, factor = (torch.bfloat16, torch.float16)[n % 2], (10.0, None, -6.0)[n // 2 % 3]
        made = inputs((1, rows + n % 4, columns + n % 11), dtype=dtype, factor=factor, rope=n % 5 > 0, seed=n)
        check(*with_kernel((rows, columns), made))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9, (5, 4), (8, 9)])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_marches(dim, kernel, dtype):
    """Many steps of a block, so that the ring goes round; strips and segments of unequal size."""
    made = inputs((1, 34, 25), 2, dim, dtype=dtype, factor=(8.0 if dim != 32 else None), seed=dim)
    check(*with_kernel(kernel, made))


@pytest.mark.parametrize("layout", ["packed", "heads first", "columns first", "expanded", "padded", "unaligned"])
def test_layouts(layout):
    """Strides are read in place; what is not aligned to 16 bytes is left to the general path."""
    for dtype in (torch.bfloat16, torch.float16):
        check(*with_kernel(5, inputs((2, 9, 13), 2, dtype=dtype, layout=layout)), strips=layout != "unaligned")


def test_tensors_of_different_layouts():
    tokens, more = inputs((2, 8, 13), 2)
    tokens = [place(t, layout) for t, layout in zip(tokens, ("heads first", "packed", "padded"), strict=True)]
    check(tokens, 7, more)


@pytest.mark.parametrize("factor", [0.0, 1e-4, -10.0, 10.7, 10.8, 39.0, 40.0, 57.0, 58.0, -200.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosine_scales(dtype, factor):
    """Zero, negative, and steep ones, on both sides of where a maximum is kept, or where unit numbers are split."""
    check(*with_kernel(7, inputs((1, 8, 15), 3, dtype=dtype, factor=factor)))
    check(*with_kernel((4, 5), inputs((1, 8, 15), 3, dtype=dtype, factor=factor)), scale=0.9)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steep_heads_beside_flat_ones(dtype, dim):
    tokens, more = inputs((1, 9, 12), 4, dim, dtype=dtype)
    more["cosine_scale"] = torch.tensor([10.0, -150.0, 0.0, 90.0])
    check((tokens[0], tokens[0], tokens[2]), 7, more)  # a query and its own key are alike: 2^130 is no float32 number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spread", "scale"), [(1.0, None), (1.0, -0.2), (1.0, 0.0), (3.0, None), (6.0, 0.1)])
def test_plain_dot_products(dtype, spread, scale):
    """Logits of any size, which a maximum that rises on the way keeps within range."""
    check(*with_kernel(7, inputs((1, 9, 15), 2, dtype=dtype, factor=None, rope=False, spread=spread)), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maximum_that_rises_with_every_row(dtype):
    """Logits grow by 20 with every row, down or up the image: weights of what came before must vanish, not overflow."""
    for direction in (1, -1):
        tokens, more = inputs((1, 12, 15), dtype=dtype, factor=None, rope=False)
        q, k, _ = tokens
        q[..., 0], k[..., 0] = 4, (direction * 40 * torch.arange(12.0)[None, :, None, None]).to(dtype)
        check(tokens, 7, more)


def test_the_same_bits_whatever_the_order_and_the_segments():
    tokens, more = inputs((2, 21, 30), 2, layout="packed")
    expected = None
    for order, multiprocessors in (("forward", 1), ("reverse", 1), ("shuffled", 2), ("shuffled", 132)):
        emulate(order=order, seed=multiprocessors, multiprocessors=multiprocessors)
        (out, lse), taken = attend(tokens, 7, more)
        assert taken
        expected = expected or (out, lse)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_not_a_number_stays_near():
    """A NaN reaches the queries that see it, and those of tiles of 2 × 8 whose 16 columns of keys hold it."""
    for which in (1, 2):
        tokens, more = inputs((1, 21, 40))
        tokens[which][0, 10, 20, 0, 3] = torch.nan
        (out, _), _ = attend(tokens, 5, more)
        found = out.isnan().any(-1)[0, :, :, 0]
        assert found[8:13, 18:23].all()
        far = torch.ones(21, 40, dtype=torch.bool)
        far[8:14, 8:24] = False  # tiles that begin in rows 8, 10, 12 and columns 8, 16
        assert not (found & far).any()


@pytest.mark.parametrize(
    "options",
    [dict(stride=2), dict(dilation=2), dict(is_causal=True), dict(kernel=1), dict(kernel=(3, 10)), dict(dim=48)],
)
def test_what_is_left_to_the_general_path(options):
    options = dict(options)
    made = inputs((1, 10, 21), dim=options.pop("dim", 64))
    check(*with_kernel(options.pop("kernel", 3), made), strips=False, **options)


def test_tokens_that_are_masked_or_added_are_left_to_the_general_path():
    tokens, more = inputs((1, 6, 9))
    mask = torch.rand(1, 6, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    _, taken = attend(tokens, 3, {**more, "key_mask": mask})
    assert not taken
    extra = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, taken = attend(tokens, 3, {**more, "additional_keys": extra, "additional_values": extra})
    assert not taken


def test_empty_batch():
    tokens, more = inputs((0, 8, 9))
    out = hdit_kernels.neighborhood_attention(*tokens, 7, backend="cuda", **more)
    assert out.shape == (0, 8, 9, 1, 64)


@pytest.mark.parametrize("seed", range(30))
def test_random_geometries(seed):
    draw = random.Random(seed)
    window = draw.randint(2, 9), draw.randint(2, 9)
    grid = draw.randint(1, 2), window[0] + draw.randint(0, 16), window[1] + draw.randint(0, 40)
    emulate(order=draw.choice(ORDERS), seed=seed + 1, multiprocessors=draw.choice((1, 2, 7)))
    made = inputs(
        grid, draw.randint(1, 3), draw.choice((32, 64, 64, 128)), dtype=draw.choice((torch.bfloat16, torch.float16)),
        factor=draw.choice((None, 10.0, -5.0, 45.0)), rope=draw.random() < 0.8,
        layout=draw.choice(("plain", "packed", "heads first", "columns first")), seed=seed,
    )  # fmt: skip
    check(*with_kernel(window, made))

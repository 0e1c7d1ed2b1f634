"""The fast path of attention's backward pass in CUDA (csrc/neighborhood_attention/strips_backward*): its gradients
against dense attention in float64, on grids of every remainder; heads of 64 in one pass, or in two where a block has
little shared memory. Without a GPU the kernels run in their emulation, which looks for races, in three orders of
threads."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch

import hdit_kernels
from hdit_kernels import cases, extension
from hdit_kernels.cosine_rope import prepare
from hdit_kernels.neighborhood_attention import window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
ORDERS = ["forward", "reverse", "shuffled"]
TURN = itertools.cycle(ORDERS)
SM_80, SM_90 = 166912, 232448  # bytes of shared memory that a block can have


@pytest.fixture(autouse=True)
def default_settings():
    yield
    if extension.emulated is not None:
        extension.emulated.set()


@dataclass
class Problem:
    """q, k, v, dout of `dtype` and dlse: random numbers, or what is set instead."""

    grid: tuple[int, int, int]  # batch, height, width
    kernel: tuple[int, int]
    dtype: torch.dtype
    heads: int = 1
    dim: int = 32
    cosine: bool = True
    rope: bool = True
    layout: str = "plain"
    scale: float | None = None
    seed: int = 0
    with_dlse: bool = True
    shared_bytes: int = SM_90

    def __post_init__(self):
        self.scale = self.scale or (1.0 if self.cosine else self.dim**-0.5)
        generator = torch.Generator().manual_seed(self.seed)
        (b, h, w), n = self.grid, self.heads

        def randn(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

        if self.layout == "packed":
            self.q, self.k, self.v = randn(b, h, w, 3, n, self.dim).unbind(3)
        else:
            self.q, self.k, self.v = (cases.laid_out(randn, (b, h, w, n, self.dim), self.layout) for _ in range(3))
        self.dout = cases.laid_out(randn, (b, h, w, n, self.dim), self.layout)
        self.dlse = randn(b, h, w, n, dtype=torch.float32) if self.with_dlse else None
        self.cosine_scale = 4 * randn(n, dtype=torch.float32) if self.cosine else None
        self.angles = None
        if self.rope:
            self.angles = hdit_kernels.AxialRope(
                *(3 * randn(length, n, self.dim // 8, dtype=torch.float32) for length in (h, w))
            )

    def gradients(self, order: str = "forward", wanted="qkvs", count: bool = False) -> dict[str, torch.Tensor]:
        """By the kernels, of those of q, k, v and cosine_scale that are wanted."""
        if extension.emulated is not None:
            # on a device of many multiprocessors segments are short, on others long
            processors = 132 if self.seed % 3 == 2 else 2
            extension.emulated.set(
                order, self.seed + 1, count, multiprocessors=processors, shared_bytes=self.shared_bytes
            )
        q, k, v = (
            t.detach().requires_grad_(name in wanted) for name, t in zip("qkv", (self.q, self.k, self.v), strict=True)
        )
        scale = None if self.cosine_scale is None else self.cosine_scale.detach().requires_grad_("s" in wanted)
        outputs = hdit_kernels.neighborhood_attention(
            q,
            k,
            v,
            self.kernel,
            scale=self.scale,
            cosine_scale=scale,
            rope=self.angles,
            return_lse=True,
            backend="cuda",
        )
        leaves = {n: t for n, t in zip("qkvs", (q, k, v, scale), strict=True) if t is not None and t.requires_grad}
        used = [outputs[0]] if self.dlse is None else list(outputs)
        given = [self.dout] if self.dlse is None else [self.dout, self.dlse]
        results = torch.autograd.grad(used, list(leaves.values()), given)
        return dict(zip(leaves, results, strict=True))

    def exact(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradients in float64 by PyTorch through dense attention, and what they differ from where ⟨dout, out⟩ is
        taken from the rounded out and dlse is rounded: most that this makes of cosine_scale's gradient (heads,)."""
        wide = lambda t: None if t is None else t.double().detach().requires_grad_()  # noqa: E731
        q, k, v, scale = leaves = [wide(t) for t in (self.q, self.k, self.v, self.cosine_scale)]
        angles = (None, None) if self.angles is None else (t.double() for t in self.angles)
        (b, h, w), n = self.grid, self.heads
        q, k = prepare(q, k, scale, *angles)
        seen = []
        for length, size in zip((h, w), self.kernel, strict=True):
            keys, _ = window(length, size, 1, 1, False)
            seen.append(torch.zeros(length, length, dtype=torch.bool).scatter_(1, keys, True).to(DEVICE))
        seen = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).reshape(h * w, h * w)
        flat = lambda t: t.reshape(b, h * w, n, self.dim)  # noqa: E731
        logits = self.scale * torch.einsum("bind,bjnd->bnij", flat(q), flat(k))
        logits = logits.masked_fill(~seen, -math.inf)
        lse = logits.logsumexp(-1).transpose(1, 2).reshape(b, h, w, n)
        out = torch.einsum("bnij,bjnd->bind", logits.softmax(-1), flat(v)).reshape(b, h, w, n, self.dim)
        loss = (out * self.dout.double()).sum()
        off = ((out.to(self.dtype).double() - out) * self.dout.double()).sum(-1).square()
        if self.dlse is not None:
            loss = loss + (lse * self.dlse.double()).sum()
            off = off + (torch.finfo(self.dtype).eps * self.dlse.double()).square()
        names = [n for n, t in zip("qkvs", leaves, strict=True) if t is not None]
        results = torch.autograd.grad(loss, [t for t in leaves if t is not None])
        return dict(zip(names, results, strict=True)), 4 * abs(self.scale) * off.sum((0, 1, 2)).sqrt().detach()

    def errors(self, got: dict[str, torch.Tensor]) -> dict[str, float]:
        """In units of what is allowed: 2·(rounding of the result + eps·its largest); see `cases.error`."""
        exact, slip = self.exact()
        return {
            n: cases.error(g, exact[n], exact[n].to(g.dtype), self.dtype, exact[n] + slip if n == "s" else None)
            for n, g in got.items()
        }

    def check(self, order: str | None = None) -> None:
        errors = self.errors(self.gradients(order or next(TURN)))
        assert all(error <= 1 for error in errors.values()), (self, errors)


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(7, 7), (9, 9), (2, 2), (3, 8), (8, 3), (4, 6), (5, 5), (6, 9), (9, 4)], ids=str)
def test_every_remainder_of_width_and_height(kernel, poisoned):
    """Widths of one to several tiles of 8 and strips of 32 columns; heights from one window on, odd and even."""
    step, start = (1, 0) if kernel == (7, 7) else (8, sum(kernel) % 8)
    for i, more in enumerate(range(start, 32, step)):
        height, width = kernel[0] + (i + sum(kernel)) % 9, kernel[1] + more
        Problem((1, height, width), kernel, DTYPES[i % 2], cosine=i % 4 < 2, rope=i % 3 < 2, seed=i).check()


@pytest.mark.parametrize("kernel", [(7, 7), (6, 7), (5, 3), (4, 6), (3, 4), (2, 2), (7, 2)], ids=str)
def test_one_pass_at_every_border(kernel, poisoned):
    """Strips of 32 columns that end in every remainder of 8, rows of one window and of several steps, odd and even."""
    for i in range(8):
        more = 5 * i + sum(kernel)
        height, width = kernel[0] + (i * i + kernel[1]) % 17, kernel[1] + more % 40
        Problem((1, height, width), kernel, DTYPES[i % 2], dim=64, cosine=i % 4 < 3, rope=i % 3 < 2, seed=i).check()


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6, 7])
def test_one_pass_in_segments(rows, poisoned):
    """A device of many multiprocessors: segments of 12 rows and, the last, more; at both their ends windows go on."""
    problem = Problem((1, 43 + rows % 3, 9), (rows, 7), DTYPES[rows % 2], dim=64, seed=2)
    problem.check("shuffled")


@pytest.mark.parametrize("height", [12, 13, 14, 15, 17])
def test_one_pass_where_borders_meet(height, poisoned):
    """Rows that are seen from both the upper and the lower border: the ring holds the most rows, a step may wait."""
    Problem((1, height, 8), (7, 7), DTYPES[height % 2], dim=64).check()


def test_random_geometries(poisoned):
    draw = random.Random(5)
    for seed in range(10):
        kernel = draw.randint(2, 9), draw.randint(2, 9)
        grid = draw.choice((1, 1, 2)), kernel[0] + draw.randint(0, 16), kernel[1] + draw.randint(0, 50)
        options = dict(heads=draw.choice((1, 2)), dim=draw.choice((32, 64, 128)), cosine=draw.random() < 0.6)
        options |= dict(rope=draw.random() < 0.5, layout=draw.choice(("plain", "packed", "heads first", "expanded")))
        options |= dict(shared_bytes=draw.choice((SM_80, SM_90)))
        Problem(grid, kernel, draw.choice(DTYPES), **options, with_dlse=draw.random() < 0.5, seed=seed).check()


def test_a_tall_image_in_segments(poisoned):
    """More rows than a block takes, of a width that makes several blocks."""
    Problem((1, 196, 3), (3, 2), torch.bfloat16).check()


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [0.0, -10.0, 30.0, -45.0])
def test_cosine_scales_of_any_sign(dtype, level, poisoned):
    for shared_bytes in SM_80, SM_90:
        problem = Problem((1, 9, 14), (7, 7), dtype, heads=2, dim=64, shared_bytes=shared_bytes)
        problem.cosine_scale = torch.tensor([level, -level / 3], device=DEVICE)
        problem.check()


def test_steep_plain_products(poisoned):
    """Logits of ±80, whose weights are 0 or 1 but for a few."""
    for dtype, dim in itertools.product(DTYPES, (32, 64)):
        Problem((1, 8, 12), (5, 5), dtype, dim=dim, cosine=False, rope=False, scale=96 / dim).check()


@pytest.mark.parametrize("dout", [-70, -20, 0, 20, 70])
@pytest.mark.parametrize("value", [-20, 0, 20])
@pytest.mark.parametrize("dim", [32, 64])
def test_magnitudes_of_bfloat16(dim, dout, value, poisoned):
    """Gradients beyond the range of float16, in which they are multiplied with unit queries and keys."""
    problem = Problem((1, 7, 10), (5, 5), torch.bfloat16, dim=dim)
    problem.dout, problem.dlse = problem.dout * 2.0**dout, problem.dlse * 2.0 ** (dout + value)
    problem.v = problem.v * 2.0**value
    problem.check()


@pytest.mark.parametrize("dout", [-12, 11])
def test_magnitudes_of_float16(dout, poisoned):
    for cosine, dim in itertools.product((False, True), (32, 64)):
        problem = Problem((1, 7, 10), (5, 5), torch.float16, dim=dim, cosine=cosine, scale=0.125)
        problem.dout, problem.dlse = problem.dout * 2.0**dout, problem.dlse * 2.0**dout
        problem.check()


@pytest.mark.parametrize("dim", [32, 64])
def test_one_loud_query_leaves_the_digits_of_others(dim, poisoned):
    """dout of one query 2^12 times the others': dk far from it is as exact as without."""
    problem = Problem((1, 7, 40), (3, 3), torch.bfloat16, dim=dim)
    problem.dout[0, 3, 4] *= 2.0**12
    got, (exact, _) = problem.gradients(), problem.exact()
    for name in "qkv":
        far, right = got[name][:, :, 8:], exact[name][:, :, 8:]
        assert cases.error(far, right, right.to(far.dtype), torch.bfloat16) <= 1, name


@pytest.mark.parametrize("up", [2, -2])
def test_magnitudes_that_change_from_row_to_row(up, poisoned):
    """Values 4 times the row's before: sums in progress take on the scale of the largest that was met so far."""
    problem = Problem((1, 20, 9), (7, 7), torch.bfloat16, dim=64)
    rows = 2.0 ** (up * torch.arange(20, device=DEVICE)).view(1, 20, 1, 1)
    problem.v, problem.dlse = problem.v * rows[..., None].bfloat16(), problem.dlse * rows
    problem.check("shuffled")


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64])
def test_same_bits_in_every_order_and_layout(dim, dtype, poisoned):
    first, plain = None, Problem((2, 8, 37), (6, 6), dtype, dim=dim)
    for layout, order in itertools.product(("plain", "packed", "heads first"), ORDERS):
        if layout != "plain" and order != "shuffled":
            continue
        problem = Problem((2, 8, 37), (6, 6), dtype, dim=dim, layout=layout)
        for name in ("q", "k", "v", "dout"):
            getattr(problem, name).copy_(getattr(plain, name))
        problem.dlse, problem.cosine_scale, problem.angles = plain.dlse, plain.cosine_scale, plain.angles
        got = problem.gradients(order)
        first = first or got
        assert all(torch.equal(got[n], first[n]) for n in "qkvs"), (layout, order)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("cosine", [True, False])
def test_gradients_that_are_not_wanted(cosine, dim, poisoned):
    """Those that are have the bits that all together have, with and without a gradient of lse."""
    for with_dlse in (True, False):
        problem = Problem((1, 8, 12), (5, 4), torch.bfloat16, dim=dim, cosine=cosine, with_dlse=with_dlse)
        names = "qkvs" if cosine else "qkv"
        together = problem.gradients(wanted=names)
        for wanted in itertools.chain(names, ("qs", "kv", "qv", "vs"[: 1 + cosine])):
            got = problem.gradients(next(TURN), "".join(n for n in wanted if n in names))
            assert all(torch.equal(g, together[n]) for n, g in got.items()), wanted
        if with_dlse:
            problem.dlse.zero_()
            zeros = problem.gradients()
            problem.dlse = None
            assert all(torch.equal(g, zeros[n]) for n, g in problem.gradients().items())


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_an_infinity_does_not_reach_distant_tokens(bad, dim, poisoned):
    problem = Problem((1, 14, 60), (5, 5), torch.bfloat16, dim=dim)
    clean = problem.gradients()
    for name in ("q", "k", "v", "dout"):
        token = getattr(problem, name)[0, 2, 9, 0]
        before = token.clone()
        token[3] = bad
        got = problem.gradients()
        token.copy_(before)
        for n in "qkv":
            for distant in (slice(None), slice(40, None)), (slice(10, None), slice(None)):
                assert torch.equal(got[n][0][distant], clean[n][0][distant]), (name, n)
            assert not got[n].isfinite().all() or (name, n) == ("v", "v"), (name, n)


@pytest.mark.skipif(extension.emulated is None, reason="the emulation records which kernels a call launches")
def test_which_calls_are_taken():
    """Strips serve windows of 2 to 9 with heads of 32, 64 and 128 features; others go the general way."""

    def kernels(kernel=(7, 7), dim=64, grid=(1, 12, 13), **options):
        extension.emulated.take_launches()
        Problem(grid, kernel, torch.bfloat16, dim=dim, **options).gradients(count=True)
        return [launch["call"].rsplit(", ", 1)[-1] for launch in extension.emulated.take_launches()]

    two = ["queries", "keys"]
    for expected, *several in (
        (["fused"], dict(), dict(cosine=False), dict(rope=False), dict(kernel=(2, 7)), dict(layout="packed")),
        (two, dict(dim=32), dict(dim=128), dict(kernel=(2, 9)), dict(kernel=(8, 7)), dict(shared_bytes=SM_80)),
    ):
        for options in several:
            sums = [] if options.get("cosine") is False else ["sum"]
            assert kernels(**options)[1:] == [*expected, *sums], options
    for options in (dict(dim=16), dict(kernel=(1, 3)), dict(kernel=(11, 7)), dict(kernel=(9, 9), grid=(1, 9, 17))):
        assert not {"queries", "fused"} & set(kernels(**options)), options

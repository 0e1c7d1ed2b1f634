"""What each op is tested and timed on, and what a call must at least move and multiply: one list for tests, benchmarks
and `python -m hdit_kernels.info --check`, whatever the backend."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hdit_kernels
from hdit_kernels import op as machinery

LEVEL0 = (2, 64)  # heads and head size of HDiT's finest level: FFHQ-1024 and Oxford Flowers


@dataclass(frozen=True)
class Case:
    """One call of an op: `function(*args, **kwargs)` with what `arguments` makes."""

    op: str
    label: str
    make: Callable[..., tuple[tuple, dict]] = field(repr=False)
    tensors: tuple[int, int] = (0, 0)  # elements read and written once: forward, backward
    macs: tuple[int, int] = (0, 0)  # multiply-adds of matrix products: forward, backward
    gradients: bool = True  # False: nothing is differentiated when it is tested, which may take another kernel

    def __str__(self) -> str:
        return f"{self.op}[{self.label}]"

    @property
    def function(self) -> Callable:
        return getattr(hdit_kernels, self.op)

    def arguments(self, dtype: torch.dtype, device="cpu", seed: int = 0) -> tuple[tuple, dict]:
        """Random arguments, the same for a seed whatever the dtype and device."""
        generator = torch.Generator().manual_seed(seed)
        angle_dtype = torch.promote_types(dtype, torch.float32)

        def random(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype=dtype, device=device)

        random.angles = lambda *shape: 3 * random(*shape, dtype=angle_dtype)
        random.mask = lambda *shape: (torch.rand(shape, generator=generator) > 0.3).to(device)
        return self.make(random)


# ---- how arguments are made -----------------------------------------------------------------------------------------


def laid_out(random, shape: tuple[int, ...], layout: str) -> Tensor:
    """A random (B, H, W, heads, dim) tensor whose memory order is another one."""
    if layout == "heads first":
        b, h, w, n, d = shape
        return random(b, n, h, w, d).permute(0, 2, 3, 1, 4)
    if layout == "expanded":
        return random(1, *shape[1:]).expand(shape)
    if layout == "every second feature":
        return random(*shape[:-1], 2 * shape[-1])[..., ::2]
    return random(*shape)


def attention(
    grid, heads=2, dim=16, *, v_dim=None, rope=0, cosine=False, extra=0, mask=False, layout="plain", lse=True, **kwargs
):
    b, h, w = grid

    def make(random):
        if layout == "packed":
            qkv = random(b, h, w, 3, heads, dim)
            args = qkv.unbind(3)
        else:
            args = tuple(laid_out(random, (b, h, w, heads, d), layout) for d in (dim, dim, v_dim or dim))
        return args, {**extras(random), **kwargs, "return_lse": lse}

    def extras(random):
        more = {}
        if cosine:
            more["cosine_scale"] = 4 * random(heads, dtype=random.angles().dtype)
        if rope:
            more["rope"] = hdit_kernels.AxialRope(random.angles(h, heads, rope), random.angles(w, heads, rope))
        if extra:
            more["additional_keys"] = random(b, extra, heads, dim)
            more["additional_values"] = random(b, extra, heads, v_dim or dim)
        if mask:
            more["key_mask"] = random.mask(b, h, w)
        return more

    def packed(random):
        return (random(b, h, w, 3, heads, dim),), {**extras(random), **kwargs, "return_lse": lse}

    return make, packed


def attention_case(label: str, grid, heads=2, dim=16, *, packed=False, **options) -> Case:
    name = "neighborhood_attention_qkvpacked" if packed else "neighborhood_attention"
    k = options.get("kernel_size", 7)
    keys = math.prod(k) if isinstance(k, tuple) else k * k
    tokens, v_dim = math.prod(grid) * heads, options.get("v_dim") or dim
    moved = tokens * 2 * (dim + v_dim), tokens * 4 * (dim + v_dim)
    products = tokens * keys * (dim + v_dim), tokens * keys * (3 * dim + 2 * v_dim)
    return Case(name, label, attention(grid, heads, dim, **options)[packed], moved, products)


def rope_case(label, grid, heads, dim, r, layout="plain") -> Case:
    b, h, w = grid

    def make(random):
        if layout == "packed":
            q, k, _ = random(b, h, w, 3, heads, dim).unbind(3)
        else:
            q, k = (laid_out(random, (b, h, w, heads, dim), layout) for _ in range(2))
        scale = 4 * random(heads, dtype=random.angles().dtype)
        return (q, k, scale, hdit_kernels.AxialRope(random.angles(h, heads, r), random.angles(w, heads, r))), {}

    size = b * h * w * heads * dim
    return Case("cosine_rope", label, make, (4 * size, 6 * size))


def geglu_case(label, *shape, layout="plain") -> Case:
    def make(random):
        if layout == "transposed":
            return (random(*shape[::-1]).permute(*reversed(range(len(shape)))),), {}
        if layout == "expanded":
            return (random(1, *shape[1:]).expand(shape),), {}
        return (random(*shape),), {}

    n = math.prod(shape) // 2
    return Case("geglu", label, make, (3 * n, 5 * n))


def linear_geglu_case(label, rows, width, hidden, bias, gradients=True) -> Case:
    def make(random):
        more = {"bias": random(2 * hidden)} if bias else {}
        return (random(*rows, width), random(2 * hidden, width) / width**0.5), more

    tokens = math.prod(rows)
    size = tokens * (width + hidden) + 2 * hidden * width
    products = tokens * width * 2 * hidden
    return Case("linear_geglu", label, make, (size, 2 * size), (products, 2 * products), gradients)


def norm_case(label, shape, scale_shape, layout="plain", eps=1e-6) -> Case:
    def make(random):
        x = random(*shape)
        if layout == "channels first":
            x = random(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)
        return (x, 1 + random(*scale_shape), eps), {}

    size = math.prod(shape)
    return Case("ada_rms_norm", label, make, (2 * size, 3 * size))


# ---- what is tested -------------------------------------------------------------------------------------------------

FULL = dict(cosine=True, rope=2)
TESTED: tuple[Case, ...] = (
    attention_case("plain 7×7", (2, 9, 13)),
    attention_case("grid of one window", (1, 7, 7), 1, 8),
    attention_case("cosine, RoPE", (1, 8, 11), **FULL),
    attention_case("cosine, RoPE, packed views", (2, 7, 9), layout="packed", kernel_size=5, **FULL),
    attention_case("even window, scale", (1, 9, 10), kernel_size=(4, 6), scale=-0.6, **FULL),
    attention_case("window of one", (1, 3, 5), kernel_size=1),
    attention_case("one row", (2, 1, 17), kernel_size=(1, 5), cosine=True),
    attention_case("dilated", (1, 13, 11), kernel_size=3, dilation=(4, 2), **FULL),
    attention_case("strided", (1, 12, 9), kernel_size=(5, 4), stride=(3, 4)),
    attention_case("causal", (2, 8, 9), kernel_size=(5, 3), is_causal=True, **FULL),
    attention_case("strided, dilated, causal rows", (1, 14, 9), kernel_size=(5, 3), stride=(2, 3), dilation=(2, 1),
                   is_causal=(True, False), scale=0.3),
    attention_case("extra keys", (2, 8, 7), kernel_size=5, extra=3, **FULL),
    attention_case("masked", (2, 9, 8), kernel_size=3, mask=True, **FULL),
    attention_case("causal, short last group of a stride", (1, 10, 6), kernel_size=(8, 3), stride=(8, 1),
                   is_causal=(True, False)),
    attention_case("masked, extra keys, causal", (1, 8, 8), kernel_size=3, mask=True, extra=2, is_causal=(False, True)),
    attention_case("other value size, odd sizes", (1, 7, 8), 3, 5, v_dim=9, kernel_size=5, cosine=True, rope=1),
    attention_case("heads first", (2, 7, 8), 3, 8, layout="heads first", kernel_size=3),
    attention_case("expanded batch", (3, 7, 8), 2, 8, layout="expanded", kernel_size=3, cosine=True),
    attention_case("every second feature", (1, 7, 8), 2, 8, layout="every second feature", kernel_size=3),
    attention_case("empty batch", (0, 7, 8), 2, 8, extra=2, **FULL),
    attention_case("head of 64, as in HDiT", (1, 8, 9), 2, 64, cosine=True, rope=8),
    # Sizes at which fast paths cut: strips of columns, several threads' rows, residue classes, steep logits.
    attention_case("three strips", (1, 8, 70), 2, 32, cosine=True, rope=4),
    attention_case("rows for three threads, masked", (1, 60, 35), 1, 16, mask=True, **FULL),
    attention_case("dilated strips", (1, 13, 75), 1, 48, v_dim=16, kernel_size=(3, 4), dilation=(3, 2), **FULL),
    attention_case("window of 19 columns", (1, 4, 25), 1, 16, kernel_size=(3, 19), **FULL),
    attention_case("window of 19 columns, two strips", (1, 3, 40), 1, 16, kernel_size=(2, 19), scale=0.5),
    attention_case("steep logits, head of 80", (1, 8, 34), 1, 80, kernel_size=5, scale=2.0),
    attention_case("steep cosine", (2, 8, 19), 2, 16, kernel_size=7, scale=-12.0, **FULL),
    attention_case("packed, plain", (2, 7, 9), packed=True),
    attention_case("packed, everything", (1, 9, 8), packed=True, kernel_size=5, extra=2, mask=True, **FULL),
    rope_case("HDiT's half head", (2, 5, 7), 2, 64, 8),
    rope_case("whole head, odd size", (1, 3, 4), 3, 9, 2),
    rope_case("packed views", (2, 4, 3), 2, 64, 8, layout="packed"),
    rope_case("heads first", (2, 4, 3), 2, 16, 2, layout="heads first"),
    rope_case("expanded batch", (3, 4, 3), 2, 16, 2, layout="expanded"),
    rope_case("every second feature", (1, 4, 3), 2, 16, 2, layout="every second feature"),
    rope_case("head of 128, rows in pieces", (2, 2, 70), 2, 128, 16),
    rope_case("head of 44, angles of no vector's length", (1, 3, 5), 2, 44, 11),
    rope_case("head of 27, some angles", (1, 3, 5), 3, 27, 5),
    rope_case("head of 3 without angles", (1, 3, 5), 2, 3, 0),
    rope_case("empty batch", (0, 4, 3), 2, 16, 2),
    geglu_case("vector", 10),
    geglu_case("odd width", 3, 5, 2 * 37),
    geglu_case("HDiT", 2, 9, 768),
    geglu_case("transposed", 6, 5, 8, layout="transposed"),
    geglu_case("expanded", 4, 3, 34, layout="expanded"),
    geglu_case("no rows", 0, 34),
    linear_geglu_case("HDiT", (2, 3, 4), 32, 96, False),
    linear_geglu_case("bias, odd", (5,), 7, 9, True),
    linear_geglu_case("HDiT, no gradients", (2, 3, 4), 32, 96, False, gradients=False),
    linear_geglu_case("bias, odd, no gradients", (3, 11), 50, 33, True, gradients=False),
    norm_case("a scale per item", (3, 4, 5, 32), (3, 32)),
    norm_case("one scale, odd width", (2, 7, 37), (37,)),
    norm_case("HDiT", (2, 16, 128), (2, 128)),
    norm_case("a matrix", (5, 24), (5, 24), eps=1e-2),
    norm_case("a vector", (24,), (24,)),
    norm_case("channels first", (2, 4, 3, 16), (2, 16), layout="channels first"),
    norm_case("empty batch", (0, 4, 16), (0, 16)),
    norm_case("no tokens", (3, 0, 16), (3, 16)),
)  # fmt: skip


# ---- what is timed: HDiT's finest level over 64² … 256² tokens, and other levels' widths ----------------------------


def timed() -> tuple[Case, ...]:
    heads, dim = LEVEL0
    cases = []
    for side in (64, 128, 256):
        options: dict[str, Any] = dict(cosine=True, rope=dim // 8, lse=False)
        label, grid = f"{side}x{side}x{heads}x{dim} k7", (1, side, side)
        cases.append(attention_case(label, grid, heads, dim, packed=True, **options))
    for side in (32, 64, 128):
        grid = (1, side, side)
        cases.append(rope_case(f"{side}x{side}x{heads}x{dim}", grid, heads, dim, dim // 8))
    cases.append(rope_case("16x16x8x64 packed", (1, 16, 16), 8, 64, 8, layout="packed"))  # where attention is global
    for tokens, channels in (1, 256), (256, 768), (4096, 128), (65536, 128), (1024, 1024):
        cases.append(geglu_case(f"{tokens}x{6 * channels}", 1, tokens, 6 * channels))
        cases.append(norm_case(f"{tokens}x{channels}", (1, tokens, channels), (1, channels)))
    for tokens, channels in (256, 768), (4096, 128):
        label = f"{tokens}x{channels}"
        cases.append(linear_geglu_case(label, (1, tokens), channels, 3 * channels, False))
    return tuple(cases)


def timed_on_gpu() -> tuple[Case, ...]:
    """HDiT's levels for FFHQ-1024 at batch 8 (arXiv 2401.11605, Table 6), a larger window, a norm beyond 256 MB."""
    full: dict[str, Any] = dict(packed=True, cosine=True, rope=8, lse=False)
    made = []
    for side, heads, k in (256, 2, 7), (256, 2, 13), (128, 4, 7), (64, 6, 7):
        label = f"8x{side}x{side}x{heads}x64 k{k}"
        made.append(attention_case(label, (8, side, side), heads, 64, kernel_size=k, **full))
    for side, heads in (32, 12), (16, 16):
        made.append(rope_case(f"8x{side}x{side}x{heads}x64 packed", (8, side, side), heads, 64, 8, "packed"))
    for side, width in (256, 128), (128, 256), (64, 384), (32, 768), (16, 1024):
        tokens = side * side
        made.append(geglu_case(f"8x{tokens}x{6 * width}", 8, tokens, 6 * width))
        made.append(norm_case(f"8x{tokens}x{width}", (8, tokens, width), (8, width)))
        made.append(linear_geglu_case(f"8x{tokens}x{width}", (8, tokens), width, 3 * width, False))
    made.append(norm_case("16x65536x128", (16, 65536, 128), (16, 128)))
    return tuple(made)


def error(got: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype, stored: Tensor | None = None) -> float:
    """How far `got` is from the float64 reference, in units of what is allowed (≤ 1 passes).

    Allowed: 2·(|the reference in this dtype − exact|max + eps·|exact|max); for float64 itself 64·eps·|exact|max. With
    `stored` (see `compare`), what that differs from exact by counts as the reference's own error does.
    """
    if not got.numel():
        return 0.0
    got, exact, rounded = (t.detach().to("cpu", torch.float64) for t in (got, exact, rounded))
    same = (got == exact) | (got.isnan() & exact.isnan())  # infinities and what is undefined must agree
    finite = exact.isfinite()
    if not bool((same | finite).all()) or not bool(got[finite].isfinite().all()):
        return math.inf
    whole, (exact, got, rounded) = exact, (t[finite] for t in (exact, got, rounded))
    if not exact.numel():
        return 0.0
    top, eps = exact.abs().max().item(), torch.finfo(dtype).eps
    own = (rounded - exact).abs().max().item()
    if stored is not None:
        own = max(own, (stored - whole).abs().max().item())
    allowed = 64 * eps * top if dtype is torch.float64 else 2 * (own + eps * top)
    off = (got - exact).abs().max().item()
    return 0.0 if off == 0 else off / allowed if allowed else math.inf


def run(
    case: Case, dtype, device="cpu", backend=None, *, plain=False, exact=False, stored=False, seed=0
) -> dict[str, Tensor]:
    """Outputs and gradients of one call, by name.

    plain: of the reference itself, differentiated by PyTorch, without any of our autograd; exact: that in float64, on
    the same values (rounded to dtype); stored: eight of those gradients, with what `compare` says of attention.
    """
    args, kwargs = case.arguments(dtype, device, seed)
    widen = lambda t: t.double() if exact and t.is_floating_point() else t  # noqa: E731
    values = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
    leaves = {}
    for name, value in values.items():
        if isinstance(value, hdit_kernels.AxialRope):
            values[name] = hdit_kernels.AxialRope(*map(widen, value))
        elif isinstance(value, Tensor) and value.is_floating_point():
            leaves[name] = widen(value).detach()  # detached views keep their strides

    def function(*tensors):
        given = {**values, **dict(zip(leaves, tensors, strict=True))}
        inputs = [given.pop(f"argument {i}") for i in range(len(args))]
        return machinery._tuple(case.function(*inputs, **given, backend="reference" if plain or exact else backend))

    def cotangents(outputs):
        generator = torch.Generator().manual_seed(seed + 1)
        dys = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype) for o in outputs]
        return tuple(dy.to(o.device, o.dtype) for o, dy in zip(outputs, dys, strict=True))

    if not case.gradients:
        outputs, leaves, grads = function(*leaves.values()), {}, ()
    elif plain or exact:  # inside torch.func the reference is plain PyTorch
        outputs, vjp = torch.func.vjp(function, *leaves.values())
        given = cotangents(outputs)
        grads = vjp(given)
        if stored:
            off = ((outputs[0].to(dtype).double() - outputs[0]) * given[0]).sum(-1)
            off = (2 * off.square() + (torch.finfo(dtype).eps * given[1]).square()).sqrt()
            off = off.masked_fill(outputs[1].isinf(), 0.0)
            signs = torch.randn(8, *off.shape, generator=torch.Generator().manual_seed(seed)).sign()
            draws = [vjp((given[0], given[1] + sign * off)) for sign in signs]
            grads = tuple(torch.stack(gradients) for gradients in zip(*draws, strict=True))
    else:
        tensors = [t.requires_grad_() for t in leaves.values()]
        outputs = function(*tensors)
        grads = machinery.vjp(list(zip(outputs, cotangents(outputs), strict=True)), tensors)
    results = {f"output {i}": o for i, o in enumerate(outputs)}
    return results | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


def compare(case: Case, dtype, device="cpu", backend=None, seed: int = 0) -> dict[str, float]:
    """`error` of each output and gradient of `backend` against the float64 reference of the same values; infinite where
    a shape or a dtype is not the reference's.

    The GPU's backward passes of attention take ⟨dout, out⟩ of each query from the `out` that was stored, rounded to its
    dtype (as FlashAttention's do, arXiv 2205.14135, algorithm 4), after sums of weights so rounded. That subtracts the
    rounding error of this number from the gradient of each of the query's logits, just as if lse had that much less
    gradient, which is itself rounded before products: so much is allowed too, the most that it makes in eight draws of
    the errors' signs.
    """
    exact = run(case, dtype, exact=True, seed=seed)
    rounded = run(case, dtype, plain=True, seed=seed)
    stored = {}
    if case.op.startswith("neighborhood_attention") and backend in ("triton", "cuda") and "output 1" in exact:
        stored = run(case, dtype, exact=True, stored=True, seed=seed)
    got = run(case, dtype, device, backend, seed=seed)
    alike = {n: (got[n].shape, got[n].dtype) == (rounded[n].shape, rounded[n].dtype) for n in exact}
    return {n: error(got[n], exact[n], rounded[n], dtype, stored.get(n)) if alike[n] else math.inf for n in exact}

"""Neighborhood attention in Triton, beyond the cases of every backend: where its kernels cut, choose and combine."""

import itertools

import pytest
import torch

import hdit_kernels
from hdit_kernels import cases, triton_launch
from hdit_kernels.cases import attention_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton has no wheels for this platform")
FULL = dict(cosine=True, rope=4)


def agree(case, dtype, seed=0):
    errors = cases.compare(case, dtype, DEVICE, "triton", seed)
    assert errors and all(error <= 1 for error in errors.values()), (case, dtype, errors)


def bits(case, dtype=torch.bfloat16):
    return list(cases.run(case, dtype, DEVICE, "triton").values())


@pytest.mark.parametrize("window", [1, 2, 5, 7, 8, 9], ids="window {}".format)
def test_strips_of_every_remainder(window, poisoned):
    """Grids whose sides leave every remainder of a tile of 8, odd and even windows: each border wraps elsewhere."""
    for extra in range(8) if window == 7 else (0, 3, 6):
        height, width = max(window, 8 + extra), max(window, 8 + (5 * extra + 2) % 8)
        case = attention_case(f"{height}×{width}", (1, height, width), 1, 16, kernel_size=window, cosine=True, rope=2)
        agree(case, torch.bfloat16)


def test_strips_in_segments_give_the_same_bits(monkeypatch):
    """A GPU has more processors than strips: each strip is cut into segments, which read the rows around their ends."""
    case = attention_case("segments", (1, 37, 12), 1, 16, kernel_size=(6, 7), **{**FULL, "rope": 2})
    launched = []
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "launch", lambda k, n, *a, **o: (launched.append(n), launch(k, n, *a, **o)))
    whole = bits(case)
    one = launched[:]
    del launched[:]
    monkeypatch.setattr(triton_launch, "target", lambda x: triton_launch.Target("interpreter", "", 100))
    if DEVICE == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(whole[:4], bits(case)[:4], strict=True))
        assert (one[0], launched[0]) == (6, 10)  # strips × segments × heads, of the forward pass
    agree(case, torch.bfloat16)


def test_steep_and_gentle_heads_in_one_call(poisoned):
    """Where a cosine's scale is large, a head keeps a running maximum; the one beside it does not."""
    case = attention_case("heads", (1, 9, 10), 4, 16, kernel_size=5, **FULL)
    (q, k, v), kwargs = case.arguments(torch.bfloat16, DEVICE)
    kwargs["cosine_scale"] = torch.tensor([0.0, 12.0, 300.0, -1000.0], device=DEVICE)
    got = hdit_kernels.neighborhood_attention(q, k, v, **kwargs, backend="triton")
    wide = {**kwargs, "cosine_scale": kwargs["cosine_scale"].double()}
    wide["rope"] = hdit_kernels.AxialRope(*(a.double() for a in kwargs["rope"]))
    exact = hdit_kernels.neighborhood_attention(q.double(), k.double(), v.double(), **wide, backend="reference")
    rounded = hdit_kernels.neighborhood_attention(q, k, v, **kwargs, backend="reference")
    for head in range(3):  # at ±1000 unit vectors of 11 bits decide which key wins, in any kernel of this type
        for a, b, c in zip(got, exact, rounded, strict=True):
            assert cases.error(a[:, :, :, head], b[:, :, :, head], c[:, :, :, head], torch.bfloat16) <= 1, head
    assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize(
    ("dim", "v_dim", "r"),
    [(1, 1, 0), (3, 70, 0), (24, 8, 6), (40, 40, 5), (128, 128, 16), (200, 16, 3), (256, 512, 64)],
)
def test_head_sizes(dim, v_dim, r, poisoned):
    """From one feature to the longest, with angles that are no power of two: what is padded must not count."""
    case = attention_case(f"{dim}, {v_dim}", (1, 5, 6), 1, dim, v_dim=v_dim, kernel_size=3, rope=r, scale=dim**-0.5)
    for dtype in (torch.float32, torch.bfloat16):
        agree(case, dtype)


def random_case(seed: int):
    """Any window that the op accepts, on a small grid."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    grid, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(2):
        d, k = draw(1, 3), draw(1, 6)
        grid.append(k * d + draw(0, 9))
        window.append(k)
        stride.append(draw(1, k))
        dilation.append(d)
        causal.append(draw(0, 2) == 0)
    options = dict(kernel_size=tuple(window), stride=tuple(stride), dilation=tuple(dilation), is_causal=tuple(causal))
    extra, mask, cosine, rope = draw(0, 1) * draw(0, 5), draw(0, 1) == 1, draw(0, 1) == 1, draw(0, 1) * 2
    label = f"seed {seed}: {grid} {options} extra {extra} mask {mask} cosine {cosine} rope {rope}"
    return attention_case(label, (1, *grid), 1, 8, extra=extra, mask=mask, cosine=cosine, rope=rope, **options)


@pytest.mark.parametrize("seed", range(16))
def test_random_geometries(seed, poisoned):
    agree(random_case(seed), torch.float32, seed)


def test_64_bit_offsets_give_the_same_bits(monkeypatch):
    """What storage beyond 2³¹ elements takes, on small tensors."""
    for case in (
        attention_case("strips", (2, 9, 10), 2, 16, kernel_size=3, layout="heads first", mask=True, **FULL),
        attention_case("tiles", (2, 9, 10), 2, 16, kernel_size=3, dilation=2, layout="packed", extra=2, **FULL),
    ):
        narrow = bits(case)
        monkeypatch.setattr(triton_launch, "wide_offsets", lambda *tensors: True)
        assert all(torch.equal(a, b) for a, b in zip(narrow, bits(case), strict=True)), case
        monkeypatch.undo()
    far = torch.empty(1, dtype=torch.int8, device="meta").as_strided((2, 3), (2**31 - 2, 1))
    assert triton_launch.wide_offsets(None, far) and not triton_launch.wide_offsets(far[:, :2], far[:0])


def test_same_bits_twice():
    case = attention_case("everything", (1, 11, 9), 2, 16, kernel_size=3, extra=3, mask=True, **FULL)
    for dtype in (torch.float32, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(bits(case, dtype), bits(case, dtype), strict=True))


def test_gradients_that_are_not_wanted_are_not_written(poisoned):
    """Every choice of leaves, and of outputs used, gives what all together give."""
    case = attention_case("leaves", (1, 6, 7), 1, 16, kernel_size=3, extra=2, **FULL)
    (q, k, v), kwargs = case.arguments(torch.float32, DEVICE)
    names = ("cosine_scale", "additional_keys", "additional_values")
    values = [q, k, v, *(kwargs[n] for n in names)]
    weights = torch.randn(q.shape, device=DEVICE), torch.randn(q.shape[:4], device=DEVICE)

    def gradients(wanted, used):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(values, wanted, strict=True)]
        more = {**kwargs, **dict(zip(names, leaves[3:], strict=True))}
        outputs = hdit_kernels.neighborhood_attention(*leaves[:3], **more, backend="triton")
        loss = sum((outputs[i] * weights[i]).sum() for i in used)
        return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], materialize_grads=True)

    for used in ((0, 1), (0,), (1,)):
        everything = gradients([True] * 6, used)
        for i, j in itertools.combinations_with_replacement(range(6), 2):
            got = gradients([n in (i, j) for n in range(6)], used)
            assert all(torch.equal(a, everything[n]) for a, n in zip(got, sorted({i, j}), strict=True)), (used, i, j)


def test_inside_a_compiled_graph():
    """fullgraph: the kernels are one opaque call each, forward and backward."""
    case = attention_case("compiled", (1, 6, 7), 2, 16, kernel_size=3, packed=True, lse=False, **FULL)
    (qkv,), kwargs = case.arguments(torch.float32, DEVICE)

    def loss(qkv, scale):
        more = {**kwargs, "cosine_scale": scale}
        return hdit_kernels.neighborhood_attention_qkvpacked(qkv * 2, **more, backend="triton").square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (qkv, kwargs["cosine_scale"])]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("grid", "dims", "options", "reason"),
    [
        ((1, 3, 3), (257, 8), dict(kernel_size=3), "up to 256 features"),
        ((1, 3, 3), (8, 513), dict(kernel_size=3), "values up to 512"),
        ((1, 1, 66), (4, 4), dict(kernel_size=(1, 66)), "kernel_size may be up to 65"),
    ],
)
def test_what_is_declined_is_named(grid, dims, options, reason):
    case = attention_case("declined", grid, 1, dims[0], v_dim=dims[1], lse=False, **options)
    args, kwargs = case.arguments(torch.float32, DEVICE)
    with pytest.raises(hdit_kernels.BackendError, match=reason):
        case.function(*args, **kwargs, backend="triton")
    with pytest.raises(hdit_kernels.BackendError, match="float64"):
        case.function(*(t.double() for t in args), **kwargs, backend="triton")

"""Every op × backend × case × dtype against the float64 reference, outputs and gradients."""

import math
import re
import sys

import pytest
import torch

import hdit_kernels
from hdit_kernels import cases, extension
from hdit_kernels import op as machinery

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def agree(case, dtype, chosen):
    """Compare the chosen backends with the reference; the number that took the call."""
    compared = 0
    for device in DEVICES:
        for backend in filter(chosen, hdit_kernels.available_backends(case.op, device)):
            try:
                errors = cases.compare(case, dtype, device, backend)
            except hdit_kernels.BackendError as declined:
                assert "does not take this call" in str(declined) and backend in ("triton", "cuda")
                continue
            compared += 1
            wrong = {what: error for what, error in errors.items() if not error <= 1}
            assert not wrong, f"{backend} on {device}, times the allowed error: {wrong}"
    return compared


# Attention in float16 takes Triton's interpreter minutes: three cases of four wait for `make stress`.
ATTENTION = [case for case in cases.TESTED if case.op.startswith("neighborhood_attention")]
LATER = [] if torch.cuda.is_available() else [case for i, case in enumerate(ATTENTION) if i % 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", cases.TESTED, ids=str)
def test_every_backend_agrees_with_the_reference_in_float64(case, dtype, poisoned):
    later = dtype == torch.float16 and case in LATER
    assert agree(case, dtype, lambda backend: not (later and backend == "triton"))


@pytest.mark.stress
@pytest.mark.parametrize("case", LATER, ids=str)
def test_triton_in_float16_agrees_with_the_reference_in_float64(case, poisoned):
    agree(case, torch.float16, lambda backend: backend == "triton")


@pytest.mark.parametrize("case", [c for c in cases.TESTED if not re.search("empty|no |expanded", c.label)], ids=str)
def test_gradcheck_in_float64(case):
    """Gradients against finite differences, in place of trusting autograd twice."""
    args, kwargs = case.arguments(torch.float64)
    names = [*range(len(args)), *kwargs]
    values = [*args, *kwargs.values()]
    is_leaf = [isinstance(v, torch.Tensor) and v.is_floating_point() for v in values]
    leaves = [v.detach().requires_grad_() for v, leaf in zip(values, is_leaf, strict=True) if leaf]

    def function(*tensors):
        given = iter(tensors)
        filled = dict(
            zip(names, (next(given) if leaf else v for v, leaf in zip(values, is_leaf, strict=True)), strict=True)
        )
        outputs = case.function(*(filled[i] for i in range(len(args))), **{n: filled[n] for n in kwargs})
        return tuple(torch.where(o.isfinite(), o, 0.0) for o in machinery._tuple(outputs))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", cases.TESTED, ids=str)
def test_same_bits_again_and_with_other_thread_counts(case):
    def bits():
        return [t.clone() for t in cases.run(case, torch.float32).values()]

    first, threads = bits(), torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            if hdit_kernels.available_backends(case.op)[0] != "reference" and case.op != "linear_geglu":
                assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, bits(), strict=True))


def test_the_reference_in_tiles_is_the_reference(monkeypatch):
    """The same numbers whatever part of the grid is held at a time, forward and backward."""
    page = sys.modules["hdit_kernels.neighborhood_attention"]
    for case in (c for c in cases.TESTED if c.op.startswith("neighborhood_attention")):
        monkeypatch.setattr(page, "TILE", 2**40)
        whole = cases.run(case, torch.float64, backend="reference")
        monkeypatch.setattr(page, "TILE", 1)
        rows = cases.run(case, torch.float64, backend="reference")
        args, kwargs = case.arguments(torch.float64)
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():  # where the plain reference serves
            plain = machinery._tuple(case.function(*args, **kwargs))
        for name, value in whole.items():
            assert cases.error(rows[name], value, value, torch.float64) <= 1, (case, name)
        for value, name in zip(plain, whole, strict=False):
            assert cases.error(value, whole[name], whole[name], torch.float64) <= 1, (case, name)


def test_kernels_leave_what_lies_around_their_buffers_alone(poisoned):
    """Inputs inside larger NaN-filled buffers: nothing next to them is read into a result or written."""
    for case in (c for c in cases.TESTED if c.op in ("geglu", "ada_rms_norm")):
        (x, *others), kwargs = case.arguments(torch.float32)
        if x.ndim < 2 or not x.numel():
            continue
        around = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 8), float("nan"))
        inside = around[1:-1, ..., 4:-4]
        inside.copy_(x)
        expected = case.function(x, *others, **kwargs)
        got = case.function(inside, *others, **kwargs)
        assert torch.equal(got, expected)
        assert around[0].isnan().all() and around[-1].isnan().all() and around[..., :4].isnan().all()


def test_masked_tokens_may_hold_nan_and_leave_no_trace():
    case = next(c for c in cases.TESTED if c.label == "masked")
    (q, k, v), kwargs = case.arguments(torch.float64)
    hidden = ~kwargs["key_mask"][..., None, None]
    spoilt = [t.masked_fill(hidden, math.nan).requires_grad_() for t in (k, v)]
    expected = hdit_kernels.neighborhood_attention(q, k, v, **kwargs)
    got = hdit_kernels.neighborhood_attention(q, *spoilt, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for gradient in torch.autograd.grad(got[0].square().sum(), spoilt):
        assert gradient.masked_select(hidden).eq(0).all() and gradient.isfinite().all()


def test_a_query_without_keys_gives_zeros_and_no_gradient():
    case = next(c for c in cases.TESTED if c.label == "masked")
    args, kwargs = case.arguments(torch.float64)
    kwargs["key_mask"] = torch.ones_like(kwargs["key_mask"])
    kwargs["key_mask"][:, :5, :5] = False  # windows are 3×3: the queries of the 4×4 corner see nothing
    q, k, v = (t.requires_grad_() for t in args)
    out, lse = hdit_kernels.neighborhood_attention(q, k, v, **kwargs)
    corner = (slice(None), slice(0, 4), slice(0, 4))
    assert out[corner].eq(0).all() and lse[corner].eq(-math.inf).all()
    assert lse.isfinite().sum() == lse.numel() - lse[corner].numel()
    for gradient in torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), (q, k, v)):
        assert gradient.isfinite().all() and gradient[corner].eq(0).all() and gradient.abs().sum() > 0


def test_a_nan_reaches_exactly_the_queries_that_see_it():
    q, k, v = (torch.randn(1, 9, 11, 1, 4) for _ in range(3))
    for spoilt in (k, v):
        clean = spoilt.clone()
        spoilt[0, 4, 5, 0, 1] = math.nan
        bad = hdit_kernels.neighborhood_attention(q, k, v, 3).isnan().any(-1)[0, :, :, 0]
        assert bad[3:6, 4:7].all() and bad.sum() == 9
        spoilt.copy_(clean)


@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
def test_a_cosine_scale_of_any_sign_and_size_is_finite(sign):
    case = next(c for c in cases.TESTED if c.label == "cosine, RoPE")
    args, kwargs = case.arguments(torch.float32)
    for size in (1e-3, 10.0, 200.0):
        kwargs["cosine_scale"] = torch.full((2,), sign * size, requires_grad=True)
        out, lse = hdit_kernels.neighborhood_attention(*args, **kwargs)
        (gradient,) = torch.autograd.grad(out.sum() + lse.sum(), kwargs["cosine_scale"])
        assert out.isfinite().all() and lse.isfinite().all() and gradient.isfinite().all() and gradient.abs().sum() > 0


def test_a_scale_of_zero_is_not_the_default():
    q, k, v = (torch.randn(1, 5, 5, 1, 4) for _ in range(3))
    out = hdit_kernels.neighborhood_attention(q, k, v, 5, scale=0.0)
    torch.testing.assert_close(out, v.mean((1, 2), keepdim=True).expand_as(out))


def test_more_batches_and_heads_than_a_grid_dimension_takes():
    """B·heads > 65 535, with every item different."""
    q, k, v = (torch.randn(70_001, 2, 2, 1, 1) for _ in range(3))
    out = hdit_kernels.neighborhood_attention(q, k, v, 2, scale=1.0)[:, :, :, 0, 0]
    weights = torch.softmax((q.flatten(1)[:, :, None] * k.flatten(1)[:, None]).double(), -1)
    exact = (weights @ v.flatten(1).double()[..., None]).reshape_as(out)
    assert cases.error(out, exact, exact.float(), torch.float32) <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests above run the kernels themselves")
@pytest.mark.parametrize("name", ["geglu", "ada_rms_norm", "cosine_rope", "neighborhood_attention"])
def test_calls_reach_the_cuda_kernels_which_say_what_is_missing(name, monkeypatch):
    """Without a GPU: each call has the arguments that the binding takes, gets to the launch and fails there by name."""
    if not hasattr(extension.module, "cuda"):
        assert machinery.find(name).missing("cuda", "cuda") == "the compiled extension was built without nvcc"
        return
    runs = []
    monkeypatch.setattr(extension, "run", lambda backend, *run: runs.append(run))
    case = next(c for c in cases.TESTED if c.op == name and c.gradients and x_of(c).numel() and x_of(c).ndim > 2)
    (x, *others), options = case.arguments(torch.float32)
    outputs = machinery._tuple(case.function(x.requires_grad_(), *others, **options, backend="cuda"))
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert [run[0] for run in runs] == [f"{name}_forward", f"{name}_backward"]
    for kernel, arguments, _ in runs:
        workspace = (0,) if kernel.endswith("backward") and name != "geglu" else ()
        if workspace:
            assert getattr(extension.module.cuda, f"{kernel}_workspace")(*arguments) >= 0
        with pytest.raises(RuntimeError, match=f"{kernel}.*(driver|device)"):
            getattr(extension.module.cuda, kernel)(*arguments, *workspace, 0, 0)


def x_of(case):
    return case.arguments(torch.float32)[0][0]


CPU = extension.module.cpu if extension.module else None


@pytest.mark.parametrize("instruction_set", CPU.instruction_sets() if CPU else [])
def test_every_instruction_set_agrees(instruction_set, poisoned):
    """The kernels are compiled once for each; the tests above run on the best one that this machine has."""
    before = CPU.instruction_set()
    CPU.set_instruction_set(instruction_set)
    try:
        for case in (c for c in cases.TESTED if "cpu" in hdit_kernels.available_backends(c.op)):
            for dtype in DTYPES:
                errors = cases.compare(case, dtype, backend="cpu")
                assert all(error <= 1 for error in errors.values()), (case, dtype, errors)
    finally:
        CPU.set_instruction_set(before)


@pytest.mark.parametrize("instruction_set", CPU.instruction_sets() if CPU else [])
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.float64], ids=str)
def test_angles_of_many_turns_keep_their_digits(instruction_set, angle_dtype):
    """cos and sin to 1e-7 up to 10⁴ radians, on both sides of where the fast reduction ends, and near their zeros."""
    width, r, half_turn = 512, 8, math.pi / 2
    zeros = torch.arange(-548, 548, dtype=torch.float64) * 11 * half_turn
    angles = torch.cat([torch.linspace(-1e4, 1e4, 3000, dtype=torch.float64), zeros])
    angles = angles.to(angle_dtype).reshape(width, 1, r)
    q = torch.zeros(1, 1, width, 1, 4 * r)
    q[..., r : 2 * r] = 1  # the features that turn by the columns' angles: their cosines, and 2r later their sines
    rope = hdit_kernels.AxialRope(torch.zeros(1, 1, r, dtype=angle_dtype), angles)
    before = CPU.instruction_set()
    CPU.set_instruction_set(instruction_set)
    try:
        turned, _ = hdit_kernels.cosine_rope(q, q, torch.tensor([math.sqrt(r)]), rope, backend="cpu")
    finally:
        CPU.set_instruction_set(before)
    turned = turned[0, 0].double() * math.sqrt(1 + 1e-6 / r)
    assert angles.abs().max() > 9999
    assert (turned[..., r : 2 * r] - angles.double().cos()).abs().max() < 2.5e-7
    assert (turned[..., 3 * r :] - angles.double().sin()).abs().max() < 2.5e-7


def test_attention_keeps_the_digits_of_float64_angles(poisoned):
    """Angles of a thousand turns, which float32 would hold to 5e-4 radians, with float32 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 1, 5, 6, 2, 16, generator=generator)
    angles = (1e4 * torch.rand(n, 2, 4, generator=generator, dtype=torch.float64) for n in (5, 6))
    rope = hdit_kernels.AxialRope(*angles)
    got = hdit_kernels.neighborhood_attention(*tokens, 5, scale=1.0, rope=rope, backend="cpu")
    exact = hdit_kernels.neighborhood_attention(*tokens.double(), 5, scale=1.0, rope=rope, backend="reference")
    assert (got - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("instruction_set", CPU.instruction_sets() if CPU else [])
def test_cosine_rope_of_every_head_size(instruction_set, poisoned):
    before = CPU.instruction_set()
    CPU.set_instruction_set(instruction_set)
    try:
        for dim in (*range(1, 10), 15, 16, 17, 31, 33, 48, 63, 66):
            for dtype in (torch.float32, torch.bfloat16):
                errors = cases.compare(cases.rope_case(str(dim), (1, 2, 3), 2, dim, dim // 4), dtype, backend="cpu")
                gradients = dim > 1  # a head of one feature has a constant cosine: rounding is all there is
                assert all(error <= 1 for what, error in errors.items() if gradients or "output" in what), (dim, errors)
    finally:
        CPU.set_instruction_set(before)


def test_gradients_of_cosine_rope_that_are_not_wanted_are_not_computed():
    """Every choice of leaves, and of outputs used, gives what all together give."""
    case = next(c for c in cases.TESTED if c.label == "HDiT's half head")
    (q, k, scale, rope), _ = case.arguments(torch.float32)
    weights = [torch.randn(q.shape) for _ in range(2)]

    def gradients(wanted, used):
        leaves = [t.detach().requires_grad_(want) for t, want in zip((q, k, scale), wanted, strict=True)]
        outputs = hdit_kernels.cosine_rope(*leaves, rope)
        loss = sum((outputs[i] * weights[i]).sum() for i in used)
        wanted = [t for t in leaves if t.requires_grad]
        return iter(torch.autograd.grad(loss, wanted, materialize_grads=True))

    everything = list(gradients((True, True, True), (0, 1)))
    for used in ((0, 1), (0,), (1,)):
        for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)):
            flows = [0 in used, 1 in used, 0 in used]  # the scale multiplies q alone
            if not any(w and f for w, f in zip(wanted, flows, strict=True)):
                continue
            got = gradients([bool(w) for w in wanted], used)
            for want, flow, expected in zip(wanted, flows, everything, strict=True):
                if want:
                    assert torch.equal(next(got), expected if flow else torch.zeros_like(expected))


def test_extra_tokens_alone_and_hidden_ones():
    """Every key of the grid hidden: what is left is attention to the extra tokens."""
    case = next(c for c in cases.TESTED if c.label == "extra keys")
    (q, k, v), kwargs = case.arguments(torch.float64)
    kwargs["key_mask"] = torch.zeros(q.shape[:3], dtype=torch.bool)
    out, lse = hdit_kernels.neighborhood_attention(q, k, v, **kwargs)
    scores, _ = hdit_kernels.cosine_rope(q, q, kwargs["cosine_scale"], kwargs["rope"])
    keys = kwargs["additional_keys"]
    keys = keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + 1e-6)
    logits = torch.einsum("bhwnd,bsnd->bhwns", scores, keys)
    exact = torch.einsum("bhwns,bsnd->bhwnd", logits.softmax(-1), kwargs["additional_values"])
    assert cases.error(out, exact, exact, torch.float64) <= 1
    assert cases.error(lse, logits.logsumexp(-1), logits.logsumexp(-1), torch.float64) <= 1

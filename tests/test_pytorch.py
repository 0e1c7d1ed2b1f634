"""Each op under what PyTorch does to functions: autograd, torch.compile, torch.func, autocast, meta tensors, export.

Every test runs twice for each op: on the reference alone, and with a stand-in for a kernel (see conftest), which counts
its calls, so that a test also sees which route was taken.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import hdit_kernels
from hdit_kernels import cases
from hdit_kernels import op as machinery

LABELS = {
    "neighborhood_attention": "extra keys",
    "neighborhood_attention_qkvpacked": "packed, everything",
    "cosine_rope": "HDiT's half head",
    "geglu": "odd width",
    "linear_geglu": "bias, odd",
    "ada_rms_norm": "a scale per item",
}
CASES = {op: next(c for c in cases.TESTED if (c.op, c.label) == (op, label)) for op, label in LABELS.items()}
EVERY_OP = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=["reference", "kernel"])
def route(request):
    """None on the reference alone; else the stand-in kernel."""
    if request.param == "reference":
        with hdit_kernels.use("reference"):
            yield None
    else:
        yield request.getfixturevalue("stand_in")


def make(name, dtype=torch.float64, case=None):
    """(function of the differentiable tensors → one number, those tensors)."""
    case = case or CASES[name]
    args, kwargs = case.arguments(dtype)
    names = [*range(len(args)), *kwargs]
    values = dict(zip(names, [*args, *kwargs.values()], strict=True))
    leaves = [n for n in names if isinstance(values[n], torch.Tensor) and values[n].is_floating_point()]

    def function(*tensors):
        filled = {**values, **dict(zip(leaves, tensors, strict=True))}
        outputs = case.function(*(filled[i] for i in range(len(args))), **{n: filled[n] for n in kwargs})
        outputs = [torch.where(o.isfinite(), o, 0.0) for o in machinery._tuple(outputs)]
        return sum(o.sin().sum(dtype=torch.float64) for o in outputs)

    return function, tuple(values[n].detach().contiguous() for n in leaves)


def needing_grad(tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def close(got, exact):
    """Within the float64 budget."""
    got, exact = machinery._tuple(got), machinery._tuple(exact)
    assert len(got) == len(exact)
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape and cases.error(a, b, b, torch.float64) <= 1


def reference_gradients(function, tensors):
    with hdit_kernels.use("reference"):
        leaves = needing_grad(tensors)
        return torch.autograd.grad(function(*leaves), leaves)


def calls_of(name, route) -> set[str]:
    op = machinery.find(name).name
    return {op, f"{op}_backward"} if route else set()


def tuple_grad(function, n):
    return grad(function, argnums=tuple(range(n)))


@EVERY_OP
def test_eager_autograd(name, route):
    function, tensors = make(name)
    leaves = needing_grad(tensors)
    close(torch.autograd.grad(function(*leaves), leaves), reference_gradients(function, tensors))
    if route:
        assert set(route.calls) == calls_of(name, route)


@EVERY_OP
def test_a_gradient_for_one_input_alone(name, route):
    function, tensors = make(name)
    exact = reference_gradients(function, tensors)
    for i in range(len(tensors)):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        close(torch.autograd.grad(function(*leaves), leaves[i]), exact[i])


@EVERY_OP
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_forward_and_backward(name, route, backend):
    case = None
    if (
        name.startswith("neighborhood") and backend == "inductor"
    ):  # which compiles the reference for every key: few keys
        packed = name.endswith("packed")
        case = cases.attention_case("2×2", (1, 5, 6), packed=packed, kernel_size=2, cosine=True, rope=2, mask=packed)
    function, tensors = make(name, torch.float32, case)
    leaves = needing_grad(tensors)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    exact64 = reference_gradients(make(name, case=case)[0], [t.double() for t in tensors])
    rounded = reference_gradients(function, tensors)
    for a, b, c in zip(got, exact64, rounded, strict=True):
        # one more factor of 2: inductor's exp and sin are not eager's
        assert cases.error(a, b, c, torch.float32) <= 2
    if route:
        assert calls_of(name, route) <= set(route.calls)


@EVERY_OP
def test_compile_sees_through_the_reference_and_not_into_kernels(name, route):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    function, tensors = make(name)
    with torch.no_grad():
        torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("hdit" in target for target in targets) == bool(route)


RESOLUTIONS = (8, 9), (12, 10), (14, 16)


def case_at(name, height, width):
    if name == "cosine_rope":
        return cases.rope_case("", (2, height, width), 2, 16, 2)
    if name == "geglu":
        return cases.geglu_case("", 2, height * width, 48)
    if name == "linear_geglu":
        return cases.linear_geglu_case("", (2, height * width), 16, 24, False)
    if name == "ada_rms_norm":
        return cases.norm_case("", (2, height, width, 16), (2, 16))
    packed = name.endswith("qkvpacked")
    return cases.attention_case("", (2, height, width), 2, 16, packed=packed, kernel_size=5, **cases.FULL)


@EVERY_OP
def test_compile_dynamic_over_three_resolutions(name, route):
    """No graph break and at most one recompilation."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(args, kwargs):
        outputs = CASES[name].function(*args, **kwargs)
        return sum(o.sin().sum() for o in machinery._tuple(outputs))

    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend=counter)
    for height, width in RESOLUTIONS:
        args, kwargs = case_at(name, height, width).arguments(torch.float64)
        leaf = args[0].requires_grad_()
        (got,) = torch.autograd.grad(compiled(args, kwargs), leaf)
        with hdit_kernels.use("reference"):
            (exact,) = torch.autograd.grad(call(args, kwargs), leaf)
        close(got, exact)
    assert counter.frame_count <= 2


@EVERY_OP
def test_func_grad_and_vmap_of_it(name, route):
    function, tensors = make(name)
    n = len(tensors)
    gradient = tuple_grad(function, n)
    close(gradient(*tensors), reference_gradients(function, tensors))
    if route:
        assert set(route.calls) == calls_of(name, route)
    # per-sample gradients: all mapped, then only the first, the others shared
    stacked = tuple(torch.stack([t, 1.1 * t, -t]) for t in tensors)
    exact = [reference_gradients(function, [t[i] for t in stacked]) for i in range(3)]
    for got, rows in zip(vmap(gradient)(*stacked), zip(*exact, strict=True), strict=True):
        close(got, torch.stack(rows))
    exact = [reference_gradients(function, [stacked[0][i], *tensors[1:]]) for i in range(3)]
    got = vmap(gradient, in_dims=(0, *[None] * (n - 1)))(stacked[0], *tensors[1:])
    for g, rows in zip(got, zip(*exact, strict=True), strict=True):
        close(g, torch.stack(rows))


@EVERY_OP
def test_vmap(name, route):
    function, tensors = make(name)
    mapped = tuple(torch.stack([t, 0.9 * t], 1 if t.ndim > 1 else 0) for t in tensors)
    dims = tuple(1 if t.ndim > 1 else 0 for t in tensors)
    exact = torch.stack([function(*(m.select(d, i) for m, d in zip(mapped, dims, strict=True))) for i in range(2)])
    close(vmap(function, in_dims=dims)(*mapped), exact)
    shared = vmap(function, in_dims=(dims[0], *[None] * (len(tensors) - 1)))(mapped[0], *tensors[1:])
    close(shared, torch.stack([function(mapped[0].select(dims[0], i), *tensors[1:]) for i in range(2)]))


@EVERY_OP
def test_jvp(name, route):
    """Forward-mode AD against the transpose: ⟨gradient, direction⟩, in torch.func and with dual tensors."""
    function, tensors = make(name)
    directions = tuple(torch.randn_like(t) for t in tensors)
    products = [g * d for g, d in zip(reference_gradients(function, tensors), directions, strict=True)]
    exact = sum(p.sum() for p in products)
    allowed = 64 * torch.finfo(torch.float64).eps * sum(p.abs().sum() for p in products)
    assert (jvp(function, tensors, directions)[1] - exact).abs() <= allowed
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)]
        assert (forward_ad.unpack_dual(function(*duals)).tangent - exact).abs() <= allowed


@EVERY_OP
def test_second_derivatives_are_right_or_refused(name, route):
    function, tensors = make(name)

    def norm(*tensors):
        return sum(g.square().sum() for g in tuple_grad(function, len(tensors))(*tensors))

    with hdit_kernels.use("reference"):
        exact = grad(norm)(*tensors)
    assert exact.abs().sum() > 0
    close(grad(norm)(*tensors), exact)  # the reference serves inside torch.func

    leaves = needing_grad(tensors)
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    # a second path to the input, so that a dropped term would go unnoticed by autograd
    total = sum(g.square().sum() for g in first) + leaves[0].pow(3).sum()
    if route:
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(total, leaves[0])
    else:
        close(torch.autograd.grad(total, leaves[0])[0], exact + 3 * tensors[0].square())


@EVERY_OP
def test_compiled_torch_func(name, route):
    function, tensors = make(name)
    exact = reference_gradients(function, tensors)[0]
    compiled = torch.compile(lambda *t: grad(function)(*t), fullgraph=True, backend="aot_eager")
    close(compiled(*tensors), exact)
    close(grad(torch.compile(function, backend="aot_eager"))(*tensors), exact)
    mapped = tuple(torch.stack([t, 0.9 * t]) for t in tensors)
    compiled = torch.compile(lambda *t: vmap(function)(*t), fullgraph=True, backend="aot_eager")
    close(compiled(*mapped), torch.stack([function(*(m[i] for m in mapped)) for i in range(2)]))


@EVERY_OP
def test_autocast(name, route):
    """Attention and projections take autocast's dtype; the rest keep their own. Gradients come back in the inputs'."""
    function, tensors = make(name, torch.float32)
    exact64 = reference_gradients(make(name)[0], [t.double() for t in tensors])
    lowered = name.startswith("neighborhood") or name == "linear_geglu"
    case = CASES[name]
    args, kwargs = case.arguments(torch.float32)
    leaves = needing_grad(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = machinery._tuple(case.function(*args, **kwargs))[0]
        gradients = torch.autograd.grad(function(*leaves), leaves)
        with hdit_kernels.use("reference"):
            rounded = torch.autograd.grad(function(*leaves), leaves)
    assert out.dtype is (torch.bfloat16 if lowered else torch.float32)
    for got, exact, reference in zip(gradients, exact64, rounded, strict=True):
        assert got.dtype is torch.float32
        assert cases.error(got, exact, reference, torch.bfloat16 if lowered else torch.float32) <= 1


def test_autocast_takes_mixed_dtypes_and_leaves_float64_alone(route):
    q, k, v = (torch.randn(1, 6, 6, 1, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = hdit_kernels.neighborhood_attention(q, k.bfloat16(), v.half(), 3)
        double = hdit_kernels.neighborhood_attention(q.double(), k.double(), v.double(), 3)
    plain = hdit_kernels.neighborhood_attention(q.bfloat16(), k.bfloat16(), v.half().bfloat16(), 3)
    assert mixed.dtype is torch.bfloat16 and torch.equal(mixed, plain) and double.dtype is torch.float64
    with pytest.raises(TypeError, match="k must have q's dtype"):
        hdit_kernels.neighborhood_attention(q, k.bfloat16(), v, 3)


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors_say_what_a_call_gives(name, dtype, stand_in):
    case = CASES[name]
    real = cases.run(case, dtype)
    plain = cases.run(case, dtype, plain=True)
    assert all((real[n].shape, real[n].dtype) == (t.shape, t.dtype) for n, t in plain.items())
    fake = cases.run(case, dtype, device="meta")
    for what, value in real.items():
        other = fake[what]
        assert other.device.type == "meta"
        assert (other.shape, other.dtype, other.stride()) == (value.shape, value.dtype, value.stride()), what


@EVERY_OP
def test_export(name, route):
    case = CASES[name]
    args, kwargs = case.arguments(torch.float64)

    class Module(torch.nn.Module):
        def forward(self, *args, **kwargs):
            return case.function(*args, **kwargs)

    program = torch.export.export(Module(), args, kwargs)
    other_args, other_kwargs = copy.deepcopy(args), kwargs
    other_args[0].mul_(1.5)
    expected = case.function(*other_args, **other_kwargs)
    close(program.module()(*other_args, **other_kwargs), expected)


@EVERY_OP
def test_opcheck_of_the_registered_ops(name, stand_in):
    """Schema, fake implementation and dispatch of the forward and the backward op, with arguments of a real call."""
    op = machinery.find(name)
    seen = {}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (op.op, op.op_backward):
                seen[func] = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            return func(*args, **(kwargs or {}))

    function, tensors = make(name, torch.float32)
    leaves = needing_grad(tensors)
    with Recorder():
        torch.autograd.grad(function(*leaves), leaves)
    assert set(seen) == {op.op, op.op_backward}
    for registered, arguments in seen.items():
        assert set(torch.library.opcheck(registered, arguments).values()) == {"SUCCESS"}


FLOPS = {  # 2 per multiply-add of a matrix product, forward and backward, counted by hand
    # queries·heads·(keys of the window + extra keys)·(q·k, p·v; again q·k, dp, dq, dk, dv)·dim
    "neighborhood_attention": 2 * (2 * 8 * 7 * 2) * (25 + 3) * 7 * 16,
    "neighborhood_attention_qkvpacked": 2 * (9 * 8 * 2) * (25 + 2) * 7 * 16,
    "cosine_rope": 0,
    "geglu": 0,
    "linear_geglu": 2 * 5 * 7 * 18 * 3,
    "ada_rms_norm": 0,
}


@EVERY_OP
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_counter(name, device, route):
    case = CASES[name]
    with FlopCounterMode(display=False) as counter:
        cases.run(case, torch.float32, device=device)
    assert counter.get_total_flops() == FLOPS[name]


@EVERY_OP
def test_inference_mode_and_no_grad(name, route):
    case = CASES[name]
    args, kwargs = case.arguments(torch.float64)
    expected = case.function(*args, **kwargs)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            close(case.function(*args, **kwargs), expected)


@EVERY_OP
def test_selective_checkpointing_recomputes_the_same(name, route):
    function, tensors = make(name)
    leaves = needing_grad(tensors)
    out = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    close(torch.autograd.grad(out, leaves), reference_gradients(function, tensors))


def test_an_unused_output_costs_no_gradient(stand_in):
    """The gradient of an lse that nobody reads reaches the kernel as None, not as a tensor of zeros."""
    args, kwargs = CASES["neighborhood_attention"].arguments(torch.float32)
    out, lse = hdit_kernels.neighborhood_attention(args[0].requires_grad_(), *args[1:], **kwargs)
    out.sum().backward(retain_graph=True)
    assert [g is None for g in stand_in.grad_outputs] == [False, True]
    lse.sum().backward()
    assert [g is None for g in stand_in.grad_outputs] == [True, False]


def test_packed_gradient_is_one_contiguous_tensor(route):
    args, kwargs = CASES["neighborhood_attention_qkvpacked"].arguments(torch.float32)
    qkv = args[0].requires_grad_()
    hdit_kernels.neighborhood_attention_qkvpacked(qkv, **kwargs)[0].sum().backward()
    assert qkv.grad.is_contiguous()
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(3))
    hdit_kernels.neighborhood_attention(q, k, v, **kwargs)[0].sum().backward()
    assert torch.equal(qkv.grad, torch.stack([q.grad, k.grad, v.grad], 3))


# ---- choosing a backend ---------------------------------------------------------------------------------------------


def test_backend_argument_and_use_take_exactly_that(stand_in):
    x = torch.randn(3, 8)
    assert hdit_kernels.available_backends("geglu", "cpu") == ("cpu", "reference")
    assert hdit_kernels.available_backends(hdit_kernels.linear_geglu) == ("cpu", "reference")
    hdit_kernels.geglu(x, backend="reference")
    with hdit_kernels.use("reference"), hdit_kernels.use("cpu"), hdit_kernels.use("reference"):
        hdit_kernels.geglu(x)
    assert stand_in.calls == []
    with hdit_kernels.use("cpu"):
        hdit_kernels.geglu(x)
    hdit_kernels.geglu(x)
    assert stand_in.calls == ["geglu"] * 2
    with contextlib.suppress(KeyError), hdit_kernels.use("reference"):
        raise KeyError
    hdit_kernels.geglu(x)
    assert stand_in.calls == ["geglu"] * 3
    leaf = x.clone().requires_grad_()
    with hdit_kernels.use("reference"):
        y = hdit_kernels.geglu(leaf)
    y.sum().backward()  # outside the block, on the backend of the forward pass
    assert stand_in.calls == ["geglu"] * 3


def test_a_missing_backend_is_refused_with_every_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(machinery, "_present_cache", {})
    x = torch.randn(3, 8)
    with pytest.raises(
        hdit_kernels.BackendError, match=r"(?s)'triton' is not present.*cpu:.*triton:.*cuda:.*reference:"
    ):
        hdit_kernels.geglu(x, backend="triton")
    for wrong in ("gpu", "", 3):
        with pytest.raises(ValueError, match="backend must be"):
            hdit_kernels.use(wrong)
        if wrong:
            with pytest.raises(ValueError, match="backend must be"):
                hdit_kernels.geglu(x, backend=wrong)
    with pytest.raises(ValueError, match="op must be one of"):
        hdit_kernels.available_backends("conv2d")


def test_explain_names_the_taker_and_why_not_the_others(stand_in):
    x = torch.randn(3, 8)
    lines = hdit_kernels.explain("geglu", x).splitlines()
    assert lines[0] == "geglu on cpu: cpu: takes this call"
    assert "present; cpu comes first" in lines[1] and len(lines) == len(machinery.NAMES)
    assert "reference: takes this call" in hdit_kernels.explain(hdit_kernels.geglu, x.to("meta"))
    with pytest.raises(ValueError, match="tensors"):
        hdit_kernels.explain("geglu")


def test_a_declining_kernel_hands_over_with_one_warning(stand_in, monkeypatch):
    op = machinery.find("geglu")
    monkeypatch.setitem(op.__dict__, "declines", lambda backend, x: "rows of eight" if x.shape[-1] == 8 else None)
    monkeypatch.setattr(machinery, "_warned", set())
    x = torch.randn(3, 8)
    expected = hdit_kernels.geglu(x, backend="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(hdit_kernels.geglu(x), expected)
    assert stand_in.calls == [] and sum("rows of eight" in str(w.message) for w in caught) == 1
    assert "cpu: rows of eight" in hdit_kernels.explain("geglu", x)
    with pytest.raises(hdit_kernels.BackendError, match="rows of eight"):
        hdit_kernels.geglu(x, backend="cpu")
    hdit_kernels.geglu(torch.randn(3, 6))
    assert stand_in.calls == ["geglu"]

"""Calls go past PyTorch's dispatcher where it has nothing to do, and through it wherever something sees them there."""

import contextlib
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hdit_kernels
from hdit_kernels import op as machinery

NORM = machinery.find("ada_rms_norm")
ROPE = hdit_kernels.AxialRope(torch.randn(8, 2, 3), torch.randn(9, 2, 3))


def norm(x, scale):
    return hdit_kernels.ada_rms_norm(x, scale)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 24, requires_grad=True)


@pytest.fixture
def without_registered_ops():
    """The registered ops of the norm raise."""

    def fail(*arguments):
        raise AssertionError("the dispatcher was called")

    registered = NORM.op, NORM.op_backward
    for name in ("op", "op_backward"):
        object.__setattr__(NORM, name, fail)
    yield
    for name, value in zip(("op", "op_backward"), registered, strict=True):
        object.__setattr__(NORM, name, value)


def test_ordinary_calls_go_past_the_dispatcher(tensors, without_registered_ops):
    x, scale = tensors
    expected = NORM.reference(x, scale, 1e-6)
    torch.testing.assert_close(norm(x, torch.nn.Parameter(scale)), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x[:, ::2], scale), expected[:, ::2])
    with torch.inference_mode():
        torch.testing.assert_close(norm(x.clone(), scale), expected)
    with torch.autocast("cpu"):
        torch.testing.assert_close(norm(x, scale), expected)
    upstream = torch.randn_like(x)
    got = torch.autograd.grad(norm(x, scale), tensors, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, tensors, upstream))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Profiler(contextlib.ExitStack):
    def __enter__(self):
        self.profile = self.enter_context(torch.profiler.profile())
        return self

    @property
    def seen(self):
        return [event.name.replace("::", ".") + ".default" for event in self.profile.events()]


@pytest.mark.parametrize("watch", [Names, FunctionNames, Profiler])
def test_what_watches_calls_sees_the_ops(watch, tensors):
    x, scale = tensors
    with watch() as forward:
        y = norm(x, scale)
    torch.testing.assert_close(y, NORM.reference(x, scale, 1e-6))
    assert "hdit.ada_rms_norm.default" in forward.seen
    with watch() as backward:
        torch.autograd.grad(y.sum(), tensors)
    if watch is not FunctionNames:  # which is off within the call of torch.autograd.grad that it sees
        assert "hdit.ada_rms_norm_backward.default" in backward.seen


@pytest.mark.filterwarnings("ignore:::torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_op(tensors):
    x, scale = (t.detach() for t in tensors)
    traced = torch.jit.trace(norm, (x, scale))
    assert "hdit::ada_rms_norm" in str(traced.graph)
    torch.testing.assert_close(traced(2 * x, scale), norm(2 * x, scale))


class Named(torch.Tensor):
    """A subclass that notes the functions called on it; every result is one too."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_a_subclass_sees_the_op_and_stays_one(tensors):
    x, scale = (t.detach() for t in tensors)
    y = norm(x.as_subclass(Named), scale)
    assert type(y) is Named and "hdit.ada_rms_norm.default" in Named.seen
    torch.testing.assert_close(y.as_subclass(torch.Tensor), norm(x, scale))


def negated(x):
    """-x, but not in memory: PyTorch's lazy negation, as of the imaginary part of a conjugate."""
    y = torch._neg_view(x)
    assert y.is_neg() and y.is_contiguous()
    return y


def test_lazy_negation_is_carried_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, 9, 2, 16).unbind(0)
    scale = torch.tensor([5.0, 10.0])
    attend = lambda *a: hdit_kernels.neighborhood_attention(*a, 5, cosine_scale=scale, rope=ROPE)  # noqa: E731
    expected = attend(-q, k, -v)
    assert torch.equal(attend(negated(q), k, negated(v)), expected)

    x = torch.randn(3, 20, requires_grad=True)
    upstream = torch.randn(3, 10)
    plain = torch.autograd.grad(hdit_kernels.geglu(x), x, -upstream)
    assert torch.equal(*plain, *torch.autograd.grad(hdit_kernels.geglu(x), x, negated(upstream)))


def test_what_is_no_ordinary_tensor_is_seen():
    x = torch.randn(4, 6)
    assert machinery.unseen((x, None, x.bfloat16(), x.T, torch.nn.Parameter(x)))
    for other in negated(x), x.to_sparse(), torch._to_functional_tensor(x), torch._efficientzerotensor((4, 6)):
        assert not machinery.unseen((x, other))
    assert not machinery.unseen((x, x.to("meta"))) and not machinery.unseen((x.to("meta"),))

"""Every op × backend × timed shape, forward and forward + backward, beside the eager and the compiled reference."""

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import hdit_kernels
from hdit_kernels import cases
from hdit_kernels import op as machinery

COMPILED = "compiled reference"
EAGER = "eager idiom"  # what one writes without us, where that is not the reference
IDIOMS = {
    "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
    "linear_geglu": lambda x, weight: IDIOMS["geglu"](F.linear(x, weight)),
    "ada_rms_norm": lambda x, scale, eps: F.rms_norm(x, x.shape[-1:], eps=eps) * scale[:, None],
}
DTYPES = (torch.float32, torch.bfloat16)
CASES = [(case, dtype) for case in cases.timed() for dtype in DTYPES]


def backends(op: str) -> list[str]:
    """Ours, best first, then the peers."""
    present = [b for b in hdit_kernels.available_backends(op, DEVICE) if b != "reference"]
    return [*present, *([EAGER] if op in IDIOMS else []), "reference", COMPILED]


@functools.cache
def check(case, dtype, backend: str) -> None:
    """A backend that does not match the reference is not timed."""
    wrong = {what: error for what, error in cases.compare(case, dtype, DEVICE, backend).items() if not error <= 1}
    if wrong:
        pytest.fail(f"not timed: {backend} does not match the reference of {case}: {wrong} (times the allowed error)")


def calls(case, dtype, backend):
    """The function to time in each direction, as a user would call it."""
    args, kwargs = case.arguments(dtype, DEVICE)
    name = "reference" if backend == COMPILED else backend
    leaves = [
        t.requires_grad_() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    function = IDIOMS[case.op] if backend == EAGER else functools.partial(case.function, **kwargs, backend=name)
    if backend == COMPILED:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True)

    def forward():
        with torch.no_grad():
            return function(*args)

    dys = [torch.randn_like(o) for o in machinery._tuple(forward())]

    def both():
        return torch.autograd.grad(machinery._tuple(function(*args)), leaves, dys)

    return {"forward": forward, "forward+backward": both}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("case", "dtype", "backend"),
    [pytest.param(c, d, b, id=f"{c}-{str(d).removeprefix('torch.')}-{b}") for c, d in CASES for b in backends(c.op)],
)
def test_op(record, case, dtype, backend, direction):
    if backend not in (EAGER, COMPILED):
        check(case, dtype, backend)
    call = calls(case, dtype, backend)[direction]
    both = direction != "forward"
    size = (case.tensors[0] + both * case.tensors[1]) * dtype.itemsize
    flops = 2 * (case.macs[0] + both * case.macs[1])
    record("ops", str(case), direction, dtype, backend, call, size=size, flops=flops)

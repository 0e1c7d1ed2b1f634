"""Fixtures for the tests of `hdit_kernels`, and how many examples hypothesis draws (`--hypothesis-profile stress`)."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

if (
    not torch.cuda.is_available()
):  # Triton kernels then run in their interpreter; it has to know before they are imported
    os.environ["TRITON_INTERPRET"] = "1"

from hdit_kernels import extension
from hdit_kernels import op as machinery

if not torch.cuda.is_available():  # CUDA kernels then run in their emulation
    extension.load_emulated(Path(os.environ.get("HDIT_EMULATED", Path(__file__).parent.parent / "build/emulated")))


hypothesis.settings.register_profile("fixed", max_examples=200, deadline=None, derandomize=True)
hypothesis.settings.register_profile("stress", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def poisoned():
    """Uninitialised memory is filled with NaN (PyTorch does so in its deterministic mode)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class StandIn:
    """Stands in for a kernel of every op under the name "cpu": it writes what it is given, and counts its calls.

    The machinery between PyTorch and a kernel (autograd, compile, vmap, …) is the same for all ops and kernels; with
    this it is tested for each op, whichever has a compiled kernel.
    """

    def __init__(self):
        self.calls: list[str] = []

    def forward(self, op):
        def forward(backend, inputs, outputs, params):
            assert backend == "cpu"
            self.calls.append(op.name)
            inputs = [t if t is None else t.detach() for t in inputs]  # a kernel sees no tangents and no graph
            results = (op.reference_forward or op.reference)(*inputs, *params)
            for output, result in zip(outputs, machinery._tuple(results), strict=True):
                output.copy_(result)

        return forward

    def backward(self, op):
        def backward(backend, grad_outputs, inputs, saved, grads, params):
            assert backend == "cpu" and len(saved) == len(op.saved_outputs)
            self.calls.append(f"{op.name}_backward")
            self.grad_outputs = grad_outputs
            inputs = [t if t is None else t.detach() for t in inputs]
            (op.reference_backward or op._vjp)(grad_outputs, inputs, grads, params)

        return backward


@pytest.fixture
def stand_in(monkeypatch):
    kernel = StandIn()
    for op in machinery.OPS.values():
        # (Op is frozen; its instance dictionary is not)
        monkeypatch.setitem(op.__dict__, "kernels", ("cpu",))
        monkeypatch.setitem(op.__dict__, "forward", kernel.forward(op))
        monkeypatch.setitem(op.__dict__, "backward", kernel.backward(op))
        monkeypatch.setitem(op.__dict__, "declines", None)
    monkeypatch.setattr(extension, "module", object())
    monkeypatch.setattr(machinery, "_present_cache", {})
    torch._dynamo.reset()
    yield kernel
    torch._dynamo.reset()

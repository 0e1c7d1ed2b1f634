"""What the benchmarks call "separate passes" is HDiT, and none of our ops."""

from pathlib import Path

import pytest
import torch
from test_models import LOCAL_GLOBAL, WINDOWS, build, call, gradients, relative

import hdit_kernels.op


@pytest.fixture
def in_models(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import separate_passes

    return separate_passes.in_models


@pytest.mark.parametrize("config", [LOCAL_GLOBAL, WINDOWS], ids=["neighborhoods and global", "windows"])
def test_separate_passes_are_hdit(in_models, config, monkeypatch):
    model = build(config)
    for name, p in model.named_parameters():
        if name.endswith(".scale"):
            p.data.abs_()
    x, sigma, cond = call(config, 32, 64)
    expected = gradients(model, model, x, sigma, cond)
    with monkeypatch.context() as patch, in_models():
        patch.setattr(hdit_kernels.op.Op, "__call__", lambda *arguments: pytest.fail("one of our ops was called"))
        got = gradients(model, model, x, sigma, cond)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, model, x, sigma, cond), expected, strict=True))

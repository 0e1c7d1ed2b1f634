"""Whole models: images per second of HDiT-B/4 and pixel DiT-B/4 (arXiv 2401.11605, figure 2), and, also compiled and
without our ops, of HDiT as k-diffusion trains it on Oxford Flowers; sampling and training.

The floor is the model's multiply-adds at the machine's matmul rate, so 1 / (× floor) is the utilisation.
"""

import contextlib
import functools

import pytest
import torch
from conftest import DEVICE
from separate_passes import in_models

import hdit
import hdit_kernels

SIDES = (128, 256) if DEVICE == "cpu" else (128, 256, 512, 1024)
BATCH = 1 if DEVICE == "cpu" else 8


@functools.lru_cache(maxsize=1)
def build(name: str, side: int, backend: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model, and what is called: itself, or compiled, once for each backend and size."""
    names = {"HDiT-B/4": f"hdit_b4_{side}", "DiT-B/4": "dit_b4", "HDiT flowers": "oxford_flowers_256"}
    configuration = hdit.configs.get(names[name])
    with torch.device(DEVICE):
        model = (hdit.DiT if name == "DiT-B/4" else hdit.HDiT)(configuration.config)
    if not backend.startswith("compiled"):
        return model, model
    torch._dynamo.reset()
    return model, torch.compile(model, dynamic=False)


RUNS = [
    (name, backend, side, step)
    for side in SIDES
    for name, backends in (
        ("HDiT-B/4", ("ours", "reference", "separate passes")),
        ("DiT-B/4", ("ours",)),
        ("HDiT flowers", ("ours", "compiled ours", "reference", "compiled reference", "separate passes")),
    )
    for backend in backends
    for step in ("sampling step", "training step")
    # a training step of DiT at 256² takes a minute on a CPU
    if not (DEVICE == "cpu" and name == "DiT-B/4" and side > 128 and step == "training step")
]


@pytest.mark.parametrize(("name", "backend", "side", "direction"), RUNS, ids=lambda v: f"{v}x{v}" if v in SIDES else v)
def test_model(record, side, name, backend, direction):
    model, function = build(name, side, backend)
    macs = hdit.flops.count(model, side, side, BATCH).macs
    x = torch.randn(BATCH, 3, side, side, device=DEVICE)
    sigma = torch.full((BATCH,), 80.0, device=DEVICE)
    cond = {"class_cond": torch.zeros(BATCH, dtype=torch.long, device=DEVICE)} if model.config.num_classes else {}
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16

    def forced():
        if backend == "separate passes":
            return in_models()
        return hdit_kernels.use("reference") if "reference" in backend else contextlib.nullcontext()

    def sample():
        with torch.no_grad(), forced(), torch.autocast(DEVICE, dtype, enabled=dtype is not torch.float32):
            return function(x, sigma, **cond)

    def train():
        with forced(), torch.autocast(DEVICE, dtype, enabled=dtype is not torch.float32):
            function(x, sigma, **cond).float().square().mean().backward()

    training = direction == "training step"
    model.train(training)
    flops = 2 * macs * (3 if training else 1)  # the backward pass has two products for each one of the forward pass
    call = train if training else sample
    record("models", f"{name} {side}x{side}", direction, dtype, backend, call, flops=flops, images=BATCH)

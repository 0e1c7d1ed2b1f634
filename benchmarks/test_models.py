"""Whole models: images per second of HDiT-B/4 and pixel DiT-B/4 (arXiv 2401.11605, figure 2), sampling and training.

The floor is the model's multiply-adds at the machine's matmul rate, so 1 / (× floor) is the utilisation.
"""

import contextlib

import pytest
import torch
from conftest import DEVICE

import hdit
import hdit_kernels

SIDES = (128, 256) if DEVICE == "cpu" else (128, 256, 512, 1024)
BATCH = 1 if DEVICE == "cpu" else 8


def build(name: str, side: int) -> torch.nn.Module:
    configuration = hdit.configs.get(f"hdit_b4_{side}" if name == "HDiT-B/4" else "dit_b4")
    model = hdit.HDiT if name == "HDiT-B/4" else hdit.DiT
    with torch.device(DEVICE):
        return model(configuration.config)


RUNS = [
    (name, backend, side, step)
    for side in SIDES
    for name, backend in (("HDiT-B/4", "ours"), ("HDiT-B/4", "reference"), ("DiT-B/4", "ours"))
    for step in ("sampling step", "training step")
    # a training step of DiT at 256² takes a minute on a CPU
    if not (DEVICE == "cpu" and name == "DiT-B/4" and side > 128 and step == "training step")
]


@pytest.mark.parametrize(("name", "backend", "side", "direction"), RUNS, ids=lambda v: f"{v}x{v}" if v in SIDES else v)
def test_model(record, side, name, backend, direction):
    model = build(name, side)
    macs = hdit.flops.count(model, side, side, BATCH).macs
    x = torch.randn(BATCH, 3, side, side, device=DEVICE)
    sigma = torch.full((BATCH,), 80.0, device=DEVICE)
    cond = {"class_cond": torch.zeros(BATCH, dtype=torch.long, device=DEVICE)} if model.config.num_classes else {}
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    forced = hdit_kernels.use("reference") if backend == "reference" else contextlib.nullcontext()

    def sample():
        with torch.no_grad(), forced, torch.autocast(DEVICE, dtype, enabled=dtype is not torch.float32):
            return model(x, sigma, **cond)

    def train():
        with forced, torch.autocast(DEVICE, dtype, enabled=dtype is not torch.float32):
            model(x, sigma, **cond).float().square().mean().backward()

    training = direction == "training step"
    flops = 2 * macs * (3 if training else 1)  # the backward pass has two products for each one of the forward pass
    call = train if training else sample
    record("models", f"{name} {side}x{side}", direction, dtype, backend, call, flops=flops, images=BATCH)

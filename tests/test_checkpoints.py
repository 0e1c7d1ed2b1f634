"""Checkpoints of training; those that are part of the repository: what their card says, and that they denoise."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

from hdit import checkpoints, data
from hdit.diffusion import losses
from hdit.models import DiTConfig, from_config, pretrained

FOLDER = Path(__file__).parent.parent / "checkpoints"


def test_every_checkpoint_has_a_card_with_its_hash():
    card = (FOLDER / "README.md").read_text()
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {path.name for path in FOLDER.glob("*.safetensors")}
    for name, section in sections.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() in section
        assert (FOLDER / name).stat().st_size <= 3e6
        model = pretrained.load(FOLDER / name).model
        assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in section


def test_the_checkpoint_denoises_and_knows_its_classes():
    """Against the best estimate from one pixel alone, and against the same network told another class."""
    model, about = pretrained.load(FOLDER / "builtin_64.safetensors", dtype=torch.float32)
    denoiser = losses.objective(about["objective"], model)
    images = data.open_images("builtin", *about["resolution"])
    assert about["class_names"] == list(images.class_names)
    torch.manual_seed(0)
    clean, classes = zip(*(images.example(i) for i in range(36)), strict=True)
    clean, classes = torch.stack(clean), torch.tensor(classes)
    for sigma, share in ((0.1, 0.6), (0.5, 0.35), (2.0, 0.3)):
        level = torch.full((36,), sigma)
        noised = clean + sigma * torch.randn_like(clean)
        with torch.no_grad():
            error = (denoiser(noised, level, class_cond=classes) - clean).square().mean()
            misled = (denoiser(noised, level, class_cond=(classes + 1) % 9) - clean).square().mean()
        variance = clean.var()
        pixelwise = variance * sigma**2 / (variance + sigma**2)  # a Wiener filter that sees one pixel
        assert error < share * pixelwise, (sigma, error / pixelwise)
        if sigma == 2.0:
            assert error < 0.9 * misled


def trained(seed: int, steps: int):
    """A small network, its average and its optimizer after some steps on random numbers."""
    torch.manual_seed(seed)
    network = from_config(DiTConfig(depth=1, width=16, heads=2, patch_size=2))
    ema = checkpoints.Ema(network, 0.9, None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        (network(torch.randn(2, 3, 8, 8), torch.rand(2) + 0.1) - 1).square().sum().backward()  # it begins at zero
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    return network, ema, optimizer


HEADER = {"model": "DiT", "settings": {"betas": [0.9, 0.95]}, "resolution": [8, 8]}


def test_a_checkpoint_holds_weights_average_and_moments(tmp_path):
    first, other = trained(0, 3), trained(1, 1)
    state = checkpoints.tensors(*first)
    path = checkpoints.save(tmp_path, 3, state, HEADER, 2)
    for p in first[0].parameters():
        p.detach().zero_()  # what was gathered is a copy
    read, header = checkpoints.load(path)
    assert header == HEADER | {"format": "hdit-training", "step": 3}
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    assert any(not torch.equal(read[f"model.{name}"], value) for name, value in first[1].average.items())
    for name, value in first[1].average.items():
        assert torch.equal(read[f"ema.{name}"], value)
        assert read[f"optimizer.{name}.step"] == 3
    checkpoints.restore(read, *other)
    again = checkpoints.tensors(*other)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert checkpoints.load(path)[0].keys() == state.keys()


def test_old_checkpoints_go_when_the_new_one_is_there(tmp_path, monkeypatch):
    state = {"model.w": torch.randn(3)}
    for step in (8, 9, 10, 11):
        checkpoints.save(tmp_path, step, state, HEADER, 2)
    for name in (".checkpoint-00000012.safetensors.1.tmp", "checkpoint-00000013.safetensors.part", "model.safetensors"):
        (tmp_path / name).touch()  # are none
    assert checkpoints.steps(tmp_path) == [10, 11]
    assert checkpoints.latest(tmp_path).name == "checkpoint-00000011.safetensors"
    assert checkpoints.latest(tmp_path / "nowhere") is None

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "write", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(tmp_path, 12, state, HEADER, 1)
    assert checkpoints.steps(tmp_path) == [10, 11]


def test_only_a_checkpoint_of_training_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="a training checkpoint is needed"):
        checkpoints.load(FOLDER / "builtin_64.safetensors")
    with pytest.raises(ValueError, match=r"ema_decay is 1\.0"):
        checkpoints.Ema(torch.nn.Linear(2, 2), 1.0, None)
    half = checkpoints.Ema(torch.nn.Linear(2, 2, dtype=torch.bfloat16), 0.5, 1.0)
    assert {value.dtype for value in half.average.values()} == {torch.float32}
    assert [half.decay_at(step) for step in (0, 1, 2)] == [0.0, 0.5, 0.5]

"""The checkpoints that are part of the repository: what their card says, and that they denoise."""

import hashlib
import re
from pathlib import Path

import torch

from hdit import data
from hdit.diffusion import losses
from hdit.models import pretrained

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

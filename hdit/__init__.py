"""Hourglass Diffusion Transformers (HDiT, arXiv 2401.11605), a pixel-space DiT and U-ViT: training, sampling, costs."""

from . import (
    augmentation,
    checkpoints,
    configs,
    data,
    diffusion,
    evaluate,
    export,
    flops,
    k_diffusion,
    models,
    pictures,
    sample,
    scaling,
    train,
)
from .models.dit import DiT, DiTConfig
from .models.hdit import HDiT, HDiTConfig
from .models.uvit import UViT, UViTConfig

__all__ = [
    "DiT",
    "DiTConfig",
    "HDiT",
    "HDiTConfig",
    "UViT",
    "UViTConfig",
    "augmentation",
    "checkpoints",
    "configs",
    "data",
    "diffusion",
    "evaluate",
    "export",
    "flops",
    "k_diffusion",
    "models",
    "pictures",
    "sample",
    "scaling",
    "train",
]

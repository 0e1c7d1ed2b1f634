"""Hourglass Diffusion Transformers (HDiT, arXiv 2401.11605) and a pixel-space DiT, with FLOP and scaling tools."""

from . import configs, data, diffusion, flops, k_diffusion, models, scaling
from .models.dit import DiT, DiTConfig
from .models.hdit import HDiT, HDiTConfig

__all__ = [
    "DiT",
    "DiTConfig",
    "HDiT",
    "HDiTConfig",
    "configs",
    "data",
    "diffusion",
    "flops",
    "k_diffusion",
    "models",
    "scaling",
]

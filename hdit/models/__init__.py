"""Denoisers of images: HDiT, and what it is compared with: the pixel DiT and simple diffusion's U-ViT."""

from .dit import DiT, DiTConfig
from .hdit import Global, HDiT, HDiTConfig, Level, Neighborhood, ShiftedWindow
from .pretrained import Model, from_config
from .uvit import UViT, UViTConfig, UViTLevel

__all__ = [
    "DiT",
    "DiTConfig",
    "Global",
    "HDiT",
    "HDiTConfig",
    "Level",
    "Model",
    "Neighborhood",
    "ShiftedWindow",
    "UViT",
    "UViTConfig",
    "UViTLevel",
    "from_config",
]

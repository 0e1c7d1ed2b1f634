"""Denoisers of images: HDiT and the pixel DiT that it is compared with."""

from .dit import DiT, DiTConfig
from .hdit import Global, HDiT, HDiTConfig, Level, Neighborhood, ShiftedWindow

__all__ = ["DiT", "DiTConfig", "Global", "HDiT", "HDiTConfig", "Level", "Neighborhood", "ShiftedWindow"]

"""Oxford Flowers at 256² with shifted windows instead of neighborhoods. 22,361,274 parameters, 11.730 GMAC at 256²."""

from ..models import Global, HDiTConfig, Level, ShiftedWindow
from .oxford_flowers_256 import resolution, training

__all__ = ["config", "resolution", "source", "training"]

source = "github.com/crowsonkb/k-diffusion, configs/config_oxford_flowers_shifted_window.json"
config = HDiTConfig(
    levels=(
        Level(2, 128, attention=ShiftedWindow()),
        Level(2, 256, attention=ShiftedWindow()),
        Level(4, 512, attention=Global(), dropout=0.1),
    ),
)

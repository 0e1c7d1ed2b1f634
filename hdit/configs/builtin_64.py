"""A small class-conditional HDiT for the nine photographs inside this package, at 64²: trains on a CPU in minutes."""

from ..models import Global, HDiTConfig, Level, Neighborhood
from .recipe import Training

source = "of this repository"
resolution = (64, 64)
config = HDiTConfig(
    levels=(
        Level(2, 64, attention=Neighborhood(d_head=32)),
        Level(4, 128, attention=Global(d_head=32)),
    ),
    num_classes=9,
    mapping_depth=1,
    mapping_width=96,
)
training = Training(
    steps=6000,
    batch_size=32,
    hardware="2 CPU cores",
    sigma_min=1e-2,
    sigma_max=160.0,
    lr=1e-3,
    lr_warmup=100,
    ema_decay=0.999,
    ema_power=0.75,
    sampler="dpmpp_2m",
    sampler_steps=25,
)

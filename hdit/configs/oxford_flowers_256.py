"""Oxford Flowers at 256², k-diffusion's small example. 22,361,274 parameters, 11.636 GMAC at 256². Its JSON has no
classes."""

from ..models import Global, HDiTConfig, Level
from .recipe import Training

source = "github.com/crowsonkb/k-diffusion, configs/config_oxford_flowers.json"
resolution = (256, 256)
config = HDiTConfig(levels=(Level(2, 128), Level(2, 256), Level(4, 512, attention=Global(), dropout=0.1)))
training = Training(
    steps=None,
    batch_size=None,
    sigma_min=1e-2,
    sigma_max=160.0,
    class_dropout=0.0,
    weight_decay=1e-3,
    ema_power=0.75,
    grad_clip=None,
    sampler=None,
    sampler_steps=None,
)

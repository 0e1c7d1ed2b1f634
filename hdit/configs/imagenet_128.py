"""Class-conditional ImageNet-128: HDiT-B/4, the model of the paper's ablations. 117.0 M parameters, 31.37 GMAC at
128²."""

from ..models import Global, HDiTConfig, Level
from .recipe import Training

source = "arXiv 2401.11605, Table 7"
resolution = (128, 128)
config = HDiTConfig(
    levels=(Level(2, 384), Level(11, 768, attention=Global())),
    num_classes=1000,
    mapping_depth=1,
    mapping_width=768,
)
training = Training(steps=400_000, hardware="4 x A100, 15 hours")

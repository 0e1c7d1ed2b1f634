"""Unconditional FFHQ at 1024²: three local and two global levels. 85.08 M parameters, 206.08 GMAC at 1024².

The paper prints a mapping width of 768; only 256 gives its number of parameters.
"""

from ..models import Global, HDiTConfig, Level
from .recipe import Training

source = "arXiv 2401.11605, Table 7"
resolution = (1024, 1024)
config = HDiTConfig(
    levels=(
        Level(2, 128),
        Level(2, 256),
        Level(2, 384),
        Level(2, 768, attention=Global()),
        Level(2, 1024, attention=Global(), dropout=0.1),
    ),
)
training = Training(steps=1_000_000, augment_prob=0.12, class_dropout=0.0, hardware="64 x A100, 5 days")

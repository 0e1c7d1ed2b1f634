"""Class-conditional ImageNet-256, the largest model of the paper. 557.4 M parameters, 197.59 GMAC at 256².

The paper prints a mapping width of 768; only 256 gives its number of parameters. Trained for 2 M steps at batch 256,
then for 200 k steps with the batch raised from 512 to 2048.
"""

from ..models import Global, HDiTConfig, Level
from .recipe import Training

source = "arXiv 2401.11605, Table 7"
resolution = (256, 256)
config = HDiTConfig(
    levels=(Level(2, 384), Level(2, 768), Level(16, 1536, attention=Global())),
    num_classes=1000,
)
training = Training(steps=2_200_000, hardware="8 x H100, 7.6 days")

"""DiT-B/4 on pixels, the baseline of the HDiT paper: 106.46 GMAC at 128².

The sigma that it learns makes 6 output channels. It has no classes here: they cost no multiply-adds.
"""

from ..models import DiTConfig

source = "arXiv 2212.09748, Table 1, at patch size 4 on pixels as in arXiv 2401.11605, Table 1"
resolution = (128, 128)
config = DiTConfig.of_size("B", patch_size=4, learn_sigma=True)
training = None

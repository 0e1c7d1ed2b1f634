"""HDiT-B/4 over resolutions: the models of the paper's Table 1 and Figure 2, for costs; only the first was trained.

Each doubling of the resolution prepends one local level. 31.35, 64.70, 198.08, 731.60 GMAC at 128² … 1024².
"""

from ..models import HDiTConfig
from .recipe import Configuration

source = "arXiv 2401.11605, Table 1"
family = {
    f"hdit_b4_{side}": Configuration(HDiTConfig.for_resolution(side, side), (side, side), None, source)
    for side in (128, 256, 512, 1024, 2048, 4096)
}

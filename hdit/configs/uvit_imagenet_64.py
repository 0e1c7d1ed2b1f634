"""Class-conditional ImageNet-64, the small U-ViT: 3 residual blocks, 3 transformer blocks and a trunk of 16. 394 M
parameters.

Noise levels: log-SNR in [-15, 15]. At 64² the schedule is the plain cosine, shifted to the noise of 32² images at its
noisy end. The optimizer's numbers are those of simple diffusion's runs, from memory.
"""

import math

from ..models import UViTConfig, UViTLevel
from .recipe import Training

source = "arXiv 2301.11093, appendix B; sizes as in its successors' ImageNet-64 models"
resolution = (64, 64)
config = UViTConfig(
    levels=(
        UViTLevel(3, 256),
        UViTLevel(3, 512, "transformer", dropout=0.2),
        UViTLevel(16, 1024, "transformer", dropout=0.2),
    ),
    num_classes=1000,
)
training = Training(
    steps=None,
    batch_size=2048,
    objective="simple-diffusion",
    parametrization="v",
    loss="epsilon",
    sigma_density="simple-diffusion",
    sigma_data=1.0,
    sigma_min=math.exp(-7.5),
    sigma_max=math.exp(7.5),
    lr=1e-4,
    lr_warmup=10_000,
    betas=(0.9, 0.99),
    eps=1e-12,
    sampler="ddpm",
    sampler_steps=512,
)

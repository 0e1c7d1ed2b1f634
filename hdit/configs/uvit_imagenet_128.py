"""Class-conditional ImageNet-128: the U-ViT of uvit_imagenet_64 with 3 residual blocks more at each end. 397 M
parameters."""

from dataclasses import replace

from ..models import UViTLevel
from . import uvit_imagenet_64
from .uvit_imagenet_64 import source, training

__all__ = ["config", "resolution", "source", "training"]

resolution = (128, 128)
config = replace(uvit_imagenet_64.config, levels=(UViTLevel(3, 128), *uvit_imagenet_64.config.levels))

"""Published configurations by name: `get("ffhq_1024").config` is what HDiT takes, `.training` how it was trained.

The ablations of the papers are in `ablations`.
"""

from . import (
    ablations,
    builtin_64,
    dit_b4,
    ffhq_1024,
    hdit_b4,
    imagenet_128,
    imagenet_256,
    oxford_flowers_256,
    oxford_flowers_256_window,
    uvit_imagenet_64,
    uvit_imagenet_128,
)
from .recipe import Configuration, Training

__all__ = ["Configuration", "Training", "ablations", "get", "names"]

_CONFIGURATIONS: dict[str, Configuration] = {
    **{
        module.__name__.rpartition(".")[2]: Configuration(
            module.config, module.resolution, module.training, module.source
        )
        for module in (
            builtin_64,
            imagenet_128,
            ffhq_1024,
            imagenet_256,
            oxford_flowers_256,
            oxford_flowers_256_window,
            dit_b4,
            uvit_imagenet_64,
            uvit_imagenet_128,
        )
    },
    **hdit_b4.family,
}


def names() -> list[str]:
    """The names that get() knows."""
    return list(_CONFIGURATIONS)


def get(name: str) -> Configuration:
    """The configuration of this name. ValueError, listing all names, for one that is not there."""
    if name not in _CONFIGURATIONS:
        raise ValueError(f"configuration {name!r} does not exist; there are {', '.join(_CONFIGURATIONS)}")
    return _CONFIGURATIONS[name]

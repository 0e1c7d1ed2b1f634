"""Non-leaking augmentation: geometric transforms whose parameters condition the network (Karras et al. 2022, EDM,
arXiv 2206.00364, appendix F.2). The network learns what was done; with zeros, nothing was, and it samples plain images.

The transform is a function of the 9-vector that the network sees:

    0  1 if mirrored left to right           5, 6  stretch: (a cos, a sin) of the angle, a ≥ 0; by 2^(a/5) along the
    1  1 if mirrored top to bottom                 axis at this angle, by 2^(−a/5) across
    2  scale by 2^(v/5)                      7, 8  shift by v/8 of the width, of the height
    3, 4  cos − 1, sin of the rotation

Angles turn from the x axis (right) to the y axis (down). Order and sizes as in k-diffusion, which HDiT was trained
with: shift, stretch, rotate, scale, mirror. One thing differs: there a is of either sign, so (a, angle) and
(−a, angle + π) give one vector and opposite stretches; here the vector says which one it is, and the distributions of
vectors and of images are the same.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SCALE = STRETCH = 2**0.2
SHIFT = 1 / 8
SIZE = 9
MARGIN = 5  # finer samples beyond the border that the first output pixel needs


@dataclass(frozen=True)
class KarrasAugmentation:
    """Each of up-down mirror, scale, rotation, stretch and shift with ``probability``; left-right mirror with 1/2.

    A probability of 0 does nothing at all.
    """

    probability: float = 0.12

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")

    def __call__(self, image: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, H, W) in [-1, 1] -> the transformed image and its vector (9,) float32."""
        vector = draw(self.probability, generator)
        return transform(image, vector), vector


def draw(probability: float, generator: torch.Generator) -> torch.Tensor:
    """A random vector (9,). The same number of random values is drawn whatever is applied."""
    chances = torch.rand(5, generator=generator) < probability
    flips = torch.randint(2, (2,), generator=generator)
    rotation, axis = ((torch.rand(2, generator=generator) * 2 - 1) * math.pi).unbind()
    scale, stretch, right, down = torch.randn(4, generator=generator).unbind()
    vector = torch.stack(
        [
            flips[0].float(),
            flips[1] * chances[0],
            scale * chances[1],
            (rotation.cos() - 1) * chances[2],
            rotation.sin() * chances[2],
            stretch * axis.cos() * chances[3],
            stretch * axis.sin() * chances[3],
            right * chances[4],
            down * chances[4],
        ]
    )
    return vector if probability > 0 else torch.zeros(SIZE)


def matrix(vector: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(2, 3) float64: where the transform of ``vector``, its mirrors left out, takes a point (x, y, 1) in pixels from
    the centre of the image."""
    _, _, scale, cosine, sine, along, across, right, down = vector.double().tolist()
    a = math.hypot(along, across)
    axis = torch.tensor([along / a, across / a] if a else [1.0, 0.0], dtype=torch.float64)
    projection = torch.outer(axis, axis)
    stretch = STRETCH**a * projection + STRETCH**-a * (torch.eye(2, dtype=torch.float64) - projection)
    # k-diffusion turns by minus the angle of its vector
    rotation = torch.tensor([[cosine + 1, sine], [-sine, cosine + 1]], dtype=torch.float64)
    linear = SCALE**scale * rotation @ stretch
    shift = torch.tensor([SHIFT * width * right, SHIFT * height * down], dtype=torch.float64)
    return torch.cat([linear, (linear @ shift)[:, None]], 1)


def transform(image: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``image`` (C, H, W) in [-1, 1], transformed by ``vector`` (9,); beyond its borders it is mirrored.

    Sampled (bicubic) on a grid twice as fine as the pixels, then low-passed (Lanczos) and thinned out, so shrinking to
    half the size makes no aliasing. Mirrors alone, and zeros, move pixels and change none.
    """
    if vector.shape != (SIZE,):
        raise ValueError(f"vector must have shape ({SIZE},), got {tuple(vector.shape)}")
    if vector[2:].any():
        image = _resample(image, matrix(vector, *image.shape[1:]))
    axes = [axis for axis, mirrored in ((-1, vector[0]), (-2, vector[1])) if mirrored]
    return image.flip(axes) if axes else image


def _resample(image: torch.Tensor, forward: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[1:]
    linear, shift = forward[:, :2], forward[:, 2]
    y, x = (
        (torch.arange(-MARGIN, 2 * side + MARGIN, dtype=torch.float64) + 0.5) / 2 - side / 2 for side in (height, width)
    )
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (rows, columns, 2) of the finer output grid
    sources = (points - shift) @ torch.linalg.inv(linear).T
    grid = sources * torch.tensor([2 / width, 2 / height], dtype=torch.float64)
    fine = F.grid_sample(
        image[None], grid[None].to(image.dtype), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    kernel = _lanczos(image.dtype)
    channels = image.shape[0]
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        weight = kernel.view(shape).expand(channels, -1, -1, -1)
        stride = (2, 1) if shape[2] == -1 else (1, 2)
        fine = F.conv2d(fine, weight, stride=stride, groups=channels)
    return fine[0].clamp(-1, 1)


def _lanczos(dtype: torch.dtype) -> torch.Tensor:
    """Twelve taps that thin a signal out by two: Lanczos-3, with unit sum."""
    distance = (torch.arange(12, dtype=torch.float64) - 5.5) / 2
    kernel = torch.sinc(distance) * torch.sinc(distance / 3)
    return (kernel / kernel.sum()).to(dtype)

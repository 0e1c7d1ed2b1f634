"""One image file as a tensor: read, crop, resize. A file that cannot be read is an UnreadableImage that names it."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


class UnreadableImage(ValueError):
    """A file that is not an image, is cut short, or cannot be opened; the message names it."""


def read_image(file: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data say; transparency is laid over white.

    file: a path, or bytes as a file object, which ``name`` then names. Raises UnreadableImage with the name and the
    cause; more pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS`` are one (a small file that unpacks to a huge image).
    """
    name = str(file) if name is None else name
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
                raise UnreadableImage(f"{name} has {image.mode} pixels; 8 bits per channel are accepted")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnreadableImage:
        raise
    # PIL answers broken files with OSError, SyntaxError, ValueError, EOFError, struct.error or DecompressionBombError.
    except Exception as error:
        cause = error
        if isinstance(error, UnidentifiedImageError):
            cause = "its format is unknown" if _size(file) else "it is empty"
        raise UnreadableImage(f"{name} is not a readable image: {cause}") from error


def _size(file: str | Path | BinaryIO) -> int:
    return Path(file).stat().st_size if isinstance(file, str | Path) else file.seek(0, 2)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1] from an RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1).contiguous()


def check_size(height: int, width: int):
    """Raises ValueError unless both are positive integers."""
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(f"{name} must be a positive integer, got {side!r}")


def crop_resize(
    image: Image.Image,
    height: int,
    width: int,
    *,
    fraction: float = 1.0,
    position: tuple[float, float] = (0.5, 0.5),
    filter: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The largest centred part of ``image`` with the aspect height:width, resized to (height, width) pixels.

    fraction in (0, 1]: sides of the part relative to the largest one. position: where the part lies, down and across,
    from 0 (top, left) to 1 (bottom, right). filter: one of PIL's, antialiased and in one step. A target larger than
    the part is interpolated: it has the requested number of pixels, not more detail. Nothing is tiled, mirrored or
    padded.
    """
    check_size(height, width)
    scale = min(image.width / width, image.height / height) * fraction
    crop_width, crop_height = scale * width, scale * height
    left, top = (image.width - crop_width) * position[1], (image.height - crop_height) * position[0]
    # (the sums may round beyond the image)
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return image.resize((width, height), filter, box=box)

"""Images as pictures: 8-bit pixels, PNG files, and grids with captions."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .files import replacing


def to_pixels(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 from (N, 3 or 1, H, W) in [-1, 1]: rounded to the nearest of 256 values, clipped."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 3, H, W) or (N, 1, H, W), got {tuple(images.shape)}")
    pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def grid(images: Tensor, columns: int | None = None, captions: Sequence[str] | None = None) -> Image.Image:
    """One picture of (N, 3, H, W) images in [-1, 1], row by row, with captions below where given.

    columns: so many that the picture is about 4:3 with few empty places, unless given.
    """
    pixels = to_pixels(images)
    count, height, width = pixels.shape[:3]
    if count < 1 or (columns is not None and columns < 1):
        raise ValueError(f"a grid needs 1 image and 1 column at least, got {count} images and columns {columns}")
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions must be one per image, {count}, got {len(captions)}")
    if columns is None:

        def unshapely(columns):
            rows = math.ceil(count / columns)
            return abs(math.log(columns * width / (rows * height) * 3 / 4)) + 3 * (rows * columns / count - 1)

        columns = min(range(1, count + 1), key=unshapely)
    gap, line = max(2, width // 32), 14 if captions else 0
    rows = math.ceil(count / columns)
    step = (width + gap, height + gap + line)
    picture = Image.new("RGB", (columns * step[0] + gap, rows * step[1] + gap), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i in range(count):
        left, top = gap + i % columns * step[0], gap + i // columns * step[1]
        picture.paste(Image.fromarray(pixels[i].numpy()), (left, top))
        if captions:
            text = captions[i]
            while len(text) > 1 and draw.textlength(text, font=font) > width:
                text = text[:-2] + "…"
            draw.text((left + width / 2, top + height + 1), text, fill="black", font=font, anchor="ma")
    return picture


def write(picture: Image.Image, path: str | Path):
    """A PNG file, which appears under its name only when it is whole."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def write_image(image: Tensor, path: str | Path):
    """One (3, H, W) image in [-1, 1] as a PNG file."""
    write(Image.fromarray(to_pixels(image[None])[0].numpy()), path)

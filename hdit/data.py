"""Real photographs as tensors: samples that ship inside scikit-image and scikit-learn, or a folder of images."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

# Photographs that lie inside the wheels, so nothing is downloaded: name -> (file, package).
SAMPLES = {
    "astronaut": ("data/astronaut.png", "skimage"),
    "coffee": ("data/coffee.png", "skimage"),
    "chelsea": ("data/chelsea.png", "skimage"),
    "rocket": ("data/rocket.jpg", "skimage"),
    "motorcycle": ("data/motorcycle_left.png", "skimage"),
    "china": ("datasets/images/china.jpg", "sklearn"),
    "flower": ("datasets/images/flower.jpg", "sklearn"),
}
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


class UnreadableImage(ValueError):
    """A file that is not an image, is cut short, or cannot be opened; the message names it."""


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data say; transparency is laid over white.

    Raises UnreadableImage with the path and the cause.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
                raise UnreadableImage(f"{path} has {image.mode} pixels; 8 bits per channel are accepted")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnreadableImage:
        raise
    # PIL answers broken files with OSError, SyntaxError, ValueError, EOFError, struct.error or DecompressionBombError.
    except Exception as error:
        raise UnreadableImage(f"{path} is not a readable image: {error}") from error


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1] from an RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return (pixels.permute(2, 0, 1).to(torch.float32) / 127.5 - 1).contiguous()


def crop_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of ``image`` with the aspect height:width, resized to (height, width) pixels.

    Lanczos with antialiasing, in one step. A target larger than the part is interpolated: it has the requested number
    of pixels, not more detail. Nothing is tiled, mirrored or padded.
    """
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise ValueError(f"{name} must be a positive integer, got {side!r}")
    scale = min(image.width / width, image.height / height)
    crop_width, crop_height = scale * width, scale * height
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def sample_path(name: str) -> Path:
    """Where the sample photograph ``name`` lies. Raises ModuleNotFoundError with the command that installs it."""
    if name not in SAMPLES:
        raise ValueError(f"photograph {name!r} is unknown; accepted are a folder of images, {', '.join(SAMPLES)}")
    file, package = SAMPLES[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(
            f"photograph {name!r} ships inside {package}, which is not installed: pip install 'hdit[demo]'"
        )
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise UnreadableImage(f"{path} is missing: this version of {package} does not ship photograph {name!r}")
    return path


def photographs(
    source: str | Path | Sequence[str] = tuple(SAMPLES), height: int | None = None, width: int | None = None
) -> dict[str, torch.Tensor]:
    """Photographs by name, each (3, H, W) float32 in [-1, 1]; with height and width through ``crop_resize``.

    source: names in ``SAMPLES``, or an image folder, read in the order of its file names (subfolders are not). A file
    of the folder that cannot be read is left out, with a warning that names it and a last one that counts them.
    Raises UnreadableImage where nothing can be read, ValueError for an unknown name.
    """
    if (height is None) != (width is None):
        raise ValueError(f"height and width go together, got height={height}, width={width}")
    if isinstance(source, str | Path):
        images = _read_folder(Path(source))
    else:
        if not source:
            raise ValueError(f"source must name at least one photograph of {', '.join(SAMPLES)}, got none")
        images = {name: read_image(sample_path(name)) for name in source}
    if height is not None:
        images = {name: crop_resize(image, height, width) for name, image in images.items()}
    return {name: to_tensor(image) for name, image in images.items()}


def _read_folder(folder: Path) -> dict[str, Image.Image]:
    if not folder.is_dir():
        raise ValueError(f"image folder {str(folder)!r} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"image folder {str(folder)!r} has no file ending in {', '.join(sorted(SUFFIXES))}")
    images, unreadable = {}, 0
    for path in paths:
        try:
            images[path.name] = read_image(path)
        except UnreadableImage as error:
            unreadable += 1
            warnings.warn(f"left out: {error}", stacklevel=3)
    if not images:
        raise UnreadableImage(f"none of the {len(paths)} image files in {str(folder)!r} can be read")
    if unreadable:
        warnings.warn(f"{unreadable} of {len(paths)} image files in {str(folder)!r} left out", stacklevel=3)
    return images

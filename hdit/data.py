"""Real images as tensors: sample photographs, and data sets to train on and to compare with.

``open_images`` opens a set (a folder, tar shards, Hugging Face data, samples that ship with packages), ``Batches``
makes an endless, shuffled, resumable stream of it, ``photographs`` reads a few pictures at once.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .data_images import SUFFIXES, UnreadableImage, check_size, crop_resize, read_image, to_tensor
from .data_sets import Arrays, Folder, HuggingFace, Images, PhotographCrops
from .data_shards import Shards, expand_braces
from .data_stream import Batch, Batches

__all__ = [
    "SAMPLES",
    "Batch",
    "Batches",
    "Images",
    "UnreadableImage",
    "crop_resize",
    "open_images",
    "photographs",
    "read_image",
    "sample_path",
    "to_tensor",
]

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
BUILTIN = Path(__file__).parent / "builtin"
NAMED = ("builtin", "photos", "digits", "faces")


def open_images(
    source: str | Path,
    height: int,
    width: int,
    *,
    crop: str = "center",
    flip: bool = False,
    image_key: str | None = None,
    class_key: str | None = None,
) -> Images:
    """A data set of images of (height, width) pixels, of which ``example(index, generator)`` reads one.

    source:
      - ``builtin``: crops of nine photographs free of copyright that are part of this package, a class for each;
      - ``photos``: crops of the photographs in ``SAMPLES``, a class for each; ``faces``: 100 grey faces, 25×25 pixels;
        ``digits``: 1797 grey digits, 8×8 pixels, 10 classes (all three: pip install 'hdit[demo]');
      - a folder of images, subfolders too; where every image lies one level down, these subfolders are the classes;
      - WebDataset tar shards: a folder of them, one, or many by braces (``train-{000..127}.tar``), with labels in .cls
        or .json files. Indexed by headers once, read by position, so that any order is possible. Not compressed;
      - ``hf:NAME`` or ``hf:NAME:SPLIT`` (pip install 'hdit[datasets]'): a Hugging Face data set, or a folder written by
        its ``save_to_disk``; the split is ``train`` unless given.
    crop: "center" for the largest centred part with the aspect height:width, "random" for one at a random place
    (of ``builtin`` and ``photos``: at a random place and scale, where "center" stands for fixed ones, 256 of each
    picture). flip: mirror left to right with probability 1/2.
    image_key, class_key: the column (Hugging Face) or extension (shards) that holds images; column, or key of the .json
    file, that holds classes. Found by themselves unless given.

    Raises ValueError for a source or option that cannot be used, ModuleNotFoundError where a package is missing.
    """
    check_size(height, width)
    if crop not in ("center", "random"):
        raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
    source = str(source)
    size = (height, width, crop, flip)
    keyed = source.startswith("hf:") or _is_saved_dataset(Path(source))
    found = None if keyed or source in NAMED else shard_paths(source)
    if not keyed and found is None and (image_key is not None or class_key is not None):
        raise ValueError(
            f"image_key {image_key!r} and class_key {class_key!r} are for tar shards and Hugging Face data sets; "
            f"{source!r} is neither"
        )
    if keyed:
        return HuggingFace(source, *size, image_key, class_key)
    if found is not None:
        return Shards(source, found, *size, image_key, class_key)
    if source == "builtin":
        return PhotographCrops(source, {path.stem: path for path in sorted(BUILTIN.glob("*.jpg"))}, *size)
    if source == "photos":
        return PhotographCrops(source, {name: sample_path(name) for name in SAMPLES}, *size)
    if source in ("digits", "faces"):
        return Arrays(source, *size)
    return Folder(source, *size)


def shard_paths(source: str) -> list[str] | None:
    """The tar files that ``source`` means, in order; None where it means no shards."""
    if "://" in source or source.startswith("pipe:"):
        raise ValueError(f"source {source!r} is no local path: download the images first")
    if Path(source).is_dir():
        return sorted(map(str, Path(source).glob("*.tar"))) or None
    if source.endswith((".tar", ".tar.gz", ".tgz")):
        return expand_braces(source)
    return None


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


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

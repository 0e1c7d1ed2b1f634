"""Sets of images that are read one by one, in any order: a folder, sample photographs, small arrays, Hugging Face."""

import functools
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .data_images import SUFFIXES, UnreadableImage, crop_resize, read_image, to_tensor

CROPS_PER_PHOTOGRAPH = 256
SMALLEST_CROP = 0.5  # of a photograph's largest part with the aspect that is asked for


class Images:
    """A set of images of one size, each with a class or none; every kind of set defines ``read`` and ``label``.

    name: what messages call the set. class_names: tuple of names by class number, None without classes.
    An instance can be pickled, so that loading processes can have it.
    """

    filter = Image.Resampling.LANCZOS

    def __init__(self, name: str, height: int, width: int, crop: str, flip: bool):
        self.name, self.height, self.width, self.crop, self.flip = name, height, width, crop, flip
        self.class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def read(self, index: int) -> Image.Image:
        """Image ``index`` as RGB in its own size. Raises UnreadableImage."""
        raise TypeError(f"{type(self).__name__} reads no images")

    def label(self, index: int) -> int:
        """Class of image ``index``, -1 without."""
        return -1

    def part(self, index: int, generator: torch.Generator | None) -> dict:
        """Which part of image ``index`` is taken: ``fraction`` and ``position`` of ``crop_resize``."""
        if self.crop == "center":
            return {}
        return {"position": tuple(torch.rand(2, generator=generator, dtype=torch.float64).tolist())}

    def example(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Image ``index`` (3, H, W) float32 in [-1, 1], and its class (-1 without).

        generator: source of the random crop and flip; PyTorch's own unless given. Raises IndexError, UnreadableImage.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        part = self.part(index, generator)
        image = to_tensor(crop_resize(self.read(index), self.height, self.width, filter=self.filter, **part))
        if self.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return image, self.label(index)


class Folder(Images):
    """Every image file below a folder, in the order of their paths."""

    def __init__(self, name: str, *size):
        super().__init__(name, *size)
        if not Path(name).is_dir():
            accepted = "a folder, .tar shards, hf:NAME, builtin, photos, digits, faces"
            raise ValueError(f"source {name!r} is not a folder; accepted are {accepted}")
        self.files = sorted(_image_files(name))
        if not self.files:
            raise ValueError(f"image folder {name!r} has no file ending in {', '.join(sorted(SUFFIXES))}")
        if all(file.count("/") == 1 for file in self.files):
            self.class_names = tuple(sorted({file.split("/")[0] for file in self.files}))
            self._numbers = {name: number for number, name in enumerate(self.class_names)}

    def __len__(self):
        return len(self.files)

    def read(self, index):
        return read_image(os.path.join(self.name, self.files[index]))

    def label(self, index):
        return -1 if self.class_names is None else self._numbers[self.files[index].split("/")[0]]


def _image_files(folder: str):
    """Paths relative to ``folder`` with forward slashes. Links are followed, a link to a folder above only once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        for file in files:
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                yield os.path.relpath(os.path.join(root, file), folder).replace(os.sep, "/")


class PhotographCrops(Images):
    """Parts of a few photographs, ``CROPS_PER_PHOTOGRAPH`` of each: half to all of its size, anywhere.

    Without random crops, index i always has the same part. The class is the photograph.
    """

    def __init__(self, name: str, paths: Mapping[str, Path], *size):
        super().__init__(name, *size)
        self.class_names = tuple(paths)
        self.paths = list(paths.values())

    def __len__(self):
        return CROPS_PER_PHOTOGRAPH * len(self.paths)

    def read(self, index):
        return _photograph(self.paths[self.label(index)])

    def label(self, index):
        return index % len(self.paths)

    def part(self, index, generator):
        if self.crop == "center":
            fraction, *position = np.random.Generator(np.random.PCG64(index)).random(3).tolist()
        else:
            fraction, *position = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        return {"fraction": SMALLEST_CROP + (1 - SMALLEST_CROP) * fraction, "position": tuple(position)}


@functools.lru_cache(maxsize=16)
def _photograph(path: Path) -> Image.Image:
    return read_image(path)


class Arrays(Images):
    """Small grey pictures from scikit-learn (``digits``, by class) and scikit-image (``faces``), enlarged smoothly."""

    filter = Image.Resampling.BICUBIC

    def __init__(self, name: str, *size):
        super().__init__(name, *size)
        package, file = {"digits": ("sklearn", None), "faces": ("skimage", "data/lfw_subset.npy")}[name]
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(
                f"data set {name!r} ships inside {package}, which is not installed: pip install 'hdit[demo]'"
            )
        if name == "digits":
            from sklearn.datasets import load_digits

            found = load_digits()
            pictures, self.labels = found.images / 16, found.target.tolist()
            self.class_names = tuple(map(str, range(10)))
        else:
            # 200 cut-outs of Labeled Faces in the Wild: the first half faces, the other background.
            pictures, self.labels = np.load(Path(spec.origin).parent / file)[:100], None
        self.pictures = np.rint(pictures * 255).astype(np.uint8)

    def __len__(self):
        return len(self.pictures)

    def read(self, index):
        return Image.fromarray(self.pictures[index]).convert("RGB")

    def label(self, index):
        return -1 if self.labels is None else self.labels[index]


class HuggingFace(Images):
    """A data set of the library ``datasets``: hf:NAME, hf:NAME:SPLIT, or a folder written by ``save_to_disk``."""

    def __init__(self, name: str, height, width, crop, flip, image_key: str | None, class_key: str | None):
        super().__init__(name, height, width, crop, flip)
        if importlib.util.find_spec("datasets") is None:
            raise ModuleNotFoundError(f"source {name!r} needs the package datasets: pip install 'hdit[datasets]'")
        import datasets

        table = _load_table(datasets, name)
        kinds = table.features
        self.image_key = _column(name, "image_key", image_key, kinds, datasets.Image)
        self.class_key = _column(name, "class_key", class_key, kinds, datasets.ClassLabel, required=False)
        if isinstance(kinds[self.image_key], datasets.Image):  # files as they are; reading them is read_image's
            table = table.cast_column(self.image_key, datasets.Image(decode=False))
        self.table = table.select_columns(self.image_key)
        self.labels = None
        if self.class_key is not None:
            self.labels = [-1 if value is None else value for value in table[self.class_key]]
            wrong = next((value for value in self.labels if isinstance(value, bool) or not isinstance(value, int)), 0)
            if wrong != 0:
                raise ValueError(f"class_key {self.class_key!r} of {name!r} must hold integers, got {wrong!r}")
            named = getattr(kinds[self.class_key], "names", None)
            self.class_names = tuple(named or map(str, range(max(self.labels) + 1)))

    def __len__(self):
        return len(self.table)

    def read(self, index):
        where = f"image {index} of {self.name}"
        cell = self.table[index][self.image_key]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(content, bytes):
            return read_image(io.BytesIO(content), where)
        if isinstance(cell, dict) and isinstance(cell.get("path"), str):
            return read_image(cell["path"], f"{where}, {cell['path']}")
        raise UnreadableImage(f"{where} has neither bytes nor a path in its column {self.image_key!r}")

    def label(self, index):
        return -1 if self.labels is None else self.labels[index]


def _load_table(datasets, name: str):
    """The table of ``name``: one split."""
    if name.startswith("hf:"):
        path, _, split = name.removeprefix("hf:").partition(":")
        return datasets.load_dataset(path, split=split or "train")
    table = datasets.load_from_disk(name)
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise ValueError(f"source {name!r} has no split 'train'; name one of its folders: {', '.join(table)}")
        return table["train"]
    return table


def _column(name: str, option: str, key: str | None, kinds: Mapping, kind: type, required: bool = True) -> str | None:
    """The column called ``key``, else the first one of this kind."""
    if key is None:
        key = next((column for column, found in kinds.items() if isinstance(found, kind)), None)
        if key is None and required:
            raise ValueError(f"source {name!r} has no column of images; {option} must be one of {', '.join(kinds)}")
    elif key not in kinds:
        raise ValueError(f"{option} {key!r} is no column of {name!r}; accepted are {', '.join(kinds)}")
    return key

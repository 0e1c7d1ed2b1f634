"""Where the images of an evaluation come from, in batches: data sets, .npz files, checkpoints, noise."""

import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import data, export, sample
from .data_sets import Folder, Images
from .diffusion import losses
from .models import pretrained

BATCH = 64


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] at the 256 levels that a file of 8 bits has."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


class Source:
    """Images in batches: tensors (up to BATCH, 3, H, W) in [-1, 1].

    name; size: (height, width) in pixels; count: of its images, None where they have not been counted; unreadable: how
    many were left out. step: of the training, and guidance: scale that they were made with, where that is known.
    has_statistics: whether ``statistics()`` gives a mean and covariance of Inception features.
    captions: of the images, in their order, None without.
    """

    name: str
    size: tuple[int, int] | None
    count: int | None = None
    unreadable = 0
    step: int | None = None
    guidance: float | None = None
    has_statistics = False
    captions: list[str] | None = None

    def batches(self) -> Iterator[Tensor]:
        """The images, from the first on."""
        raise TypeError(f"{type(self).__name__} has no images")


class DataSet(Source):
    """Images of a data set, or of a folder of samples, in an order drawn from ``seed``; broken ones are left out.

    count: at most so many. backwards: from the end of that order, so that a set can be compared with other images of
    itself. ``unreadable`` counts what was left out, once it has been read.
    """

    def __init__(self, images: Images, count: int | None, seed: int, backwards: bool = False):
        self.images, self.name, self.size = images, images.name, (images.height, images.width)
        self.order = np.random.default_rng(seed).permutation(len(images))[:: -1 if backwards else 1][:count]
        self.count = len(self.order)
        self.captions = None if getattr(images, "captions", None) is None else []

    def batches(self):
        """Raises UnreadableImage where none can be read. ``captions`` becomes those of the images so far."""
        self.unreadable = 0
        self.captions = None if self.captions is None else []
        for start in range(0, len(self.order), BATCH):
            batch = []
            for index in self.order[start : start + BATCH].tolist():
                try:
                    batch.append(self.images.example(index)[0])
                except data.UnreadableImage as error:
                    self.unreadable += 1
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    continue
                if self.captions is not None:
                    self.captions.append(self.images.captions[index])
            if batch:
                yield rounded(torch.stack(batch))
        if self.unreadable == len(self.order):
            raise data.UnreadableImage(f"none of the {len(self.order)} images of {self.name!r} can be read")


class Samples(Folder):
    """A folder of generated images, which are not resized: all of one size, or it is an error.

    captions: of each file, where all have one in a text file of the same name beside it.
    """

    def __init__(self, name: str):
        super().__init__(name, 1, 1, "center", False)
        for file in self.files:
            try:
                with Image.open(Path(name) / file) as image:
                    self.width, self.height = image.size
                break
            except (OSError, SyntaxError, ValueError):  # named when it is read
                continue
        texts = [(Path(name) / file).with_suffix(".txt") for file in self.files]
        self.captions = [text.read_text().strip() for text in texts] if all(map(Path.is_file, texts)) else None

    def example(self, index, generator=None):
        image = self.read(index)
        if image.size != (self.width, self.height):
            raise ValueError(
                f"samples must have one size; {self.files[index]} of {self.name!r} has {image.height}×{image.width} "
                f"pixels, others {self.height}×{self.width}"
            )
        return data.to_tensor(image), self.label(index)


class Npz(Source):
    """ADM's format: arr_0 (N, H, W, 3) uint8 in an .npz, read in pieces; and (mu, sigma) of Inception features.

    ``statistics`` is the path where the file has mu and sigma; ``count`` is 0 where it has no images.
    """

    def __init__(self, path: str, count: int | None):
        self.name = self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path!r} is no .npz file: {error}") from None
        self.has_statistics = {"mu.npy", "sigma.npy"} <= names
        self.size, self.count = None, 0
        if "arr_0.npy" in names:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                shape, dtype = self._header(file)
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(f"arr_0 of {path!r} must be (N, H, W, 3) uint8, got {shape} {dtype}")
            self.size = shape[1:3]
            self.count = shape[0] if count is None else min(shape[0], count)
        elif not self.has_statistics:
            raise ValueError(
                f"{path!r} holds neither images (arr_0) nor statistics (mu, sigma); it has {sorted(names)}"
            )

    @staticmethod
    def _header(file) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran:
            raise ValueError(f"arr_0 must be stored in C order, got Fortran order for {shape}")
        return shape, dtype

    def statistics(self) -> tuple[Tensor, Tensor]:
        """mu (d,), sigma (d, d) in float64."""
        with np.load(self.path) as file:
            return torch.from_numpy(file["mu"].astype(np.float64)), torch.from_numpy(file["sigma"].astype(np.float64))

    def batches(self):
        if not self.count:
            raise ValueError(f"{self.path!r} has statistics and no images, which only the Fréchet distance can use")
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            self._header(file)
            bytes_each = 3 * self.size[0] * self.size[1]
            for start in range(0, self.count, BATCH):
                content = file.read(bytes_each * min(BATCH, self.count - start))
                pixels = np.frombuffer(content, np.uint8).reshape(-1, *self.size, 3)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


class Noise(Source):
    """White Gaussian noise with the deviation of images (0.5): what any model must beat."""

    def __init__(self, size: tuple[int, int], count: int, seed: int):
        self.name, self.size, self.count, self.seed = "noise", size, count, seed

    def batches(self):
        generator = torch.Generator().manual_seed(self.seed)
        for start in range(0, self.count, BATCH):
            yield rounded(0.5 * torch.randn(min(BATCH, self.count - start), 3, *self.size, generator=generator))


class Checkpoint(Source):
    """Samples of a model file, or of a checkpoint of ``hdit train`` (its averaged weights), made as by ``hdit sample``.

    options: fields of ``sample.Sample``. Classes take turns. The network is in memory while it is sampled, not before.
    """

    def __init__(self, path: str, size: tuple[int, int] | None, count: int, device: str, options: dict):
        self.name = self.path = path
        self.count, self.device = count, device
        height, width = (None, None) if size is None else size
        command = sample.Sample(Path(path), count=count, batch_size=BATCH, height=height, width=width, **options)
        model, facts = self._load()
        self.options = command.settings(model.config, facts)
        sample.stream(model, **self.options)  # refuses what cannot be, and makes nothing yet
        self.size, self.step = tuple(self.options["resolution"]), facts.get("step")
        self.guidance = self.options["guidance"] if model.config.num_classes else None
        names, classes = facts.get("class_names"), self.options["classes"]
        if names and classes:
            self.captions = [names[number] for number in itertools.islice(itertools.cycle(classes), count)]

    def _load(self) -> pretrained.Pretrained:
        training = pretrained.read_header(self.path).get("format") == pretrained.TRAINING_FORMAT
        return export.load_training(self.path) if training else pretrained.load(self.path)

    @torch.inference_mode()
    def batches(self):
        model, facts = self._load()
        denoiser = losses.objective(facts.get("objective", {"type": "edm"}), model.to(self.device)).eval()
        for images in sample.stream(denoiser, **self.options):
            yield rounded(images.expand(-1, 3, -1, -1))


def open_real(source: str, size: tuple[int, int], count: int | None, seed: int) -> Source:
    """The real images: a data set, cropped and resized to ``size``, or an .npz file, whose images must have it."""
    if source.endswith(".npz"):
        found = Npz(source, count)
        if found.size not in (None, size):
            raise ValueError(f"real {source!r} has {_x(found.size)} pixels, and the samples have {_x(size)}")
        return found
    return DataSet(data.open_images(source, *size), count, seed)


def open_samples(
    sources: tuple[str, ...],
    real: str,
    resolution: tuple[int, int] | None,
    count: int | None,
    seed: int,
    device: str,
    options: dict,
    guidances: tuple[float, ...] = (),
) -> list[Source]:
    """The samples of each source: a folder (of ``hdit sample``, for one), an .npz file, a checkpoint (once with each of
    ``guidances``, where they are given), ``noise``, or the name of a data set.

    All have one size: ``resolution``, else that of the first that has one of its own (the real .npz is the last asked).
    count: at most, of files; of checkpoints and noise exactly, and then 1000 unless given.
    """
    found: dict[str, list[Source]] = {}
    for source in sources:
        if source.endswith(".npz"):
            found[source] = [Npz(source, count)]
            if not found[source][0].count:
                raise ValueError(f"samples {source!r} hold no images (arr_0)")
        elif Path(source).is_dir():
            written = (Path(source) / "samples.json").is_file()  # by hdit sample, with a grid beside the images
            found[source] = [DataSet(Samples(f"{source}/images" if written else source), count, seed)]
            step = re.search(r"step-(\d+)$", Path(source).name)
            found[source][0].step = int(step[1]) if step else None
        elif Path(source).is_file() and not source.endswith(".tar"):
            own = [options | {"guidance": scale} for scale in guidances] or [options]
            found[source] = [Checkpoint(source, resolution, count or 1000, device, {"seed": seed, **o}) for o in own]
            for each in found[source] if len(own) > 1 else ():
                each.name += f", guidance {each.guidance:g}"
    sizes = [resolution] if resolution is not None else [each[0].size for each in found.values()]
    if not sizes and real.endswith(".npz"):
        sizes = [Npz(real, None).size]
    if not sizes or sizes[0] is None:
        raise ValueError(f"resolution must be given for samples {', '.join(sources)}, which have no size of their own")
    size = sizes[0]
    for source, each in found.items():
        if each[0].size != size:
            raise ValueError(f"samples {source!r} have {_x(each[0].size)} pixels; the resolution is {_x(size)}")
    for source in sources:
        if source == "noise":
            found[source] = [Noise(size, count or 1000, seed)]
        elif source not in found:
            found[source] = [DataSet(data.open_images(source, *size), count, seed, backwards=True)]
    return [each for source in sources for each in found[source]]


def _x(size: tuple[int, int]) -> str:
    return "×".join(map(str, size))

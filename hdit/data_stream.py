"""An endless stream of shuffled batches that is a function of its position alone.

Element p of the stream belongs to epoch e = p // n of a set of n images, and is image ``order(seed, e)[p % n]``; its
random crop, flip and augmentation are drawn from a generator seeded by (seed, e, image). So neither the number of
loading processes, nor the number of ranks, nor a restart changes any element. An image that cannot be read is reported,
and its place is taken by another one, drawn from (seed, p): that, too, can be found from the position alone, which
leaving the place out could not (every rank would have to know what others could not read).
"""

import functools
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .data_images import UnreadableImage
from .data_sets import Images

Augment = Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
ORDER, EXAMPLE, REPLACEMENT = range(3)  # what a random draw is for, so that no two purposes share one


class Batch(NamedTuple):
    """images (B, 3, H, W) float32 in [-1, 1]; classes (B,) int64, -1 without; augmentation (B, 9) float32, zeros where
    nothing was applied (and (B, 0) without ``augment``)."""

    images: torch.Tensor
    classes: torch.Tensor
    augmentation: torch.Tensor

    def to(self, device, non_blocking: bool = True) -> "Batch":
        """The same on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class Batches:
    """Endless iterator of ``Batch``; rank r of ``world_size`` gets elements r, r + world_size, … of the stream.

    batch_size: images per rank and batch. augment: (image, generator) -> (image, vector), as
    ``augmentation.KarrasAugmentation``. workers: loading processes, which prepare two batches each ahead; 0 loads in
    this one. Memory is pinned where there is a GPU. ``unreadable`` maps the images that this process could not read
    (index -> message); each is also warned of, once.

    Raises UnreadableImage, from ``next``, where no image of the set can be read.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        augment: Augment | None = None,
    ):
        smallest = {"batch_size": 1, "seed": 0, "rank": 0, "world_size": 1, "workers": 0}
        for (name, least), value in zip(smallest.items(), (batch_size, seed, rank, world_size, workers), strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size {world_size}, got {rank}")
        if not len(images):
            raise ValueError(f"images {images.name!r} holds none")
        self.workers, self.unreadable = workers, {}
        self.loader = _Loader(images, batch_size, seed, rank, world_size, augment)
        self.batches_given = 0  # since ``start``
        self.iterator = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.iterator is None:
            self.iterator = self._start()
        batch, unreadable = next(self.iterator)
        for index, message in unreadable.items():
            if index not in self.unreadable:
                self.unreadable[index] = message
                warnings.warn(f"left out, and another image in its place: {message}", stacklevel=2)
        if batch is None:
            images = self.loader.images
            raise UnreadableImage(f"none of the {len(images)} images of {images.name!r} can be read")
        self.batches_given += 1
        return batch

    @property
    def epoch(self) -> float:
        """Passes over the set so far, by all ranks."""
        return self.state_dict()["position"] / len(self.loader.images)

    def state_dict(self) -> dict:
        """What continues the stream after the last batch that was given: three integers, the same on every rank."""
        loader = self.loader
        position = loader.start + self.batches_given * loader.batch_size * loader.world_size
        return {"seed": loader.seed, "images": len(loader.images), "position": position}

    def load_state_dict(self, state: dict):
        """Continue where ``state_dict`` was taken; the number of ranks and the batch size may differ.

        Raises ValueError for the state of a set of another size, which has another order. The seed is the state's.
        """
        if set(state) != {"seed", "images", "position"}:
            raise ValueError(f"state must have seed, images and position, got {sorted(state)}")
        loader = self.loader
        if state["images"] != len(loader.images):
            raise ValueError(
                f"state is of a set of {state['images']} images, and {loader.images.name!r} has {len(loader.images)}"
            )
        self.iterator = None
        self.batches_given = 0
        loader.seed, loader.start = state["seed"], state["position"]

    def _start(self) -> Iterator:
        context = None
        if self.workers:  # never fork: threads and CUDA of this process would be broken there
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
            if "forkserver" in methods:  # PyTorch is then imported once, not by every worker
                context.set_forkserver_preload([__name__])
        return iter(
            torch.utils.data.DataLoader(
                self.loader,
                batch_size=None,
                sampler=_Count(),
                num_workers=self.workers,
                multiprocessing_context=context,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # it draws a number, which shall not be PyTorch's next
            )
        )


class _Count(torch.utils.data.Sampler):
    """0, 1, 2, …: numbers of batches."""

    def __iter__(self):
        number = 0
        while True:
            yield number
            number += 1


class _Loader(torch.utils.data.Dataset):
    """Makes batch ``number`` of a rank, counted from ``start``; this is what loading processes are given."""

    def __init__(self, images: Images, batch_size: int, seed: int, rank: int, world_size: int, augment: Augment | None):
        self.images, self.augment = images, augment
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.start = 0  # element of the stream

    def __getitem__(self, number: int) -> tuple[Batch | None, dict[int, str]]:
        """The batch (None where no image can be read), and index -> message of the images that could not be read."""
        first = self.start + number * self.batch_size * self.world_size + self.rank
        unreadable: dict[int, str] = {}
        examples = []
        for element in range(first, first + self.batch_size * self.world_size, self.world_size):
            example = self.element(element, unreadable)
            if example is None:
                return None, unreadable
            examples.append(example)
        images, classes, augmentation = zip(*examples, strict=True)
        return Batch(torch.stack(images), torch.tensor(classes), torch.stack(augmentation)), unreadable

    def element(self, element: int, unreadable: dict[int, str]) -> tuple[torch.Tensor, int, torch.Tensor] | None:
        """Image, class and augmentation vector of one element of the stream, None where no image can be read."""
        count = len(self.images)
        epoch, place = divmod(element, count)
        index = int(_order(count, self.seed, epoch)[place])
        replacements = None
        while True:
            if index not in unreadable:
                try:
                    return self._example(index, epoch)
                except UnreadableImage as error:
                    unreadable[index] = str(error)
            if replacements is None:
                replacements = iter(_random(self.seed, REPLACEMENT, element).permutation(count).tolist())
            index = next(replacements, None)
            if index is None:
                return None

    def _example(self, index: int, epoch: int):
        seed = int(np.random.SeedSequence((self.seed, EXAMPLE, epoch, index)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        image, label = self.images.example(index, generator)
        vector = torch.empty(0)
        if self.augment is not None:
            image, vector = self.augment(image, generator)
        return image, label, vector


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@functools.lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Indices of the images in the order of an epoch."""
    return _random(seed, ORDER, epoch).permutation(count)

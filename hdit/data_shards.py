"""Images in tar shards as WebDataset lays them out: the files of one example stand together and share a name up to its
first dot. Shards are indexed by their headers once, so examples can be read in any order."""

import io
import json
import re
import tarfile
import warnings
from pathlib import Path
from typing import NamedTuple

from .data_images import SUFFIXES, UnreadableImage, read_image
from .data_sets import Images

CLASS_KEYS = ("label", "cls", "class")


class Span(NamedTuple):
    """Where a file lies inside a shard: number of the shard, first byte, bytes."""

    shard: int
    offset: int
    size: int


def expand_braces(pattern: str) -> list[str]:
    """Paths that a shell would make of ``pattern``: {a,b} and {08..11}, the latter with the zeros of its first number.

    Raises ValueError for braces that are neither.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"source {pattern!r} has a brace without its partner")
        return [pattern]
    inside = found.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = map(int, span.groups())
        step = 1 if first <= last else -1
        parts = [str(number).zfill(len(span.group(1))) for number in range(first, last + step, step)]
    elif "," in inside:
        parts = inside.split(",")
    else:
        raise ValueError(f"source {pattern!r} has {{{inside}}}; accepted are {{a,b}} and {{000..127}}")
    return [path for part in parts for path in expand_braces(pattern[: found.start()] + part + pattern[found.end() :])]


class Shards(Images):
    """Examples of tar shards in the order of the shards and of their files."""

    def __init__(self, name, paths: list[str], height, width, crop, flip, image_key: str | None, class_key: str | None):
        super().__init__(name, height, width, crop, flip)
        self.paths, self.image_key, self.class_key = paths, image_key, class_key
        for path in paths:
            _check_shard(path)
        self.examples: list[tuple[str, Span]] = []
        labels = []
        for number, path in enumerate(paths):
            with open(path, "rb") as file:
                for key, files in _samples(path, file, number):
                    image = self._image_of(files)
                    if image is not None:
                        self.examples.append((key, image))
                        labels.append(self._label_of(file, f"{path}:{key}", files))
        if not self.examples:
            wanted = f"extension {image_key!r}" if image_key else f"an extension of {', '.join(sorted(SUFFIXES))}"
            raise ValueError(f"the {len(paths)} shards of {name!r} hold no file with {wanted}")
        self.class_names, self.labels = _number_classes(name, labels)

    def __len__(self):
        return len(self.examples)

    def read(self, index):
        key, (shard, offset, size) = self.examples[index]
        name = f"{self.paths[shard]}:{key}"
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise UnreadableImage(f"{name} is not a readable image: {error}") from error
        return read_image(io.BytesIO(content), name)

    def label(self, index):
        return self.labels[index]

    def _image_of(self, files: dict[str, Span]) -> Span | None:
        if self.image_key is not None:
            return files.get(self.image_key.lstrip(".").lower())
        return next((span for kind, span in files.items() if f".{kind.rsplit('.', 1)[-1]}" in SUFFIXES), None)

    def _label_of(self, file, name: str, files: dict[str, Span]) -> int | str | None:
        """What the .cls or .json file of the example says; None without."""
        kind = "cls" if "cls" in files and self.class_key is None else "json"
        if kind not in files:
            return None
        file.seek(files[kind].offset)
        content = file.read(files[kind].size)
        try:
            if kind == "cls":
                return int(content)
            fields = json.loads(content)
            if not isinstance(fields, dict):
                raise ValueError(f"it is {type(fields).__name__}, not an object")
            keys = CLASS_KEYS if self.class_key is None else (self.class_key,)
            value = next((fields[key] for key in keys if key in fields), None)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the label {name}.{kind} cannot be read: {error}") from None
        if value is None and self.class_key is not None:
            raise ValueError(f"class_key {self.class_key!r} is not in {name}.json, which has {', '.join(fields)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
            raise ValueError(f"the label {name}.json must be an integer or a name, got {value!r}")
        return value


def _check_shard(path: str):
    if not Path(path).is_file():
        raise ValueError(f"shard {path!r} is missing")
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"shard {path!r} is compressed by gzip, which has no random access: gunzip it first")


def _samples(path: str, file, number: int):
    """(name, {extension: Span}) of every example of an open shard, from its headers alone."""
    key, files = None, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # tarfile keeps every header otherwise
                folder, _, base = member.name.rpartition("/")
                if not member.isfile() or base.startswith("."):
                    continue
                stem, _, kind = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if files:
                        yield key, files
                    key, files = name, {}
                files[kind.lower()] = Span(number, member.offset_data, member.size)
    except tarfile.TarError as error:
        warnings.warn(f"left out: what follows {key!r} in shard {path!r}, which is damaged: {error}", stacklevel=5)
    if files:
        yield key, files


def _number_classes(name: str, labels: list) -> tuple[tuple[str, ...] | None, list[int]]:
    """Class names, and a number for every example (-1 without a label)."""
    given = {label for label in labels if label is not None}
    if not given:
        return None, [-1] * len(labels)
    if all(isinstance(label, int) for label in given):
        if min(given) < 0:
            raise ValueError(f"labels of {name!r} must be 0 or more, got {min(given)}")
        names = tuple(map(str, range(max(given) + 1)))
        return names, [-1 if label is None else label for label in labels]
    if all(isinstance(label, str) for label in given):
        names = tuple(sorted(given))
        numbers = {label: number for number, label in enumerate(names)} | {None: -1}
        return names, [numbers[label] for label in labels]
    raise ValueError(f"labels of {name!r} must be all integers or all names, got both")

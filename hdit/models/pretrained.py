"""Models as files: one safetensors file holds the parameters and, in its header, what is needed to use them.

The header's metadata are strings: format = "hdit", model = the name of the class, config = the configuration in JSON,
and whatever else was given to save_pretrained, each value in JSON (objective, resolution, class_names, card, …).
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import replacing
from .config import Config

FORMAT = "hdit"
TRAINING_FORMAT = "hdit-training"  # of hdit train's checkpoints
RESERVED = ("format", "model", "config")


class Model(nn.Module):
    """What HDiT, DiT and UViT have in common: a configuration, and a file that holds it with the parameters.

    checkpointing = True recomputes each block in backward instead of keeping its activations.
    """

    config_class: ClassVar[type[Config]]
    config: Config
    checkpointing = False

    def save_pretrained(self, path: str | Path, **metadata) -> None:
        """Write parameters, configuration and `metadata` (values that JSON knows) to one safetensors file.

        The file appears under its name only when it is whole and on the disk. ValueError for metadata that JSON does
        not know or that are called format, model or config, and for a folder that does not exist.
        """
        for name in metadata:
            if name in RESERVED:
                raise ValueError(
                    f"metadata {name!r} is taken by the file itself; every name but {', '.join(RESERVED)} is free"
                )
        header = {"format": FORMAT, "model": model_class(self.config).__name__, "config": self.config.to_dict()}
        header = {
            name: value if name in ("format", "model") else to_json(name, value)
            for name, value in (header | metadata).items()
        }
        write(path, self.state_dict(), header)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        """The model that save_pretrained wrote, in evaluation mode; arguments and errors as those of load()."""
        model = load(path, dtype=dtype, device=device).model
        if not isinstance(model, cls):
            raise ValueError(
                f"path {path} holds a {type(model).__name__}; {cls.__name__}.from_pretrained needs a {cls.__name__}"
            )
        return model


def model_class(config: Config) -> type[Model]:
    """The class that this configuration is for (type(model) would be another one where FSDP has wrapped it)."""
    for cls in Model.__subclasses__():
        if type(config) is cls.config_class:
            return cls
    known = ", ".join(sorted(cls.config_class.__name__ for cls in Model.__subclasses__()))
    raise TypeError(f"config is {type(config).__name__}; it must be one of {known}")


def from_config(config: Config) -> Model:
    """A fresh model of the class that this configuration is for."""
    return model_class(config)(config)


class Pretrained(NamedTuple):
    """model: in evaluation mode. metadata: what was given to save_pretrained."""

    model: Model
    metadata: dict[str, Any]


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Pretrained:
    """The model of a file of save_pretrained, whichever class it is, and the metadata.

    dtype: of the parameters, the file's where None; buffers that need float32 keep it. ValueError, in one sentence, for
    a file that is absent, cut short, none of ours, or whose tensors do not fit its configuration.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; it must be None or a floating-point torch.dtype")
    header = read_header(path)
    kind = header.get("format")
    if kind == TRAINING_FORMAT:
        raise ValueError(f"path {path} is a checkpoint of training; hdit export makes a model of it")
    if kind != FORMAT:
        raise ValueError(
            f"path {path} has format {kind!r} in its header; it must be {FORMAT!r}, as save_pretrained writes it"
        )
    model = build(header, path)
    fill(model, read_tensors(path), f"path {path}")
    model = model.to(dtype=dtype, device=device).eval()
    return Pretrained(model, {name: from_json(path, header, name) for name in header if name not in RESERVED})


def build(header: dict[str, str], path: str | Path) -> Model:
    """The model that a header names, on the meta device: without values. path is for the sentence of an error."""
    classes = {cls.__name__: cls for cls in Model.__subclasses__()}
    name = header.get("model")
    if name not in classes:
        raise ValueError(f"path {path} holds a model of class {name!r}; it must be one of {', '.join(sorted(classes))}")
    cls, plain = classes[name], from_json(path, header, "config")
    try:
        config = cls.config_class.from_dict(plain)
    except (TypeError, ValueError) as error:
        raise ValueError(f"path {path} holds a configuration that cannot be used: {error}") from error
    with torch.device("meta"):
        return cls(config)


def fill(model: nn.Module, tensors: dict[str, Tensor], source: str = "state_dict") -> None:
    """Make `tensors` the parameters and buffers of a model, in their own dtypes and places, without a copy.

    ValueError, naming all of them, for missing, unexpected and misshaped tensors; the model is then as it was.
    """
    check_names(model.state_dict(), tensors, source)
    model.load_state_dict(tensors, assign=True)


def check_names(own: dict[str, Tensor], tensors: dict[str, Tensor], source: str = "state_dict") -> None:
    """Are these the tensors of a model whose state dict is `own`, in name, shape, and floating point or not?"""
    common = [name for name in own if name in tensors]
    faults = {
        "missing": [name for name in own if name not in tensors],
        "not in the model": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
            for name in common
            if tensors[name].shape != own[name].shape
        ],
        "not floating point": [
            f"{name} {tensors[name].dtype}"
            for name in common
            if own[name].is_floating_point() and not tensors[name].is_floating_point()
        ],
    }
    if any(faults.values()):
        text = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{source} does not fit this model: {text}")


# ---- safetensors files -----------------------------------------------------------------------------------------------


def write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """A safetensors file under this name: whole, or not there. What was there before stays until then."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path {path} lies in no existing folder")
    if path.is_dir():
        raise ValueError(f"path {path} is a folder; it must be the name of a file")
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, header)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Equal models become equal files, with one hash: safetensors writes the metadata in an order that is random.

    The header (8 bytes of length, then JSON) keeps its length.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) <= size:
            file.seek(8)
            file.write(content.ljust(size))


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} where it has none. ValueError for what is none, or is cut short."""
    with _opened(path) as file:
        return file.metadata() or {}


def read_tensors(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, under the rest of their name, copied into memory."""
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no dict)
        return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}  # else pages of the file


@contextlib.contextmanager
def _opened(path: str | Path):
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path {path} is no file; it must be a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"path {path} is no whole safetensors file ({reason}); it may be cut short or of another kind"
        ) from error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(name: str, value) -> str:
    """ValueError, with the name, for what JSON does not know: tensors, paths, infinities, …"""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata {name!r} is {value!r}; it must be what JSON knows: {error}") from error


def from_json(path: str | Path, header: dict[str, str], name: str):
    """Entry `name` of a header, decoded. ValueError where it is missing or no JSON."""
    try:
        return json.loads(header[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"path {path} has {header.get(name)!r} as {name!r} in its header; it must be JSON") from error

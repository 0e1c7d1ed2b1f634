"""Training checkpoints: the weights, their moving average, the optimizer's moments and where the run stood.

One safetensors file each, so that one rename makes it whole, and nothing is unpickled. Tensors are named
``model.<name>``, ``ema.<name>`` and ``optimizer.<name>.<moment>``; the header holds JSON. Sharded parameters (FSDP2)
are gathered for it: the file does not tell how many processes wrote it.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .models import pretrained

NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


class Ema:
    """The exponential moving average of a network's parameters, of which samples are made (Karras et al. 2024, §3).

    decay of step s = min(decay, 1 − (1 + s)^−power), constant where power is None: while the run is young, the average
    forgets its beginning quickly. Kept in float32 at least, sharded as the parameters are.
    """

    def __init__(self, network: nn.Module, decay: float, power: float | None):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}; it must be in [0, 1)")
        self.decay, self.power = decay, power
        self.parameters = dict(network.named_parameters())
        wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.parameters.items()}
        self.average = {name: p.detach().to(wide[name], copy=True) for name, p in self.parameters.items()}

    def decay_at(self, step: int) -> float:
        return self.decay if self.power is None else min(self.decay, 1 - (1 + step) ** -self.power)

    @torch.no_grad()
    def update(self, step: int) -> None:
        average = [_local(t) for t in self.average.values()]
        now = [_local(p).to(t.dtype) for p, t in zip(self.parameters.values(), average, strict=True)]
        torch._foreach_lerp_(average, now, 1 - self.decay_at(step))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the network's parameters are the average."""
        kept = {name: _local(p).clone() for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                _local(p).copy_(_local(self.average[name]))
            yield
        finally:
            for name, p in self.parameters.items():
                _local(p).copy_(kept[name])


def tensors(network: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run, whole and on the CPU. Every process must call it, since sharded ones are gathered."""
    names = {p: name for name, p in network.named_parameters()}
    weights = network.state_dict()
    average = {**weights, **ema.average}  # with the buffers
    state = {
        **{f"model.{name}": tensor for name, tensor in weights.items()},
        **{f"ema.{name}": tensor for name, tensor in average.items()},
        **{
            f"optimizer.{names[p]}.{moment}": tensor
            for p, moments in optimizer.state.items()
            for moment, tensor in moments.items()
        },
    }
    return {name: whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in state.items()}


@torch.no_grad()
def restore(state: dict[str, Tensor], network: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `tensors`. Every process reads the whole file and keeps its shards."""
    for name, tensor in network.state_dict().items():
        _local(tensor).copy_(_local(_like(state[f"model.{name}"], tensor)))
    for name, tensor in ema.average.items():
        _local(tensor).copy_(_local(_like(state[f"ema.{name}"], tensor)))
    parameters = dict(network.named_parameters())
    for key, tensor in state.items():
        if key.startswith("optimizer."):
            name, moment = key.removeprefix("optimizer.").rsplit(".", 1)
            p = parameters[name]
            whole_step = moment == "step"  # not sharded; a fused optimizer wants it on the device, too
            optimizer.state[p][moment] = tensor.to(p.device, copy=True) if whole_step else _like(tensor, p)


def save(folder: Path, step: int, state: dict[str, Tensor], header: dict, keep: int) -> Path:
    """Write ``checkpoint-<step>.safetensors``, whole or not at all, and remove all but the ``keep`` newest.

    header: what else belongs to the run; ``model`` is the name of its class, the other values are those of JSON.
    """
    header = {key: value if key == "model" else pretrained.to_json(key, value) for key, value in header.items()}
    path = folder / f"checkpoint-{step:08}.safetensors"
    pretrained.write(path, state, {"format": pretrained.TRAINING_FORMAT, **header, "step": str(step)})
    for old in steps(folder)[:-keep]:
        (folder / f"checkpoint-{old:08}.safetensors").unlink(missing_ok=True)
    return path


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the header of a training checkpoint. ValueError for another file, or one cut short."""
    header = pretrained.read_header(path)
    if header.get("format") != pretrained.TRAINING_FORMAT:
        raise ValueError(f"path {path} has format {header.get('format')!r}; a training checkpoint is needed")
    plain = ("format", "model")
    values = {key: value if key in plain else pretrained.from_json(path, header, key) for key, value in header.items()}
    return pretrained.read_tensors(path), values


def steps(folder: Path) -> list[int]:
    """The steps of which a checkpoint lies in the folder, oldest first."""
    return sorted(int(found[1]) for path in folder.iterdir() if (found := NAME.fullmatch(path.name)))


def latest(folder: Path) -> Path | None:
    found = steps(folder) if folder.is_dir() else []
    return folder / f"checkpoint-{found[-1]:08}.safetensors" if found else None


# A DTensor is known by its methods: torch.distributed.tensor takes longer to import than all of this package.


def whole(tensor: Tensor) -> Tensor:
    """All of it, where it may be sharded: every process must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` on the device of ``other``, and sharded as it is."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements)

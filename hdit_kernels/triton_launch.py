"""How the Triton pages launch a kernel: on the tensors' own device and current stream, or noted down instead of run.

Noting down (`recorded`) is what the ahead-of-time check does: it walks the launchers with tensors on the meta device
and compiles exactly what they would have launched on a GPU that is not there.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Triton looks at this when a kernel is decorated, that is when its page is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LONGEST = 2**31 - 1  # programs along the first axis of a grid; the only axis used, for the others end at 65 535


class Target(NamedTuple):
    """What a kernel is compiled for: ("cuda", "90"), ("hip", "gfx942"), or ("interpreter", "")."""

    backend: str
    arch: str
    processors: int  # that run programs at the same time: streaming multiprocessors, compute units


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it."""

    kernel: Any
    programs: int
    arguments: tuple  # tensors, numbers, None: the run-time arguments, in order
    constants: dict[str, Any]  # the constexpr arguments
    options: dict[str, int]  # num_warps, num_stages, …
    trips: tuple[float, ...]  # how often the loops of one program run, in program order, outer before inner
    moved: int  # bytes that must come from and go to memory, each once


@dataclass
class Record:
    target: Target
    launches: list[Launch] = field(default_factory=list)


_record: Record | None = None


@contextlib.contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Inside the block nothing runs: launches for `target` are appended to the list that this yields."""
    global _record
    before, _record = _record, Record(target)
    try:
        yield _record.launches
    finally:
        _record = before


_targets: dict[int, Target] = {}


def target(x: Tensor) -> Target:
    """What kernels on x's device are compiled for."""
    if _record is not None:
        return _record.target
    if INTERPRETED:
        return Target("interpreter", "", 1)
    index = x.device.index
    if index not in _targets:
        properties = torch.cuda.get_device_properties(index)
        processors = properties.multi_processor_count
        if torch.version.hip:
            _targets[index] = Target("hip", properties.gcnArchName.split(":")[0], processors)
        else:
            _targets[index] = Target("cuda", f"{properties.major}{properties.minor}", processors)
    return _targets[index]


def launch(
    kernel,
    programs: int,
    *arguments,
    num_warps: int = 4,
    num_stages: int = 1,
    trips: tuple[float, ...] = (),
    moved: int = 0,
    **constants,
) -> None:
    """Runs `programs` programs of a kernel, on the device of the first of its arguments that is a tensor.

    trips, moved: what `Launch` says; only the check's prediction of time uses them.
    """
    if programs == 0:
        return
    if programs > LONGEST:
        raise ValueError(f"{kernel.__name__} needs {programs} programs and a GPU starts at most {LONGEST} at once")
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if _record is not None:
        _record.launches.append(Launch(kernel, programs, arguments, constants, options, trips, moved))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options)
    else:
        kernel[(programs,)](*arguments, **constants, **options)


def wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether an element of one of them lies 2³¹ elements or more from its first: then offsets need 64 bits."""
    reach = lambda t: sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))  # noqa: E731
    return any(t is not None and t.numel() > 0 and reach(t) >= 2**31 for t in tensors)

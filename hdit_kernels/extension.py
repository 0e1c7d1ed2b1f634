"""The compiled extension `hdit_kernels._C`: whether it loads, and how the pages of the ops call it."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

try:
    module, missing = importlib.import_module("hdit_kernels._C"), None
except ModuleNotFoundError:
    module, missing = None, "the compiled extension hdit_kernels._C is not built; `pip install .` builds it"
except ImportError as error:  # built, but for another Python or C++ runtime: say so and go on with the reference
    module, missing = None, f"the compiled extension hdit_kernels._C does not load: {error}"
    warnings.warn(f"hdit_kernels: {missing}; the PyTorch reference serves instead", stacklevel=2)

# The CUDA kernels executed on a CPU (csrc/emulation.h), where a test has loaded them: "cuda" then takes CPU tensors.
emulated = None

_functions: dict[tuple[str, str], Callable] = {}
_dtypes = {getattr(torch, name): code for name, code in module.dtypes.items()} if module else {}


def load_emulated(folder: Path) -> None:
    """Sets `emulated` to the module that `make emulated` leaves in `folder`: for tests, slow, but checked."""
    global emulated
    found = sorted(folder.glob("_emulated*.so"))
    if not found:
        raise ImportError(f"{folder} has no module _emulated, which runs the CUDA kernels on a CPU: `make emulated`")
    spec = importlib.util.spec_from_file_location("_emulated", found[0])
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)


def dtype(x: Tensor) -> int:
    return _dtypes[x.dtype]


def run(backend: str, name: str, arguments: Sequence, tensors: Sequence[Tensor | None]) -> None:
    """Runs `_C.cpu.<name>` or enqueues `_C.cuda.<name>`. tensors: all that the kernel reads and writes; they live until
    then, and the first one says on which device. What a CUDA kernel wants as workspace `<name>_workspace` tells."""
    if backend == "cpu":
        return function(backend, name)(*arguments, torch.get_num_threads())
    x = tensors[0]
    is_emulated = emulated is not None and x.device.type == "cpu"
    kernels = emulated if is_emulated else module.cuda
    measure = getattr(kernels, f"{name}_workspace", None)
    if measure is not None:
        workspace = torch.empty(measure(*arguments), dtype=torch.uint8, device=x.device)
        tensors, arguments = (*tensors, workspace), (*arguments, workspace.data_ptr())
    if is_emulated:
        emulated.allow([(t.data_ptr(), extent(t)) for t in tensors if t is not None])
    getattr(kernels, name)(*arguments, *((0, 0) if is_emulated else place(x)))


def function(backend: str, name: str) -> Callable:
    key = backend, name
    if key not in _functions:
        _functions[key] = getattr(getattr(module, backend), name)
    return _functions[key]


def place(x: Tensor) -> tuple[int, int]:
    """Device and stream: the last arguments of every CUDA kernel."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def wide(x: Tensor) -> torch.dtype:
    """What the kernels compute in, and take small inputs and sums in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x contiguous and of that dtype. (A `.to` that has nothing to do costs a microsecond.)"""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


LARGE = 4 << 20  # bytes, from where on an allocator maps memory anew (NumPy advises from here on too)


def advise_large(tensors: tuple[Tensor, ...]) -> None:
    """Asks for large pages under tensors in main memory that are about to be written for the first time."""
    for x in tensors:
        if x.device.type == "cpu" and x.nbytes >= LARGE and module is not None:
            module.cpu.advise_large(x.data_ptr(), x.nbytes)


def declines_float64(backend: str, x: Tensor) -> str | None:
    return "it computes in float32, and float64 was given" if backend != "cpu" and x.dtype is torch.float64 else None

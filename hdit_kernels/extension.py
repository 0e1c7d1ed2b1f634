"""The compiled extension `hdit_kernels._C`: whether it loads, and how the pages of the ops call it."""

import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

try:
    module, missing = importlib.import_module("hdit_kernels._C"), None
except ModuleNotFoundError:
    module, missing = None, "the compiled extension hdit_kernels._C is not built; `pip install .` builds it"
except ImportError as error:  # built, but for another Python or C++ runtime: say so and go on with the reference
    module, missing = None, f"the compiled extension hdit_kernels._C does not load: {error}"
    warnings.warn(f"hdit_kernels: {missing}; the PyTorch reference serves instead", stacklevel=2)

_functions: dict[tuple[str, str], Callable] = {}
_dtypes = {getattr(torch, name): code for name, code in module.dtypes.items()} if module else {}


def function(backend: str, name: str) -> Callable:
    """`_C.cpu.<name>` or `_C.cuda.<name>`."""
    key = backend, name
    if key not in _functions:
        _functions[key] = getattr(getattr(module, backend), name)
    return _functions[key]


def dtype(x: Tensor) -> int:
    return _dtypes[x.dtype]


def place(backend: str, x: Tensor) -> tuple[int, ...]:
    """The last arguments of every compiled kernel: threads, or device and stream."""
    if backend == "cpu":
        return (torch.get_num_threads(),)
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


LARGE = 4 << 20  # bytes, from where on an allocator maps memory anew (NumPy advises from here on too)


def advise_large(tensors: tuple[Tensor, ...]) -> None:
    """Asks for large pages under tensors in main memory that are about to be written for the first time."""
    for x in tensors:
        if x.device.type == "cpu" and x.nbytes >= LARGE and module is not None:
            module.cpu.advise_large(x.data_ptr(), x.nbytes)


def declines_float64(backend: str, x: Tensor) -> str | None:
    return "it computes in float32, and float64 was given" if backend != "cpu" and x.dtype is torch.float64 else None

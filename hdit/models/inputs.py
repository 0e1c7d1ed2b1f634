"""What a call of a model must look like."""

import torch
from torch import Tensor


def check_inputs(config, x, sigma, aug_cond, class_cond, mapping_cond) -> None:
    """Refuse what a model of this configuration cannot take, in one sentence, before any work.

    config: in_channels, side_multiple, num_classes and mapping_cond_dim are read. The values of class_cond are looked
    at on the CPU only: elsewhere that would wait for the device.
    """
    channels = config.in_channels
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"x is {_describe(x)}; it must be floating point of shape (B, {channels}, H, W)")
    batch, _, height, width = x.shape
    rows, columns = config.side_multiple
    if height == 0 or width == 0 or height % rows or width % columns:
        needs = f"a height divisible by {rows} and a width divisible by {columns}"
        raise ValueError(f"x is {height} x {width} pixels; this model needs {needs}")
    _check_tensor("sigma", sigma, (batch,))
    if aug_cond is not None:
        _check_tensor("aug_cond", aug_cond, (batch, 9))
    for name, value, size in (
        ("class_cond", class_cond, config.num_classes),
        ("mapping_cond", mapping_cond, config.mapping_cond_dim),
    ):
        if (value is None) != (size == 0):
            field = "num_classes" if name == "class_cond" else "mapping_cond_dim"
            given = "missing" if value is None else "given"
            raise ValueError(f"{name} is {given}; this model has {field} = {size}")
    if mapping_cond is not None:
        _check_tensor("mapping_cond", mapping_cond, (batch, config.mapping_cond_dim))
    if class_cond is not None:
        _check_tensor("class_cond", class_cond, (batch,), integers=True)
        _check_classes(class_cond, config.num_classes)


def _describe(value) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], integers: bool = False) -> None:
    kind = "int64 or int32" if integers else "floating point"
    fits = isinstance(value, Tensor) and value.shape == shape
    if not fits or not (value.dtype in (torch.int64, torch.int32) if integers else value.is_floating_point()):
        raise ValueError(f"{name} is {_describe(value)}; it must be {kind} of shape {tuple(shape)}")


def _check_classes(class_cond: Tensor, num_classes: int) -> None:
    if torch.compiler.is_compiling() or class_cond.device.type != "cpu" or class_cond.numel() == 0:
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:  # vmap has no one value to look at
        return
    low, high = class_cond.min().item(), class_cond.max().item()
    if low < 0 or high > num_classes:
        accepted = f"0 … {num_classes - 1}, or {num_classes} for no class"
        raise ValueError(f"class_cond has values from {low} to {high}; this model takes {accepted}")

"""The LeGall 5/3 wavelet (of JPEG 2000) on channels-last images: exactly invertible down- and up-sampling.

One level along an axis of even length turns samples x into n/2 details and n/2 means by lifting (Daubechies & Sweldens
1998), with x mirrored at the borders:
    detail[i] = x[2i + 1] − (x[2i] + x[2i + 2]) / 2
    mean[i]   = x[2i] + (detail[i − 1] + detail[i]) / 4
"""

import torch
from torch import Tensor


def analyse(x: Tensor, levels: int = 1) -> Tensor:
    """(B, H, W, C) → (B, H/2^levels, W/2^levels, 4^levels · C). H and W divide by 2^levels.

    The first C channels are the means of both axes, from level to level decomposed again; finer details are brought to
    the coarsest grid by space-to-depth. levels = 0 changes nothing.
    """
    if levels == 0:
        return x
    channels = x.shape[-1]
    for axis in (1, 2):
        x = torch.cat(_split(x, axis), dim=-1)
    means, details = x.tensor_split((channels,), dim=-1)
    fold = 2 ** (levels - 1)
    return torch.cat((analyse(means, levels - 1), space_to_depth(details, fold)), dim=-1)


def synthesise(y: Tensor, levels: int = 1) -> Tensor:
    """The inverse of analyse: (B, H, W, 4^levels · C) → (B, 2^levels · H, 2^levels · W, C)."""
    if levels == 0:
        return y
    means, details = y.tensor_split((y.shape[-1] // 4,), dim=-1)
    x = torch.cat((synthesise(means, levels - 1), depth_to_space(details, 2 ** (levels - 1))), dim=-1)
    for axis in (2, 1):
        x = _join(*x.chunk(2, dim=-1), axis)
    return x


def space_to_depth(x: Tensor, n: int) -> Tensor:
    """(B, H, W, C) → (B, H/n, W/n, n²·C): the pixels of a patch, row by row."""
    b, h, w, c = x.shape
    return x.reshape(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // n, w // n, n * n * c)


def depth_to_space(x: Tensor, n: int) -> Tensor:
    """The inverse of space_to_depth: (B, H, W, n²·C) → (B, n·H, n·W, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, n, n, c // (n * n)).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * n, w * n, c // (n * n))


def _split(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(means, details) along an axis, each half as long."""
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    detail = odd - _with_next(even, axis) / 2
    return even + _with_previous(detail, axis) / 4, detail


def _join(mean: Tensor, detail: Tensor, axis: int) -> Tensor:
    even = mean - _with_previous(detail, axis) / 4
    odd = detail + _with_next(even, axis) / 2
    return torch.stack((even, odd), dim=axis + 1).flatten(axis, axis + 1)


def _with_next(x: Tensor, axis: int) -> Tensor:
    """x[i] + x[i + 1]; the last, mirrored, meets itself."""
    return x + torch.cat((x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, x.shape[axis] - 1, 1)), axis)


def _with_previous(x: Tensor, axis: int) -> Tensor:
    """x[i − 1] + x[i]; the first, mirrored, meets itself."""
    return x + torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, x.shape[axis] - 1)), axis)

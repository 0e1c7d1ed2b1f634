"""Cosine normalisation and axial RoPE in Triton."""

import torch
from torch import Tensor


def turns(height_angles: Tensor, width_angles: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles of the rows, then of the columns: each (H + W, heads, r), float32, contiguous.

    They are taken in the angles' own dtype and rounded after, so that float64 angles of many turns keep their digits.
    """
    angles = torch.cat([height_angles, width_angles])
    return angles.cos().float(), angles.sin().float()

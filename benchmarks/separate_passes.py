"""HDiT as eager PyTorch without our ops: each normalisation, rotation, gate and permutation is a pass of its own.

This is the chain of k-diffusion's model with its compiled helpers off, and NATTEN, which does not train on a CPU,
replaced by the fastest neighborhood attention that eager PyTorch has there: k² shifted products.
"""

import contextlib

import torch
import torch.nn.functional as F
from peers import ShiftedProducts

from hdit.models import layers


def ada_rms_norm(x, scale, eps=1e-6):
    wide = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    if scale.ndim == 2:
        scale = scale.reshape(len(scale), *[1] * (x.ndim - 2), -1)
    mean = x.to(wide).square().mean(dim=-1, keepdim=True)
    return x * (scale.to(wide) * torch.rsqrt(mean + eps)).to(x.dtype)


def linear_geglu(x, weight):
    value, gate = F.linear(x, weight).chunk(2, dim=-1)
    return value * F.gelu(gate)


def cosine_rope(q, k, cosine_scale, rope):
    """The scale is applied to q alone; upstream takes its root on both sides, which costs one more product."""
    return turned(unit(q) * cosine_scale[:, None].to(q.dtype), rope), turned(unit(k), rope)


def unit(x):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def turned(x, rope):
    rows, columns = rope
    angles = torch.cat(
        (rows[:, None].expand(-1, len(columns), -1, -1), columns[None].expand(len(rows), -1, -1, -1)), dim=-1
    )
    n = angles.shape[-1]
    first, second, rest = x.split((n, n, x.shape[-1] - 2 * n), dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def neighborhood_attention_qkvpacked(qkv, kernel_size, *, cosine_scale, rope):
    q, k, v = qkv.unbind(3)
    q, k = cosine_rope(q, k, cosine_scale, rope)
    q, k, v = (t.permute(0, 3, 1, 2, 4).contiguous() for t in (q, k, v))
    bound = cosine_scale.detach().abs().to(q.dtype)[:, None, None, None]
    out = ShiftedProducts.apply(q, k, v, bound, kernel_size)
    return out.permute(0, 2, 3, 1, 4).to(qkv.dtype)


OPS = {f.__name__: f for f in (ada_rms_norm, linear_geglu, cosine_rope, neighborhood_attention_qkvpacked)}


@contextlib.contextmanager
def in_models():
    """Inside, the models of `hdit` call these instead of our ops."""
    kept = {name: getattr(layers, name) for name in OPS}
    try:
        for name, function in OPS.items():
            setattr(layers, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(layers, name, function)

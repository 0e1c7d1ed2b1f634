"""Cosine-similarity normalisation and axial RoPE of queries and keys: what HDiT does before every attention.

Neighborhood attention does this inside its kernel; global attention calls `cosine_rope` and then any softmax attention.
Sources: cosine similarity with a learned per-head scale, arXiv 2401.11605 section 3.2 (after arXiv 2010.04245); axial
rotary positions, section 3.3 (after arXiv 2104.09864).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hdit_kernels import extension, op

EPS = 1e-6


class AxialRope(NamedTuple):
    """Rotation angles in radians, separate for rows and columns: r for each axis, so a head's first 4r features turn.

    Feature i turns with feature i + 2r by `concat(height_angles[y, h], width_angles[x, h])[i]`; the rest stay.
    """

    height_angles: Tensor  # (H, heads, r), float32 or float64 (float64 with float64 q)
    width_angles: Tensor  # (W, heads, r)


def cosine_rope(
    q: Tensor, k: Tensor, cosine_scale: Tensor, rope: AxialRope, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """q', k' such that q'·k' = cosine_scale[h] · cos(q, k) with both rotated by their positions.

    Args:
        q, k: (B, H, W, heads, dim), of one dtype: float32, bfloat16, float16 or float64; any strides (copied only if
            the last axis is not contiguous).
        cosine_scale: (heads,), any floating dtype, any sign; multiplies q alone.
        rope: angles as in `AxialRope`; constants, no gradient flows to them.
        backend: None for the best one present, or "cpu", "cuda", "triton", "reference" for exactly that.

    Returns:
        q' = cosine_scale[h] · R(q·rsqrt(Σq² + 1e-6)) and k' = R(k·rsqrt(Σk² + 1e-6)), like q and k, contiguous.
    """
    check(q, k, cosine_scale, rope)
    return COSINE_ROPE((q, k, cosine_scale, *rope), (), backend)


def reference(q, k, cosine_scale, height_angles, width_angles):
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled, unit = prepare(q.to(wide), k.to(wide), cosine_scale.to(wide), height_angles, width_angles)
    return scaled.to(q.dtype), unit.to(k.dtype)


def prepare(q, k, cosine_scale, height_angles, width_angles):
    """q', k' in the dtype of q and k. Each part is left out where its argument is None."""
    if cosine_scale is not None:
        q, k = normalise(q) * cosine_scale[:, None], normalise(k)
    if height_angles is not None:
        q, k = rotate(q, height_angles, width_angles), rotate(k, height_angles, width_angles)
    return q, k


def normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def rotate(x: Tensor, height_angles: Tensor, width_angles: Tensor) -> Tensor:
    rows, columns = x.shape[1], x.shape[2]
    angles = torch.cat(
        [
            height_angles[:, None].expand(rows, columns, *height_angles.shape[1:]),
            width_angles[None].expand(rows, columns, *width_angles.shape[1:]),
        ],
        dim=-1,
    )
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = angles.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def check(q, k, cosine_scale, rope) -> None:
    if not isinstance(cosine_scale, Tensor) or rope is None:
        missing = "rope" if isinstance(cosine_scale, Tensor) else "cosine_scale"
        raise TypeError(f"{missing} must be given: cosine_scale a (heads,) tensor, rope an AxialRope; got None")
    check_tokens("q", q)
    check_tokens("k", k, like=q)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}; got {tuple(k.shape)}")
    check_cosine_scale(cosine_scale, q)
    check_rope(rope, q)


def check_tokens(name: str, x, like: Tensor | None = None) -> None:
    """One of q, k, v: (B, H, W, heads, dim), of q's dtype and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, H, W, heads, dim); got {type(x).__name__}")
    if x.dtype not in op.DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")
    if x.ndim != 5:
        raise ValueError(f"{name} must have 5 axes (B, H, W, heads, dim); got shape {tuple(x.shape)}")
    if x.shape[4] == 0:
        raise ValueError(f"{name} must have dim ≥ 1 as its last axis; got shape {tuple(x.shape)}")
    if like is not None and x.dtype is not like.dtype:
        raise TypeError(f"{name} must have q's dtype {like.dtype} (only autocast mixes them); got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on q's device {like.device}; got {x.device}")


def check_cosine_scale(cosine_scale, q: Tensor) -> None:
    if not isinstance(cosine_scale, Tensor) or not cosine_scale.is_floating_point():
        got = cosine_scale.dtype if isinstance(cosine_scale, Tensor) else type(cosine_scale).__name__
        raise TypeError(f"cosine_scale must be a floating-point tensor of shape (heads,) = ({q.shape[3]},); got {got}")
    if cosine_scale.ndim != 1 or cosine_scale.shape[0] != q.shape[3]:
        raise ValueError(f"cosine_scale must be (heads,) = ({q.shape[3]},); got shape {tuple(cosine_scale.shape)}")
    if cosine_scale.device != q.device:
        raise ValueError(f"cosine_scale must be on q's device {q.device}; got {cosine_scale.device}")


def check_rope(rope, q: Tensor) -> None:
    if not isinstance(rope, tuple) or len(rope) != 2 or not all(isinstance(a, Tensor) for a in rope):
        raise TypeError(f"rope must be an AxialRope(height_angles, width_angles) of tensors; got {type(rope).__name__}")
    _, height, width, heads, dim = q.shape
    for name, angles, length in ("height_angles", rope[0], height), ("width_angles", rope[1], width):
        expected = (length, heads, rope[0].shape[-1] if rope[0].ndim else "r")
        if angles.shape != expected:
            text = "({}, {}, {})".format(*expected)
            raise ValueError(f"rope.{name} must be (length, heads, r) = {text}; got {tuple(angles.shape)}")
        if angles.dtype not in (torch.float32, torch.float64) or (
            q.dtype is torch.float64 and angles.dtype is not torch.float64
        ):
            accepted = "float64 with float64 q" if q.dtype is torch.float64 else "float32 or float64"
            raise TypeError(f"rope.{name} must be {accepted}, since angles lose whole turns below; got {angles.dtype}")
        if angles.requires_grad:
            raise ValueError(f"rope.{name} must not require grad (angles are constants); got requires_grad=True")
        if angles.device != q.device:
            raise ValueError(f"rope.{name} must be on q's device {q.device}; got {angles.device}")
    if 4 * rope[0].shape[-1] > dim:
        raise ValueError(f"rope must have at most dim/4 = {dim // 4} angles an axis; got r = {rope[0].shape[-1]}")


def allocate(q, k, cosine_scale, height_angles, width_angles):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))


def dense(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last axis, which the kernels read in place; what lies otherwise is copied."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def placed(x: Tensor | None) -> list[int]:
    """Address and strides of (B, H, W, heads, dim), or of (B, S, heads, dim), whose tokens lie along W."""
    if x is None:
        return [0] * 5
    batch, *grid, tokens, heads, _ = x.stride()
    return [x.data_ptr(), batch, grid[0] if grid else 0, tokens, heads]


def native_arguments(q, k, cosine_scale, height_angles, width_angles):
    """(what the compiled forward and backward passes begin with, the tensors that must live until they have run)"""
    q, k = dense(q), dense(k)
    scale = extension.packed(cosine_scale, extension.wide(q))
    dtype = torch.promote_types(height_angles.dtype, width_angles.dtype)
    angles = [extension.packed(t, dtype) for t in (height_angles, width_angles)]
    pointers = [t.data_ptr() for t in (scale, *angles)]
    sizes = [*q.shape, height_angles.shape[-1]]
    packed = placed(q), placed(k), pointers, sizes, extension.dtype(angles[0]), extension.dtype(q)
    return packed, (q, k, scale, *angles)


def forward(backend: str, inputs, outputs, params) -> None:
    if backend == "triton":
        from hdit_kernels import cosine_rope_triton

        return cosine_rope_triton.forward(inputs, outputs, params)
    arguments, tensors = native_arguments(*inputs)
    arguments = *arguments, *(t.data_ptr() for t in outputs)
    extension.run(backend, "cosine_rope_forward", arguments, (*tensors, *outputs))


def backward(backend: str, grad_outputs, inputs, saved, grads, params) -> None:
    dq_prepared, dk_prepared = grad_outputs
    dq, dk, dscale = grads
    for given, wanted in (dq_prepared, (dq, dscale)), (dk_prepared, (dk,)):
        if given is None:  # this output was not used
            for gradient in wanted:
                if gradient is not None:
                    gradient.zero_()
    if dq_prepared is None:
        dq = dscale = None
    if dk_prepared is None:
        dk = None
    if backend == "triton":
        from hdit_kernels import cosine_rope_triton

        return cosine_rope_triton.backward(grad_outputs, inputs, saved, (dq, dk, dscale), params)
    arguments, tensors = native_arguments(*inputs)
    dq_prepared, dk_prepared = (dense(g) for g in grad_outputs)
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    target = dscale if dscale is None or dscale.dtype is wide else torch.empty_like(dscale, dtype=wide)
    addresses = [0 if g is None else g.data_ptr() for g in (dq, dk, target)]
    arguments = *arguments, placed(dq_prepared), placed(dk_prepared), *addresses
    tensors = *tensors, dq_prepared, dk_prepared, dq, dk, target
    extension.run(backend, "cosine_rope_backward", arguments, tensors)
    if target is not dscale:
        dscale.copy_(target)


COSINE_ROPE = op.Op(
    name="cosine_rope",
    inputs=("q", "k", "cosine_scale", "height_angles", "width_angles"),
    params={},
    outputs=("q_prepared", "k_prepared"),
    gradients=("q", "k", "cosine_scale"),
    batched=("q", "k"),
    reference=reference,
    allocate=allocate,
    macs=lambda *arguments: (0, 0),  # no matrix product
    kernels=("cpu", "triton", "cuda"),
    forward=forward,
    backward=backward,
    declines=lambda backend, q, *others: extension.declines_float64(backend, q),
)

"""Adaptive RMSNorm: HDiT's only normalisation (arXiv 2401.11605, section 3.4), scaled by the conditioning."""

import math
from numbers import Real

import torch
from torch import Tensor

from hdit_kernels import extension, op


def ada_rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """`x · rsqrt(mean(x², last axis) + eps) · scale`, the mean and the product in float32 (float64 for float64 x).

    Args:
        x: (B, …, C), float32, bfloat16, float16 or float64; any strides.
        scale: (B, C), one for each batch item, or (C,); any of these dtypes (AdaRMSNorm passes 1 + W·cond).
        eps: ≥ 0.
        backend: None for the best one present, or "cpu", "cuda", "triton", "reference" for exactly that.

    Returns:
        Like x, contiguous. Gradients flow to x and scale; x and scale alone are kept for them.
    """
    check(x, scale, eps)
    return ADA_RMS_NORM((x, scale), (float(eps),), backend)


def reference(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, scale = x.to(dtype), scale.to(dtype)
    if scale.ndim == 2:
        scale = scale.reshape(scale.shape[0], *[1] * (x.ndim - 2), scale.shape[1])
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def check(x, scale, eps) -> None:
    for name, tensor in ("x", x), ("scale", scale):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in op.DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}")
    shape, scales = x.shape, scale.shape
    if x.ndim == 0 or shape[-1] == 0:
        raise ValueError(f"x must be (B, …, C) with C ≥ 1; got shape {tuple(shape)}")
    per_item = scale.ndim == 2 and x.ndim >= 2 and scales[0] == shape[0] and scales[1] == shape[-1]
    if not per_item and not (scale.ndim == 1 and scales[0] == shape[-1]):
        accepted = f"({shape[0]}, {shape[-1]}) or ({shape[-1]},)" if x.ndim > 1 else f"({shape[-1]},)"
        raise ValueError(f"scale must be {accepted} for x of shape {tuple(shape)}; got {tuple(scales)}")
    if scale.device != x.device:
        raise ValueError(f"scale must be on x's device {x.device}; got {scale.device}")
    number = type(eps) is float or (isinstance(eps, Real) and not isinstance(eps, bool))
    if not number or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number ≥ 0; got {eps!r}")


def allocate(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor]:
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def tokens(x: Tensor, scale: Tensor) -> Tensor:
    """x as (batch, tokens, C) with a contiguous last axis: a view if its strides allow one. Without a batch axis in
    scale, all leading axes are tokens."""
    if x.ndim != 3 or scale.ndim == 1 or not x.numel():
        x = x.reshape(x.shape[0] if scale.ndim == 2 and x.numel() else 1, -1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def wide(scale: Tensor, x: Tensor) -> Tensor:
    """scale in the dtype the kernels compute in."""
    return extension.packed(scale, extension.wide(x))


def forward(backend: str, inputs, outputs, params) -> None:
    if backend == "triton":
        from hdit_kernels import ada_rms_norm_triton

        return ada_rms_norm_triton.forward(inputs, outputs, params)
    x, scale = tokens(*inputs), wide(inputs[1], inputs[0])
    pointers = x.data_ptr(), scale.data_ptr(), outputs[0].data_ptr()
    strides = *x.stride()[:2], scale.stride(0) if scale.ndim == 2 else 0
    arguments = *pointers, *x.shape, *strides, *params, extension.dtype(x)
    extension.run(backend, "ada_rms_norm_forward", arguments, (x, scale, outputs[0]))


def backward(backend: str, grad_outputs, inputs, saved, grads, params) -> None:
    dx, dscale = grads
    if not inputs[0].numel():  # no rows to sum over, but the scale's gradient is still defined
        if dscale is not None:
            dscale.zero_()
        return
    if backend == "triton":
        from hdit_kernels import ada_rms_norm_triton

        return ada_rms_norm_triton.backward(grad_outputs, inputs, saved, grads, params)
    x, dy, scale = tokens(*inputs), tokens(grad_outputs[0], inputs[1]), wide(inputs[1], inputs[0])
    target = dscale if dscale is None or dscale.dtype is scale.dtype else torch.empty_like(scale)
    tensors = x, scale, dy, dx, target
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    strides = *x.stride()[:2], *dy.stride()[:2], scale.stride(0) if scale.ndim == 2 else 0
    arguments = *pointers, *x.shape, *strides, *params, extension.dtype(x)
    extension.run(backend, "ada_rms_norm_backward", arguments, tensors)
    if target is not dscale:
        dscale.copy_(target)


ADA_RMS_NORM = op.Op(
    name="ada_rms_norm",
    inputs=("x", "scale"),
    params={"eps": "float"},
    outputs=("y",),
    gradients=("x", "scale"),
    batched=("x", "scale"),
    reference=reference,
    allocate=allocate,
    macs=lambda x, scale, eps: (0, 0),  # no matrix product
    kernels=("cpu", "triton", "cuda"),
    forward=forward,
    backward=backward,
    declines=lambda backend, x, scale, eps: extension.declines_float64(backend, x),
)

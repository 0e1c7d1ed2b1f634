"""GEGLU: value · gelu(gate), the gated activation of HDiT's feed-forward blocks (arXiv 2002.05202, eq. 6, no biases).

`geglu` is the activation; `linear_geglu` the projection and the activation together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hdit_kernels import extension, op


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """`value · gelu(gate)` with `value, gate = x.chunk(2, -1)` and the exact (erf) gelu.

    Args:
        x: (…, 2n), float32, bfloat16, float16 or float64; any strides (copied only if its rows do not lie evenly).
        backend: None for the best one present, or "cpu", "cuda", "triton", "reference" for exactly that.

    Returns:
        (…, n) in x's dtype, contiguous. Only x is kept for the backward pass.

    Raises:
        TypeError: x is no tensor of these dtypes. ValueError: its last axis is odd or missing.
    """
    check(x)
    return GEGLU((x,), (), backend)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`geglu(x @ weight.T + bias)`: x (…, d), weight (2n, d), bias (2n,) → (…, n). The first n rows make the value.

    Autocast casts x, weight and bias as it does for `torch.nn.functional.linear`. On Triton, where nothing has to be
    differentiated, one kernel does both and the (…, 2n) tensor between them is never made.
    """
    for name, tensor in (("x", x), ("weight", weight)) + ((("bias", bias),) if bias is not None else ()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if x.dtype not in op.DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64; got {x.dtype}")
    if weight.ndim != 2 or weight.shape[0] % 2 or not len(weight) or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be (2n, {x.shape[-1] if x.ndim else 'd'}); got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},); got {tuple(bias.shape)}")
    others = {weight.dtype, *(() if bias is None else (bias.dtype,))} - {x.dtype}
    lowered = op.autocast_dtype(x.device.type)
    if others and lowered is None:
        raise TypeError(f"weight and bias must have x's dtype {x.dtype}; got {others.pop()}")
    inputs = x, weight, bias
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not differentiated and not op._transforms():
        if lowered is not None:
            inputs = tuple(t if t is None or t.dtype is torch.float64 else t.to(lowered) for t in inputs)
        alike = len({t.dtype for t in inputs if t is not None}) == 1
        if alike and GEGLU.choose(x.device.type, backend, inputs[:1]) == "triton":
            return LINEAR_GEGLU(inputs, (), "triton")
    return geglu(F.linear(x, weight, bias), backend=backend)


def reference(x: Tensor) -> Tensor:
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (value * F.gelu(gate)).to(x.dtype)


def check(x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.dtype not in op.DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64; got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last axis of even, positive size; got shape {tuple(x.shape)}")


def allocate(x: Tensor) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),)


def rows(x: Tensor) -> Tensor:
    """x as (rows, n) with a contiguous last axis: a view if its strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(backend: str, inputs, outputs, params) -> None:
    if backend == "triton":
        from hdit_kernels import geglu_triton

        return geglu_triton.forward(inputs, outputs, params)
    x, y = rows(inputs[0]), outputs[0]
    arguments = x.data_ptr(), y.data_ptr(), x.shape[0], y.shape[-1], x.stride(0), extension.dtype(x)
    extension.run(backend, "geglu_forward", arguments, (x, y))


def backward(backend: str, grad_outputs, inputs, saved, grads, params) -> None:
    if backend == "triton":
        from hdit_kernels import geglu_triton

        return geglu_triton.backward(grad_outputs, inputs, saved, grads, params)
    x, dy, dx = rows(inputs[0]), rows(grad_outputs[0]), grads[0]
    pointers = x.data_ptr(), dy.data_ptr(), dx.data_ptr()
    arguments = *pointers, x.shape[0], dy.shape[-1], x.stride(0), dy.stride(0), extension.dtype(x)
    extension.run(backend, "geglu_backward", arguments, (x, dy, dx))


GEGLU = op.Op(
    name="geglu",
    inputs=("x",),
    params={},
    outputs=("y",),
    gradients=("x",),
    batched=("x",),
    reference=reference,
    allocate=allocate,
    macs=lambda x: (0, 0),  # elementwise: no matrix product, and FLOP counts are of matrix products
    kernels=("cpu", "triton", "cuda"),
    forward=forward,
    backward=backward,
    declines=lambda backend, x: extension.declines_float64(backend, x),
)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference(F.linear(x, weight, bias))


def linear_allocate(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),)


def linear_forward(backend: str, inputs, outputs, params) -> None:
    from hdit_kernels import geglu_triton

    geglu_triton.linear_forward(inputs, outputs, params)


def linear_macs(x, weight, bias) -> tuple[int, int]:
    products = math.prod(x) * weight[0]
    return products, 2 * products


# Where a gradient is needed, the projection is kept for it, and `linear_geglu` is F.linear and then GEGLU.
LINEAR_GEGLU = op.Op(
    name="linear_geglu",
    inputs=("x", "weight", "bias?"),
    params={},
    outputs=("y",),
    gradients=("x", "weight", "bias"),
    batched=("x",),
    reference=linear_reference,
    allocate=linear_allocate,
    macs=linear_macs,
    kernels=("triton",),
    forward=linear_forward,
    backward=lambda backend, dys, inputs, saved, grads, params: LINEAR_GEGLU._vjp(dys, inputs, grads, params),
    declines=lambda backend, x, weight, bias: extension.declines_float64(backend, x),
)

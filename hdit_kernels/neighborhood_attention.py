"""2-D neighborhood attention: every query attends to the k×k window of tokens around it (arXiv 2204.07143), with the
cosine-similarity normalisation and the axial RoPE of HDiT (arXiv 2401.11605, sections 3.2 and 3.3) in the same op.

The window rule is NATTEN's: at borders the window shifts inward, so a query always has its k keys in each dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hdit_kernels import extension, op
from hdit_kernels.cosine_rope import (
    AxialRope,
    check_cosine_scale,
    check_rope,
    check_tokens,
    dense,
    normalise,
    placed,
    prepare,
)

TILE = 2**18  # elements of gathered keys that the reference holds at a time, about what a core's cache takes


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int] = 7,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    cosine_scale: Tensor | None = None,
    rope: AxialRope | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    key_mask: Tensor | None = None,
    wrap: bool | Sequence[bool] = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax over a window of keys, `logits = scale · cosine_scale[h] · cos(q, k)`, or `scale · q·k`.

    Args:
        q, k, v: (B, H, W, heads, dim), read in place whatever their strides; v may have another last size. float32,
            bfloat16, float16 or float64, all alike (under autocast they are cast to its dtype).
        kernel_size, stride, dilation, is_causal: one value, or a (rows, columns) pair. kernel_size·dilation must not
            exceed the grid, nor stride the kernel_size. With stride s, groups of s queries share one window.
            With is_causal, a query sees only keys at or before its own place along that dimension.
        scale: a float; default dim^-1/2, or 1.0 with cosine_scale.
        cosine_scale: (heads,): q and k are divided by their lengths and the logits multiplied by this, of any sign.
        rope: `AxialRope`; q and k are rotated by their positions. Angles are constants.
        additional_keys, additional_values: (B, S, heads, dim): more tokens in the same softmax, seen by every query;
            normalised like the others with cosine_scale, never rotated (the query is, as for its neighbours).
        key_mask: (B, H, W) bool; where False, no query attends to that key.
        wrap: circular windows; not supported yet.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: None for the best one present, or "cpu", "cuda", "triton", "reference" for exactly that.

    Returns:
        out: (B, H, W, heads, v's dim), in q's dtype, contiguous. With return_lse also
        lse: (B, H, W, heads), float32 (float64 with float64 q), differentiable.
        A query without any valid key gives out = 0, lse = -inf and zero gradients.

    Raises:
        TypeError, ValueError: a sentence that names the argument, its value and what is accepted.
    """
    q, k, v, additional_keys, additional_values = autocast(q, k, v, additional_keys, additional_values)
    check_tokens("q", q)
    check_tokens("k", k, like=q)
    check_tokens("v", v, like=q)
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}; got {tuple(k.shape)}")
    if v.shape[:4] != q.shape[:4]:
        raise ValueError(f"v must be {tuple(q.shape[:4])} + (dim,) as q is; got shape {tuple(v.shape)}")
    window = check_window(q.shape[1:3], kernel_size, stride, dilation, is_causal, wrap)
    extras = check_extras(q, v.shape[4], cosine_scale, rope, additional_keys, additional_values, key_mask)
    params = (*window, check_scale(scale, q.shape[4], cosine_scale))
    out, lse = NEIGHBORHOOD_ATTENTION((q, k, v, *extras), params, backend)
    return (out, lse) if return_lse else out


def neighborhood_attention_qkvpacked(
    qkv: Tensor,
    kernel_size: int | Sequence[int] = 7,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    cosine_scale: Tensor | None = None,
    rope: AxialRope | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    key_mask: Tensor | None = None,
    wrap: bool | Sequence[bool] = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`neighborhood_attention(*qkv.unbind(3), …)` for qkv: (B, H, W, 3, heads, dim), as one projection writes it: q, k
    and v are read in place, and their gradient is written as one tensor like qkv."""
    qkv, additional_keys, additional_values = autocast(qkv, additional_keys, additional_values)
    if not isinstance(qkv, Tensor) or qkv.ndim != 6 or qkv.shape[3] != 3:
        got = tuple(qkv.shape) if isinstance(qkv, Tensor) else type(qkv).__name__
        raise ValueError(f"qkv must be a tensor of shape (B, H, W, 3, heads, dim); got {got}")
    q = qkv[:, :, :, 0]
    check_tokens("qkv", q)
    window = check_window(q.shape[1:3], kernel_size, stride, dilation, is_causal, wrap)
    extras = check_extras(q, q.shape[4], cosine_scale, rope, additional_keys, additional_values, key_mask)
    params = (*window, check_scale(scale, q.shape[4], cosine_scale))
    out, lse = NEIGHBORHOOD_ATTENTION_QKVPACKED((qkv, *extras), params, backend)
    return (out, lse) if return_lse else out


# ---- the definition -------------------------------------------------------------------------------------------------


def window(length, kernel: int, stride: int, dilation: int, causal: bool, device=None) -> tuple[Tensor, Tensor]:
    """The keys of each query along one dimension: index (length, kernel), valid (length, kernel) or None (all are).

    A slot without a key points at the query itself.
    """
    i = torch.arange(length, device=device)
    group, place = i % dilation, i // dilation  # with dilation, every d-th token makes a grid of its own
    size = (length - group + dilation - 1) // dilation
    leader = torch.minimum(place // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
    if causal:
        low = (leader - kernel + 1).clamp(min=0)
    else:
        low = torch.minimum((leader - kernel // 2).clamp(min=0), size - kernel)
    keys = low[:, None] + torch.arange(kernel, device=device)
    valid = keys <= place[:, None] if causal else None
    if causal:
        keys = torch.where(valid, keys, place[:, None])
    return group[:, None] + dilation * keys, valid


def attend(q, k, v, rows, columns, extra_keys, extra_values, key_mask):
    """out, lse of prepared queries (any rows of the grid) and keys; rows and columns as `window` gives them.

    The keys are gathered one row of the window at a time, so that nothing has more than kernel_size times the tokens.
    """
    (row_index, row_valid), (column_index, column_valid) = rows, columns
    logits = []
    for a in range(row_index.shape[1]):
        keys = k[:, row_index[:, a]][:, :, column_index]  # (B, rows, W, kernel, heads, dim)
        logit = (q[:, :, :, None] * keys).sum(-1)
        valid = None if column_valid is None else column_valid[None, None, :, :, None]
        if row_valid is not None:
            row = row_valid[None, :, a, None, None, None]
            valid = row if valid is None else valid & row
        if key_mask is not None:
            masked = key_mask[:, row_index[:, a]][:, :, column_index][..., None]
            valid = masked if valid is None else valid & masked
        logits.append(logit if valid is None else logit.masked_fill(~valid, -math.inf))
    if extra_keys is not None:
        logits.append(torch.einsum("bhwnd,bsnd->bhwsn", q, extra_keys))
    logits = torch.cat(logits, dim=3)  # (B, rows, W, keys, heads)
    top = logits.detach().amax(3, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)  # a query without any key
    weights = torch.exp(logits - top)
    total = weights.sum(3)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top[:, :, :, 0] + total.log()).masked_fill(empty, -math.inf)
    weights = weights / total[:, :, :, None]
    out, n = 0, column_index.shape[1]
    for a in range(row_index.shape[1]):
        values = v[:, row_index[:, a]][:, :, column_index]
        out = out + (weights[:, :, :, a * n : (a + 1) * n, :, None] * values).sum(3)
    if extra_values is not None:
        out = out + torch.einsum("bhwsn,bsnd->bhwnd", weights[:, :, :, row_index.shape[1] * n :], extra_values)
    return out, lse


def prepare_all(
    q, k, v, cosine_scale, height_angles, width_angles, additional_keys, additional_values, key_mask, scale
):
    """What `attend` takes, in float32 (float64): everything that is done to a token once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if key_mask is not None:  # select, so that nothing of a masked token gets through, not even a NaN
        hidden = ~key_mask[..., None, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    cosine_scale = None if cosine_scale is None else cosine_scale.to(dtype)
    q, k = prepare(q, k, cosine_scale, height_angles, width_angles)
    if additional_keys is not None:
        additional_keys, additional_values = additional_keys.to(dtype), additional_values.to(dtype)
        additional_keys = additional_keys if cosine_scale is None else normalise(additional_keys)
    return q * scale, k, v, additional_keys, additional_values


def windows(height, width, kernel_size, stride, dilation, is_causal, device):
    axes = zip((height, width), kernel_size, stride, dilation, is_causal, strict=True)
    return tuple(window(*axis, device=device) for axis in axes)


def reference(
    q, k, v, cosine_scale, height_angles, width_angles, additional_keys, additional_values, key_mask,
    kernel_size, stride, dilation, is_causal, scale,
):  # fmt: skip
    rows, columns = windows(q.shape[1], q.shape[2], kernel_size, stride, dilation, is_causal, q.device)
    angles = height_angles, width_angles
    prepared = prepare_all(q, k, v, cosine_scale, *angles, additional_keys, additional_values, key_mask, scale)
    out, lse = attend(*prepared[:3], rows, columns, *prepared[3:], key_mask)
    return out.to(q.dtype), lse


# ---- the reference in bounded memory, as a backend ------------------------------------------------------------------


def tiles(q, k, kernel_size, stride, dilation, is_causal):
    """The grid in tiles of query rows: (query rows, key rows they see, `rows` for attend) and, for all, `columns`."""
    (index, valid), columns = windows(q.shape[1], q.shape[2], kernel_size, stride, dilation, is_causal, "cpu")
    per_row = q.shape[0] * q.shape[2] * kernel_size[1] * q.shape[3] * max(q.shape[4], 1)
    step = max(1, TILE // max(per_row, 1))
    columns = tuple(c if c is None else c.to(q.device) for c in columns)
    slabs = []
    for start in range(0, q.shape[1], step):
        queries = slice(start, start + step)
        keys = slice(int(index[queries].min()), int(index[queries].max()) + 1)
        rows = (index[queries] - keys.start).to(q.device), None if valid is None else valid[queries].to(q.device)
        slabs.append((queries, keys, rows))
    return slabs, columns


def reference_forward(*arguments):
    q, k, v, *extras, key_mask, kernel_size, stride, dilation, is_causal, scale = arguments
    q_, k_, v_, extra_keys, extra_values = prepare_all(q, k, v, *extras, key_mask, scale)
    slabs, columns = tiles(q, k, kernel_size, stride, dilation, is_causal)
    out, lse = allocate(*arguments)
    for queries, keys, rows in slabs:
        mask = None if key_mask is None else key_mask[:, keys]
        tile = attend(q_[:, queries], k_[:, keys], v_[:, keys], rows, columns, extra_keys, extra_values, mask)
        out[:, queries], lse[:, queries] = tile
    return out, lse


def reference_backward(grad_outputs, inputs, grads, params):
    """Autograd tile by tile over prepared tokens, then through the preparation; sums in float32 (float64), in order."""
    q, k, v, cosine_scale, *angles, additional_keys, additional_values, key_mask = inputs
    *window_params, scale = params
    with op.recording():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, cosine_scale)]
        leaves += [None if t is None else t.detach().requires_grad_() for t in (additional_keys, additional_values)]
        prepared = prepare_all(*leaves[:4], *angles, *leaves[4:], key_mask, scale)
        sums = [None if t is None else torch.zeros_like(t) for t in prepared]
        slabs, columns = tiles(q, k, *window_params)
        for queries, keys, rows in slabs:
            slices = (queries, keys, keys, slice(None), slice(None))
            tile = [
                t if t is None else t.detach()[:, s].requires_grad_() for t, s in zip(prepared, slices, strict=True)
            ]
            mask = None if key_mask is None else key_mask[:, keys]
            outputs = attend(*tile[:3], rows, columns, *tile[3:], mask)
            pairs = [
                (o, g[:, queries].to(o.dtype)) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None
            ]
            results = iter(op.vjp(pairs, [t for t in tile if t is not None]))
            for total, piece in zip(sums, slices, strict=True):
                if total is not None:
                    total[:, piece] += next(results)
        present = [i for i, t in enumerate(leaves) if t is not None]
        pairs = [(t, g) for t, g in zip(prepared, sums, strict=True) if t is not None]
        for i, gradient in zip(present, op.vjp(pairs, [leaves[i] for i in present]), strict=True):
            if grads[i] is not None:
                grads[i].copy_(gradient)


# ---- the compiled kernels -------------------------------------------------------------------------------------------


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def native_arguments(inputs, outputs, params):
    """(what the compiled forward pass takes, the tensors it reads and writes)"""
    q, k, v, cosine_scale, *angles, extra_keys, extra_values, key_mask = inputs
    kernel_size, stride, dilation, is_causal, scale = params
    dtype = extension.wide(q)
    tokens = [dense(t) for t in (q, k, v, extra_keys, extra_values)]
    if angles[0] is not None:  # float64 angles of many turns keep their digits in float32
        turn = 2 * math.pi
        angles = [t if t.dtype is dtype else t - turn * torch.round(t / turn) for t in angles]
    others = [None if t is None else extension.packed(t, dtype) for t in (cosine_scale, *angles)]
    others += [None if key_mask is None else key_mask.contiguous(), *outputs]
    batch, height, width, heads, dim = q.shape
    r = 0 if angles[0] is None else angles[0].shape[-1]
    sizes = batch, heads, dim, v.shape[4], r, 0 if extra_keys is None else extra_keys.shape[1]
    windows = [list(w) for w in zip((height, width), kernel_size, stride, dilation, is_causal, strict=True)]
    packed = [placed(t) for t in tokens], [address(t) for t in others], sizes, windows, scale, extension.dtype(q)
    return packed, (*tokens, *others)


def forward(backend: str, inputs, outputs, params) -> None:
    if backend == "triton":
        from hdit_kernels import neighborhood_attention_triton

        return neighborhood_attention_triton.forward(inputs, outputs, params)
    arguments, tensors = native_arguments(inputs, outputs, params)
    extension.run(backend, "neighborhood_attention_forward", arguments, tensors)


def backward(backend: str, grad_outputs, inputs, saved, grads, params) -> None:
    if backend == "triton":
        from hdit_kernels import neighborhood_attention_triton

        return neighborhood_attention_triton.backward(grad_outputs, inputs, saved, grads, params)
    arguments, tensors = native_arguments(inputs, saved, params)
    dout, dlse = dense(grad_outputs[0]), grad_outputs[1]
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, dcosine_scale, *dextra = grads
    sums = None if dcosine_scale is None else saved[1].new_empty(inputs[0].shape[0], inputs[0].shape[3])
    tokens = dout, dq, dk, dv, *dextra
    arguments = *arguments, [placed(t) for t in tokens], address(dlse), address(sums)
    extension.run(backend, "neighborhood_attention_backward", arguments, (*tensors, *tokens, dlse, sums))
    if dcosine_scale is not None:
        dcosine_scale.copy_(sums.sum(0))


def declines(backend: str, q, k, v, *others) -> str | None:
    """What the GPU kernels leave to the reference."""
    if backend == "cpu":
        return None
    kernel_size = others[6]  # None where only the tensors of a call are known
    if q.dtype is torch.float64:
        return extension.declines_float64(backend, q)
    if q.shape[4] > 256 or v.shape[4] > 512:
        return f"heads may have up to 256 features and values up to 512; got {q.shape[4]} and {v.shape[4]}"
    if kernel_size is not None and max(kernel_size) > 65:
        return f"kernel_size may be up to 65; got {max(kernel_size)}"
    return None


# ---- what is accepted -----------------------------------------------------------------------------------------------


def autocast(*tensors):
    dtype = op.autocast_dtype(tensors[0].device.type) if isinstance(tensors[0], Tensor) else None
    if dtype is None:
        return tensors
    lower = lambda t: isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64  # noqa: E731
    return tuple(t.to(dtype) if lower(t) else t for t in tensors)


def pair(name: str, value, kind: type) -> tuple:
    """One value, or a (rows, columns) pair, of ints or bools."""
    if type(value) is kind:  # most calls; the checks of a call cost as much as a small kernel
        return value, value
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    right = (
        (lambda x: isinstance(x, bool)) if kind is bool else (lambda x: isinstance(x, int) and not isinstance(x, bool))
    )
    if len(both) != 2 or not all(right(x) for x in both):
        raise TypeError(f"{name} must be one {kind.__name__} or a (rows, columns) pair of them; got {value!r}")
    return both


def check_window(grid, kernel_size, stride, dilation, is_causal, wrap):
    kernel_size, stride = pair("kernel_size", kernel_size, int), pair("stride", stride, int)
    dilation, is_causal = pair("dilation", dilation, int), pair("is_causal", is_causal, bool)
    if any(pair("wrap", wrap, bool)):
        raise ValueError(f"wrap must be False: circular windows are not supported yet; got {wrap!r}")
    for axis, length, k, s, d in zip(("rows", "columns"), grid, kernel_size, stride, dilation, strict=True):
        if 1 <= s <= k and d >= 1 and k * d <= length:
            continue
        if k < 1 or d < 1 or s < 1:
            name, value = ("kernel_size", k) if k < 1 else ("dilation", d) if d < 1 else ("stride", s)
            raise ValueError(f"{name} must be at least 1; got {value} along the {axis}")
        if k * d > length:
            text = f"kernel_size · dilation must not exceed the {length} {axis} of the grid"
            raise ValueError(f"{text}; got kernel_size {k} · dilation {d} = {k * d}")
        raise ValueError(f"stride must be between 1 and kernel_size = {k} along the {axis}; got {s}")
    return kernel_size, stride, dilation, is_causal


def check_scale(scale, dim: int, cosine_scale) -> float:
    if scale is None:
        return dim**-0.5 if cosine_scale is None else 1.0
    if not isinstance(scale, float):
        raise TypeError(f"scale must be a float or None; got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale!r}")
    return scale


def check_extras(q, v_dim, cosine_scale, rope, additional_keys, additional_values, key_mask):
    if cosine_scale is not None:
        check_cosine_scale(cosine_scale, q)
    if rope is not None:
        check_rope(rope, q)
    if (additional_keys is None) != (additional_values is None):
        absent = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{absent} must be given with its partner: additional_keys and additional_values go together")
    if additional_keys is not None:
        for name, tensor, dim in (
            ("additional_keys", additional_keys, q.shape[4]),
            ("additional_values", additional_values, v_dim),
        ):
            if not isinstance(tensor, Tensor) or tensor.dtype is not q.dtype or tensor.device != q.device:
                got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name} must be a {q.dtype} tensor on {q.device}, as q is; got {got}")
            tokens = additional_keys.shape[1] if additional_keys.ndim == 4 else "S"
            expected = (q.shape[0], tokens, q.shape[3], dim)
            if tensor.ndim != 4 or any(a != e for a, e in zip(tensor.shape, expected, strict=True)):
                text = "({}, {}, {}, {})".format(*expected)
                raise ValueError(f"{name} must be (B, S, heads, dim) = {text}; got {tuple(tensor.shape)}")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype is not torch.bool:
            got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            raise TypeError(f"key_mask must be a bool tensor of shape (B, H, W); got {got}")
        if key_mask.shape != q.shape[:3] or key_mask.device != q.device:
            got = f"{tuple(key_mask.shape)} on {key_mask.device}"
            raise ValueError(f"key_mask must be (B, H, W) = {tuple(q.shape[:3])} on {q.device}; got {got}")
    angles = (None, None) if rope is None else tuple(rope)
    return cosine_scale, *angles, additional_keys, additional_values, key_mask


# ---- the ops --------------------------------------------------------------------------------------------------------


def allocate(q, k, v, *others):
    lse_dtype = extension.wide(q)
    return q.new_empty((*q.shape[:4], v.shape[4])), q.new_empty(q.shape[:4], dtype=lse_dtype)


def macs(q, k, v, cosine_scale, height_angles, width_angles, additional_keys, additional_values, key_mask, kernel, *_):
    """Two products forward, five backward (the logits are computed again), over all k² keys also where some are cut."""
    queries, keys = math.prod(q[:4]), kernel[0] * kernel[1] + (additional_keys[1] if additional_keys else 0)
    return queries * keys * (q[4] + v[4]), queries * keys * (3 * q[4] + 2 * v[4])


EXTRAS = ("cosine_scale?", "height_angles?", "width_angles?", "additional_keys?", "additional_values?", "key_mask?")
PARAMS = {"kernel_size": "int[]", "stride": "int[]", "dilation": "int[]", "is_causal": "bool[]", "scale": "float"}

NEIGHBORHOOD_ATTENTION = op.Op(
    name="neighborhood_attention",
    inputs=("q", "k", "v", *EXTRAS),
    params=PARAMS,
    outputs=("out", "lse"),
    saved_outputs=("out", "lse"),
    gradients=("q", "k", "v", "cosine_scale", "additional_keys", "additional_values"),
    batched=("q", "k", "v", "additional_keys", "additional_values", "key_mask"),
    reference=reference,
    reference_forward=reference_forward,
    reference_backward=reference_backward,
    allocate=allocate,
    macs=macs,
    kernels=("cpu", "triton", "cuda"),
    forward=forward,
    backward=backward,
    declines=declines,
)


def _unpacked(function):
    """A function of q, k, v, … as one of qkv, …: the same code reads views of the packed tensor."""
    return lambda qkv, *others: function(*qkv.unbind(3), *others)


def _unpacked_inputs(inputs):
    return (*inputs[0].unbind(3), *inputs[1:])


def _unpacked_grads(grads):
    return (*((None,) * 3 if grads[0] is None else grads[0].unbind(3)), *grads[1:])


NEIGHBORHOOD_ATTENTION_QKVPACKED = op.Op(
    name="neighborhood_attention_qkvpacked",
    inputs=("qkv", *EXTRAS),
    params=PARAMS,
    outputs=("out", "lse"),
    saved_outputs=("out", "lse"),
    gradients=("qkv", "cosine_scale", "additional_keys", "additional_values"),
    batched=("qkv", "additional_keys", "additional_values", "key_mask"),
    reference=_unpacked(reference),
    reference_forward=_unpacked(reference_forward),
    reference_backward=lambda grad_outputs, inputs, grads, params: reference_backward(
        grad_outputs, _unpacked_inputs(inputs), _unpacked_grads(grads), params
    ),
    allocate=_unpacked(allocate),
    macs=lambda qkv, *others: macs(*[(*qkv[:3], *qkv[4:])] * 3, *others),
    kernels=("cpu", "triton", "cuda"),
    declines=lambda backend, qkv, *others: declines(backend, *qkv.unbind(3), *others),
    forward=lambda backend, inputs, outputs, params: forward(backend, _unpacked_inputs(inputs), outputs, params),
    backward=lambda backend, grad_outputs, inputs, saved, grads, params: backward(
        backend, grad_outputs, _unpacked_inputs(inputs), saved, _unpacked_grads(grads), params
    ),
)

"""NATTEN's names, old (0.14 – 0.17) and new (0.20 and later), over `neighborhood_attention`.

    from hdit_kernels.natten import na2d          # or, for code that says `import natten` and is not to be changed:
    hdit_kernels.natten.install()

Three families, in 1, 2 and 3 dimensions, all differentiable, on any device:

* fused, heads last: `na1d`, `na2d`, `na3d` on (B, *grid, heads, dim); one softmax over the window and additional keys;
* unfused, heads first: `na2d_qk`, `na2d_av`, `natten2dqkrpb`, … on (B, heads, *grid, dim): the logits of the window,
  not scaled, (B, heads, *grid, keys) with keys in row-major order, and the weighted sums of its values;
* modules: `NeighborhoodAttention1D`, `2D`, `3D`, with the constructors and state dicts of both generations.

Unlike NATTEN: scale = 0.0 is used and not replaced, the gradient of the lse is kept, a batch may be empty, and a tensor
of another rank is refused. Names and meanings follow github.com/SHI-Labs/NATTEN.
"""

import importlib.metadata
import math
import numbers
import pathlib
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hdit_kernels import neighborhood_attention as attend
from hdit_kernels import op

# (the name of the function hides the page's own: this is the page)
page = sys.modules["hdit_kernels.neighborhood_attention"]

__version__ = "0.21.7"  # the NATTEN whose current names these are; what `natten.__version__` says after install()
HAS_LIBNATTEN = True
functional = context = modules = sys.modules[__name__]  # `natten.functional.na2d`

BACKENDS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna", "flash-fna", "metal-fna", "reference")
# Keywords of some release that say how, not what, to compute: accepted everywhere and ignored.
TUNING = frozenset((
    "attention_kwargs", "backward_kv_splits", "backward_kv_tile_shape", "backward_q_tile_shape",
    "backward_use_pt_reduction", "kernel_schedule", "kv_tile_shape", "q_tile_shape", "run_persistent_kernel",
    "tiling_config", "torch_compile", "try_max_kv",
))  # fmt: skip
GRID = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}  # the names of the axes of a grid


# ---- arguments ------------------------------------------------------------------------------------------------------


def each(name: str, value, dims: int, kind: type) -> tuple:
    """One value per dimension, from one value or a sequence of them."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims
    if len(values) != dims or not all(type(v) is kind for v in values):
        wanted = f"one {kind.__name__}" + (f" or {dims} of them" if dims > 1 else "")
        raise TypeError(f"{name} must be {wanted}; got {value!r}")
    return values


def check_window(grid, kernel_size, stride, dilation, is_causal) -> tuple[tuple, ...]:
    """kernel_size, stride, dilation and is_causal of each dimension of the grid, or a sentence."""
    dims = len(grid)
    kernel_size, stride = each("kernel_size", kernel_size, dims, int), each("stride", stride, dims, int)
    dilation = each("dilation", 1 if dilation is None else dilation, dims, int)
    is_causal = each("is_causal", False if is_causal is None else is_causal, dims, bool)
    for axis, (length, k, s, d) in enumerate(zip(grid, kernel_size, stride, dilation, strict=True)):
        if not (k >= 1 and d >= 1 and k * d <= length and 1 <= s <= k):
            raise ValueError(
                f"kernel_size · dilation must not exceed {length}, nor stride kernel_size, and all be at least 1 along "
                f"dimension {axis} of the grid {(*grid,)}; got kernel_size {k}, dilation {d}, stride {s}"
            )
    return kernel_size, stride, dilation, is_causal


def check_shape(name: str, x, *shape, like: Tensor | None = None) -> None:
    """x is a tensor of this shape, in which a str stands for any size, on the device of `like`."""
    right = isinstance(x, Tensor) and x.ndim == len(shape) and (like is None or x.device == like.device)
    if not right or any(n != w and not isinstance(w, str) for n, w in zip(x.shape, shape, strict=True)):
        got = f"shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        where = "" if like is None else f" on {like.device}"
        raise ValueError(f"{name} must be a tensor of shape ({', '.join(map(str, shape))}){where}; got {got}")


def check_options(backend: str | None, tuning: dict) -> str | None:
    """Our backend for NATTEN's (whose choice is ours), and only keywords that NATTEN has."""
    for name in tuning.keys() - TUNING:
        raise TypeError(f"{name} is no argument of NATTEN's; those that are ignored are {', '.join(sorted(TUNING))}")
    if backend is not None and backend not in BACKENDS + op.NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS + op.NAMES[:3])}; got {backend!r}")
    return None if backend in BACKENDS else backend


def check_positional(name: str, place: str, extra: tuple) -> None:
    """The place where dilation stood and stride stands now: a 1 there means the same in both."""
    if len(extra) > 1:
        raise TypeError(f"{name} takes no positional arguments after the {place}; got {extra[1:]!r}: give their names")
    ones = (*extra[0],) if extra and isinstance(extra[0], (tuple, list)) else extra
    if not all(type(v) is int and v == 1 for v in ones):
        why = "be given by name: it was dilation up to NATTEN 0.17 and is stride since 0.20"
        raise ValueError(f"{name}'s {place} positional argument must be 1, or {why}; got {extra[0]!r}")


def scale_of(scale, dim: int) -> float:
    if scale is None:
        return dim**-0.5
    if not isinstance(scale, numbers.Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None; got {scale!r}")
    return float(scale)


# ---- unfused: logits of a window, sums over a window ----------------------------------------------------------------


def tables(grid, kernel_size, stride, dilation, is_causal, device) -> tuple[Tensor, Tensor | None, Tensor]:
    """For each of the T tokens of the grid and each of the K places in its window, both row-major, as (T, K):
    the key (an index into the flattened grid), whether there is one (None: always), and its entry in a flattened rpb.

    An entry of an rpb stands for a relative position: per axis, (key − query) / dilation + kernel_size − 1.
    """
    keys = entries = torch.zeros(1, 1, dtype=torch.int64, device=device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=device)
    cross = lambda a, b: (a[:, None, :, None], b[None, :, None, :])  # noqa: E731
    for length, k, s, d, causal in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
        index, there = page.window(length, k, s, d, causal, device)
        relative = (index - torch.arange(length, device=device)[:, None]) // d + k - 1
        shape = keys.shape[0] * length, keys.shape[1] * k
        outer, inner = cross(keys, index)
        keys = (outer * length + inner).reshape(shape)
        outer, inner = cross(entries, relative)
        entries = (outer * (2 * k - 1) + inner).reshape(shape)
        outer, inner = cross(valid, torch.ones_like(index, dtype=torch.bool) if there is None else there)
        valid = (outer & inner).reshape(shape)
    return keys, valid if any(is_causal) else None, entries


def over_windows(contract, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """contract(x, y at these places of every window, in float32 or float64), gathered again in the backward pass."""

    def run(x, y):
        part = y.index_select(2, places.flatten()).unflatten(2, places.shape)  # (B, heads, T, places, dim)
        return contract(x, part.to(torch.promote_types(y.dtype, torch.float32)))

    return checkpoint(run, x, y, use_reentrant=False, preserve_rng_state=False)


def window_products(x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """a[i, j] = x[i] · y[keys[i, j]]: (B, heads, T, K); a few places of all windows at a time."""
    dot = lambda x, part: (x[..., None, :] * part).sum(-1)  # noqa: E731
    step = max(1, page.TILE // max(y.numel(), 1))
    return torch.cat([over_windows(dot, x, y, places) for places in keys.split(step, 1)], dim=-1).to(y.dtype)


def weighted_sums(a: Tensor, y: Tensor, keys: Tensor) -> Tensor:
    """Σ_j a[i, j] · y[keys[i, j]]: (B, heads, T, dim); a few places of all windows at a time."""
    add = lambda a, part: (a[..., None] * part).sum(-2)  # noqa: E731
    step = max(1, page.TILE // max(y.numel(), 1))
    pieces = zip(a.split(step, -1), keys.split(step, 1), strict=True)
    return sum(over_windows(add, a, y, places) for a, places in pieces).to(y.dtype)


def window_logits(
    dims, query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None, *, stride=1
):  # fmt: skip
    """q · k (+ rpb) of every window: (B, heads, *grid, K), then the additional keys' in the same axis; -inf where a
    causal window has no key. query, key: (B, heads, *grid, dim); additional_keys: (B, heads, S, dim)."""
    check_shape("query", query, "B", "heads", *GRID[dims], "dim")
    query, key, additional_keys = page.autocast(query, key, additional_keys)
    check_shape("key", key, *query.shape, like=query)
    if key.dtype is not query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}; got {key.dtype}")
    grid = query.shape[2:-1]
    sizes = check_window(grid, kernel_size, stride, dilation, is_causal)
    keys, valid, entries = tables(grid, *sizes, query.device)
    logits = window_products(query.flatten(2, -2), key.flatten(2, -2), keys)
    if rpb is not None:
        check_shape("rpb", rpb, query.shape[1], *(2 * k - 1 for k in sizes[0]), like=query)
        logits = (logits + rpb.flatten(1)[:, entries]).to(logits.dtype)
    if valid is not None:
        logits = logits.masked_fill(~valid, -math.inf)
    logits = logits.unflatten(2, grid)
    if additional_keys is None:
        return logits
    check_shape("additional_keys", additional_keys, *query.shape[:2], "S", query.shape[-1], like=query)
    return torch.cat([logits, torch.einsum("bn...d,bnsd->bn...s", query, additional_keys)], dim=-1)


def window_sums(dims, attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False, *, stride=1):
    """Σ over a window (and additional tokens) of attn · value: (B, heads, *grid, dim). attn is laid out as logits are,
    of any dtype (the sum has value's); what it says where a causal window has no key does not count."""
    check_shape("value", value, "B", "heads", *GRID[dims], "dim")
    grid = value.shape[2:-1]
    sizes = check_window(grid, kernel_size, stride, dilation, is_causal)
    places = math.prod(sizes[0])
    if additional_values is not None:
        check_shape("additional_values", additional_values, *value.shape[:2], "S", value.shape[-1], like=value)
    tokens = 0 if additional_values is None else additional_values.shape[2]
    check_shape("attn", attn, *value.shape[:-1], places + tokens, like=value)
    keys, valid, _ = tables(grid, *sizes, value.device)
    window, extra = attn.split([places, tokens], dim=-1)
    window = window.flatten(2, -2)
    if valid is not None:
        window = window.masked_fill(~valid, 0.0)
    out = weighted_sums(window, value.flatten(2, -2), keys).unflatten(2, grid)
    if additional_values is None:
        return out
    return out + torch.einsum("bn...s,bnsd->bn...d", extra.to(value.dtype), additional_values)


def window_logits_with_bias(
    dims, query, key, rpb, kernel_size, dilation=1, additional_keys=None, is_causal=False
):  # fmt: skip
    """`window_logits` with its arguments in the order of NATTEN 0.14 and 0.15."""
    return window_logits(dims, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


na1d_qk, na2d_qk, na3d_qk = natten1dqk, natten2dqk, natten3dqk = [partial(window_logits, n) for n in (1, 2, 3)]
na1d_av, na2d_av, na3d_av = natten1dav, natten2dav, natten3dav = [partial(window_sums, n) for n in (1, 2, 3)]
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = [partial(window_logits_with_bias, n) for n in (1, 2, 3)]
na1d_qk_with_bias, na2d_qk_with_bias, na3d_qk_with_bias = natten1dqkrpb, natten2dqkrpb, natten3dqkrpb


# ---- fused ----------------------------------------------------------------------------------------------------------


def merge_attentions(outputs, lse_tensors, torch_compile=False, use_autograd_fix=True) -> tuple[Tensor, Tensor]:
    """One attention from several of the same queries over different keys: outputs (…, dim) and lse_tensors (…), as if
    the keys had stood in one softmax. Returns (out, lse); keywords are NATTEN's and change nothing."""
    lse = torch.stack(tuple(lse_tensors))
    empty = (lse == -math.inf).all(0)
    total = torch.logsumexp(lse.masked_fill(empty, 0.0), dim=0).masked_fill(empty, 0.0)
    weights = torch.exp(lse - total)
    out = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outputs, strict=True))
    return out.to(outputs[0].dtype), total.masked_fill(empty, -math.inf)


def with_weights(query, key, value, window, scale, extra_keys, extra_values, rpb, dropout=0.0):
    """out, lse by way of the attention weights of every window, for what needs them: a bias on them, or dropout."""
    first = lambda t: None if t is None else t.movedim(-2, 1)  # noqa: E731
    dims = query.ndim - 3
    kernel_size, stride, dilation, is_causal = window
    sizes = kernel_size, dilation
    query, key, value, extra_values = page.autocast(query, key, value, extra_values)
    query, key, value = first(query * scale), first(key), first(value)
    logits = window_logits(dims, query, key, *sizes, first(extra_keys), is_causal, rpb, stride=stride)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = nn.functional.dropout(logits.softmax(-1), dropout)
    out = window_sums(dims, weights, value, *sizes, first(extra_values), is_causal, stride=stride)
    return out.movedim(1, -2), logits.logsumexp(-1).movedim(1, -1)


def slice_by_slice(query, key, value, window, scale, extras, backend):
    """out, lse in three dimensions: the 2-D op once for each place in the window along the first, on the keys of that
    slice, merged. Additional keys go with the first place, which always has a key."""
    of_depth, of_slice = zip(*((first, rest) for first, *rest in window), strict=True)
    batch, depth = query.shape[:2]
    index, valid = page.window(depth, *of_depth, query.device)
    outputs, lses = [], []
    for place in range(of_depth[0]):
        seen = [t[:, index[:, place]].flatten(0, 1) for t in (key, value)]
        tokens = {n: None if t is None or place else t.repeat_interleave(depth, dim=0) for n, t in extras.items()}
        out, lse = attend(query.flatten(0, 1), *seen, *of_slice, scale, **tokens, return_lse=True, backend=backend)
        lse = lse.unflatten(0, (batch, depth))
        lses.append(lse if valid is None else lse.masked_fill(~valid[:, place, None, None, None], -math.inf))
        outputs.append(out.unflatten(0, (batch, depth)))
    return merge_attentions(outputs, lses)


def neighborhood_attention_generic(
    query, key, value, kernel_size, *fifth, stride=1, dilation=1, is_causal=False, scale=None, additional_keys=None,
    additional_values=None, backend=None, return_lse=False, rpb=None, dims=None, **tuning,
):  # fmt: skip
    """Neighborhood attention over a 1-, 2- or 3-dimensional grid; the window's rule is `neighborhood_attention`'s.

    Args:
        query, key, value: (B, *grid, heads, dim); value's dim may differ.
        kernel_size, stride, dilation, is_causal: one value, or one per dimension of the grid. The fifth positional
            argument, dilation up to NATTEN 0.17 and stride since, is refused unless it is 1.
        scale: of the logits, default dim^-1/2.
        additional_keys, additional_values: (B, S, heads, dim): tokens that every query attends to as well.
        backend: one of NATTEN's names, which mean None, or one of ours.
        return_lse: return (out, lse), lse (B, *grid, heads) the log of the softmax's denominator, differentiable.
        rpb: (heads, 2·kernel_size − 1, …) added to the logits by relative position, as in NATTEN up to 0.17.
        dims: of the grid; None is what query's rank says.
        tuning: the keywords in `TUNING`, accepted and ignored.

    Returns:
        (B, *grid, heads, value's dim).
    """
    check_positional("na1d, na2d or na3d", "fifth", fifth)
    backend = check_options(backend, tuning)
    if dims is None:
        dims = query.ndim - 3 if isinstance(query, Tensor) and query.ndim - 3 in GRID else 2
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_shape(name, tensor, "B", *GRID[dims], "heads", "dim")
    window = check_window(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    scale = scale_of(scale, query.shape[-1])
    extras = dict(additional_keys=additional_keys, additional_values=additional_values)
    if rpb is not None:
        out, lse = with_weights(query, key, value, window, scale, *extras.values(), rpb)
    elif dims == 3:
        out, lse = slice_by_slice(query, key, value, window, scale, extras, backend)
    elif dims == 2:
        out, lse = attend(query, key, value, *window, scale, **extras, return_lse=True, backend=backend)
    else:
        row = query[:, None], key[:, None], value[:, None]
        window = [(neutral, *of) for neutral, of in zip((1, 1, 1, False), window, strict=True)]
        out, lse = (t[:, 0] for t in attend(*row, *window, scale, **extras, return_lse=True, backend=backend))
    return (out, lse) if return_lse else out


na1d, na2d, na3d = [partial(neighborhood_attention_generic, dims=n) for n in (1, 2, 3)]


# ---- modules --------------------------------------------------------------------------------------------------------


class NeighborhoodAttention(nn.Module):
    """Self-attention of tokens (B, *grid, embed_dim) with their neighborhoods: projection, attention, projection.

    Takes the constructor arguments of NATTEN 0.14 – 0.17 (dim, attn_drop, bias or rel_pos_bias) and of 0.20 and later
    (embed_dim, stride); those after kernel_size by name. With `dim`, a grid smaller than the window is padded with
    zeros at its end, as it was then. A state dict with an `rpb` brings it along, since it was there by default in 0.14.
    """

    dims: int

    def __init__(
        self, embed_dim=None, num_heads=None, kernel_size=None, *fourth, stride=1, dilation=1, is_causal=False,
        qkv_bias=True, qk_scale=None, proj_drop=0.0, dim=None, attn_drop=0.0, bias=False, rel_pos_bias=False,
    ):  # fmt: skip
        super().__init__()
        check_positional(type(self).__name__, "fourth", fourth)
        width = dim if embed_dim is None else embed_dim
        for name, value in (("embed_dim", width), ("num_heads", num_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int; got {value!r}")
        if width % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads = {num_heads}; got {width}")
        self.embed_dim, self.num_heads, self.head_dim = width, num_heads, width // num_heads
        self.pads = dim is not None
        self.kernel_size = each("kernel_size", kernel_size, self.dims, int)
        dilation = each("dilation", 1 if dilation is None else dilation, self.dims, int)
        largest = tuple(k * d for k, d in zip(self.kernel_size, dilation, strict=True))
        _, self.stride, self.dilation, self.is_causal = check_window(
            largest, self.kernel_size, stride, dilation, is_causal
        )
        self.window_size = largest
        self.scale = scale_of(qk_scale, self.head_dim)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.rpb_shape = num_heads, *(2 * k - 1 for k in self.kernel_size)
        self.rpb = nn.Parameter(torch.empty(self.rpb_shape)) if bias or rel_pos_bias else None
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_load_state_dict_pre_hook(self._bring_rpb)

    @staticmethod
    def _bring_rpb(self, state_dict, prefix, *_):
        if self.rpb is None and prefix + "rpb" in state_dict:
            self.rpb = nn.Parameter(self.proj.weight.new_zeros(self.rpb_shape))

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, embed_dim) → the same."""
        if not isinstance(x, Tensor) or x.ndim != self.dims + 2 or x.shape[-1] != self.embed_dim:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be (B, {self.dims} grid axes, {self.embed_dim}); got {got}")
        grid = x.shape[1:-1]
        if self.pads:
            for axis, size in enumerate(self.window_size):
                after = (0, 0) * (self.dims - axis) + (0, max(0, size - grid[axis]))
                x = nn.functional.pad(x, after)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)
        window = self.kernel_size, self.stride, self.dilation, self.is_causal
        if self.training and self.attn_drop.p > 0:
            out, _ = with_weights(q, k, v, window, self.scale, None, None, self.rpb, self.attn_drop.p)
        else:
            window = dict(zip(("kernel_size", "stride", "dilation", "is_causal"), window, strict=True))
            out = neighborhood_attention_generic(q, k, v, **window, scale=self.scale, rpb=self.rpb, dims=self.dims)
        out = out[(slice(None), *(slice(n) for n in grid))].flatten(-2)
        return self.proj_drop(self.proj(out))


class NeighborhoodAttention1D(NeighborhoodAttention):
    dims = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    dims = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    dims = 3


# ---- what old code asks of the library, and the library's place -----------------------------------------------------


def has_fused_na(*_) -> bool:
    """Whether the fused names work here: always."""
    return True


def use_fused_na(*_, **__) -> None:
    """A setting that chose among kernels, or allowed one: nothing depends on it here."""


has_fna = has_gemm = has_half = has_bfloat = has_fp32_gemm = has_fp64_gemm = has_tf32_gemm = has_fused_na
is_fused_na_enabled = is_fna_enabled = has_fused_na
use_fna = enable_fused_na = disable_fused_na = use_kv_parallelism_in_fused_na = use_fused_na
use_gemm_na = enable_gemm_na = disable_gemm_na = use_tiled_na = enable_tiled_na = disable_tiled_na = use_fused_na
use_tf32_in_gemm_na = enable_tf32 = disable_tf32 = use_autotuner = disable_autotuner = use_fused_na
set_memory_usage_preference = use_deterministic_algorithms = allow_flex_compile = use_fused_na


class Installed(importlib.metadata.Distribution):
    """Answers `importlib.metadata.version("natten")`, by which transformers decides whether it has NATTEN."""

    def read_text(self, filename):
        files = {"METADATA": f"Name: natten\nVersion: {__version__}\n", "top_level.txt": "natten\n"}
        return files.get(filename)

    def locate_file(self, path):
        return pathlib.Path(__file__).parent / path

    def find_spec(self, *_):
        return None

    def find_distributions(self, context):
        return [self] if context.name in (None, "natten") else []


def install():
    """Let `import natten` and its submodules give this module, for the rest of the process, and say that it is
    installed where importlib.metadata is asked. Call it before the code that imports natten. Returns the module.

    Raises:
        RuntimeError: another natten is imported already.
    """
    here = sys.modules[__name__]
    present = sys.modules.get("natten", here)
    if present is not here:
        raise RuntimeError(f"install() must come before natten is imported; {present!r} is imported already")
    for name in ("natten", "natten.functional", "natten.context", "natten.modules"):
        sys.modules[name] = here
    if not any(isinstance(finder, Installed) for finder in sys.meta_path):
        sys.meta_path.insert(0, Installed())
    return here

"""Layers that the models share, on channels-last tokens (B, H, W, C).

Names of modules and parameters are those of k-diffusion's ``image_transformer_v2``, so that its checkpoints load as
they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdit_kernels import AxialRope, ada_rms_norm, cosine_rope, linear_geglu, neighborhood_attention_qkvpacked


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; anything narrower becomes float32: the precision of angles, Fourier features and norm scales."""
    return torch.promote_types(dtype, torch.float32)


def zero_init(linear: nn.Linear) -> nn.Linear:
    """Zero all parameters of a layer that ends a residual branch, so that a fresh block is the identity."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last dimension, with a learned scale (C,) that starts at 1."""

    def __init__(self, features: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return ada_rms_norm(x, self.scale)


class AdaRMSNorm(nn.Module):
    """x / rms(x) · (1 + W cond): the scale (B, C) of each image comes from its conditioning vector (B,
    cond_features)."""

    def __init__(self, features: int, cond_features: int):
        super().__init__()
        self.linear = zero_init(nn.Linear(cond_features, features, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        change = self.linear(cond)
        return ada_rms_norm(
            x, 1 + change.to(at_least_float32(change.dtype))
        )  # 1 + change would lose its low bits in bf16


class AdaLayerNorm(nn.Module):
    """LayerNorm without parameters, then · (1 + scale) + shift, both linear in the conditioning: adaLN of DiT."""

    def __init__(self, features: int, cond_features: int):
        super().__init__()
        self.linear = zero_init(nn.Linear(cond_features, 2 * features, bias=False))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return modulate(x, *self.linear(cond).chunk(2, dim=-1))


NORMS = {"ada-rms-norm": AdaRMSNorm, "ada-layer-norm": AdaLayerNorm}


def per_image(vector: Tensor, x: Tensor) -> Tensor:
    """(B, C) → (B, 1, …, C), to meet x (B, …, C)."""
    return vector.unflatten(0, (-1, *(1,) * (x.ndim - 2)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift (B, C) per image. x: (B, …, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + per_image(scale, x)) + per_image(shift, x)


class LinearGEGLU(nn.Linear):
    """A bias-free projection to (value, gate), then value · gelu(gate). The weight is (2·out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, 2 * out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear_geglu(x, self.weight)


class LinearGELU(nn.Linear):
    """A bias-free projection, then gelu. The weight is (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


UP_PROJECTIONS = {"geglu": LinearGEGLU, "gelu": LinearGELU}


class FeedForward(nn.Module):
    """x + gate(cond) · down(dropout(up(norm(x, cond)))), pointwise over the tokens; by default without the gate.

    Either the gate or down_proj starts at zero: both would never learn.
    """

    def __init__(
        self,
        width: int,
        d_ff: int,
        cond_features: int,
        dropout: float,
        up: str = "geglu",
        norm: str = "ada-rms-norm",
        output_gate: bool = False,
    ):
        super().__init__()
        self.norm = NORMS[norm](width, cond_features)
        self.up_proj = UP_PROJECTIONS[up](width, d_ff)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(d_ff, width, bias=False)
        self.gate = nn.Linear(cond_features, width, bias=False) if output_gate else None
        zero_init(self.gate if output_gate else self.down_proj)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        change = self.down_proj(self.dropout(self.up_proj(self.norm(x, cond))))
        return x + (change if self.gate is None else per_image(self.gate(cond), x) * change)


class MappingFeedForward(nn.Module):
    """The residual block of the mapping network: as FeedForward, with a norm of its own."""

    def __init__(self, width: int, d_ff: int, dropout: float):
        super().__init__()
        self.norm = RMSNorm(width)
        self.up_proj = LinearGEGLU(width, d_ff)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zero_init(nn.Linear(d_ff, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.dropout(self.up_proj(self.norm(x))))


class MappingNetwork(nn.Module):
    """The sum of all embeddings (B, width) to the conditioning vector (B, width) that every AdaRMSNorm reads."""

    def __init__(self, depth: int, width: int, d_ff: int, dropout: float):
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(MappingFeedForward(width, d_ff, dropout) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class ConstantBuffers(nn.Module):
    """A module whose floating-point buffers keep float32 or float64 values when the model is cast to half precision."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != at_least_float32(buffer.dtype):
                self._buffers[name] = before[name].to(buffer.device, torch.float32)
        return self


class FourierFeatures(ConstantBuffers):
    """cat(cos, sin)(2π x Wᵀ): (B, in_features) → (B, out_features), W ~ N(0, 1) drawn once and saved with the model.

    Computed in float32 or float64 always, and with an elementwise product, since autocast would run a matmul in
    bfloat16: that has too few bits to tell neighbouring noise levels apart.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(out_features // 2, in_features))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        phase = (2 * math.pi) * (x[..., None, :] * self.weight).sum(-1)
        return torch.cat((phase.cos(), phase.sin()), dim=-1)


def axial_positions(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of the tokens of a grid: y (height,) and x (width,), where the longest side spans [−1, 1].

    Halving both sides gives the means of 2 x 2 tokens, so every level of the hourglass may ask for its own grid.
    """
    longest = max(height, width)
    y = (2 * torch.arange(height, dtype=dtype, device=device) + (1 - height)) / longest
    x = (2 * torch.arange(width, dtype=dtype, device=device) + (1 - width)) / longest
    return y, x


def sinusoid(x: Tensor, features: int) -> Tensor:
    """cat(cos, sin)(x · 10000^(−i/n)), i = 0 … n−1, n = features/2: (…,) → (…, features)."""
    n = features // 2
    frequency = torch.exp(torch.arange(n, dtype=x.dtype, device=x.device) * (-math.log(10000) / n))
    phase = x[..., None] * frequency
    return torch.cat((phase.cos(), phase.sin()), dim=-1)


def grid_positions(height: int, width: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed positions (height, width, features) in units of tokens: half of the features for the column, half for the
    row (DiT's)."""
    row = sinusoid(torch.arange(height, dtype=dtype, device=device), features // 2)
    column = sinusoid(torch.arange(width, dtype=dtype, device=device), features // 2)
    column = column.expand(height, width, features // 2)
    return torch.cat((column, row[:, None].expand(height, width, features // 2)), dim=-1)


class SinCosPosition(nn.Module):
    """x + the fixed positions of its grid. x: (B, H, W, features), features divisible by 4."""

    def forward(self, x: Tensor) -> Tensor:
        positions = grid_positions(*x.shape[1:], at_least_float32(x.dtype), x.device)
        return x + positions.to(x.dtype)


class LearnedPosition(nn.Module):
    """x + a learned table of positions, which other grids than its own see interpolated. x: (B, H, W, features)."""

    def __init__(self, grid: tuple[int, int], features: int):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(features, *grid))

    def forward(self, x: Tensor) -> Tensor:
        table = self.table[None]
        if x.shape[1:3] != table.shape[2:]:
            table = F.interpolate(table, x.shape[1:3], mode="bilinear", align_corners=False)
        return x + table.movedim(1, -1).to(x.dtype)


class AxialRoPE(ConstantBuffers):
    """Rotary angles per head and axis: positions times π·10^((j + h/heads)/r), j = 0 … r−1, r = d_head/8.

    The heads interleave their frequencies, between π and 10π, the same for both axes (HDiT, section 4.3). turns =
    False: all are zero, which turns nothing, for models whose tokens know their positions in another way.
    """

    def __init__(self, heads: int, d_head: int, turns: bool = True):
        super().__init__()
        r = d_head // 8
        freqs = [[turns * math.pi * 10 ** ((j + h / heads) / r) for j in range(r)] for h in range(heads)]
        self.register_buffer("freqs", torch.tensor(freqs))

    def forward(self, positions: tuple[Tensor, Tensor]) -> AxialRope:
        """(y, x) of axial_positions → angles (H, heads, r), (W, heads, r)."""
        y, x = positions
        return AxialRope(y[:, None, None] * self.freqs, x[:, None, None] * self.freqs)


class SelfAttention(nn.Module):
    """x + out_proj(dropout(attend(qkv_proj(ada_norm(x, cond))))): cosine similarity, a scale per head, axial RoPE."""

    kind: str  # what hdit.flops calls the attention's own products

    def __init__(
        self,
        width: int,
        d_head: int,
        cond_features: int,
        dropout: float,
        norm: str = "ada-rms-norm",
        rope: bool = True,
    ):
        super().__init__()
        self.heads, self.d_head = width // d_head, d_head
        self.norm = NORMS[norm](width, cond_features)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((self.heads,), 10.0))
        self.pos_emb = AxialRoPE(self.heads, d_head, rope)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = zero_init(nn.Linear(width, width, bias=False))

    def attend(self, qkv: Tensor, rope: AxialRope) -> Tensor:
        """(B, H, W, 3, heads, d_head) → (B, H, W, heads, d_head)."""
        raise TypeError(f"{type(self).__name__} does not say which tokens attend to which; its subclasses do")

    def forward(self, x: Tensor, cond: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv_proj(self.norm(x, cond)).unflatten(-1, (3, self.heads, self.d_head))
        out = self.attend(qkv, self.pos_emb(positions))
        return x + self.out_proj(self.dropout(out.flatten(-2)))


class NeighborhoodSelfAttention(SelfAttention):
    """Each token attends to the kernel_size x kernel_size tokens around it (NATTEN's rule at the borders)."""

    kind = "neighborhood"

    def __init__(self, width: int, d_head: int, cond_features: int, dropout: float, kernel_size: int, **options):
        super().__init__(width, d_head, cond_features, dropout, **options)
        self.kernel_size = kernel_size

    def attend(self, qkv: Tensor, rope: AxialRope) -> Tensor:
        return neighborhood_attention_qkvpacked(qkv, self.kernel_size, cosine_scale=self.scale, rope=rope)


class GlobalSelfAttention(SelfAttention):
    """Every token attends to every token."""

    kind = "global"

    def attend(self, qkv: Tensor, rope: AxialRope) -> Tensor:
        q, k, v = qkv.unbind(3)
        q, k = cosine_rope(q, k, self.scale, rope)
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (B, heads, H·W, d_head)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return out.transpose(1, 2).unflatten(1, qkv.shape[1:3])


class ShiftedWindowSelfAttention(SelfAttention):
    """Tokens attend within windows of a grid that is moved up and left by `shift` tokens (Swin, arXiv 2103.14030)."""

    kind = "window"

    def __init__(
        self, width: int, d_head: int, cond_features: int, dropout: float, window_size: int, shift: int, **options
    ):
        super().__init__(width, d_head, cond_features, dropout, **options)
        self.window, self.shift = window_size, shift

    def attend(self, qkv: Tensor, rope: AxialRope) -> Tensor:
        b, h, w = qkv.shape[:3]
        q, k, v = qkv.unbind(3)
        q, k = cosine_rope(q, k, self.scale, rope)
        q, k, v = (self._to_windows(t) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(h, w, qkv.device), scale=1.0)
        out = out.reshape(h // self.window, w // self.window, b, self.heads, self.window, self.window, self.d_head)
        out = out.permute(2, 0, 4, 1, 5, 3, 6).reshape(b, h, w, self.heads, self.d_head)
        return out.roll((-self.shift, -self.shift), (1, 2)) if self.shift else out

    def _to_windows(self, t: Tensor) -> Tensor:
        """(B, H, W, heads, d) → (windows, B·heads, window², d), so that one mask per window serves batch and heads."""
        b, h, w, heads, d = t.shape
        n = self.window
        t = t.roll((self.shift, self.shift), (1, 2)) if self.shift else t
        t = t.reshape(b, h // n, n, w // n, n, heads, d).permute(1, 3, 0, 5, 2, 4, 6)
        return t.reshape((h // n) * (w // n), b * heads, n * n, d)

    def _mask(self, h: int, w: int, device: torch.device) -> Tensor | None:
        """(windows, 1, window², window²): rolling brought the last rows and columns to the front, where they are
        strangers."""
        if not self.shift:
            return None
        n = self.window
        wrapped_row = torch.arange(h, device=device) < self.shift
        wrapped_column = torch.arange(w, device=device) < self.shift
        part = 2 * wrapped_row[:, None].int() + wrapped_column.int()
        part = part.reshape(h // n, n, w // n, n).permute(0, 2, 1, 3).reshape((h // n) * (w // n), 1, n * n)
        return part[..., :, None] == part[..., None, :]


class TokenMerge(nn.Module):
    """Each patch of (ph, pw) tokens becomes one: concatenate their features row by row, then project without bias."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = (2, 2)):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_features * math.prod(patch_size), out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        ph, pw = self.patch_size
        x = x.reshape(b, h // ph, ph, w // pw, pw, c).permute(0, 1, 3, 2, 4, 5)
        return self.proj(x.reshape(b, h // ph, w // pw, ph * pw * c))


class TokenSplit(nn.Module):
    """The inverse layout of TokenMerge: one token becomes a patch of (ph, pw) tokens of out_features each."""

    def __init__(self, in_features: int, out_features: int, patch_size: tuple[int, int] = (2, 2)):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_features, out_features * math.prod(patch_size), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        b, h, w, c = x.shape
        ph, pw = self.patch_size
        x = x.reshape(b, h, w, ph, pw, c // (ph * pw)).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * ph, w * pw, c // (ph * pw))


class TokenSplitLerp(TokenSplit):
    """TokenSplit, then lerp(skip, x, fac) with one learned factor that starts at 0.5 (the paper's f is 1 − fac)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class TokenSplitAdd(TokenSplit):
    """TokenSplit, then the sum with the skip."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return super().forward(x) + skip


class TokenSplitConcat(TokenSplit):
    """TokenSplit, then a bias-free projection of (x, skip), side by side, to the width of one: a U-Net's skip."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.skip_proj = nn.Linear(2 * out_features, out_features, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.skip_proj(torch.cat((super().forward(x), skip), dim=-1))


SPLITS = {"lerp": TokenSplitLerp, "add": TokenSplitAdd, "concat": TokenSplitConcat}

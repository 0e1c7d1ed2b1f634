"""The U-ViT of simple diffusion (Hoogeboom et al., arXiv 2301.11093), and the U-Net that it is compared with.

A U-Net on pixels whose parameters are where the resolution is low: residual convolutions on the outer levels, and a
deep trunk of transformer blocks, with an MLP in the place of convolutions wherever there is attention. Dropout acts on
the levels that ask for it. Every block on the way down hands its result to its counterpart on the way up, which takes
(x + skip)/√2.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import layers, wavelet
from .config import Config, build, build_levels, check_choice, check_dropout, check_ints
from .inputs import check_inputs
from .pretrained import Model


@dataclass(frozen=True)
class UViTLevel:
    """One resolution: depth blocks on the way down, as many on the way up (innermost, the trunk: depth in all).

    kind: "convolution" | "transformer" | "convolution-attention", residual convolutions each followed by attention, for
    the U-Net. dropout: of these blocks. d_head: features of a head where there is attention.
    """

    depth: int
    width: int
    kind: Literal["convolution", "transformer", "convolution-attention"] = "convolution"
    dropout: float = 0.0
    d_head: int = 64

    def __post_init__(self):
        check_ints(self, "depth", "width", "d_head")
        check_dropout("dropout", self.dropout)
        check_choice(self, "kind", BLOCKS)
        if self.attends and (self.width % self.d_head or self.width % 4):
            raise ValueError(
                f"width is {self.width}; where there is attention it must divide by d_head {self.d_head} and by 4"
            )

    @property
    def attends(self) -> bool:
        return self.kind != "convolution"


@dataclass(frozen=True)
class UViTConfig(Config):
    """Everything that determines the parameters of a U-ViT.

    levels: outermost first. patch_size: pixels a side of one position of level 0, a power of two; patching: how they
    become its channels: "dwt", the 5/3 wavelet | "strided", a patch's pixels as they are. downsampling: from level to
    level, "average" pooling and nearest neighbours back | "dwt" | "strided", 2 x 2 positions side by side.
    embedding_width: of the vector that all conditioning is summed to. mlp_ratio: hidden width of the MLPs over the
    width. num_classes: 0 for none, else the table has one more row, for «no class». mapping_cond_dim: features of a
    custom vector, or 0.
    """

    levels: tuple[UViTLevel, ...]
    patch_size: int = 1
    patching: Literal["dwt", "strided"] = "dwt"
    downsampling: Literal["average", "dwt", "strided"] = "average"
    in_channels: int = 3
    out_channels: int = 3
    embedding_width: int = 1024
    mlp_ratio: int = 4
    num_classes: int = 0
    mapping_cond_dim: int = 0

    def __post_init__(self):
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(isinstance(level, UViTLevel) for level in self.levels):
            raise TypeError(f"levels is {self.levels!r}; it must hold one UViTLevel or more")
        check_ints(self, "patch_size", "in_channels", "out_channels", "embedding_width", "mlp_ratio")
        check_ints(self, "num_classes", "mapping_cond_dim", least=0)
        check_choice(self, "patching", ("dwt", "strided"))
        check_choice(self, "downsampling", ("average", "dwt", "strided"))
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; it must be a power of two")

    @property
    def side_multiple(self) -> tuple[int, int]:
        """(rows, columns) of pixels that the sides of an image must divide by: patch_size · 2^(levels − 1)."""
        return (self.patch_size * 2 ** (len(self.levels) - 1),) * 2

    def to_dict(self) -> dict:
        plain = super().to_dict()
        return {**plain, "levels": list(plain["levels"])}

    @classmethod
    def from_dict(cls, plain: dict) -> "UViTConfig":
        return build_levels(cls, plain, lambda level: build(UViTLevel, level))


def group_norm(width: int) -> nn.GroupNorm:
    """32 groups, or as many as give each 4 channels."""
    return nn.GroupNorm(math.gcd(32, width, max(1, width // 4)), width)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(film(norm(conv(silu(norm(x)))))))): the conditioning scales and shifts between the two.

    x: (B, H, W, width), as everywhere here; convolutions read it as (B, width, H, W) in place.
    """

    def __init__(self, config: UViTConfig, level: UViTLevel):
        super().__init__()
        width = level.width
        self.in_norm = group_norm(width)
        self.in_conv = nn.Conv2d(width, width, 3, padding=1)
        self.film = layers.zero_init(nn.Linear(config.embedding_width, 2 * width))
        self.out_norm = group_norm(width)
        self.dropout = nn.Dropout(level.dropout)
        self.out_conv = layers.zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_conv(F.silu(self.in_norm(x.movedim(-1, 1))))
        scale, shift = self.film(emb)[..., None, None].chunk(2, dim=1)
        h = F.silu(self.out_norm(h) * (1 + scale) + shift)
        return x + self.out_conv(self.dropout(h)).movedim(1, -1)


class Attention(nn.Module):
    """x + proj(attention of every position to every position of norm(x)), queries and keys normalised per head."""

    kind = "global"  # what hdit.flops calls the attention's own products

    def __init__(self, config: UViTConfig, level: UViTLevel):
        super().__init__()
        width = level.width
        self.heads = width // level.d_head
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        # A bias of all keys would add the same to all logits of a query: a softmax does not see it.
        self.q_norm, self.k_norm = nn.LayerNorm(level.d_head), nn.LayerNorm(level.d_head, bias=False)
        self.proj = layers.zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, H·W, d_head)
        out = F.scaled_dot_product_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return x + self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


class MLP(nn.Module):
    """x + down(dropout(film(silu(up(norm(x)))))): the conditioning scales and shifts the hidden features."""

    def __init__(self, config: UViTConfig, level: UViTLevel):
        super().__init__()
        hidden = config.mlp_ratio * level.width
        self.norm = nn.LayerNorm(level.width)
        self.up = nn.Linear(level.width, hidden)
        self.film = layers.zero_init(nn.Linear(config.embedding_width, 2 * hidden))
        self.dropout = nn.Dropout(level.dropout)
        self.down = layers.zero_init(nn.Linear(hidden, level.width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.film(emb)[:, None, None].chunk(2, dim=-1)
        return x + self.down(self.dropout(F.silu(self.up(self.norm(x))) * (1 + scale) + shift))


BLOCKS = {"convolution": (ResBlock,), "transformer": (Attention, MLP), "convolution-attention": (ResBlock, Attention)}


class Block(nn.ModuleList):
    """The residual layers of one block of a level, one after the other; each takes x and the conditioning."""

    def __init__(self, config: UViTConfig, level: UViTLevel):
        super().__init__(layer(config, level) for layer in BLOCKS[level.kind])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb)
        return x


class Downsample(nn.Module):
    """(B, H, W, outer) → (B, H/2, W/2, inner): 2 x 2 positions become one, then a projection."""

    def __init__(self, kind: str, outer: int, inner: int):
        super().__init__()
        self.sampling = kind
        self.proj = nn.Linear(outer if kind == "average" else 4 * outer, inner)

    def forward(self, x: Tensor) -> Tensor:
        if self.sampling == "average":
            return self.proj(F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1))
        return self.proj(wavelet.analyse(x) if self.sampling == "dwt" else wavelet.space_to_depth(x, 2))


class Upsample(nn.Module):
    """(B, H/2, W/2, inner) → (B, H, W, outer): a projection, then what Downsample does, backwards."""

    def __init__(self, kind: str, inner: int, outer: int):
        super().__init__()
        self.sampling = kind
        self.proj = nn.Linear(inner, outer if kind == "average" else 4 * outer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if self.sampling == "average":
            return x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return wavelet.synthesise(x) if self.sampling == "dwt" else wavelet.depth_to_space(x, 2)


class UViT(Model):
    """F(x; sigma): (B, in_channels, H, W) → (B, out_channels, H, W), called as HDiT is. A fresh model returns exactly
    0.

    The conditioning vector sums embeddings of c_noise = ln(sigma)/4, which is −log-SNR/8 where the data have unit
    deviation, of class, augmentation and custom vector. Fixed sine-cosine positions are added where a level with
    attention is entered, so that any grid will do. Training several sizes under torch.compile needs dynamic=False:
    inductor (2.13) cannot order the strides of channels-last views of symbolic size that are kept for backward.
    """

    config_class = UViTConfig

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.config = config
        levels, width, pixels = config.levels, config.embedding_width, config.patch_size**2
        self.time_emb = layers.FourierFeatures(1, 256)
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_emb = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.aug_in_proj = layers.zero_init(nn.Linear(9, width, bias=False))
        custom = config.mapping_cond_dim
        self.mapping_cond_in_proj = nn.Linear(custom, width, bias=False) if custom else None

        def stack(level: UViTLevel) -> nn.ModuleList:
            return nn.ModuleList(Block(config, level) for _ in range(level.depth))

        self.patch_in = nn.Conv2d(config.in_channels * pixels, levels[0].width, 3, padding=1)
        self.positions = layers.SinCosPosition()
        self.down_levels = nn.ModuleList(stack(level) for level in levels[:-1])
        self.mid_level = stack(levels[-1])
        self.up_levels = nn.ModuleList(stack(level) for level in levels[:-1])
        pairs = [(outer.width, inner.width) for outer, inner in itertools.pairwise(levels)]
        self.merges = nn.ModuleList(Downsample(config.downsampling, outer, inner) for outer, inner in pairs)
        self.splits = nn.ModuleList(Upsample(config.downsampling, inner, outer) for outer, inner in pairs)
        self.out_norm = group_norm(levels[0].width)
        self.patch_out = layers.zero_init(nn.Conv2d(levels[0].width, config.out_channels * pixels, 3, padding=1))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
    ) -> Tensor:
        """F(x; sigma) for x that is already times c_in; arguments, casts and errors as in HDiT.forward."""
        check_inputs(self.config, x, sigma, aug_cond, class_cond, mapping_cond)
        emb = self.conditioning(sigma, aug_cond, class_cond, mapping_cond)
        x = self._to_patches(x.to(self.patch_in.weight.dtype).movedim(1, -1))
        x = self.patch_in(x.movedim(-1, 1)).movedim(1, -1)
        skips = []
        for level, blocks, merge in zip(self.config.levels[:-1], self.down_levels, self.merges, strict=True):
            x = self.positions(x) if level.attends else x
            for block in blocks:
                x = self._run(block, x, emb)
                skips.append(x)
            x = merge(x)
        x = self.positions(x) if self.config.levels[-1].attends else x
        for block in self.mid_level:
            x = self._run(block, x, emb)
        for blocks, split in zip(reversed(self.up_levels), reversed(self.splits), strict=True):
            x = split(x)
            for block in blocks:
                x = self._run(block, (x + skips.pop()) * 0.5**0.5, emb)
        x = self.patch_out(F.silu(self.out_norm(x.movedim(-1, 1))))
        return self._to_pixels(x.movedim(1, -1)).movedim(-1, 1)

    def conditioning(self, sigma, aug_cond=None, class_cond=None, mapping_cond=None) -> Tensor:
        """The vector (B, embedding_width) that every block reads."""
        dtype = self.patch_in.weight.dtype
        c_noise = sigma.to(torch.promote_types(sigma.dtype, self.time_emb.weight.dtype)).log() / 4
        aug_cond = sigma.new_zeros(sigma.shape[0], 9) if aug_cond is None else aug_cond
        emb = self.time_mlp(self.time_emb(c_noise[:, None]).to(dtype)) + self.aug_in_proj(aug_cond.to(dtype))
        if self.class_emb is not None:
            emb = emb + self.class_emb(class_cond)
        if self.mapping_cond_in_proj is not None:
            emb = emb + self.mapping_cond_in_proj(mapping_cond.to(dtype))
        return F.silu(emb)

    def _to_patches(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → (B, H/p, W/p, p²·C)."""
        p = self.config.patch_size
        dwt = self.config.patching == "dwt"
        return wavelet.analyse(x, p.bit_length() - 1) if dwt else wavelet.space_to_depth(x, p)

    def _to_pixels(self, x: Tensor) -> Tensor:
        p = self.config.patch_size
        dwt = self.config.patching == "dwt"
        return wavelet.synthesise(x, p.bit_length() - 1) if dwt else wavelet.depth_to_space(x, p)

    def _run(self, block: Block, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def param_groups(self, lr: float = 1e-4, weight_decay: float = 1e-2) -> list[dict]:
        """Groups for torch.optim.AdamW: weight decay on the weights of projections and convolutions, none on biases,
        norms and embeddings."""
        decays, others = [], []
        for name, parameter in self.named_parameters():
            embedding = name.startswith(("time_mlp.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj."))
            (decays if parameter.ndim > 1 and not embedding else others).append(parameter)
        return [
            {"params": decays, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]

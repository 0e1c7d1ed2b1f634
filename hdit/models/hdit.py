"""The Hourglass Diffusion Transformer (Crowson et al., arXiv 2401.11605), a denoiser that works on pixels.

A U-shaped stack of transformer levels. Each outer level has twice the resolution of the next and attends to a
neighborhood of its tokens only, so the cost grows with the number of pixels; the innermost attends globally.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import layers
from .config import Config, build, build_levels, check_choice, check_dropout, check_ints
from .inputs import check_inputs
from .pretrained import Model


@dataclass(frozen=True)
class Neighborhood:
    """Each token attends to the kernel_size x kernel_size tokens around it."""

    d_head: int = 64
    kernel_size: int = 7


@dataclass(frozen=True)
class ShiftedWindow:
    """Tokens attend within windows, which every second layer shifts by half their size (Swin, arXiv 2103.14030)."""

    d_head: int = 64
    window_size: int = 8


@dataclass(frozen=True)
class Global:
    """Every token attends to every token."""

    d_head: int = 64


ATTENTION_TYPES = {"neighborhood": Neighborhood, "shifted-window": ShiftedWindow, "global": Global, "none": type(None)}


@dataclass(frozen=True)
class Level:
    """One resolution of the hourglass: depth layers on the way down, as many on the way up (innermost: depth in all).

    d_ff: hidden width of the feed-forward blocks, 3 x width where None. attention: None for feed-forward blocks alone.
    """

    depth: int
    width: int
    d_ff: int | None = None
    attention: Neighborhood | ShiftedWindow | Global | None = Neighborhood()
    dropout: float = 0.0

    def __post_init__(self):
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 3 * self.width)
        check_ints(self, "depth", "width", "d_ff")
        check_dropout("dropout", self.dropout)
        if self.attention is not None:
            if not isinstance(self.attention, Neighborhood | ShiftedWindow | Global):
                raise TypeError(
                    f"attention is {self.attention!r}; it must be Neighborhood, ShiftedWindow, Global or None"
                )
            check_ints(self.attention, *(f.name for f in fields(self.attention)))
            if self.attention.d_head % 8 or self.width % self.attention.d_head:
                raise ValueError(
                    f"d_head is {self.attention.d_head}; it must be a multiple of 8 that divides the width {self.width}"
                )


@dataclass(frozen=True)
class HDiTConfig(Config):
    """Everything that determines the parameters of an HDiT.

    levels: outermost first. patch_size: (rows, columns) of pixels per token of level 0; one int for both. num_classes:
    0 for none, else the table has one more row, for «no class». mapping_cond_dim: features of a custom conditioning
    vector, or 0. mapping_*: the network that turns all conditioning into one vector (mapping_d_ff: 3 x mapping_width
    where None).

    The rest are the switches of the paper's ablations (Tables 1 and 2); the defaults are HDiT. feed_forward: "geglu" |
    "gelu", there with d_ff 4 x width. output_gate: a gate per image and feature on what feed-forward blocks add, as in
    DiT. norm: "ada-rms-norm" | "ada-layer-norm". skip: "lerp" | "add" | "concat". position: "axial-rope" | "sin-cos",
    added to the tokens of level 0 | "learned", a table added there; position_grid: its (rows, columns) of tokens.
    """

    levels: tuple[Level, ...]
    patch_size: tuple[int, int] = (4, 4)
    in_channels: int = 3
    out_channels: int = 3
    num_classes: int = 0
    mapping_cond_dim: int = 0
    mapping_depth: int = 2
    mapping_width: int = 256
    mapping_d_ff: int | None = None
    mapping_dropout: float = 0.0
    feed_forward: Literal["geglu", "gelu"] = "geglu"
    output_gate: bool = False
    norm: Literal["ada-rms-norm", "ada-layer-norm"] = "ada-rms-norm"
    skip: Literal["lerp", "add", "concat"] = "lerp"
    position: Literal["axial-rope", "sin-cos", "learned"] = "axial-rope"
    position_grid: tuple[int, int] | None = None

    def __post_init__(self):
        patch = self.patch_size
        object.__setattr__(self, "patch_size", (patch, patch) if isinstance(patch, int) else tuple(patch))
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.mapping_d_ff is None:
            object.__setattr__(self, "mapping_d_ff", 3 * self.mapping_width)
        if not self.levels or not all(isinstance(level, Level) for level in self.levels):
            raise TypeError(f"levels is {self.levels!r}; it must hold one Level or more")
        if len(self.patch_size) != 2 or not all(isinstance(p, int) and p > 0 for p in self.patch_size):
            raise ValueError(f"patch_size is {patch!r}; it must be a positive int or a (rows, columns) pair of them")
        check_ints(self, "in_channels", "out_channels", "mapping_width", "mapping_d_ff")
        check_ints(self, "num_classes", "mapping_cond_dim", "mapping_depth", least=0)
        check_dropout("mapping_dropout", self.mapping_dropout)
        if self.mapping_width % 2:
            raise ValueError(f"mapping_width is {self.mapping_width}; it must be even: half cosines, half sines")
        check_choice(self, "feed_forward", layers.UP_PROJECTIONS)
        check_choice(self, "output_gate", (False, True))
        check_choice(self, "norm", layers.NORMS)
        check_choice(self, "skip", layers.SPLITS)
        self._check_position()

    def _check_position(self) -> None:
        check_choice(self, "position", ("axial-rope", "sin-cos", "learned"))
        grid = self.position_grid
        if isinstance(grid, list | tuple):
            grid = tuple(grid)
            object.__setattr__(self, "position_grid", grid)
        is_pair = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
        if is_pair != (self.position == "learned") or not (is_pair or grid is None):
            needs = "a (rows, columns) pair of positive ints" if self.position == "learned" else "None"
            raise ValueError(f"position_grid is {grid!r}; with position {self.position!r} it must be {needs}")
        if self.position == "sin-cos" and self.levels[0].width % 4:
            raise ValueError(f"width is {self.levels[0].width}; for sines and cosines of y and x it must divide by 4")

    @property
    def side_multiple(self) -> tuple[int, int]:
        """(rows, columns) of pixels that the sides of an image must divide by: patch_size · 2^(levels − 1)."""
        return tuple(p * 2 ** (len(self.levels) - 1) for p in self.patch_size)

    @classmethod
    def for_resolution(
        cls,
        height: int,
        width: int,
        *,
        patch_size: int = 4,
        local: Level = Level(2, 384),
        inner: Level = Level(11, 768, attention=Global()),
        global_at_32: bool = False,
        **others,
    ) -> "HDiTConfig":
        """Levels for images of this size in pixels: `inner` at about 16 x 16 tokens, and one `local` per doubling.

        About: there are as many levels as bring the mean side, sqrt(height · width), nearest to 16 tokens. The defaults
        are HDiT-B/4 (Table 1 of the paper). global_at_32: the level above inner is global as well. others: further
        fields of the configuration. ValueError where the sides do not divide by patch_size · 2^(levels − 1).
        """
        if height < patch_size or width < patch_size:
            raise ValueError(f"height x width is {height} x {width}; both must be {patch_size} (patch_size) or more")
        doublings = max(0, round(math.log2(math.sqrt(height * width) / (16 * patch_size))))
        multiple = patch_size * 2**doublings
        if height % multiple or width % multiple:
            near = " x ".join(str(max(1, round(side / multiple)) * multiple) for side in (height, width))
            raise ValueError(f"height x width is {height} x {width}; both must divide by {multiple}, as {near} does")
        outer = [local] * doublings
        if global_at_32 and outer:
            outer[-1] = replace(local, attention=Global(local.attention.d_head) if local.attention else Global())
        return cls(levels=(*outer, inner), patch_size=patch_size, **others)

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, for JSON; attention as {"type": "neighborhood", …}."""
        plain = super().to_dict()
        names = {kind: name for name, kind in ATTENTION_TYPES.items()}
        for level, entry in zip(self.levels, plain["levels"], strict=True):
            entry["attention"] = {"type": names[type(level.attention)], **(entry["attention"] or {})}
        lists = {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}
        return {**plain, **lists}

    @classmethod
    def from_dict(cls, plain: dict) -> "HDiTConfig":
        """The inverse of to_dict. An unknown field or attention type is a ValueError that lists the known ones."""
        return build_levels(cls, plain, level_from_dict)


def level_from_dict(plain: dict) -> Level:
    if isinstance(plain, dict) and isinstance(plain.get("attention"), dict):
        plain = {**plain, "attention": attention_from_dict(plain["attention"])}
    return build(Level, plain)


def attention_from_dict(plain: dict) -> Neighborhood | ShiftedWindow | Global | None:
    """{"type": "neighborhood", "d_head": 64, "kernel_size": 7} and the like; what is absent has its default."""
    options = dict(plain)
    kind = options.pop("type", None)
    if kind not in ATTENTION_TYPES:
        raise ValueError(f"attention type is {kind!r}; it must be one of {', '.join(ATTENTION_TYPES)}")
    if kind == "none":
        if options:
            raise ValueError(f"attention type none has an unknown field {', '.join(options)}; it takes none")
        return None
    return build(ATTENTION_TYPES[kind], options)


class TransformerLayer(nn.Module):
    """Self-attention, unless the level has none, and a feed-forward block. Windows are shifted where index is odd."""

    def __init__(self, config: HDiTConfig, level: Level, index: int):
        super().__init__()
        self.self_attn = self._attention(config, level, index)
        sizes = (level.width, level.d_ff, config.mapping_width, level.dropout)
        self.ff = layers.FeedForward(*sizes, config.feed_forward, config.norm, config.output_gate)

    @staticmethod
    def _attention(config: HDiTConfig, level: Level, index: int) -> layers.SelfAttention | None:
        spec = level.attention
        if spec is None:
            return None
        shared = (level.width, spec.d_head, config.mapping_width, level.dropout)
        options = {"norm": config.norm, "rope": config.position == "axial-rope"}
        if isinstance(spec, Neighborhood):
            return layers.NeighborhoodSelfAttention(*shared, spec.kernel_size, **options)
        if isinstance(spec, ShiftedWindow):
            shift = spec.window_size // 2 if index % 2 else 0
            return layers.ShiftedWindowSelfAttention(*shared, spec.window_size, shift, **options)
        return layers.GlobalSelfAttention(*shared, **options)

    def forward(self, x: Tensor, cond: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        if self.self_attn is not None:
            x = self.self_attn(x, cond, positions)
        return self.ff(x, cond)


class HDiT(Model):
    """F(x; sigma): (B, in_channels, H, W) → (B, out_channels, H, W). Preconditioning and losses are hdit.diffusion's.

    A fresh model returns exactly 0.
    """

    config_class = HDiTConfig

    def __init__(self, config: HDiTConfig):
        super().__init__()
        self.config = config
        width, levels = config.mapping_width, config.levels
        self.patch_in = layers.TokenMerge(config.in_channels, levels[0].width, config.patch_size)
        self.position = None
        if config.position == "sin-cos":
            self.position = layers.SinCosPosition()
        elif config.position == "learned":
            self.position = layers.LearnedPosition(config.position_grid, levels[0].width)

        self.time_emb = layers.FourierFeatures(1, width)
        self.time_in_proj = nn.Linear(width, width, bias=False)
        self.aug_emb = layers.FourierFeatures(9, width)
        self.aug_in_proj = nn.Linear(width, width, bias=False)
        self.class_emb = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        custom = config.mapping_cond_dim
        self.mapping_cond_in_proj = nn.Linear(custom, width, bias=False) if custom else None
        self.mapping = layers.MappingNetwork(config.mapping_depth, width, config.mapping_d_ff, config.mapping_dropout)

        def stack(level: Level, first: int = 0) -> nn.ModuleList:
            return nn.ModuleList(TransformerLayer(config, level, first + i) for i in range(level.depth))

        self.down_levels = nn.ModuleList(stack(level) for level in levels[:-1])
        self.mid_level = stack(levels[-1])
        self.up_levels = nn.ModuleList(stack(level, level.depth) for level in levels[:-1])
        pairs = list(itertools.pairwise(levels))
        self.merges = nn.ModuleList(layers.TokenMerge(outer.width, inner.width) for outer, inner in pairs)
        self.splits = nn.ModuleList(layers.SPLITS[config.skip](inner.width, outer.width) for outer, inner in pairs)

        self.out_norm = layers.RMSNorm(levels[0].width)
        self.patch_out = layers.TokenSplit(levels[0].width, config.out_channels, config.patch_size)
        layers.zero_init(self.patch_out.proj)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
    ) -> Tensor:
        """F(x; sigma) for x that is already times c_in.

        x (B, in_channels, H, W): cast to the parameters' dtype, in which the result is, or to autocast's. sigma (B,):
        noise levels > 0. aug_cond (B, 9): Karras augmentation, zeros where None. class_cond (B,): num_classes means
        «no class». mapping_cond (B, mapping_cond_dim). ValueError for shapes, dtypes and classes that the
        configuration does not have.
        """
        check_inputs(self.config, x, sigma, aug_cond, class_cond, mapping_cond)
        self._check_levels(x.shape[2], x.shape[3])
        cond = self.conditioning(sigma, aug_cond, class_cond, mapping_cond)

        x = self.patch_in(x.to(self.patch_in.proj.weight.dtype).movedim(1, -1))
        x = x if self.position is None else self.position(x)
        skips = []
        for level, merge in zip(self.down_levels, self.merges, strict=True):
            x = self._run(level, x, cond)
            skips.append(x)
            x = merge(x)
        x = self._run(self.mid_level, x, cond)
        for level, split in zip(reversed(self.up_levels), reversed(self.splits), strict=True):
            x = self._run(level, split(x, skips.pop()), cond)
        return self.patch_out(self.out_norm(x)).movedim(-1, 1)

    def conditioning(self, sigma, aug_cond=None, class_cond=None, mapping_cond=None) -> Tensor:
        """The vector (B, mapping_width) that every layer reads: mapping(time + augmentation + class + custom)."""
        dtype = self.time_in_proj.weight.dtype
        c_noise = sigma.to(torch.promote_types(sigma.dtype, self.time_emb.weight.dtype)).log() / 4
        if aug_cond is None:
            aug_cond = c_noise.new_zeros(sigma.shape[0], 9)
        emb = self.time_in_proj(self.time_emb(c_noise[:, None]).to(dtype))
        emb = emb + self.aug_in_proj(self.aug_emb(aug_cond).to(dtype))
        if self.class_emb is not None:
            emb = emb + self.class_emb(class_cond)
        if self.mapping_cond_in_proj is not None:
            emb = emb + self.mapping_cond_in_proj(mapping_cond.to(dtype))
        return self.mapping(emb)

    def _run(self, level: nn.ModuleList, x: Tensor, cond: Tensor) -> Tensor:
        positions = layers.axial_positions(x.shape[1], x.shape[2], self.time_emb.weight.dtype, x.device)
        for layer in level:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cond, positions, use_reentrant=False)
            else:
                x = layer(x, cond, positions)
        return x

    def _check_levels(self, height: int, width: int) -> None:
        """Does every level's attention fit the grid that an image of this size has there?"""
        rows, columns = height // self.config.patch_size[0], width // self.config.patch_size[1]
        for i, level in enumerate(self.config.levels):
            h, w = rows // 2**i, columns // 2**i
            spec, place = level.attention, f"x is {height} x {width} pixels, so level {i} has {h} x {w} tokens"
            if isinstance(spec, Neighborhood) and spec.kernel_size > min(h, w):
                raise ValueError(f"{place}; its kernel_size {spec.kernel_size} needs as many per side, or more")
            if isinstance(spec, ShiftedWindow) and (h % spec.window_size or w % spec.window_size):
                raise ValueError(f"{place}; both must be divisible by its window_size {spec.window_size}")

    def param_groups(self, lr: float = 5e-4, weight_decay: float = 1e-2, mapping_lr_scale: float = 1 / 3) -> list[dict]:
        """Groups for torch.optim.AdamW, as HDiT was trained: every parameter is in exactly one.

        Weight decay acts on the weights of projections only, not on norms, scales and embeddings; the mapping network
        and the AdaRMSNorm projections that read it learn at mapping_lr_scale of the rate.
        """
        groups = {(slow, decays): [] for slow in (False, True) for decays in (True, False)}
        for name, parameter in self.named_parameters():
            slow = name.startswith("mapping.") or ".norm.linear." in name or ".gate." in name
            embedding = name.startswith(("time_in_proj.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj."))
            groups[slow, name.endswith(".weight") and not embedding].append(parameter)
        return [
            {
                "params": members,
                "lr": lr * (mapping_lr_scale if slow else 1.0),
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (slow, decays), members in groups.items()
            if members
        ]

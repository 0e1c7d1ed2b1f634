"""The Diffusion Transformer (Peebles & Xie, arXiv 2212.09748) on pixels: the baseline that HDiT is compared with.

Blocks with adaLN-Zero, global attention and fixed sine-cosine positions, all at one resolution: the cost grows with the
square of the number of pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import layers
from .config import Config, check_ints
from .inputs import check_inputs
from .pretrained import Model

SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # depth, width, heads (Table 1)


@dataclass(frozen=True)
class DiTConfig(Config):
    """Everything that determines the parameters of a DiT; DiTConfig.of_size("B") fills depth, width and heads.

    mlp_ratio: hidden width of the MLPs over the width. learn_sigma doubles the output channels and does nothing else:
    the second half is for a loss that learns a variance, and such a model is no F(x) for hdit.diffusion's Denoiser.
    num_classes: 0 for none, else the table has one more row, for «no class». mapping_cond_dim: features of a custom
    vector, or 0.
    """

    depth: int = 12
    width: int = 768
    heads: int = 12
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: int = 4
    learn_sigma: bool = False
    num_classes: int = 0
    mapping_cond_dim: int = 0

    def __post_init__(self):
        check_ints(self, "depth", "width", "heads", "patch_size", "in_channels", "mlp_ratio")
        check_ints(self, "num_classes", "mapping_cond_dim", least=0)
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width is {self.width}; it must divide by heads {self.heads}, and by 4: sines and cosines of y and x"
            )

    @classmethod
    def of_size(cls, size: str, **others) -> "DiTConfig":
        """Size S, B, L or XL of the paper; the other fields by name."""
        if size not in SIZES:
            raise ValueError(f"size is {size!r}; it must be one of {', '.join(SIZES)}")
        depth, width, heads = SIZES[size]
        return cls(depth=depth, width=width, heads=heads, **others)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def side_multiple(self) -> tuple[int, int]:
        """(rows, columns) of pixels that the sides of an image must divide by."""
        return self.patch_size, self.patch_size


class SelfAttention(nn.Module):
    kind = "global"  # what hdit.flops calls the attention's own products

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """adaLN-Zero: shift, scale and gate of both branches are a linear function of the conditioning that starts at 0."""

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.ada_ln = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada_ln(F.silu(cond)).chunk(6, dim=-1)
        x = x + gate_a[:, None] * self.attn(layers.modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(layers.modulate(x, shift_m, scale_m))


class DiT(Model):
    """F(x; sigma): (B, in_channels, H, W) → (B, out_channels, H, W), called as HDiT is. A fresh model returns exactly
    0.

    DiT embeds integer timesteps 0 … 999 with sinusoids whose fastest has 1 radian per step. Here the noise level is
    continuous: t = 1000 · ln(sigma)/4, so that one radian is 0.4 % in sigma and 1e-3 … 1e3 spans −1727 … 1727,
    resolution and range like those of the original, under the c_noise that HDiT uses. Augmentation (absent in DiT) is
    one zero-initialised projection.
    """

    config_class = DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, (config.patch_size, config.patch_size)
        self.patch_in = layers.TokenMerge(config.in_channels, width, patch)
        self.positions = layers.SinCosPosition()
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_emb = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.aug_in_proj = nn.Linear(9, width, bias=False)
        custom = config.mapping_cond_dim
        self.mapping_cond_in_proj = nn.Linear(custom, width, bias=False) if custom else None
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.out_ada_ln = nn.Linear(width, 2 * width)
        self.patch_out = layers.TokenSplit(width, config.out_channels, patch)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.time_mlp[0], self.time_mlp[2], self.class_emb):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            layers.zero_init(block.ada_ln)
        for module in (self.aug_in_proj, self.out_ada_ln, self.patch_out.proj):
            layers.zero_init(module)

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
        cond = self.conditioning(sigma, aug_cond, class_cond, mapping_cond)
        dtype = self.patch_in.proj.weight.dtype
        x = self.patch_in(x.to(dtype).movedim(1, -1))
        rows, columns = x.shape[1:3]
        x = self.positions(x).flatten(1, 2)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cond, use_reentrant=False)
            else:
                x = block(x, cond)
        shift, scale = self.out_ada_ln(F.silu(cond)).chunk(2, dim=-1)
        x = layers.modulate(x, shift, scale).unflatten(1, (rows, columns))
        return self.patch_out(x).movedim(-1, 1)

    def conditioning(self, sigma, aug_cond=None, class_cond=None, mapping_cond=None) -> Tensor:
        """The vector (B, width) that every block reads: the sum of all embeddings."""
        dtype = self.patch_in.proj.weight.dtype
        t = 250 * sigma.to(torch.promote_types(sigma.dtype, layers.at_least_float32(dtype))).log()
        cond = self.time_mlp(layers.sinusoid(t, 256).to(dtype))
        aug_cond = sigma.new_zeros(sigma.shape[0], 9) if aug_cond is None else aug_cond
        cond = cond + self.aug_in_proj(aug_cond.to(dtype))
        if self.class_emb is not None:
            cond = cond + self.class_emb(class_cond)
        if self.mapping_cond_in_proj is not None:
            cond = cond + self.mapping_cond_in_proj(mapping_cond.to(dtype))
        return cond

    def param_groups(self, lr: float = 5e-4, weight_decay: float = 1e-2) -> list[dict]:
        """Groups for torch.optim.AdamW: weight decay on the weights of projections, none on biases and embeddings."""
        decays, others = [], []
        for name, parameter in self.named_parameters():
            embedding = name.startswith(("time_mlp.", "aug_in_proj.", "class_emb.", "mapping_cond_in_proj."))
            (decays if name.endswith(".weight") and not embedding else others).append(parameter)
        return [
            {"params": decays, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]

"""Multiply-adds of a model at a resolution, counted on the meta device: no arithmetic is done and no memory is taken.

The rule is the one under which the HDiT paper prints "GFLOP", one per multiply-add (1 MAC = 2 FLOP): a linear layer
counts numel(x)·out, attention queries·keys·(d_q + d_v), neighborhood attention queries·k²·(d_q + d_v); everything
pointwise is 0, and a convolution counts its inputs·outputs·k² per pixel.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .models import DiT, DiTConfig, HDiT, HDiTConfig

KINDS = ("linear", "convolution", "neighborhood", "window", "global")


@dataclass(frozen=True)
class Flops:
    """macs: multiply-adds of one forward pass. by_kind: the same by linear | convolution | neighborhood | window |
    global
    (attention's own products). by_level: by "level 0" (outermost; its layers both ways, and the merge and split below
    it) …, "patches", "conditioning". Both dicts add up to macs."""

    macs: int
    by_kind: dict[str, int]
    by_level: dict[str, int]


def count(model: nn.Module, height: int, width: int, batch: int = 1) -> Flops:
    """Count one forward pass of `model` (HDiT, DiT, UViT, or one called as they are) on `batch` images of height x
    width.

    The model is not copied or changed, and its device does no work: for one call, meta tensors stand for its
    parameters.
    """
    if not hasattr(model, "config"):
        raise TypeError(f"model is {type(model).__name__}; it must be an HDiT, a DiT, or have a config as they do")
    for name, value in (("height", height), ("width", width), ("batch", batch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an int of 1 or more")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    config, dtype = model.config, next(model.parameters()).dtype
    x = torch.empty(batch, config.in_channels, height, width, dtype=dtype, device="meta")
    cond = {}
    if config.num_classes:
        cond["class_cond"] = torch.empty(batch, dtype=torch.int64, device="meta")
    if config.mapping_cond_dim:
        cond["mapping_cond"] = torch.empty(batch, config.mapping_cond_dim, dtype=dtype, device="meta")
    sigma = torch.empty(batch, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        torch.func.functional_call(model, meta, (x, sigma), cond)

    by_kind, by_level = defaultdict(int), defaultdict(int)
    for path, operators in _own_counts(counter.get_flop_counts(), type(model).__name__).items():
        module = model.get_submodule(path)
        kind = "convolution" if isinstance(module, nn.Conv2d) else getattr(module, "kind", "linear")
        macs = sum(operators.values()) // 2
        by_kind[kind] += macs
        by_level[_level(model, path)] += macs
    order = [kind for kind in KINDS if kind in by_kind] + sorted(set(by_kind) - set(KINDS))
    return Flops(
        sum(by_kind.values()),
        {kind: by_kind[kind] for kind in order},
        {part: by_level[part] for part in sorted(by_level, key=_order)},
    )


def _own_counts(counts: dict[str, dict], root: str) -> dict[str, dict]:
    """FlopCounterMode counts an operator in every module around it: keep the innermost alone. Keys: module paths."""
    own = {path: dict(operators) for path, operators in counts.items() if path != "Global"}
    for path, operators in counts.items():
        parent = path
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                for operator, flops in operators.items():
                    own[parent][operator] -= flops
                break
    return {path.removeprefix(root).removeprefix("."): operators for path, operators in own.items()}


def _level(model: nn.Module, path: str) -> str:
    part, _, rest = path.partition(".")
    if part in ("down_levels", "up_levels", "merges", "splits"):
        return f"level {rest.partition('.')[0]}"
    if part == "mid_level":
        return f"level {len(model.config.levels) - 1}"
    if part == "blocks":
        return "level 0"
    return "patches" if part in ("patch_in", "patch_out", "out_ada_ln") else "conditioning"


@dataclass(frozen=True)
class Row:
    """One resolution of the table of costs: side in pixels, DiT-B/4 and HDiT-B/4, and the share of DiT's cost that is
    saved."""

    side: int
    dit: Flops
    hdit: Flops

    @property
    def saved(self) -> float:
        return 1 - self.hdit.macs / self.dit.macs


def rows(sides: tuple[int, ...] = (128, 256, 512, 1024)) -> list[Row]:
    """HDiT-B/4 and the pixel DiT-B/4 at square resolutions, as in Table 1 and Figure 2 of the HDiT paper."""
    with torch.device("meta"):
        dit = DiT(DiTConfig.of_size("B", patch_size=4, learn_sigma=True))
        models = {side: HDiT(HDiTConfig.for_resolution(side, side)) for side in sides}
    return [Row(side, count(dit, side, side), count(model, side, side)) for side, model in models.items()]


def main_table(sides: tuple[int, ...] = (128, 256, 512, 1024)) -> str:
    """What `hdit flops` prints: the costs of both models and the share saved, then HDiT's by kind and by level, in
    GMAC."""
    entries = rows(sides)
    kinds = [kind for kind in KINDS if any(kind in row.hdit.by_kind for row in entries)]
    parts = sorted({part for row in entries for part in row.hdit.by_level}, key=_order)
    head = ["pixels", "DiT-B/4", "HDiT-B/4", "saved"]
    cost = [[f"{row.side}²", _giga(row.dit.macs), _giga(row.hdit.macs), f"{row.saved:.2%}"] for row in entries]
    by_kind = [[f"{row.side}²", *(_giga(row.hdit.by_kind.get(kind)) for kind in kinds)] for row in entries]
    by_part = [[f"{row.side}²", *(_giga(row.hdit.by_level.get(part)) for part in parts)] for row in entries]
    return "\n\n".join(
        [
            "GMAC per image and forward pass (1 MAC = 2 FLOP; the paper prints GMAC as GFLOP)",
            table(head, cost),
            "HDiT-B/4 by kind of operation",
            table(["pixels", *kinds], by_kind),
            "HDiT-B/4 by level",
            table(["pixels", *parts], by_part),
        ]
    )


def table(head: list[str], lines: list[list[str]]) -> str:
    """Right-aligned columns as text."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *lines])


def _giga(macs: int | None) -> str:
    return "-" if macs is None else f"{macs / 1e9:,.2f}"


def _order(part: str) -> tuple:
    """Levels first, in their order."""
    name, _, index = part.partition(" ")
    return (0, int(index)) if index else (1, name)

"""hdit export: from what a training run leaves to one model file, for from_pretrained and `hdit sample`, and to a
program of plain PyTorch operators."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import hdit_kernels

from . import k_diffusion
from .files import replacing
from .models import pretrained
from .models.pretrained import Pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUN = ("batches",)  # of a training checkpoint's header: what only the run itself needs


@dataclass
class Export:
    """Make one model file, with its configuration inside, of a checkpoint of hdit train or of k-diffusion."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of hdit train or of k-diffusion (.pth, .safetensors); or a model file, to change its dtype or card."""
    output: Path
    """The file to write, a safetensors file."""
    ema: bool = True
    """The averaged weights; --no-ema takes those of the last step."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the parameters; as in the checkpoint unless given."""
    k_diffusion_config: Path | None = None
    """The JSON configuration of a checkpoint of k-diffusion that does not hold its own."""
    card: str | None = None
    """A description that is kept in the file."""

    program: Path | None = None
    """Also write the network to this file (.pt2) by torch.export, for the resolution that the checkpoint names and any
    batch size. It needs PyTorch alone: torch.export.load(FILE).module()(x, sigma, class_cond=…)."""

    def run(self):
        if self.output.exists() and self.checkpoint.exists() and self.output.samefile(self.checkpoint):
            raise ValueError(f"output {self.output} is the checkpoint itself; it must be another file")
        found = self._read()
        metadata = found.metadata if self.card is None else {**found.metadata, "card": self.card}
        if self.program is not None:
            self._check_program(metadata)
        model = found.model.to(None if self.dtype is None else DTYPES[self.dtype])
        model.save_pretrained(self.output, **metadata)
        print(describe(model, self.output))
        if self.program is not None:
            write_program(model, self.program, *metadata["resolution"])
            print(f"{self.program}: the network for {' x '.join(map(str, metadata['resolution']))} pixels")

    def _check_program(self, metadata: dict) -> None:
        if not self.program.parent.is_dir():
            raise ValueError(f"program {self.program} lies in no existing folder")
        if "resolution" not in metadata:
            raise ValueError(f"program {self.program} needs a resolution, and checkpoint {self.checkpoint} names none")

    def _read(self) -> Pretrained:
        if self.k_diffusion_config is not None:
            return k_diffusion.load_checkpoint(self.checkpoint, _json(self.k_diffusion_config), ema=self.ema)
        if self.checkpoint.suffix != ".safetensors":
            return k_diffusion.load_checkpoint(self.checkpoint, ema=self.ema)
        form = pretrained.read_header(self.checkpoint).get("format")
        if form == pretrained.TRAINING_FORMAT:
            return load_training(self.checkpoint, ema=self.ema)
        if form == pretrained.FORMAT:
            return pretrained.load(self.checkpoint)
        return k_diffusion.load_checkpoint(self.checkpoint, ema=self.ema)


def from_training(checkpoint: str | Path, output: str | Path, *, ema: bool = True, **metadata) -> pretrained.Model:
    """Write the model of a training checkpoint to `output`, with the checkpoint's metadata and these; returns it."""
    found = load_training(checkpoint, ema=ema)
    found.model.save_pretrained(output, **{**found.metadata, **metadata})
    return found.model


def load_training(path: str | Path, *, ema: bool = True) -> Pretrained:
    """The model of a training checkpoint, with its averaged weights or those of the last step, and what the header says
    about it. ValueError as from pretrained.load."""
    header = pretrained.read_header(path)
    if header.get("format") != pretrained.TRAINING_FORMAT:
        raise ValueError(
            f"path {path} has format {header.get('format')!r} in its header; hdit train writes"
            f" {pretrained.TRAINING_FORMAT!r}"
        )
    weights = "ema" if ema else "model"
    model, tensors = pretrained.build(header, path), pretrained.read_tensors(path, f"{weights}.")
    if not tensors:
        raise ValueError(f"path {path} has no tensors named {weights}.…; a checkpoint of hdit train has")
    pretrained.fill(model, tensors, f"path {path}")
    names = [name for name in header if name not in (*pretrained.RESERVED, *RUN)]
    return Pretrained(
        model.eval(), {name: pretrained.from_json(path, header, name) for name in names} | {"weights": weights}
    )


def write_program(model: pretrained.Model, path: Path, height: int, width: int) -> None:
    """Write F(x; sigma) of `model` for images of height x width, in any number, as torch.export makes it.

    Its operators are PyTorch's own (the references of ours), so that it can be loaded and compiled without this
    package. Inputs: x in the parameters' dtype, sigma in float32, and class_cond and mapping_cond by name, where the
    model has them.
    """
    config, dtype = model.config, next(model.parameters()).dtype
    x, sigma = torch.zeros(2, config.in_channels, height, width, dtype=dtype), torch.ones(2)
    cond = {}
    if config.num_classes:
        cond["class_cond"] = torch.zeros(2, dtype=torch.int64)
    if config.mapping_cond_dim:
        cond["mapping_cond"] = torch.zeros(2, config.mapping_cond_dim, dtype=dtype)
    batch = torch.export.Dim("batch", min=1)
    dynamic = {name: {0: batch} for name in ("x", "sigma", *cond)}
    with torch.no_grad(), hdit_kernels.use("reference"):
        program = torch.export.export(model.eval(), (x, sigma), cond, dynamic_shapes=dynamic)
    content = io.BytesIO()
    torch.export.save(program, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def describe(model: pretrained.Model, path: Path) -> str:
    """One line: the file, its class, parameters, size, dtype and hash."""
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    size = path.stat().st_size / 1e6
    name, digest = type(model).__name__, pretrained.sha256(path)
    return f"{path}: {name}, {parameters:,} parameters in {dtype}, {size:,.2f} MB, SHA-256 {digest}"


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"k_diffusion_config {path} cannot be read as JSON: {error}") from error

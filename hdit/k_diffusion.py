"""Models of k-diffusion (github.com/crowsonkb/k-diffusion): its JSON configurations and its checkpoints.

Only ``image_transformer_v2``, which is HDiT. Modules here have k-diffusion's names, so a state dict needs no
translation.
"""

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

from .models import pretrained
from .models.hdit import Global, HDiT, HDiTConfig, Level, Neighborhood, attention_from_dict

MODEL_TYPE = "image_transformer_v2"

# The fields that k-diffusion reads for this type of model: those that shape the model, and those that the loss, the
# noise distribution and the training loop read, or that it shares with other types of models.
SHAPE = {
    *("type", "input_channels", "patch_size", "depths", "widths", "d_ffs", "self_attns", "dropout_rate"),
    *("mapping_width", "mapping_depth", "mapping_d_ff", "mapping_cond_dim", "mapping_dropout_rate"),
}
NOT_SHAPE = {
    *("input_size", "sigma_data", "sigma_min", "sigma_max", "sigma_sample_density", "loss_config", "loss_weighting"),
    *("loss_scales", "noise_perturbation_factor", "augment_prob", "augment_wrapper", "skip_stages", "has_variance"),
}
DATA = {"type", "location", "image_key", "class_key", "num_classes", "cond_dropout_rate", "get_dataset", "config"}
SECTIONS = {
    "model": SHAPE | NOT_SHAPE,
    "dataset": DATA,
    "optimizer": {"type", "lr", "betas", "eps", "weight_decay", "momentum", "nesterov"},
    "lr_sched": {"type", "warmup", "inv_gamma", "power", "num_steps", "decay"},
    "ema_sched": {"type", "power", "max_value"},
}


def model_from_config(config: dict) -> HDiT:
    """The model that k-diffusion builds from this configuration (its JSON, parsed).

    What shapes the model is read from ``model`` and from ``dataset.num_classes``; the fields of training, data,
    optimizer and loss are accepted and not looked at. Absent or null: d_ffs 3 x width, d_head 64, kernel_size 7,
    neighborhood attention with global attention innermost, mapping_width 256, mapping_depth 2, mapping_d_ff 3 x its
    width, mapping_cond_dim 0, dropouts 0, num_classes 0. ValueError for a field that k-diffusion does not have, a
    missing one, lists of different lengths, and values that HDiTConfig refuses.
    """
    return HDiT(hdit_config(config))


def hdit_config(config: dict) -> HDiTConfig:
    """model_from_config's configuration, without the model."""
    _check_names(config)
    model = {name: value for name, value in config["model"].items() if value is not None}
    if model.get("type") != MODEL_TYPE:
        raise ValueError(f"model.type is {model.get('type')!r}; only {MODEL_TYPE} can be loaded")
    for name in ("input_channels", "patch_size", "depths", "widths"):
        if name not in model:
            raise ValueError(f"model.{name} is missing from the k-diffusion configuration; it has no default")
    return HDiTConfig(
        levels=_levels(model),
        patch_size=model["patch_size"],
        in_channels=model["input_channels"],
        out_channels=model["input_channels"],
        num_classes=config.get("dataset", {}).get("num_classes", 0),
        mapping_cond_dim=model.get("mapping_cond_dim", 0),
        mapping_depth=model.get("mapping_depth", 2),
        mapping_width=model.get("mapping_width", 256),
        mapping_d_ff=model.get("mapping_d_ff"),
        mapping_dropout=model.get("mapping_dropout_rate", 0.0),
    )


def load_state_dict(model: HDiT, state_dict: dict[str, Tensor]) -> None:
    """Load a k-diffusion state dict, casting to the model's dtypes and devices; nothing is loaded unless everything
    fits.

    ValueError, in one sentence with every name: missing names, names that the model does not have, and shapes that
    differ.
    """
    pretrained.check_names(model.state_dict(), state_dict)
    model.load_state_dict(state_dict)


def load_checkpoint(path: str | Path, config: dict | None = None, *, ema: bool = True) -> pretrained.Pretrained:
    """The model of a checkpoint of k-diffusion, and its metadata as `hdit train` writes them: objective, resolution.

    path: a training checkpoint (.pth; nothing in it is executed), of which the averaged weights are taken, or with ema
    = False those of the last step; or the safetensors file of its convert_for_inference. config: its JSON, parsed;
    needed where the file does not hold it. ValueError, in one sentence, for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path {path} is no file; it must be a checkpoint of k-diffusion")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
    state_dict, own_config = read(path, "model_ema" if ema else "model")
    config = own_config if config is None else config
    if not isinstance(config, dict):
        raise ValueError(f"path {path} holds no configuration; that of its training, a JSON file, must be given")
    model = model_from_config(config)
    load_state_dict(model, {_without_wrappers(name): tensor for name, tensor in state_dict.items()})
    return pretrained.Pretrained(model.eval(), metadata(config))


def metadata(config: dict) -> dict:
    """What a configuration says about the use of its model. ValueError for an objective other than EDM's."""
    model = {name: value for name, value in config["model"].items() if value is not None}
    loss, weighting = model.get("loss_config", "karras"), model.get("loss_weighting", "karras")
    if loss not in ("karras", "simple") or model.get("has_variance"):
        raise ValueError(f"model.loss_config is {loss!r}; it must be karras or simple, and has_variance false")
    objective = {"type": "edm", "sigma_data": model.get("sigma_data", 1.0), "weighting": weighting}
    objective |= {name: model[name] for name in ("sigma_min", "sigma_max") if name in model}
    size = model.get("input_size")
    resolution = [size, size] if isinstance(size, int) else size
    return {"objective": objective, **({"resolution": resolution} if resolution else {})}


def _read_safetensors(path: Path, weights: str) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors, of these weights where there are several (``model_ema.…``), and the configuration in the header."""
    header, tensors = pretrained.read_header(path), pretrained.read_tensors(path)
    chosen = {name.removeprefix(f"{weights}."): t for name, t in tensors.items() if name.startswith(f"{weights}.")}
    return chosen or tensors, pretrained.from_json(path, header, "config") if "config" in header else None


def _read_pickle(path: Path, weights: str) -> tuple[dict[str, Tensor], dict | None]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise ValueError(f"path {path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if isinstance(content, dict) and content and all(isinstance(t, Tensor) for t in content.values()):
        return content, None
    if not isinstance(content, dict) or not isinstance(content.get(weights), dict):
        raise ValueError(f"path {path} has no {weights!r}; a training checkpoint of k-diffusion has")
    config = content.get("config")
    return content[weights], json.loads(config) if isinstance(config, str) else config


def _without_wrappers(name: str) -> str:
    """The name of a parameter inside the denoiser, DistributedDataParallel and torch.compile."""
    wrappers = ("inner_model.", "module.", "_orig_mod.")
    while name.startswith(wrappers):
        name = name.partition(".")[2]
    return name


def _check_names(config: dict) -> None:
    if "model" not in config:
        raise ValueError("model is missing from the k-diffusion configuration; it holds the model's fields")
    for section, options in config.items():
        if section not in SECTIONS:
            raise ValueError(f"{section!r} is no section of a k-diffusion configuration; it has {', '.join(SECTIONS)}")
        for name in options:
            if name not in SECTIONS[section]:
                known = ", ".join(sorted(SECTIONS[section]))
                raise ValueError(f"{section}.{name} is no field of k-diffusion's {MODEL_TYPE}; {section} has {known}")


def _levels(model: dict) -> tuple[Level, ...]:
    widths = model["widths"]
    dropouts = model.get("dropout_rate", 0.0)
    lists = {
        "widths": widths,
        "depths": model["depths"],
        "d_ffs": model.get("d_ffs") or [None] * len(widths),
        "self_attns": model.get("self_attns"),
        "dropout_rate": dropouts if isinstance(dropouts, list | tuple) else [dropouts] * len(widths),
    }
    for name, values in lists.items():
        if values is not None and len(values) != len(widths):
            raise ValueError(f"model.{name} has {len(values)} entries; model.widths has {len(widths)}, one per level")
    if lists["self_attns"]:
        attentions = [_attention(entry) for entry in lists["self_attns"]]
    else:
        attentions = [Neighborhood()] * (len(widths) - 1) + [Global()]
    rows = zip(lists["depths"], widths, lists["d_ffs"], attentions, lists["dropout_rate"], strict=True)
    return tuple(Level(*row) for row in rows)


def _attention(entry: dict) -> Neighborhood | Global | None:
    if entry.get("type") == "shifted-window" and "window_size" not in entry:
        raise ValueError(f"model.self_attns has {entry}, where window_size is missing; it has no default")
    return attention_from_dict(entry)

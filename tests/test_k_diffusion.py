"""k-diffusion's configurations and checkpoints: its own numbers in float64, and every name accounted for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hdit
from hdit.models import Global, Level, Neighborhood, ShiftedWindow

DATA = Path(__file__).parent / "data"
FLOWERS = {
    "model": {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [256, 256],
        "patch_size": [4, 4],
        "depths": [2, 2, 4],
        "widths": [128, 256, 512],
        "loss_config": "karras",
        "loss_weighting": "soft-min-snr",
        "dropout_rate": [0.0, 0.0, 0.1],
        "augment_prob": 0.0,
        "sigma_data": 0.5,
        "sigma_min": 1e-2,
        "sigma_max": 160,
        "sigma_sample_density": {"type": "cosine-interpolated"},
    },
    "dataset": {"type": "huggingface", "location": "nelorth/oxford-flowers", "image_key": "image"},
    "optimizer": {"type": "adamw", "lr": 5e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-3},
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.75, "max_value": 0.9999},
}


def config_of(name):
    return json.loads((DATA / f"{name}_config.json").read_text())


def changed(path, value):
    """FLOWERS with one field changed; `path` is its section and name."""
    config = copy.deepcopy(FLOWERS)
    section, _, name = path.partition(".")
    if name:
        config[section][name] = value
    else:
        config[section] = value
    return config


def relative(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("load_first", [True, False], ids=["load, then double", "double, then load"])
@pytest.mark.parametrize("name", ["na", "swin"])
def test_outputs_and_gradients_of_the_original(name, load_first):
    """Its angles, up to 31 rad, were rounded to float32; ours are float64 of the same frequencies."""
    model = hdit.k_diffusion.model_from_config(config_of(name))
    model = model if load_first else model.double()
    hdit.k_diffusion.load_state_dict(model, load_file(DATA / f"{name}_model.safetensors"))
    model = model.double()
    io = load_file(DATA / f"{name}_io.safetensors")
    x, sigma, aug, mapping = (io[key].double() for key in ("x", "sigma", "aug_cond", "mapping_cond"))
    x.requires_grad_()
    y = model(x, sigma, aug_cond=aug, class_cond=io["class_cond"], mapping_cond=mapping)
    (y * io["dy"].double()).sum().backward()
    errors = {"y": relative(y, io["y"]), "dx": relative(x.grad, io["dx"])}
    parameters = dict(model.named_parameters())
    for key in io:
        if key.startswith("grad."):
            errors[key] = relative(parameters[key.removeprefix("grad.")].grad, io[key])
    assert len(errors) == 2 + 17
    assert max(errors.values()) < 1e-5, errors


def test_the_flowers_model_with_everything_at_its_default():
    model = hdit.k_diffusion.model_from_config(FLOWERS)
    assert sum(p.numel() for p in model.parameters()) == 22_361_274
    assert model.config == hdit.configs.get("oxford_flowers_256").config
    assert [level.attention for level in model.config.levels] == [Neighborhood(64, 7), Neighborhood(64, 7), Global(64)]


def test_fields_that_shape_the_model_are_read():
    attentions = [
        {"type": "shifted-window", "d_head": 32, "window_size": 4},
        {"type": "none"},
        {"type": "neighborhood", "kernel_size": 5},
    ]
    config = changed("model.self_attns", attentions)
    config["model"] |= {"d_ffs": [7, 8, 9], "dropout_rate": 0.25, "patch_size": [2, 4], "input_channels": 1}
    config["model"] |= {"mapping_width": 96, "mapping_depth": 1, "mapping_d_ff": 40, "mapping_dropout_rate": 0.5}
    config["model"] |= {"mapping_cond_dim": 5, "loss_scales": 3, "has_variance": False}
    config["dataset"] |= {"num_classes": 102, "cond_dropout_rate": 0.1}
    got = hdit.k_diffusion.model_from_config(config).config
    expected = hdit.HDiTConfig(
        levels=(
            Level(2, 128, 7, ShiftedWindow(32, 4), 0.25),
            Level(2, 256, 8, None, 0.25),
            Level(4, 512, 9, Neighborhood(64, 5), 0.25),
        ),
        patch_size=(2, 4),
        in_channels=1,
        out_channels=1,
        num_classes=102,
        mapping_cond_dim=5,
        mapping_depth=1,
        mapping_width=96,
        mapping_d_ff=40,
        mapping_dropout=0.5,
    )
    assert got == expected


def test_null_means_default():
    config = copy.deepcopy(FLOWERS)
    config["model"] |= dict.fromkeys(["d_ffs", "self_attns", "mapping_d_ff"])
    assert hdit.k_diffusion.model_from_config(config).config == hdit.configs.get("oxford_flowers_256").config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (changed("model.kernel", 7), "model.kernel is no field of k-diffusion's image_transformer_v2; model has aug"),
        (changed("dataset.num_clases", 7), "dataset.num_clases is no field of k-diffusion"),
        (changed("optimizer.learning_rate", 7), "optimizer.learning_rate is no field of k-diffusion"),
        (changed("modle", {}), "'modle' is no section of a k-diffusion configuration; it has model, dataset"),
        ({"dataset": {}}, "model is missing from the k-diffusion configuration"),
        (changed("model.type", "image_v1"), "model.type is 'image_v1'; only image_transformer_v2 can be loaded"),
        (changed("model.widths", None), "model.widths is missing from the k-diffusion configuration"),
        (changed("model.depths", [2, 2]), "model.depths has 2 entries; model.widths has 3, one per level"),
        (changed("model.dropout_rate", [0.1]), "model.dropout_rate has 1 entries; model.widths has 3"),
        (changed("model.self_attns", [{"type": "linear"}] * 3), "attention type is 'linear'; it must be one of neigh"),
        (
            changed("model.self_attns", [{"type": "global", "k": 1}] * 3),
            "Global has an unknown field 'k'; it takes d_h",
        ),
        (changed("model.self_attns", [{"type": "shifted-window"}] * 3), "window_size is missing; it has no default"),
    ],
)
def test_bad_configurations_get_one_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        hdit.k_diffusion.model_from_config(config)
    assert "\n" not in str(error.value)


def test_state_dict_is_strict_and_nothing_is_loaded_by_halves():
    """Each fault alone and all three together; every name is in the sentence and the model keeps its parameters."""
    model = hdit.k_diffusion.model_from_config(config_of("na"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    whole = load_file(DATA / "na_model.safetensors")
    missing = {k: v for k, v in whole.items() if k not in ("splits.1.fac", "aug_emb.weight")}
    unexpected = {**whole, "extra.one": torch.ones(1), "down_levels.0.1.ff.up_proj.weight": torch.ones(2, 2)}
    misshaped = {
        **whole,
        "patch_in.proj.weight": whole["patch_in.proj.weight"][:, :5],
        "time_emb.weight": torch.ones(7),
    }
    both = {**misshaped, "extra.one": torch.ones(1)}
    del both["splits.1.fac"]
    for state_dict, names in (
        (missing, ["missing: aug_emb.weight, splits.1.fac"]),
        (unexpected, ["not in the model: extra.one, down_levels.0.1.ff.up_proj.weight"]),
        (misshaped, ["patch_in.proj.weight (32, 5) instead of (32, 48)", "time_emb.weight (7,) instead of (24, 1)"]),
        (
            both,
            ["missing: splits.1.fac", "not in the model: extra.one", "of another shape: patch_in", "time_emb.weight"],
        ),
    ):
        with pytest.raises(ValueError, match="state_dict does not fit this model") as error:
            hdit.k_diffusion.load_state_dict(model, state_dict)
        assert all(name in str(error.value) for name in names), str(error.value)
        assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    hdit.k_diffusion.load_state_dict(model, whole)
    assert all(torch.equal(t, whole[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == whole.keys()  # what is saved here loads there

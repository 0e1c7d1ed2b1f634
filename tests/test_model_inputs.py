"""Configurations and calls of the models: what is accepted, and the one sentence that everything else gets."""

import json

import pytest
import torch
from test_models import MIXED, PLAIN, SMALL_DIT, build, call

from hdit.models import DiTConfig, Global, HDiTConfig, Level, Neighborhood


@pytest.mark.parametrize("config", [MIXED, PLAIN, HDiTConfig((Level(2, 64, attention=None),), 8, feed_forward="gelu")])
def test_configuration_survives_json(config):
    assert HDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dit_configuration_survives_json():
    assert DiTConfig.from_dict(json.loads(json.dumps(SMALL_DIT.to_dict()))) == SMALL_DIT


@pytest.mark.parametrize(
    ("height", "width", "options", "attention", "inner"),
    [
        (128, 128, {}, "ng", (16, 16)),
        (256, 256, {"global_at_32": True}, "ngg", (16, 16)),
        (1024, 1024, {"global_at_32": True}, "nnngg", (16, 16)),
        (384, 640, {}, "nnng", (12, 20)),
        (64, 64, {}, "g", (16, 16)),
        (128, 128, {"patch_size": 2}, "nng", (16, 16)),
        (128, 512, {}, "nng", (8, 32)),
    ],
)
def test_levels_for_a_resolution(height, width, options, attention, inner):
    config = HDiTConfig.for_resolution(height, width, **options)
    letters = {Neighborhood: "n", Global: "g"}
    assert "".join(letters[type(level.attention)] for level in config.levels) == attention
    rows, columns = config.side_multiple
    assert (height // rows, width // columns) == inner


def replaced(config, **changes):
    return lambda: HDiTConfig.from_dict({**config.to_dict(), **changes})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Level(0, 64), "depth is 0; it must be an int of 1 or more"),
        (lambda: Level(1, 100), "d_head is 64; it must be a multiple of 8 that divides the width 100"),
        (lambda: Level(1, 48, attention=Global(12)), "d_head is 12; it must be a multiple of 8"),
        (lambda: Level(1, 64, attention=Neighborhood(64, 0)), "kernel_size is 0; it must be an int of 1 or more"),
        (lambda: Level(1, 64, attention="global"), "attention is 'global'; it must be Neighborhood, ShiftedWindow"),
        (lambda: Level(1, 64, dropout=1.0), r"dropout is 1.0; it must be a number in \[0, 1\)"),
        (
            lambda: HDiTConfig(()),
            "levels is (); it must hold one Level or more".replace("(", r"\(").replace(")", r"\)"),
        ),
        (lambda: HDiTConfig((Level(1, 64),), (4, 0)), r"patch_size is \(4, 0\); it must be a positive int or a"),
        (
            lambda: HDiTConfig((Level(1, 64),), feed_forward="relu"),
            "feed_forward is 'relu'; it must be one of geglu, gelu",
        ),
        (lambda: HDiTConfig((Level(1, 64),), mapping_width=33), "mapping_width is 33; it must be even"),
        (replaced(PLAIN, depth=3), "HDiTConfig has an unknown field 'depth'; it takes levels, patch_size"),
        (replaced(PLAIN, levels=[{"depth": 1, "width": 8, "n": 1}]), "Level has an unknown field 'n'; it takes depth"),
        (
            replaced(PLAIN, levels=[{"depth": 1, "width": 64, "attention": {"type": "linear"}}]),
            "attention type is 'linear'; it must be one of neighborhood, shifted-window, global, none",
        ),
        (
            replaced(PLAIN, levels=[{"depth": 1, "width": 64, "attention": {"type": "global", "kernel_size": 7}}]),
            "Global has an unknown field 'kernel_size'; it takes d_head",
        ),
        (lambda: HDiTConfig.from_dict({}), "levels is missing from the configuration"),
        (lambda: HDiTConfig.for_resolution(250, 256), "250 x 256; both must divide by 16, as 256 x 256 does"),
        (lambda: DiTConfig.of_size("H"), "size is 'H'; it must be one of S, B, L, XL"),
        (lambda: DiTConfig(width=770), "width is 770; it must divide by heads 12"),
        (lambda: DiTConfig.from_dict({"levels": 3}), "DiTConfig has an unknown field 'levels'; it takes depth, width"),
    ],
)
def test_bad_configurations_get_one_sentence(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


BAD_CALLS = {
    "sides": ({"x": torch.randn(2, 3, 32, 40)}, "x is 32 x 40 pixels; this model needs a height divisible by 16"),
    "channels": ({"x": torch.randn(2, 4, 32, 64)}, r"x is \(2, 4, 32, 64\) torch.float32; it must be floating point"),
    "rank": ({"x": torch.randn(3, 32, 64)}, r"x is \(3, 32, 64\) .* of shape \(B, 3, H, W\)"),
    "integers": ({"x": torch.ones(2, 3, 32, 64, dtype=torch.uint8)}, "x is .* torch.uint8; it must be floating point"),
    "small": ({"x": torch.randn(2, 3, 16, 16)}, "level 0 has 4 x 4 tokens; its kernel_size 5 needs as many"),
    "windows": (
        {"x": torch.randn(2, 3, 48, 48)},
        "level 1 has 6 x 6 tokens; both must be divisible by its window_size 4",
    ),
    "sigma's shape": ({"sigma": torch.ones(3)}, r"sigma is \(3,\) torch.float32; .* of shape \(2,\)"),
    "sigma's column": ({"sigma": torch.ones(2, 1)}, r"sigma is \(2, 1\) torch.float32; .* of shape \(2,\)"),
    "a number": ({"sigma": 1.0}, r"sigma is 1.0; it must be floating point of shape \(2,\)"),
    "augmentation": ({"aug_cond": torch.zeros(2, 8)}, r"aug_cond is \(2, 8\) .* of shape \(2, 9\)"),
    "no class": ({"class_cond": None}, "class_cond is missing; this model has num_classes = 10"),
    "class dtype": ({"class_cond": torch.ones(2)}, "class_cond is .* torch.float32; it must be int64 or int32"),
    "class range": (
        {"class_cond": torch.tensor([0, 11])},
        "class_cond has values from 0 to 11; .* 0 … 9, or 10 for no",
    ),
    "class sign": ({"class_cond": torch.tensor([-1, 1])}, "class_cond has values from -1 to 1"),
    "no custom": ({"mapping_cond": None}, "mapping_cond is missing; this model has mapping_cond_dim = 6"),
    "custom": ({"mapping_cond": torch.zeros(2, 5)}, r"mapping_cond is \(2, 5\) .* of shape \(2, 6\)"),
}


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_bad_calls_get_one_sentence_before_any_work(fault):
    model = build(MIXED, torch.float32)
    worked = []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda *args: worked.append(1))
    x, sigma, cond = call(MIXED, dtype=torch.float32)
    arguments, sentence = BAD_CALLS[fault]
    with pytest.raises(ValueError, match=sentence) as error:
        model(**{"x": x, "sigma": sigma, **cond, **arguments})
    assert not worked and "\n" not in str(error.value)
    if fault not in ("small", "windows", "sides"):
        with pytest.raises(ValueError, match=sentence):
            build(SMALL_DIT, torch.float32)(**{"x": x, "sigma": sigma, **cond, **arguments})


def test_conditioning_that_the_model_does_not_have_is_refused():
    x, sigma, cond = call(MIXED, dtype=torch.float32)
    with pytest.raises(ValueError, match="class_cond is given; this model has num_classes = 0"):
        build(PLAIN, torch.float32)(x, sigma, class_cond=cond["class_cond"])
    with pytest.raises(ValueError, match="mapping_cond is given; this model has mapping_cond_dim = 0"):
        build(PLAIN, torch.float32)(x, sigma, mapping_cond=cond["mapping_cond"])

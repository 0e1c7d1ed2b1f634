"""U-ViT and the wavelet: formulas spelt out in another way, sizes of the published ones, and where its parts act.

What holds for all models (a fresh one is zero, precision, compilation, checkpointing) is in test_models.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import MIXED, SMALL_UVIT, build, call

from hdit import configs, flops
from hdit.models import UViT, UViTConfig, UViTLevel, from_config, layers, uvit, wavelet

WIDTH = 32  # of the conditioning in the tests of blocks
BLOCKS_CONFIG = UViTConfig((UViTLevel(1, 32),), embedding_width=WIDTH)


def random_block(cls, level):
    torch.manual_seed(0)
    block = cls(BLOCKS_CONFIG, level).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return block, torch.randn(2, 4, 6, level.width).double(), torch.randn(2, WIDTH).double()


# ---- the wavelet -----------------------------------------------------------------------------------------------------


def line(x):
    """One level along a line, sample by sample, with the borders mirrored: means, details."""
    n = len(x)

    def at(values, i):  # mirrored without repeating the border sample: x[n] is x[n − 2]
        return values[i] if 0 <= i < n else values[-i if i < 0 else 2 * (n - 1) - i]

    y = [x[i] - (at(x, i - 1) + at(x, i + 1)) / 2 if i % 2 else x[i] for i in range(n)]
    y = [y[i] + (at(y, i - 1) + at(y, i + 1)) / 4 if i % 2 == 0 else y[i] for i in range(n)]
    return y[0::2], y[1::2]


def plane(x):
    """One level of a plane (H, W): the four bands, in the order of the channels."""
    rows = [np.array(band) for band in zip(*(line(list(column)) for column in x.T), strict=True)]
    halves = [band.T for band in rows]  # means, details along y: each (H/2, W)
    both = [[np.array(part) for part in zip(*(line(list(row)) for row in half), strict=True)] for half in halves]
    return [both[0][0], both[1][0], both[0][1], both[1][1]]


@pytest.mark.parametrize(("height", "width"), [(8, 12), (2, 4), (4, 2)])
def test_wavelet_equals_lifting_sample_by_sample(height, width):
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    got = wavelet.analyse(x)
    for image in range(2):
        for channel in range(3):
            bands = plane(x[image, :, :, channel].numpy())
            for i, band in enumerate(bands):
                expected = torch.from_numpy(np.ascontiguousarray(band))
                torch.testing.assert_close(got[image, :, :, 3 * i + channel], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_wavelet_is_exactly_inverted(levels):
    x = torch.randn(2, 16, 24, 3, dtype=torch.float64)
    y = wavelet.analyse(x, levels)
    assert y.shape == (2, 16 >> levels, 24 >> levels, 3 << 2 * levels)
    assert (wavelet.synthesise(y, levels) - x).abs().max() < 1e-12
    other = torch.randn_like(y)
    assert (wavelet.analyse(wavelet.synthesise(other, levels), levels) - other).abs().max() < 1e-12


def test_wavelet_levels_nest_and_a_ramp_has_no_details():
    x = torch.randn(1, 8, 8, 2, dtype=torch.float64)
    first, second = wavelet.analyse(x), wavelet.analyse(x, 2)
    torch.testing.assert_close(second[..., :8], wavelet.analyse(first[..., :2]), rtol=0, atol=1e-12)
    # Finer details keep their places: the four of a 2 x 2 patch, row by row.
    fine = second[..., 8:].unflatten(-1, (2, 2, 6)).permute(0, 1, 3, 2, 4, 5).reshape(1, 4, 4, 6)
    torch.testing.assert_close(fine, first[..., 2:], rtol=0, atol=1e-12)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = wavelet.analyse((3 * y - 2 * x + 5)[None, ..., None].double())
    assert ramp[0, 1:-1, 1:-1, 1:].abs().max() < 1e-12
    torch.testing.assert_close(ramp[0, 1:-1, 1:-1, 0], (3 * y - 2 * x + 5)[2:-2:2, 2:-2:2].double())


def test_space_to_depth_is_the_order_of_token_merges():
    x = torch.randn(2, 6, 9, 4)
    merge = layers.TokenMerge(4, 36, (3, 3))
    torch.nn.init.eye_(merge.proj.weight)
    assert torch.equal(wavelet.space_to_depth(x, 3), merge(x))
    assert torch.equal(wavelet.depth_to_space(merge(x), 3), x)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_residual_block_equals_its_formula():
    block, x, emb = random_block(uvit.ResBlock, UViTLevel(1, 32))

    def normed(h, norm):  # 8 groups of 4 channels, statistics of each over its channels and all positions
        groups = h.unflatten(1, (8, 4))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).square().mean((2, 3, 4), keepdim=True)
        h = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return h * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = x.permute(0, 3, 1, 2)
    h = normed(h, block.in_norm)
    h = F.conv2d(h * torch.sigmoid(h), block.in_conv.weight, block.in_conv.bias, padding=1)
    film = emb @ block.film.weight.T + block.film.bias
    h = normed(h, block.out_norm) * (1 + film[:, :32, None, None]) + film[:, 32:, None, None]
    h = F.conv2d(h * torch.sigmoid(h), block.out_conv.weight, block.out_conv.bias, padding=1)
    torch.testing.assert_close(block(x, emb), x + h.permute(0, 2, 3, 1), rtol=1e-11, atol=1e-11)


def test_attention_equals_its_formula():
    block, x, emb = random_block(uvit.Attention, UViTLevel(1, 32, "transformer", d_head=16))

    def normed(t, norm):
        deviation = t - t.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + (
            0 if norm.bias is None else norm.bias
        )

    qkv = normed(x, block.norm).reshape(2, 24, 32) @ block.qkv.weight.T + block.qkv.bias
    out = []
    for head in range(2):
        q, k, v = (qkv[..., 32 * i + 16 * head : 32 * i + 16 * head + 16] for i in range(3))
        logits = normed(q, block.q_norm) @ normed(k, block.k_norm).transpose(1, 2) / 4
        out.append(logits.softmax(-1) @ v)
    expected = torch.cat(out, -1) @ block.proj.weight.T + block.proj.bias
    torch.testing.assert_close(block(x, emb), x + expected.reshape(x.shape), rtol=1e-10, atol=1e-10)


def test_mlp_equals_its_formula():
    block, x, emb = random_block(uvit.MLP, UViTLevel(1, 32, "transformer", d_head=16))
    h = F.layer_norm(x, (32,), block.norm.weight, block.norm.bias) @ block.up.weight.T + block.up.bias
    film = emb @ block.film.weight.T + block.film.bias
    h = h * torch.sigmoid(h) * (1 + film[:, None, None, :128]) + film[:, None, None, 128:]
    expected = x + h @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["average", "dwt", "strided"])
def test_upsampling_goes_back_where_downsampling_came_from(kind):
    """With projections that keep all features: wavelet and patches lose nothing, averages keep the averages."""
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    down, up = (cls(kind, *sizes).double() for cls, sizes in ((uvit.Downsample, (3, 12)), (uvit.Upsample, (12, 3))))
    for module in (down, up):
        torch.nn.init.eye_(module.proj.weight)
        torch.nn.init.zeros_(module.proj.bias)
    y = up(down(x))
    if kind == "average":
        means = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
        torch.testing.assert_close(y, means.repeat_interleave(2, 1).repeat_interleave(2, 2))
    else:
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patching", ["dwt", "strided"])
def test_patches_are_undone_at_the_end(patching):
    """What reaches the last convolution is laid out as what the first one reads."""
    model = build(replace(SMALL_UVIT, patch_size=4, patching=patching))
    x = torch.randn(2, 16, 24, 3, dtype=torch.float64)
    torch.testing.assert_close(model._to_pixels(model._to_patches(x)), x, rtol=0, atol=1e-12)
    inputs = []
    model.patch_in.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    x, sigma, cond = call(SMALL_UVIT, 32, 48)
    model(x, sigma, **cond)
    own = wavelet.analyse(x.movedim(1, -1), 2) if patching == "dwt" else wavelet.space_to_depth(x.movedim(1, -1), 4)
    torch.testing.assert_close(inputs[0].movedim(1, -1), own)


def test_every_block_on_the_way_up_takes_the_result_of_its_counterpart():
    config = replace(SMALL_UVIT, levels=(UViTLevel(2, 16), UViTLevel(2, 32), SMALL_UVIT.levels[-1]))
    model = build(config)
    seen = {}

    def watch(path):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda module, args, out: seen.update({path: (args[0], out)}))

    for i in range(2):
        for path in (f"splits.{i}", *(f"{way}_levels.{i}.{j}" for way in ("down", "up") for j in range(2))):
            watch(path)
    x, sigma, cond = call(config)
    model(x, sigma, **cond)
    for i in range(2):
        for j in range(2):
            before = seen[f"splits.{i}" if j == 0 else f"up_levels.{i}.0"][1]
            expected = (before + seen[f"down_levels.{i}.{1 - j}"][1]) / math.sqrt(2)
            torch.testing.assert_close(seen[f"up_levels.{i}.{j}"][0], expected, rtol=1e-12, atol=1e-12)


def test_positions_reach_attention_and_convolutions_need_none():
    """Without attention a constant image has constant features inside; where there is attention, they differ. Each
    level with attention gets its own, once."""
    x, sigma, cond = torch.ones(1, 3, 64, 64).double(), torch.ones(1).double(), {}
    plain = replace(SMALL_UVIT, num_classes=0, mapping_cond_dim=0, downsampling="average", patch_size=1)
    for kind in ("convolution", "transformer"):
        levels = (UViTLevel(1, 16), UViTLevel(1, 16, kind, d_head=16))
        y = build(replace(plain, levels=levels))(x, sigma, **cond)[..., 24:40, 24:40]
        assert (y.amax((2, 3)) - y.amin((2, 3)) < 1e-9).all() == (kind == "convolution")
    model, grids = build(SMALL_UVIT), []
    model.positions.register_forward_hook(lambda module, args, out: grids.append(tuple(out.shape[1:])))
    x, sigma, cond = call(SMALL_UVIT)
    model(x, sigma, **cond)
    assert grids == [(8, 16, 32), (4, 8, 32)]


@pytest.mark.parametrize("downsampling", ["average", "dwt", "strided"])
def test_gradients_equal_differences(downsampling):
    levels = tuple(
        replace(level, depth=1, width=width, d_head=4)
        for level, width in zip(SMALL_UVIT.levels, (4, 8, 8), strict=True)
    )
    tiny = replace(SMALL_UVIT, levels=levels, downsampling=downsampling, embedding_width=4)
    model = build(tiny)
    x, sigma, cond = call(tiny, 8, 16, batch=1)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x, sigma), cond)

    leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("config", [MIXED, SMALL_UVIT], ids=["hdit", "uvit"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_dropout_acts_on_the_levels_that_ask_for_it_and_in_training_only(config, place):
    levels = [replace(level, dropout=0.5 if i == place else 0.0) for i, level in enumerate(config.levels)]
    model = build(replace(config, levels=tuple(levels)))
    x, sigma, cond = call(config)
    changed = {}
    stacks = {0: "down_levels.0", 1: "down_levels.1", 2: "mid_level", 3: "up_levels.1", 4: "up_levels.0"}
    for at, path in stacks.items():
        for block in model.get_submodule(path):
            block.register_forward_hook(
                lambda m, args, out, at=at: changed.setdefault(at, []).append(m.forward(*args) - out)
            )
    model.train()(x, sigma, **cond)
    noisy = {at for at, differences in changed.items() if any(d.abs().max() > 0 for d in differences)}
    assert noisy == {2} if place == 2 else noisy == {place, 4 - place}
    assert torch.equal(model.eval()(x, sigma, **cond), model(x, sigma, **cond))


@pytest.mark.parametrize(("name", "millions"), [("uvit_imagenet_64", 394), ("uvit_imagenet_128", 397)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = from_config(configs.get(name).config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_count_by_hand():
    """Images of 16 x 32, patches of 2: 8 x 16, 4 x 8 and 2 x 4 positions."""
    counted = flops.count(build(SMALL_UVIT, torch.float32), 16, 32, batch=3)
    convolutions = 128 * 9 * (12 * 16 + 16 * 12) + 128 * 9 * 4 * 16 * 16 + 32 * 9 * 4 * 32 * 32
    attention = 2 * 32 * 32 * 2 * 32 + 2 * 8 * 8 * 2 * 32  # two blocks of the middle level, two of the trunk
    trunk = 8 * 2 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 32 * 256
    sampling = 32 * 4 * 16 * 32 + 8 * 4 * 32 * 32 + 8 * 32 * 4 * 32 + 32 * 32 * 4 * 16
    films = 2 * 32 * 2 * 16 + 2 * 32 * 2 * 32
    embeddings = 256 * 32 + 32 * 32 + 9 * 32 + 6 * 32
    linear = trunk + 2 * 32 * 4 * 32 * 32 + sampling + films + embeddings
    assert counted.by_kind == {"linear": 3 * linear, "convolution": 3 * convolutions, "global": 3 * attention}
    assert counted.by_level["patches"] == 3 * 128 * 9 * (12 * 16 + 16 * 12)
    assert counted.by_level["conditioning"] == 3 * embeddings
    assert counted.by_level["level 2"] == 3 * (trunk + 2 * 8 * 8 * 2 * 32)
    assert sum(counted.by_level.values()) == counted.macs == sum(counted.by_kind.values())


def test_parameter_groups():
    model = UViT(SMALL_UVIT)
    groups = model.param_groups(lr=1e-3, weight_decay=0.1)
    names = {p: name for name, p in model.named_parameters()}
    members = [names[p] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(names.values())
    decays = {names[p] for p in groups[0]["params"]}
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0)]
    block = "down_levels.1.0"
    for name in (
        f"{block}.0.in_conv.weight",
        f"{block}.1.qkv.weight",
        "mid_level.0.1.up.weight",
        "merges.0.proj.weight",
    ):
        assert name in decays
    for name in ("time_mlp.0.weight", "class_emb.weight", "mid_level.0.1.up.bias", f"{block}.0.in_norm.weight"):
        assert name not in decays


@pytest.mark.parametrize("kind", ["transformer", "convolution-attention"], ids=["U-ViT", "U-Net"])
def test_a_few_steps_of_training_learn_one_batch(kind):
    torch.manual_seed(0)
    model = UViT(UViTConfig((UViTLevel(1, 16), UViTLevel(1, 32, kind, d_head=16)), embedding_width=32))
    x, target = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0])
    optimizer = torch.optim.AdamW(model.param_groups(lr=3e-3))
    losses = []
    for _ in range(60):
        loss = (model(x, sigma) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: UViTLevel(0, 64), "depth is 0; it must be an int of 1 or more"),
        (lambda: UViTLevel(1, 64, "linear"), "kind is 'linear'; it must be one of convolution, transformer"),
        (lambda: UViTLevel(1, 96, "transformer"), "width is 96; where there is attention it must divide by d_head 64"),
        (lambda: UViTLevel(1, 64, dropout=-0.1), r"dropout is -0.1; it must be a number in \[0, 1\)"),
        (lambda: UViTConfig(()), r"levels is \(\); it must hold one UViTLevel or more"),
        (lambda: replace(SMALL_UVIT, patch_size=3), "patch_size is 3; it must be a power of two"),
        (lambda: replace(SMALL_UVIT, patching="haar"), "patching is 'haar'; it must be one of dwt, strided"),
        (lambda: replace(SMALL_UVIT, downsampling="max"), "downsampling is 'max'; it must be one of average, dwt"),
        (lambda: UViTConfig.from_dict({}), "levels is missing from the configuration"),
        (
            lambda: UViTConfig.from_dict({"levels": [{"depth": 1, "width": 8, "n": 1}]}),
            "UViTLevel has an unknown field",
        ),
        (lambda: build(SMALL_UVIT)(torch.ones(1, 3, 20, 16), torch.ones(1)), "x is 20 x 16 pixels; this model needs"),
    ],
)
def test_bad_configurations_and_sizes_get_one_sentence(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        make()
    assert "\n" not in str(error.value)

"""The FLOP counter reproduces the numbers of the papers, and a count by hand."""

import time

import pytest
import torch

import hdit
from hdit import configs, flops
from hdit.models import DiT, DiTConfig, Global, HDiT, HDiTConfig, Level, Neighborhood, ShiftedWindow


def meta(config):
    with torch.device("meta"):
        return (HDiT if isinstance(config, HDiTConfig) else DiT)(config)


def giga(config, side):
    return flops.count(meta(config), side, side).macs / 1e9


@pytest.mark.parametrize(
    ("name", "parameters", "side", "gmac"),
    [
        ("imagenet_128", 117.0e6, 128, 31.37),
        ("ffhq_1024", 85.08e6, 1024, 206.08),
        ("imagenet_256", 557.4e6, 256, 197.59),
        ("oxford_flowers_256", 22_361_274, 256, 11.636),
        ("oxford_flowers_256_window", 22_361_274, 256, 11.730),
    ],
)
def test_published_configurations_to_the_printed_digit(name, parameters, side, gmac):
    published = configs.get(name)
    assert published.resolution == (side, side)
    count = sum(p.numel() for p in meta(published.config).parameters())
    assert float(f"{count:.{4 if count != parameters else 8}g}") == parameters
    assert round(giga(published.config, side), 2 if gmac > 20 else 3) == gmac


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("oxford_flowers_256", (2.861, 11.636, 49.756, 250.55)),
        ("oxford_flowers_256_window", (2.885, 11.730, 50.133, 252.06)),
    ],
)
def test_flowers_over_resolutions(name, expected):
    for side, gmac in zip((128, 256, 512, 1024), expected, strict=True):
        assert giga(configs.get(name).config, side) == pytest.approx(gmac, abs=0.5 * (1e-2 if side == 1024 else 1e-3))


def test_table_of_the_paper():
    """DiT's column to 0.01 %, HDiT's rounded as printed, and the share saved to 0.1 % and 0.01 %."""
    expected = {128: (106.46, 31), 256: (657.63, 65), 512: (6341.23, 198), 1024: (84738.4, 732)}
    saved = {128: 70.6, 256: 90.2, 512: 96.9, 1024: 99.14}
    rows = flops.rows()
    assert [row.side for row in rows] == list(expected)
    for row in rows:
        dit, ours = expected[row.side]
        assert row.dit.macs / 1e9 == pytest.approx(dit, rel=1e-4)
        assert round(row.hdit.macs / 1e9) == ours
        assert 100 * row.saved == pytest.approx(saved[row.side], abs=0.06 if row.side < 1024 else 0.006)
        assert giga(configs.get(f"hdit_b4_{row.side}").config, row.side) == row.hdit.macs / 1e9
    assert giga(configs.get("dit_b4").config, 128) == rows[0].dit.macs / 1e9


@pytest.mark.parametrize(
    ("local", "expected"),
    [(Global(), (32, 114, 1060)), (Neighborhood(), (29, 60, 184)), (ShiftedWindow(64, 8), (29, 60, 185))],
    ids=["global", "neighborhood", "window"],
)
def test_ablation_with_gelu(local, expected):
    levels = {"local": Level(2, 384, 1536, local), "inner": Level(11, 768, 3072, Global())}
    for side, gmac in zip((128, 256, 512), expected, strict=True):
        config = HDiTConfig.for_resolution(side, side, **levels, feed_forward="gelu")
        assert round(giga(config, side)) == gmac


@pytest.mark.parametrize(
    ("size", "expected"),
    [("S", (0.36, 1.41, 6.06)), ("B", (1.42, 5.56, 23.0)), ("L", (5.01, 19.7, 80.7)), ("XL", (7.39, 29.0, 118.6))],
)
def test_latent_dits(size, expected):
    """Table 4 of the DiT paper: 4 x 32 x 32 latents, sigma learned; B/4 is printed truncated."""
    for patch, gmac in zip((8, 4, 2), expected, strict=True):
        config = DiTConfig.of_size(size, patch_size=patch, in_channels=4, learn_sigma=True)
        printed_digit = 10 ** -len(str(gmac).partition(".")[2])
        assert abs(giga(config, 32) - gmac) < (printed_digit if gmac == 5.56 else printed_digit / 2)


def test_count_by_hand_by_kind_and_by_level():
    config = HDiTConfig(
        levels=(
            Level(1, 32, 40, Neighborhood(16, 5)),
            Level(2, 48, 56, ShiftedWindow(16, 4)),
            Level(3, 64, 72, Global(16)),
        ),
        patch_size=2,
        mapping_depth=2,
        mapping_width=24,
        num_classes=4,
        mapping_cond_dim=6,
    )
    batch, h, w = 3, 64, 32  # tokens: 32 x 16, 16 x 8, 8 x 4
    n0, n1, n2 = (batch * (h // s) * (w // s) for s in (2, 4, 8))

    def layer(n, width, d_ff):
        """qkv, out, up, down for n tokens, and two AdaRMSNorms per image."""
        return n * (4 * width**2 + 3 * width * d_ff) + batch * 2 * 24 * width

    merge_split = n1 * 4 * 32 * 48 * 2, n2 * 4 * 48 * 64 * 2
    attention = {
        "neighborhood": 2 * n0 * 2 * 32 * 25,
        "window": 4 * n1 * 2 * 48 * 16,
        "global": 3 * n2 * 2 * 64 * 8 * 4,
    }
    by_level = {
        "level 0": 2 * layer(n0, 32, 40) + merge_split[0] + attention["neighborhood"],
        "level 1": 4 * layer(n1, 48, 56) + merge_split[1] + attention["window"],
        "level 2": 3 * layer(n2, 64, 72) + attention["global"],
        "conditioning": batch * (2 * 24 * 24 + 6 * 24 + 2 * 3 * 24 * 72),
        "patches": n0 * 2 * 12 * 32,
    }
    got = flops.count(meta(config), h, w, batch)
    assert got.by_level == by_level and list(got.by_level) == list(by_level)
    assert got.macs == sum(by_level.values())
    assert got.by_kind == {"linear": got.macs - sum(attention.values()), **attention}


def test_counting_leaves_the_model_alone_and_takes_no_time_or_memory():
    """A DiT-B/4 at 4096² would need 10¹³ bytes for one attention matrix."""
    torch.manual_seed(0)
    model = HDiT(HDiTConfig((Level(1, 32, attention=Global(16)),), mapping_width=32)).train()
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    first = flops.count(model, 64, 64)
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is before[name][0] and torch.equal(t, before[name][1])
    assert model.training and first == flops.count(model, 64, 64)
    start = time.perf_counter()
    big = flops.count(meta(DiTConfig.of_size("B", learn_sigma=True)), 4096, 4096)
    assert big.by_kind["global"] == 12 * (1024 * 1024) ** 2 * 2 * 768
    assert time.perf_counter() - start < 30


def test_bad_arguments_get_one_sentence():
    model = meta(HDiTConfig((Level(1, 32, attention=Global(16)),)))
    with pytest.raises(TypeError, match="model is Linear; it must be an HDiT, a DiT, or have a config"):
        flops.count(torch.nn.Linear(2, 2), 64, 64)
    with pytest.raises(ValueError, match="batch is 0; it must be an int of 1 or more"):
        flops.count(model, 64, 64, 0)
    with pytest.raises(ValueError, match="x is 64 x 66 pixels; this model needs a height divisible by 4"):
        flops.count(model, 64, 66)


def test_printed_table():
    text = flops.main_table((128, 512))
    lines = [line.split() for line in text.splitlines()]
    assert ["128²", "106.46", "31.35", "70.55%"] in lines and ["512²", "6,341.23", "198.08", "96.88%"] in lines
    assert ["pixels", "linear", "neighborhood", "global"] in lines and ["128²", "30.09", "0.15", "1.11"] in lines
    by_level = text.partition("by level")[2].split()
    assert " ".join(by_level[:10]) == "pixels level 0 level 1 level 2 level 3 conditioning"
    assert by_level[10:16] == ["patches", "128²", "8.61", "22.70", "-", "-"]


def test_names_of_configurations():
    assert {"imagenet_128", "ffhq_1024", "imagenet_256", "oxford_flowers_256", "dit_b4"} <= set(configs.names())
    for name in configs.names():
        published = configs.get(name)
        rows, columns = published.config.side_multiple
        assert published.resolution[0] % rows == published.resolution[1] % columns == 0
        assert type(published.config).from_dict(published.config.to_dict()) == published.config
    with pytest.raises(
        ValueError, match=r"configuration 'imagenet_64' does not exist; there are .*imagenet_128, ffhq_1024"
    ):
        configs.get("imagenet_64")
    assert hdit.configs.get("ffhq_1024").training.augment_prob == 0.12

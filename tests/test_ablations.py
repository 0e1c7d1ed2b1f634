"""The papers' ablations: what each switch of HDiT computes, what each row changes, and that small versions run."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from test_models import PLAIN, build, call

from hdit import configs, flops
from hdit.configs import ablations
from hdit.diffusion import losses
from hdit.models import DiTConfig, HDiT, HDiTConfig, from_config, layers
from hdit.train import Train
from hdit.train_step import Trainer

TABLES = {"HDiT": ablations.HDIT, "simple diffusion": ablations.SIMPLE_DIFFUSION}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


def observed(model, path, *arguments, **cond):
    """Inputs and output of a module during a call of the model."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append((args, out)))
    model(*arguments, **cond)
    handle.remove()
    return seen[0]


# ---- the switches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", ["lerp", "add", "concat"])
def test_skips(skip):
    model = build(replace(PLAIN, skip=skip))
    split = model.splits[0]
    (x, outer), got = observed(model, "splits.0", *call(PLAIN)[:2])
    inner = F.pixel_shuffle(
        (x @ split.proj.weight.T).unflatten(-1, (4, 32)).transpose(-1, -2).flatten(-2).movedim(-1, 1), 2
    )
    inner = inner.movedim(1, -1)
    expected = {
        "lerp": lambda: outer + split.fac * (inner - outer),
        "add": lambda: inner + outer,
        "concat": lambda: inner @ split.skip_proj.weight[:, :32].T + outer @ split.skip_proj.weight[:, 32:].T,
    }[skip]()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_ada_layer_norm():
    norm = build(replace(PLAIN, norm="ada-layer-norm")).mid_level[0].self_attn.norm
    x, cond = torch.randn(2, 3, 5, 32).double() + 2, torch.randn(2, 32).double()
    shift, scale = (cond @ half.T for half in norm.linear.weight.chunk(2))
    deviation = x - x.mean(-1, keepdim=True)
    unit = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = unit * (1 + scale[:, None, None]) + shift[:, None, None]
    torch.testing.assert_close(norm(x, cond), expected, rtol=1e-11, atol=1e-11)


def test_norm_is_that_of_all_blocks_and_of_no_other():
    model = HDiT(replace(PLAIN, norm="ada-layer-norm"))
    kinds = {type(m) for name, m in model.named_modules() if name.endswith(".norm") and "mapping" not in name}
    assert kinds == {layers.AdaLayerNorm}
    assert type(model.out_norm) is type(model.mapping.in_norm) is layers.RMSNorm


def test_output_gate():
    config = replace(PLAIN, output_gate=True)
    gated, plain = build(config), build(PLAIN)
    plain.load_state_dict({name: t for name, t in gated.state_dict().items() if ".gate." not in name})
    ff, ungated = gated.mid_level[0].ff, plain.mid_level[0].ff
    x, cond = torch.randn(2, 3, 5, 32).double(), torch.randn(2, 32).double()
    gate = (cond @ ff.gate.weight.T)[:, None, None]
    torch.testing.assert_close(ff(x, cond), x + gate * (ungated(x, cond) - x), rtol=1e-11, atol=1e-11)


def test_a_fresh_output_gate_is_closed_and_can_open():
    torch.manual_seed(0)
    model = HDiT(replace(PLAIN, output_gate=True)).double()
    torch.nn.init.normal_(model.patch_out.proj.weight)
    (x, _), out = observed(model, "mid_level.0.ff", *call(PLAIN)[:2])
    assert torch.equal(x, out)
    y = model(*call(PLAIN)[:2])
    y.square().sum().backward()
    assert model.mid_level[0].ff.gate.weight.grad.abs().max() > 0
    slow = {id(p) for group in model.param_groups() if group["lr"] < 5e-4 for p in group["params"]}
    assert id(model.mid_level[0].ff.gate.weight) in slow


@pytest.mark.parametrize("position", ["sin-cos", "learned"])
def test_added_positions(position):
    """Level 0 gets them once; attention turns nothing."""
    grid = (8, 16) if position == "learned" else None
    model = build(replace(PLAIN, position=position, position_grid=grid))
    x, sigma, _ = call(PLAIN)
    entry = observed(model, "patch_in", x, sigma)[1]
    (first, cond, positions), out = observed(model, "down_levels.0.0", x, sigma)
    if position == "learned":
        added = model.position.table.permute(1, 2, 0)
    else:
        added = layers.grid_positions(8, 16, 32, torch.float64, x.device)
    torch.testing.assert_close(first, entry + added, rtol=1e-12, atol=1e-12)
    elsewhere = tuple(3 * p + 1 for p in positions)
    assert torch.equal(model.down_levels[0][0](first, cond, elsewhere), out)
    turned = build(PLAIN).down_levels[0][0]
    assert not torch.equal(turned(first, cond, elsewhere), turned(first, cond, positions))


def test_learned_positions_on_another_grid_are_interpolated():
    position = layers.LearnedPosition((4, 4), 3).double()
    ramp = torch.arange(4).double()
    position.table.data = torch.stack((ramp[:, None].expand(4, 4), ramp.expand(4, 4), torch.full((4, 4), 7.0).double()))
    got = position(torch.zeros(1, 8, 4, 3).double())[0]
    rows = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).double()  # centres of the halves, ends kept
    torch.testing.assert_close(
        got, torch.stack((rows[:, None].expand(8, 4), ramp.expand(8, 4), torch.full((8, 4), 7.0).double()), -1)
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"skip": "sum"}, "skip is 'sum'; it must be one of lerp, add, concat"),
        ({"norm": "batch"}, "norm is 'batch'; it must be one of ada-rms-norm, ada-layer-norm"),
        ({"output_gate": "yes"}, "output_gate is 'yes'; it must be one of False, True"),
        ({"position": "none"}, "position is 'none'; it must be one of axial-rope, sin-cos, learned"),
        (
            {"position": "learned"},
            r"position_grid is None; with position 'learned' it must be a \(rows, columns\) pair",
        ),
        ({"position": "learned", "position_grid": (8, 0)}, r"position_grid is \(8, 0\); with position 'learned' it"),
        ({"position": "learned", "position_grid": 8}, "position_grid is 8; with position 'learned' it must be"),
        ({"position_grid": (8, 8)}, r"position_grid is \(8, 8\); with position 'axial-rope' it must be None"),
    ],
)
def test_bad_switches_get_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        replace(PLAIN, **changes)
    assert "\n" not in str(error.value)


# ---- the rows --------------------------------------------------------------------------------------------------------


def difference(before, after):
    """The fields of model and training in which two configurations differ, with the values of the second."""

    def flat(configuration):
        plain = {"class": type(configuration.config).__name__, **configuration.config.to_dict()}
        for i, level in enumerate(plain.pop("levels", [])):
            plain |= {f"{name} {i}": value for name, value in level.items()}
        return plain | asdict(configuration.training)

    old, new = flat(before), flat(after)
    return {name: value for name, value in new.items() if old.get(name) != value}


GELU = {"d_ff 0": 1536, "d_ff 1": 3072, "feed_forward": "gelu"}
NEIGHBORHOOD = {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
TRUNK = 3
STEPS = {
    ("F soft-min-SNR (HDiT)", "E axial RoPE"): {"loss_weighting": "snr"},
    ("E axial RoPE", "D GEGLU"): {"position": "sin-cos"},
    ("D GEGLU", "C neighborhoods"): GELU,
    ("C neighborhoods", "B shifted windows"): {
        "attention 0": {"type": "shifted-window", "d_head": 64, "window_size": 8}
    },
    ("C neighborhoods", "A global hourglass"): {"attention 0": {"type": "global", "d_head": 64}},
    ("F soft-min-SNR (HDiT)", "F' min-SNR, gamma 5"): {"loss_weighting": "min-snr", "min_snr_gamma": 5.0},
    ("F soft-min-SNR (HDiT)", "F' min-SNR, gamma 4"): {"loss_weighting": "min-snr", "min_snr_gamma": 4.0},
    ("F soft-min-SNR (HDiT)", "G concatenated skips"): {"skip": "concat"},
    ("F soft-min-SNR (HDiT)", "G added skips"): {"skip": "add"},
    ("F soft-min-SNR (HDiT)", "H AdaLN"): {"norm": "ada-layer-norm"},
    ("F soft-min-SNR (HDiT)", "H GELU, output gate"): {**GELU, "output_gate": True},
    ("R1 DiT-B/4", "R3 DiT-B/4, soft-min-SNR"): {"loss_weighting": "soft-min-snr"},
}
FROM_BASE = {
    "schedule: cosine": {"noise_d_low": 128, "noise_d_high": 128},
    "schedule: shifted to 64": {"noise_d_low": 64, "noise_d_high": 64},
    "schedule: interpolated 32 to side": {"noise_d_high": 128},
    "loss: multiscale": {"loss": "multiscale"},
    "dropout: none": {"dropout 2": 0.0, "dropout 3": 0.0},
    "dropout: trunk": {"dropout 2": 0.0},
    "dropout: everywhere": {"dropout 0": 0.2, "dropout 1": 0.2},
    "trunk: 8 blocks": {"depth 3": 8},
    "trunk: 32 blocks": {"depth 3": 32},
    "down-sampling: DWT": {"downsampling": "dwt"},
    "down-sampling: strided": {"downsampling": "strided"},
    "U-Net": {"kind 2": "convolution", "kind 3": "convolution-attention"},
}


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_each_row_of_hdit_changes_one_thing(before, after):
    assert difference(ablations.HDIT[before], ablations.HDIT[after]) == STEPS[before, after]


@pytest.mark.parametrize("row", FROM_BASE)
def test_each_row_of_simple_diffusion_changes_one_thing(row):
    base = ablations.SIMPLE_DIFFUSION["schedule: shifted to 32 (base)"]
    assert difference(base, ablations.SIMPLE_DIFFUSION[row]) == FROM_BASE[row]
    # and what is small changes the same things
    small = difference(*(ablations.small(c, 64) for c in (base, ablations.SIMPLE_DIFFUSION[row])))
    assert small.keys() == FROM_BASE[row].keys()


def test_costs_are_the_papers():
    with torch.device("meta"):
        counts = {name: flops.count(HDiT(c.config), 128, 128) for name, c in ablations.HDIT.items() if name[0] in "AB"}
        counts["R1"] = flops.count(from_config(ablations.HDIT["R1 DiT-B/4"].config), 128, 128)
    assert [round(counted.macs / 1e9) for counted in counts.values()] == [32, 29, 106]


def test_published_figures_belong_to_rows():
    assert ablations.FID.keys() <= ablations.HDIT.keys() and len(ablations.FID) == 13
    assert min(ablations.FID, key=ablations.FID.get) == "H AdaLN"


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[name for _, name in ROWS])
def test_small_versions_train(table, name):
    """One step of each row, with its own objective: finite, and every parameter learns; and JSON keeps it."""
    full = TABLES[table][name]
    assert type(full.config).from_dict(json.loads(json.dumps(full.config.to_dict()))) == full.config
    small = ablations.small(full, 64, num_classes=3)
    assert small.resolution == (64, 64) and small.training.batch_size == 32
    model = build(small.config, torch.float32).train()
    assert 5e5 < sum(p.numel() for p in model.parameters()) < 2e6
    recipe = small.training
    if recipe.objective == "edm":
        gamma = {} if recipe.min_snr_gamma is None else {"min_snr_gamma": recipe.min_snr_gamma}
        spec = {"type": "edm", "sigma_data": recipe.sigma_data, "weighting": recipe.loss_weighting, **gamma}
    else:
        spec = {"type": "simple-diffusion", "parametrization": recipe.parametrization, "loss": recipe.loss}
    objective = losses.objective(spec, model)
    x, noise, sigma = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.tensor([0.1, 2.0])
    cond = {"aug_cond": torch.randn(2, 9), "class_cond": torch.tensor([0, 3])}
    loss = objective.loss(x, noise, sigma, **cond).mean()
    loss.backward()
    assert loss.isfinite()
    for parameter, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter


def test_small_schedules_keep_the_ratio_of_the_sides():
    row = ablations.SIMPLE_DIFFUSION["schedule: shifted to 64"]
    assert [ablations.small(row, side).training.noise_d_low for side in (64, 32)] == [32, 16]
    with pytest.raises(ValueError, match="side is 40; it must be a multiple of 16"):
        ablations.small(row, 40)


# ---- configurations with a recipe ------------------------------------------------------------------------------------


def narrow(config):
    """The same model with a block a level and few channels."""
    if isinstance(config, DiTConfig):
        return replace(config, depth=1, width=32, heads=2)
    if isinstance(config, HDiTConfig):
        sizes = {"depth": 1, "width": 32, "d_ff": 96}
        levels = (replace(e, **sizes, attention=replace(e.attention, d_head=16)) for e in config.levels)
        return replace(config, levels=tuple(levels), mapping_width=32, mapping_d_ff=96)
    levels = tuple(replace(level, depth=1, width=32, d_head=16) for level in config.levels)
    return replace(config, levels=levels, embedding_width=32)


@pytest.mark.parametrize("name", [name for name in configs.names() if configs.get(name).training])
def test_configurations_with_a_recipe_train(name):
    """With their own levels, objective and noise levels on photographs, few channels and an eighth of the side: the
    loss of nine pictures falls at a rate for so few steps."""
    full = configs.get(name)
    recipe = replace(full.training, batch_size=4, dtype="float32", steps=12, lr=3e-3, lr_warmup=0)
    sides = tuple(max(64, side // 8) for side in full.resolution)
    small = configs.Configuration(narrow(full.config), sides, recipe, full.source)
    run = Trainer(Train(config=name, data="builtin", recipe=recipe, cpu=True), small)
    x = torch.stack([run.images.example(index)[0] for index in range(0, 2304, 256)])
    noise, sigma = (
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
        run.noise_levels(torch.arange(9) / 9),
    )
    cond = {"class_cond": torch.arange(9)} if run.network.config.num_classes else {}

    @torch.no_grad()
    def loss():
        return float(run.denoiser.eval().loss(x, noise, sigma, **cond).mean())

    before = loss()
    for _ in range(recipe.steps):
        assert run.take_step()[0].isfinite()
    assert loss() < before

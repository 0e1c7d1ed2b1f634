"""HDiT, DiT and U-ViT: every promise of their pages, in float64 against independent computations where there is one."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hdit.models import (
    DiTConfig,
    Global,
    HDiT,
    HDiTConfig,
    Level,
    Neighborhood,
    ShiftedWindow,
    UViTConfig,
    UViTLevel,
    dit,
    from_config,
    layers,
    uvit,
)

MIXED = HDiTConfig(
    levels=(
        Level(1, 32, 48, Neighborhood(16, 5)),
        Level(1, 32, 48, ShiftedWindow(16, 4)),
        Level(1, 48, 64, Global(16)),
    ),
    mapping_width=32,
    num_classes=10,
    mapping_cond_dim=6,
)
PLAIN = HDiTConfig(levels=(Level(1, 32, 48, Neighborhood(16, 3)), Level(1, 32, 48, Global(16))), mapping_width=32)
SMALL_DIT = DiTConfig(depth=2, width=32, heads=2, num_classes=10, mapping_cond_dim=6)

SMALL_UVIT = UViTConfig(
    levels=(
        UViTLevel(1, 16),
        UViTLevel(1, 32, "convolution-attention", d_head=16),
        UViTLevel(2, 32, "transformer", d_head=16),
    ),
    patch_size=2,
    downsampling="dwt",
    embedding_width=32,
    num_classes=10,
    mapping_cond_dim=6,
)
EVERY = pytest.mark.parametrize("config", [MIXED, SMALL_DIT, SMALL_UVIT], ids=["hdit", "dit", "uvit"])


def build(config, dtype=torch.float64, seed=0):
    """A model whose every parameter is random: nothing is at its initial zero, one or ten; some scales are negative."""
    torch.manual_seed(seed)
    model = from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        if name.endswith("self_attn.scale"):
            parameter.data = 4 * parameter.data + 3
    return model


def call(config, height=32, width=64, dtype=torch.float64, batch=2, seed=1):
    """x, sigma and the conditioning that this configuration takes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=g, dtype=torch.float64).to(dtype)
    sigma = torch.rand(batch, generator=g, dtype=torch.float64).mul(4).exp().to(dtype)
    cond = {"aug_cond": torch.randn(batch, 9, generator=g, dtype=torch.float64).to(dtype)}
    if config.num_classes:
        cond["class_cond"] = torch.randint(0, 11, (batch,), generator=g)
        cond["mapping_cond"] = torch.randn(batch, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, sigma, cond


def relative(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# ---- what a fresh model is -------------------------------------------------------------------------------------------


@EVERY
def test_fresh_model_is_zero_and_every_block_the_identity(config):
    torch.manual_seed(0)
    model = from_config(config)
    x, sigma, cond = call(config, 64, 64, torch.float32)
    seen = []
    kinds = (layers.SelfAttention, layers.FeedForward, layers.MappingFeedForward, dit.Block, uvit.Block)
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda module, args, out: seen.append(torch.equal(args[0], out)))
    entries = []
    model.patch_in.register_forward_hook(lambda module, args, out: entries.append(out.abs().max()))
    assert torch.equal(model(x, sigma, **cond), torch.zeros(2, 3, 64, 64))
    assert all(seen) and len(seen) == sum(isinstance(module, kinds) for module in model.modules()) > 0
    assert entries[0] > 0.1  # identity of something, not of zeros


def test_parameter_groups_of_hdit():
    """Upstream's rule, spelt out by hand for one parameter of each sort, and every parameter exactly once."""
    model = build(MIXED)
    groups = model.param_groups(lr=6.0, weight_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(names)
    expected = {
        "patch_in.proj.weight": (6, 0.5),
        "merges.0.proj.weight": (6, 0.5),
        "splits.1.proj.weight": (6, 0.5),
        "splits.1.fac": (6, 0),
        "out_norm.scale": (6, 0),
        "patch_out.proj.weight": (6, 0.5),
        "down_levels.0.0.self_attn.qkv_proj.weight": (6, 0.5),
        "down_levels.0.0.self_attn.scale": (6, 0),
        "mid_level.0.self_attn.norm.linear.weight": (2, 0.5),
        "up_levels.1.0.ff.norm.linear.weight": (2, 0.5),
        "up_levels.1.0.ff.up_proj.weight": (6, 0.5),
        "mapping.blocks.0.norm.scale": (2, 0),
        "mapping.blocks.0.up_proj.weight": (2, 0.5),
        "mapping.out_norm.scale": (2, 0),
        "time_in_proj.weight": (6, 0),
        "aug_in_proj.weight": (6, 0),
        "class_emb.weight": (6, 0),
        "mapping_cond_in_proj.weight": (6, 0),
    }
    assert {name: found[name] for name in expected} == expected


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(5, 9), (12, 4), (8, 8)])
def test_positions_are_token_centres_with_the_aspect_kept(height, width):
    longest = max(height, width)
    for axis, length in enumerate((height, width)):
        edges = torch.linspace(-length / longest, length / longest, length + 1, dtype=torch.float64)
        got = layers.axial_positions(height, width, torch.float64, torch.device("cpu"))[axis]
        torch.testing.assert_close(got, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=4e-16)
        if length % 2 == 0 and height % 2 == 0 and width % 2 == 0:
            coarse = layers.axial_positions(height // 2, width // 2, torch.float64, torch.device("cpu"))[axis]
            torch.testing.assert_close(coarse, got.view(-1, 2).mean(1), rtol=0, atol=4e-16)


def dense_attention(block, x, cond, allowed):
    """The same block with an (HW)² matrix: cosine similarity, RoPE spelt out with complex numbers, a boolean mask."""
    b, h, w, c = x.shape
    heads, d = block.heads, block.d_head
    rms = x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    normed = x / rms * (1 + cond @ block.norm.linear.weight.T)[:, None, None]
    q, k, v = (normed @ block.qkv_proj.weight.T).view(b, h * w, 3, heads, d).permute(2, 0, 3, 1, 4)
    side = max(h, w)
    grid = torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()
    y, x_pos = (2 * grid[:, 0] + 1 - h) / side, (2 * grid[:, 1] + 1 - w) / side
    r = d // 8
    freqs = torch.tensor([[torch.pi * 10 ** ((j + i / heads) / r) for j in range(r)] for i in range(heads)])
    theta = torch.cat([y[None, :, None] * freqs[:, None], x_pos[None, :, None] * freqs[:, None]], -1)  # heads, HW, 2r

    def prepare(t):
        t = t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        turned = torch.complex(t[..., : 2 * r], t[..., 2 * r : 4 * r]) * torch.polar(torch.ones_like(theta), theta)
        return torch.cat([turned.real, turned.imag, t[..., 4 * r :]], -1)

    logits = block.scale[:, None, None] * (prepare(q) @ prepare(k).mT)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(b, h, w, c)
    return x + out @ block.out_proj.weight.T


def allowed_pairs(h, w, rule):
    """(HW, HW): may query attend to key, both axes together, from a rule per axis."""
    rows = torch.tensor([[rule(i, j, h) for j in range(h)] for i in range(h)])
    columns = torch.tensor([[rule(i, j, w) for j in range(w)] for i in range(w)])
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(h * w, h * w)


def near(kernel):
    def rule(i, j, length):
        start = min(max(i - kernel // 2, 0), length - kernel)
        return start <= j < start + kernel

    return rule


BLOCKS = {
    "neighborhood 5": (lambda: layers.NeighborhoodSelfAttention(48, 16, 32, 0.0, 5), near(5)),
    "neighborhood 4": (lambda: layers.NeighborhoodSelfAttention(48, 16, 32, 0.0, 4), near(4)),
    "global": (lambda: layers.GlobalSelfAttention(48, 16, 32, 0.0), lambda i, j, n: True),
    "window": (lambda: layers.ShiftedWindowSelfAttention(48, 16, 32, 0.0, 4, 0), lambda i, j, n: i // 4 == j // 4),
    "shifted window": (
        lambda: layers.ShiftedWindowSelfAttention(48, 16, 32, 0.0, 4, 2),
        lambda i, j, n: (i + 2) // 4 == (j + 2) // 4,
    ),
    "odd window": (
        lambda: layers.ShiftedWindowSelfAttention(48, 16, 32, 0.0, 4, 1),
        lambda i, j, n: (i + 1) // 4 == (j + 1) // 4,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("height", "width"), [(8, 12), (16, 8)])
def test_attention_block_equals_a_dense_one(name, height, width):
    make, rule = BLOCKS[name]
    torch.manual_seed(0)
    block = make().double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.scale.data = torch.tensor([9.0, -4.0, 0.5], dtype=torch.float64)
    block.pos_emb.freqs = torch.tensor([[torch.pi * 10 ** ((j + i / 3) / 2) for j in range(2)] for i in range(3)])
    block = block.double()
    x, cond = torch.randn(2, height, width, 48, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    positions = layers.axial_positions(height, width, torch.float64, x.device)
    expected = dense_attention(block, x, cond, allowed_pairs(height, width, rule))
    assert relative(block(x, cond, positions) - x, expected - x) < 1e-6  # freqs are float32 values


def test_windows_shift_on_odd_layers_and_the_count_goes_on_upwards():
    model = HDiT(HDiTConfig((Level(3, 32, 48, ShiftedWindow(16, 5)), Level(1, 32, 48, Global(16))), mapping_width=32))
    assert [layer.self_attn.shift for layer in model.down_levels[0]] == [0, 2, 0]
    assert [layer.self_attn.shift for layer in model.up_levels[0]] == [2, 0, 2]


def test_local_model_is_translation_equivariant_inside():
    """Two crops of one image, one token of the inner level apart: equal where no border is felt. 3 x 3 windows reach 1
    token at level 0 twice and 1 at level 1, and a border has one more: at most 6 tokens of 4 pixels from each side."""
    config = HDiTConfig(
        (Level(1, 32, 48, Neighborhood(16, 3)), Level(1, 32, 48, Neighborhood(16, 3))), mapping_width=32
    )
    model = build(config)
    x, sigma, cond = call(config, 104, 96)
    first, second = model(x[:, :, :96], sigma, **cond), model(x[:, :, 8:], sigma, **cond)
    inside = slice(24, -24)
    assert relative(first[:, :, 32:-24, inside], second[:, :, 24:-32, inside]) < 1e-11
    assert relative(first[:, :, 8:], second[:, :, :-8]) > 1e-3  # at the borders they do differ


@EVERY
def test_each_conditioning_changes_the_output(config):
    model = build(config)
    x, sigma, cond = call(config)
    y = model(x, sigma, **cond)
    others = call(config, seed=2)
    changed = {name: {**cond, name: value} for name, value in others[2].items()}
    for name, altered in changed.items():
        assert relative(model(x, sigma, **altered), y) > 1e-3, name
    assert relative(model(x, others[1], **cond), y) > 1e-3
    # one image's conditioning is its own
    cond["class_cond"] = torch.tensor([cond["class_cond"][0], (cond["class_cond"][1] + 1) % 11])
    again = model(x, sigma, **cond)
    assert relative(again[0], y[0]) < 1e-12 and relative(again[1], y[1]) > 1e-3


def test_absent_augmentation_is_zero_augmentation():
    for config in (PLAIN, DiTConfig(depth=1, width=32, heads=2)):
        model = build(config)
        x, sigma, _ = call(config)
        assert torch.equal(model(x, sigma), model(x, sigma, aug_cond=torch.zeros(2, 9, dtype=torch.float64)))


def test_level_without_attention_is_pointwise():
    """Then a token of the output depends on its own patch alone."""
    config = HDiTConfig((Level(2, 32, 48, None), Level(1, 32, 48, None)), mapping_width=32)
    model = build(config)
    x, sigma, _ = call(config, 32, 32)
    other = x.clone()
    other[:, :, 8:16, 16:24] += 1
    change = (model(other, sigma) - model(x, sigma)).abs().amax((0, 1))
    assert change[8:16, 16:24].min() > 0
    change[8:16, 16:24] = 0
    assert change.max() == 0


def test_gelu_feed_forward():
    config = HDiTConfig((Level(1, 32, 128, None),), mapping_width=32, feed_forward="gelu")
    ff = build(config).mid_level[0].ff
    x, cond = torch.randn(2, 3, 4, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    normed = (
        x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + cond @ ff.norm.linear.weight.T)[:, None, None]
    )
    hidden = normed @ ff.up_proj.weight.T
    hidden = hidden * torch.special.ndtr(hidden)
    torch.testing.assert_close(ff(x, cond), x + hidden @ ff.down_proj.weight.T, rtol=1e-12, atol=1e-12)


# ---- precision -------------------------------------------------------------------------------------------------------


class FloatingDtypes(TorchDispatchMode):
    """Collects the floating dtypes that any operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.seen.add(t.dtype)
        return out


@EVERY
def test_float64_model_computes_nothing_below_float64(config):
    model = build(config)
    x, sigma, cond = call(config)
    with torch.no_grad(), FloatingDtypes() as dtypes:
        model(x, sigma, **cond)
    assert dtypes.seen == {torch.float64}


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@EVERY
def test_half_precision_is_as_close_as_its_roundings_allow(config, mode):
    """The budget is measured: the float64 model with weights, inputs and every module's output rounded to bfloat16,
    times 4 for the roundings inside modules: q and k as they are normalised and rotated, and GEGLU's two halves."""
    exact = build(config)
    x, sigma, cond = call(config)
    x = x.bfloat16().double()
    with torch.no_grad():
        y = exact(x, sigma, **cond)
        rounded = build(config)
        for p in rounded.parameters():
            p.copy_(p.bfloat16())
        constant = (layers.FourierFeatures, layers.AxialRoPE)
        for module in rounded.modules():
            if not isinstance(module, constant):
                module.register_forward_hook(lambda module, args, out: out.bfloat16().double())
        budget = 4 * relative(rounded(x, sigma, **cond), y)
        model = build(config).bfloat16() if mode == "bfloat16" else build(config).float()
        half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in cond.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            got = model(x.bfloat16(), sigma.float(), **half)
    assert got.dtype == torch.bfloat16
    assert 0 < relative(got, y) < budget < 0.25


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast", "there and back"])
def test_angles_and_fourier_weights_never_lose_bits(mode):
    model = build(PLAIN, torch.float32)
    kept = {name: b.clone() for name, b in model.named_buffers()}
    angles = []
    block = model.mid_level[0].self_attn.pos_emb
    block.register_forward_hook(lambda module, args, out: angles.append(out))
    x, sigma, _ = call(PLAIN, dtype=torch.float32)
    model(x, sigma)
    if mode == "there and back":
        model = model.bfloat16().float()
    elif mode != "autocast":
        model = model.to(getattr(torch, mode))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        model(x, sigma)
    assert all(torch.equal(b, kept[name]) and b.dtype == torch.float32 for name, b in model.named_buffers())
    for before, after in zip(*angles, strict=True):
        assert after.dtype == torch.float32 and torch.equal(before, after)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    "config",
    [HDiTConfig((Level(1, 64),)), DiTConfig(1, 384, 6), UViTConfig((UViTLevel(1, 4),), embedding_width=8)],
    ids=["hdit", "dit", "uvit"],
)
def test_2000_noise_levels_have_2000_embeddings(config, mode):
    torch.manual_seed(0)
    model = from_config(config)
    model = model.bfloat16() if mode == "bfloat16" else model
    inputs = []
    first = model.time_in_proj if isinstance(config, HDiTConfig) else model.time_mlp[0]
    first.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    sigma = torch.logspace(-3, 3, 2000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        model.conditioning(sigma)
    assert inputs[0].bfloat16().unique(dim=0).shape[0] == 2000


# ---- how it runs -----------------------------------------------------------------------------------------------------


def gradients(model, function, x, sigma, cond):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x, sigma, **cond)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@EVERY
def test_checkpointing_gives_the_same_bits(config):
    model = build(config, torch.float32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    x, sigma, cond = call(config, dtype=torch.float32)
    torch.manual_seed(5)
    plain = gradients(model, model, x, sigma, cond)
    runs = []
    model.checkpointing = True
    blocks = model.blocks if isinstance(model, dit.DiT) else model.mid_level
    blocks[0].register_forward_pre_hook(lambda *args: runs.append(1))
    torch.manual_seed(5)
    again = gradients(model, model, x, sigma, cond)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(runs) == 2  # forward, and once more in backward


WINDOWS = HDiTConfig((Level(2, 32, 48, ShiftedWindow(16, 4)),), 8, mapping_width=32, mapping_depth=1)
CONV_GLOBAL = replace(
    SMALL_UVIT, levels=(UViTLevel(1, 16), UViTLevel(1, 32, "transformer", d_head=16)), downsampling="average"
)
LOCAL_GLOBAL = replace(PLAIN, num_classes=10, mapping_cond_dim=6, mapping_depth=1)


@pytest.mark.parametrize(
    ("config", "autocast"),
    [(LOCAL_GLOBAL, False), (LOCAL_GLOBAL, True), (WINDOWS, False), (SMALL_DIT, True), (CONV_GLOBAL, False)],
    ids=["hdit", "hdit under autocast", "hdit with windows", "dit under autocast", "uvit"],
)
def test_compiles_as_one_graph_forward_and_backward(config, autocast):
    model = build(config, torch.float32)
    x, sigma, cond = call(config, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(model, model, x, sigma, cond)
        got = gradients(model, compiled, x, sigma, cond)
    assert got[0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert max(relative(a, b) for a, b in zip(got, expected, strict=True)) < (0.05 if autocast else 2e-5)


@EVERY
def test_runs_on_the_meta_device(config):
    with torch.device("meta"):
        model = from_config(config)
        x, sigma = torch.empty(2, 3, 512, 1024), torch.empty(2)
        cond = {"class_cond": torch.empty(2, dtype=torch.int64), "mapping_cond": torch.empty(2, 6)}
    y = model(x, sigma, **cond)
    y.sum().backward()
    assert y.is_meta and y.shape == x.shape
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of its own attention
def test_per_sample_gradients_with_vmap():
    """torch.func over the whole model: vmap of grad equals one backward per image."""
    config = HDiTConfig((Level(1, 32, 48, Global(16)),), mapping_width=32, num_classes=10)
    model = build(config)
    x, sigma, cond = call(MIXED, 16, 16)
    parameters = dict(model.named_parameters())

    def loss(parameters, x, sigma, label):
        arguments = x[None], sigma[None], None, label[None]
        return torch.func.functional_call(model, parameters, arguments).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x, sigma, cond["class_cond"])
    for i in range(2):
        single = torch.func.grad(loss)(parameters, x[i], sigma[i], cond["class_cond"][i])
        for name, g in single.items():
            torch.testing.assert_close(per_sample[name][i], g, rtol=1e-9, atol=1e-12)

"""DiT's own parts against their formulas. What HDiT and DiT have in common is in test_models.py."""

import itertools

import torch
from test_models import SMALL_DIT, build, call

from hdit.models import DiTConfig, layers


def test_dit_positions_tell_every_token_and_axis_apart():
    got = layers.grid_positions(3, 5, 32, torch.float64, torch.device("cpu"))
    frequency = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    for row, column in itertools.product(range(3), range(5)):
        x, y = column * frequency, row * frequency
        expected = torch.cat([x.cos(), x.sin(), y.cos(), y.sin()])
        torch.testing.assert_close(got[row, column], expected, rtol=1e-13, atol=1e-13)


def test_dit_block_equals_its_formula():
    model = build(SMALL_DIT)
    block, x, c = model.blocks[0], torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
        ((c * c.sigmoid()) @ block.ada_ln.weight.T + block.ada_ln.bias).view(2, 6, 1, 32).unbind(1)
    )

    def norm(x, shift, scale):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    qkv = norm(x, shift_a, scale_a) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = qkv.view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    out = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 32)
    y = x + gate_a * (out @ block.attn.proj.weight.T + block.attn.proj.bias)
    up, down = block.mlp[0], block.mlp[2]
    hidden = norm(y, shift_m, scale_m) @ up.weight.T + up.bias
    hidden = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    expected = y + gate_m * (hidden @ down.weight.T + down.bias)
    torch.testing.assert_close(block(x, c), expected, rtol=1e-11, atol=1e-11)


def test_dit_sigma_doubles_the_channels_and_nothing_else():
    one, two = (DiTConfig(depth=1, width=32, heads=2, learn_sigma=learn) for learn in (False, True))
    a, b = build(one), build(two)
    rest = {name: p for name, p in a.state_dict().items() if not name.startswith("patch_out")}
    b.load_state_dict(rest, strict=False)
    mean_rows = b.patch_out.proj.weight.view(4, 4, 6, 32)[:, :, :3].reshape(48, 32)
    a.patch_out.proj.weight.data = mean_rows.clone()
    x, sigma, _ = call(one)
    assert b(x, sigma).shape[1] == 6
    torch.testing.assert_close(b(x, sigma)[:, :3], a(x, sigma), rtol=1e-12, atol=1e-12)


def test_parameter_groups_of_dit():
    model = build(SMALL_DIT)
    groups = model.param_groups(weight_decay=0.5)
    members = [id(p) for g in groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    decays = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(model.blocks[0].attn.qkv.weight) in decays and id(model.blocks[0].attn.qkv.bias) not in decays
    assert id(model.class_emb.weight) not in decays


def test_time_embedding_resolves_noise_levels_as_the_original_does_steps():
    """One step of its t is 1 radian of the fastest sinusoid; here that is 0.4 % in sigma, from 1e-3 to 1e3."""
    model = build(DiTConfig(depth=1, width=32, heads=2))
    seen = []
    model.time_mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.conditioning(torch.logspace(-3, 3, 2000, dtype=torch.float64))
    steps = (seen[0][1:] - seen[0][:-1]).norm(dim=1)
    assert steps.min() > 1
    sigma = torch.tensor([0.7, 0.7 * torch.e ** (1 / 250)], dtype=torch.float64)
    model.conditioning(sigma)
    a, b = torch.complex(seen[1][:, 0], seen[1][:, 128])
    torch.testing.assert_close((b / a).angle().abs(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-9, atol=0)

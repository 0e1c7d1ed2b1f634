"""EDM preconditioning against stored values of the original HDiT code, float64, and independent arithmetic."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hdit.diffusion.preconditioning import WEIGHTINGS, Denoiser

GOLDEN = load_file(Path(__file__).parent / "data" / "preconditioning.safetensors")
X, NOISE, SIGMA = GOLDEN["loss_x"], GOLDEN["loss_noise"], GOLDEN["loss_sigma"]
SIGMA_DATA = 0.5


def network(x, sigma, gain=1.0):
    """The network that the stored losses were computed with."""
    return gain * torch.tanh(x) * sigma.view(-1, 1, 1, 1) ** 0.25


def close(got, want, relative):
    return (got.double() - want.double()).abs().max() <= relative * want.double().abs().max()


@pytest.mark.parametrize("weighting", ["karras", "soft-min-snr", "snr"])
def test_loss_is_the_stored_one(weighting):
    loss = Denoiser(network, SIGMA_DATA, weighting).loss(X, NOISE, SIGMA)
    assert loss.dtype == torch.float64
    assert close(loss, GOLDEN[f"loss_{weighting}"], 1e-12)


def test_soft_min_snr_is_the_default():
    assert close(Denoiser(network).loss(X, NOISE, SIGMA), GOLDEN["loss_soft-min-snr"], 1e-12)


@pytest.mark.parametrize(
    ("weighting", "x0_weight"),
    [
        ("karras", lambda s: (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2),
        ("soft-min-snr", lambda s: 1 / (s**2 + SIGMA_DATA**2)),
        ("snr", lambda s: 1 / s**2),
        ("min-snr", lambda s: min(1 / s**2, 5)),
    ],
)
def test_weight_on_the_clean_image(weighting, x0_weight):
    """The loss is the squared error of D against x, times the weight that each paper states for x0."""
    sigma = torch.tensor([0.02, 0.44, 0.46, 30.0], dtype=torch.float64)
    denoiser = Denoiser(network, SIGMA_DATA, weighting)
    error = denoiser(X + sigma.view(-1, 1, 1, 1) * NOISE, sigma) - X
    weights = torch.tensor([x0_weight(s) for s in sigma.tolist()], dtype=torch.float64)
    assert close(denoiser.loss(X, NOISE, sigma) / weights, error.square().mean((1, 2, 3)), 1e-10)


def test_denoised_is_the_stored_one():
    x = X + NOISE * SIGMA.view(-1, 1, 1, 1)
    assert close(Denoiser(network)(x, SIGMA), GOLDEN["denoised"], 1e-12)


def test_condition_reaches_the_network():
    denoiser = Denoiser(network)
    once, twice = (denoiser.loss(X, NOISE, SIGMA, gain=gain) for gain in (1.0, 2.0))
    x = X + NOISE * SIGMA.view(-1, 1, 1, 1)
    skip = x * (0.25 / (SIGMA**2 + 0.25)).view(-1, 1, 1, 1)
    assert close(denoiser(x, SIGMA, gain=2.0) - skip, 2 * (denoiser(x, SIGMA) - skip), 1e-12)
    assert ((once - twice).abs() > 1e-3 * once).all()


def test_small_sigma_keeps_its_digits_in_float32():
    """At sigma = 1e-3, (x - c_skip * noised) / c_out would lose three digits."""
    sigma = torch.full((4,), 1e-3, dtype=torch.float64)
    denoiser = Denoiser(network, weighting="karras")
    wide, narrow = denoiser.loss(X, NOISE, sigma), denoiser.loss(X.float(), NOISE.float(), sigma.float())
    assert narrow.dtype == torch.float32
    assert close(narrow, wide, 2e-6)


class Bfloat16Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.seen = None

    def forward(self, x, sigma):
        self.seen = (x.dtype, sigma.dtype)
        return torch.tanh(x) * self.weight.view(1, 3, 1, 1)


def test_coefficients_stay_float32_around_a_bfloat16_network():
    """D must stay within bfloat16's rounding of F: c_skip * x and c_out themselves lose nothing."""
    torch.manual_seed(0)
    model = Bfloat16Network()
    x, sigma = torch.randn(4, 3, 8, 8), torch.tensor([0.0123, 0.3, 2.7, 61.3])
    got = Denoiser(model)(x, sigma)
    assert model.seen == (torch.bfloat16, torch.float32)
    assert got.dtype == torch.float32
    root = (sigma.double() ** 2 + 0.25).sqrt().view(-1, 1, 1, 1)
    f = model((x.double() / root).float().bfloat16(), sigma).double()
    want = x.double() * 0.25 / root**2 + f * sigma.double().view(-1, 1, 1, 1) * 0.5 / root
    assert close(got, want, 1e-6)


def test_callable_weighting():
    loss = Denoiser(network, weighting=lambda sigma, sigma_data: sigma * sigma_data).loss(X, NOISE, SIGMA)
    assert close(loss, GOLDEN["loss_karras"] * SIGMA * SIGMA_DATA, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sigma_data": -0.5}, ValueError, "sigma_data .*-0.5"),
        ({"sigma_data": math.nan}, ValueError, "sigma_data .*nan"),
        ({"sigma_data": "0.5"}, TypeError, "sigma_data .*'0.5'"),
        ({"weighting": "min_snr"}, ValueError, "weighting .*karras.*min_snr"),
        ({"model": 3}, TypeError, "model .*int"),
        ({"reduction": "mean"}, TypeError, "reduction .*str"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        Denoiser(**{"model": network} | arguments)


@pytest.mark.parametrize(
    ("x", "sigma", "words"),
    [
        (X, SIGMA[:3], r"sigma .*\(4,\).*\(3,\)"),
        (X, SIGMA[0], r"sigma .*\(4,\).*\(\)"),
        (X, 0.5, "sigma .*0.5"),
        (X, SIGMA.long(), "sigma .*int64"),
        (X[0], SIGMA[:3], r"x .*\(3, 8, 8\)"),
        (X.long(), SIGMA, "x .*int64"),
    ],
)
def test_bad_inputs_are_named(x, sigma, words):
    with pytest.raises(ValueError, match=words):
        Denoiser(network)(x, sigma)
    with pytest.raises(ValueError, match=words):
        Denoiser(network).loss(x, x, sigma)


def test_noise_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"noise .*\(4, 3, 8, 8\).*\(1, 3, 8, 8\)"):
        Denoiser(network).loss(X, NOISE[:1], SIGMA)


def test_every_weighting_is_tested():
    assert set(WEIGHTINGS) == {"karras", "soft-min-snr", "snr", "min-snr"}

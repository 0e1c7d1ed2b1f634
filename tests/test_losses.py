"""Parametrisations and losses against independent arithmetic in float64, and simple diffusion against EDM."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hdit.diffusion import losses
from hdit.diffusion.losses import SimpleDiffusion, alpha_sigma, convert, multiscale, objective, training_noise
from hdit.diffusion.preconditioning import WEIGHTINGS, Denoiser
from hdit.diffusion.schedules import simple_diffusion_sigmas

GOLDEN = load_file(Path(__file__).parent / "data" / "diffusion.safetensors")
X, NOISE, SIGMA = GOLDEN["loss_x"], GOLDEN["loss_noise"], GOLDEN["loss_sigma"]
DOUBLE = torch.float64
LOGSNR = [-15.0, -7.0, -1.0, 0.0, 2.0, 9.0, 15.0]


def network(z, sigma, gain=1.0):
    return gain * torch.tanh(z) * sigma.view(-1, 1, 1, 1) ** 0.25


def image(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def column(values):
    return torch.as_tensor(values, dtype=DOUBLE).view(-1, 1, 1, 1)


def levels():
    """x0, noise, sigma, and alpha, s of the textbook at every log-SNR."""
    x0, noise = image(len(LOGSNR), 2, 4, 4), image(len(LOGSNR), 2, 4, 4, seed=1)
    alpha, s = (column([(1 / (1 + math.exp(sign * v))) ** 0.5 for v in LOGSNR]) for sign in (-1, 1))
    sigma = torch.tensor([math.exp(-v / 2) for v in LOGSNR], dtype=DOUBLE)
    return x0, noise, sigma, alpha, s


def largest(t):
    return float(t.abs().max())


# Parametrisations


def test_alpha_and_s_at_every_level():
    _, _, sigma, alpha, s = levels()
    for got, want in zip(alpha_sigma(sigma), (alpha, s), strict=True):
        assert largest(got / want.flatten() - 1) < 1e-14
    for got, want in zip(alpha_sigma(sigma.float()), (alpha, s), strict=True):
        assert largest(got.double() / want.flatten() - 1) < 4e-7
    ends = torch.tensor([0.0, 1e-30, 1e30, math.inf])
    assert [t.tolist() for t in alpha_sigma(ends)] == [[1, 1, pytest.approx(1e-30), 0], [0, pytest.approx(1e-30), 1, 1]]


@pytest.mark.parametrize("source", losses.PARAMETRIZATIONS)
@pytest.mark.parametrize("target", losses.PARAMETRIZATIONS)
def test_conversions_agree_with_their_definitions_and_invert(source, target):
    x0, noise, sigma, alpha, s = levels()
    z = alpha * x0 + s * noise
    parts = {"x0": x0, "epsilon": noise, "v": alpha * noise - s * x0}
    # Each is a sum of z and the given one with these factors: what one rounding becomes.
    factor = {("epsilon", "x0"): 1 / alpha, ("epsilon", "v"): 1 / alpha, ("x0", "epsilon"): 1 / s, ("x0", "v"): 1 / s}
    amplified = factor.get((source, target), torch.ones_like(s))
    got = convert(parts[source], z, sigma, source, target)
    assert largest((got - parts[target]) / amplified) < 1e-14
    back = convert(got, z, sigma, target, source)
    assert largest(back - parts[source]) < 1e-10
    # In float32 the rounding of z and of the prediction is amplified by the same factor, in either direction.
    narrow = convert(parts[source].float(), z.float(), sigma.float(), source, target)
    assert narrow.dtype == torch.float32
    assert largest((narrow.double() - parts[target]) / amplified) < 2e-6
    there = factor.get((target, source), torch.ones_like(s))
    back = convert(narrow, z.float(), sigma.float(), target, source).double()
    assert largest((back - parts[source]) / there) < 2e-6


def test_conversions_at_pure_noise():
    noise, v = image(2, 3, 4, 4), image(2, 3, 4, 4, seed=1)
    sigma = torch.full((2,), math.inf, dtype=DOUBLE)
    assert torch.equal(convert(v, noise, sigma, "v", "x0"), -v)
    assert torch.equal(convert(v, noise, sigma, "v", "epsilon"), noise)
    assert torch.equal(convert(v, noise, sigma, "x0", "v"), -v)


@pytest.mark.parametrize("parametrization", losses.PARAMETRIZATIONS)
def test_denoiser_recovers_the_image_from_a_perfect_prediction(parametrization):
    """The network is told z = alpha x0 + s n; what it then says must come out as x0, from x = x0 + sigma n."""
    x0, noise, sigma, alpha, s = levels()
    told = []

    def oracle(z, sigma):
        told.append(z)
        return {"x0": x0, "epsilon": noise, "v": alpha * noise - s * x0}[parametrization]

    got = SimpleDiffusion(oracle, parametrization)(x0 + column(sigma) * noise, sigma)
    assert largest((got - x0) / (1 + column(sigma))) < 1e-13
    assert largest(told[0] - (alpha * x0 + s * noise)) < 1e-13


def test_half_precision_goes_through_float32():
    """bfloat16 in, bfloat16 out, one rounding: alpha at a log-SNR of -15 would be far off in bfloat16 arithmetic."""
    x0, noise, sigma, alpha, s = levels()
    z, v = (alpha * x0 + s * noise).bfloat16(), (alpha * noise - s * x0).bfloat16()
    got = convert(v, z, sigma.float(), "v", "x0")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (alpha.float() * z.float() - s.float() * v.float()).bfloat16())
    assert SimpleDiffusion(lambda z, sigma: z)(z, sigma.float()).dtype == torch.bfloat16


# Losses


@pytest.mark.parametrize("parametrization", losses.PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", ["v", "epsilon", "x0"])
def test_loss_is_the_squared_error_of_what_it_names(parametrization, kind):
    x0, noise, sigma, alpha, s = levels()
    z = alpha * x0 + s * noise
    got = SimpleDiffusion(network, parametrization, kind).loss(x0, noise, sigma)
    estimate = {
        "v": lambda v: (alpha * z - s * v, s * z + alpha * v),
        "epsilon": lambda e: ((z - s * e) / alpha, e),
        "x0": lambda x: (x, (z - alpha * x) / s),
    }[parametrization](network(z, sigma))
    wrong = {"x0": estimate[0] - x0, "epsilon": estimate[1] - noise}
    wrong["v"] = alpha * wrong["epsilon"] - s * wrong["x0"]
    want = wrong[kind].square().mean((1, 2, 3))
    assert largest(got / want - 1) < 1e-6  # want has cancelled digits
    narrow = SimpleDiffusion(network, parametrization, kind).loss(x0.float(), noise.float(), sigma.float())
    assert narrow.dtype == torch.float32
    assert largest(narrow / got - 1) < 1e-5


def test_condition_reaches_the_network():
    x0, noise, sigma, *_ = levels()
    once, twice = (
        SimpleDiffusion(lambda z, s, gain: gain * z, "x0", "x0").loss(x0, noise, sigma, gain=g) for g in (1, 2)
    )
    assert largest(once - twice) > 0.1
    x = x0 + column(sigma) * noise
    denoiser = SimpleDiffusion(lambda z, s, gain: gain * z, "x0")
    assert largest(denoiser(x, sigma, gain=3.0) - 3 * denoiser(x, sigma, gain=1.0)) < 1e-12


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
def test_v_loss_is_edms_at_unit_data(weighting):
    """With sigma_data = 1 EDM's F is -v and its input is z: two ways to one loss, all weightings."""
    edm = Denoiser(network, 1.0, weighting).loss(X, NOISE, SIGMA)
    ours = SimpleDiffusion(lambda *a: -network(*a), "v", "v", weighting).loss(X, NOISE, SIGMA)
    assert largest(ours / edm - 1) < 1e-12


def test_snr_weighted_v_is_the_loss_of_epsilon():
    one, other = SimpleDiffusion(network, "v", "v", "snr"), SimpleDiffusion(network, "v", "epsilon")
    assert largest(one.loss(X, NOISE, SIGMA) / other.loss(X, NOISE, SIGMA) - 1) < 1e-12


def test_a_callable_weighting_multiplies_any_loss():
    plain = SimpleDiffusion(network, "epsilon", "x0").loss(X, NOISE, SIGMA)
    got = SimpleDiffusion(network, "epsilon", "x0", lambda sigma, sigma_data: sigma + sigma_data).loss(X, NOISE, SIGMA)
    assert largest(got / (plain * (SIGMA + 1)) - 1) < 1e-12


@pytest.mark.parametrize("gamma", [4.0, 5.0])
def test_min_snr_gamma(gamma):
    """On x0 the weight is min(SNR, gamma): Hang et al., and both values of HDiT's comparison."""
    sigma = torch.tensor([0.1, 0.47, 0.52, 30.0], dtype=DOUBLE)  # 1 / 0.47² is between 4 and 5
    want = [min(1 / s**2, gamma) for s in sigma.tolist()]
    for spec in ({"type": "edm"}, {"type": "simple-diffusion", "loss": "v"}):
        made = objective(spec | {"weighting": "min-snr", "min_snr_gamma": gamma}, network)
        error = made(X + column(sigma) * NOISE, sigma) - X
        weight = made.loss(X, NOISE, sigma) / error.square().mean((1, 2, 3))
        assert largest(weight / torch.tensor(want, dtype=DOUBLE) - 1) < 1e-10


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
def test_weightings_reach_both_ends_in_float32(weighting):
    sigma = torch.tensor([1e-3, 5e-4, 1e3, 1.8e3, 1e12])
    got, want = WEIGHTINGS[weighting](sigma, 0.5), WEIGHTINGS[weighting](sigma.double(), 0.5)
    assert got.isfinite().all() and largest(got / want - 1) < 1e-6


def test_edm_loss_is_still_the_stored_one():
    for weighting in ("karras", "snr", "soft-min-snr"):
        made = objective({"type": "edm", "sigma_data": 0.5, "weighting": weighting}, network)
        assert largest(made.loss(X, NOISE, SIGMA) / GOLDEN[f"loss_{weighting}"] - 1) < 1e-12
    assert largest(objective({"type": "edm"}, network).loss(X, NOISE, SIGMA) / GOLDEN["loss_soft-min-snr"] - 1) < 1e-12


# Multiscale


def pooled(error, factor):
    """Means of blocks, one by one."""
    h, w = error.shape[2:]
    return torch.stack(
        [
            error[:, :, i : i + factor, j : j + factor].mean((2, 3))
            for i in range(0, h, factor)
            for j in range(0, w, factor)
        ],
        -1,
    )


@pytest.mark.parametrize(
    ("height", "width", "factors"),
    [
        (128, 128, (1, 2, 4)),
        (32, 32, (1,)),
        (24, 24, (1,)),
        (48, 48, (1,)),
        (64, 96, (1, 2)),
        (128, 66, (1, 2)),
        (64, 65, (1,)),
    ],
)
def test_multiscale_is_the_sum_over_scales(height, width, factors):
    error = image(2, 3, height, width)
    want = 0
    for factor in factors:
        want = want + pooled(error, factor).square().mean((1, 2)) / (min(height, width) // factor)
    assert largest(multiscale(error) / want - 1) < 1e-12


def test_multiscale_loss_is_that_of_epsilon_also_for_edm():
    x0, noise, sigma = image(3, 1, 64, 64), image(3, 1, 64, 64, seed=1), torch.tensor([0.05, 1.0, 40.0], dtype=DOUBLE)
    got = SimpleDiffusion(network, "v", "multiscale").loss(x0, noise, sigma)
    wrong = (x0 - SimpleDiffusion(network, "v")(x0 + column(sigma) * noise, sigma)) / column(sigma)
    assert largest(got / multiscale(wrong) - 1) < 1e-10
    # EDM: the same reduction of the error of F, so "snr" at unit data is the error of epsilon again.
    edm = objective({"type": "edm", "sigma_data": 1, "weighting": "snr", "loss": "multiscale"}, network)
    ours = SimpleDiffusion(lambda *a: -network(*a), "v", "multiscale")
    assert largest(edm.loss(x0, noise, sigma) / ours.loss(x0, noise, sigma) - 1) < 1e-12
    plain = objective({"type": "edm", "sigma_data": 1, "weighting": "snr"}, network)
    small = [t[..., :32, :32] for t in (x0, noise)]
    assert largest(objective({"type": "edm", "loss": "multiscale"}, network).loss(*small, sigma)
                   / objective({"type": "edm"}, network).loss(*small, sigma) * 32 - 1) < 1e-12  # fmt: skip
    assert largest(edm.loss(x0, noise, sigma) / plain.loss(x0, noise, sigma) * 64 - 1) > 0.01


# Zero-terminal SNR


@pytest.mark.parametrize("kind", ["v", "epsilon", "x0"])
@pytest.mark.parametrize("parametrization", ["v", "x0"])
def test_pure_noise_trains_and_samples(parametrization, kind):
    """At sigma = inf z is the noise, v is -x0; what the network is told is a number."""
    told = []

    def constant(z, sigma):
        told.append((z, sigma))
        return torch.full_like(z, 0.9 if parametrization == "x0" else -0.9)

    made = SimpleDiffusion(constant, parametrization, kind)
    infinite = torch.full_like(SIGMA, math.inf)
    want = (0.9 - X).square().mean((1, 2, 3)) * (kind != "epsilon")
    assert largest(made.loss(X, NOISE, infinite) - want) < 1e-12
    assert torch.equal(told[0][0], NOISE) and (told[0][1] == 1e4).all()
    assert largest(made.start(NOISE, SIGMA) - (0.9 + column(SIGMA) * NOISE)) < 1e-12
    assert torch.equal(told[1][0], NOISE) and (told[1][1] == 1e4).all()


@pytest.mark.parametrize("center", [0.9, -0.9])
def test_zero_terminal_snr_reaches_bright_and_dark_images(center):
    """Images of brightness N(center, 0.9²) with a pattern of deviation 0.1, by Euler steps from sigma = inf to 0.

    The exact flow takes the mean of n values of noise to center + 0.9 * sqrt(n) * mean. Started as 4 * noise, as if no
    image were left in it, the same network makes all images gray (Lin et al., section 3).
    """
    n = 3 * 8 * 8

    def exact(z, sigma):
        alpha, s = (column(c) for c in alpha_sigma(sigma))
        mean = z.mean((1, 2, 3), keepdim=True)
        x0 = center + 0.81 * alpha / (0.81 * alpha**2 + s**2 / n) * (mean - alpha * center)
        return (alpha * z - x0 - 0.01 * alpha / (0.01 * alpha**2 + s**2) * (z - mean)) / s

    def sample(x, sigmas):
        for sigma, lower in itertools.pairwise(sigmas):
            x = x + (x - made(x, sigma.expand(len(x)))) / sigma * (lower - sigma)
        return x.mean((1, 2, 3))

    made, noise = SimpleDiffusion(exact), image(4, 3, 8, 8)
    means = noise.mean((1, 2, 3))
    sigmas = simple_diffusion_sigmas(400, 64, zero_terminal=True, dtype=DOUBLE)
    got = sample(made.start(noise, sigmas[1].expand(4)), sigmas[1:])
    assert largest((got - center) / (0.9 * n**0.5 * means) - 1) < 0.05
    # With few steps the first one decides; noise and its negative then still center where the images do.
    few, pair = simple_diffusion_sigmas(4, 64, zero_terminal=True, dtype=DOUBLE), torch.cat([noise, -noise])
    got = sample(made.start(pair, few[1].expand(8)), few[1:])
    assert abs(float(got.mean()) - center) < 1e-5  # not 0: the network is told 1e4, where a little is left
    gray = sample(4 * pair, sigmas[sigmas < 4])
    assert abs(float(gray.mean())) < 0.5 * abs(center)


def test_start_from_epsilon_is_refused():
    with pytest.raises(ValueError, match=r"start needs .*'v' or 'x0'.*'epsilon'"):
        SimpleDiffusion(network, "epsilon").start(NOISE, SIGMA)


# Noise


def test_offset_noise_has_a_common_part_in_each_channel():
    generator = torch.Generator().manual_seed(3)
    x = torch.empty(4000, 2, 4, 4, dtype=DOUBLE)
    for offset in (0.0, 0.3):
        noise = training_noise(x, offset=offset, generator=generator)
        common = noise.mean((2, 3))
        within = noise - common[..., None, None]
        assert abs(float(common.var()) / (1 / 16 + offset**2) - 1) < 0.06
        assert abs(float(within.square().mean()) / (15 / 16) - 1) < 0.02
        assert abs(float(torch.corrcoef(common.T)[0, 1])) < 0.06
    plain = training_noise(x[:2], generator=torch.Generator().manual_seed(1))
    again = training_noise(x[:2], offset=0.3, generator=torch.Generator().manual_seed(1))
    difference = again - plain
    assert largest(difference - difference[..., :1, :1]) < 1e-12 and largest(difference) > 0.1
    assert training_noise(torch.empty(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Objectives from a description


def test_objective_builds_what_it_describes():
    spec = {"type": "simple-diffusion", "parametrization": "epsilon", "loss": "v", "weighting": "soft-min-snr"}
    want = SimpleDiffusion(network, "epsilon", "v", "soft-min-snr").loss(X, NOISE, SIGMA)
    assert torch.equal(objective(spec, network).loss(X, NOISE, SIGMA), want)
    assert objective({"type": "edm", "sigma_data": 0.3, "sigma_min": 1e-3, "sigma_max": 80}, network).sigma_data == 0.3
    default = objective({"type": "simple-diffusion"}, network)
    assert (default.parametrization, default.loss_kind, default.weighting) == ("v", "epsilon", None)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("edm", "objective .*'edm'.*'simple-diffusion'.*'edm'"),
        ({"sigma_data": 0.5}, "objective .*'simple-diffusion'"),
        ({"type": "ddpm"}, "objective .*'ddpm'"),
        ({"type": "edm", "parametrization": "v"}, "'edm' has no parametrization; it takes sigma_data, weighting"),
        ({"type": "simple-diffusion", "sigma_data": 1}, "'simple-diffusion' has no sigma_data"),
        ({"type": "edm", "loss": "epsilon"}, "loss .*mse, multiscale.*'epsilon'"),
        ({"type": "edm", "weighting": "min"}, "weighting .*karras.*'min'"),
        ({"type": "edm", "min_snr_gamma": 4}, "min_snr_gamma 4 .*'min-snr'.*None"),
        ({"type": "edm", "weighting": "min-snr", "min_snr_gamma": 0}, "min_snr_gamma .*0"),
        ({"type": "simple-diffusion", "parametrization": "eps"}, "parametrization .*v, epsilon, x0.*'eps'"),
        ({"type": "simple-diffusion", "loss": "mse"}, "loss .*multiscale.*'mse'"),
        ({"type": "simple-diffusion", "weighting": "snr"}, "weighting 'snr' .*'v'.*'epsilon'"),
        ({"type": "simple-diffusion", "weighting": "min-snr", "min_snr_gamma": 4}, "weighting 'min-snr' .*'epsilon'"),
    ],
)
def test_bad_descriptions_are_named(spec, words):
    with pytest.raises(ValueError, match=words):
        objective(spec, network)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SimpleDiffusion(3), TypeError, "model .*int"),
        (lambda: SimpleDiffusion(network)(X, SIGMA[:3]), ValueError, r"sigma .*\(4,\).*\(3,\)"),
        (
            lambda: SimpleDiffusion(network).loss(X, NOISE[:1], SIGMA),
            ValueError,
            r"noise .*\(4, 3, 8, 8\).*\(1, 3, 8, 8\)",
        ),
        (lambda: convert(X, X, SIGMA, "v", "score"), ValueError, "target .*'score'"),
        (lambda: convert(X[:1], X, SIGMA, "v", "x0"), ValueError, r"prediction .*\(4, 3, 8, 8\).*\(1, 3, 8, 8\)"),
        (lambda: training_noise(X[0]), ValueError, r"x .*\(3, 8, 8\)"),
        (lambda: training_noise(X, offset=-0.1), ValueError, "offset .*-0.1"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()

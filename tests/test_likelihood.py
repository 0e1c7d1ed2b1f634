"""Likelihoods against distributions whose answer is known: Gaussians for the flow, discrete pixels for the bound."""

import itertools
import math

import pytest
import torch

from hdit.diffusion.likelihood import bits_per_dimension, log_likelihood, probability_flow, variational_bound

DOUBLE = torch.float64
SHAPE = (5, 2, 3, 4)


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


MEAN = 0.3 * draw(1, *SHAPE[1:], seed=5)
DEVIATION = 0.2 + draw(1, *SHAPE[1:], seed=6).abs()  # of every value


def gaussian(x, sigma, mean=MEAN, deviation=DEVIATION):
    """The exact denoiser of independent values N(mean, deviation^2)."""
    mean, variance = mean.to(x), deviation.to(x) ** 2
    return mean + (x - mean) * variance / (variance + sigma.view(-1, 1, 1, 1) ** 2)


def normal_log_density(x, mean, deviation):
    """Of independent values, summed over an image, from torch.distributions."""
    return torch.distributions.Normal(mean, deviation).log_prob(x).flatten(1).sum(1)


# The probability flow


def test_gaussian_flow_is_exact():
    """The flow of a Gaussian is x_T = mean + (x - mean) * ratio of the deviations, and its determinant is known."""
    low, high = 0.01, 30.0
    x = MEAN + DEVIATION * draw(*SHAPE)
    got = log_likelihood(gaussian, x, low, high, tolerance=1e-9)
    ratio = ((DEVIATION**2 + high**2) / (DEVIATION**2 + low**2)).sqrt()
    latent = MEAN + (x - MEAN) * ratio
    want = normal_log_density(latent, 0.0, high) + ratio.log().sum()
    assert ((got.latent - latent).abs() / high).max() < 1e-7
    assert (got.log_likelihood - want).abs().max() < 1e-5
    # and, with the prior's own share taken into account, it is the density of the data
    density = normal_log_density(x, MEAN, (DEVIATION**2 + low**2).sqrt())
    prior = normal_log_density(latent, 0.0, high) - normal_log_density(latent, MEAN, (DEVIATION**2 + high**2).sqrt())
    assert (got.log_likelihood - prior - density).abs().max() < 1e-5


def test_bits_per_dimension_of_a_toy_gaussian():
    """What a Gaussian over 8-bit steps of 2 / 255 costs in bits, at the default tolerance and in float32."""
    x = (MEAN + DEVIATION * draw(*SHAPE)).float()
    got = log_likelihood(gaussian, x, 1e-3, 1e3)
    assert got.latent.dtype == torch.float32
    want = -(normal_log_density(x.double(), MEAN, DEVIATION) + 24 * math.log(2 / 255)) / 24 / math.log(2)
    assert (bits_per_dimension(got.log_likelihood, x) - want).abs().max() < 2e-3
    assert got.evaluations < 400


def test_flow_goes_back_to_the_images():
    x = MEAN + DEVIATION * draw(*SHAPE)
    there = log_likelihood(gaussian, x, 0.02, 80.0, tolerance=1e-8)
    back = probability_flow(gaussian, there.latent, 80.0, 0.02, tolerance=1e-8)
    assert (back.x - x).abs().max() < 1e-6
    assert (back.log_determinant == 0).all()


def test_flow_error_follows_the_tolerance():
    """Not linear: a mixture of two points, whose flow decides between them."""

    def mixture(x, sigma):
        level = sigma.view(-1, 1, 1, 1) ** 2
        return 0.5 * torch.tanh(0.5 * x / level.clamp(min=1e-3))

    x = 0.1 * draw(*SHAPE)
    finest = probability_flow(mixture, x, 0.05, 40.0, tolerance=1e-11).x
    errors = [(probability_flow(mixture, x, 0.05, 40.0, tolerance=t).x - finest).abs().max() / 40 for t in (1e-3, 1e-6)]
    assert errors[0] < 1e-2 and errors[1] < 1e-5 and errors[1] < errors[0]


def test_what_is_smaller_than_the_tolerance_keeps_its_digits():
    """Errors count in units of sigma: noise on a flat surface grows a millionfold on its way to sigma_max."""
    flat = torch.full_like(DEVIATION, 2e-4)
    x = 2e-4 * draw(*SHAPE)
    got = probability_flow(lambda x, s: gaussian(x, s, 0 * MEAN, flat), x, 1e-4, 100.0, tolerance=1e-5).x
    assert (got / (x * (1e4 / 5e-8) ** 0.5) - 1).abs().max() < 1e-3


def test_steps_adapt_to_the_determinant_too():
    """At x = 0 this flow stands still, while its divergence swings: only the log-determinant needs small steps."""

    def swinging(x, sigma):
        return torch.sin(7 * sigma.log()).view(-1, 1, 1, 1) * x

    signs = draw(1, *SHAPE).sign()
    got = probability_flow(swinging, torch.zeros(SHAPE, dtype=DOUBLE), 0.1, 50.0, probes=signs, tolerance=1e-7)
    low, high = math.log(0.1), math.log(50.0)
    want = 24 * (high - low + (math.cos(7 * high) - math.cos(7 * low)) / 7)
    assert (got.log_determinant - want).abs().max() < 24 * 1e-5


MATRIX = 0.3 * draw(4, 4, seed=9)


def linear(x, sigma):
    """Mixes the four values of an image, weaker where sigma is large."""
    return (x.flatten(1) @ MATRIX.T).view_as(x) / (1 + sigma.view(-1, 1, 1, 1))


def test_divergence_of_a_linear_denoiser():
    """The mean over all sign vectors is the trace; each one alone is exact where the matrix is diagonal."""
    x, low, high = draw(2, 1, 2, 2), 0.1, 10.0
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=DOUBLE).view(16, 1, 1, 2, 2)
    got = probability_flow(linear, x, low, high, probes=signs.expand(16, 2, 1, 2, 2), tolerance=1e-9).log_determinant
    # integral of 1 / (1 + sigma) d ln(sigma)
    integral = math.log(high / (1 + high)) - math.log(low / (1 + low))
    want = 4 * math.log(high / low) - float(MATRIX.trace()) * integral
    assert (got - want).abs().max() < 1e-6
    one = probability_flow(linear, x, low, high, probes=signs[:1].expand(1, 2, 1, 2, 2), tolerance=1e-9)
    assert (one.log_determinant - want).abs().max() > 0.1

    def diagonal(x, sigma):
        return x * MATRIX.diagonal().abs().view(1, 2, 2) / (1 + sigma.view(-1, 1, 1, 1))

    want = 4 * math.log(high / low) - float(MATRIX.diagonal().abs().sum()) * integral
    for k in (3, 10):
        one = probability_flow(diagonal, x, low, high, probes=signs[k : k + 1].expand(1, 2, 1, 2, 2), tolerance=1e-9)
        assert (one.log_determinant - want).abs().max() < 1e-6


def test_probes_are_signs_and_average():
    """Many probes of the linear denoiser come near its trace, as their number says; the generator repeats them."""
    x, k = draw(40, 1, 2, 2), 100
    runs = [
        log_likelihood(linear, x, 0.1, 10.0, probes=k, generator=torch.Generator().manual_seed(4)).log_likelihood
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=DOUBLE).view(16, 1, 1, 2, 2)
    flow = probability_flow(linear, x, 0.1, 10.0, probes=signs.expand(16, 40, 1, 2, 2))
    exact = normal_log_density(flow.x, 0.0, 10.0) + flow.log_determinant
    symmetric = (MATRIX + MATRIX.T) / 2
    integral = math.log(10 / 11) - math.log(0.1 / 1.1)
    scatter = (2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())).sqrt() * integral / k**0.5
    error = runs[0] - exact
    assert abs(float(error.mean())) < 4 * scatter / 40**0.5
    assert 0.6 < float(error.std() / scatter) < 1.5


def test_condition_reaches_the_denoiser():
    x = draw(*SHAPE)
    scaled = log_likelihood(lambda x, sigma, factor: factor * gaussian(x, sigma), x, 0.1, 10.0, factor=1.0)
    assert torch.equal(scaled.latent, log_likelihood(gaussian, x, 0.1, 10.0).latent)
    plain = probability_flow(lambda x, sigma, factor: factor * gaussian(x, sigma), x, 0.1, 10.0, factor=1.0)
    assert torch.equal(plain.x, probability_flow(gaussian, x, 0.1, 10.0).x)


# The variational bound


def pixels(values, weights, count):
    """Images whose pixels take the values k of 0 ... 255 exactly as often as weights say, in random places."""
    k = torch.repeat_interleave(torch.tensor(values), torch.tensor([round(w * count) for w in weights]))
    k = k[torch.randperm(count, generator=torch.Generator().manual_seed(7))]
    return (2 * k.to(DOUBLE) / 255 - 1).view(-1, 1, 8, 8)


def posterior_mean(values, weights):
    """The exact denoiser of independent pixels with these values and probabilities."""
    atoms = 2 * torch.tensor(values, dtype=DOUBLE) / 255 - 1
    log_weights = torch.tensor(weights, dtype=DOUBLE).log()

    def denoiser(x, sigma):
        logits = log_weights - (x[..., None] - atoms) ** 2 / (2 * sigma.view(-1, 1, 1, 1, 1) ** 2)
        return (logits.softmax(-1) * atoms).sum(-1)

    return denoiser


ATOMS = [10, 80, 84, 250], [0.125, 0.5, 0.25, 0.125]  # 1.75 bits


def test_bound_of_the_exact_denoiser_is_the_entropy():
    """With the posterior mean the bound is tight: the entropy of the pixels, 1.75 bits, within its standard error."""
    x = pixels(*ATOMS, 1024)
    options = {"sigma_min": 5e-4, "levels": 128, "generator": torch.Generator().manual_seed(2)}
    got = variational_bound(posterior_mean(*ATOMS), x, **options)
    error = float(got.standard_error.square().sum().sqrt()) / len(x)
    assert 0 < error < 0.02
    assert abs(float(got.total.mean()) - 1.75) < 4 * error
    assert got.reconstruction.abs().max() < 1e-6 and got.prior.abs().max() < 1e-5
    parts = torch.stack([got.prior, got.reconstruction, got.diffusion])
    rounding = 8 * torch.finfo(DOUBLE).eps * parts.abs().sum(0)  # of three sums, of a mean, and of the division by nats
    assert ((got.total - parts.sum(0)).abs() <= rounding).all()


def test_bound_counts_what_the_noisiest_and_cleanest_level_leave_out():
    """Equal probability of all values: 8 bits, whichever part of them the ends of the noise levels have to pay."""
    values, weights = list(range(256)), [1 / 256] * 256
    x = pixels(values, weights, 1024)
    denoiser = posterior_mean(values, weights)
    got = variational_bound(
        denoiser, x, sigma_min=0.01, sigma_max=5.0, levels=48, generator=torch.Generator().manual_seed(3)
    )
    error = float(got.standard_error.square().sum().sqrt()) / len(x)
    assert float(got.reconstruction.mean()) > 0.5
    # The prior: from the mixture at the noisiest level to N(0, 1), which the bound pays too. By a sum over values:
    alpha_squared = 1 / 26
    second_moment = float((x**2).mean())
    prior = 0.5 * (alpha_squared * second_moment + (1 - alpha_squared) - 1 - math.log(1 - alpha_squared)) / math.log(2)
    assert abs(float(got.prior.mean()) - prior) < 1e-12
    # The information that the noisiest level has, I(x; z), is part of the 8 bits; the rest of the prior is excess.
    grid = torch.linspace(-40, 40, 8001, dtype=DOUBLE)
    atoms = torch.linspace(-1, 1, 256, dtype=DOUBLE)
    mixture = torch.exp(-((grid[:, None] - atoms) ** 2) / 50).mean(1) / math.sqrt(50 * math.pi)
    information = (-torch.trapezoid(mixture * mixture.log(), grid) - 0.5 * math.log(50 * math.pi * math.e)) / math.log(
        2
    )
    want = 8 + prior - float(information)
    assert abs(float(got.total.mean()) - want) < 4 * error
    assert error < 0.03


def test_a_worse_denoiser_has_a_higher_bound():
    x = pixels(*ATOMS, 1024)
    exact = posterior_mean(*ATOMS)
    options = {"levels": 24, "generator": torch.Generator().manual_seed(2)}
    good = variational_bound(exact, x, **options).total.mean()
    bad = variational_bound(lambda x, sigma: 0.9 * exact(x, sigma), x, sigma_min=0.02, levels=24).total.mean()
    assert bad > good + 0.3


def test_standard_error_is_the_scatter_of_repetitions():
    x = pixels(*ATOMS, 1024)
    runs = [
        variational_bound(posterior_mean(*ATOMS), x, levels=6, repeats=3, generator=torch.Generator().manual_seed(seed))
        for seed in range(12)
    ]
    scatter = torch.stack([run.total for run in runs]).var(0).mean()
    claimed = torch.stack([run.standard_error for run in runs]).square().mean()
    assert 0.6 < float(scatter / claimed) < 1.6


def test_bound_in_float32_is_that_of_float64():
    x = pixels(*ATOMS, 1024)
    denoiser = posterior_mean(*ATOMS)
    wide, narrow = (
        variational_bound(denoiser, x.to(dtype), levels=24, generator=torch.Generator().manual_seed(1))
        for dtype in (DOUBLE, torch.float32)
    )
    error = float((wide.standard_error.square() + narrow.standard_error.square()).sum().sqrt()) / len(x)
    assert abs(float(wide.total.mean() - narrow.total.mean())) < 4 * error


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: log_likelihood(3, x, 0.1, 1.0), TypeError, "denoiser .*int"),
        (lambda x: log_likelihood(gaussian, x[0], 0.1, 1.0), ValueError, r"x .*\(2, 3, 4\)"),
        (lambda x: log_likelihood(gaussian, x[:0], 0.1, 1.0), ValueError, r"x .*empty.*\(0, 2, 3, 4\)"),
        (lambda x: log_likelihood(gaussian, x, 0.0, 1.0), ValueError, "sigmas .*0.0 and 1.0"),
        (lambda x: log_likelihood(gaussian, x, 2.0, 1.0), ValueError, "sigma_min .*2.0 and 1.0"),
        (lambda x: log_likelihood(gaussian, x, 0.1, 1.0, probes=0), ValueError, "probes .*0"),
        (lambda x: log_likelihood(gaussian, x, 0.1, 1.0, tolerance=-1), ValueError, "tolerance .*-1"),
        (lambda x: variational_bound(gaussian, x), ValueError, "x must hold the 256 values"),
        (lambda x: variational_bound(gaussian, x * 0 + 1, levels=0), ValueError, "levels .*1.*0"),
        (lambda x: variational_bound(gaussian, x * 0 + 1, repeats=1), ValueError, "repeats .*2.*1"),
        (lambda x: log_likelihood(lambda x, s: x * math.nan, x, 0.1, 1.0), ArithmeticError, "sigma 0.1"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(draw(*SHAPE))

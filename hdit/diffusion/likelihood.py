"""How probable a model finds images, in nats or bits per dimension: two ways, for any denoiser D(x, sigma, **cond).

- ``variational_bound``: an upper bound on the bits that lossless coding of 8-bit images takes (Kingma et al. 2021,
  arXiv 2107.00630; simple diffusion reports it for its likelihood weighting). An average over noise levels.
- ``log_likelihood``: the density of the model's own probability flow (Song et al. 2021, arXiv 2011.13456), an ordinary
  differential equation solved from data to noise, with a stochastic estimate of its divergence.

x: (B, C, H, W); images have values in [-1, 1]. sigma is EDM's, of x0 + sigma * noise.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

VALUES = 256  # of an 8-bit channel, evenly from -1 to 1


class Bound(NamedTuple):
    """Bits per dimension of each image, (B,): total = prior + reconstruction + diffusion.

    standard_error: of the total, from what the noise and the levels contribute; how much images differ comes on top.
    """

    total: Tensor
    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    standard_error: Tensor


class Likelihood(NamedTuple):
    """log_likelihood: (B,) in nats; latent: x's shape, the images carried to sigma_max; evaluations of the denoiser."""

    log_likelihood: Tensor
    latent: Tensor
    evaluations: int


@torch.no_grad()
def variational_bound(
    denoiser, x, *, sigma_min=1e-3, sigma_max=1e3, levels=32, repeats=4, generator=None, **cond
) -> Bound:
    """The continuous-time variational bound of 8-bit images x, values 2k / 255 - 1, in bits per dimension.

    diffusion: 1/2 of the integral of |epsilon - its estimate|^2 over the log-SNR from sigma_max to sigma_min
    (arXiv 2107.00630, equation 17 with the log-SNR as the variable), by one random level in each of ``levels`` strata,
    ``repeats`` times (2 at least; their scatter is the standard error). prior: divergence of the noisiest level from
    the standard normal. reconstruction: the pixel's value read off the cleanest level, all 256 being equally likely.
    The denoiser runs levels * repeats times on the whole batch. generator: on any device.

    A network that cannot tell 8-bit values from others pays for every level below their distance, 2 / 255, so the best
    sigma_min is near a fourth of it. Trained levels only: what the network says elsewhere counts as much. The bound is
    what the loss "epsilon" minimises with the density "loguniform".
    """
    _check(denoiser, x, sigma_min, sigma_max)
    for name, value, least in (("levels", levels, 1), ("repeats", repeats, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    steps = (x.double() + 1) * (VALUES - 1) / 2
    if (steps - steps.round()).abs().max() > 1e-3 or steps.min() < -0.5 or steps.max() > VALUES - 0.5:
        raise ValueError(f"x must hold the {VALUES} values 2k / {VALUES - 1} - 1 of 8-bit images, got others")
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    nats = x[0].numel() * math.log(2)

    alpha_squared = 1 / (1 + sigma_max**2)
    prior = 0.5 * (alpha_squared * (x.double() ** 2 - 1) - math.log1p(-alpha_squared)).flatten(1).sum(1)
    span = 2 * math.log(sigma_max / sigma_min)
    totals, diffusions, readings = [], [], []
    for _ in range(repeats):
        error = torch.zeros_like(prior)
        for level in range(levels):
            u = (level + _random(torch.rand, prior, generator)) / levels
            sigma = sigma_max * torch.exp(-u * span / 2)
            error += _noise_error(denoiser, x, sigma.to(wide), generator, cond)
        diffusions.append(0.5 * span * error / levels)
        readings.append(_reading_cost(x, sigma_min, generator))
        totals.append(prior + diffusions[-1] + readings[-1])
    total, diffusion, reading = (torch.stack(parts) / nats for parts in (totals, diffusions, readings))
    return Bound(total.mean(0), prior / nats, reading.mean(0), diffusion.mean(0), total.std(0) / math.sqrt(repeats))


def log_likelihood(
    denoiser, x, sigma_min, sigma_max, *, probes=1, tolerance=1e-4, generator=None, **cond
) -> Likelihood:
    """ln of the density that the probability flow from N(0, sigma_max^2) gives x as its point at sigma_min, in nats.

    probes: random sign vectors whose quadratic forms estimate the divergence (Hutchinson 1990): unbiased, and exact
    where the denoiser treats every value apart. tolerance: as ``probability_flow``. ``bits_per_dimension`` converts,
    and says what to do with 8-bit images first. generator: on any device.
    """
    _check(denoiser, x, sigma_min, sigma_max)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an integer of at least 1, got {probes!r}")
    signs = _random(torch.randn, x.new_empty(probes, *x.shape), generator).sign()
    flow = probability_flow(denoiser, x, sigma_min, sigma_max, probes=signs, tolerance=tolerance, **cond)
    scaled = flow.x.double() / sigma_max
    prior = -0.5 * (scaled.square() + math.log(2 * math.pi * sigma_max**2)).flatten(1).sum(1)
    return Likelihood(prior + flow.log_determinant, flow.x, flow.evaluations)


def bits_per_dimension(log_likelihood: Tensor, x: Tensor) -> Tensor:
    """(B,): bits per dimension of 8-bit images from the log-likelihood (B,) in nats of x (B, C, H, W) in [-1, 1].

    A density compares with probabilities of 8-bit values where x had noise, uniform within +-1 / 255, added to it.
    """
    return -log_likelihood / (x[0].numel() * math.log(2)) + math.log2((VALUES - 1) / 2)


class Flow(NamedTuple):
    """x: the images at the other sigma; log_determinant: (B,), of x's change with the images; evaluations of D."""

    x: Tensor
    log_determinant: Tensor
    evaluations: int


# Dormand and Prince's pair of orders 5 and 4: nodes, stages, and the difference of the two results. The last stage is
# taken at the result, and is the first of the next step.
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
ORDER, MOST_EVALUATIONS = 5, 20_000


def probability_flow(denoiser, x, sigma_from, sigma_to, *, probes=None, tolerance=1e-4, **cond) -> Flow:
    """Carry x from one noise level to another along dx / d ln(sigma) = x - D(x; sigma), either way.

    probes: (K, B, C, H, W), random signs for the divergence; without them the log-determinant is 0. tolerance: of a
    step, for x in units of sigma (rms of an image), for the log-determinant in nats per dimension; steps adapt to the
    worst image. Raises ArithmeticError where the denoiser returns NaN, or needs more than 20,000 evaluations.
    """
    _check(denoiser, x, sigma_from, sigma_to, ordered=False)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be positive and finite, got {tolerance!r}")
    wide, dimensions = torch.promote_types(x.dtype, torch.float32), x[0].numel()
    dtype, time, end = x.dtype, math.log(sigma_from), math.log(sigma_to)

    def slope(time, x):
        sigma = torch.full_like(x[:, 0, 0, 0], math.exp(time))
        return _slope(denoiser, x, sigma, probes, cond)

    x, log_determinant = x.to(wide), torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    slopes, step, evaluations = [slope(time, x)], (end - time) / 20, 1
    while abs(end - time) > 1e-12:
        step = math.copysign(min(abs(step), abs(end - time)), end - time)
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            moved = x + step * _combine(weights, [s[0] for s in slopes])
            slopes.append(slope(time + node * step, moved))
        evaluations += len(NODES) - 1
        off = (step * _combine(ERROR, [s[0] for s in slopes]) / math.exp(time)).square().flatten(1).mean(1).sqrt()
        off_log = step * _combine(ERROR, [s[1] for s in slopes]).abs() / dimensions
        error = float(torch.maximum(off.double(), off_log.abs()).max()) / tolerance if len(x) else 0.0
        if not math.isfinite(error) or evaluations > MOST_EVALUATIONS:
            found = "more than 20,000 evaluations" if math.isfinite(error) else f"a denoiser that is {error}"
            raise ArithmeticError(f"the flow met {found} at sigma {math.exp(time):.4g}, tolerance {tolerance}")
        if error <= 1:
            log_determinant = log_determinant + step * _combine(STAGES[-1], [s[1] for s in slopes])
            x, time, slopes = moved, time + step, slopes[-1:]
        else:
            slopes = slopes[:1]
        step *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** (-1 / ORDER)))
    return Flow(x.to(dtype), log_determinant, evaluations)


def _slope(denoiser, x, sigma, probes, cond):
    """d x / d ln(sigma), and its divergence (B,), each image's."""
    if probes is None:
        with torch.no_grad():
            return x - denoiser(x, sigma, **cond), torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        estimate = denoiser(x, sigma, **cond)
        forms = [
            (signs * torch.autograd.grad(estimate, x, signs, retain_graph=True)[0]).double().flatten(1).sum(1)
            for signs in probes.to(x.dtype)
        ]
    return (x - estimate).detach(), x[0].numel() - torch.stack(forms).mean(0)


def _combine(weights, values):
    return sum(weight * value for weight, value in zip(weights, values, strict=False) if weight)


def _noise_error(denoiser, x, sigma, generator, cond):
    """(B,) float64: the squared error of the noise, (x0 - D) / sigma, summed over an image."""
    level = sigma.view(-1, 1, 1, 1)
    error = (x - denoiser(x + level * _random(torch.randn, x, generator), sigma, **cond)) / level
    return error.double().square().flatten(1).sum(1)


def _reading_cost(x, sigma, generator):
    """(B,) float64, in nats: -ln of the posterior of each pixel's value, given the pixel with noise of level sigma."""
    x = x.double()
    seen = x + sigma * _random(torch.randn, x, generator)
    total = torch.full_like(x, -math.inf)
    for k in range(VALUES):  # one value after the other: all of them at once would be 256 images
        total = torch.logaddexp(total, -((seen - (2 * k / (VALUES - 1) - 1)) ** 2) / (2 * sigma**2))
    return (total + (seen - x) ** 2 / (2 * sigma**2)).flatten(1).sum(1)


def _random(draw, like, generator):
    device = like.device if generator is None else generator.device
    return draw(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def _check(denoiser, x, sigma_min, sigma_max, ordered=True):
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **cond), got {type(denoiser).__name__}")
    if not torch.is_tensor(x) or x.dim() != 4 or not x.is_floating_point() or not x.numel():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor of shape (B, C, H, W), not empty, got {got}")
    for sigma in (sigma_min, sigma_max):
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ValueError(f"both sigmas must be positive and finite, got {sigma_min!r} and {sigma_max!r}")
    if ordered and not sigma_min < sigma_max:
        raise ValueError(f"sigma_min must lie below sigma_max, got {sigma_min} and {sigma_max}")

"""Samplers: from noise at sigmas[0] to an image at sigmas[-1], by a denoiser D(x, sigma) that estimates the image.

With x = x0 + sigma·noise and λ = −ln sigma, all of them integrate one family of equations (W: Brownian in λ)

    dx = −(1 + η)·(x − D)·dλ + √(2η)·sigma dW            η = 0: the probability-flow ODE; η = 1: the reverse SDE

whose linear part has an exact solution. Over a step of h in λ, with k = (1 + η)·h and D as a polynomial of λ,

    x' = e^−k·x + (1 − e^−k)·D + φ2(k)·D'·h − φ3(k)·D''·h² + sigma'·√(1 − e^(−2ηh))·noise

(DPM-Solver++, Lu et al. 2022, arXiv 2211.01095). What D's derivatives are taken from, and where noise comes in, is the
difference between the samplers. Results are those of k-diffusion (github.com/crowsonkb/k-diffusion) to float64
rounding, given the same noise.

Every sampler is called as sampler(denoiser, x, sigmas, **options) and returns the image of x's shape:

    denoiser    called as denoiser(x, sigma, **extra), sigma of shape (B,). One that has a method at(sigma) is asked,
                with a Python number, for the denoiser of that noise level (``guidance`` has such).
    x           (B, …), standard normal noise times sigmas[0].
    sigmas      (n + 1,), decreasing, for n steps; the last may be 0.
    noise_sampler   called as noise_sampler(sigma, sigma_next), returns unit noise like x (see ``noise``); where None,
                from ``seed``: one int, or one per image; s_noise multiplies it.
    callback    called at every step with a dict: i, x (the state), sigma, sigma_hat (where D was taken), denoised (D).
    extra       a dict of conditions for the denoiser.

The state and what is returned are float32 at least (float64 for a float64 x), whatever dtype the denoiser works in.
Coefficients are Python numbers, computed in float64 from sigmas that are read once: no step waits for the device.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import noise


def _prepare(denoiser, x: Tensor, sigmas, callback: Callable | None, extra: dict | None):
    """The state, sigmas as floats, and denoise(x, sigma, i): D in the dtype of the state, reported where i is given."""
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, sigma), got {type(denoiser).__name__}")
    if not torch.is_tensor(x) or not x.is_floating_point() or x.dim() < 2:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor of shape (B, …), got {got}")
    levels = sigmas.detach().cpu().double() if torch.is_tensor(sigmas) else torch.tensor(sigmas, dtype=torch.float64)
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(f"sigmas must have shape (n + 1,) for n steps, 1 at least, got {tuple(levels.shape)}")
    levels = levels.tolist()
    if not all(math.inf > a > b >= 0 for a, b in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must be finite and decrease to 0 or to a positive number, got {levels}")

    def denoise(x: Tensor, sigma_hat: float, i: int | None = None) -> Tensor:
        chosen = denoiser.at(sigma_hat) if hasattr(denoiser, "at") else denoiser
        denoised = chosen(x, x.new_full((x.shape[0],), sigma_hat), **(extra or {}))
        if denoised.shape != x.shape:
            raise ValueError(f"denoiser must return the shape of x {tuple(x.shape)}, got {tuple(denoised.shape)}")
        denoised = denoised.to(x.dtype)
        if callback is not None and i is not None:
            callback({"i": i, "x": x, "sigma": levels[i], "sigma_hat": sigma_hat, "denoised": denoised})
        return denoised

    return x.to(torch.promote_types(x.dtype, torch.float32)), levels, denoise


def _check_options(**options: float):
    for name, value in options.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}")


def first_order(x: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """The step with a constant D: x' = ratio·x + (1 − ratio)·D, where ratio = e^−k.

    With η = 0 the ratio is sigma'/sigma, and this is Euler's step in sigma, which is DDIM's.
    """
    return torch.lerp(denoised, x, ratio)


def add_noise(x: Tensor, unit_noise: Tensor, std: float) -> Tensor:
    """x + std·noise in the dtype of x, whatever that of the noise."""
    return torch.add(x, unit_noise.to(x.dtype), alpha=std)


# ---- EDM: Euler and Heun --------------------------------------------------------------------------------------------


def _churn(x, sigma, sigma_hat, s_noise, noise_sampler) -> tuple[Tensor, float]:
    """x with fresh noise up to the level sigma_hat, and that level."""
    return add_noise(x, noise_sampler(sigma, sigma_hat), s_noise * math.sqrt(sigma_hat**2 - sigma**2)), sigma_hat


def _edm(denoiser, x, sigmas, correct, churn, noise_sampler, seed, callback, extra):
    """Euler's method, corrected or not, each step after some churn."""
    s_churn, s_tmin, s_tmax, s_noise = churn
    _check_options(s_churn=s_churn, s_tmin=s_tmin, s_noise=s_noise)
    x, sigmas, denoise = _prepare(denoiser, x, sigmas, callback, extra)
    noise_sampler = noise_sampler or (noise.Gaussian(x, seed) if s_churn else None)
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        if gamma and s_tmin <= sigma <= s_tmax:
            x, sigma = _churn(x, sigma, sigma * (1 + gamma), s_noise, noise_sampler)
        denoised = denoise(x, sigma, i)
        euler_step = first_order(x, denoised, sigma_next / sigma)
        if correct and sigma_next > 0:
            slope = (x - denoised) / sigma
            slope_next = (euler_step - denoise(euler_step, sigma_next)) / sigma_next
            x = x + (slope + slope_next) * ((sigma_next - sigma) / 2)
        else:
            x = euler_step
    return x


@torch.no_grad()
def euler(
    denoiser, x, sigmas, *, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
    noise_sampler=None, seed=None, callback=None, extra=None,
):  # fmt: skip
    """Algorithm 2 of EDM (Karras et al. 2022, arXiv 2206.00364) without its correction: n evaluations, first order.

    s_churn: fresh noise before each step whose sigma is in [s_tmin, s_tmax], counted over all steps; 0: the ODE.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _edm(denoiser, x, sigmas, False, churn, noise_sampler, seed, callback, extra)


@torch.no_grad()
def heun(
    denoiser, x, sigmas, *, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
    noise_sampler=None, seed=None, callback=None, extra=None,
):  # fmt: skip
    """Algorithm 2 of EDM: Heun's method in sigma, second order, 2n evaluations (2n − 1 where the last sigma is 0).

    Options as in ``euler``; the callback sees the first evaluation of each step.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _edm(denoiser, x, sigmas, True, churn, noise_sampler, seed, callback, extra)


# ---- First order with fresh noise -----------------------------------------------------------------------------------


@torch.no_grad()
def euler_ancestral(
    denoiser, x, sigmas, *, eta=1.0, s_noise=1.0, noise_sampler=None, seed=None, callback=None, extra=None
):
    """Euler down to a level below sigma', then noise up to it: DDPM's posterior for eta = 1, Euler for eta = 0."""
    _check_options(eta=eta, s_noise=s_noise)
    x, sigmas, denoise = _prepare(denoiser, x, sigmas, callback, extra)
    noise_sampler = noise_sampler or (noise.Gaussian(x, seed) if eta else None)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
        down = math.sqrt(sigma_next**2 - up**2)
        x = first_order(x, denoise(x, sigma, i), down / sigma)
        if up > 0:
            x = add_noise(x, noise_sampler(sigma, sigma_next), s_noise * up)
    return x


@torch.no_grad()
def ddpm(denoiser, x, sigmas, *, gamma=0.3, s_noise=1.0, noise_sampler=None, seed=None, callback=None, extra=None):
    """Ancestral sampling with interpolated variance, as in simple diffusion (Hoogeboom et al. 2023, arXiv 2301.11093).

    gamma: the variance is (posterior's)^(1 − gamma)·(upper bound's)^gamma, between DDPM's "small" for 0 and "large"
    for 1 (Ho et al. 2020, arXiv 2006.11239), both of the variance-preserving z = x/√(1 + sigma²).
    """
    _check_options(gamma=gamma, s_noise=s_noise)
    x, sigmas, denoise = _prepare(denoiser, x, sigmas, callback, extra)
    noise_sampler = noise_sampler or noise.Gaussian(x, seed)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        x = first_order(x, denoise(x, sigma, i), (sigma_next / sigma) ** 2)
        if sigma_next > 0:
            # In z the variance is c·v^gamma·v'^(1 − gamma), v = sigma²/(1 + sigma²); times 1 + sigma'² it is x's.
            bounds = [s**2 / (1 + s**2) for s in (sigma, sigma_next)]
            c = 1 - (sigma_next / sigma) ** 2
            variance = c * bounds[0] ** gamma * bounds[1] ** (1 - gamma) * (1 + sigma_next**2)
            x = add_noise(x, noise_sampler(sigma, sigma_next), s_noise * math.sqrt(variance))
    return x


# ---- DPM-Solver++: the derivatives of D from the steps before -------------------------------------------------------


def _multistep(
    denoiser, x, sigmas, order, eta, s_noise, noise_sampler, seed, callback, extra, midpoint=False, curvature=0.5
):
    """The formula at the top, D's derivatives being differences to the last ``order`` − 1 steps (fewer at first).

    midpoint: φ2 is replaced by half of (1 − e^−k), equal to it to first order in k. curvature: multiplies D''.
    """
    _check_options(eta=eta, s_noise=s_noise)
    x, sigmas, denoise = _prepare(denoiser, x, sigmas, callback, extra)
    if eta and noise_sampler is None:
        # In y = x·sigma^−(1 + η) the noise is a Brownian motion of the time sigma^−2η: finer steps, the same noise.
        noise_sampler = noise.Brownian(x, seed, exponent=-max(2 * eta, 1e-3))
    past: list[tuple[Tensor, float]] = []  # D and h of earlier steps, the last first
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, sigma, i)
        if sigma_next == 0:
            return denoised  # h is infinite
        h = math.log(sigma / sigma_next)
        k = (1 + eta) * h
        phi_1 = -math.expm1(-k)
        phi_2 = phi_1 / 2 if midpoint else 1 - phi_1 / k
        x = first_order(x, denoised, math.exp(-k))
        if len(past) == 1:
            ((last, h_1),) = past
            x = x + (denoised - last) * (phi_2 * h / h_1)
        elif len(past) == 2:
            (last, h_1), (before, h_2) = past
            phi_3 = phi_2 / k - 1 / 2
            # With D's slopes over the last two steps, D'' = 2·(slope_1 − slope_2)/(h_1 + h_2), D' = slope_1 + D''·h_1/2
            mix = (phi_2 * h_1 - 2 * curvature * phi_3 * h) / (h_1 + h_2)
            x = x + (denoised - last) * ((phi_2 + mix) * h / h_1) - (last - before) * (mix * h / h_2)
        if eta:
            std = sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
            x = add_noise(x, noise_sampler(sigma, sigma_next), s_noise * std)
        past = [(denoised, h), *past][: order - 1]
    return x


@torch.no_grad()
def dpmpp_2m(denoiser, x, sigmas, *, callback=None, extra=None):
    """DPM-Solver++(2M): second order, n evaluations, deterministic."""
    return _multistep(denoiser, x, sigmas, 2, 0.0, 0.0, None, None, callback, extra, midpoint=True)


@torch.no_grad()
def dpmpp_2m_sde(
    denoiser, x, sigmas, *, eta=1.0, s_noise=1.0, noise_sampler=None, seed=None, solver_type="midpoint",
    callback=None, extra=None,
):  # fmt: skip
    """DPM-Solver++(2M) for the SDE; solver_type "midpoint" (with eta = 0 it is ``dpmpp_2m``) or "heun"."""
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"solver_type must be midpoint or heun, got {solver_type!r}")
    midpoint = solver_type == "midpoint"
    return _multistep(denoiser, x, sigmas, 2, eta, s_noise, noise_sampler, seed, callback, extra, midpoint)


@torch.no_grad()
def dpmpp_3m_sde(
    denoiser, x, sigmas, *, eta=1.0, s_noise=1.0, noise_sampler=None, seed=None, solver_type="k-diffusion",
    callback=None, extra=None,
):  # fmt: skip
    """DPM-Solver++(3M) for the SDE, of k-diffusion: HDiT's sampler, with 50 steps.

    solver_type: "k-diffusion" takes half of D's second derivative, as k-diffusion and diffusers do, which leaves the
    method at second order; "taylor" takes all of it, and its error falls with the third.
    """
    curvatures = {"k-diffusion": 0.5, "taylor": 1.0}
    if solver_type not in curvatures:
        raise ValueError(f"solver_type must be {' or '.join(curvatures)}, got {solver_type!r}")
    return _multistep(
        denoiser, x, sigmas, 3, eta, s_noise, noise_sampler, seed, callback, extra, curvature=curvatures[solver_type]
    )


SAMPLERS = {
    sampler.__name__: sampler for sampler in (euler, heun, euler_ancestral, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, ddpm)
}

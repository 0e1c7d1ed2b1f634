"""Noise levels: which ones a sampler visits, and how training draws them.

A level is sigma in x = x0 + sigma * noise (EDM, Karras et al. 2022, arXiv 2206.00364), or the log-SNR
lambda = ln(alpha^2 / s^2) of z = alpha * x0 + s * noise with alpha^2 + s^2 = 1 (simple diffusion, Hoogeboom et al.
2023, arXiv 2301.11093). They are one quantity: x = z / alpha, sigma = s / alpha = exp(-lambda / 2).

- Sampling: ``karras_sigmas``, ``exponential_sigmas``, ``polyexponential_sigmas``, ``vp_sigmas`` and
  ``simple_diffusion_sigmas`` return n + 1 decreasing sigmas, the last 0.
- Log-SNR as a function of time, t = 0 clean and t = 1 noisy: ``logsnr_cosine``, ``logsnr_shifted``,
  ``logsnr_interpolated``; ``zero_terminal_snr`` moves their noisy end to pure noise.
- Training: ``density(name, ...)`` maps u in [0, 1) to sigma by the inverse of its distribution function, and
  ``stratified_uniform`` draws the u of a batch that is spread over ranks and accumulation steps.

Everything is computed in float64 and rounded once, to the dtype of the result: at sigma = 1e3 the tangents of the
cosine schedule would leave float32 three digits.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

LOGSNR_MIN, LOGSNR_MAX = -15.0, 15.0  # simple diffusion's ends
PURE_NOISE_SHARE = 1e-3  # of training at infinite sigma, as with the thousand discrete times of arXiv 2305.08891
OPEN_END = 1e-7  # u stays this far from 0 and 1 where the distribution has no end there, as in k-diffusion


def karras_sigmas(n, sigma_min, sigma_max, rho=7.0, *, device=None, dtype=torch.float32) -> Tensor:
    """(n + 1,): sigma^(1 / rho) falls evenly from sigma_max to sigma_min, then 0 (arXiv 2206.00364, equation 5)."""
    ramp = _ramp(n, sigma_min, sigma_max, rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _schedule((low + ramp * (high - low)) ** rho, sigma_min, sigma_max, device, dtype)


def exponential_sigmas(n, sigma_min, sigma_max, *, device=None, dtype=torch.float32) -> Tensor:
    """(n + 1,): ln sigma falls evenly from sigma_max to sigma_min, then 0."""
    return polyexponential_sigmas(n, sigma_min, sigma_max, device=device, dtype=dtype)


def polyexponential_sigmas(n, sigma_min, sigma_max, rho=1.0, *, device=None, dtype=torch.float32) -> Tensor:
    """(n + 1,): ln sigma falls from sigma_max to sigma_min as (remaining share of the steps)^rho, then 0."""
    ramp = _ramp(n, sigma_min, sigma_max, rho)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _schedule((low + ramp**rho * (high - low)).exp(), sigma_min, sigma_max, device, dtype)


def vp_sigmas(n, beta_d=19.9, beta_min=0.1, eps_s=1e-3, *, device=None, dtype=torch.float32) -> Tensor:
    """(n + 1,): sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, t evenly from 1 to eps_s, then 0.

    The continuous DDPM schedule (Song et al. 2021, arXiv 2011.13456, in EDM's terms: arXiv 2206.00364, table 1).
    """
    _positive(beta_d=beta_d, beta_min=beta_min, eps_s=eps_s)
    if eps_s >= 1:
        raise ValueError(f"eps_s must lie below 1, where the schedule starts, got {eps_s}")
    t = 1 - (1 - eps_s) * (1 - _ramp(n, eps_s, 1.0))
    sigmas = torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, dtype)


def simple_diffusion_sigmas(
    n, image_d, noise_d_low=32, noise_d_high=None, *, zero_terminal=False, device=None, dtype=torch.float32
) -> Tensor:
    """(n + 1,): sigma at t = 1, (n - 1) / n, ..., 1 / n of ``logsnr_interpolated``, then 0: simple diffusion's sampler.

    With zero_terminal the first value is infinite, and no x = x0 + sigma * noise exists there: the objective's
    ``start(noise, sigma)`` takes the step to sigmas[1], and any sampler goes on with sigmas[1:].
    """
    _count(n=n)
    t = torch.arange(n, 0, -1, dtype=torch.float64) / n
    sigmas = logsnr_to_sigma(logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, zero_terminal=zero_terminal))
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, dtype)


def sigma_to_logsnr(sigma: Tensor) -> Tensor:
    """-2 ln sigma, of sigma's shape; 0 becomes +inf, inf becomes -inf."""
    return -2 * sigma.log()


def logsnr_to_sigma(logsnr: Tensor) -> Tensor:
    """exp(-logsnr / 2), of logsnr's shape; -inf becomes inf."""
    return torch.exp(-logsnr / 2)


def logsnr_cosine(t: Tensor, logsnr_min=LOGSNR_MIN, logsnr_max=LOGSNR_MAX) -> Tensor:
    """-2 ln tan(a + t (b - a)), from logsnr_max at t = 0 to logsnr_min at t = 1 (arXiv 2301.11093, equation 1).

    t: any shape, floating point, in [0, 1]; the result is like t.
    """
    return _like(_cosine, t, *_logsnr_ends(logsnr_min, logsnr_max))


def logsnr_shifted(t: Tensor, image_d, noise_d, logsnr_min=LOGSNR_MIN, logsnr_max=LOGSNR_MAX) -> Tensor:
    """``logsnr_cosine`` + 2 ln(noise_d / image_d): the SNR of noise_d² images at image_d² (arXiv 2301.11093, 3.1)."""
    _positive(noise_d=noise_d)
    return logsnr_interpolated(t, image_d, noise_d, noise_d, logsnr_min, logsnr_max)


def logsnr_interpolated(
    t: Tensor,
    image_d,
    noise_d_low=32,
    noise_d_high=None,
    logsnr_min=LOGSNR_MIN,
    logsnr_max=LOGSNR_MAX,
    *,
    zero_terminal=False,
) -> Tensor:
    """Two shifted schedules, blended: noise_d_high at t = 0, noise_d_low at t = 1 (arXiv 2301.11093, section 3.1).

    noise_d_high: image_d unless given. image_d: side of the image, the longer one, in pixels. Plain cosine:
    noise_d_low = noise_d_high = image_d; shifted: noise_d_low = noise_d_high. The limits apply before the shift, so the
    ends move with it. zero_terminal: as ``zero_terminal_snr``. t: any shape, floating point, in [0, 1]; the result is
    like t.
    """
    low, high = _shifts(image_d, noise_d_low, noise_d_high)
    ends = _logsnr_ends(logsnr_min, logsnr_max)

    def blend(t):
        return _cosine(t, *ends) + high + t * (low - high)

    def blend_to_pure_noise(t):
        return _zero_terminal(blend(t), *blend(t.new_tensor([1.0, 0.0])))

    return _like(blend_to_pure_noise if zero_terminal else blend, t)


def zero_terminal_snr(logsnr: Tensor, logsnr_min, logsnr_max) -> Tensor:
    """The schedule with pure noise at its end: logsnr_min becomes -inf, logsnr_max stays.

    The signal's amplitude alpha is shifted and scaled linearly (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    logsnr: any shape, floating point, between logsnr_min and logsnr_max, the schedule's own ends.

    At logsnr = -inf sigma is infinite. ``losses.SimpleDiffusion`` trains there where the network predicts v or x0 (an
    epsilon that equals its input says nothing about the image), and its ``start`` is the first step of sampling.
    """
    return _like(_zero_terminal, logsnr, *_logsnr_ends(logsnr_min, logsnr_max))


def cosine_interpolated_sigmas(
    u: Tensor, image_d, noise_d_low=32, noise_d_high=None, sigma_data=0.5, sigma_min=1e-3, sigma_max=1e3
) -> Tensor:
    """sigma at u, of u's shape and dtype: sigma_max at u = 0, sigma_min at u = 1 (HDiT, arXiv 2401.11605, section 4.5).

    Simple diffusion's interpolated cosine schedule of log-SNR = 2 ln(sigma_data / sigma), with the limits moved against
    each shift so that the ends stay where they are. image_d: side of the image, the longer one, in pixels;
    noise_d_high: image_d unless given.
    """
    return density(
        "cosine-interpolated",
        image_d=image_d,
        noise_d_low=noise_d_low,
        noise_d_high=noise_d_high,
        sigma_data=sigma_data,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )(u)


def density(name: str, **params) -> Callable[[Tensor], Tensor]:
    """The training distribution ``name`` as a function of u in [0, 1): sigma of u's shape and dtype.

    Inverse distribution functions of k-diffusion's densities. Parameters with their defaults, sigma_data = 0.5:

    - "lognormal": loc=-1.2, scale=1.2, of ln sigma (EDM's)
    - "split-lognormal": loc, scale_1, scale_2, of ln sigma below and above loc
    - "loglogistic": loc=ln sigma_data, scale=0.5, of ln sigma; truncated to sigma_min=0 ... sigma_max=inf
    - "loguniform": sigma_min, sigma_max
    - "v-diffusion": atan(sigma / sigma_data) is uniform between sigma_min=1e-3 and sigma_max=1e3
    - "cosine": the same, shifted by noise_d (none unless given) for images of side image_d; u = 0 is the noisy end
    - "cosine-interpolated": ``cosine_interpolated_sigmas``; image_d, noise_d_low=32, noise_d_high=image_d
    - "simple-diffusion": sigma at a uniform time of ``logsnr_interpolated``; image_d, noise_d_low=32,
      noise_d_high=image_d, zero_terminal=False; u = 0 is the noisy end (with zero_terminal, u < 1e-3 is infinite)
    """
    if name not in DENSITIES:
        raise ValueError(f"name must be one of {', '.join(DENSITIES)}, got {name!r}")
    accepted = inspect.signature(DENSITIES[name]).parameters
    missing = [key for key, p in accepted.items() if p.default is inspect.Parameter.empty and key not in params]
    for problem, keys in (("does not take", params.keys() - accepted.keys()), ("needs", missing)):
        if keys:
            names = ", ".join(accepted)
            raise ValueError(f"density {name!r} {problem} {', '.join(sorted(keys))}; its parameters are {names}")
    inverse = DENSITIES[name](**params)
    return lambda u: _like(inverse, u)


def _lognormal(loc=-1.2, scale=1.2):
    _positive(scale=scale)
    return _split_lognormal(loc, scale, scale)


def _split_lognormal(loc, scale_1, scale_2):
    _finite(loc=loc)
    _positive(scale_1=scale_1, scale_2=scale_2)
    left = scale_1 / (scale_1 + scale_2)  # the share below loc: there the two halves have the same density

    def inverse(u):
        u = u * (1 - 2 * OPEN_END) + OPEN_END
        below, above = u / (2 * left), (1 - u) / (2 * (1 - left))
        quantile = torch.where(
            u < left,
            scale_1 * torch.special.ndtri(below.clamp(max=0.5)),
            -scale_2 * torch.special.ndtri(above.clamp(max=0.5)),
        )
        return (loc + quantile).exp()

    return inverse


def _loglogistic(loc=None, scale=0.5, sigma_min=0.0, sigma_max=math.inf, sigma_data=0.5):
    _positive(scale=scale, sigma_data=sigma_data)
    loc = math.log(sigma_data) if loc is None else loc
    _finite(loc=loc)
    _finite(sigma_min=sigma_min)
    if isinstance(sigma_max, str) or not 0 <= sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min and sigma_max must satisfy 0 <= sigma_min < sigma_max, got {sigma_min}, {sigma_max!r}"
        )
    # sigma = exp(loc + scale * log-odds). The share above has its digits where the one below is near 1.
    ends = [(math.log(sigma) - loc) / scale if sigma > 0 else -math.inf for sigma in (sigma_min, sigma_max)]
    below_ends, above_ends = (torch.sigmoid(sign * torch.tensor(ends, dtype=torch.float64)) for sign in (1, -1))

    def inverse(u):
        below = torch.lerp(*below_ends.to(u), u).clamp(min=0 if sigma_min > 0 else OPEN_END)
        above = torch.lerp(*above_ends.to(u), u).clamp(min=0 if sigma_max < math.inf else OPEN_END)
        return (loc + scale * (below.log() - above.log())).exp()

    return inverse


def _loguniform(sigma_min, sigma_max):
    _sigma_ends(sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return lambda u: (low + u * (high - low)).exp()


def _v_diffusion(sigma_data=0.5, sigma_min=1e-3, sigma_max=1e3):
    toward_clean = _cosine_interpolated(1, 1, 1, sigma_data, sigma_min, sigma_max)
    return lambda u: toward_clean(1 - u)


def _shifted_cosine(image_d=1, noise_d=None, sigma_data=0.5, sigma_min=1e-3, sigma_max=1e3):
    return _cosine_interpolated(
        image_d, image_d if noise_d is None else noise_d, noise_d, sigma_data, sigma_min, sigma_max
    )


def _cosine_interpolated(image_d, noise_d_low=32, noise_d_high=None, sigma_data=0.5, sigma_min=1e-3, sigma_max=1e3):
    shifts = _shifts(image_d, noise_d_low, noise_d_high)
    _positive(sigma_data=sigma_data)
    _sigma_ends(sigma_min, sigma_max)
    noisy, clean = (2 * math.log(sigma_data / sigma) for sigma in (sigma_max, sigma_min))

    def inverse(u):
        low, high = (_cosine(1 - u, noisy - shift, clean - shift) + shift for shift in shifts)
        return sigma_data * torch.exp(-torch.lerp(low, high, u) / 2)

    return inverse


def _simple_diffusion(image_d, noise_d_low=32, noise_d_high=None, zero_terminal=False):
    _shifts(image_d, noise_d_low, noise_d_high)

    def inverse(u):
        t = torch.where(u < PURE_NOISE_SHARE, 1, 1 - u) if zero_terminal else 1 - u
        return logsnr_to_sigma(logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, zero_terminal=zero_terminal))

    return inverse


DENSITIES: dict[str, Callable] = {
    "lognormal": _lognormal,
    "split-lognormal": _split_lognormal,
    "loglogistic": _loglogistic,
    "loguniform": _loguniform,
    "v-diffusion": _v_diffusion,
    "cosine": _shifted_cosine,
    "cosine-interpolated": _cosine_interpolated,
    "simple-diffusion": _simple_diffusion,
}


def stratified_uniform(
    batch: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    micro_batch: int = 0,
    generator: torch.Generator | None = None,
    device=None,
    dtype=torch.float32,
) -> Tensor:
    """(batch,): the u of this rank's micro-batch, one in each of its strata of [0, 1).

    An optimizer step has world_size * accumulation * batch elements; element i lies in [i, i + 1) / that number. Rank r
    holds the elements r, r + world_size, r + 2 world_size, ..., and its micro-batch m the ``batch`` of them that start
    at the (m * batch)-th. So the strata of all ranks and micro-batches tile [0, 1) without gap or overlap.

    Every call draws the whole step's numbers and returns its own: with a generator in the same state on every rank and
    for every micro-batch (seed it by the step), element i has the same u however many ranks share the work. Without
    one, PyTorch's global generator serves; the strata are the same.
    """
    _count(batch=batch, world_size=world_size, accumulation=accumulation)
    for name, index, size in (("rank", rank, world_size), ("micro_batch", micro_batch, accumulation)):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
            raise ValueError(f"{name} must be an integer in [0, {size}), got {index!r}")
    source = "cpu" if generator is None else generator.device
    total = batch * accumulation * world_size
    within = torch.rand(total, generator=generator, device=source, dtype=torch.float64)
    element = rank + world_size * torch.arange(micro_batch * batch, (micro_batch + 1) * batch, device=source)
    u = ((element + within[element]) / total).to(dtype)
    next_stratum = ((element + 1) / total).to(dtype)  # rounding may reach it, and 1 at the end
    return u.minimum(torch.nextafter(next_stratum, torch.zeros_like(u))).to(device)


def _cosine(t, logsnr_min, logsnr_max):
    start, stop = (math.atan(math.exp(-logsnr / 2)) for logsnr in (logsnr_max, logsnr_min))
    return -2 * torch.log(torch.tan(start + t * (stop - start)))


def _zero_terminal(logsnr, logsnr_min, logsnr_max):
    def amplitudes(logsnr):  # alpha and 1 - alpha
        logsnr = torch.as_tensor(logsnr, dtype=torch.float64)
        alpha = torch.sigmoid(logsnr).sqrt()
        return alpha, torch.sigmoid(-logsnr) / (1 + alpha)

    (alpha, rest), (last, _), (first, first_rest) = map(amplitudes, (logsnr, logsnr_min, logsnr_max))
    scaled = ((alpha - last) * first / (first - last)).clamp(min=0)
    scaled_rest = (first * rest - last * first_rest) / (first - last)  # 1 - scaled, without the cancellation
    return 2 * scaled.log() - scaled_rest.log() - torch.log1p(scaled)


def _like(function, t, *arguments):
    """function(t) computed in float64 and rounded to t's dtype; on the CPU where the device has no float64."""
    if not torch.is_tensor(t) or not t.is_floating_point():
        raise TypeError(f"t, u or logsnr must be a floating-point tensor, got {t.dtype if torch.is_tensor(t) else t!r}")
    wide = t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)
    return function(wide, *arguments).to(t.device, t.dtype)


def _ramp(n, sigma_min, sigma_max, rho=1.0):
    """(n,) float64, evenly from 1 to 0."""
    _count(n=n)
    _positive(rho=rho)
    _sigma_ends(sigma_min, sigma_max)
    return torch.linspace(1, 0, n, dtype=torch.float64)


def _schedule(sigmas, sigma_min, sigma_max, device, dtype):
    """With exact ends, whatever the powers between them rounded to, and the final 0."""
    sigmas[-1], sigmas[0] = sigma_min, sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(device, dtype)


def _shifts(image_d, noise_d_low, noise_d_high):
    noise_d_high = image_d if noise_d_high is None else noise_d_high
    _positive(image_d=image_d, noise_d_low=noise_d_low, noise_d_high=noise_d_high)
    return tuple(2 * math.log(noise_d / image_d) for noise_d in (noise_d_low, noise_d_high))


def _logsnr_ends(logsnr_min, logsnr_max):
    _finite(logsnr_min=logsnr_min, logsnr_max=logsnr_max)
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min must lie below logsnr_max, got {logsnr_min} and {logsnr_max}")
    return logsnr_min, logsnr_max


def _sigma_ends(sigma_min, sigma_max):
    _positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if sigma_min > sigma_max:
        raise ValueError(f"sigma_min must not exceed sigma_max, got {sigma_min} and {sigma_max}")


def _count(**values):
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _finite(**values):
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def _positive(**values):
    _finite(**values)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")

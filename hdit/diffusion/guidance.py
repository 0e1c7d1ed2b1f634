"""Guidance and thresholding, wrapped around a denoiser: the result is a denoiser again, for every sampler alike.

    Thresholded(Guided(denoiser, scale=1.5, num_classes=1000), percentile=0.995)

Both have the method at(sigma) by which a sampler asks for the denoiser of one noise level: where guidance has no
effect, that is the denoiser within, at its own cost, and the decision is made on a Python number, not on the device.
"""

import math

import torch
from torch import Tensor


def _choose(denoiser, sigma: float):
    return denoiser.at(sigma) if hasattr(denoiser, "at") else denoiser


def _std(x: Tensor) -> Tensor:
    """Per image, (B, 1, …)."""
    return x.std(dim=tuple(range(1, x.dim())), keepdim=True)


def _like(cond: Tensor, null) -> Tensor:
    """A number or tensor in the shape, dtype and place of a condition. A number is filled in without a copy."""
    if torch.is_tensor(null):
        return null.to(cond.device, cond.dtype).expand_as(cond)
    return torch.full_like(cond, null)


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): D = D_without + scale·(D_with − D_without).

    denoiser: called as denoiser(x, sigma, **cond). scale: 1 is no guidance, and costs one evaluation. num_classes: says
    that class_cond = num_classes stands for «no class»; or null: a dict {name of a condition: what it is without}, a
    number or a tensor that broadcasts to it; conditions not named are given to both. interval: (low, high), guidance
    for low < sigma ≤ high only (Kynkäänniemi et al. 2024, arXiv 2404.07724). rescale: 0 to 1, how far the standard
    deviation of each image goes back to that of D_with (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    batched: both in one forward pass of twice the batch; False takes two passes and half the memory.
    """

    def __init__(
        self, denoiser, scale: float, *, num_classes: int | None = None, null: dict | None = None,
        interval: tuple[float, float] | None = None, rescale: float = 0.0, batched: bool = True,
    ):  # fmt: skip
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **cond), got {type(denoiser).__name__}")
        for name, value, most in (("scale", scale, math.inf), ("rescale", rescale, 1)):
            if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= most:
                accepted = "a finite number of 0 or more" if most > 1 else "a number in [0, 1]"
                raise ValueError(f"{name} must be {accepted}, got {value!r}")
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ValueError(f"interval must be (low, high), 0 ≤ low < high, got {interval!r}")
        if (num_classes is None) == (null is None):
            raise ValueError(f"num_classes or null says what «no condition» is: give one, got {num_classes}, {null!r}")
        self.denoiser, self.scale, self.rescale, self.batched = denoiser, float(scale), float(rescale), batched
        self.null = {"class_cond": num_classes} if null is None else dict(null)
        self.low, self.high = (0.0, math.inf) if interval is None else map(float, interval)

    def at(self, sigma: float):
        """The denoiser for this noise level: unguided outside the interval, and for scale 1."""
        inner = _choose(self.denoiser, sigma)
        if self.scale == 1 or not self.low < sigma <= self.high:
            return inner
        return lambda x, sigma, **cond: self._guide(inner, x, sigma, cond)

    def __call__(self, x: Tensor, sigma: Tensor, **cond) -> Tensor:
        """D(x; sigma) for x (B, …), sigma (B,), which may differ within the batch: both are evaluated for all of it."""
        if self.scale == 1:
            return self.denoiser(x, sigma, **cond)
        guided = self._guide(self.denoiser, x, sigma, cond)
        if (self.low, self.high) == (0, math.inf):
            return guided
        inside = (sigma > self.low) & (sigma <= self.high)
        return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), guided, self.denoiser(x, sigma, **cond))

    def _guide(self, denoiser, x, sigma, cond):
        with_, without = self._evaluate(denoiser, x, sigma, cond)
        guided = without + self.scale * (with_ - without)
        if self.rescale:
            # 1 + rescale·(ratio − 1) times the image: what the paper mixes from the rescaled one and the other.
            guided = guided * (1 + self.rescale * (_std(with_) / _std(guided).clamp(min=1e-12) - 1))
        return guided

    def _evaluate(self, denoiser, x, sigma, cond) -> tuple[Tensor, Tensor]:
        """D with its conditions, and without those named in null."""
        if missing := self.null.keys() - cond.keys():
            raise ValueError(
                f"guidance needs the condition {', '.join(sorted(missing))}, got {', '.join(cond) or 'none'}"
            )
        without = cond | {name: _like(cond[name], value) for name, value in self.null.items()}
        if not self.batched:
            return denoiser(x, sigma, **cond), denoiser(x, sigma, **without)

        def twice(a, b):
            per_image = torch.is_tensor(a) and a.shape[:1] == x.shape[:1]
            return torch.cat([a, b]) if per_image else a

        both = {name: twice(value, without[name]) for name, value in cond.items()}
        return denoiser(twice(x, x), twice(sigma, sigma), **both).chunk(2)


class Thresholded:
    """Clips each estimate of the clean image to the range of pixels, so that strong guidance does not burn it out.

    percentile: dynamic thresholding (Saharia et al. 2022, Imagen, arXiv 2205.11487, section 2.3): s is this quantile
    of an image's |D|, in (0, 1], at least ``limit``; D is clipped to [−s, s] and scaled by limit / s. None: static
    thresholding, to [−limit, limit].
    """

    def __init__(self, denoiser, percentile: float | None = 0.995, limit: float = 1.0):
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable as denoiser(x, sigma, **cond), got {type(denoiser).__name__}")
        if percentile is not None and not (isinstance(percentile, int | float) and 0 < percentile <= 1):
            raise ValueError(f"percentile must be in (0, 1] or None, got {percentile!r}")
        if not (isinstance(limit, int | float) and 0 < limit < math.inf):
            raise ValueError(f"limit must be positive and finite, got {limit!r}")
        self.denoiser, self.percentile, self.limit = denoiser, percentile, float(limit)

    def at(self, sigma: float):
        inner = _choose(self.denoiser, sigma)
        return lambda x, sigma, **cond: self._clip(inner(x, sigma, **cond))

    def __call__(self, x: Tensor, sigma: Tensor, **cond) -> Tensor:
        """D(x; sigma), thresholded, for x (B, …) and sigma (B,)."""
        return self._clip(self.denoiser(x, sigma, **cond))

    def _clip(self, denoised: Tensor) -> Tensor:
        if self.percentile is None:
            return denoised.clamp(-self.limit, self.limit)
        s = quantile(denoised.abs().flatten(1), self.percentile).clamp(min=self.limit)
        s = s.view(-1, *[1] * (denoised.dim() - 1))
        return torch.maximum(torch.minimum(denoised, s), -s) * (self.limit / s)


def quantile(rows: Tensor, q: float) -> Tensor:
    """(B,): the q-quantile of each row of (B, n), linear between neighbours; n may exceed torch.quantile's 2^24."""
    position = q * (rows.shape[1] - 1)
    below = math.floor(position)
    low, high = (rows.kthvalue(min(k, rows.shape[1] - 1) + 1, dim=1).values for k in (below, below + 1))
    return low + (position - below) * (high - low)

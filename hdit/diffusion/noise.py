"""Noise for the samplers: a noise sampler is called as noise_sampler(sigma, sigma_next) and returns unit noise like x.

Each image of a batch has a seed of its own, so that it is the same drawn alone or among others. Everything is drawn in
float32 on the device of x, whatever the dtype of x, so that a float64 run sees the noise of a float32 one. Seeds and
coefficients are Python numbers: nothing waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**64


def _mix(*words: int) -> int:
    """A 64-bit hash of integers: the finalizer of splitmix64 (Steele et al. 2014), chained over the words."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % _WORD
        state ^= state >> 31
    return state


def image_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per image: an int stands for seed, seed + 1, …; None for what PyTorch's generator of the CPU draws."""
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    integers = [seed] if isinstance(seed, int) else list(seed) if isinstance(seed, Sequence) else [None]
    if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63 for s in integers):
        raise ValueError(f"seed must be an int of 0 to 2^63 - 1, or one such int per image, got {seed!r}")
    if isinstance(seed, int):
        return [seed + i for i in range(batch)]
    if len(integers) != batch:
        raise ValueError(f"seed must hold one int per image, {batch}, got {len(integers)}")
    return integers


def _generator(device: torch.device, seed: int) -> torch.Generator:
    """Seeded, on ``device``; on the CPU for the meta device, which has none. The CPU's reads 32 bits of the seed."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed % _WORD)


def initial(shape: Sequence[int], seed: int | Sequence[int] | None = None, device="cpu", dtype=torch.float32) -> Tensor:
    """Standard normal noise of shape (B, …) for a sampler to start from, times the first sigma.

    Drawn on the CPU, so that the composition of an image does not depend on the device that samples it.
    """
    draws = [torch.randn(*shape[1:], generator=_generator(torch.device("cpu"), s)) for s in image_seeds(seed, shape[0])]
    return torch.stack(draws).to(device, dtype) if draws else torch.empty(*shape, device=device, dtype=dtype)


class Gaussian:
    """Fresh noise at each call, whatever the sigmas: from ``generator``, or from one seed per image.

    x: gives shape (B, …), device and dtype. The n-th call of two objects with equal seeds returns equal noise.
    """

    def __init__(self, x: Tensor, seed: int | Sequence[int] | None = None, generator: torch.Generator | None = None):
        if seed is not None and generator is not None:
            raise ValueError(f"seed {seed!r} and a generator exclude each other: give one of them")
        self.shape, self.device, self.dtype, self.generator = x.shape, x.device, x.dtype, generator
        if generator is None:
            # Hashed, so that the first draw is not the noise that ``initial`` makes of the same seeds.
            self.generators = [_generator(x.device, _mix(s, 0)) for s in image_seeds(seed, x.shape[0])]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        if self.generator is not None:
            return torch.randn(self.shape, generator=self.generator, device=self.device).to(self.dtype)
        noise = torch.empty(self.shape, device=self.device)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return noise.to(self.dtype)


class Brownian:
    """Increments of a Brownian motion along sigma: finer steps refine the noise of coarser ones, in any order.

    W runs in the time sigma^exponent. Two steps a → b → c receive together what one step a → c would: a solver of an
    SDE then converges to one image as its steps shrink, instead of drawing another image for each number of steps.
    Which exponent makes that exact depends on the SDE: -2 for the reverse SDE of diffusion (eta = 1), -2·eta in
    general (see ``samplers``); 1 is k-diffusion's choice; 2 counts the variance that is added on the way up.

    W is a virtual tree: an interval of sigma is halved (in ln sigma) down to the one that holds the query, and what a
    node adds to W, Z·(a tent over its interval), has a Z that only its place and the image's seed determine. The last
    interval, ``resolution`` wide in ln sigma, carries one Z for the whole bridge in it. So the law is exactly that of
    Brownian motion for sigmas at least ``resolution`` apart in ln sigma, and a query costs log2(22 / resolution) draws
    at most; only the last W is kept.

    x: gives shape (B, …), device and dtype; seed: one int, or one per image. sigma must lie in [2^-16, 2^16].
    """

    RANGE = 16 * math.log(2)  # of |ln sigma|

    def __init__(self, x: Tensor, seed: int | Sequence[int] | None = None, *, exponent=-2.0, resolution: float = 5e-3):
        if not 0 < resolution <= 1:
            raise ValueError(f"resolution must be in (0, 1], got {resolution!r}")
        if not (math.isfinite(exponent) and 1e-3 <= abs(exponent) <= 32):
            raise ValueError(f"exponent must be a number of absolute value 0.001 to 32, got {exponent!r}")
        self.shape, self.device, self.dtype, self.exponent = x.shape, x.device, x.dtype, float(exponent)
        self.seeds = image_seeds(seed, x.shape[0])
        self.depth = math.ceil(math.log2(2 * self.RANGE / resolution))
        self.kept: tuple[float | None, Tensor | None] = (None, None)

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """(W(sigma_next) − W(sigma)) / √|difference of the times|: standard normal; zeros where the two are equal."""
        elapsed = abs(self._time(float(sigma_next)) - self._time(float(sigma)))
        return self.increment(sigma, sigma_next, 1 / math.sqrt(elapsed) if elapsed else 0.0)

    def increment(self, sigma: float, sigma_next: float, scale: float = 1.0) -> Tensor:
        """scale·(W(sigma_next) − W(sigma)), of variance scale²·|sigma_next^exponent − sigma^exponent|."""
        before = self._motion(float(sigma))
        return ((self._motion(float(sigma_next)) - before) * scale).to(self.dtype)

    def _motion(self, sigma: float) -> Tensor:
        """W(sigma), from the end of smaller times: W is then not much larger than its steps, and float32 holds both."""
        if self.kept[0] == sigma:
            return self.kept[1]
        weights = self._path(sigma)
        least = 1e-8 * math.sqrt(sum(weight**2 for weight in weights.values()))  # float32 would round it away
        w = torch.zeros(self.shape, device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        draw = torch.empty(self.shape[1:], device=self.device)
        for image, seed in zip(w, self.seeds, strict=True):
            for node, weight in weights.items():
                if abs(weight) > least:
                    image.add_(draw.normal_(generator=_generator(self.device, _mix(seed, 1, *node))), alpha=weight)
        self.kept = (sigma, w)  # where one step ends, the next one begins
        return w

    def _time(self, sigma: float) -> float:
        if not 2**-16 <= sigma <= 2**16:
            raise ValueError(f"sigma must lie in [2^-16, 2^16], got {sigma}")
        return sigma**self.exponent

    def _path(self, sigma: float) -> dict[tuple[int, int], float]:
        """W(sigma) as {(level, index) of a node: weight of its Z}, from the whole range down to the last interval."""
        now, position = self._time(sigma), math.log(sigma)
        low, high, index = -self.RANGE, self.RANGE, 0
        first, last = (math.exp(end) ** self.exponent for end in (low, high))
        terms = {(0, 0): (now - min(first, last)) / math.sqrt(abs(last - first))}
        for level in range(1, self.depth + 1):
            middle = (low + high) / 2
            split = math.exp(middle) ** self.exponent
            peak = math.sqrt((split - first) / (last - first) * abs(last - split))
            # The tent rises from 0 at first to its peak at the middle, and falls to 0 at last.
            if position < middle:
                terms[level, index] = peak * (now - first) / (split - first)
                high, last, index = middle, split, 2 * index
            else:
                terms[level, index] = peak * (last - now) / (last - split)
                low, first, index = middle, split, 2 * index + 1
        terms[self.depth + 1, index] = math.sqrt(max(0.0, (now - first) / (last - first)) * abs(last - now))
        return terms

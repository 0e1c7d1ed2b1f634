"""What a network is trained to predict, and how its error is measured.

Variance-preserving diffusion: z = alpha * x0 + s * epsilon with alpha^2 = sigmoid(lambda), s^2 = sigmoid(-lambda). A
network sees z and predicts epsilon, x0, or v = alpha * epsilon - s * x0 (Salimans and Ho 2022, arXiv 2202.00512). EDM's
x = x0 + sigma * epsilon is z / alpha with sigma = s / alpha, so ``SimpleDiffusion`` and ``preconditioning.Denoiser``
are called alike, and one sampler serves both. With sigma_data = 1 EDM's F is -v.
"""

import functools

import torch

from .preconditioning import WEIGHTINGS, Denoiser, Weighting, check_inputs, mean_square, min_snr, per_sample, predict

PARAMETRIZATIONS = ("v", "epsilon", "x0")
LOSSES = ("v", "epsilon", "x0", "multiscale")
COARSEST = 32  # pixels of the smallest image that the multiscale loss compares
PURE_NOISE = 1e4  # a model is told this for sigma = inf, and for all above: it takes ln(sigma), and sees no image there


def alpha_sigma(sigma):
    """(alpha, s) of z at EDM's ``sigma``, each of its shape: 1 and sigma over sqrt(1 + sigma^2), from 0 to inf."""
    one = torch.ones_like(sigma)
    return 1 / torch.hypot(one, sigma), 1 / torch.hypot(one, 1 / sigma)


def convert(prediction, z, sigma, source, target):
    """``prediction``, which is the ``source`` of z, as ``target``: each of "v", "epsilon" and "x0".

    prediction, z: (B, C, H, W), z = x / sqrt(1 + sigma^2) for EDM's x = x0 + sigma * epsilon; sigma: (B,), also 0 or
    inf where the target exists (x0 is not known from epsilon at sigma = inf, nor epsilon from x0 at 0). The last digits
    of x0 from epsilon are those of epsilon times sigma, and the reverse: that is the problem's conditioning.
    """
    for name, value in (("source", source), ("target", target)):
        _one_of(value, PARAMETRIZATIONS, name)
    if prediction.shape != z.shape:
        raise ValueError(f"prediction must have the shape of z {tuple(z.shape)}, got {tuple(prediction.shape)}")
    sigma, wide = check_inputs(z, sigma)
    alpha, s = (per_sample(c, z) for c in alpha_sigma(sigma))
    given, z = prediction.to(wide), z.to(wide)
    if source == target:
        result = given
    elif source == "v":
        result = alpha * z - s * given if target == "x0" else s * z + alpha * given
    elif source == "epsilon":
        result = (z - s * given) / alpha if target == "x0" else (given - s * z) / alpha
    else:
        result = (z - alpha * given) / s if target == "epsilon" else (alpha * z - given) / s
    return result.to(prediction.dtype)


def multiscale(error):
    """(B,): sum over s of (1 / s) * mean of (error, averaged down to s x s)^2 (arXiv 2301.11093, section 3.4).

    error: (B, C, H, W). s: the side of the image, the shorter one, and its halves that are at least 32 pixels and
    whole on both sides; a smaller image has its own side alone.
    """
    side = min(error.shape[-2:])
    total = mean_square(error) / side
    while side % 2 == 0 and side // 2 >= COARSEST and max(error.shape[-2:]) % 2 == 0:
        error, side = torch.nn.functional.avg_pool2d(error, 2), side // 2
        total = total + mean_square(error) / side
    return total


def training_noise(x, *, offset=0.0, generator=None):
    """Like x (B, C, H, W): standard normal, plus ``offset`` times one normal number for each image and channel.

    With an offset (0.1, say) the network also learns to change the mean of an image, which it has no reason to when the
    noisiest level still shows it (N. Guttenberg 2023, "Diffusion with Offset Noise"). generator: on any device.
    """
    if not torch.is_tensor(x) or x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor of shape (B, C, H, W), got {_describe(x)}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not 0 <= offset < float("inf"):
        raise ValueError(f"offset must be a finite number, 0 or more, got {offset!r}")
    options = {"generator": generator, "device": x.device if generator is None else generator.device}
    wide = torch.promote_types(x.dtype, torch.float32)
    noise = torch.randn(x.shape, dtype=wide, **options)
    if offset:
        noise += offset * torch.randn(*x.shape[:2], 1, 1, dtype=wide, **options)
    return noise.to(x.device, x.dtype)


class SimpleDiffusion(torch.nn.Module):
    """The objective of simple diffusion around ``model``, any callable (z, sigma, **cond) -> prediction of z's shape.

    parametrization: what the model predicts, "v", "epsilon" or "x0". loss: whose squared error is averaged, "epsilon",
    "v", "x0", or "multiscale" (``multiscale`` of the error of epsilon). weighting: a name in
    ``preconditioning.WEIGHTINGS`` with loss "v" (where v is EDM's F at sigma_data = 1: "karras" is 1, "snr" gives the
    loss of epsilon), or a callable (sigma (B,), 1.0) -> (B,), which multiplies any loss; None is 1.

    sigma is EDM's, exp(-logsnr / 2), so a model's condition ln(sigma) / 4 is -logsnr / 8. With "v" or "x0" it may be
    inf (zero-terminal SNR: z is the noise alone); the model is told 1e4 there. Arithmetic, dtypes: as ``Denoiser``.
    """

    def __init__(self, model, parametrization="v", loss="epsilon", weighting: str | Weighting | None = None):
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable as model(z, sigma, **cond), got {type(model).__name__}")
        _one_of(parametrization, PARAMETRIZATIONS, "parametrization")
        _one_of(loss, LOSSES, "loss")
        if weighting is not None and not callable(weighting):
            _one_of(weighting, WEIGHTINGS, "weighting")
            if loss != "v":
                raise ValueError(f"weighting {weighting!r} is defined for the loss 'v', got loss {loss!r}")
            weighting = WEIGHTINGS[weighting]
        self.model, self.parametrization, self.loss_kind, self.weighting = model, parametrization, loss, weighting

    def forward(self, x, sigma, **cond):
        """The estimate D(x; sigma) of the clean image, of x's shape and dtype.

        x: (B, C, H, W) = x0 + sigma * noise; sigma: (B,), finite; cond goes to the model.
        """
        sigma, wide = check_inputs(x, sigma)
        z = x.to(wide) * per_sample(alpha_sigma(sigma)[0], x)
        return self._clean(z, x.dtype, sigma, **cond).to(x.dtype)

    def loss(self, x, noise, sigma, **cond):
        """(B,): the loss of each sample, in float32 (float64 for float64).

        x: (B, C, H, W), the clean image; noise: like x, standard normal; sigma: (B,), positive, inf is pure noise.
        """
        sigma, wide = check_inputs(x, sigma, noise)
        x0, noise = x.to(wide), noise.to(wide)
        alpha, s = (per_sample(c, x) for c in alpha_sigma(sigma))
        target = {"v": alpha * noise - s * x0, "epsilon": noise, "x0": x0}[self.parametrization]
        prediction = predict(self.model, alpha * x0 + s * noise, x.dtype, sigma.clamp(max=PURE_NOISE), **cond)
        # z is given, so the errors of v, epsilon and x0 are multiples of each other: 1, alpha and -s times that of v.
        share = {"v": torch.ones_like(s), "epsilon": alpha, "x0": s, "multiscale": alpha}
        kind = self.loss_kind
        error = prediction - target
        if kind != self.parametrization:
            error = error * (share[kind] / share[self.parametrization])
        result = multiscale(error) if kind == "multiscale" else mean_square(error)
        return result if self.weighting is None else result * self.weighting(sigma, 1.0)

    def start(self, noise, sigma, **cond):
        """The first step of sampling with zero-terminal SNR, from z = noise (sigma = inf) to x at a finite ``sigma``.

        x = D + sigma * noise, where D is the model's estimate from noise alone (Lin et al. 2023, arXiv 2305.08891); any
        sampler goes on from there. noise: (B, C, H, W), standard normal; sigma: (B,). Like noise. Raises ValueError
        for "epsilon", which at pure noise tells nothing of the image.
        """
        if self.parametrization == "epsilon":
            raise ValueError("start needs the parametrization 'v' or 'x0': at pure noise 'epsilon' is the input itself")
        sigma, wide = check_inputs(noise, sigma)
        x0 = self._clean(noise.to(wide), noise.dtype, torch.full_like(sigma, float("inf")), **cond)
        return (x0 + per_sample(sigma, noise) * noise.to(wide)).to(noise.dtype)

    def _clean(self, z, dtype, sigma, **cond):
        prediction = predict(self.model, z, dtype, sigma.clamp(max=PURE_NOISE), **cond)
        return convert(prediction, z, sigma, self.parametrization, "x0")


def objective(spec: dict, model) -> torch.nn.Module:
    """The objective that ``spec`` describes, around ``model``: a module with ``loss`` and the denoiser as its forward.

    {"type": "edm", "sigma_data": 0.5, "weighting": "soft-min-snr", "min_snr_gamma": 5, "loss": "mse" or "multiscale"}
    {"type": "simple-diffusion", "parametrization": "v", "loss": "epsilon", "weighting": ..., "min_snr_gamma": 5}

    All but the type may be absent. min_snr_gamma goes with the weighting "min-snr" only. sigma_min and sigma_max are
    accepted for whoever samples, and are nothing to the objective. ValueError for a name that has no meaning.
    """
    if not isinstance(spec, dict) or spec.get("type") not in TYPES:
        raise ValueError(f"objective must be a dict with the type {' or '.join(map(repr, TYPES))}, got {spec!r}")
    keys = TYPES[spec["type"]]
    if unknown := spec.keys() - keys - {"type", "min_snr_gamma", "sigma_min", "sigma_max"}:
        names = ", ".join((*keys, "min_snr_gamma"))
        raise ValueError(f"objective {spec['type']!r} has no {', '.join(sorted(unknown))}; it takes {names}")
    given = {key: spec[key] for key in keys if key in spec}
    if "min_snr_gamma" in spec:
        gamma = spec["min_snr_gamma"]
        if given.get("weighting") != "min-snr":
            raise ValueError(f"min_snr_gamma {gamma} needs the weighting 'min-snr', got {given.get('weighting')!r}")
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma < float("inf"):
            raise ValueError(f"min_snr_gamma must be positive and finite, got {gamma!r}")
        if spec["type"] == "edm" or given.get("loss") == "v":
            given["weighting"] = functools.partial(min_snr, gamma=gamma)
    if spec["type"] == "simple-diffusion":
        return SimpleDiffusion(model, **given)
    loss = given.pop("loss", "mse")
    _one_of(loss, ("mse", "multiscale"), "loss")
    return Denoiser(model, reduction=multiscale if loss == "multiscale" else mean_square, **given)


TYPES = {
    "edm": ("sigma_data", "weighting", "loss"),
    "simple-diffusion": ("parametrization", "loss", "weighting"),
}


def _one_of(value, accepted, name):
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def _describe(x):
    return f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__

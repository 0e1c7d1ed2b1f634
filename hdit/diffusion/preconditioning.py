"""EDM preconditioning: a network F becomes a denoiser D(x; sigma) that estimates the clean image.

Karras et al. 2022 (arXiv 2206.00364), equation 7 and table 1. With x = x0 + sigma * noise,

    D(x; sigma) = c_skip * x + c_out * F(c_in * x, sigma)
    c_skip = sd^2 / (sigma^2 + sd^2)    c_out = sigma * sd / sqrt(sigma^2 + sd^2)    c_in = 1 / sqrt(sigma^2 + sd^2)

where sd (``sigma_data``) is the standard deviation of the data. The loss is taken on F, whose target
(x0 - c_skip * x) / c_out has unit variance at every sigma. A squared error on F is the squared error on x0 divided by
c_out^2, so a weighting that a paper states for x0 is multiplied by c_out^2 here.
"""

from collections.abc import Callable

import torch

Weighting = Callable[[torch.Tensor, float], torch.Tensor]
MIN_SNR_GAMMA = 5.0


def karras(sigma, sigma_data):
    """EDM: 1 / c_out^2 on x0."""
    return torch.ones_like(sigma)


def soft_min_snr(sigma, sigma_data):
    """HDiT (arXiv 2401.11605, section 4.5): 1 / (sigma^2 + sigma_data^2) on x0, a smooth min(SNR, 1 / sigma_data^2)."""
    return snr(sigma, sigma_data) / (1 + (sigma_data / sigma) ** 2)


def snr(sigma, sigma_data):
    """1 / sigma^2 on x0: the squared error of the predicted noise."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def min_snr(sigma, sigma_data, gamma=MIN_SNR_GAMMA):
    """Min-SNR (Hang et al. 2023, arXiv 2303.09556): min(1 / sigma^2, gamma) on x0."""
    # sigma^2 goes inside the minimum: 1 / sigma^2 leaves float32's range long before the product does.
    return (gamma * sigma**2).clamp(max=1) * sigma_data**2 / (sigma**2 + sigma_data**2)


def mean_square(error):
    """(B,): the squared error, averaged over channels and pixels."""
    return error.square().flatten(1).mean(1)


WEIGHTINGS: dict[str, Weighting] = {
    "karras": karras,
    "soft-min-snr": soft_min_snr,
    "snr": snr,
    "min-snr": min_snr,
}


class Denoiser(torch.nn.Module):
    """Preconditions ``model``, any callable (x, sigma, **cond) -> F(x), as EDM does.

    sigma_data: standard deviation of the data, positive. weighting: a name in ``WEIGHTINGS``, or a callable
    (sigma (B,), sigma_data) -> (B,), the weight of each sample's squared error on F. reduction: error of F
    (B, C, H, W) -> (B,), the mean square unless given (``losses.multiscale`` is another).

    The coefficients are computed in float32, in float64 where an input is float64, never in half precision, under
    autocast too. What the model receives has the dtype of its parameters (x's where it has none), sigma stays wide.
    """

    def __init__(
        self,
        model,
        sigma_data: float = 0.5,
        weighting: str | Weighting = "soft-min-snr",
        reduction: Callable[[torch.Tensor], torch.Tensor] = mean_square,
    ):
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, sigma, **cond), got {type(model).__name__}")
        if isinstance(sigma_data, bool) or not isinstance(sigma_data, int | float):
            raise TypeError(f"sigma_data must be a number, got {sigma_data!r}")
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}")
        if not callable(weighting) and weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be a callable or one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if not callable(reduction):
            raise TypeError(f"reduction must be callable as reduction(error), got {type(reduction).__name__}")
        self.model = model
        self.sigma_data = float(sigma_data)
        self.weighting = weighting if callable(weighting) else WEIGHTINGS[weighting]
        self.reduction = reduction

    def coefficients(self, sigma):
        """c_skip, c_out and c_in at ``sigma``, each of its shape."""
        variance = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / variance, sigma * self.sigma_data * variance.rsqrt(), variance.rsqrt()

    def forward(self, x, sigma, **cond):
        """The estimate D(x; sigma) of the clean image, of x's shape and dtype.

        x: (B, C, H, W), the noised image; sigma: (B,), its noise level; cond goes to the model.
        """
        sigma, wide = check_inputs(x, sigma)
        c_skip, c_out, c_in = (per_sample(c, x) for c in self.coefficients(sigma))
        return (c_skip * x.to(wide) + c_out * predict(self.model, x * c_in, x.dtype, sigma, **cond)).to(x.dtype)

    def loss(self, x, noise, sigma, **cond):
        """(B,): the weighted squared error on F, averaged over channels and pixels, in float32 (float64 for float64).

        x: (B, C, H, W), the clean image; noise: like x, standard normal; sigma: (B,), positive.
        """
        sigma, wide = check_inputs(x, sigma, noise)
        c_in = per_sample(self.coefficients(sigma)[2], x)
        noised = x.to(wide) + per_sample(sigma, x) * noise.to(wide)
        # (x - c_skip * noised) / c_out loses its digits where sigma is small (a difference of two near-equal images
        # over a small c_out). Written out, the target is a sum without cancellation.
        ratio = per_sample(sigma, x) / self.sigma_data
        target = c_in * (ratio * x.to(wide) - self.sigma_data * noise.to(wide))
        error = predict(self.model, noised * c_in, x.dtype, sigma, **cond) - target
        return self.reduction(error) * self.weighting(sigma, self.sigma_data)


def predict(model, model_input, dtype, sigma, **cond):
    """The model's output in sigma's dtype, from an input cast to the dtype of its parameters, or to ``dtype``."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), dtype)
    return model(model_input.to(dtype), sigma, **cond).to(sigma.dtype)


def check_inputs(x, sigma, noise=None):
    """sigma in the dtype of the arithmetic, and that dtype."""
    if not torch.is_tensor(x) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
        raise ValueError(f"x must be a floating-point tensor of shape (B, C, H, W), got {got}")
    if not torch.is_tensor(sigma) or sigma.shape != x.shape[:1] or not sigma.is_floating_point():
        got = f"{sigma.dtype} of shape {tuple(sigma.shape)}" if torch.is_tensor(sigma) else repr(sigma)
        raise ValueError(f"sigma must be a floating-point tensor of shape (B,) = ({x.shape[0]},), got {got}")
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise must have the shape of x {tuple(x.shape)}, got {tuple(noise.shape)}")
    wide = torch.promote_types(torch.promote_types(x.dtype, sigma.dtype), torch.float32)
    return sigma.to(wide), wide


def per_sample(coefficient, x):
    return coefficient.view(-1, *[1] * (x.dim() - 1))

"""What a published configuration says: the model, and how it was trained."""

from dataclasses import dataclass
from typing import Literal

import tyro

from ..models import DiTConfig, HDiTConfig, UViTConfig


@dataclass(frozen=True)
class Training:
    """The numbers of a training run, None where a publication gives none. Defaults: those of the HDiT paper."""

    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = 256
    """Images per step, over all devices and micro-batches."""
    hardware: tyro.conf.Suppress[str | None] = None
    objective: Literal["edm", "simple-diffusion"] = "edm"
    """What the network predicts: F of EDM's preconditioning, or `parametrization` in variance-preserving terms."""
    parametrization: Literal["v", "epsilon", "x0"] = "v"
    """What the network predicts under simple diffusion's objective."""
    loss: Literal["mse", "multiscale", "v", "epsilon", "x0"] = "mse"
    """edm: mse or multiscale, of F. simple-diffusion: the mean square error of v, epsilon or x0, or multiscale."""
    loss_weighting: str = "soft-min-snr"
    """edm: karras, snr, min-snr or soft-min-snr."""
    min_snr_gamma: float | None = None
    """gamma of min-snr; 5 unless given."""
    sigma_data: float = 0.5
    """Standard deviation of the data, edm."""
    sigma_density: Literal["cosine-interpolated", "simple-diffusion", "v-diffusion", "lognormal", "loguniform"] = (
        "cosine-interpolated"
    )
    """Distribution of the noise levels. simple-diffusion is cosine-interpolated with ends that shift too."""
    zero_terminal: bool = False
    """simple-diffusion: rescale the schedule so that the noisiest level shows nothing of the image."""
    sigma_min: float = 1e-3
    """Smallest noise level, in training and sampling."""
    sigma_max: float = 1e3
    """Largest noise level."""
    sigma_loc: float = -1.2
    """Mean of ln sigma, lognormal."""
    sigma_scale: float = 1.2
    """Standard deviation of ln sigma, lognormal."""
    noise_d_low: int = 32
    """Side of the images whose signal-to-noise ratio the noisy end has; as noise_d_high of the cosine schedules."""
    noise_d_high: int | None = None
    """The same at the clean end; the side of the images unless given."""
    noise_offset: float = 0.0
    """Strength of noise that is constant over an image and channel, for very dark and bright images."""
    class_dropout: float = 0.1
    """Share of images whose class is withheld, for classifier-free guidance."""
    augment_prob: float = 0.0
    """Probability of each of Karras' augmentations, which the model is told of."""
    lr: float = 5e-4
    """AdamW's learning rate; the mapping network of HDiT has a third of it."""
    lr_warmup: int = 0
    """Steps over which the rate grows from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 1e-2
    """AdamW's, of the projections' weights only."""
    ema_decay: float = 0.9999
    """Of the averaged weights: min(ema_decay, 1 − (1 + step)^−ema_power), constant where ema_power is None."""
    ema_power: float | None = None
    """See ema_decay."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of autocast; the weights are float32."""
    sampler: str | None = "dpmpp_3m_sde"
    """What samples are made with."""
    sampler_steps: int | None = 50
    """Denoising steps of a sample."""


@dataclass(frozen=True)
class Configuration:
    """One published model. resolution: (height, width) in pixels that it was made for; training: None where there is
    no run."""

    config: HDiTConfig | DiTConfig | UViTConfig
    resolution: tuple[int, int]
    training: Training | None
    source: str

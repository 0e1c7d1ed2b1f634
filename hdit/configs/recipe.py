"""What a published configuration says: the model, and how it was trained."""

from dataclasses import dataclass

from ..models import DiTConfig, HDiTConfig


@dataclass(frozen=True)
class Training:
    """The numbers of a training run; None where the publication gives none. Defaults: those of the HDiT paper's runs.

    batch_size: images per step over all devices. sigma_min, sigma_max: ends of the noise levels. sigma_density:
    "cosine-interpolated", with noise_d_low = 32 and noise_d_high = the side of the images. loss_weighting: a weighting
    of hdit.diffusion's Denoiser. class_dropout: share of images whose class is dropped for guidance. augment_prob: of
    Karras augmentation. ema_decay, ema_power: decay = min(ema_decay, 1 − (1 + step)^−ema_power), constant where the
    power is None. grad_clip: largest norm of the gradient. dtype: of autocast. sampler, sampler_steps: what the
    samples were made with.
    """

    steps: int | None
    batch_size: int | None = 256
    hardware: str | None = None
    sigma_data: float = 0.5
    sigma_min: float = 1e-3
    sigma_max: float = 1e3
    sigma_density: str = "cosine-interpolated"
    noise_d_low: int = 32
    loss_weighting: str = "soft-min-snr"
    class_dropout: float = 0.1
    augment_prob: float = 0.0
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    ema_decay: float = 0.9999
    ema_power: float | None = None
    grad_clip: float | None = 1.0
    dtype: str = "bfloat16"
    sampler: str | None = "dpmpp_3m_sde"
    sampler_steps: int | None = 50


@dataclass(frozen=True)
class Configuration:
    """One published model. resolution: (height, width) in pixels that it was made for; training: None where there is
    no run."""

    config: HDiTConfig | DiTConfig
    resolution: tuple[int, int]
    training: Training | None
    source: str

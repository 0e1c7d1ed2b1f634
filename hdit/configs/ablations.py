"""The papers' ablations as configurations, one switch each from the row before or from the base; `small` shrinks any of
them for a short run.

HDIT (arXiv 2401.11605, Tables 1 and 2; ImageNet-128). R1, R3, R4: baselines without the hourglass. A to F add one step
after another to the hourglass, F being HDiT; F', G and H change one thing of F: the loss weighting, the skips, the
blocks. Loss weighting "snr" is the uniform loss on epsilon. FID: what the paper prints for 400 k steps at batch 256.

SIMPLE_DIFFUSION (arXiv 2301.11093, section 4; here at ImageNet-128): schedule, multiscale loss, dropout, depth of the
trunk, down-sampling, and the U-Net.
"""

from dataclasses import replace

from ..models import DiTConfig, Global, HDiTConfig, Level, Neighborhood, ShiftedWindow, UViTConfig, UViTLevel
from . import imagenet_128, uvit_imagenet_128
from .recipe import Configuration, Training

_SIDE = 128


def _hdit(config, **training) -> Configuration:
    trained = replace(imagenet_128.training, hardware=None, **training)
    return Configuration(config, imagenet_128.resolution, trained, imagenet_128.source)


def _hourglass(attention, d_ff: int = 3, **switches) -> HDiTConfig:
    """HDiT-B/4 with this attention on its outer level and these switches; d_ff as a multiple of the width."""
    levels = (Level(2, 384, d_ff * 384, attention), Level(11, 768, d_ff * 768, Global()))
    return replace(imagenet_128.config, levels=levels, **switches)


_PLAIN = {"feed_forward": "gelu", "d_ff": 4, "position": "sin-cos"}
_DIT = DiTConfig.of_size("B", patch_size=4, num_classes=1000)
_FLAT = replace(imagenet_128.config, levels=(Level(12, 768, attention=Global()),))

HDIT: dict[str, Configuration] = {
    "R1 DiT-B/4": _hdit(_DIT, loss_weighting="snr"),
    "R3 DiT-B/4, soft-min-SNR": _hdit(_DIT),
    "R4 HDiT's blocks on one level": _hdit(_FLAT),
    "A global hourglass": _hdit(_hourglass(Global(), **_PLAIN), loss_weighting="snr"),
    "B shifted windows": _hdit(_hourglass(ShiftedWindow(), **_PLAIN), loss_weighting="snr"),
    "C neighborhoods": _hdit(_hourglass(Neighborhood(), **_PLAIN), loss_weighting="snr"),
    "D GEGLU": _hdit(_hourglass(Neighborhood(), position="sin-cos"), loss_weighting="snr"),
    "E axial RoPE": _hdit(_hourglass(Neighborhood()), loss_weighting="snr"),
    "F soft-min-SNR (HDiT)": _hdit(_hourglass(Neighborhood())),
    "F' min-SNR, gamma 5": _hdit(_hourglass(Neighborhood()), loss_weighting="min-snr", min_snr_gamma=5.0),
    "F' min-SNR, gamma 4": _hdit(_hourglass(Neighborhood()), loss_weighting="min-snr", min_snr_gamma=4.0),
    "G concatenated skips": _hdit(_hourglass(Neighborhood(), skip="concat")),
    "G added skips": _hdit(_hourglass(Neighborhood(), skip="add")),
    "H AdaLN": _hdit(_hourglass(Neighborhood(), norm="ada-layer-norm")),
    "H GELU, output gate": _hdit(_hourglass(Neighborhood(), 4, feed_forward="gelu", output_gate=True)),
}

FID = {
    "R1 DiT-B/4": 42.03,
    "A global hourglass": 50.76,
    "B shifted windows": 55.93,
    "C neighborhoods": 51.07,
    "D GEGLU": 44.36,
    "E axial RoPE": 41.41,
    "F soft-min-SNR (HDiT)": 27.74,
    "F' min-SNR, gamma 5": 36.65,
    "F' min-SNR, gamma 4": 35.62,
    "G concatenated skips": 33.75,
    "G added skips": 28.37,
    "H AdaLN": 27.69,
    "H GELU, output gate": 30.66,
}


def _uvit(levels=None, *, fields=None, **training) -> Configuration:
    """uvit_imagenet_128 on the schedule shifted to the noise of 32² images, changed in these respects."""
    config = uvit_imagenet_128.config
    config = replace(config, levels=config.levels if levels is None else levels, **(fields or {}))
    training = {"noise_d_low": 32, "noise_d_high": 32, **training}
    trained = replace(uvit_imagenet_128.training, **training)
    return Configuration(config, uvit_imagenet_128.resolution, trained, uvit_imagenet_128.source)


_LEVELS = uvit_imagenet_128.config.levels


def _dropout(*of_levels: float) -> tuple[UViTLevel, ...]:
    return tuple(replace(level, dropout=p) for level, p in zip(_LEVELS, of_levels, strict=True))


def _trunk(**changes) -> tuple[UViTLevel, ...]:
    return (*_LEVELS[:-1], replace(_LEVELS[-1], **changes))


# Attention at 16² alone, and convolutions there too.
_UNET = (*(replace(level, kind="convolution") for level in _LEVELS[:-1]), *_trunk(kind="convolution-attention")[-1:])

SIMPLE_DIFFUSION: dict[str, Configuration] = {
    "schedule: shifted to 32 (base)": _uvit(),
    "schedule: cosine": _uvit(noise_d_low=_SIDE, noise_d_high=_SIDE),
    "schedule: shifted to 64": _uvit(noise_d_low=64, noise_d_high=64),
    "schedule: interpolated 32 to side": _uvit(noise_d_high=_SIDE),
    "loss: multiscale": _uvit(loss="multiscale"),
    "dropout: none": _uvit(_dropout(0.0, 0.0, 0.0, 0.0)),
    "dropout: trunk": _uvit(_dropout(0.0, 0.0, 0.0, 0.2)),
    "dropout: everywhere": _uvit(_dropout(0.2, 0.2, 0.2, 0.2)),
    "trunk: 8 blocks": _uvit(_trunk(depth=8)),
    "trunk: 32 blocks": _uvit(_trunk(depth=32)),
    "down-sampling: DWT": _uvit(fields={"downsampling": "dwt"}),
    "down-sampling: strided": _uvit(fields={"downsampling": "strided"}),
    "patches of 2: DWT": _uvit(_LEVELS[1:], fields={"patch_size": 2, "patching": "dwt"}),
    "patches of 2: strided": _uvit(_LEVELS[1:], fields={"patch_size": 2, "patching": "strided"}),
    "U-Net": _uvit(_UNET),
}


def small(configuration: Configuration, side: int = 64, num_classes: int = 0, batch_size: int = 32) -> Configuration:
    """The same switches on images of side² with few channels, for minutes on a CPU; about a million parameters.

    HDiT has 16² and 8² tokens, DiT 16²; U-ViTs keep their levels, with an eighth of the channels and of the trunk's
    blocks. Schedules that aim at the noise of smaller images keep the ratio of the sides. Below 64² the multiscale loss
    has one scale, which is the plain loss. ValueError where side does not divide by 16.
    """
    if side < 16 or side % 16:
        raise ValueError(f"side is {side}; it must be a multiple of 16")
    config, full = configuration.config, configuration.resolution[0]
    if isinstance(config, DiTConfig):
        shrunk = replace(config, depth=4, width=128, heads=4, patch_size=side // 16, num_classes=num_classes)
    elif isinstance(config, UViTConfig):
        levels = tuple(
            replace(level, depth=max(1, level.depth // 8), width=level.width // 8, d_head=16) for level in config.levels
        )
        shrunk = replace(config, levels=levels, embedding_width=128, num_classes=num_classes)
    else:
        shrunk = _small_hdit(config, side, num_classes)
    return Configuration(
        shrunk, (side, side), _small_training(configuration.training, side / full, batch_size), configuration.source
    )


def _small_hdit(config: HDiTConfig, side: int, num_classes: int) -> HDiTConfig:
    sizes = ((4, 128),) if len(config.levels) == 1 else ((1, 64), (2, 128))
    levels = tuple(
        replace(
            level,
            depth=depth,
            width=width,
            d_ff=width * level.d_ff // level.width,
            attention=replace(level.attention, d_head=32),
        )
        for level, (depth, width) in zip(config.levels, sizes, strict=True)
    )
    return replace(
        config, levels=levels, patch_size=side // 16, mapping_width=128, mapping_d_ff=384, num_classes=num_classes
    )


def _small_training(training: Training, ratio: float, batch_size: int) -> Training:
    noise_d_high = training.noise_d_high and round(training.noise_d_high * ratio)
    return replace(
        training,
        batch_size=batch_size,
        dtype="float32",
        lr_warmup=0,
        noise_d_low=max(1, round(training.noise_d_low * ratio)),
        noise_d_high=noise_d_high,
    )

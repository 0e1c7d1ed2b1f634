"""hdit sample: images from a checkpoint, one by one and as a grid; and the same as functions.

Image i depends on seed + i alone: not on the size of a batch, nor on how many images are made.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .diffusion import noise, samplers, schedules
from .diffusion.guidance import Guided, Thresholded

SCHEDULES = ("karras", "exponential", "polyexponential", "vp", "simple-diffusion")


# ---- From a denoiser to images --------------------------------------------------------------------------------------


def noise_levels(schedule: str, steps: int, sigma_min: float, sigma_max: float, resolution: tuple[int, int]) -> Tensor:
    """The sigmas (steps + 1,) in float64 that a sampler visits; "vp" and "simple-diffusion" have ends of their own."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "vp":
        return schedules.vp_sigmas(steps, dtype=torch.float64)
    if schedule == "simple-diffusion":
        return schedules.simple_diffusion_sigmas(steps, max(resolution), dtype=torch.float64)
    return getattr(schedules, f"{schedule}_sigmas")(steps, sigma_min, sigma_max, dtype=torch.float64)


def generate(denoiser, count: int, resolution: tuple[int, int], **options) -> Tensor:
    """(count, C, H, W) float32 on the CPU, about [-1, 1]. Options as in ``stream``."""
    images = list(stream(denoiser, count, resolution, **options))
    return torch.cat(images) if images else torch.empty(0, 3, *resolution)


def stream(
    denoiser, count: int, resolution: tuple[int, int], *,
    classes: Sequence[int] | None = None, num_classes: int = 0,
    guidance: float = 1.0, guidance_interval: tuple[float, float] | None = None, guidance_rescale: float = 0.0,
    threshold: float | None = None, sampler: str = "dpmpp_3m_sde", steps: int = 50, schedule: str = "karras",
    sigma_min: float = 1e-2, sigma_max: float = 160.0, eta: float | None = None, seed: int = 0,
    batch_size: int | None = None, channels: int = 3, progress: Callable[[float], None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Batches of images, (b, C, H, W) float32 on the CPU, about [-1, 1], as they are finished.

    denoiser: D(x, sigma, **cond), an objective of ``diffusion.losses`` for instance; where it has parameters, it works
    on their device. resolution: (height, width). num_classes: of a model with classes, which then always gets
    class_cond; image i has class classes[i % len(classes)], or none (num_classes) without classes. guidance: scale of
    classifier-free guidance, 1 for none, which needs classes; guidance_interval, guidance_rescale: see
    ``guidance.Guided``. threshold: percentile of ``guidance.Thresholded``. sampler: a name in ``samplers.SAMPLERS``;
    eta: its own unless given. seed: of image 0. progress: called after each step with the images that this was worth.
    """
    sample, own = samplers.SAMPLERS.get(sampler), {}
    if sample is None:
        raise ValueError(f"sampler must be one of {', '.join(samplers.SAMPLERS)}, got {sampler!r}")
    accepted = inspect.signature(sample).parameters
    if eta is not None:
        if "eta" not in accepted:
            with_eta = [name for name, s in samplers.SAMPLERS.items() if "eta" in inspect.signature(s).parameters]
            raise ValueError(f"eta {eta} is an option of {', '.join(with_eta)}; sampler is {sampler}")
        own["eta"] = eta
    _check(count=count, height=resolution[0], width=resolution[1], channels=channels)
    _check(steps=steps, batch_size=1 if batch_size is None else batch_size)
    if classes is not None and not (num_classes and len(classes) and all(0 <= c < num_classes for c in classes)):
        raise ValueError(f"classes must lie in 0 … num_classes − 1, num_classes is {num_classes}, got {list(classes)}")
    if guidance != 1:
        if classes is None:
            raise ValueError(f"guidance {guidance} needs classes to guide to; without classes it must be 1")
        denoiser_ = Guided(
            denoiser, guidance, num_classes=num_classes, interval=guidance_interval, rescale=guidance_rescale
        )
    else:
        denoiser_ = denoiser
    if threshold is not None:
        denoiser_ = Thresholded(denoiser_, threshold)
    sigmas = noise_levels(schedule, steps, sigma_min, sigma_max, resolution)
    device = _device(denoiser)
    batches = math.ceil(count / (batch_size or count))
    for rank in range(batches):
        # Of nearly one size each: a compiled model then meets one or two of them.
        images = range(count * rank // batches, count * (rank + 1) // batches)
        seeds = [seed + i for i in images]
        if "seed" in accepted:
            own["seed"] = seeds
        extra = {}
        if num_classes:
            chosen = [num_classes if classes is None else classes[i % len(classes)] for i in images]
            extra["class_cond"] = torch.tensor(chosen, device=device)
        report = None if progress is None else lambda info, worth=len(images) / steps: progress(worth)
        x = noise.initial((len(images), channels, *resolution), seeds, device) * sigmas[0].item()
        yield sample(denoiser_, x, sigmas, extra=extra, callback=report, **own).float().cpu()


def _device(denoiser) -> torch.device:
    parameters = denoiser.parameters() if isinstance(denoiser, torch.nn.Module) else ()
    return next((p.device for p in parameters), torch.device("cpu"))


def _check(**integers: int):
    for name, value in integers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of 1 or more, got {value!r}")


# ---- From images to pictures ----------------------------------------------------------------------------------------


def to_pixels(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 from (N, 3 or 1, H, W) in [-1, 1]: rounded to the nearest of 256 values, clipped."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 3, H, W) or (N, 1, H, W), got {tuple(images.shape)}")
    pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def grid(images: Tensor, columns: int | None = None, captions: Sequence[str] | None = None) -> Image.Image:
    """One picture of (N, 3, H, W) images in [-1, 1], row by row, with captions below where given.

    columns: so many that the picture is about 4:3 with few empty places, unless given.
    """
    pixels = to_pixels(images)
    count, height, width = pixels.shape[:3]
    _check(count=count, columns=1 if columns is None else columns)
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions must be one per image, {count}, got {len(captions)}")
    if columns is None:

        def unshapely(columns):
            rows = math.ceil(count / columns)
            return abs(math.log(columns * width / (rows * height) * 3 / 4)) + 2 * (rows * columns / count - 1)

        columns = min(range(1, count + 1), key=unshapely)
    gap, line = max(2, width // 32), 14 if captions else 0
    rows = math.ceil(count / columns)
    step = (width + gap, height + gap + line)
    picture = Image.new("RGB", (columns * step[0] + gap, rows * step[1] + gap), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for i in range(count):
        left, top = gap + i % columns * step[0], gap + i // columns * step[1]
        picture.paste(Image.fromarray(pixels[i].numpy()), (left, top))
        if captions:
            text = captions[i]
            while len(text) > 1 and draw.textlength(text, font=font) > width:
                text = text[:-2] + "…"
            draw.text((left + width / 2, top + height + 1), text, fill="black", font=font, anchor="ma")
    return picture

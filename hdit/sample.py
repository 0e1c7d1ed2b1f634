"""hdit sample: images from a checkpoint, one by one and as a grid; and the same as functions.

Image i depends on seed + i alone: not on the size of a batch, nor on how many images are made.
"""

import contextlib
import datetime
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import hdit_kernels

from . import export
from .diffusion import losses, noise, samplers, schedules
from .diffusion.guidance import Guided, Thresholded
from .files import remove_leftovers, replacing
from .models import pretrained
from .pictures import grid, write, write_image
from .scaling import device_name

__all__ = ["Sample", "defaults", "generate", "grid", "noise_levels", "stream"]
SCHEDULES = ("karras", "exponential", "polyexponential", "vp", "simple-diffusion")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- From a denoiser to images --------------------------------------------------------------------------------------


def noise_levels(
    schedule: str, steps: int, sigma_min: float, sigma_max: float, resolution: tuple[int, int], zero_terminal=False
) -> Tensor:
    """The sigmas (steps + 1,) in float64 that a sampler visits; "vp" and "simple-diffusion" have ends of their own.

    zero_terminal: "simple-diffusion" alone; the first is infinite.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if zero_terminal and schedule != "simple-diffusion":
        raise ValueError(f"zero_terminal needs the schedule simple-diffusion, got {schedule!r}")
    if zero_terminal and steps < 2:
        raise ValueError(f"zero_terminal needs 2 steps at least, got {steps}")
    if schedule == "vp":
        return schedules.vp_sigmas(steps, dtype=torch.float64)
    if schedule == "simple-diffusion":
        options = {"zero_terminal": zero_terminal, "dtype": torch.float64}
        return schedules.simple_diffusion_sigmas(steps, max(resolution), **options)
    return getattr(schedules, f"{schedule}_sigmas")(steps, sigma_min, sigma_max, dtype=torch.float64)


def generate(denoiser, count: int, resolution: tuple[int, int], **options) -> Tensor:
    """(count, C, H, W) float32 on the CPU, about [-1, 1]. Options as in ``stream``."""
    return torch.cat(list(stream(denoiser, count, resolution, **options)))


def stream(
    denoiser, count: int, resolution: tuple[int, int], *,
    classes: Sequence[int] | None = None, num_classes: int = 0,
    guidance: float = 1.0, guidance_interval: tuple[float, float] | None = None, guidance_rescale: float = 0.0,
    threshold: float | None = None, sampler: str = "dpmpp_3m_sde", eta: float | None = None, steps: int = 50,
    schedule: str = "karras", sigma_min: float = 1e-2, sigma_max: float = 160.0, zero_terminal: bool = False,
    seed: int = 0, batch_size: int | None = None, channels: int = 3, progress: Callable[[float], object] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Batches of images as they are finished: (b, C, H, W) float32 on the CPU, about [-1, 1].

    denoiser: D(x, sigma, **cond), an objective of ``diffusion.losses`` for instance; where it has parameters, it works
    on their device. resolution: (height, width). num_classes: of a model with classes, which then always gets
    class_cond; image i has class classes[i % len(classes)], or none (num_classes) without classes. guidance: scale of
    classifier-free guidance, 1 for none, which needs classes; guidance_interval, guidance_rescale: see
    ``guidance.Guided``. threshold: percentile of ``guidance.Thresholded``. sampler: a name in ``samplers.SAMPLERS``;
    eta: its own unless given. zero_terminal: with the schedule "simple-diffusion" and an objective that has ``start``,
    from pure noise. seed: of image 0. progress: called after each step with the number of images that it was worth.
    """
    _check_ints(count=count, batch_size=1 if batch_size is None else batch_size, channels=channels, steps=steps)
    _check_ints(height=resolution[0], width=resolution[1])
    if classes is not None and not (len(classes) and all(0 <= c < num_classes for c in classes)):
        raise ValueError(f"classes must lie in 0 … num_classes - 1, num_classes is {num_classes}, got {list(classes)}")
    if classes is None and guidance != 1:
        raise ValueError(f"guidance {guidance} needs classes; without them it must be 1")
    sample = _sampler(sampler, eta)
    sigmas = noise_levels(schedule, steps, sigma_min, sigma_max, resolution, zero_terminal)
    guided = denoiser
    if guidance != 1:
        options = {"interval": guidance_interval, "rescale": guidance_rescale}
        guided = Guided(denoiser, guidance, num_classes=num_classes, **options)
    if threshold is not None:
        guided = Thresholded(guided, threshold)

    def make(images: range) -> Tensor:
        device, seeds = _device(denoiser), [seed + i for i in images]
        extra = {}
        if num_classes:
            chosen = [num_classes if classes is None else classes[i % len(classes)] for i in images]
            extra["class_cond"] = torch.tensor(chosen, device=device)
        x, levels = noise.initial((len(images), channels, *resolution), seeds, device), sigmas
        if zero_terminal:
            levels = sigmas[1:]
            with torch.no_grad():
                x = denoiser.start(x, x.new_full((len(images),), levels[0].item()), **extra)
        else:
            x = x * levels[0].item()
        report = None if progress is None else lambda info: progress(len(images) / (len(levels) - 1))
        return sample(guided, x, levels, seed=seeds, callback=report, extra=extra).float().cpu()

    # Batches of nearly one size, so that a compiled model meets two sizes at most.
    batches = math.ceil(count / (batch_size or count))
    ends = [count * i // batches for i in range(batches + 1)]
    return (make(range(*pair)) for pair in itertools.pairwise(ends))


def defaults(metadata: dict) -> dict:
    """What a model file says of the options sampler, steps, sigma_min and sigma_max of ``stream``; None where nothing.

    metadata: of ``models.pretrained.load``.
    """
    ends, sampler = metadata.get("objective") or {}, metadata.get("sampler") or {}
    own = {"sampler": sampler.get("name"), "steps": sampler.get("steps")}
    return own | {name: ends.get(name) for name in ("sigma_min", "sigma_max")}


def _sampler(name: str, eta: float | None) -> Callable:
    """The sampler with its eta; called with a seed, which one that draws nothing does not get."""
    if name not in samplers.SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(samplers.SAMPLERS)}, got {name!r}")
    options = {n: list(inspect.signature(s).parameters) for n, s in samplers.SAMPLERS.items()}
    if eta is not None and "eta" not in options[name]:
        raise ValueError(f"eta is for {', '.join(n for n in options if 'eta' in options[n])}; the sampler is {name}")
    own = {} if eta is None else {"eta": eta}

    def sample(denoiser, x, sigmas, *, seed, **others):
        seeded = {"seed": seed} if "seed" in options[name] else {}
        return samplers.SAMPLERS[name](denoiser, x, sigmas, **seeded, **own, **others)

    return sample


def _device(denoiser) -> torch.device:
    parameters = denoiser.parameters() if isinstance(denoiser, torch.nn.Module) else ()
    return next((p.device for p in parameters), torch.device("cpu"))


def _check_ints(**numbers: int):
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of 1 or more, got {value!r}")


# ---- The command ----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """Make images with a checkpoint: OUTPUT/images/SEED.png, OUTPUT/grid.png, OUTPUT/samples.json with all settings.

    What a checkpoint says of itself (resolution, noise levels, sampler) is the default.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A model file, or a checkpoint of hdit train, of which the averaged weights are taken."""
    output: Path = Path("runs/samples")
    """Folder of the images; those of the same seeds are replaced."""
    count: int = 16
    """Images."""
    batch_size: int = 16
    """Images that are made at a time, at most. The images do not depend on it."""
    class_name: tuple[str, ...] = ()
    """Names of the classes of the images, in turn."""
    classes: tuple[int, ...] = ()
    """Numbers of the classes, in turn. Without class-name and classes: all classes in turn, if the model has any."""
    unconditional: bool = False
    """Of a model with classes: images of no class in particular."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels (low, high) within which guidance acts."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the contrast that guidance adds is taken back."""
    threshold: float | None = None
    """Dynamic thresholding with this percentile, 0.995 for instance."""
    sampler: Literal["euler", "heun", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm"] | None = (
        None
    )
    """The checkpoint's, or dpmpp_3m_sde."""
    steps: int | None = None
    """The checkpoint's, or 50."""
    schedule: Literal["karras", "exponential", "polyexponential", "vp", "simple-diffusion"] = "karras"
    """Spacing of the noise levels; vp and simple-diffusion have ends of their own."""
    sigma_min: float | None = None
    """Smallest noise level before 0: the checkpoint's, or 0.01."""
    sigma_max: float | None = None
    """Largest noise level: the checkpoint's, or 160."""
    zero_terminal: bool = False
    """With the schedule simple-diffusion: start from pure noise, for a model that was trained to (v or x0)."""
    eta: float | None = None
    """Noise of the samplers for the SDE and euler_ancestral, relative to their own, 1; 0 is none."""
    seed: int = 0
    """Of the first image; image i has seed + i."""
    height: int | None = None
    """Pixels, any multiple of what the model's patches and levels need; the checkpoint's unless given."""
    width: int | None = None
    """Pixels, as height."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model. The state of the sampler is float32."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; a GPU if there is one."""
    compile: bool = False
    """Compile the model first: minutes, then faster steps."""
    grid_count: int = 64
    """Images of the grid, at most; 0 for no grid."""
    backend: str | None = None
    """Of the kernels: one that hdit info lists, instead of the best."""

    def run(self):
        """Write the images. Raises ValueError, one sentence, before any work for what cannot be."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not available: this torch sees no CUDA device")
        _check_ints(count=self.count, batch_size=self.batch_size)
        model, metadata = self._load(device)
        settings = self.settings(model.config, metadata)
        denoiser = losses.objective(metadata.get("objective", {"type": "edm"}), model)
        stream(denoiser, **settings)  # refuses what it cannot do; nothing is made until the batches are asked for
        if self.compile:
            denoiser.model = torch.compile(model)
        images = [{"file": f"images/{s:06}.png", "seed": s} for s in range(self.seed, self.seed + self.count)]
        if settings["classes"]:
            images = [i | {"class": c} for i, c in zip(images, itertools.cycle(settings["classes"]), strict=False)]
        kernels = hdit_kernels.use(self.backend) if self.backend else contextlib.nullcontext()
        with kernels:
            self._prepare_folder({image["file"] for image in images})
            start = time.monotonic()
            pictured = self._write(denoiser, images, settings)
            seconds = time.monotonic() - start
        if pictured:
            names = metadata.get("class_names") if settings["classes"] else None
            captions = names and [names[image["class"]] for image in images[: len(pictured)]]
            write(grid(torch.stack(pictured), captions=captions), self.output / "grid.png")
        self._report(images, settings, seconds, device)
        print(f"{self.output}: {self.count} images, {seconds / self.count:.3g} s each")

    def _load(self, device: torch.device) -> pretrained.Pretrained:
        if pretrained.read_header(self.checkpoint).get("format") == pretrained.TRAINING_FORMAT:
            model, metadata = export.load_training(self.checkpoint)
            return pretrained.Pretrained(model.to(device, DTYPES[self.dtype]), metadata)
        return pretrained.load(self.checkpoint, dtype=DTYPES[self.dtype], device=device)

    def settings(self, config, metadata: dict) -> dict:
        """Resolution and options of ``stream``: the command's, or else the checkpoint's."""
        if config.mapping_cond_dim or config.in_channels not in (1, 3):
            needs = (
                "a vector mapping_cond for each image" if config.mapping_cond_dim else "another way to show an image"
            )
            raise ValueError(f"checkpoint {self.checkpoint} needs {needs}: call hdit.diffusion.samplers")
        parameters = inspect.signature(stream).parameters
        found = {name: getattr(self, name) for name in parameters if hasattr(self, name)}
        for name, value in defaults(metadata).items():
            if found[name] is None:
                found[name] = parameters[name].default if value is None else value
        found |= {"classes": self._classes(config, metadata), "num_classes": config.num_classes}
        return found | {"resolution": self._resolution(config, metadata), "channels": config.in_channels}

    def _resolution(self, config, metadata: dict) -> tuple[int, int]:
        sides, own = [], metadata.get("resolution") or (None, None)
        for name, known, multiple in zip(("height", "width"), own, config.side_multiple, strict=True):
            side = known if getattr(self, name) is None else getattr(self, name)
            if side is None:
                raise ValueError(f"{name} must be given: checkpoint {self.checkpoint} does not name its resolution")
            if side < 1 or side % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} for this model, got {side}")
            sides.append(side)
        return tuple(sides)

    def _classes(self, config, metadata: dict) -> list[int] | None:
        names = metadata.get("class_names") or []
        given = [name for name in ("class_name", "classes", "unconditional") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
        if given and not config.num_classes:
            raise ValueError(f"{given[0]} is for models with classes, which that of {self.checkpoint} has not")
        if unknown := [name for name in self.class_name if name not in names]:
            known = ", ".join(names) or "not there: give classes, their numbers"
            raise ValueError(f"class_name {unknown[0]!r} is unknown; the names in {self.checkpoint} are {known}")
        if not config.num_classes or self.unconditional:
            return None
        return [names.index(name) for name in self.class_name] or list(self.classes or range(config.num_classes))

    def _prepare_folder(self, files: set[str]):
        """Make the folder. ValueError where other files lie in it: they would pass for images of this run."""
        folder = self.output / "images"
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        if others := sorted(path.name for path in folder.iterdir() if f"images/{path.name}" not in files):
            raise ValueError(f"output {self.output} holds images/{others[0]} of another run; choose another folder")

    def _write(self, denoiser, images: list[dict], settings: dict) -> list[Tensor]:
        """Sample and write all images; returns those of the grid."""
        files, pictured = (self.output / image["file"] for image in images), []
        shape = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
        with tqdm(total=self.count, unit=" images", bar_format=shape) as bar:
            for batch in stream(denoiser, progress=bar.update, **settings):
                for image, file in zip(batch, files, strict=False):
                    write_image(image, file)
                pictured += batch[: max(0, self.grid_count - len(pictured))]
        return pictured

    def _report(self, images: list[dict], settings: dict, seconds: float, device: torch.device):
        """samples.json: what the images were made of and with."""
        backend = self.backend or hdit_kernels.available_backends("neighborhood_attention", device.type)[0]
        found = {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": pretrained.sha256(self.checkpoint),
            "settings": settings | {"dtype": self.dtype, "compile": self.compile},
            "seconds_per_image": seconds / self.count,
            "device": device_name(str(device)),
            "threads": torch.get_num_threads(),
            "backend": backend,
            "versions": {"hdit": hdit_kernels.__version__, "torch": torch.__version__},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "images": images,
        }
        with replacing(self.output / "samples.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")

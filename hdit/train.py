"""hdit train: the step of a training run, and what surrounds it; on one processor as it is, on many under torchrun.

Whatever is random in a step (noise, noise levels, dropped classes, dropout, the order and the crops of the images) is a
function of the seed, of the step and of the place of the example in the global batch. So a run that was killed goes on
with the losses that it would have had, and N processes take the same steps as one, to rounding.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from . import augmentation, checkpoints, configs, data, export, flops, models, sample, train_log
from .configs import Configuration, Training
from .diffusion import losses, schedules
from .files import remove_leftovers, replacing
from .models import pretrained

NOISE, LEVELS, CLASSES, DROPOUT, WEIGHTS = range(5)  # what a random draw is for, so that no two purposes share one
DTYPES = {"float32": "no", "bfloat16": "bf16"}  # of a recipe, and as accelerate calls them


@dataclass
class Train:
    """Train a model and keep checkpoints, a loss curve and sample grids; the same command resumes a run that stopped.

    Under `torchrun --nproc-per-node N -m hdit train …` N processes share each batch.
    """

    config: tyro.conf.Suppress[str]
    data: str | None = None
    """Images: a folder, tar shards, hf:NAME, or builtin, photos, digits, faces (see hdit.data.open_images)."""
    output: Path | None = None
    """Folder of the run; runs/train/CONFIG unless given. Holds metrics.jsonl, loss.png, samples/, model.safetensors and
    checkpoints. A run that is there already is resumed."""
    recipe: Annotated[Training, tyro.conf.arg(name="")] = field(default_factory=lambda: Training(steps=None))
    model: Path | None = None
    """JSON file with the model's configuration, {"model": "HDiT", "config": {…}}, in place of the named one."""
    height: int | None = None
    """Pixels; the resolution that the configuration was made for, unless given."""
    width: int | None = None
    """Pixels, as height."""
    crop: Literal["center", "random"] = "center"
    """Part of an image that has another aspect: its centre, or at random."""
    flip: bool = False
    """Mirror images at random."""
    class_labels: bool = True
    """Train on the classes of the images, where they have any and the model is one of a configuration by name."""
    seed: int = 0
    accumulation: int = 1
    """Micro-batches whose gradients are added up for one step."""
    minutes: float | None = None
    """Stop after so many minutes of training, resumptions included, if `steps` is not reached before."""
    workers: int = 0
    """Processes that load images; 0 loads them in the training process."""
    log_every: int = 20
    """Steps between two writings of metrics.jsonl, which has a line for every step."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one is written at the end, and at SIGTERM or ^C."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    demo_every: int = 1000
    """Steps between two grids of samples, made with the averaged weights; 0 for none."""
    demo_count: int = 16
    """Images of a grid."""
    demo_steps: int = 25
    """Sampling steps of a grid."""
    demo_guidance: float = 1.0
    """Classifier-free guidance of a grid, for models with classes."""
    compile: bool = False
    """Run the model through torch.compile."""
    activation_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them: less memory, about a third more work."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP)."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""
    tracker: str | None = None
    """Also send the metrics to a tracker of accelerate's: tensorboard, wandb, …"""

    def run(self) -> int:
        return Run(self).train()


def command() -> type:
    """The command line of ``Train``, with a subcommand for each configuration, whose defaults are its recipe's."""
    recipes = {name: configs.get(name).training or Training() for name in configs.names()}
    defaults = {name: Train(config=name, recipe=recipe) for name, recipe in recipes.items()}
    choice = tyro.extras.subcommand_type_from_defaults(defaults, prefix_names=False, sort_subcommands=False)
    run = {"run": lambda self: self.configuration.run(), "__doc__": Train.__doc__}
    field_type = Annotated[choice, tyro.conf.arg(name="")]
    return dataclasses.make_dataclass("TrainCommand", [("configuration", field_type)], namespace=run)


def generator(device: str | torch.device, *key: int) -> torch.Generator:
    """A generator whose stream depends on all of ``key``, and on nothing else."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # a torch seed has 63 bits


def objective_spec(recipe: Training) -> dict:
    """What ``losses.objective`` builds, and what a sampler has to know."""
    ends = {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
    gamma = {} if recipe.min_snr_gamma is None else {"min_snr_gamma": recipe.min_snr_gamma}
    if recipe.objective == "edm":
        weighting = {"weighting": recipe.loss_weighting, "loss": recipe.loss, **gamma}
        return {"type": "edm", "sigma_data": recipe.sigma_data, **weighting, **ends}
    return {"type": recipe.objective, "parametrization": recipe.parametrization, "loss": recipe.loss, **gamma, **ends}


def noise_levels(recipe: Training, height: int, width: int):
    """The density of sigma, as a function of u in [0, 1)."""
    name = recipe.sigma_density
    if name == "lognormal":
        return schedules.density(name, loc=recipe.sigma_loc, scale=recipe.sigma_scale)
    ends = {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
    if name == "loguniform":
        return schedules.density(name, **ends)
    if name == "simple-diffusion":
        options = (max(height, width), recipe.noise_d_low, recipe.noise_d_high)
        limits = (-2 * math.log(recipe.sigma_max), -2 * math.log(recipe.sigma_min))
        zero = recipe.zero_terminal
        return lambda u: schedules.logsnr_to_sigma(
            schedules.logsnr_interpolated(1 - u, *options, *limits, zero_terminal=zero)
        )
    images = {"image_d": max(height, width), "noise_d_low": recipe.noise_d_low, "noise_d_high": recipe.noise_d_high}
    given = images if name == "cosine-interpolated" else {}
    return schedules.density(name, sigma_data=recipe.sigma_data, **given, **ends)


class Run:
    """One training run: the model, its average, the optimizer, the stream of images, and where it stands.

    configuration: what ``options.config`` names, or one that has no name.
    """

    def __init__(self, options: Train, configuration: Configuration | None = None):
        self.options, self.recipe = options, options.recipe
        self.published = configuration or configs.get(options.config)
        self._check()
        self.accelerator = _accelerator(options, self.recipe.dtype)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.folder = options.output or Path("runs/train") / options.config
        self.micro_batch = self._micro_batch()
        self.spec = objective_spec(self.recipe)
        self.images, config = self._images_and_config()
        self.height, self.width = self.images.height, self.images.width
        self.noise_levels = noise_levels(self.recipe, self.height, self.width)

        torch.manual_seed(seed_of(options.seed, WEIGHTS))
        self.network = models.from_config(config).to(self.device)
        self.macs = flops.count(self.network, self.height, self.width).macs  # and a check that such images fit
        self.network.checkpointing = options.activation_checkpointing
        self._wrap()
        self.objective = losses.objective(self.spec, self.model)
        self.denoiser = losses.objective(self.spec, self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.param_groups(lr=self.recipe.lr, weight_decay=self.recipe.weight_decay),
            betas=self.recipe.betas,
            eps=self.recipe.eps,
            fused=True,
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = checkpoints.Ema(self.network, self.recipe.ema_decay, self.recipe.ema_power)
        augment = augmentation.KarrasAugmentation(self.recipe.augment_prob) if self.recipe.augment_prob else None
        self.batches = data.Batches(
            self.images,
            self.micro_batch,
            seed=options.seed,
            rank=self.rank,
            world_size=self.world_size,
            workers=options.workers,
            augment=augment,
        )
        self.step, self.seconds, self.stopped_by = 0, 0.0, None

    # ---- what a run is made of -------------------------------------------------------------------------------------

    def _check(self) -> None:
        options, recipe = self.options, self.recipe
        for name in ("data", "steps", "batch_size"):
            if getattr(options if name == "data" else recipe, name) is None:
                raise ValueError(f"{name} must be given: configuration {options.config!r} has none")
        for name, owner in (
            *((name, options) for name in ("accumulation", "log_every", "checkpoint_every", "keep", "demo_count")),
            *((name, recipe) for name in ("steps", "batch_size")),
        ):
            if getattr(owner, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(owner, name)}")
        if recipe.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {recipe.dtype!r}")
        if not 0 <= recipe.class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {recipe.class_dropout}")

    def _micro_batch(self) -> int:
        parts = self.world_size * self.options.accumulation
        if self.recipe.batch_size % parts:
            raise ValueError(
                f"batch_size {self.recipe.batch_size} must divide by {self.world_size} processes x"
                f" {self.options.accumulation} micro-batches (accumulation)"
            )
        return self.recipe.batch_size // parts

    def _images_and_config(self):
        """The images, and the model's configuration, with as many classes as they have."""
        options, published = self.options, self.published
        height, width = (
            made_for if given is None else given
            for made_for, given in zip(published.resolution, (options.height, options.width), strict=True)
        )
        images = data.open_images(options.data, height, width, crop=options.crop, flip=options.flip)
        if options.model is not None:
            plain = json.loads(options.model.read_text())
            model = pretrained.build(
                {"model": plain.get("model"), "config": json.dumps(plain.get("config"))}, options.model
            )
            return images, model.config
        config = published.config
        if options.class_labels and images.class_names:
            config = dataclasses.replace(config, num_classes=len(images.class_names))
        return images, config

    def _wrap(self) -> None:
        """self.model is what computes a loss; self.network has the parameters."""
        if self.options.compile:
            self.network.compile()
        if self.options.fsdp and self.world_size > 1:
            lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
            for layer in (child for children in lists for child in children if not isinstance(child, nn.ModuleList)):
                fully_shard(layer)
            self.model = fully_shard(self.network)
        else:
            self.model = self.accelerator.prepare_model(self.network, evaluation_mode=self.world_size == 1)
            # evaluation_mode only says «do not wrap in DDP»: there is nobody to share gradients with

    # ---- one step --------------------------------------------------------------------------------------------------

    def take_step(self) -> tuple[Tensor, Tensor, float]:
        """Loss of the whole batch (this process's share of it), norm of the gradient, and the rate."""
        recipe, accumulation = self.recipe, self.options.accumulation
        rate = min(1.0, (self.step + 1) / recipe.lr_warmup) if recipe.lr_warmup else 1.0
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.network.train()
        total = torch.zeros((), device=self.device)
        for micro in range(accumulation):
            last = micro == accumulation - 1
            with self._gradients_shared(last), self.accelerator.autocast():
                loss = self._loss(micro).mean() / accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.step)
        self.step += 1
        return total, norm, rate

    def _loss(self, micro: int) -> Tensor:
        """(micro_batch,): one loss per image."""
        options, recipe, key = self.options, self.recipe, (self.options.seed, self.step)
        batch = next(self.batches).to(self.device)
        places = [
            self.rank + self.world_size * i for i in range(micro * self.micro_batch, (micro + 1) * self.micro_batch)
        ]
        torch.manual_seed(seed_of(*key, DROPOUT, micro, self.rank))
        u = schedules.stratified_uniform(
            self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            accumulation=options.accumulation,
            micro_batch=micro,
            generator=generator("cpu", *key, LEVELS),
            dtype=torch.float64,
        )
        sigma = self.noise_levels(u).to(self.device, torch.float32)
        noise = torch.cat(
            [
                losses.training_noise(
                    image[None],
                    offset=recipe.noise_offset,
                    generator=generator(self.device, *key, NOISE, place),
                )
                for image, place in zip(batch.images, places, strict=True)
            ]
        )
        cond = {}
        if batch.augmentation.shape[1]:
            cond["aug_cond"] = batch.augmentation
        if classes := self.network.config.num_classes:
            drawn = torch.rand(recipe.batch_size, generator=generator("cpu", *key, CLASSES), dtype=torch.float64)
            dropped = (drawn[places] < recipe.class_dropout).to(self.device)
            cond["class_cond"] = torch.where(dropped | (batch.classes < 0), classes, batch.classes)
        return self.objective.loss(batch.images, noise, sigma, **cond)

    def _gradients_shared(self, last: bool):
        """Processes add up their gradients with the last micro-batch only."""
        if self.model is self.network and hasattr(self.network, "set_requires_gradient_sync"):
            self.network.set_requires_gradient_sync(last)
            return torch.enable_grad()
        return torch.enable_grad() if last else self.accelerator.no_sync(self.model)

    # ---- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Steps until the run is complete or is told to stop; the exit code."""
        if self.main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        self.accelerator.wait_for_everyone()
        parameters = sum(p.numel() for p in self.network.parameters())
        self.say(
            f"{type(self.network).__name__}, {parameters / 1e6:.2f} M parameters, {self.macs / 1e9:.3f} GMAC per image"
            f" of {self.height} x {self.width}; {len(self.images)} images of {self.options.data}; {self.device}"
            + (f" x {self.world_size}" if self.world_size > 1 else "")
        )
        self._resume()
        with _signals(self):
            if self.main and not (self.folder / "samples/real.png").exists():
                self._save_grid(torch.stack([self._real(i) for i in range(self.options.demo_count)]), "real")
            self._loop()
            self.checkpoint()
            if self.stopped_by is None:
                self._finish()
        self.accelerator.end_training()
        if self.stopped_by is not None:
            name = signal.Signals(self.stopped_by).name
            self.say(f"stopped by {name} after {self.step} steps; the same command resumes {self.folder}")
            return 128 + self.stopped_by
        return 0

    def _loop(self) -> None:
        options, log, pending = self.options, train_log.Log(self.folder), []
        begun, before = time.monotonic(), self.seconds
        progress = tqdm(total=self.recipe.steps, initial=self.step, unit="step", disable=not self.main, smoothing=0.05)
        with progress:
            while self.step < self.recipe.steps and not self._should_stop():
                pending.append(self.take_step())
                self.seconds = before + time.monotonic() - begun
                progress.update()
                if self._every(options.log_every):
                    self._flush(log, pending, progress)
                if self._every(options.demo_every) and self.step < self.recipe.steps:
                    self.demo()
                if self._every(options.checkpoint_every) and self.step < self.recipe.steps:
                    self._flush(log, pending, progress)
                    self.checkpoint()
            self._flush(log, pending, progress)

    def _every(self, steps: int) -> bool:
        return bool(steps) and self.step % steps == 0

    def _should_stop(self) -> bool:
        """The same answer in every process: told by a signal, or out of minutes."""
        minutes = self.options.minutes
        late = minutes is not None and self.seconds >= 60 * minutes
        if self.world_size == 1:
            return late or self.stopped_by is not None
        if self.step % self.options.log_every:
            return False  # asking the others costs a round trip
        told = torch.tensor([self.stopped_by or 0, int(late)], device=self.device)
        told = self.accelerator.gather(told[None]).amax(0).tolist()
        self.stopped_by = told[0] or None
        return any(told)

    def _flush(self, log: train_log.Log, pending: list, progress: tqdm) -> None:
        """Write the metrics of the steps since the last time: the only place that waits for the device."""
        if not pending:
            return
        losses_, norms = (torch.stack([_plain(entry[i]) for entry in pending]) for i in (0, 1))
        losses_ = self.accelerator.reduce(losses_, "mean").tolist()
        first = self.step - len(pending)
        entries = [
            {
                "step": first + i,
                "loss": loss,
                "grad_norm": norm,
                "rate": pending[i][2],
                "images": (first + i + 1) * self.recipe.batch_size,
                "seconds": round(self.seconds, 3),
            }
            for i, (loss, norm) in enumerate(zip(losses_, norms.tolist(), strict=True))
        ]
        if self.main:
            log.write(entries)
            speed = self.step * self.recipe.batch_size / self.seconds
            progress.set_postfix_str(f"{speed:.1f} images/s, loss {np.mean(losses_):.4f}")
            for entry in entries if self.accelerator.trackers else ():
                self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        pending.clear()
        if not all(map(math.isfinite, losses_)):
            bad = next(entry["step"] for entry in entries if not math.isfinite(entry["loss"]))
            raise FloatingPointError(
                f"the loss of step {bad} is not finite; the last checkpoint is of step"
                f" {(checkpoints.steps(self.folder) or ['none'])[-1]}; a smaller lr, or float32, may help"
            )

    def checkpoint(self) -> None:
        """Write one, unless the last one is of this very step."""
        state = checkpoints.tensors(self.network, self.ema, self.optimizer)
        if self.main and (self.step not in checkpoints.steps(self.folder) or not self.step):
            checkpoints.save(self.folder, self.step, state, self._header(), self.options.keep)
        self.accelerator.wait_for_everyone()

    def _header(self) -> dict:
        names = self.images.class_names
        return {
            "model": type(self.network).__name__,
            "config": self.network.config.to_dict(),
            "objective": self.spec,
            "resolution": [self.height, self.width],
            **({"class_names": list(names)} if names and self.network.config.num_classes else {}),
            "sampler": {"name": self.recipe.sampler, "steps": self.recipe.sampler_steps},
            "settings": self._settings(),
            "batches": self.batches.state_dict(),
            "seconds": round(self.seconds, 3),
            "images": self.step * self.recipe.batch_size,
        }

    def _settings(self) -> dict:
        """What must not change when a run is resumed. How many processes share the work may, and how long it goes."""
        options = self.options
        recipe = dataclasses.asdict(self.recipe)
        for name in ("steps", "hardware", "sampler", "sampler_steps"):
            recipe.pop(name)
        return {
            **{name: getattr(options, name) for name in ("data", "crop", "flip", "seed")},
            **{name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()},
        }

    def _resume(self) -> None:
        path = checkpoints.latest(self.folder)
        if path is None:
            if self.main:
                train_log.Log(self.folder).cut(0)
            return
        state, header = checkpoints.load(path)
        ours = {**self._settings(), "model": type(self.network).__name__, "config": self.network.config.to_dict()}
        theirs = {**header["settings"], "model": header["model"], "config": header["config"]}
        for name in ours:
            if ours[name] != theirs.get(name):
                raise ValueError(
                    f"{name} is {ours[name]!r}, and the run in {self.folder} has {theirs.get(name)!r};"
                    " resume it with that, or choose another output"
                )
        checkpoints.restore(state, self.network, self.ema, self.optimizer)
        self.step, self.seconds = int(header["step"]), header["seconds"]
        self.batches.load_state_dict(header["batches"])
        if self.main:
            train_log.Log(self.folder).cut(self.step)
        self.say(f"resumed {path}")

    # ---- pictures --------------------------------------------------------------------------------------------------

    def _real(self, index: int) -> Tensor:
        return self.images.example(index % len(self.images), generator("cpu", self.options.seed, index))[0]

    @torch.no_grad()
    def demo(self) -> None:
        """samples/step-….png: the same seeds each time, from the averaged weights."""
        options, classes = self.options, self.network.config.num_classes
        self.network.eval()
        with self.ema.applied(), self.accelerator.autocast():
            images = sample.generate(
                self.denoiser,
                options.demo_count,
                (self.height, self.width),
                classes=[i % classes for i in range(options.demo_count)] if classes else None,
                num_classes=classes,
                guidance=options.demo_guidance,
                sampler=self.recipe.sampler or "dpmpp_3m_sde",
                steps=options.demo_steps,
                sigma_min=self.recipe.sigma_min,
                sigma_max=self.recipe.sigma_max,
                seed=options.seed,
            )
        if self.main:
            self._save_grid(images, f"step-{self.step:08}")

    def _save_grid(self, images: Tensor, name: str) -> None:
        with replacing(self.folder / "samples" / f"{name}.png") as temporary:
            sample.grid(images).save(temporary, format="PNG")

    def _finish(self) -> None:
        self.demo()
        if self.main:
            export.from_training(checkpoints.latest(self.folder), self.folder / "model.safetensors")
            if importlib.util.find_spec("matplotlib"):
                train_log.draw({self.options.config: self.folder}, self.folder / "loss.png")
            else:
                self.say("loss.png needs matplotlib: pip install 'hdit[plots]'")
            self.say(f"trained {self.step} steps; {self.folder / 'model.safetensors'} is for hdit sample")
        self.accelerator.wait_for_everyone()

    def say(self, sentence: str) -> None:
        if self.main:
            tqdm.write(f"hdit train: {sentence}", file=sys.stderr)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _accelerator(options: Train, dtype: str):
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "hdit train needs accelerate, which is not installed: pip install 'hdit[train]'"
        ) from None

    accelerator = Accelerator(cpu=options.cpu, mixed_precision=DTYPES[dtype], log_with=options.tracker)
    if options.tracker:
        accelerator.init_trackers("hdit")
    return accelerator


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """SIGTERM and ^C end the run after the current step, with a checkpoint; a second one ends it at once."""

    def stop(number, frame):
        run.stopped_by = number
        signal.signal(number, before[number])

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

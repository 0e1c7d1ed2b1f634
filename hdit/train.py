"""hdit train: what surrounds the steps of ``train_step``: log, checkpoints, pictures, how a run ends and resumes.

On one processor as it is, on many under torchrun.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
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
from torch import Tensor
from tqdm import tqdm

from . import checkpoints, configs, data, export, pictures, sample, train_log
from .configs import Configuration, Training
from .files import remove_leftovers
from .models import pretrained
from .train_step import Trainer, generator

ALIASES = {"flowers": "oxford_flowers_256"}


@dataclass
class Train:
    """Train a model and keep checkpoints, a loss curve and sample grids; the same command resumes a run that stopped.

    Under `torchrun --nproc-per-node N -m hdit train …` N processes share each batch.
    """

    config: tyro.conf.Suppress[str]
    data: str | None = None
    """Images: a folder, tar shards, hf:NAME, or builtin, photos, digits, faces (see hdit.data.open_images)."""
    output: Path | None = None
    """Folder of the run; runs/train/CONFIG unless given. Holds metrics.jsonl, overview.png, samples/, checkpoints and
    model.safetensors. A run that is there already is resumed."""
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

    @property
    def folder(self) -> Path:
        return self.output or Path("runs/train") / self.config

    def run(self) -> int:
        return Run(self).train()


def command() -> type:
    """The command line of ``Train``, with a subcommand for each configuration, whose defaults are its recipe's."""
    recipes = {name: configs.get(name).training or Training() for name in configs.names()}
    defaults = {name: Train(config=name, recipe=recipe) for name, recipe in recipes.items()}
    defaults |= {alias: defaults[name] for alias, name in ALIASES.items()}
    choice = tyro.extras.subcommand_type_from_defaults(defaults, prefix_names=False, sort_subcommands=False)
    run = {"run": lambda self: self.configuration.run(), "__doc__": Train.__doc__}
    field_type = Annotated[choice, tyro.conf.arg(name="")]
    return dataclasses.make_dataclass("TrainCommand", [("configuration", field_type)], namespace=run)


class Run:
    """A training run: its steps, and where it stands. configuration: as ``Trainer``."""

    def __init__(self, options: Train, configuration: Configuration | None = None):
        self.options, self.recipe = options, options.recipe
        self.trainer = Trainer(options, configuration)
        self.accelerator, self.network = self.trainer.accelerator, self.trainer.network
        self.main, self.world_size = self.accelerator.is_main_process, self.trainer.world_size
        self.folder = options.folder
        self.model_name = pretrained.model_class(self.network.config).__name__  # sharding gives the class another name
        self.seconds, self.stopped_by = 0.0, None
        self.saved: int | None = None  # the step of the last checkpoint; every process knows it

    def train(self) -> int:
        """Steps until the run is complete or is told to stop; the exit code."""
        if self.main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        self.accelerator.wait_for_everyone()
        trainer, parameters = self.trainer, sum(p.numel() for p in self.network.parameters())
        self.say(
            f"{self.model_name}, {parameters / 1e6:.2f} M parameters, {trainer.macs / 1e9:.3f} GMAC per image of"
            f" {trainer.resolution[0]} x {trainer.resolution[1]}; {len(trainer.images)} images of {self.options.data};"
            f" {self.world_size} x {trainer.device}"
        )
        self._resume()
        if self.options.tracker:
            self.accelerator.init_trackers("hdit")
        try:
            with _signals(self):
                if self.main and not (self.folder / "samples/real.png").exists():
                    self._save_grid(self._real(), "real")
                self._loop()
                # What the processes agreed on: a signal that comes from here on reaches them at different places.
                stopped_by = None if self.trainer.step == self.recipe.steps else self.stopped_by
                self.checkpoint()
                if stopped_by is None:
                    self._finish()
        finally:
            self.accelerator.end_training()  # trackers keep the last entries in memory
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            self.say(f"stopped by {name} after {self.trainer.step} steps; the same command resumes {self.folder}")
            return 128 + stopped_by
        return 0

    def _loop(self) -> None:
        options, log, pending = self.options, train_log.Log(self.folder), []
        begun, before = time.monotonic(), self.seconds
        progress = tqdm(
            total=self.recipe.steps, initial=self.trainer.step, unit="step", disable=not self.main, smoothing=0.05
        )
        with progress:
            while self.trainer.step < self.recipe.steps and not self._should_stop():
                pending.append(self.trainer.take_step())
                self.seconds = before + time.monotonic() - begun
                progress.update()
                if self._every(options.log_every):
                    self._flush(log, pending, progress)
                if self._every(options.demo_every) and self.trainer.step < self.recipe.steps:
                    self.demo()
                if self._every(options.checkpoint_every) and self.trainer.step < self.recipe.steps:
                    self._flush(log, pending, progress)
                    self.checkpoint()
            self._flush(log, pending, progress)

    def _every(self, steps: int) -> bool:
        return bool(steps) and self.trainer.step % steps == 0

    def _should_stop(self) -> bool:
        """The same answer in every process: told by a signal, or out of minutes."""
        minutes = self.options.minutes
        late = minutes is not None and self.seconds >= 60 * minutes
        if self.world_size == 1:
            return late or self.stopped_by is not None
        if self.trainer.step % self.options.log_every:
            return False  # asking the others costs a round trip
        told = torch.tensor([self.stopped_by or 0, int(late)], device=self.trainer.device)
        told = self.accelerator.gather(told[None]).amax(0).tolist()
        self.stopped_by = told[0] or None
        return any(told)

    def _flush(self, log: train_log.Log, pending: list, progress: tqdm) -> None:
        """Write the metrics of the steps since the last time: the only place that waits for the device."""
        if not pending:
            return
        losses_, norms = (torch.stack([checkpoints.whole(entry[i]) for entry in pending]) for i in (0, 1))
        losses_, norms = self.accelerator.reduce(losses_, "mean").tolist(), norms.tolist()
        first = self.trainer.step - len(pending)
        entries = [
            {
                "step": first + i,
                "loss": loss,
                "grad_norm": norm,
                "rate": pending[i][2],
                "images": (first + i + 1) * self.recipe.batch_size,
                "seconds": round(self.seconds, 3),
            }
            for i, (loss, norm) in enumerate(zip(losses_, norms, strict=True))
        ]
        if self.main:
            log.write(entries)
            speed = self.trainer.step * self.recipe.batch_size / self.seconds
            progress.set_postfix_str(f"{speed:.1f} images/s, loss {np.mean(losses_):.4f}")
            for entry in entries if self.accelerator.trackers else ():
                self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])
        pending.clear()
        for entry in entries:
            for name, value in (("loss", entry["loss"]), ("gradient", entry["grad_norm"])):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the {name} of step {entry['step']} is not finite; the last checkpoint is of step"
                        f" {'none' if self.saved is None else self.saved}; a smaller lr, or float32, may help"
                    )

    def checkpoint(self) -> None:
        """Write one, unless the last one is of this very step."""
        if self.trainer.step != self.saved:
            state = checkpoints.tensors(self.network, self.trainer.ema, self.trainer.optimizer)
            if self.main:
                checkpoints.save(self.folder, self.trainer.step, state, self._header(), self.options.keep)
            self.saved = self.trainer.step
        self.accelerator.wait_for_everyone()

    def _header(self) -> dict:
        names = self.trainer.images.class_names
        return {
            "model": self.model_name,
            "config": self.network.config.to_dict(),
            "objective": self.trainer.spec,
            "resolution": list(self.trainer.resolution),
            **({"class_names": list(names)} if names and self.network.config.num_classes else {}),
            "sampler": {"name": self.recipe.sampler, "steps": self.recipe.sampler_steps},
            "settings": self._settings(),
            "batches": self.trainer.batches.state_dict(),
            "seconds": round(self.seconds, 3),
            "images": self.trainer.step * self.recipe.batch_size,
        }

    def _settings(self) -> dict:
        """What must not change when a run is resumed. How many processes share the work may, and how long it goes."""
        options = self.options
        recipe = dataclasses.asdict(self.recipe)
        for name in ("steps", "hardware", "sampler", "sampler_steps"):
            recipe.pop(name)
        return {
            "data": data_name(options.data),
            **{name: getattr(options, name) for name in ("crop", "flip", "seed")},
            **{name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()},
        }

    def _resume(self) -> None:
        path = checkpoints.latest(self.folder)
        if path is None:
            if self.main:
                train_log.Log(self.folder).cut(0)
            return
        state, header = checkpoints.load(path)
        ours = {
            **self._settings(),
            "model": self.model_name,
            "config": self.network.config.to_dict(),
            "resolution": list(self.trainer.resolution),
        }
        theirs = {**header["settings"], **{name: header[name] for name in ("model", "config", "resolution")}}
        for name in ours:
            if ours[name] != theirs.get(name):
                raise ValueError(
                    f"{name} is {ours[name]!r}, and the run in {self.folder} has {theirs.get(name)!r};"
                    " resume it with that, or choose another output"
                )
        checkpoints.restore(state, self.network, self.trainer.ema, self.trainer.optimizer)
        self.trainer.step, self.seconds = int(header["step"]), header["seconds"]
        self.saved = self.trainer.step
        self.trainer.batches.load_state_dict(header["batches"])
        if self.main:
            train_log.Log(self.folder).cut(self.trainer.step)
        self.say(f"resumed {path}")

    # ---- pictures --------------------------------------------------------------------------------------------------

    def _real(self) -> Tensor:
        """The first images of the set that can be read, over and over where it has fewer than the grid."""
        images, seed = self.trainer.images, self.options.seed
        found = []
        for index in range(len(images)):
            with contextlib.suppress(data.UnreadableImage):  # the stream of batches names it
                found.append(images.example(index, generator("cpu", seed, index))[0])
            if len(found) == self.options.demo_count:
                break
        if not found:
            raise data.UnreadableImage(f"none of the {len(images)} images of {images.name!r} can be read")
        return torch.stack(list(itertools.islice(itertools.cycle(found), self.options.demo_count)))

    @torch.no_grad()
    def demo(self) -> None:
        """samples/step-….png: the same seeds each time, from the averaged weights."""
        options, classes = self.options, self.network.config.num_classes
        self.network.eval()
        with self.trainer.ema.applied(), self.accelerator.autocast():
            images = sample.generate(
                self.trainer.denoiser,
                options.demo_count,
                self.trainer.resolution,
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
            self._save_grid(images, f"step-{self.trainer.step:08}")

    def _save_grid(self, images: Tensor, name: str) -> None:
        pictures.write(pictures.grid(images), self.folder / "samples" / f"{name}.png")

    def _finish(self) -> None:
        self.demo()
        if self.main:
            export.from_training(checkpoints.latest(self.folder), self.folder / "model.safetensors")
            if importlib.util.find_spec("matplotlib"):
                train_log.overview(self.folder, self.folder / "overview.png", self.options.config)
            else:
                self.say("overview.png needs matplotlib: pip install 'hdit[plots]'")
            self.say(f"trained {self.trainer.step} steps; {self.folder / 'model.safetensors'} is for hdit sample")
        self.accelerator.wait_for_everyone()

    def say(self, sentence: str) -> None:
        if self.main:
            tqdm.write(f"hdit train: {sentence}", file=sys.stderr)


def data_name(source: str) -> str:
    """What a file says of the images that a model was trained on: no folders of the machine where they lay."""
    prefix = "hf:" if source.startswith("hf:") else ""
    path = Path(source.removeprefix(prefix))
    return f"{prefix}{path.name}" if path.is_absolute() or path.exists() or not prefix else source


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

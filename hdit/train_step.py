"""One step of training: the network, its average, the optimizer, the stream of images, and what is random in a step.

Whatever is random (noise, noise levels, dropped classes, dropout, the order and the crops of the images) is a function
of the seed, of the step and of the place of the example in the global batch. So a run that was killed goes on with the
losses that it would have had, and N processes take the same steps as one, to rounding.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from . import augmentation, configs, data, flops, models
from .checkpoints import Ema
from .configs import Configuration, Training
from .diffusion import losses, samplers, schedules
from .models import pretrained

NOISE, LEVELS, CLASSES, DROPOUT, WEIGHTS = range(5)  # what a random draw is for, so that no two purposes share one
DTYPES = {"float32": "no", "bfloat16": "bf16"}  # of a recipe, and as accelerate calls them


def seed_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1  # a torch seed has 63 bits


def generator(device: str | torch.device, *key: int) -> torch.Generator:
    """A generator whose stream depends on all of ``key``, and on nothing else."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def objective_spec(recipe: Training) -> dict:
    """What ``losses.objective`` builds, and what a sampler has to know."""
    ends = {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
    gamma = {} if recipe.min_snr_gamma is None else {"min_snr_gamma": recipe.min_snr_gamma}
    if recipe.objective == "edm":
        weighting = {"weighting": recipe.loss_weighting, "loss": recipe.loss, **gamma}
        return {"type": "edm", "sigma_data": recipe.sigma_data, **weighting, **ends}
    return {"type": recipe.objective, "parametrization": recipe.parametrization, "loss": recipe.loss, **gamma, **ends}


def noise_levels(recipe: Training, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The density of sigma, as a function of u in [0, 1)."""
    name = recipe.sigma_density
    if name == "lognormal":
        return schedules.density(name, loc=recipe.sigma_loc, scale=recipe.sigma_scale)
    params = {}
    if name != "simple-diffusion":  # whose log-SNR ends at -15 and 15 before the shift
        params |= {"sigma_min": recipe.sigma_min, "sigma_max": recipe.sigma_max}
    if name in ("cosine-interpolated", "simple-diffusion"):
        params |= {"image_d": max(height, width), "noise_d_low": recipe.noise_d_low}
        params |= {"noise_d_high": recipe.noise_d_high}
    if name in ("cosine-interpolated", "v-diffusion"):
        params |= {"sigma_data": recipe.sigma_data}
    if name == "simple-diffusion":
        params |= {"zero_terminal": recipe.zero_terminal}
    return schedules.density(name, **params)


class Trainer:
    """What takes the steps. ``network`` has the parameters, ``denoiser`` is D around it, ``ema`` its average.

    options: a ``train.Train``. configuration: what ``options.config`` names, or one that has no name. ValueError,
    before any work, for options, images and a model that do not go together.
    """

    def __init__(self, options, configuration: Configuration | None = None):
        self.options, self.recipe = options, options.recipe
        self._check()
        self.accelerator = _accelerator(options, self.recipe.dtype)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.micro_batch = self._micro_batch()
        self.spec = objective_spec(self.recipe)
        self.images, config = self._images_and_config(configuration or configs.get(options.config))
        self.resolution = self.images.height, self.images.width
        self.noise_levels = noise_levels(self.recipe, *self.resolution)

        torch.manual_seed(seed_of(options.seed, WEIGHTS))
        self.network = models.from_config(config).to(self.device)
        self.macs = flops.count(self.network, *self.resolution).macs  # and a check that such images fit
        self.network.checkpointing = options.activation_checkpointing
        self.model = self._shared()
        self.objective = losses.objective(self.spec, self.model)
        self.denoiser = losses.objective(self.spec, self.network)
        groups = self.network.param_groups(lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=self.recipe.betas, eps=self.recipe.eps, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = Ema(self.network, self.recipe.ema_decay, self.recipe.ema_power)
        self.batches = data.Batches(
            self.images,
            self.micro_batch,
            seed=options.seed,
            rank=self.rank,
            world_size=self.world_size,
            workers=options.workers,
            augment=augmentation.KarrasAugmentation(self.recipe.augment_prob) if self.recipe.augment_prob else None,
        )
        self.step = 0

    def _check(self) -> None:
        options, recipe = self.options, self.recipe
        for name in ("data", "steps", "batch_size"):
            if getattr(options if name == "data" else recipe, name) is None:
                raise ValueError(f"{name} must be given: configuration {options.config!r} has none")
        for name, owner in (
            *((name, options) for name in ("accumulation", "log_every", "checkpoint_every", "keep")),
            *((name, options) for name in ("demo_count", "demo_steps")),
            *((name, recipe) for name in ("steps", "batch_size")),
        ):
            if getattr(owner, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(owner, name)}")
        if recipe.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {recipe.dtype!r}")
        if not 0 <= recipe.class_dropout <= 1:
            raise ValueError(f"class_dropout must be in [0, 1], got {recipe.class_dropout}")
        if recipe.grad_clip is not None and not recipe.grad_clip > 0:
            raise ValueError(f"grad_clip must be positive, or None for no limit, got {recipe.grad_clip}")
        if recipe.sampler not in (None, *samplers.SAMPLERS):
            raise ValueError(f"sampler must be one of {', '.join(samplers.SAMPLERS)}, got {recipe.sampler!r}")

    def _micro_batch(self) -> int:
        parts = self.world_size * self.options.accumulation
        if self.recipe.batch_size % parts:
            raise ValueError(
                f"batch_size {self.recipe.batch_size} must divide by {self.world_size} processes x"
                f" {self.options.accumulation} micro-batches (accumulation)"
            )
        return self.recipe.batch_size // parts

    def _images_and_config(self, configuration: Configuration):
        """The images; and the model's configuration, with as many classes as they have."""
        options = self.options
        height, width = (
            made_for if given is None else given
            for made_for, given in zip(configuration.resolution, (options.height, options.width), strict=True)
        )
        images = data.open_images(options.data, height, width, crop=options.crop, flip=options.flip)
        classes = len(images.class_names or ()) if options.class_labels else 0
        if options.model is None:
            config = dataclasses.replace(configuration.config, num_classes=classes)
        else:
            plain = json.loads(options.model.read_text())
            header = {"model": plain.get("model"), "config": json.dumps(plain.get("config"))}
            config = pretrained.build(header, options.model).config
        if config.num_classes not in (0, classes):
            raise ValueError(f"model {options.model} has num_classes {config.num_classes}; the images have {classes}")
        if options.demo_guidance != 1 and not config.num_classes:
            raise ValueError(f"demo_guidance must be 1 for a model without classes, got {options.demo_guidance}")
        if (config.in_channels, config.mapping_cond_dim) != (3, 0):
            raise ValueError(
                f"configuration {options.config!r} has in_channels {config.in_channels} and mapping_cond_dim"
                f" {config.mapping_cond_dim}; images have 3 channels and no conditioning vector"
            )
        return images, config

    def _shared(self) -> nn.Module:
        """The network as a loss is computed with it: compiled, copied to or sharded over the processes."""
        if self.options.compile:
            self.network.compile()
        if self.options.fsdp and self.world_size > 1:
            return self._sharded()
        # evaluation_mode only says «do not wrap in DDP»: there is nobody to share gradients with
        return self.accelerator.prepare_model(self.network, evaluation_mode=self.world_size == 1)

    def _sharded(self) -> nn.Module:
        """The layers gather their parameters one by one, in the precision in which autocast would use them.

        Parameters, and with them their average and the optimizer's moments, are sharded in float32, and gradients are
        added up in it. Inputs of the layers are autocast's business. What belongs to no layer (the embeddings, with
        the noise level's, and the projections from and to pixels) is gathered in float32.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.recipe.dtype == "bfloat16":
            policy = dataclasses.replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        for layer in (child for children in lists for child in children if not isinstance(child, nn.ModuleList)):
            fully_shard(layer, mp_policy=policy)
        # By default the outermost parameters would stay gathered after a grid of samples: the next step would see the
        # average instead of the weights.
        return fully_shard(self.network, reshard_after_forward=True)

    def take_step(self) -> tuple[Tensor, Tensor, float]:
        """This process's share of the loss, the norm of the gradient, and the rate relative to the recipe's."""
        recipe, accumulation = self.recipe, self.options.accumulation
        rate = min(1.0, (self.step + 1) / recipe.lr_warmup) if recipe.lr_warmup else 1.0
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.network.train()
        total = torch.zeros((), device=self.device)
        for micro in range(accumulation):
            with self._gradients_shared(micro == accumulation - 1):
                with self.accelerator.autocast():
                    loss = self.loss(micro).mean() / accumulation
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.step)
        self.step += 1
        return total, norm, rate

    def loss(self, micro: int = 0) -> Tensor:
        """(micro_batch,): the loss of each image of this process's next micro-batch, the ``micro``-th of the step."""
        recipe, key = self.recipe, (self.options.seed, self.step)
        images, labels, augmented = next(self.batches).to(self.device)
        first = micro * self.micro_batch
        places = [self.rank + self.world_size * i for i in range(first, first + self.micro_batch)]
        torch.manual_seed(seed_of(*key, DROPOUT, micro, self.rank))
        u = schedules.stratified_uniform(
            self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            accumulation=self.options.accumulation,
            micro_batch=micro,
            generator=generator("cpu", *key, LEVELS),
            dtype=torch.float64,
        )
        sigma = self.noise_levels(u).to(self.device, torch.float32)
        draws = (generator(self.device, *key, NOISE, place) for place in places)
        noise = torch.cat(
            [
                losses.training_noise(image[None], offset=recipe.noise_offset, generator=draw)
                for image, draw in zip(images, draws, strict=True)
            ]
        )
        cond = {"aug_cond": augmented} if augmented.shape[1] else {}
        if classes := self.network.config.num_classes:
            drawn = torch.rand(recipe.batch_size, generator=generator("cpu", *key, CLASSES), dtype=torch.float64)
            dropped = (drawn[places] < recipe.class_dropout).to(self.device)
            cond["class_cond"] = torch.where(dropped | (labels < 0), classes, labels)
        return self.objective.loss(images, noise, sigma, **cond)

    def _gradients_shared(self, last: bool):
        """Processes add up their gradients with the last micro-batch only."""
        if hasattr(self.network, "set_requires_gradient_sync"):
            self.network.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)


def _accelerator(options, dtype: str):
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError:
        raise ModuleNotFoundError("hdit train needs accelerate: pip install 'hdit[train]'") from None

    if options.tracker is not None:
        _check_tracker(options.tracker)
    return Accelerator(
        cpu=options.cpu, mixed_precision=DTYPES[dtype], log_with=options.tracker, project_dir=options.folder
    )


def _check_tracker(name: str) -> None:
    """accelerate itself only warns of a tracker whose package is missing, and then logs nothing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    missing = {str(kind) for kind in LoggerType} - {str(kind) for kind in get_available_trackers()}
    present = [kind for kind in LOGGER_TYPE_TO_CLASS if kind not in missing]
    if name not in present:
        raise ValueError(
            f"tracker is {name!r}; it must be one of {', '.join(LOGGER_TYPE_TO_CLASS)}, and its package installed"
            f" (here: {', '.join(present) or 'none'})"
        )

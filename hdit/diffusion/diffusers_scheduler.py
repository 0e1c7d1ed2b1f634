"""Sampling with the schedulers of diffusers (pip install 'hdit[diffusers]'), which then drive our denoisers.

A scheduler sees what it was made for: a network's prediction of epsilon, v or the image, from the variance-preserving
z = x / √(1 + sigma²), x = x0 + sigma·noise. Its state is x for some (EulerDiscreteScheduler, HeunDiscreteScheduler), z
for others (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler), and ``scale_model_input`` gives z for
both. EDMEulerScheduler and EDMDPMSolverMultistepScheduler instead expect the raw output of EDM's network.
"""

import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def open_scheduler(name: str, **config):
    """The scheduler of diffusers with this class name. Raises ModuleNotFoundError with the command that installs it."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ModuleNotFoundError(
            f"scheduler {name!r} is part of diffusers, which is not installed: pip install 'hdit[diffusers]'"
        ) from None
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(
            f"scheduler must be the name of a scheduler of diffusers {diffusers.__version__}, got {name!r}"
        )
    return getattr(diffusers, name)(**config)


@torch.no_grad()
def sample(
    denoiser, scheduler, noise: Tensor, steps: int | None = None, *, sigmas: Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None, callback: Callable | None = None, extra: dict | None = None,
) -> Tensor:  # fmt: skip
    """The image of noise's shape that ``scheduler`` makes with denoiser(x, sigma, **extra), sigma of shape (B,).

    scheduler: an object of diffusers, or the name of its class. noise: (B, …), standard normal. steps: how many, over
    the scheduler's own noise levels; or sigmas: (n + 1,), decreasing, in their place (a scheduler keeps them in
    float32). generator: for schedulers that draw noise. callback: as in ``samplers``, once per evaluation.
    """
    scheduler = open_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
    predict = _prediction(scheduler)
    if (steps is None) == (sigmas is None):
        raise ValueError(f"steps or sigmas says which noise levels are visited: give one, got {steps} and {sigmas}")
    _set_levels(scheduler, steps, sigmas, noise.device)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    step_takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if generator is not None and "generator" in step_takes else {}
    for i, t in enumerate(scheduler.timesteps):
        sigma = _level(scheduler, i, t)
        if i == 0:  # a scheduler whose state is z starts at deviation 1, which leaves out that of the image
            x = x * (sigma / math.sqrt(1 + sigma**2) if float(scheduler.init_noise_sigma) == 1 else sigma)
        model_input = scheduler.scale_model_input(x, t)
        seen = x if _is_edm(scheduler) else model_input * math.sqrt(1 + sigma**2)
        chosen = denoiser.at(sigma) if hasattr(denoiser, "at") else denoiser
        denoised = chosen(seen, seen.new_full((x.shape[0],), sigma), **(extra or {})).to(x.dtype)
        if callback is not None:
            callback({"i": i, "x": seen, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = scheduler.step(predict(seen, denoised, sigma), t, x, **options).prev_sample
    return x


def _is_edm(scheduler) -> bool:
    return hasattr(scheduler, "precondition_outputs")


def _prediction(scheduler) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The network's output that ``scheduler`` expects, as a function of x, D(x; sigma) and sigma."""
    kind, name = getattr(scheduler.config, "prediction_type", None), type(scheduler).__name__
    if kind not in PREDICTIONS or not (_is_edm(scheduler) or hasattr(scheduler, "alphas_cumprod")):
        accepted = f"a variance-preserving scheduler, or an EDM one, that predicts {', '.join(PREDICTIONS)}"
        raise ValueError(f"scheduler must be {accepted}, got {name} with prediction_type {kind!r}")
    if _is_edm(scheduler):
        data, sign = scheduler.config.sigma_data, -1 if kind == "v_prediction" else 1

        def raw(x, denoised, sigma):
            variance = sigma**2 + data**2
            return (denoised - x * (data**2 / variance)) * (sign * math.sqrt(variance) / (sigma * data))

        return raw
    return {
        "epsilon": lambda x, denoised, sigma: (x - denoised) / sigma,
        "v_prediction": lambda x, denoised, sigma: (
            (x / sigma - denoised * (1 / sigma + sigma)) / math.sqrt(1 + sigma**2)
        ),
        "sample": lambda x, denoised, sigma: denoised,
    }[kind]


def _level(scheduler, i: int, t) -> float:
    """sigma at which the i-th evaluation takes place."""
    if not hasattr(scheduler, "sigmas"):
        share = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt((1 - share) / share)
    between = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order
    return float((scheduler.sigmas_interpol if between else scheduler.sigmas)[i])


def _set_levels(scheduler, steps, sigmas, device):
    levels = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    if levels is not None and not all(math.inf > a > b >= 0 for a, b in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must be finite and decrease to 0 or to a positive number, got {levels}")
    scheduler.set_timesteps(steps if levels is None else len(levels) - 1, device=device)
    if levels is not None:
        own = len(getattr(scheduler, "sigmas", ()))
        given = torch.tensor(levels, dtype=torch.float32)
        if own == 2 * (len(levels) - 1):  # Heun's keeps the level of each of its two evaluations
            given = torch.cat([given[:1], given[1:-1].repeat_interleave(2), given[-1:]])
        if own != len(given):
            kept = f"{own} for {len(levels) - 1} steps" if own else "none"
            raise ValueError(f"sigmas cannot be given to {type(scheduler).__name__}, which keeps {kept}; give steps")
        scheduler.sigmas = given
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # by number: neighbouring sigmas may share a timestep

"""Our denoisers under schedulers with the interface of diffusers, of each kind that it has.

The small ones here are written from the formulas. The adapter was compared with diffusers 0.42.1 itself, in float32, on
the denoiser and sigmas of test_samplers.py, for every prediction type: EulerDiscreteScheduler and EDMEulerScheduler
give our euler, HeunDiscreteScheduler our heun, DPMSolverMultistepScheduler and EDMDPMSolverMultistepScheduler our
dpmpp_2m, and its sde-dpmsolver++ our dpmpp_2m_sde with the same noise, all within 7e-7 of the largest pixel.
"""

import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from hdit.diffusion import samplers
from hdit.diffusion.diffusers_scheduler import PREDICTIONS, open_scheduler, sample
from hdit.diffusion.guidance import Guided

NOISE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIGMAS = [20.0, 6.0, 2.0, 0.5, 0.1, 0.0]


def denoiser(x, sigma):
    return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1))) * 0.7


class Scheduler:
    """Euler's method, which is DDIM, with a state x = x0 + sigma·noise."""

    init_noise_sigma = 99.0  # of its own levels

    def __init__(self, prediction_type="epsilon"):
        self.config = SimpleNamespace(prediction_type=prediction_type, sigma_data=0.5)
        self.alphas_cumprod = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.full((num_inference_steps,), 7, device=device)  # all the same: the index must do
        self.sigmas = torch.linspace(9, 0, num_inference_steps + 1)

    def set_begin_index(self, index):
        self.index = index

    def scale_model_input(self, x, t):
        return x / math.sqrt(1 + self.sigmas[self.index].item() ** 2)

    def denoised(self, output, x, sigma):
        alpha, s = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
        kind, z = self.config.prediction_type, alpha * x
        return {"epsilon": (z - s * output) / alpha, "v_prediction": alpha * z - s * output, "sample": output}[kind]

    def step(self, output, t, x):
        sigma, following = self.sigmas[self.index : self.index + 2].tolist()
        self.index += 1
        clean = self.denoised(output, x, sigma)
        return SimpleNamespace(prev_sample=clean + (x - clean) * following / sigma)


class VarianceScheduler(Scheduler):
    """The same with a state z = x / √(1 + sigma²), which is not scaled for the model."""

    init_noise_sigma = 1.0

    def scale_model_input(self, z, t):
        return z

    def step(self, output, t, z):
        sigma, following = self.sigmas[self.index : self.index + 2].tolist()
        x = super().step(output, t, z * math.sqrt(1 + sigma**2)).prev_sample
        return SimpleNamespace(prev_sample=x / math.sqrt(1 + following**2))


class EdmScheduler(Scheduler):
    """The same with the network of EDM, whose output it preconditions."""

    def __init__(self, prediction_type="epsilon"):
        super().__init__(prediction_type)
        del self.alphas_cumprod

    def precondition_outputs(self, x, output, sigma):
        variance = sigma**2 + 0.25
        sign = -1 if self.config.prediction_type == "v_prediction" else 1
        return x * 0.25 / variance + sign * output * sigma * 0.5 / math.sqrt(variance)

    def scale_model_input(self, x, t):
        return x / math.sqrt(self.sigmas[self.index].item() ** 2 + 0.25)

    def denoised(self, output, x, sigma):
        return self.precondition_outputs(x, output, sigma)


class HeunScheduler(Scheduler):
    """Keeps the level of each of its two evaluations."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(num_inference_steps, device)
        self.sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]])
        self.timesteps = torch.arange(2 * num_inference_steps - 1)
        self.kept = None

    def step(self, output, t, x):
        sigma, following = self.sigmas[self.index : self.index + 2].tolist()
        self.index += 1
        slope = (x - self.denoised(output, x, sigma)) / sigma
        if self.kept is None:
            self.kept = (x, slope, following - sigma) if following else None
            return SimpleNamespace(prev_sample=x + slope * (following - sigma))
        (start, first, step), self.kept = self.kept, None
        return SimpleNamespace(prev_sample=start + (first + slope) / 2 * step)


class TableScheduler(VarianceScheduler):
    """DDIM over a table of alphas, by timestep; it has no sigmas."""

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.arange(49, 0, -49 // num_inference_steps, device=device)[:num_inference_steps]

    def step(self, output, t, z, generator=None):
        self.generator = generator
        later = self.timesteps[self.timesteps < t]
        alpha = self.alphas_cumprod[t].sqrt()
        clean = (z - (1 - alpha**2).sqrt() * output) / alpha
        following = self.alphas_cumprod[later[0]] if len(later) else torch.tensor(1.0)
        return SimpleNamespace(prev_sample=following.sqrt() * clean + (1 - following).sqrt() * output)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scheduler", [Scheduler, VarianceScheduler, EdmScheduler])
def test_every_kind_is_euler(scheduler, prediction):
    """Their sigmas are float32: eps = 2^-24 in each."""
    got = sample(denoiser, scheduler(prediction), NOISE, sigmas=SIGMAS)
    want = samplers.euler(denoiser, NOISE * 20, SIGMAS)
    assert got.dtype == torch.float64
    assert (got - want).abs().max() <= 5e-7 * want.abs().max()


def test_heun():
    got = sample(denoiser, HeunScheduler(), NOISE, sigmas=torch.tensor(SIGMAS))
    want = samplers.heun(denoiser, NOISE * 20, SIGMAS)
    assert (got - want).abs().max() <= 5e-7 * want.abs().max()


def test_own_levels_of_a_scheduler():
    got = sample(denoiser, Scheduler(), NOISE, 5)
    want = samplers.euler(denoiser, NOISE * 9, torch.linspace(9, 0, 6))
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_levels_from_a_table_of_alphas():
    scheduler, generator = TableScheduler(), torch.Generator()
    got = sample(denoiser, scheduler, NOISE, 7, generator=generator)
    assert scheduler.generator is generator
    shares = scheduler.alphas_cumprod[scheduler.timesteps]
    sigmas = [*((1 - shares) / shares).sqrt().tolist(), 0.0]
    want = samplers.euler(denoiser, NOISE * sigmas[0], sigmas)
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()


def test_conditions_guidance_and_callback():
    batches, seen = [], []

    def classes(x, sigma, class_cond):
        batches.append(len(x))
        return denoiser(x, sigma) * (1 + class_cond).view(-1, 1, 1, 1)

    guided = Guided(classes, 2.0, num_classes=3, interval=(0.3, 5.0))
    extra = {"class_cond": torch.tensor([0, 1])}
    got = sample(guided, Scheduler(), NOISE, sigmas=SIGMAS, extra=extra, callback=seen.append)
    want = samplers.euler(guided, NOISE * 20, SIGMAS, extra=extra)
    assert (got - want).abs().max() <= 5e-7 * want.abs().max()
    assert batches == [2, 2, 4, 4, 2] * 2
    assert [info["i"] for info in seen] == list(range(5))
    assert [info["sigma"] for info in seen] == pytest.approx(SIGMAS[:-1], rel=1e-7)


def test_a_name_is_looked_up_in_diffusers(monkeypatch):
    """With a module of that name: its class is made, with its options; other names are refused."""
    module = types.ModuleType("diffusers")
    module.Scheduler, module.__version__ = Scheduler, "0"
    monkeypatch.setitem(sys.modules, "diffusers", module)
    assert open_scheduler("Scheduler", prediction_type="sample").config.prediction_type == "sample"
    assert sample(denoiser, "Scheduler", NOISE, 2).shape == NOISE.shape
    with pytest.raises(ValueError, match=r"scheduler .*'PlmsScheduler'"):
        open_scheduler("PlmsScheduler")
    with pytest.raises(ValueError, match=r"scheduler .*'__version__'"):
        open_scheduler("__version__")


def test_without_diffusers_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not there, also where it is
    with pytest.raises(ModuleNotFoundError, match=r"EulerDiscreteScheduler.*pip install 'hdit\[diffusers\]'"):
        sample(denoiser, "EulerDiscreteScheduler", NOISE, 5)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "words"),
    [
        (Scheduler(), {}, "steps or sigmas"),
        (Scheduler(), {"steps": 3, "sigmas": SIGMAS}, "steps or sigmas"),
        (Scheduler("flow_prediction"), {"steps": 3}, "Scheduler with prediction_type 'flow_prediction'"),
        (SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon")), {"steps": 3}, "SimpleNamespace with"),
        (SimpleNamespace(config=SimpleNamespace()), {"steps": 3}, "prediction_type None"),
        (Scheduler(), {"sigmas": SIGMAS[::-1]}, r"sigmas .*decrease"),
        (TableScheduler(), {"sigmas": SIGMAS}, "sigmas .*TableScheduler.*none"),
    ],
)
def test_bad_arguments_are_named(scheduler, arguments, words):
    with pytest.raises(ValueError, match=words):
        sample(denoiser, scheduler, NOISE, **arguments)

"""One step of training: what it computes, and that what is random in it is a function of the seed, step and place."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hdit import configs, train, train_step
from hdit.configs import Configuration, Training
from hdit.diffusion import schedules
from hdit.models import Global, HDiTConfig, Level, Neighborhood
from hdit.models import hdit as hdit_model
from hdit.train_step import Trainer

CONFIG = HDiTConfig(
    levels=(Level(1, 16, attention=Neighborhood(8, 3)), Level(1, 32, attention=Global(16))),
    patch_size=2,
    mapping_width=16,
    mapping_depth=1,
    num_classes=9,
)
RECIPE = Training(
    steps=12, batch_size=8, dtype="float32", lr=3e-3, lr_warmup=3, augment_prob=0.5, class_dropout=0.25, ema_power=0.75
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the precision of the first run of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda: AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def make(config: HDiTConfig = CONFIG, **changes) -> Trainer:
    """A trainer on 16 x 24 pixels; changes of the recipe go there."""
    names = {field.name for field in dataclasses.fields(Training)}
    recipe = dataclasses.replace(RECIPE, **{name: changes.pop(name) for name in names & changes.keys()})
    options = train.Train(config="small", data="builtin", recipe=recipe, flip=True, cpu=True)
    return Trainer(dataclasses.replace(options, **changes), Configuration(config, (16, 24), None, ""))


def spied(trainer: Trainer) -> list:
    """What the objective of ``trainer`` will be given: images, noise, sigma and conditions of each micro-batch."""
    seen, loss = [], trainer.objective.loss

    def spy(images, noise, sigma, **cond):
        seen.append({"images": images, "noise": noise, "sigma": sigma, **cond, "seed": torch.initial_seed()})
        return loss(images, noise, sigma, **cond)

    trainer.objective.loss = spy
    return seen


@pytest.mark.parametrize("clip", [1e-3, None])
def test_steps_are_those_of_adamw_in_float64(clip):
    """Loss, clipping, warm-up, AdamW and the average, from their formulas, on the batches that the trainer drew."""
    lr, betas, eps, decay = 2e-2, (0.8, 0.97), 1e-3, 0.3  # a large eps: no division by what is mostly rounding
    trainer = make(
        lr=lr, betas=betas, eps=eps, weight_decay=decay, grad_clip=clip, ema_decay=0.6, accumulation=2, class_dropout=0
    )
    twin = copy.deepcopy(trainer.network).double()
    groups = twin.param_groups(lr=lr, weight_decay=decay)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == 4
    parameters = [p for group in groups for p in group["params"]]
    first, second = ({p: torch.zeros_like(p) for p in parameters} for _ in range(2))
    average = {p: p.detach().clone() for p in parameters}
    objective = train_step.losses.objective(trainer.spec, twin)
    seen = spied(trainer)
    for step in range(5):
        loss, norm, rate = trainer.take_step()
        expected = torch.cat(
            [
                objective.loss(
                    part["images"].double(),
                    part["noise"].double(),
                    part["sigma"].double(),
                    class_cond=part["class_cond"],
                    aug_cond=part["aug_cond"].double(),
                )
                for part in seen[-2:]
            ]
        ).mean()
        gradients = torch.autograd.grad(expected, parameters)
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        factor = 1.0 if clip is None else min(1.0, clip / length.item())
        assert clip is None or factor < 0.9
        assert rate == min(1, (step + 1) / 3)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(norm.double(), length, rtol=1e-4, atol=0)
        scheduled = {p: group for group in groups for p in group["params"]}
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                first[p] = betas[0] * first[p] + (1 - betas[0]) * factor * g
                second[p] = betas[1] * second[p] + (1 - betas[1]) * (factor * g) ** 2
                mean, square = first[p] / (1 - betas[0] ** (step + 1)), second[p] / (1 - betas[1] ** (step + 1))
                now = scheduled[p]["lr"] * rate
                p.mul_(1 - now * scheduled[p]["weight_decay"]).sub_(now * mean / (square.sqrt() + eps))
                keep = min(0.6, 1 - (1 + step) ** -0.75)
                average[p] = keep * average[p] + (1 - keep) * p
    assert trainer.step == 5
    for (name, p), q in zip(trainer.network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trainer.ema.average[name].double(), average[q], rtol=1e-4, atol=1e-6)


def test_average_of_the_weights():
    trainer = make(steps=1)
    weights = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    for _ in range(2):
        trainer.take_step()
    assert any(not torch.equal(p, trainer.ema.average[name]) for name, p in trainer.network.named_parameters())
    weights = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    with trainer.ema.applied():
        assert all(torch.equal(p, trainer.ema.average[name]) for name, p in trainer.network.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in trainer.network.named_parameters())
    trainer.ema.power = None
    assert trainer.ema.decay_at(0) == RECIPE.ema_decay


def test_bfloat16_is_that_of_autocast(fresh_accelerator):
    """Products are rounded, and nothing else: parameters, average and moments are float32, and so is the loss."""
    trainer = make()
    expected = torch.stack([trainer.take_step()[0] for _ in range(4)])
    fresh_accelerator()
    trainer = make(dtype="bfloat16")
    rounded = torch.stack([trainer.take_step()[0] for _ in range(4)])
    assert rounded.dtype == torch.float32
    # each product rounds its inputs to 8 bits; a loss averages 8 images of 1152 values each
    difference = ((rounded - expected) / expected).abs()
    assert 2**-16 < difference.max() < 2**-5
    moments = [moment for state in trainer.optimizer.state.values() for moment in state.values()]
    assert {t.dtype for t in (*trainer.network.parameters(), *trainer.ema.average.values(), *moments)} == {
        torch.float32
    }


@contextlib.contextmanager
def _noted(calls: list):
    calls.append(1)
    yield


def processes(monkeypatch, rank: int, count: int) -> list:
    """The trainers that are made next belong to process ``rank`` of ``count``; returns a note per postponed sum."""
    postponed = []
    fake = SimpleNamespace(
        process_index=rank,
        num_processes=count,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        prepare_model=lambda network, evaluation_mode: network,
        no_sync=lambda model: _noted(postponed),
    )
    monkeypatch.setattr(train_step, "_accelerator", lambda options, dtype: fake)
    return postponed


def drawn(monkeypatch, count: int, accumulation: int, **changes) -> tuple[dict, list]:
    """All that is drawn in three steps, put together from ``count`` processes; and the seeds of dropout."""
    parts, seeds = {}, []
    for rank in range(count):
        postponed = processes(monkeypatch, rank, count)
        trainer = make(accumulation=accumulation, **changes)
        seen = spied(trainer)
        for _ in range(3):
            trainer.take_step()
        assert len(postponed) == 3 * (accumulation - 1)
        seeds += [part.pop("seed") for part in seen]
        for name in seen[0]:
            values = torch.cat([part[name] for part in seen]).unflatten(0, (3, -1))  # step, place of this process
            parts.setdefault(name, []).append(values)
    return {name: torch.stack(values, 2).flatten(1, 2) for name, values in parts.items()}, seeds


def test_processes_and_micro_batches_share_the_draws_of_one(monkeypatch):
    expected, seeds = drawn(monkeypatch, 1, 1)
    assert len(set(seeds)) == 3
    for count, accumulation in ((2, 1), (1, 2), (2, 2)):
        found, seeds = drawn(monkeypatch, count, accumulation)
        assert len(set(seeds)) == 3 * count * accumulation  # dropout is drawn anew in each
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (name, count, accumulation)
    again, _ = drawn(monkeypatch, 1, 1)
    other, _ = drawn(monkeypatch, 1, 1, seed=1)
    for name in expected:
        assert torch.equal(again[name], expected[name])
        assert not torch.equal(other[name], expected[name])


def test_what_is_random_in_a_step():
    """The classes that are withheld, the noise and its levels: their shares, and that no two steps or images agree."""
    trainer = make(batch_size=64, noise_offset=0.5)
    seen, given = [], []

    def spy(images, noise, sigma, class_cond, aug_cond):
        seen.append((noise, sigma, class_cond, aug_cond))
        return images.new_zeros(len(images))

    trainer.objective.loss = spy
    batches = trainer.batches

    def some_without_class():
        for batch in batches:
            batch.classes[:8] = -1
            given.append(batch.classes)
            yield batch

    trainer.batches = some_without_class()
    for _ in range(8):
        trainer.loss()
        trainer.step += 1
    noise, sigma, classes, augmentation = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(noise.flatten(1)[:, 0].unique()) == 512
    # offset: a constant per image and channel, of standard deviation 0.5
    means = noise.mean((2, 3)).flatten()
    variance = 0.25 + 1 / (16 * 24)
    assert means.mean().abs() < 5 * (variance / means.numel()) ** 0.5
    assert (means.var() / variance - 1).abs() < 5 * (2 / means.numel()) ** 0.5
    assert (noise.var((2, 3)).mean() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    assert 0 < (augmentation[:, 0] != 0).double().mean() < 1
    given, dropped = torch.cat(given), classes == 9
    assert dropped[given < 0].all()
    assert torch.equal(classes[~dropped], given[~dropped])
    assert abs(dropped[given >= 0].double().mean() - 0.25) < 5 * (0.25 * 0.75 / 448) ** 0.5
    assert len({tuple(part.tolist()) for part in dropped.unflatten(0, (8, 64))}) == 8
    # each step has one level in each of 64 strata of u, and u falls as sigma grows
    bounds = schedules.density(
        "cosine-interpolated",
        image_d=24,
        noise_d_low=RECIPE.noise_d_low,
        noise_d_high=RECIPE.noise_d_high,
        sigma_data=RECIPE.sigma_data,
        sigma_min=RECIPE.sigma_min,
        sigma_max=RECIPE.sigma_max,
    )(torch.arange(65, dtype=torch.float64) / 64)
    assert len(sigma.unique()) == 512
    for part in sigma.double().unflatten(0, (8, 64)):
        assert ((part <= bounds[:-1] * (1 + 1e-6)) & (part >= bounds[1:] * (1 - 1e-6))).all()


def test_options_reach_what_they_are_for(monkeypatch):
    trainer = make(crop="random", flip=False, class_labels=False, augment_prob=0.0, seed=3)
    assert (trainer.images.crop, trainer.images.flip) == ("random", False)
    assert trainer.network.config.num_classes == 0
    seen = spied(trainer)
    trainer.take_step()
    assert seen[0].keys() == {"images", "noise", "sigma", "seed"}
    weights = {seed: make(seed=seed).network.state_dict() for seed in (0, 1)}
    torch.randn(5)  # what came before does not matter
    again = make(seed=0).network.state_dict()
    assert all(torch.equal(weights[0][name], again[name]) for name in again)
    assert not torch.equal(weights[0]["patch_in.proj.weight"], weights[1]["patch_in.proj.weight"])
    calls, checkpoint = [], hdit_model.checkpoint
    monkeypatch.setattr(hdit_model, "checkpoint", lambda *a, **k: calls.append(a[0]) or checkpoint(*a, **k))
    make(activation_checkpointing=True).take_step()
    assert len(calls) == 3  # layers: down, middle, up


def test_a_step_trains_with_dropout_whatever_came_before():
    """A grid of samples leaves the network in evaluation mode; the next step must not."""
    trainer, modes = make(), []
    trainer.network.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    trainer.network.eval()
    trainer.take_step()
    assert modes == [True]


def test_every_recipe_makes_an_objective_and_noise_levels():
    for name in configs.names():
        published = configs.get(name)
        recipe = published.training or Training()
        sigma = train_step.noise_levels(recipe, *published.resolution)(
            torch.linspace(0, 0.999, 100, dtype=torch.float64)
        )
        assert (sigma.diff() < 0).all()
        low, high = recipe.sigma_min, recipe.sigma_max
        if recipe.sigma_density == "simple-diffusion":  # whose ends shift with the size of the images
            high *= published.resolution[0] / recipe.noise_d_low
        assert low * 0.99 < sigma.min() < sigma.max() < high * 1.01
        assert train_step.objective_spec(recipe)["type"] == recipe.objective


def test_objective_of_a_recipe():
    ends = {"sigma_min": 0.02, "sigma_max": 80.0}
    edm = Training(loss_weighting="min-snr", min_snr_gamma=4.0, sigma_data=0.7, loss="multiscale", **ends)
    assert train_step.objective_spec(edm) == {
        "type": "edm",
        "sigma_data": 0.7,
        "weighting": "min-snr",
        "loss": "multiscale",
        "min_snr_gamma": 4.0,
        **ends,
    }
    other = Training(objective="simple-diffusion", parametrization="x0", loss="v", **ends)
    assert train_step.objective_spec(other) == {
        "type": "simple-diffusion",
        "parametrization": "x0",
        "loss": "v",
        **ends,
    }


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.stress)])
def test_compiled_steps_are_those_of_eager_ones(backend, monkeypatch):
    """Also that nothing is compiled again from step to step, while the rate, the step and the noise levels change."""
    expected = make()
    expected = torch.stack([expected.take_step()[0] for _ in range(4)])
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compile_module(network, backend=backend))
    torch._dynamo.reset()
    trainer, compiled, losses = make(compile=True), [], []
    for _ in range(4):
        losses.append(trainer.take_step()[0])
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert compiled[0] > 0 and len(set(compiled)) == 1
    # AdamW's first steps follow the signs of gradients, some of which are rounding
    torch.testing.assert_close(torch.stack(losses), expected, rtol=2e-4, atol=0)

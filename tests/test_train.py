"""Training runs: what is random is a function of the seed, and a killed run goes on as if nothing had happened."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hdit import checkpoints, configs, files, train, train_log, train_step
from hdit.__main__ import parse
from hdit.configs import Training
from hdit.models import Global, HDiTConfig, Level, Neighborhood
from hdit.models.pretrained import load
from hdit.train_step import Trainer

ATTENTION = {"type": "neighborhood", "d_head": 8, "kernel_size": 3}
CONFIG = HDiTConfig(
    levels=(Level(1, 16, attention=Neighborhood(8, 3), dropout=0.1), Level(1, 32, attention=Global(16))),
    patch_size=2,
    mapping_width=16,
    mapping_depth=1,
    num_classes=9,
)
RECIPE = Training(
    steps=12, batch_size=4, dtype="float32", lr=3e-3, lr_warmup=3, augment_prob=0.5, class_dropout=0.5, ema_power=0.75
)


@pytest.fixture
def options(tmp_path):
    """options(**changes): those of a run in tmp_path/run; changes of the recipe go there."""
    model = tmp_path / "model.json"

    def make(config: HDiTConfig = CONFIG, **changes) -> train.Train:
        model.write_text(json.dumps({"model": "HDiT", "config": config.to_dict()}))
        names = {field.name for field in dataclasses.fields(Training)}
        recipe = dataclasses.replace(RECIPE, **{name: changes.pop(name) for name in names & changes.keys()})
        given = {"data": "builtin", "output": tmp_path / "run", "height": 16, "width": 16, "demo_every": 0}
        given |= {"checkpoint_every": 5, "log_every": 3, "demo_count": 2, "demo_steps": 2, "flip": True, "cpu": True}
        return train.Train(config="oxford_flowers_256", model=model, recipe=recipe, **given | changes)

    return make


def losses(folder: Path) -> list[float]:
    entries = train_log.read(folder / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(len(entries)))
    return [entry["loss"] for entry in entries]


def command(options: train.Train, processes: int = 1, **changes) -> list[str]:
    """The command line of these options."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    line = [*start, "hdit", "train", options.config]
    published = configs.get(options.config).training
    for owner, base in ((options, train.Train(config="")), (options.recipe, published)):
        for field in dataclasses.fields(owner):
            value = changes.get(field.name, getattr(owner, field.name))
            if field.name not in ("config", "recipe") and value != getattr(base, field.name):
                name = field.name.replace("_", "-")
                line += (
                    [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
                )
    return line


def run(line: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


def test_resumed_run_has_the_losses_of_an_undisturbed_one(options, tmp_path):
    assert train.Run(options(output=tmp_path / "whole")).train() == 0
    expected = losses(tmp_path / "whole")
    assert len(set(expected)) == 12
    for steps in (5, 6, 11, 12):  # after a checkpoint, between two, and at the end of a shorter run
        assert train.Run(options(steps=steps)).train() == 0
        assert losses(tmp_path / "run") == expected[:steps]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_micro_batches_and_loading_processes_change_nothing(options, tmp_path):
    config = dataclasses.replace(CONFIG, levels=tuple(dataclasses.replace(x, dropout=0.0) for x in CONFIG.levels))
    assert train.Run(options(config, output=tmp_path / "whole")).train() == 0
    assert train.Run(options(config, accumulation=2, workers=1, activation_checkpointing=True)).train() == 0
    expected, split = (torch.tensor(losses(tmp_path / name)) for name in ("whole", "run"))
    # Sums in another order; the first steps of AdamW follow the sign of the gradient, which amplifies rounding.
    assert (split - expected).abs().max() < 2e-5 * expected.max()
    assert not torch.equal(split, expected) or torch.equal(split[:1], expected[:1])


@pytest.mark.parametrize("sharding", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(options, tmp_path, sharding):
    config = dataclasses.replace(CONFIG, levels=tuple(dataclasses.replace(x, dropout=0.0) for x in CONFIG.levels))
    one = options(config, steps=6, checkpoint_every=4)
    assert train.Run(dataclasses.replace(one, output=tmp_path / "one")).train() == 0
    # The second half of the run starts from the file that both processes wrote.
    first = run([*command(one, processes=2, steps=4), *sharding])
    assert first.returncode == 0, first.stderr
    second = run([*command(one, processes=2), *sharding])
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stderr
    expected, shared = (torch.tensor(losses(tmp_path / name)) for name in ("one", "run"))
    assert len(shared) == 6
    assert (shared - expected).abs().max() < 1e-5 * expected.max()
    whole, parts = (load(tmp_path / name / "model.safetensors").model.state_dict() for name in ("one", "run"))
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-4


def kill_at_random_moments(options, tmp_path, kills: int, rng: random.Random):
    """SIGKILL training that many times, then let it finish; every file under a final name is whole each time."""
    folder, line = tmp_path / "run", command(options)
    killed = 0
    while killed < kills:
        before = (checkpoints.steps(folder) or [0])[-1] if folder.is_dir() else 0
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        # From the first step on, at any moment: while computing, while writing metrics, a checkpoint, a picture.
        metrics = folder / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and len(train_log.read(metrics)) > before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
        if process.returncode == 0:
            break  # it was done before it could be killed
        for step in checkpoints.steps(folder):
            checkpoints.load(folder / f"checkpoint-{step:08}.safetensors")
        if (folder / "model.safetensors").exists():
            load(folder / "model.safetensors")
    finished = run(line)
    assert finished.returncode == 0, finished.stderr
    assert not list(folder.glob(".*.tmp"))
    return killed


def test_killed_runs_go_on_with_the_same_losses(options, tmp_path):
    whole = options(steps=60, log_every=1, checkpoint_every=2)
    assert run(command(dataclasses.replace(whole, output=tmp_path / "whole"))).returncode == 0
    assert kill_at_random_moments(whole, tmp_path, 2, random.Random()) >= 1
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.stress
def test_twenty_kills(options, tmp_path):
    whole = options(steps=400, log_every=1, checkpoint_every=2, demo_every=7)
    assert run(command(dataclasses.replace(whole, output=tmp_path / "whole"))).returncode == 0
    assert kill_at_random_moments(whole, tmp_path, 20, random.Random(0)) == 20
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_sigterm_saves(options, tmp_path):
    process = subprocess.Popen(command(options(steps=10**6, checkpoint_every=10**6)), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    (step,) = checkpoints.steps(tmp_path / "run")
    assert f"stopped by SIGTERM after {step} steps" in said
    assert len(losses(tmp_path / "run")) == step
    assert train.Run(options(steps=step + 2)).train() == 0
    assert len(losses(tmp_path / "run")) == step + 2


def test_resuming_refuses_other_settings(options):
    train.Run(options(steps=2)).train()
    with pytest.raises(ValueError, match=r"lr is 0\.5, and the run in .* has 0\.003"):
        train.Run(options(lr=0.5)).train()
    with pytest.raises(ValueError, match=r"seed is 1, and the run"):
        train.Run(options(seed=1)).train()
    other = dataclasses.replace(CONFIG, mapping_depth=2)
    with pytest.raises(ValueError, match=r"config is .*'mapping_depth': 2"):
        train.Run(options(other)).train()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": None}, "data must be given"),
        ({"steps": None}, "steps must be given"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"accumulation": 3}, "batch_size 4 must divide by 1 processes x 3 micro-batches"),
        ({"class_dropout": 1.5}, r"class_dropout must be in \[0, 1\], got 1.5"),
        ({"height": 18}, "18"),
        ({"data": "nowhere"}, "nowhere"),
        ({"keep": 0}, "keep must be 1 or more"),
        ({"loss_weighting": "hard"}, "weighting must be"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.Run(options(**changes)).train()
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_not_the_checkpoint(options, tmp_path):
    train.Run(options(steps=5)).train()
    run = train.Run(options(checkpoint_every=6))
    trainer, take = run.trainer, run.trainer.take_step
    trainer.take_step = lambda: (take()[0] * (float("nan") if trainer.step == 7 else 1), torch.tensor(1.0), 1.0)
    with pytest.raises(FloatingPointError, match="the loss of step 6 is not finite; the last checkpoint is of step 6"):
        run.train()
    state, _ = checkpoints.load(checkpoints.latest(tmp_path / "run"))
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_average_of_the_weights(options):
    run = Trainer(options(steps=1))
    parameters = [p.detach().double().clone() for p in run.network.parameters()]
    expected = [p.clone() for p in parameters]
    for step in range(6):
        run.take_step()
        decay = min(run.recipe.ema_decay, 1 - (1 + step) ** -0.75)
        expected = [
            decay * e + (1 - decay) * p.detach().double()
            for e, p in zip(expected, run.network.parameters(), strict=True)
        ]
    weights = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    for (name, average), value in zip(run.ema.average.items(), expected, strict=True):
        # six lerps, each rounded to float32
        assert (average.double() - value).abs().max() <= 6 * 2**-23 * value.abs().max().clamp(min=1), name
    with run.ema.applied():
        assert all(torch.equal(p, run.ema.average[name]) for name, p in run.network.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in run.network.named_parameters())


def test_what_is_random_in_a_step(options):
    """The classes that are withheld, the noise and its levels: their shares, and that no two steps or images agree."""
    run = Trainer(options(batch_size=64, class_dropout=0.25))
    seen = []

    def spy(images, noise, sigma, class_cond, aug_cond):
        seen.append((noise, sigma, class_cond, aug_cond))
        return images.new_zeros(len(images))

    run.objective.loss = spy
    for _ in range(8):
        run.loss()
        run.step += 1
    noise, sigma, classes, augmentation = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(noise.flatten(1)[:, 0].unique()) == 512
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert (noise.var() - 1).abs() < 5 * (2 / noise.numel()) ** 0.5
    dropped = (classes == 9).double().mean()
    assert abs(dropped - 0.25) < 5 * (0.25 * 0.75 / 512) ** 0.5
    assert 0 < (augmentation[:, 0] != 0).double().mean() < 1
    # each step has one level in each of 64 strata of u, and u falls as sigma grows
    for step in range(8):
        part = sigma[64 * step : 64 * step + 64].double()
        bounds = run.noise_levels(torch.arange(65, dtype=torch.float64) / 64)
        assert ((part <= bounds[:-1] * (1 + 1e-6)) & (part >= bounds[1:] * (1 - 1e-6))).all()


def test_log_forgets_what_is_after_a_checkpoint(tmp_path):
    log = train_log.Log(tmp_path)
    log.write([{"step": i, "loss": i / 7} for i in range(5)])
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.cut(3)
    assert train_log.read(log.path) == [{"step": i, "loss": i / 7} for i in range(3)]
    assert train_log.smoothed([1.0, 2.0, 6.0, 1.0], 2) == [1.0, 1.5, 4.0, 3.5]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), files.replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "before"
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with files.replacing(path) as temporary:
        temporary.touch(0o600)
        temporary.write_text("after")
    assert path.read_text() == "after"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (os.getpid(), int(dead.stdout)):
        (tmp_path / f".file.{pid}.tmp").write_text("left")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".file.{os.getpid()}.tmp", "file"]


def test_the_command_line_has_the_recipes_as_defaults():
    arguments = ["train", "flowers", "--data", "builtin", "--batch-size", "64", "--betas", "0.8", "0.9"]
    given = parse(arguments).configuration
    published = configs.get("oxford_flowers_256").training
    assert given == train.Train(
        config="oxford_flowers_256",
        data="builtin",
        recipe=dataclasses.replace(published, batch_size=64, betas=(0.8, 0.9)),
    )


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

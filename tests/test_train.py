"""Training runs: what is random is a function of the seed, and a killed run goes on as if nothing had happened."""

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file

from hdit import checkpoints, configs, train, train_log
from hdit.__main__ import parse
from hdit.configs import Training
from hdit.models import Global, HDiTConfig, Level, Neighborhood
from hdit.models.pretrained import load

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


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
        # Grids of samples, made with other weights and without dropout, change nothing.
        assert train.Run(options(steps=steps, demo_every=2)).train() == 0
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


@pytest.mark.parametrize("changes", [{}, {"fsdp": True, "demo_every": 2}], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(options, tmp_path, changes):
    config = dataclasses.replace(CONFIG, levels=tuple(dataclasses.replace(x, dropout=0.0) for x in CONFIG.levels))
    one = options(config, steps=6, checkpoint_every=4)
    assert train.Run(dataclasses.replace(one, output=tmp_path / "one")).train() == 0
    # The second half of the run starts from the file that both processes wrote.
    first = run(command(one, processes=2, steps=4, **changes))
    assert first.returncode == 0, first.stderr
    second = run(command(one, processes=2, **changes))
    assert second.returncode == 0, second.stderr
    assert "resumed" in second.stderr
    expected, shared = (torch.tensor(losses(tmp_path / name)) for name in ("one", "run"))
    assert len(shared) == 6
    assert (shared - expected).abs().max() < 1e-5 * expected.max()
    whole, parts = (load(tmp_path / name / "model.safetensors").model.state_dict() for name in ("one", "run"))
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-4


def test_sharded_bfloat16_is_as_exact_as_one_process(options, tmp_path):
    """Layers whose parameters travel in bfloat16 compute what autocast computes from float32 parameters."""
    config = dataclasses.replace(CONFIG, levels=tuple(dataclasses.replace(x, dropout=0.0) for x in CONFIG.levels))
    one = options(config, steps=4, dtype="bfloat16", demo_every=3, eps=1e-4)
    full = dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, dtype="float32"), output=tmp_path / "full")
    shared = run(command(one, processes=2, fsdp=True))
    assert shared.returncode == 0, shared.stderr
    assert train.Run(dataclasses.replace(one, output=tmp_path / "one")).train() == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.Run(full).train() == 0
    full, one, shared = (torch.tensor(losses(tmp_path / name)) for name in ("full", "one", "run"))
    # Rounding to bfloat16 moves the losses by `rounding`. What sharding adds to it is the rounding of the scales of
    # heads and norms, and sums of gradients in another order: less than what all weights and activations add.
    rounding = (one - full).abs().max()
    assert rounding > 1e-4 * full.max()
    assert (shared - one).abs().max() < rounding / 4
    state, _ = checkpoints.load(checkpoints.latest(tmp_path / "run"))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    weights = {name: tensor for name, tensor in state.items() if name.startswith("model.") and tensor.ndim == 2}
    assert all((tensor != tensor.bfloat16()).any() for name, tensor in weights.items() if "blocks" in name)


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
    with pytest.raises(ValueError, match=r"resolution is \[16, 24\], and the run"):
        train.Run(options(width=24)).train()
    with pytest.raises(ValueError, match=r"flip is False, and the run"):
        train.Run(options(flip=False)).train()
    free = {"steps", "hardware", "sampler", "sampler_steps"}
    recipe = {field.name for field in dataclasses.fields(Training)} - free
    assert train.Run(options())._settings().keys() == recipe | {"data", "crop", "flip", "seed"}
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
        ({"grad_clip": -1.0}, "grad_clip must be positive, or None for no limit, got -1.0"),
        ({"sampler": "ddim"}, "sampler must be one of .*heun.*, got 'ddim'"),
        ({"demo_steps": 0}, "demo_steps must be 1 or more, got 0"),
        ({"demo_guidance": 3.0, "config": dataclasses.replace(CONFIG, num_classes=0)}, "demo_guidance must be 1 .*3.0"),
        ({"tracker": "paper"}, r"^tracker is 'paper'; it must be one of .*tensorboard.*, and its package installed"),
        ({"tracker": "absent"}, r"^tracker is 'absent'; it must be one of .*installed \(here: (?!.*absent).*\)$"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options, tmp_path, changes, sentence):
    if changes.get("tracker") == "absent":
        changes = {"tracker": next(kind for kind in LOGGER_TYPE_TO_CLASS if not importlib.util.find_spec(kind))}
        sentence = sentence.replace("absent", changes["tracker"])
    with pytest.raises(ValueError, match=sentence):
        train.Run(options(**changes)).train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run_and_not_the_checkpoint(options, tmp_path, bad):
    train.Run(options(steps=5)).train()
    run = train.Run(options(checkpoint_every=7, log_every=10))
    trainer, take = run.trainer, run.trainer.take_step
    nan = {"loss": (float("nan"), 1.0, 1.0), "gradient": (1.0, float("inf"), 1.0)}[bad]

    def step():
        loss, norm, rate = take()
        return (loss * nan[0], norm * nan[1], rate) if trainer.step == 7 else (loss, norm, rate)

    trainer.take_step = step
    with pytest.raises(FloatingPointError, match=f"the {bad} of step 6 is not finite; .* is of step 5"):
        run.train()
    assert checkpoints.steps(tmp_path / "run") == [5]


def test_what_a_run_leaves(options, tmp_path, monkeypatch):
    """Metrics, grids of the averaged weights, the newest checkpoints, and a model that knows how it was made."""
    folder, grids = tmp_path / "run", []
    generate = train.sample.generate

    def spy(denoiser, count, resolution, **how):
        now = run.network.state_dict()
        assert not run.network.training
        assert all(torch.equal(now[name], average) for name, average in run.trainer.ema.average.items())
        grids.append((run.trainer.step, count, resolution, how))
        return generate(denoiser, count, resolution, **how)

    monkeypatch.setattr(train.sample, "generate", spy)
    images = tmp_path / "private" / "flowers"
    shutil.copytree(train.data.BUILTIN, images)
    for number, file in enumerate(sorted(images.glob("*.jpg"))):
        (images / str(number)).mkdir()
        file.rename(images / str(number) / file.name)
    changes = {"data": str(images), "width": 24, "demo_every": 4, "demo_guidance": 2.0, "demo_count": 11, "seed": 5}
    changes |= {"sampler": "euler", "checkpoint_every": 2, "keep": 3, "demo_steps": 3, "sigma_max": 50.0, "steps": 9}
    run = train.Run(options(**changes))
    steps, take = [], run.trainer.take_step
    run.trainer.take_step = lambda: steps.append(take()) or steps[-1]
    assert run.train() == 0
    assert checkpoints.steps(folder) == [6, 8, 9]
    entries = train_log.read(folder / "metrics.jsonl")
    assert [
        (entry["step"], entry["loss"], entry["grad_norm"], entry["rate"], entry["images"]) for entry in entries
    ] == [(i, loss.item(), norm.item(), rate, 4 * (i + 1)) for i, (loss, norm, rate) in enumerate(steps)]
    seconds = [entry["seconds"] for entry in entries]
    assert seconds[0] > 0 and seconds == sorted(seconds)
    assert [grid[0] for grid in grids] == [4, 8, 9]
    for _, count, resolution, how in grids:
        assert (count, tuple(resolution)) == (11, (16, 24))
        assert how["classes"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1]
        assert (how["guidance"], how["sampler"], how["steps"], how["seed"]) == (2.0, "euler", 3, 5)
        assert (how["sigma_min"], how["sigma_max"]) == (1e-3, 50.0)
    names = {path.name for path in (folder / "samples").iterdir()}
    assert names == {"real.png", "step-00000004.png", "step-00000008.png", "step-00000009.png"}
    model, about = load(folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], average) for name, average in run.trainer.ema.average.items())
    assert about["resolution"] == [16, 24] and about["objective"] == run.trainer.spec
    assert about["class_names"] == [str(i) for i in range(9)] and about["weights"] == "ema"
    assert about["sampler"] == {"name": "euler", "steps": 50}
    assert (about["settings"]["data"], about["images"], about["seconds"]) == ("flowers", 36, seconds[-1])
    # No file that leaves the machine says where the images lay on it.
    for path in folder.rglob("*"):
        assert path.is_dir() or b"private" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin", "builtin"),
        ("/home/me/flowers/", "flowers"),
        ("../data/train-{000..127}.tar", "train-{000..127}.tar"),
        ("hf:user/flowers:train", "hf:user/flowers:train"),
        ("hf:/home/me/flowers", "hf:flowers"),
    ],
)
def test_name_of_the_data(source, name):
    assert train.data_name(source) == name


def test_minutes_count_across_resumptions(options, tmp_path):
    assert train.Run(options(minutes=1e-9)).train() == 0
    assert len(losses(tmp_path / "run")) == 1 and (tmp_path / "run/model.safetensors").exists()
    assert train.Run(options(minutes=1e-9)).train() == 0
    assert len(losses(tmp_path / "run")) == 1
    state, header = checkpoints.load(checkpoints.latest(tmp_path / "run"))
    step = int(header.pop("step"))
    del header["format"]
    checkpoints.save(tmp_path / "run", step, state, header | {"seconds": 590.0}, 1)
    assert train.Run(options(minutes=10.0, steps=4)).train() == 0
    seconds = [entry["seconds"] for entry in train_log.read(tmp_path / "run/metrics.jsonl")]
    assert len(seconds) == 4 and all(590 < value < 600 for value in seconds[1:])


def test_a_checkpoint_is_gathered_once_for_a_step(options, monkeypatch):
    gathered, tensors = [], checkpoints.tensors
    monkeypatch.setattr(checkpoints, "tensors", lambda *state: gathered.append(1) or tensors(*state))
    run = train.Run(options(steps=5))
    run.train()
    assert len(gathered) == 1
    run.checkpoint()
    train.Run(options(steps=5)).train()
    assert len(gathered) == 1


def test_a_new_run_forgets_the_metrics_of_one_without_checkpoint(options, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0, "loss": 5.0}\n{"step": 1, "lo')
    left = tmp_path / f"run/.checkpoint.{2**22 + 1}.tmp"  # no process has such a number
    left.touch()
    train.Run(options(steps=2)).train()
    assert len(losses(tmp_path / "run")) == 2 and 5.0 not in losses(tmp_path / "run")
    assert not left.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_one_ends_at_once(options, tmp_path, capsys, number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(1))
    try:
        run = train.Run(options(checkpoint_every=100))
        take = run.trainer.take_step
        run.trainer.take_step = lambda: (take(), os.kill(os.getpid(), number) if run.trainer.step == 4 else None)[0]
        assert run.train() == 128 + number
        assert checkpoints.steps(tmp_path / "run") == [4] and len(losses(tmp_path / "run")) == 4
        assert not (tmp_path / "run/model.safetensors").exists()
        assert f"stopped by {signal.Signals(number).name} after 4 steps" in capsys.readouterr().err
        assert not seen
        with train._signals(run):
            run.stopped_by = None
            os.kill(os.getpid(), number)
            assert run.stopped_by == number and not seen
            os.kill(os.getpid(), number)
            assert len(seen) == 1
        with train._signals(run):
            pass
        os.kill(os.getpid(), number)
        assert len(seen) == 2
    finally:
        signal.signal(number, before)


class Notes(GeneralTracker):
    """A tracker of accelerate's that keeps what it is given."""

    name = "notes"
    requires_logging_directory = True
    tracker = None
    kept: ClassVar[list] = []

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.kept.append(("begin", run_name, Path(logging_dir)))

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **_):
        self.kept.append({"step": step, **values})

    def finish(self):
        self.kept.append(("end",))


def test_a_tracker_is_told_what_the_log_is(options, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(Notes, "kept", [])
    assert train.Run(options(steps=5, tracker="notes")).train() == 0
    begin, *entries, end = Notes.kept
    assert begin == ("begin", "hdit", tmp_path / "run") and end == ("end",)
    assert entries == train_log.read(tmp_path / "run/metrics.jsonl") and len(entries) == 5
    Notes.kept.clear()
    assert train.Run(options(steps=7, tracker="notes")).train() == 0
    assert [entry["step"] for entry in Notes.kept[1:-1]] == [5, 6]
    Notes.kept.clear()
    run = train.Run(options(steps=9, tracker="notes"))
    run.trainer.loss = lambda micro: next(run.network.parameters()).sum() * float("nan")
    with pytest.raises(FloatingPointError):
        run.train()
    assert Notes.kept[-1] == ("end",)


def test_the_command_line_has_the_recipes_as_defaults():
    arguments = ["train", "flowers", "--data", "builtin", "--batch-size", "64", "--betas", "0.8", "0.9"]
    given = parse(arguments).configuration
    published = configs.get("oxford_flowers_256").training
    assert given == train.Train(
        config="oxford_flowers_256",
        data="builtin",
        recipe=dataclasses.replace(published, batch_size=64, betas=(0.8, 0.9)),
    )

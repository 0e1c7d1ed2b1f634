"""hdit export: what comes out is the model of the checkpoint, of hdit train or of k-diffusion."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import tyro
from test_models import PLAIN, build, call

import hdit
from hdit import export, k_diffusion
from hdit.models import HDiTConfig, Level, Neighborhood, pretrained

DATA = Path(__file__).parent / "data"
OBJECTIVE = {"type": "edm", "sigma_data": 0.5, "weighting": "soft-min-snr", "sigma_min": 1e-3, "sigma_max": 1e3}


def run(arguments):
    return tyro.cli(export.Export, args=shlex.split(arguments)).run()


@pytest.fixture
def training(tmp_path):
    """A checkpoint of hdit train, with the last and the averaged model."""
    last, averaged = build(PLAIN, torch.float32, seed=1), build(PLAIN, torch.float32, seed=2)
    tensors = {
        **{f"model.{name}": t for name, t in last.state_dict().items()},
        **{f"ema.{name}": t for name, t in averaged.state_dict().items()},
        **{f"optimizer.{name}.exp_avg": torch.randn_like(p) for name, p in last.named_parameters()},
    }
    values = {"config": PLAIN.to_dict(), "objective": OBJECTIVE, "resolution": [32, 64], "batches": {"epoch": 3}}
    header = {"format": "hdit-training", "model": "HDiT", "step": "70"}
    path = tmp_path / "checkpoint-00000070.safetensors"
    pretrained.write(path, tensors, header | {name: json.dumps(value) for name, value in values.items()})
    return path, last, averaged


def assert_same(model, expected, dtype=torch.float32):
    state = expected.state_dict()
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name].to(t.dtype)), name
    assert {p.dtype for p in model.parameters()} == {dtype} and list(model.state_dict()) == list(state)


def test_training_checkpoint(training, tmp_path, capsys):
    path, last, averaged = training
    output = tmp_path / "model.safetensors"
    run(f"{path} --output {output} --card 'Two lines\nof text'")
    model, metadata = pretrained.load(output)
    assert_same(model, averaged)
    assert metadata == {
        "objective": OBJECTIVE,
        "resolution": [32, 64],
        "step": 70,
        "weights": "ema",
        "card": "Two lines\nof text",
    }
    printed = capsys.readouterr().out
    count, size = sum(p.numel() for p in last.parameters()), output.stat().st_size / 1e6
    assert f"HDiT, {count:,} parameters in float32, {size:.2f} MB" in printed and pretrained.sha256(output) in printed

    run(f"{path} --output {output} --no-ema --dtype bfloat16")
    assert_same(hdit.HDiT.from_pretrained(output), last, torch.bfloat16)
    assert pretrained.load(output).metadata["weights"] == "model"

    export.from_training(path, output, card="another")
    assert_same(hdit.HDiT.from_pretrained(output), averaged)
    assert pretrained.load(output).metadata["card"] == "another"


def test_model_file_changes_its_dtype_and_keeps_the_rest(training, tmp_path):
    path, _, averaged = training
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(f"{path} --output {first} --card text")
    run(f"{first} --output {second} --dtype float16")
    model, metadata = pretrained.load(second)
    assert_same(model, averaged, torch.float16)
    assert metadata == pretrained.load(first).metadata and metadata["card"] == "text"


KEPT = {
    "model": {"sigma_data": 0.7, "sigma_min": 0.02, "sigma_max": 90.0, "loss_weighting": "snr", "input_size": [32, 48]},
}


def upstream(name="na"):
    """k-diffusion's configuration, its state dict, and ours with that loaded."""
    config = json.loads((DATA / f"{name}_config.json").read_text())
    config["model"] |= KEPT["model"]
    state_dict = safetensors.torch.load_file(DATA / f"{name}_model.safetensors")
    model = k_diffusion.model_from_config(config)
    k_diffusion.load_state_dict(model, state_dict)
    return config, state_dict, model


@pytest.mark.parametrize("inside", [True, False], ids=["config inside", "config beside"])
@pytest.mark.parametrize("kind", ["pth", "slim", "wrapped"])
def test_checkpoints_of_k_diffusion(kind, inside, tmp_path):
    """Its training checkpoint; the half-precision file of its convert_for_inference; a whole denoiser's state dict."""
    config, state_dict, model = upstream()
    other = {name: torch.randn_like(t) for name, t in state_dict.items()}
    path = tmp_path / ("model.pth" if kind == "pth" else "model.safetensors")
    if kind == "pth":
        content = {"model": other, "model_ema": state_dict, "opt": {"state": {0: {"step": 1}}}, "epoch": 3, "step": 70}
        torch.save({**content, **({"config": config} if inside else {})}, path)
    else:
        prefix = "inner_model." if kind == "wrapped" else ""
        dtype = torch.float16 if kind == "slim" else torch.float32
        tensors = {prefix + name: t.to(dtype) for name, t in state_dict.items()}
        safetensors.torch.save_file(tensors, path, {"config": json.dumps(config)} if inside else None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out.safetensors"
    beside = "" if inside else f"--k-diffusion-config {tmp_path / 'config.json'}"
    run(f"{path} --output {output} {beside}")
    got, metadata = pretrained.load(output)
    if kind == "slim":
        for name, t in got.state_dict().items():
            assert torch.equal(t, state_dict[name].half().float()), name
    else:
        assert_same(got, model)
    objective = {"type": "edm", "sigma_data": 0.7, "weighting": "snr", "sigma_min": 0.02, "sigma_max": 90.0}
    assert metadata == {"objective": objective, "resolution": [32, 48]}
    if kind == "pth":
        run(f"{path} --output {output} {beside} --no-ema")
        state = hdit.HDiT.from_pretrained(output).state_dict()
        assert all(torch.equal(state[name], other[name]) for name in other)


USE_PROGRAM = """
import sys
import torch
x, sigma, classes, custom = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1])
network = program.module()
results = [network(x[:n], sigma[:n], class_cond=classes[:n], mapping_cond=custom[:n]) for n in (1, 3)]
torch.save(results, sys.argv[3])
assert not {"hdit", "hdit_kernels"} & sys.modules.keys()
"""
NETWORK = HDiTConfig(
    (Level(1, 32, 48, Neighborhood(16, 3)),), 8, num_classes=10, mapping_cond_dim=6, mapping_width=32, mapping_depth=1
)


def test_program_runs_without_this_package(tmp_path):
    """In a process that has PyTorch alone, for other batch sizes than it was made with."""
    model = build(NETWORK, torch.float32)
    model.save_pretrained(tmp_path / "model.safetensors", resolution=[32, 64])
    names = [tmp_path / name for name in ("net.pt2", "in.pt", "out.pt")]
    run(f"{tmp_path / 'model.safetensors'} --output {tmp_path / 'out.safetensors'} --program {names[0]}")
    x, sigma, cond = call(NETWORK, dtype=torch.float32, batch=3)
    torch.save((x, sigma, cond["class_cond"], cond["mapping_cond"]), names[1])
    subprocess.run([sys.executable, "-c", USE_PROGRAM, *map(str, names)], cwd=tmp_path, check=True)
    for n, got in zip((1, 3), torch.load(names[2]), strict=True):
        cut = {name: cond[name][:n] for name in ("class_cond", "mapping_cond")}
        torch.testing.assert_close(got, model(x[:n], sigma[:n], **cut), rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"needs a resolution, and checkpoint .* names none"):
        run(f"{tmp_path / 'model.safetensors'} --output {tmp_path / 'out.safetensors'} --program {names[0]}")


class Code:
    """Unpickling this would run something."""

    def __reduce__(self):
        return (print, ("run",))


def test_bad_checkpoints_get_one_sentence(training, tmp_path, capsys):
    path, last, _ = training
    config, state_dict, _ = upstream()
    output, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    tensors, header = safetensors.torch.load_file(path), pretrained.read_header(path)
    cases = [(f"{path} --output {path}", "is the checkpoint itself; it must be another file")]

    def case(sentence, name, content, options=""):
        (tmp_path / name).unlink(missing_ok=True)
        content(tmp_path / name)
        cases.append((f"{tmp_path / name} --output {output} {options}", sentence))

    without = {name: t for name, t in tensors.items() if not name.startswith("ema.")}
    case("has no tensors named ema.…", "a.safetensors", lambda p: pretrained.write(p, without, header))
    del tensors["ema.merges.0.proj.weight"]
    fault = "does not fit this model: missing: merges.0.proj.weight"
    case(fault, "b.safetensors", lambda p: pretrained.write(p, tensors, header))
    case("holds no configuration; that of its", "c.safetensors", lambda p: safetensors.torch.save_file(state_dict, p))
    case("cannot be read as a checkpoint of tensors", "d.pth", lambda p: p.write_bytes(b"no checkpoint"))
    case("cannot be read as a checkpoint of tensors", "e.pth", lambda p: p.write_bytes(b""))
    case("cannot be read as a checkpoint of tensors", "f.pth", lambda p: torch.save({"model": Code()}, p))
    case("has no 'model_ema'; a training checkpoint", "g.pth", lambda p: torch.save({"step": 3, "config": config}, p))
    v = {**config, "model": {**config["model"], "loss_config": "v"}}
    both = {"model_ema": state_dict, "config": v}
    case("model.loss_config is 'v'; it must be karras or simple", "h.pth", lambda p: torch.save(both, p))
    (tmp_path / "broken.json").write_text("{")
    broken = f"--k-diffusion-config {tmp_path / 'broken.json'}"
    case("broken.json cannot be read as JSON", "i.pth", lambda p: torch.save(both, p), broken)
    absent = f"--k-diffusion-config {tmp_path / 'absent.json'}"
    case("absent.json cannot be read as JSON", "j.pth", lambda p: torch.save(both, p), absent)
    cases.append((f"{tmp_path / 'absent.pth'} --output {output}", "is no file; it must be a checkpoint of k-diffusion"))
    cases.append((f"{tmp_path / 'absent.safetensors'} --output {output}", "is no file; it must be a safetensors file"))
    for arguments, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as error:
            run(arguments)
        assert "\n" not in str(error.value) and not output.exists(), arguments
    last.save_pretrained(other)
    with pytest.raises(ValueError, match="has format 'hdit' in its header; hdit train writes 'hdit-training'"):
        export.load_training(other)
    assert "run" not in capsys.readouterr().out.split()

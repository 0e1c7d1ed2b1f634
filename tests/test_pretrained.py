"""Models as files: what is read is what was written, and everything else is refused in one sentence."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from test_models import MIXED, PLAIN, SMALL_DIT, build, call

from hdit.models import DiT, HDiT, from_config, pretrained

METADATA = {
    "objective": {"type": "edm", "sigma_data": 0.5, "sigma_min": 1e-3, "sigma_max": 1e3},
    "resolution": [32, 64],
    "class_names": ["rose", "Gänseblümchen", 'with "quotes"\nand lines'],
    "card": None,
}


@pytest.fixture
def saved(tmp_path):
    model = build(PLAIN, torch.float32)
    path = tmp_path / "model.safetensors"
    model.save_pretrained(path, **METADATA)
    return model, path


@pytest.mark.parametrize("config", [MIXED, SMALL_DIT], ids=["hdit", "dit"])
def test_what_is_read_is_what_was_written(config, tmp_path):
    model, path = build(config, torch.float32), tmp_path / "model.safetensors"
    model.save_pretrained(str(path), **METADATA)
    cls = type(model)
    for read in (pretrained.load(path).model, cls.from_pretrained(path)):
        assert type(read) is cls and read.config == config and not read.training
        assert all(p.requires_grad for p in read.parameters())
        state, own = read.state_dict(), model.state_dict()
        assert list(state) == list(own) and all(torch.equal(state[name], own[name]) for name in own)
    x, sigma, cond = call(config, 32, 64, torch.float32)
    assert torch.equal(read(x, sigma, **cond), model.eval()(x, sigma, **cond))
    assert pretrained.load(path).metadata == METADATA
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_header_is_plain_json_that_others_can_read(saved):
    model, path = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["format"] == "hdit" and header["model"] == "HDiT"
    assert json.loads(header["config"]) == model.config.to_dict()
    assert json.loads(header["objective"]) == METADATA["objective"]


def test_a_model_whose_class_was_wrapped_keeps_its_name(saved):
    """As FSDP does it: the object becomes one of a class made for it."""
    model, path = saved
    model.__class__ = type("FSDPHDiT", (HDiT,), {})
    model.save_pretrained(path)
    assert type(pretrained.load(path).model) is HDiT


def test_from_config():
    assert type(from_config(PLAIN)) is HDiT and type(from_config(SMALL_DIT)) is DiT
    with pytest.raises(TypeError, match="config is dict; it must be one of DiTConfig, HDiTConfig, UViTConfig"):
        from_config({})


def test_dtypes(saved, tmp_path):
    """The given one, buffers that need float32 apart; that of the file where none is given."""
    model, path = saved
    half = HDiT.from_pretrained(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}
    torch.testing.assert_close(half.patch_in.proj.weight.float(), model.patch_in.proj.weight, rtol=2**-8, atol=0)
    half.save_pretrained(tmp_path / "half.safetensors")
    again = HDiT.from_pretrained(tmp_path / "half.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert os.path.getsize(tmp_path / "half.safetensors") < 0.7 * os.path.getsize(path)
    double = HDiT.from_pretrained(path, dtype=torch.float64)
    assert {t.dtype for t in double.state_dict().values()} == {torch.float64}


def test_device(saved):
    model = HDiT.from_pretrained(saved[1], device="meta")
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


def test_sha256(saved):
    """Of the file; and what is the same has the same."""
    model, path = saved
    content = path.read_bytes()
    assert pretrained.sha256(path) == hashlib.sha256(content).hexdigest()
    strange = {"text": '\x00\x01\x1f\x7f\b\t\n"\\/ü 漢\U0001f33b\u2028', "empty": ""}
    for _ in range(3):
        model.save_pretrained(path, **dict(reversed(METADATA.items())))
        assert path.read_bytes() == content
        model.save_pretrained(path, **strange)
        assert pretrained.load(path).metadata == strange


def test_model_does_not_depend_on_the_file(saved):
    model, path = saved
    read = HDiT.from_pretrained(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(read.patch_in.proj.weight, model.patch_in.proj.weight)


def rewritten(path, change):
    """The file with its tensors and header changed: change(tensors, header)."""
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    tensors = safetensors.torch.load_file(path)
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, header)


def config_with(**fields):
    def change(tensors, header):
        header["config"] = json.dumps({**json.loads(header["config"]), **fields})

    return change


def misfit(tensors, header):
    del tensors["splits.0.fac"], tensors["time_emb.weight"]
    tensors["extra.weight"] = torch.ones(2)
    tensors["patch_in.proj.weight"] = tensors["patch_in.proj.weight"][:, 1:].contiguous()
    tensors["out_norm.scale"] = tensors["out_norm.scale"].long()


FAULTS = {
    "foreign": (lambda t, h: h.clear(), "has format None in its header; it must be 'hdit'"),
    "training": (lambda t, h: h.update(format="hdit-training"), "is a checkpoint of training; hdit export makes"),
    "class": (lambda t, h: h.update(model="VGG"), "a model of class 'VGG'; it must be one of DiT, HDiT"),
    "no class": (lambda t, h: h.pop("model"), "a model of class None; it must be one of DiT, HDiT"),
    "another class": (lambda t, h: h.update(model="DiT"), "DiTConfig has an unknown field 'levels'; it takes depth"),
    "no config": (lambda t, h: h.pop("config"), "has None as 'config' in its header; it must be JSON"),
    "config": (lambda t, h: h.update(config="{'a': 1}"), "as 'config' in its header; it must be JSON"),
    "config's type": (lambda t, h: h.update(config="[1]"), r"HDiTConfig cannot be built from \[1\]"),
    "levels": (config_with(levels=3), "holds a configuration that cannot be used"),
    "level": (config_with(levels=[3]), "holds a configuration that cannot be used"),
    "unknown field": (config_with(colour=3), "HDiTConfig has an unknown field 'colour'; it takes levels, patch_size"),
    "value": (config_with(mapping_depth=-1), "cannot be used: mapping_depth is -1; it must be an int of 0 or more"),
    "metadata": (lambda t, h: h.update(card="plain text"), "has 'plain text' as 'card' in its header; it must be JSON"),
    "tensors": (
        misfit,
        "does not fit this model: missing: time_emb.weight, splits.0.fac; not in the model: extra.weight; "
        r"of another shape: patch_in.proj.weight \(32, 47\) instead of \(32, 48\); "
        "not floating point: out_norm.scale torch.int64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_get_one_sentence(fault, saved):
    change, sentence = FAULTS[fault]
    rewritten(saved[1], change)
    with pytest.raises(ValueError, match=sentence) as error:
        pretrained.load(saved[1])
    assert "\n" not in str(error.value) and str(saved[1]) in str(error.value)


def test_unreadable_files_get_one_sentence(saved, tmp_path):
    path = saved[1]
    whole = path.read_bytes()
    damaged = {"": b"", "8 bytes": whole[:8], "half": whole[: len(whole) // 2], "one byte less": whole[:-1]}
    damaged |= {"one more": whole + b"\0", "zeros": bytes(len(whole)), "text": b"not a model\n" * 100}
    damaged["an image"] = b"\x89PNG\r\n\x1a\n" + bytes(1000)
    for name, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no whole safetensors file .* it may be cut short") as error:
            pretrained.load(path)
        assert "\n" not in str(error.value), name
    for nothing in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"path {nothing} is no file; it must be a safetensors file")):
            pretrained.load(nothing)


def test_bad_arguments_get_one_sentence(saved, tmp_path):
    model, path = saved
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"path .* holds a HDiT; DiT.from_pretrained needs a DiT"):
        DiT.from_pretrained(path)
    for dtype in (torch.int64, "bfloat16"):
        with pytest.raises(ValueError, match=r"dtype is .*; it must be None or a floating-point torch.dtype"):
            pretrained.load(path, dtype=dtype)
    for metadata, sentence in (
        ({"config": {}}, "metadata 'config' is taken by the file itself"),
        ({"sigma": torch.ones(1)}, "metadata 'sigma' is tensor.*; it must be what JSON knows"),
        ({"sigma_max": float("inf")}, "metadata 'sigma_max' is inf; it must be what JSON knows"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.save_pretrained(path, **metadata)
    with pytest.raises(ValueError, match="lies in no existing folder"):
        model.save_pretrained(tmp_path / "none" / "model.safetensors")
    with pytest.raises(ValueError, match="is a folder; it must be the name of a file"):
        model.save_pretrained(tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space left"):
                model.save_pretrained(path)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_file_is_on_the_disk_before_it_has_its_name(saved, monkeypatch):
    model, path = saved
    events, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append(names), rename(*names)))
    model.save_pretrained(path)
    (temporary, final) = events[1]
    assert events[0] == "fsync" and final == path and temporary.parent == path.parent and temporary != path


def keep_saving(path, ready):
    model = build(replace(PLAIN, mapping_width=512, mapping_depth=4), torch.float32)
    model.save_pretrained(path)
    ready.set()
    while True:
        model.save_pretrained(path)


def test_killed_while_writing(tmp_path):
    """Whenever it stops, the file under the final name is whole."""
    path, context = tmp_path / "model.safetensors", multiprocessing.get_context("fork")
    for attempt in range(5):
        ready = context.Event()
        process = context.Process(target=keep_saving, args=(path, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.01 + 0.007 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert torch.isfinite(HDiT.from_pretrained(path).patch_in.proj.weight).all()

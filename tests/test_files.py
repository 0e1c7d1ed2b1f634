"""Files under their final name are whole; metrics of a killed run; the loss curve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hdit import files, pictures, train_log


def test_log_forgets_what_is_after_a_checkpoint(tmp_path):
    log = train_log.Log(tmp_path)
    log.write([{"step": i, "loss": i / 7} for i in range(5)])
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    log.cut(3)
    assert train_log.read(log.path) == [{"step": i, "loss": i / 7} for i in range(3)]
    assert train_log.smoothed([1.0, 2.0, 6.0, 1.0], 2) == [1.0, 1.5, 4.0, 3.5]


def test_cutting_the_log_keeps_it_until_the_new_one_is_whole(tmp_path, monkeypatch):
    log = train_log.Log(tmp_path)
    log.cut(0)  # of a run that begins
    assert log.path.read_text() == ""
    log.write([{"step": i, "loss": 1.0} for i in range(3)])
    write = Path.write_text

    def full(path, text):
        write(path, text[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        log.cut(2)
    assert len(train_log.read(log.path)) == 3


def test_the_loss_curve_and_the_overview_show_the_run(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    values = [1 / (i + 1) for i in range(120)]
    train_log.Log(tmp_path).write([{"step": i, "loss": value} for i, value in enumerate(values)])
    axes = Figure().subplots()
    train_log.curve(axes, tmp_path)
    mean, every = axes.lines
    assert list(every.get_xdata()) == list(mean.get_xdata()) == list(range(120))
    assert list(every.get_ydata()) == values
    assert list(mean.get_ydata()) == train_log.smoothed(values, 2)
    import matplotlib.image
    import torch

    for name in ("real", "step-00000004", "step-00000120"):
        pictures.write_image(torch.rand(3, 8, 8), tmp_path / f"samples/{name}.png")
    shown, read = [], matplotlib.image.imread
    monkeypatch.setattr(matplotlib.image, "imread", lambda path: shown.append(path.name) or read(path))
    train_log.overview(tmp_path, tmp_path / "overview.png", "a run")
    assert shown == ["real.png", "step-00000120.png"]
    assert read(tmp_path / "overview.png").std() > 0.1


def test_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace

    def synced(number):
        happened.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: happened.append("replace") or replace(*paths))
    before = os.umask(0o077)
    os.umask(before)
    with files.replacing(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert happened == [temporary.name, "replace", tmp_path.name]
    after = os.umask(before)
    assert after == before


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

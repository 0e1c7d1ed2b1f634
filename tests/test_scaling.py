"""hdit scaling: the sweep end to end, killed and resumed; budget, memory limit, fits, and the plots' pixels."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import DiT, HDiT, flops, scaling, scaling_plots
from hdit.scaling import COLUMNS, MEMORY, OK, OUT_OF_MEMORY, OVER_BUDGET, Scaling

FAILED_COLOR = np.array([0xD6, 0x00, 0x1C])


def rows_of(path):
    return scaling.read_csv(path) if path.exists() else []


def made_up(model, side, exponent, factor=1e-6, status=OK, **others):
    """A row as a sweep would write it, whose time follows a power of the pixels exactly."""
    seconds = factor * (side**2) ** exponent
    row = dict.fromkeys(COLUMNS) | {"settings": "s", "model": model, "resolution": side, "pixels": side**2}
    row |= {"status": status, "batch": 1, "threads": 1, "pass_kind": "forward", "dtype": "float32", "device": "a"}
    row |= {"flops_per_image": round(1e12 * seconds), "architecture": "b", "date": "2024-01-01", "passes": 3}
    if status == OK:
        row |= {"seconds_per_image": seconds, "images_per_second": 1 / seconds, MEMORY: round(1e9 * seconds)}
        row |= {"wall_seconds": 5 + 4 * seconds}
    return row | others


@pytest.fixture
def measured(monkeypatch):
    """Replace the measuring processes by their result for a known law, and record what was asked for."""
    asked = []

    def pretend(settings, model, side, timeout):
        asked.append((model, side, timeout))
        return {k: v for k, v in made_up(model, side, 2 if model == "dit" else 1).items() if k not in ("settings",)}

    monkeypatch.setattr(scaling, "run_measurement", pretend)
    return asked


def test_sweep_killed_half_way_and_resumed(tmp_path):
    """Real processes, real photographs: SIGKILL after the first row; the second run measures the rest and draws."""
    command = [sys.executable, "-m", "hdit", "scaling", "--output", str(tmp_path), "--resolutions", "128"]
    command += ["--threads", "1", "--repeats", "1", "--images", "coffee", "china"]
    table = tmp_path / "scaling.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not rows_of(table) and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9, "the sweep ended before it could be killed"
    before = rows_of(table)
    assert len(before) == 1
    ended = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children.split()) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children.split()), "a measuring process outlived the sweep"

    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    after = rows_of(table)
    assert after[: len(before)] == before, "a finished row was measured again, or changed"
    points = [(row["model"], row["resolution"]) for row in after]
    assert points == [("hdit", 128), ("dit", 128)]
    assert len({row["settings"] for row in after}) == 1
    for row in after:
        assert row["status"] == OK
        assert row["threads"] == 1
        assert row["passes"] >= 1
        assert 1e-5 < row["seconds_per_image"] < row["wall_seconds"] < 60
        assert row["images_per_second"] == pytest.approx(1 / row["seconds_per_image"])
        assert 1e5 < row[MEMORY] < 2e9
        assert row["torch"] == torch.__version__
        side = row["resolution"]
        model = (DiT if row["model"] == "dit" else HDiT)(scaling.config(row["model"], side))
        assert row["flops_per_image"] == 2 * flops.count(model, side, side).macs
    names = {f"{stem}.{suffix}" for stem in (*scaling_plots.PANELS, "overview") for suffix in ("png", "svg")}
    assert {os.path.basename(path) for path in printed} == names
    assert {path.name for path in tmp_path.iterdir()} == names | {"scaling.csv", "flops.csv"}


def test_memory_limit_ends_only_its_point():
    """A process that may take 30 MB more: enough for 32 x 32 pixels, too little for 512 x 512."""
    settings = Scaling(threads=1, repeats=1, images=("coffee",), memory_limit_gb=0.03, models=("dit",))
    small, large = (scaling.run_measurement(settings, "dit", side, timeout=60) for side in (32, 512))
    assert small["status"] == OK
    assert large["status"] == OUT_OF_MEMORY
    assert "memory" in large["note"]


def test_a_killed_process_is_out_of_memory_and_a_broken_one_is_an_error():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code]).returncode
    assert scaling.outcome(killed, "", "")["status"] == OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="code 1: KeyError: 'x'"):
        scaling.outcome(1, "", "Traceback\nKeyError: 'x'\n")


def test_finished_points_are_skipped_and_changed_settings_are_not_mixed(tmp_path, measured):
    settings = Scaling(output=tmp_path, resolutions=(64, 128), images=("coffee",), budget_minutes=60)
    scaling.sweep(settings)
    assert [point[:2] for point in measured] == [("hdit", 64), ("dit", 64), ("hdit", 128), ("dit", 128)]
    first = rows_of(tmp_path / "scaling.csv")
    scaling.sweep(settings)
    assert len(measured) == 4, "a finished point was measured again"
    scaling.sweep(dataclasses.replace(settings, resolutions=(64, 128, 256), models=("hdit",)))
    assert measured[4:] == [("hdit", 256, pytest.approx(3600, abs=60))]
    scaling.sweep(dataclasses.replace(settings, batch=2))
    assert len(measured) == 9
    rows = rows_of(tmp_path / "scaling.csv")
    assert rows[:4] == first
    assert len({row["settings"] for row in rows[:5]}) == 1
    assert len({row["settings"] for row in rows[5:]}) == 1
    assert rows[5]["settings"] != rows[0]["settings"]


@pytest.mark.parametrize(
    "change",
    [{"train": True}, {"dtype": "bfloat16"}, {"batch": 3}, {"threads": 7}, {"repeats": 9}, {"images": ("china",)}],
)
def test_every_field_that_changes_a_number_changes_the_settings(change):
    settings = Scaling(threads=2, images=("coffee",))
    assert dataclasses.replace(settings, **change).facts() != settings.facts()
    others = {"budget_minutes": 9.0, "resolutions": (64,), "models": ("dit",)}
    assert dataclasses.replace(settings, **others).facts() == settings.facts()


def test_budget_marks_what_is_predicted_to_exceed_it_and_a_larger_one_measures_it(tmp_path, measured):
    settings = Scaling(output=tmp_path, resolutions=(64, 128, 256, 1024), images=("coffee",), budget_minutes=20)
    scaling.sweep(settings)
    rows = {(row["model"], row["resolution"]): row for row in rows_of(tmp_path / "scaling.csv")}
    assert len(rows) == 8
    # 4 passes of 1e-6 · (1024²)² s are 50 days, those of HDiT 4 s.
    assert [point for point, row in rows.items() if row["status"] == OVER_BUDGET] == [("dit", 256), ("dit", 1024)]
    assert "predicted" in rows["dit", 1024]["note"]
    asked = len(measured)
    scaling.sweep(dataclasses.replace(settings, budget_minutes=1e9))
    assert [point[:2] for point in measured[asked:]] == [("dit", 256), ("dit", 1024)]
    assert {row["status"] for row in rows_of(tmp_path / "scaling.csv")} == {OK}
    assert len(rows_of(tmp_path / "scaling.csv")) == 8


def test_prediction_follows_the_measured_law():
    rows = [made_up("dit", side, 2) for side in (64, 128, 256)]
    want = 5 + 4 * 1e-6 * (512**2) ** 2  # five seconds to start, one warm-up, three passes
    assert scaling.predict_wall_seconds(rows, 512, repeats=3) == pytest.approx(want, rel=1e-6)
    assert scaling.predict_wall_seconds(rows[:1], 128, repeats=3) == pytest.approx(5 + 16 * 64e-6 * 64**3, rel=1e-6)
    assert scaling.predict_wall_seconds([], 512, repeats=3) == 0


def test_a_point_that_outlasts_the_budget_is_stopped():
    start = time.monotonic()
    result = scaling.run_measurement(Scaling(images=("coffee",)), "dit", 64, timeout=0.3)
    assert result["status"] == OVER_BUDGET
    assert time.monotonic() - start < 3


def test_csv_survives_every_kind_of_value(tmp_path):
    rows = [made_up("hdit", 64, 1, note='a, b\n"c"'), made_up("dit", 64, 2, status=OVER_BUDGET)]
    scaling.write_csv(tmp_path / "scaling.csv", rows)
    assert scaling.read_csv(tmp_path / "scaling.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.csv"]
    (tmp_path / "scaling.csv").write_text("model,seconds\nhdit,1\n")
    with pytest.raises(ValueError, match=r"scaling\.csv has other columns"):
        scaling.read_csv(tmp_path / "scaling.csv")


def test_settings_that_look_like_a_number_stay_text(tmp_path):
    """Twelve hexadecimal digits may all be decimal, or read as 1e5."""
    for name in ("000000123456", "12345678e901", "123456789012"):
        scaling.write_csv(tmp_path / "scaling.csv", [made_up("hdit", 64, 1, settings=name)])
        assert scaling.read_csv(tmp_path / "scaling.csv")[0]["settings"] == name


@pytest.mark.parametrize(("exponent", "factor"), [(1.0, 3e-7), (2.0, 5e2), (-1.3, 0.7)])
def test_fit_finds_the_exponent(exponent, factor):
    pixels = [64**2, 128**2, 384**2, 1024**2]
    got = scaling_plots.fit(pixels, [factor * p**exponent for p in pixels])
    assert got == pytest.approx((exponent, np.log(factor)), abs=1e-9)
    noise = np.random.default_rng(0).normal(0, 0.1, 4)
    noisy = [factor * p**exponent * np.exp(e) for p, e in zip(pixels, noise, strict=True)]
    want = np.polyfit(np.log(pixels), np.log(noisy), 1)
    assert scaling_plots.fit(pixels, noisy) == pytest.approx(tuple(want), rel=1e-9)


def test_fit_takes_the_larger_half():
    points = [(side**2, float(side)) for side in (64, 128, 256, 512, 1024)]
    random.Random(0).shuffle(points)
    assert scaling_plots.upper_half(points) == [(side**2, float(side)) for side in (256, 512, 1024)]
    assert len(scaling_plots.upper_half(points[:2])) == 2
    assert len(scaling_plots.upper_half(points[:4])) == 2


def test_flops_are_twice_the_multiply_adds_of_the_published_sizes():
    """Multiply-adds of the table in the HDiT paper, in 1e9; every side up to 4096."""
    rows = scaling.count_flops()
    gmacs = {(row["model"], row["resolution"]): row["flops_per_image"] / 2e9 for row in rows}
    for side, dit, hdit in ((128, 106.46, 31), (256, 657.63, 65), (512, 6341.23, 198), (1024, 84738.4, 732)):
        assert gmacs["dit", side] == pytest.approx(dit, rel=1e-4)
        assert abs(gmacs["hdit", side] - hdit) < 1
    assert sorted(gmacs) == sorted((m, s) for m in ("dit", "hdit") for s in (128, 256, 512, 1024, 2048, 4096))
    exponents = {}
    for model in ("dit", "hdit"):
        half = scaling_plots.upper_half([(s**2, n) for (m, s), n in gmacs.items() if m == model])
        exponents[model] = scaling_plots.fit(*zip(*half, strict=True))[0]
    assert exponents["hdit"] == pytest.approx(1, abs=0.03)
    assert exponents["dit"] == pytest.approx(2, abs=0.03)


def draw(folder, missing=()):
    """Plots of a made-up sweep; ``missing``: (side, status) of DiT."""
    sides = (64, 128, 256, 512)
    rows = [made_up("hdit", side, 1.1) for side in sides] + [made_up("dit", side, 1.9) for side in sides[:3]]
    rows += [made_up("dit", side, 1.9, status=status) for side, status in missing]
    stale = [made_up("dit", side, 0.5, settings="older", factor=50.0) for side in sides]
    folder.mkdir()
    scaling.write_csv(folder / "scaling.csv", stale + rows)
    scaling.write_csv(folder / "flops.csv", [row | {"settings": "published"} for row in rows if row["status"] == OK])
    return scaling_plots.draw(folder)


def failed_pixels(path):
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(image - FAILED_COLOR).max(-1) < 8).sum())


def test_plots_show_the_curves_and_mark_what_is_missing(tmp_path):
    cases = {"over": ((512, OVER_BUDGET),), "out": ((512, OUT_OF_MEMORY),)}
    paths = {name: {path.name: path for path in draw(tmp_path / name, missing)} for name, missing in cases.items()}
    for path in paths["over"].values():
        if path.suffix == ".png":
            image = np.asarray(Image.open(path).convert("L")).astype(float)
            assert image.std() > 10, f"{path} is blank"
            assert (image < 100).mean() > 0.002, f"{path} has no lines or letters"
    for name in ("time", "memory", "throughput", "overview"):
        svg = {case: paths[case][f"{name}.svg"].read_text() for case in cases}
        assert [failed_pixels(paths[case][f"{name}.png"]) > 50 for case in cases] == [False, True]
        assert ['id="out-of-memory"' in svg[case] for case in cases] == [False, True]
        assert ['id="over-budget"' in svg[case] for case in cases] == [True, False]
    assert failed_pixels(paths["out"]["flops.png"]) == 0


def test_plots_leave_older_settings_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(scaling_plots, "panel", lambda axes, rows, name: drawn.append((name, rows)))
    monkeypatch.setattr(scaling_plots, "save", lambda figure, stem: [])
    draw(tmp_path / "some")
    assert [name for name, _ in drawn] == [*scaling_plots.PANELS] * 2
    for name, rows in drawn:
        assert {row["settings"] for row in rows} == {"published" if name == "flops" else "s"}


def test_legend_has_the_exponents():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [made_up("hdit", side, 1.1) for side in (64, 128, 256, 512)]
    rows += [made_up("dit", side, 1.9) for side in (64, 128)]
    figure, axes = plt.subplots()
    scaling_plots.panel(axes, rows, "time")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    plt.close(figure)
    assert labels[0] == "HDiT ∝ pixels$^{1.10}$ (fitted on 256² to 512²)"
    assert labels[1] == "DiT ∝ pixels$^{1.90}$ (fitted on 64² to 128²)"
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "pixels per image"
    assert axes.get_ylabel() == "seconds per image"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"threads": -1}, "threads must be at least 1, got -1"),
        ({"resolutions": ()}, "resolutions must name at least one"),
        ({"resolutions": (64, 330)}, "330 x 330; both must divide by"),
        ({"resolutions": (66,), "models": ("dit",)}, "resolutions must be multiples of 4, 16 at least, got 66"),
        ({"budget_minutes": 0.0}, "budget_minutes must be positive, got 0.0"),
        ({"memory_limit_gb": -2.0}, "memory_limit_gb must be positive, got -2.0"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"images": ("nothing-there",)}, "image folder 'nothing-there' is not a folder"),
        ({"images": ("coffee", "cat")}, "'cat' is unknown"),
        ({"plot_only": True}, r"flops\.csv is missing or has no rows"),
    ],
)
def test_bad_settings_are_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        Scaling(**{"output": tmp_path / "none"} | change).run()
    assert not list((tmp_path / "none").glob("*.csv"))

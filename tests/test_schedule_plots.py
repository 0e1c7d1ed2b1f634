"""The pictures of noise levels: what their lines say, and that all of them are drawn."""

import math

import pytest
import torch

from hdit import schedule_plots

PANELS = schedule_plots.panels()


def line(panel, label):
    return next(curve for curve in PANELS[panel].curves if curve.label.startswith(label))


@pytest.mark.parametrize("curve", PANELS["densities"].curves, ids=lambda curve: curve.label)
def test_densities_integrate_to_one(curve):
    mass = torch.trapezoid(curve.y, curve.x.log()).abs()
    assert abs(float(mass) - 1) < 2e-3


def test_densities_are_those_of_the_papers():
    normal, odds = line("densities", "log-normal"), line("densities", "v-diffusion")
    z = (normal.x.log() + 1.2) / 1.2
    inside = z.abs() < 4
    want = torch.exp(-(z**2) / 2) / (1.2 * math.sqrt(2 * math.pi))
    assert (normal.y - want)[inside].abs().max() < 1e-4
    assert (odds.y - (2 / math.pi) / (odds.x / 0.5 + 0.5 / odds.x))[1:-1].abs().max() < 1e-3


def test_weightings_are_those_of_the_papers():
    at = torch.tensor([0.1, 0.47, 3.0], dtype=torch.float64)
    want = {
        "EDM": (at**2 + 0.25) / (at * 0.5) ** 2,
        "SNR": at**-2,
        "soft-min-SNR": 1 / (at**2 + 0.25),
        "min-SNR, γ = 5": (at**-2).clamp(max=5),
        "min-SNR, γ = 4": (at**-2).clamp(max=4),
    }
    for label, weights in want.items():
        curve = line("weightings", label)
        nearest = (curve.x.log()[:, None] - at.log()).abs().argmin(0)
        assert (curve.y[nearest] / weights - 1).abs().max() < 0.03, label
    assert len(want) == len(PANELS["weightings"].curves)


def test_schedules_of_the_other_panels():
    shifted, plain = line("logsnr", "shifted, 1024²"), line("logsnr", "cosine")
    assert (plain.y - shifted.y - 2 * math.log(32)).abs().max() < 1e-9
    interpolated = line("logsnr", "interpolated, 1024²")
    assert abs(float(interpolated.y[0] - plain.y[0])) < 1e-9 and abs(float(interpolated.y[-1] - shifted.y[-1])) < 1e-9
    exponential = line("sampling", "exponential")
    assert (exponential.y.log10().diff() + 6 / 49).abs().max() < 1e-9


def test_every_picture_is_drawn(tmp_path):
    command = schedule_plots.Schedules(output=tmp_path / "a" / "b")
    command.run()
    first = {path.name: path.read_bytes() for path in command.output.iterdir()}
    assert set(first) == {f"{name}.{suffix}" for name in (*PANELS, "overview") for suffix in ("png", "svg")}
    assert all(b"<path" in data for name, data in first.items() if name.endswith("svg"))

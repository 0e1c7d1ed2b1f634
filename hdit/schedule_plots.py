"""``hdit schedules``: the papers' pictures of noise levels, from the functions that training and sampling call."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .diffusion import schedules
from .diffusion.preconditioning import WEIGHTINGS, min_snr
from .scaling_plots import save

SIDES = (128, 256, 512, 1024)
BLUES = dict(zip(SIDES, ("#9ecae1", "#5ba3d0", "#2171b5", "#0b3c7d"), strict=True))  # darker: larger images
ORANGE, GREEN, RED, PURPLE, GRAY = "#e08214", "#3a9d5d", "#c8375b", "#7b5ea7", "0.45"
SIGMA_DATA, STEPS = 0.5, 50
DOUBLE = torch.float64


@dataclass
class Schedules:
    """Pictures of log-SNR schedules, loss weightings, training densities and sampling schedules; PNG and SVG."""

    output: Path = Path("runs/schedules")
    """Folder of the pictures; made where it is missing."""

    def run(self):
        """Draw and name the files."""
        self.output.mkdir(parents=True, exist_ok=True)
        print("\n".join(str(path) for path in draw(self.output)))


class Curve(NamedTuple):
    """One line of a panel; x and y are float64 tensors. style is matplotlib's."""

    label: str
    x: torch.Tensor
    y: torch.Tensor
    color: str
    style: str = "-"


class Panel(NamedTuple):
    """curves under a title and a line that says what they are of; axes: what matplotlib's ``Axes.set`` takes."""

    title: str
    note: str
    axes: dict
    curves: list[Curve]


def panels() -> dict[str, Panel]:
    """File name to what is drawn."""
    return {"logsnr": logsnr(), "weightings": weightings(), "densities": densities(), "sampling": sampling()}


def logsnr() -> Panel:
    """Simple diffusion's log-SNR over time (arXiv 2301.11093, figures 3 and 4)."""
    t = torch.linspace(0, 1, 401, dtype=DOUBLE)
    curves = [Curve("cosine", t, schedules.logsnr_cosine(t), ORANGE)]
    for side in SIDES:
        curves.append(Curve(f"shifted, {side}²", t, schedules.logsnr_shifted(t, side, 32), BLUES[side]))
    for side in SIDES:
        curve = schedules.logsnr_interpolated(t, side, 32)
        curves.append(Curve(f"interpolated, {side}²", t, curve, BLUES[side], "--"))
    note = "Shifted to the noise of 32² images; interpolated: only at the noisy end"
    axes = {"xlabel": "time: 0 clean, 1 noisy", "ylabel": "log-SNR", "ylim": (-21, 16), "xlim": (0, 1)}
    return Panel("Simple diffusion's log-SNR", note, axes, curves)


def weightings() -> Panel:
    """The weight of the squared error of x0: what HDiT compares (arXiv 2401.11605, section 4.5)."""
    sigma = torch.logspace(-3, 3, 601, dtype=DOUBLE)
    error_of_x0 = (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2)  # c_out², which the weights of F carry
    functions = [
        ("EDM (karras)", WEIGHTINGS["karras"], GRAY, "-"),
        ("SNR", WEIGHTINGS["snr"], GREEN, "--"),
        ("soft-min-SNR (HDiT)", WEIGHTINGS["soft-min-snr"], BLUES[512], "-"),
        ("min-SNR, γ = 5", min_snr, ORANGE, "--"),
        ("min-SNR, γ = 4", lambda s, sd: min_snr(s, sd, 4.0), RED, ":"),
    ]
    curves = [Curve(name, sigma, f(sigma, SIGMA_DATA) / error_of_x0, *style) for name, f, *style in functions]
    axes = _over_sigma() | {"yscale": "log", "ylabel": "weight of (D − x0)²", "xlim": (1e-2, 1e2), "ylim": (1e-4, 1e4)}
    return Panel(
        "Loss weightings",
        "σ_data = 0.5; soft-min-SNR is 1 / (σ² + σ_data²)",
        axes,
        curves,
    )


def densities() -> Panel:
    """How training spreads its levels over ln sigma: the slope of each inverse distribution function, inverted."""
    chosen = [
        ("log-normal (EDM)", ("lognormal", {}), ORANGE, "-"),
        ("log-logistic", ("loglogistic", {}), RED, "-"),
        ("log-uniform", ("loguniform", {"sigma_min": 1e-3, "sigma_max": 1e3}), GRAY, "-"),
        ("v-diffusion = cosine", ("v-diffusion", {}), GREEN, "--"),
        *((f"HDiT, {side}²", ("cosine-interpolated", {"image_d": side}), BLUES[side], "-") for side in SIDES[::3]),
        ("simple diffusion, 512²", ("simple-diffusion", {"image_d": 512}), PURPLE, "--"),
    ]
    curves = [
        Curve(label, *slope(schedules.density(name, **params)), *style) for label, (name, params), *style in chosen
    ]
    axes = _over_sigma() | {"ylabel": "density over ln σ", "ylim": (0, 0.74)}
    return Panel("Training densities", "σ_data = 0.5; HDiT's is the cosine-interpolated one", axes, curves)


def slope(inverse) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma, density over ln sigma) of an inverse distribution function; finer toward u = 0 and 1, for the tails."""
    odds = torch.linspace(-16, 16, 1601, dtype=DOUBLE)
    below, above = torch.sigmoid(odds), torch.sigmoid(-odds)
    logs = inverse(below).log()
    mass = torch.where(odds[1:] < 0, below.diff(), -above.diff())  # the difference of two numbers far from 1
    return ((logs[1:] + logs[:-1]) / 2).exp(), mass / logs.diff().abs()


def sampling() -> Panel:
    """The sigma that each of 50 steps starts from."""
    steps = torch.arange(STEPS, dtype=DOUBLE)
    ends = {"sigma_min": 1e-3, "sigma_max": 1e3, "dtype": DOUBLE}
    found = [
        ("Karras, ρ = 7", schedules.karras_sigmas(STEPS, **ends), BLUES[512], "-"),
        ("exponential", schedules.exponential_sigmas(STEPS, **ends), ORANGE, "-"),
        ("polyexponential, ρ = 2", schedules.polyexponential_sigmas(STEPS, rho=2.0, **ends), RED, "-"),
        ("VP (DDPM)", schedules.vp_sigmas(STEPS, dtype=DOUBLE), GREEN, "-"),
        ("simple diffusion, 512²", schedules.simple_diffusion_sigmas(STEPS, 512, dtype=DOUBLE), PURPLE, "--"),
    ]
    curves = [Curve(label, steps, sigmas[:-1], *style) for label, sigmas, *style in found]
    axes = {"xlabel": "step", "ylabel": "σ", "yscale": "log", "xlim": (0, STEPS - 1), "ylim": (5e-4, 3e4)}
    return Panel("Sampling schedules", f"{STEPS} steps; the last one goes to σ = 0", axes, curves)


def draw(folder: Path) -> list[Path]:
    """Draw every panel and an overview of them into ``folder``, as PNG and SVG, and return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "hdit", "axes.spines.top": False, "axes.spines.right": False})
    found, paths = panels(), []
    for name, panel in found.items():
        figure, axes = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
        plot(axes, panel)
        paths += save(figure, folder / name)
    figure, grid = plt.subplots(2, 2, figsize=(10.5, 8.6), layout="constrained")
    for axes, panel in zip(grid.flat, found.values(), strict=True):
        plot(axes, panel)
    return paths + save(figure, folder / "overview")


def plot(axes, panel: Panel):
    """One panel on ``axes``: title, note, curves and their names."""
    for curve in panel.curves:
        axes.plot(curve.x, curve.y, curve.style, color=curve.color, label=curve.label, linewidth=2)
    axes.set(**panel.axes)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(panel.title, loc="left", weight="bold", fontsize=12, pad=22)
    note = axes.annotate(panel.note, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8.5, color="0.3")
    note.set_in_layout(False)  # it may reach beyond the axes, which would otherwise shrink for it
    axes.legend(frameon=False, fontsize=8.5, ncols=1 + (len(panel.curves) > 5), loc="upper right")


def _over_sigma() -> dict:
    return {"xscale": "log", "xlabel": "σ", "xlim": (1e-3, 1e3)}

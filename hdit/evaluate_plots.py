"""The pictures of ``hdit evaluate``: spectra, and distances against the step that a checkpoint is of."""

import re
from pathlib import Path

from .evaluate_spectrum import HIGH, Spectrum


def step_of(name: str) -> int | None:
    """The last number in a file's name: checkpoint-00012000.safetensors is of step 12000."""
    numbers = re.findall(r"\d+", Path(name).name.split(".")[0])
    return int(numbers[-1]) if numbers else None


def draw(real: Spectrum | None, samples: dict[str, Spectrum], rows: list[dict], patch_size: int, path: Path, form: str):
    """A panel of radially averaged spectra, where there are any; and one of Fréchet distances against the step, where
    several samples have a number in their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row for row in rows if "frechet_distance" in row and step_of(row["samples"]) is not None]
    panels = [] if real is None else [lambda axes: spectra(axes, real, samples, patch_size)]
    if len({row["samples"] for row in steps}) > 1:
        panels.append(lambda axes: distances(axes, steps))
    if not panels:
        raise ValueError("plot needs the metric spectrum, or frechet of several samples with a number in their names")
    figure, grid = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5.6), layout="constrained", squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format=form)
    plt.close(figure)


def spectra(axes, real: Spectrum, samples: dict[str, Spectrum], patch_size: int):
    """Power against frequency, log-log: real black, each set of samples a colour, the patch grid's frequencies grey."""
    for name, spectrum in samples.items():
        frequency, power = spectrum.radial()
        axes.loglog(frequency, power, label=f"{Path(name).name}, {spectrum.count} images", linewidth=1.6)
    frequency, power = real.radial()
    axes.loglog(frequency, power, label=f"real, {real.count} images", color="black", linewidth=1.6)
    for multiple in range(1, patch_size // 2 + 1):
        axes.axvline(multiple / patch_size, color="0.8", linewidth=1, zorder=0)
    axes.axvline(HIGH, color="0.6", linewidth=1, linestyle=":", zorder=0)
    halvings = [2.0**-n for n in range(1, 12) if 2.0**-n >= 0.9 * frequency[0]]
    axes.set_xticks(halvings, [f"1/{round(1 / each)}" for each in halvings])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"cycles per pixel (grey: multiples of 1/{patch_size}, the patch grid; dotted: half of Nyquist)")
    axes.set_ylabel("power (of white noise: its variance)")
    axes.set_title("Radially averaged power spectrum", loc="left", weight="bold")


def distances(axes, rows: list[dict]):
    """Fréchet distance against the step, log-log, a line for each extractor."""
    for name in dict.fromkeys(row["extractor"] for row in rows):
        line = sorted((step_of(row["samples"]), row["frechet_distance"]) for row in rows if row["extractor"] == name)
        resize = next(row["resize"] for row in rows if row["extractor"] == name)
        axes.loglog(*zip(*line, strict=True), marker="o", label=f"{name} (resize: {resize})")
    axes.set_xlabel("training step")
    axes.set_ylabel("Fréchet distance")
    axes.set_title("Fréchet distance while training", loc="left", weight="bold")

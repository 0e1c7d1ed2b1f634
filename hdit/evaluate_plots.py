"""The pictures of ``hdit evaluate``: spectra, and distances against training steps and guidance."""

from pathlib import Path

from .evaluate_spectrum import HIGH, Spectrum

# what samples may differ in: (title, axis, scale)
CURVES = {
    "step": ("Fréchet distance while training", "training step", "log"),
    "guidance": ("Fréchet distance against guidance", "scale of classifier-free guidance", "linear"),
}


def draw(real: Spectrum | None, samples: dict[str, Spectrum], rows: list[dict], patch_size: int, path: Path, form: str):
    """A panel of radially averaged spectra, where there are any; and one of Fréchet distances for each of ``CURVES`` of
    which the rows have several values. ValueError where that leaves nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "frechet_distance" in row]
    curves = [name for name in CURVES if len({row[name] for row in rows} - {None}) > 1]
    panels = [] if real is None else [lambda axes: spectra(axes, real, samples, patch_size)]
    panels += [lambda axes, name=name: distances(axes, rows, name) for name in curves]
    if not panels:
        raise ValueError("plot needs the metric spectrum, or frechet of samples of several steps or guidance scales")
    figure, grid = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 5.6), layout="constrained", squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
        axes.legend(frameon=False, fontsize=8.5)
    if curves:
        figure.supxlabel("\n".join(described(rows)), x=0.02, ha="left", fontsize=8.5, color="0.3")
    figure.savefig(path, dpi=150, format=form)
    plt.close(figure)


def described(rows: list[dict]) -> list[str]:
    """How many images the distances are of, and what each extractor saw of them."""
    counts = [
        " to ".join(f"{count:,}" for count in sorted({min(own), max(own)})) + f" {what}"
        for what, own in (
            ("samples", [row["images"] for row in rows]),
            ("real images", [row["real_images"] for row in rows]),
        )
    ]
    return ["; ".join(counts), *dict.fromkeys(f"{row['extractor']}: resize {row['resize']}" for row in rows)]


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


def distances(axes, rows: list[dict], name: str):
    """Fréchet distance against the ``name`` of ``CURVES``: a line for each extractor, and for each value of the other
    one. Samples without it (noise, other real images) are dotted levels in the colour of the extractor."""
    title, label, scale = CURVES[name]
    axes.set(xscale=scale, yscale="log", xlabel=label, ylabel="Fréchet distance")
    (other,) = set(CURVES) - {name}
    others = {row[other] for row in rows if row[name] is not None}
    lines = {}
    for row in rows:
        if row[name] is not None:
            key = row["extractor"] + (f", {other} {row[other]}" if len(others) > 1 else "")
            lines.setdefault((row["extractor"], key), []).append((row[name], row["frechet_distance"]))
    colours = {}
    for (extractor, key), points in lines.items():
        (line,) = axes.plot(*zip(*sorted(points), strict=True), marker="o", label=key)
        colours.setdefault(extractor, line.get_color())
    for row in rows:
        if row[name] is None:
            color, height = colours[row["extractor"]], row["frechet_distance"]
            axes.axhline(height, linestyle=":", color=color)
            place = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 8.5}
            text = axes.annotate(
                Path(row["samples"]).name, (1, height), (0, 2), xycoords=("axes fraction", "data"), color=color, **place
            )
            text.set_in_layout(False)  # a distance of 0 is nowhere on the axis
    axes.set_title(title, loc="left", weight="bold")

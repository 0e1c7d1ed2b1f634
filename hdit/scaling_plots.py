"""The plots of ``hdit scaling``, from its CSV files alone: log-log, with the fitted exponent in the legend."""

from pathlib import Path

import torch

NAMES = {"hdit": "HDiT", "dit": "DiT"}
COLORS = {"hdit": "#1f6fb4", "dit": "#e08214"}
MARKERS = {"hdit": "o", "dit": "s"}
SUFFIX = {"flops": "-B/4"}
FAILED = "#d6001c"  # no other mark has this colour
# file name: (column, divisor, title, axis)
PANELS = {
    "flops": ("flops_per_image", 1e9, "FLOPs of the published sizes", "GFLOP per image (1 multiply-add = 2 FLOP)"),
    "time": ("seconds_per_image", 1, "Time, measured", "seconds per image"),
    "memory": (
        "peak_memory_minus_memory_before_model_ran_bytes",
        1e6,
        "Peak memory, measured",
        "peak MB above those in use before",
    ),
    "throughput": ("images_per_second", 1, "Throughput, measured", "images per second"),
}


def fit(pixels, values) -> tuple[float, float]:
    """(exponent, log of the factor) of values = factor * pixels ** exponent: least squares on the logarithms."""
    x = torch.tensor(pixels, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    exponent = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(exponent), float(y.mean() - exponent * x.mean())


def upper_half(points: list) -> list:
    """The points that are fitted: the larger half of them, rounded up, two at least."""
    return sorted(points)[-max(2, (len(points) + 1) // 2) :]


def draw(folder: Path) -> list[Path]:
    """Draw flops, time, memory, throughput and an overview beside the CSV files of ``folder``, as PNG and SVG.

    Of scaling.csv, the settings of its last row. Returns the paths. Raises ValueError where a CSV file is missing.
    """
    from .scaling import read_csv

    rows = {name: read_csv(folder / f"{name}.csv") for name in ("flops", "scaling")}
    for name, found in rows.items():
        if not found:
            raise ValueError(f"{folder / name}.csv is missing or has no rows: run the sweep before drawing it")
    measured = [row for row in rows["scaling"] if row["settings"] == rows["scaling"][-1]["settings"]]

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "hdit", "axes.spines.top": False, "axes.spines.right": False})
    paths = []
    for name, (_, _, title, _) in PANELS.items():
        figure, axes = plt.subplots(figsize=(7.5, 5.6), layout="constrained")
        own = rows["flops"] if name == "flops" else measured
        panel(axes, own, name)
        figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=13)
        axes.set_title("\n".join(describe(own)), loc="left", fontsize=8.5, color="0.3")
        paths += save(figure, folder / name)
    figure, grid = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for axes, (name, (_, _, title, _)) in zip(grid.flat, PANELS.items(), strict=True):
        panel(axes, rows["flops"] if name == "flops" else measured, name)
        axes.set_title(title, loc="left", weight="bold", fontsize=12)
    caption = "\n".join(
        f"{what}: {'; '.join(lines[:-1])}\n{lines[-1]}"
        for what, lines in (("FLOPs", describe(rows["flops"])), ("Measured", describe(measured)))
    )
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=8.5, color="0.3")
    paths += save(figure, folder / "overview")
    return paths


def describe(rows: list[dict]) -> list[str]:
    """What the rows are of: the two architectures, and how they were measured or counted."""
    lines, row = [], rows[0]
    counted = row["settings"] == "published"
    for model, name in NAMES.items():
        own = [row for row in rows if row["model"] == model]
        if own:  # the largest: it has all kinds of levels
            architecture = max(own, key=lambda row: row["pixels"])["architecture"]
            lines.append(f"{name}{SUFFIX['flops'] if counted else ''}: {architecture}")
    if counted:
        return [*lines, "patch 4, kernel 7; one image, one forward pass; 1 multiply-add = 2 FLOP"]
    photographs, threads = (
        f"{row[n]} {word}{'s' * (row[n] > 1)}" for n, word in (("batch", "photograph"), ("threads", "thread"))
    )
    how = (
        f"denoiser, {row['pass_kind']}; {photographs} a pass; {row['dtype']}; {row['device']}, {threads}; {row['date']}"
    )
    return [*lines, how]


def panel(axes, rows: list[dict], name: str):
    """One quantity against pixels, on ``axes``."""
    column, divisor, _, ylabel = PANELS[name]
    axes.set(xscale="log", yscale="log", xlabel="pixels per image", ylabel=ylabel)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    finished = {}
    for model in NAMES:
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["pixels"])
        points = [(r["pixels"], r[column] / divisor) for r in own if r["status"] == "ok" and (r[column] or 0) > 0]
        missing = [(row["pixels"], row["status"]) for row in own if row["status"] != "ok"]
        finished[model] = dict(points)
        if points:
            curve(axes, model, NAMES[model] + SUFFIX.get(name, ""), points, missing)
    sides = sorted({row["resolution"] for row in rows})
    labelled = [side for side in sides if side & (side - 1) == 0] or sides
    axes.set_xticks([side**2 for side in labelled], [f"{side}²" for side in labelled])
    axes.minorticks_off()
    ratio(axes, finished, beyond=sides[-1] ** 2)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # a status that both models have is explained once, below the curves
    ordered = sorted(once, key=lambda label: "∝" not in label)
    axes.legend([once[label] for label in ordered], ordered, frameon=False, fontsize=9)


def curve(axes, model: str, label: str, points: list, missing: list):
    """Measured points, the fitted line through the larger half of them, and what was not measured, on that line."""
    color = COLORS[model]
    if len(points) > 1:
        half = upper_half(points)
        exponent, factor = fit(*zip(*half, strict=True))
        low, high = (round(half[i][0] ** 0.5) for i in (0, -1))
        label += f" ∝ pixels$^{{{exponent:.2f}}}$ (fitted on {low}² to {high}²)"
        line = torch.tensor([half[0][0], max([half[-1][0], *(pixels for pixels, _ in missing)])], dtype=torch.float64)
        axes.plot(line, torch.exp(factor + exponent * line.log()), "--", color=color, linewidth=1, alpha=0.7)
    else:
        exponent, factor = 0.0, float(torch.tensor(points[0][1]).log())
    axes.plot(*zip(*points, strict=True), MARKERS[model] + "-", color=color, label=label, markersize=6, linewidth=2)
    for pixels, status in missing:
        height = torch.exp(factor + exponent * torch.tensor(pixels).log())
        mark = {"marker": "x", "color": FAILED, "markersize": 11, "markeredgewidth": 3}
        if status != "out of memory":
            mark = {"marker": MARKERS[model], "color": color, "markerfacecolor": "white", "markersize": 9}
        where = " (drawn on the fitted line)"
        axes.plot(pixels, height, linestyle="", label=status + where, gid=status.replace(" ", "-"), **mark)


def ratio(axes, finished: dict, beyond: int):
    """An arrow between the curves at the largest image that both finished, with their ratio. beyond: the axis's end."""
    common = sorted(set(finished["hdit"]) & set(finished["dit"]))
    if not common:
        return
    low, high = sorted((finished["hdit"][common[-1]], finished["dit"][common[-1]]))
    if high < 3 * low:
        return
    axes.annotate("", (common[-1], high), (common[-1], low), arrowprops={"arrowstyle": "<->", "color": "0.35"})
    text = f"{high / low:,.{0 if high > 10 * low else 1}f}×"
    box = {"boxstyle": "square,pad=0.2", "facecolor": "white", "edgecolor": "none"}
    left = common[-1] == beyond  # else to the right, where the gap between the curves is wider
    place = {"textcoords": "offset points", "ha": "right" if left else "left", "va": "center"}
    where = (common[-1], (low * high) ** 0.5)
    axes.annotate(text, where, (-5 if left else 5, 0), bbox=box, weight="bold", color="0.25", **place)


def save(figure, stem: Path) -> list[Path]:
    """PNG and SVG, the same bytes for the same data."""
    import matplotlib.pyplot as plt

    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    figure.savefig(paths[0], dpi=150, facecolor="white")
    figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return paths

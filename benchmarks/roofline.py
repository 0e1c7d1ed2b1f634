"""`python benchmarks/roofline.py [--results DIR]`: how close attention comes to this machine's ceilings, as a picture.

Reads the ops_*.csv that pytest wrote last and draws, for the rows of its last run, FLOP per byte that must move against
GFLOP/s, one panel for each number of threads, under the two ceilings of that run. The PNG is written beside the CSV.
"""

import argparse
import csv
import functools
from pathlib import Path

BACKENDS = {  # name in the rows: (name in the picture, color, marker)
    "cpu": ("hdit_kernels", "#1f6fb4", "o"),
    "shifted products": ("shifted products, compiled", "#e08214", "s"),
    "tiled SDPA": ("tiled SDPA, compiled", "#1a9850", "D"),
    "FlexAttention": ("FlexAttention, compiled", "#8c5ba8", "^"),
    "compiled reference": ("reference, compiled", "#7f7f7f", "P"),
    "reference": ("reference, eager", "#b0b0b0", "X"),
}
OURS = "cpu"
DIRECTIONS = {"forward": "full", "forward+backward": "bottom"}  # how markers are filled
BESIDE = {64: 0.96, 128: 1.0, 256: 1.04}  # sizes have one intensity: they are drawn side by side


def last_run(path: Path) -> list[dict]:
    """The attention rows in float32 that share date and commit with the newest, with what the picture needs as numbers.

    ValueError where there are none.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "attention" in row["case"] and row.get("gflop_s")]
    rows = [row for row in rows if row["dtype"] == "float32" and row["peak_gflop_s"] and row["backend"] in BACKENDS]
    if not rows:
        raise ValueError(f"{path} has no rows of attention in float32 with a peak: run pytest benchmarks first")
    newest = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if (row["date"], row["commit"]) == (newest["date"], newest["commit"])]
    numbers = ("threads", "gflop_s", "gb_s", "copy_gb_s", "peak_gflop_s", "ms")
    return [row | {name: float(row[name]) for name in numbers} for row in rows]


def side(row) -> int:
    """Tokens a side: 64 of "neighborhood_attention_qkvpacked[64x64x2x64 k7]"."""
    return int(row["case"].partition("[")[2].partition("x")[0])


def panel(axes, rows: list[dict]) -> None:
    peak, copy = rows[0]["peak_gflop_s"], rows[0]["copy_gb_s"]
    at = {row["direction"]: row["gflop_s"] / row["gb_s"] for row in rows}  # the same for all sizes
    low, high = min(peak / copy, *at.values()) / 1.8, max(peak / copy, *at.values()) * 1.8
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_ylim(min(row["gflop_s"] for row in rows) / 2.2, peak * 1.7)
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color="0.25", linewidth=1.5)
    note = functools.partial(axes.annotate, textcoords="offset points", fontsize=8.5, color="0.25")
    note(f"multiply-adds in registers: {peak:.0f} GFLOP/s", (high, peak), (-2, 4), ha="right")
    note(f"copy: {copy:.1f} GB/s", (low, low * copy), (10, -2), va="top")
    for row in rows:
        name, color, marker = BACKENDS[row["backend"]]
        place = at[row["direction"]] * BESIDE.get(side(row), 1.0), row["gflop_s"]
        axes.plot(*place, marker, color=color, label=name, fillstyle=DIRECTIONS[row["direction"]],
                  markerfacecoloralt="white", markersize=8 if row["backend"] == OURS else 6)  # fmt: skip
        if row["backend"] == OURS:
            note(f"{100 * row['gflop_s'] / peak:.0f} %", place, (0, -8), rotation=90, ha="center", va="top")
    for direction, side_of in zip(sorted(at, key=at.get), ("right", "left"), strict=False):
        note(direction.replace("+", " + "), (at[direction], axes.get_ylim()[0]), (0, 5), ha=side_of)
    axes.set_xticks(ticks := [t for t in (2, 5, 10, 20, 50) if low < t < high], [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    threads = int(rows[0]["threads"])
    axes.set_title(f"{threads} thread{'s' * (threads > 1)}", loc="left", weight="bold", fontsize=12)


def draw(path: Path) -> Path:
    """The picture of the CSV file `path`, beside it."""
    rows = last_run(path)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    threads = sorted({row["threads"] for row in rows})
    figure, grid = plt.subplots(1, len(threads), figsize=(5.6 * len(threads), 5.2), layout="constrained", squeeze=False)
    for axes, count in zip(grid[0], threads, strict=True):
        panel(axes, [row for row in rows if row["threads"] == count])
    handles = {}
    for axes in grid[0]:
        found, labels = axes.get_legend_handles_labels()
        handles |= {label: handle for label, handle in zip(labels, found, strict=True) if label not in handles}
    names = [name for name, _, _ in BACKENDS.values() if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=3, frameon=False)
    row = rows[0]
    figure.suptitle(
        f"7×7 neighborhood attention with cosine similarity and RoPE, 2 heads of 64, float32\n"
        f"{row['device']}, torch {row['torch']}, {row['date']}, {row['commit']}; "
        "64², 128², 256² tokens side by side; half-filled: forward + backward; %: of the peak",
        x=0.02, ha="left", fontsize=9.5,
    )  # fmt: skip
    target = path.with_name(path.stem.replace("ops", "roofline") + ".png")
    figure.savefig(target, dpi=100, facecolor="white")
    plt.close(figure)
    return target


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files"
    )
    folder = parser.parse_args(arguments).results
    paths = sorted(folder.glob("ops_*.csv"), key=lambda path: path.stat().st_mtime)
    if not paths:
        parser.error(f"{folder} has no ops_*.csv: run pytest benchmarks first")
    try:
        print(draw(paths[-1]))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""What a training run leaves to look at: one JSON line per step, and its loss curve."""

import json
from pathlib import Path

from .files import replacing


class Log:
    """metrics.jsonl: one line per optimizer step, also across resumptions.

    A killed run may have written lines after its last checkpoint, or half a line: `cut` drops them, since the resumed
    run takes those steps again.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def cut(self, step: int) -> None:
        """Keep the first ``step`` steps."""
        kept = [entry for entry in read(self.path) if entry["step"] < step] if self.path.is_file() else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, entries: list[dict]) -> None:
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def read(path: str | Path) -> list[dict]:
    """The entries of a metrics.jsonl; a half line at its end, of a killed run, is left out."""
    entries = []
    for line in Path(path).read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
    return entries


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of the last ``window`` values, fewer at the beginning."""
    sums, result = [0.0], []
    for value in values:
        sums.append(sums[-1] + value)
    for i in range(len(values)):
        first = max(0, i + 1 - window)
        result.append((sums[i + 1] - sums[first]) / (i + 1 - first))
    return result


def curve(axes, folder: Path) -> None:
    """Loss against step of a run: every step, and smoothed."""
    entries = read(folder / "metrics.jsonl")
    losses, at = [entry["loss"] for entry in entries], [entry["step"] for entry in entries]
    window = max(1, len(losses) // 50)
    (line,) = axes.plot(at, smoothed(losses, window), label=f"loss, mean of {window} steps", zorder=2)
    axes.plot(at, losses, color=line.get_color(), alpha=0.2, linewidth=0.6, zorder=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def overview(folder: Path, path: str | Path, title: str = "") -> None:
    """One picture of a run: its loss, real images, and samples of its last grid."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    last = max(folder.glob("samples/step-*.png"))
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    loss, real, samples = figure.subplots(1, 3)
    curve(loss, folder)
    loss.set_title(title)
    for axes, file, name in ((real, folder / "samples/real.png", "images"), (samples, last, f"samples, {last.stem}")):
        axes.imshow(imread(file), interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")

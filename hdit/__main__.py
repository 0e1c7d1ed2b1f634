"""The command line: hdit train | sample | evaluate | export | flops | scaling | schedules | info, each with --help.

What a user can get wrong (an option, a name, a file, a missing package) ends with one line on stderr and exit code 2.
"""

import contextlib
import csv
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from . import configs, flops, models, train
from .data import UnreadableImage
from .evaluate import Evaluate
from .export import Export
from .sample import Sample
from .scaling import Scaling
from .schedule_plots import Schedules


@dataclass
class Flops:
    """Multiply-adds of HDiT-B/4 and the pixel DiT-B/4 at 128² to 1024², as in the HDiT paper, or of one configuration.

    1 MAC = 2 FLOP; the paper prints GMAC as GFLOP. Counted on the meta device: nothing is computed.
    """

    config: str | None = None
    """Name of a published configuration, counted by kind of operation and by level; an unknown name lists them."""
    height: int | None = None
    """Pixels; the resolution that the configuration was made for, unless given."""
    width: int | None = None
    """Pixels, as height."""
    csv: Path | None = None
    """Also write the counts to this file: model, height, width, part (total, kind or level), name, macs."""

    def run(self):
        if self.csv is not None and not self.csv.parent.is_dir():
            raise ValueError(f"csv {self.csv} lies in no existing folder")
        if self.config is None:
            if self.height is not None or self.width is not None:
                raise ValueError(
                    f"height {self.height} and width {self.width} need --config, a published configuration"
                )
            print(flops.main_table())
        else:
            counts = [(self.config, *self._count())]
        if self.csv is not None:
            if self.config is None:
                models_ = ("dit", "hdit")
                counts = [(name, row.side, row.side, getattr(row, name)) for row in flops.rows() for name in models_]
            with self.csv.open("w", newline="") as file:
                csv.writer(file).writerows(long_rows(counts))

    def _count(self) -> tuple[int, int, flops.Flops]:
        """Count the named configuration and print it."""
        found = configs.get(self.config)
        height = found.resolution[0] if self.height is None else self.height
        width = found.resolution[1] if self.width is None else self.width
        for name, side in (("height", height), ("width", width)):
            if side < 1:
                raise ValueError(f"{name} must be positive, got {side}")
        model = models.from_config(found.config)
        counted = flops.count(model, height, width)
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{self.config}: {parameters:,} parameters, {height} x {width} pixels, one forward pass (1 MAC = 2 FLOP)\n"
        )
        for part, macs in (("kind", counted.by_kind), ("level", counted.by_level)):
            lines = [[name, f"{n / 1e9:,.3f}", f"{n / counted.macs:.1%}"] for name, n in macs.items()]
            print(
                flops.table([part, "GMAC", "share"], [*lines, ["total", f"{counted.macs / 1e9:,.3f}", "100.0%"]]) + "\n"
            )
        return height, width, counted


def long_rows(counts: list[tuple[str, int, int, flops.Flops]]):
    """Header and rows of the CSV, one number a row."""
    yield "model", "height", "width", "part", "name", "macs"
    for model, height, width, counted in counts:
        yield model, height, width, "total", "total", counted.macs
        for part, macs in (("kind", counted.by_kind), ("level", counted.by_level)):
            for name, number in macs.items():
                yield model, height, width, part, name, number


@dataclass
class Info:
    """Versions, processor features, and every op and backend: present, or the reason why not."""

    check: bool = False
    """Compare every present backend with the float64 reference on this machine."""

    def run(self):
        from hdit_kernels import info

        return info.main(["--check"] if self.check else [])


COMMANDS = {
    "train": train.command(),
    "sample": Sample,
    "evaluate": Evaluate,
    "export": Export,
    "flops": Flops,
    "scaling": Scaling,
    "schedules": Schedules,
    "info": Info,
}


def parse(arguments: list[str] | None):
    """The command with its options. Raises ValueError with tyro's complaint in one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="hdit")
    except SystemExit as ending:
        if ending.code in (0, None):
            raise
        # tyro draws a title, the complaint, a rule, hints; in a box, or in ASCII with a rule below the title.
        drawn = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue()).splitlines()[1:]
        sections = [[]]
        for line in (line.strip("│╭╮╰╯|+ ") for line in drawn):
            if line.strip("─-"):
                sections[-1].append(line)
            elif line:
                sections.append([])
        sentence = " ".join(next(lines for lines in sections if lines)).split(". Got errors")[0].rstrip(".")
        raise ValueError(f"{sentence}; see hdit --help") from None


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 for what the user can put right, 130 when stopped by ^C."""
    try:
        return parse(arguments).run() or 0
    except (ValueError, UnreadableImage, ModuleNotFoundError, OSError, FloatingPointError) as error:
        print(f"hdit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hdit: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark shares: the machine's two ceilings, one way to time, one table.

Run `pytest benchmarks/ --benchmark-only` (or a part of it with `-k`). The ceilings, the copy bandwidth and the matmul
rate, are measured first; a row's floor is what its bytes and multiply-adds cost at these rates. Rows go to
`benchmarks/results/` (or `--results DIR`) with device, date and commit; a row of the same machine and case is replaced.
"""

import csv
import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 0.6  # spent on one measurement at least, if it takes more than three rounds
KEY = ("device", "threads", "what", "case", "direction", "dtype", "backend")
COLUMNS = (*KEY, "ms", "floor_ms", "times_floor", "bound", "times_reference", "times_compiled", "images_per_s",
           "copy_gb_s", "matmul_gflop_s", "torch", "date", "commit")  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--results", default=str(HERE / "results"), help="folder for the CSV files of results")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # one table, ours, in place of pytest-benchmark's
    config.rows = []


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call, rounds: int = 5) -> float:
    """Median of some rounds, for the ceilings."""
    times = []
    call()
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Ceilings:
    """Bytes per second of a large copy (read + written), and FLOP per second of a large matmul, by dtype."""

    def __init__(self):
        source = torch.empty(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE).fill_(1)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.numel() / seconds(lambda: target.copy_(source))
        self.flop_per_s = {}
        for dtype in (torch.float32, torch.bfloat16):
            n = 8192 if DEVICE == "cuda" else 1536
            a = torch.randn(n, n, device=DEVICE, dtype=dtype)
            b = torch.randn(n, n, device=DEVICE, dtype=dtype)
            self.flop_per_s[dtype] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b)

    def floor(self, size: float, flops: float, dtype) -> tuple[float, str]:
        """(seconds, which of the two binds)"""
        return max((size / self.bytes_per_s, "copy"), (flops / self.flop_per_s[dtype], "matmul"))


@pytest.fixture(scope="session")
def ceilings():
    return Ceilings()


@pytest.fixture
def record(request, benchmark, ceilings):
    """record(what, case, direction, dtype, backend, call, bytes, flops): time `call` and keep the row."""

    def record(what, case, direction, dtype, backend, call, *, size=0.0, flops=0.0, images=None):
        start = time.perf_counter()
        call()
        synchronize()
        once = time.perf_counter() - start  # with compilation and first touches
        start = time.perf_counter()
        call()
        synchronize()
        once = min(once, time.perf_counter() - start)
        iterations = max(1, round(1e-3 / once))
        rounds = max(3, min(200, int(SECONDS / (once * iterations))))

        def synchronized():
            call()
            synchronize()

        benchmark.pedantic(synchronized, rounds=rounds, iterations=iterations, warmup_rounds=0)
        median = benchmark.stats.stats.median
        floor, bound = ceilings.floor(size, flops, dtype)
        request.config.rows.append(
            dict(
                device=device_name(),
                threads=torch.get_num_threads() if DEVICE == "cpu" else "",
                what=what,
                case=case,
                direction=direction,
                dtype=str(dtype).removeprefix("torch."),
                backend=backend,
                ms=f"{1e3 * median:.6g}",
                floor_ms=f"{1e3 * floor:.4g}",
                times_floor=f"{median / floor:.2f}",
                bound=bound,
                images_per_s=f"{images / median:.3f}" if images else "",
                copy_gb_s=f"{ceilings.bytes_per_s / 1e9:.1f}",
                matmul_gflop_s=f"{ceilings.flop_per_s[dtype] / 1e9:.0f}",
                torch=torch.__version__,
                date=datetime.date.today().isoformat(),
                commit=commit(),
            )
        )

    return record


def compare(rows) -> None:
    """Each row's speed as a multiple of the reference's and of the compiled reference's, in the same run."""
    group = lambda row: tuple(row[k] for k in KEY if k != "backend")  # noqa: E731
    ms = {(*group(row), row["backend"]): float(row["ms"]) for row in rows}
    for row in rows:
        for column, peer in ("times_reference", "reference"), ("times_compiled", "compiled reference"):
            other = ms.get((*group(row), peer))
            row[column] = f"{other / float(row['ms']):.2f}" if other else ""


def write(rows, folder: Path) -> list[Path]:
    """Merge the rows into one CSV for each kind of benchmark and device; the file is replaced whole or not at all."""
    paths = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        name = re.sub(r"[^a-z0-9]+", "-", mine[0]["device"].lower()).strip("-")
        path = folder / f"{what}_{name}.csv"
        merged = {}
        if path.exists():
            with path.open(newline="") as file:
                merged = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
        merged |= {tuple(str(row[k]) for k in KEY): row for row in mine}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(merged.values())
        temporary.replace(path)
        paths.append(path)
    return paths


def pytest_terminal_summary(terminalreporter, config):
    rows = config.rows
    if not rows:
        return
    compare(rows)
    first = rows[0]
    threads = f", {first['threads']} threads" if first["threads"] else ""
    rates = dict((row["dtype"], f"{row['dtype']} {row['matmul_gflop_s']} GFLOP/s") for row in rows)
    say = terminalreporter.write_line
    rates = f"copy {first['copy_gb_s']} GB/s, matmul {', '.join(rates.values())}"
    say(f"\n{first['device']}{threads}, torch {first['torch']}; {rates}")
    say("× floor: time over bytes/copy or FLOP/matmul (below 1: the data fit in cache). × reference, × compiled: how")
    say("many times faster than the eager PyTorch reference and than torch.compile of it, in this run.\n")
    columns = (
        "case",
        "direction",
        "dtype",
        "backend",
        "ms",
        "times_floor",
        "times_reference",
        "times_compiled",
        "images_per_s",
    )
    head = [name.replace("times_", "× ").replace("images_per_s", "images/s") for name in columns]
    lines = [head, *([row[name] for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        say("  ".join(cells).rstrip())
    for path in write(rows, Path(config.getoption("--results"))):
        say(f"written: {path}")

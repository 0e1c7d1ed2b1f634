"""What every benchmark shares: the machine's ceilings, one way to time, one table.

Run `pytest benchmarks/ --benchmark-only` (or a part of it with `-k`). The ceilings are measured in the same run, for
each number of threads: bandwidth of a large copy, rate of a large matmul, and, on a CPU, the peak of multiply-adds in
registers. A row's floor is what its bytes and multiply-adds cost at the first two. Rows go to `benchmarks/results/` (or
`--results DIR`) with device, date and commit; a row of the same machine and case is replaced.
"""

import csv
import datetime
import functools
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

from hdit_kernels import extension

HERE = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 0.4  # spent on one measurement at least, if it takes more than three rounds
ALL_THREADS = torch.get_num_threads()
THREADS = sorted({1, ALL_THREADS}) if DEVICE == "cpu" else [ALL_THREADS]
OURS = ("cpu", "triton", "cuda", "ours", "compiled ours")
KEY = ("device", "threads", "what", "case", "direction", "dtype", "backend")
COLUMNS = (*KEY, "ms", "floor_ms", "times_floor", "bound", "times_reference", "times_compiled", "times_best_peer",
           "gflop_s", "percent_peak", "gb_s", "percent_copy", "peak_memory_mb", "images_per_s",
           "copy_gb_s", "matmul_gflop_s", "peak_gflop_s", "torch", "date", "commit")  # fmt: skip
PRINTED = {"case": "case", "direction": "direction", "dtype": "dtype", "threads": "threads", "backend": "backend",
           "ms": "ms", "times_floor": "× floor", "times_reference": "× reference", "times_compiled": "× compiled",
           "times_best_peer": "× best peer", "gflop_s": "GFLOP/s", "percent_peak": "% peak", "percent_copy": "% copy",
           "peak_memory_mb": "MB", "images_per_s": "images/s"}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--results", default=str(HERE / "results"), help="folder for the CSV files of results")


def pytest_configure(config):
    config.option.benchmark_quiet = True  # one table, ours, in place of pytest-benchmark's
    config.rows = []
    config.left_out = {}


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = processor.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or "cpu family" not in processor:
        return name
    return f"{name} family {processor['cpu family']} model {processor['model']}"  # a virtual machine hides the number


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
    """With PyTorch's present number of threads: bytes per second of a large copy (read + written); FLOP per second of a
    large matmul, by dtype, and of multiply-adds in registers (0 where that is not measured)."""

    def __init__(self):
        source = torch.empty(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE).fill_(1)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.numel() / seconds(lambda: target.copy_(source))
        self.flop_per_s, self.peak = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            n = 8192 if DEVICE == "cuda" else 1536
            a = torch.randn(n, n, device=DEVICE, dtype=dtype)
            b = torch.randn(n, n, device=DEVICE, dtype=dtype)
            self.flop_per_s[dtype] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b)
            self.peak[dtype] = peak_flops(dtype)

    def floor(self, size: float, flops: float, dtype) -> tuple[float, str]:
        """(seconds, which of the two binds)"""
        return max((size / self.bytes_per_s, "copy"), (flops / self.flop_per_s[dtype], "matmul"))


def peak_flops(dtype) -> float:
    """Of the multiply-add that computes fastest in dtype: where the CPU has no dot product of bfloat16, float32's."""
    if DEVICE != "cpu" or extension.module is None:
        return 0.0
    rates = (extension.module.cpu.peak_flops(name, torch.get_num_threads()) for name in ("float32", "bfloat16"))
    return dict(zip((torch.float32, torch.bfloat16), rates, strict=True))[dtype] or peak_flops(torch.float32)


@pytest.fixture(scope="session")
def ceilings():
    """ceilings(threads): measured once, with that many threads in use."""
    return functools.cache(lambda threads: Ceilings())


@pytest.fixture
def threads(request):
    """PyTorch uses as many during the row."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def record(request, benchmark, ceilings):
    """record(what, case, direction, dtype, backend, call, …): time `call` and keep the row. size: bytes that must move;
    flops: of products; images: per call; memory: peak bytes of a call."""

    def record(what, case, direction, dtype, backend, call, *, size=0.0, flops=0.0, images=None, memory=None):
        limits = ceilings(torch.get_num_threads())
        median = timed(benchmark, call)
        floor, bound = limits.floor(size, flops, dtype)
        text = lambda value, style: f"{value:{style}}" if value else ""  # noqa: E731
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
                gflop_s=text(flops / median / 1e9, ".4g"),
                percent_peak=text(limits.peak[dtype] and 100 * flops / median / limits.peak[dtype], ".1f"),
                gb_s=text(size / median / 1e9, ".4g"),
                percent_copy=text(100 * size / median / limits.bytes_per_s, ".1f"),
                peak_memory_mb=text(memory and memory / 1e6, ".1f"),
                images_per_s=text(images and images / median, ".3f"),
                copy_gb_s=f"{limits.bytes_per_s / 1e9:.1f}",
                matmul_gflop_s=f"{limits.flop_per_s[dtype] / 1e9:.0f}",
                peak_gflop_s=text(limits.peak[dtype] / 1e9, ".1f"),
                torch=torch.__version__,
                date=datetime.date.today().isoformat(),
                commit=commit(),
            )
        )

    return record


def timed(benchmark, call) -> float:
    """Median seconds of a call, after two that are not counted: the first may compile."""

    def synchronized():
        call()
        synchronize()

    synchronized()
    start = time.perf_counter()
    synchronized()
    once = time.perf_counter() - start
    iterations = max(1, round(1e-3 / once))
    rounds = max(3, min(200, int(SECONDS / (once * iterations))))
    benchmark.pedantic(synchronized, rounds=rounds, iterations=iterations, warmup_rounds=0)
    return benchmark.stats.stats.median


def compare(rows) -> None:
    """Each row's speed as a multiple of the reference's, of the compiled reference's and of the fastest one's that is
    not ours, in the same run."""
    group = lambda row: tuple(row[k] for k in KEY if k != "backend")  # noqa: E731
    ms = {(*group(row), row["backend"]): float(row["ms"]) for row in rows}
    best = {}
    for row in rows:
        if row["backend"] not in OURS:
            best[group(row)] = min(float(row["ms"]), best.get(group(row), float("inf")))
    for row in rows:
        peers = [ms.get((*group(row), name)) for name in ("reference", "compiled reference")] + [best.get(group(row))]
        for column, other in zip(("times_reference", "times_compiled", "times_best_peer"), peers, strict=True):
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
    rows, say = config.rows, terminalreporter.write_line
    if not rows:
        return
    compare(rows)
    say(f"\n{rows[0]['device']}, torch {rows[0]['torch']}")
    for threads in dict.fromkeys(row["threads"] for row in rows):
        mine = {row["dtype"]: row for row in rows if row["threads"] == threads}
        rates = [f"{d}: matmul {row['matmul_gflop_s']}, peak {row['peak_gflop_s'] or '-'}" for d, row in mine.items()]
        copy = next(iter(mine.values()))["copy_gb_s"]
        say(f"threads {threads or '-'}: copy {copy} GB/s; {'; '.join(rates)} GFLOP/s")
    say("× floor: time over bytes/copy or FLOP/matmul (below 1: the data fit in cache). × reference, × compiled,")
    say("× best peer: how many times faster than the eager PyTorch reference, torch.compile of it, and the fastest row")
    say("that is not ours, in this run. % peak: of multiply-adds in registers, in the row's dtype. % copy: of a large")
    say("copy, counting the bytes that must move. MB: peak memory of a call above what was in use.\n")
    names = [name for name in PRINTED if name in KEY or any(row[name] for row in rows)]
    lines = [[PRINTED[name] for name in names], *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        cells = (c.ljust(w) if n in KEY else c.rjust(w) for n, c, w in zip(names, line, widths, strict=True))
        say("  ".join(cells).rstrip())
    for why in config.left_out:
        say(f"not timed: {why}")
    for path in write(rows, Path(config.getoption("--results"))):
        say(f"written: {path}")

"""What HDiT and a pixel DiT cost as the image grows: FLOPs, time, peak memory and images per second.

FLOPs are counted for the published sizes, up to 4096 x 4096. Time and memory are measured with narrower models, because
a CPU must afford them: one image (or batch) of real photographs, noised, through the preconditioned denoiser. Every
point runs in a process of its own, so that its peak memory is its own and running out of memory ends only that point.
"""

import csv
import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import hdit_kernels

from . import data, flops
from .diffusion.preconditioning import Denoiser
from .files import replacing
from .models.dit import DiT, DiTConfig
from .models.hdit import Global, HDiT, HDiTConfig, Level
from .scaling_plots import draw, fit

SIGMAS = tuple(float(s) for s in torch.logspace(-2, 1.903, 8, dtype=torch.float64))  # 0.01 to 80, one after the other
COUNTED_RESOLUTIONS = (128, 256, 512, 1024, 2048, 4096)
OK, OUT_OF_MEMORY, OVER_BUDGET = "ok", "out of memory", "over budget"
MEMORY = "peak_memory_minus_memory_before_model_ran_bytes"
# fmt: off
COLUMNS = (
    "settings", "model", "resolution", "pixels", "status", "seconds_per_image", "images_per_second", MEMORY,
    "flops_per_image", "passes", "wall_seconds", "pass_kind", "batch", "dtype", "device", "threads", "backend", "torch",
    "date", "memory_kind", "architecture", "photographs", "note",
)
# fmt: on
TEXT = ("settings", "torch", "date", "device")  # read as they stand, also where they look like a number


# What is timed: narrow enough for a CPU. Local levels are added as the image grows (HDiTConfig.for_resolution), so that
# HDiT's innermost, global level keeps about 16 x 16 tokens. Patches of 4 x 4 pixels, 7 x 7 neighborhoods, heads of 64.
LOCAL, INNER = Level(1, 64), Level(2, 128, attention=Global())
DIT = DiTConfig(depth=2, width=128, heads=2)


def config(model: str, side: int) -> HDiTConfig | DiTConfig:
    """Of the timed "hdit" or "dit" for side x side pixels. ValueError for a side that HDiT's levels cannot halve."""
    if model == "dit":
        return DIT
    return HDiTConfig.for_resolution(side, side, local=LOCAL, inner=INNER, mapping_width=128, mapping_depth=1)


def describe(config: HDiTConfig | DiTConfig) -> str:
    """Depths and widths in words."""
    if isinstance(config, DiTConfig):
        return f"{config.depth} layers of width {config.width}"
    outer, inner = config.levels[0], config.levels[-1]
    local = f"local levels of {outer.depth} + {outer.depth} layers, width {outer.width}; " if outer != inner else ""
    return f"{local}global level of {inner.depth} layers, width {inner.width}"


@dataclass
class Scaling:
    """Cost of HDiT and DiT over resolutions: FLOPs, time, memory, images per second; CSV, PNG and SVG.

    A sweep that was stopped continues where it was: points measured with the same settings are not measured again.
    """

    resolutions: tuple[int, ...] = (64, 128, 256, 384, 512, 1024)
    """Sides of the square images, in pixels."""
    models: tuple[Literal["hdit", "dit"], ...] = ("hdit", "dit")
    """Which models to measure."""
    train: bool = False
    """Time forward and backward of the loss instead of the denoiser's forward pass."""
    device: str = "cpu"
    """A torch device: cpu, cuda, cuda:1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs under autocast."""
    batch: int = 1
    """Images per pass."""
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)
    """CPU threads."""
    repeats: int = 3
    """Timed passes after a warm-up, at least; more, up to 50, until they fill one second. The median is reported."""
    images: tuple[str, ...] = tuple(data.SAMPLES)
    """Names of sample photographs (pip install 'hdit[demo]'), or one image folder."""
    budget_minutes: float = 2.5
    """No point is started that is predicted to end after this time, and none runs past it."""
    memory_limit_gb: float | None = None
    """Memory that a point may take beyond what its process holds before the model runs (GB of 1e9 bytes)."""
    output: Path = Path("runs/scaling")
    """Folder of scaling.csv, flops.csv and the plots."""
    plot_only: bool = False
    """Draw the newest settings in the CSV files again and measure nothing."""

    def check(self):
        """Raises ValueError, one sentence, for fields that cannot be measured."""
        for name in ("batch", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("resolutions", "models", "images"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        for name in ("budget_minutes", "memory_limit_gb"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for side in self.resolutions:
            if "hdit" in self.models:
                config("hdit", side)  # refuses a side that its levels cannot halve
            if side < 16 or side % 4:
                raise ValueError(f"resolutions must be multiples of 4, 16 at least, got {side}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not available: this torch sees no CUDA device")

    def source(self) -> str | tuple[str, ...]:
        """What ``data.photographs`` takes: the folder, or the names."""
        is_folder = len(self.images) == 1 and self.images[0] not in data.SAMPLES
        return self.images[0] if is_folder else self.images

    def facts(self) -> dict:
        """Everything that a measured number depends on, but the model and the resolution."""
        names = ("train", "batch", "dtype", "threads", "repeats", "images", "memory_limit_gb")
        return {name: getattr(self, name) for name in names} | {
            "device": device_name(self.device),
            "backend": hdit_kernels.available_backends("neighborhood_attention", self.device)[0],
            "torch": torch.__version__,
            "models": [str(part) for part in (LOCAL, INNER, DIT)],
        }

    def run(self):
        """Measure what is missing, then draw. Raises ValueError for fields, photographs or CSV files it cannot use."""
        self.check()
        if not self.plot_only:
            self.output.mkdir(parents=True, exist_ok=True)
            data.photographs(self.source())  # an unreadable file, a missing package: said before any work
            write_csv(self.output / "flops.csv", count_flops())
            sweep(self)
        for path in draw(self.output):
            print(path)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), platform.processor())


# ---- The sweep ------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file that this module wrote; numbers as numbers, empty fields as None."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: move it away")
        return [{key: _value(key, text) for key, text in row.items()} for row in reader]


def _value(column: str, text: str) -> int | float | str | None:
    for kind in () if column in TEXT else (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def write_csv(path: Path, rows: list[dict]):
    """Replace ``path`` in one step: whoever is killed leaves the old file or the new one, never a half."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def sweep(scaling: Scaling):
    """Measure, small images first, what ``scaling.csv`` lacks for these settings, and write each row at once."""
    path, facts, start = scaling.output / "scaling.csv", scaling.facts(), time.monotonic()
    settings = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    rows = read_csv(path)
    points = [(side, model) for side in sorted(set(scaling.resolutions)) for model in scaling.models]
    with tqdm(points, unit="point") as bar:
        for side, model in bar:
            same = [r for r in rows if (r["settings"], r["model"]) == (settings, model)]
            if any(r["resolution"] == side and r["status"] != OVER_BUDGET for r in same):
                continue
            left = scaling.budget_minutes * 60 - (time.monotonic() - start)
            predicted = predict_wall_seconds(same, side, scaling.repeats)
            bar.set_description(f"{model} {side}x{side}, about {predicted:.0f} s of {max(left, 0):.0f} s left")
            if predicted > left or left <= 0:
                result = {"status": OVER_BUDGET, "note": f"predicted {predicted:.0f} s, {max(left, 0):.0f} s left"}
            else:
                result = run_measurement(scaling, model, side, timeout=left)
            row = {"settings": settings, "model": model, "resolution": side, "pixels": side**2}
            row |= {"pass_kind": "forward and backward" if scaling.train else "forward"}
            row |= {k: facts[k] for k in ("batch", "dtype", "device", "threads", "backend", "torch")}
            row |= {"date": time.strftime("%Y-%m-%d"), "architecture": describe(config(model, side))}
            row |= {"photographs": " ".join(scaling.images)}
            kept = [r for r in rows if (r["settings"], r["model"], r["resolution"]) != (settings, model, side)]
            rows = [*kept, row | result]
            write_csv(path, rows)


def predict_wall_seconds(rows: list[dict], side: int, repeats: int) -> float:
    """How long the point ``side`` will take, from the measured ``rows`` of the same model; 0 without any.

    A pass takes longer by the exponent of the two largest measured points, by 1 at least; starting the process and
    building the model take the median of what they took.
    """
    done = sorted((row for row in rows if row["status"] == OK), key=lambda row: row["pixels"])
    if not done:
        return 0.0
    exponent = 1.0
    if len(done) > 1:
        exponent = max(1.0, fit([r["pixels"] for r in done[-2:]], [r["seconds_per_image"] for r in done[-2:]])[0])
    startup = statistics.median(
        r["wall_seconds"] - (1 + r["passes"]) * r["seconds_per_image"] * r["batch"] for r in done
    )
    seconds = done[-1]["seconds_per_image"] * done[-1]["batch"] * (side**2 / done[-1]["pixels"]) ** exponent
    return max(startup, 0.0) + (1 + repeats) * seconds


def run_measurement(scaling: Scaling, model: str, side: int, timeout: float) -> dict:
    """``measure`` in a process of its own. The process ends itself when its standard input closes, so it does not
    outlive a sweep that is killed. Raises RuntimeError with the process's last line where it failed otherwise."""
    order = dataclasses.asdict(scaling) | {"output": None, "source": scaling.source()}
    command = f"from hdit import scaling; scaling.serve_measurement({model!r}, {side}, {json.dumps(order)!r})"
    start, (lifeline, our_end) = time.monotonic(), os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdin=lifeline, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(lifeline)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": OVER_BUDGET, "note": f"stopped after {timeout:.0f} s"}
    finally:
        os.close(our_end)
        process.kill()
        process.wait()
    return outcome(process.returncode, stdout, stderr) | {"wall_seconds": time.monotonic() - start}


def outcome(returncode: int, stdout: str, stderr: str) -> dict:
    """The row that a measuring process printed, or "out of memory" where the system killed it (SIGKILL)."""
    if returncode == 0:
        return json.loads(stdout.splitlines()[-1])
    if returncode == -9:
        return {"status": OUT_OF_MEMORY, "note": "killed by the system (signal 9)"}
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    raise RuntimeError(f"the measuring process ended with code {returncode}: {last}")


def count_flops() -> list[dict]:
    """Rows of flops.csv: 2 FLOPs per multiply-add of one image through the published sizes B/4."""
    rows = []
    for counted in flops.rows(COUNTED_RESOLUTIONS):
        side = counted.side
        configs = {"hdit": HDiTConfig.for_resolution(side, side), "dit": DiTConfig.of_size("B")}
        for model, what in configs.items():
            row = {"settings": "published", "model": model, "resolution": side, "pixels": side**2, "status": OK}
            row |= {"flops_per_image": 2 * getattr(counted, model).macs, "architecture": describe(what)}
            rows.append(row)
    return rows


# ---- One point, in its own process ----------------------------------------------------------------------------------


def serve_measurement(model: str, side: int, order: str):
    """Entry of the measuring process: print the row as one line of JSON; end when standard input closes."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    order = json.loads(order)
    try:
        result = measure(model, side, order)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        result = {"status": OUT_OF_MEMORY, "note": str(error).splitlines()[0][:120] if str(error) else "MemoryError"}
    print(json.dumps(result), flush=True)


def measure(model: str, side: int, order: dict) -> dict:
    """Time, peak memory and the forward pass's FLOPs of ``model`` at side x side, as CSV columns. ``order``: Scaling's
    fields, and its source of photographs."""
    device, batch = torch.device(order["device"]), order["batch"]
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    images = torch.stack(list(data.photographs(order["source"], side, side).values())).to(device)
    network = without_zeros(DiT(DIT) if model == "dit" else HDiT(config(model, side)))
    result = {"flops_per_image": 2 * flops.count(network, side, side).macs}
    denoiser = Denoiser(network.to(device))

    def inputs(number):
        """The batch of pass ``number``: photographs and noise levels take turns."""
        turn = [number * batch + i for i in range(batch)]
        sigma = torch.tensor([SIGMAS[t % len(SIGMAS)] for t in turn], device=device)
        clean = images[[t % len(images) for t in turn]]
        return clean, torch.randn_like(clean), sigma

    def forward(clean, noise, sigma):
        return denoiser(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)

    def forward_backward(clean, noise, sigma):
        denoiser.loss(clean, noise, sigma).mean().backward()

    step = forward_backward if order["train"] else forward
    denoiser.train(order["train"])
    first = inputs(0)
    before = start_memory(device, order["memory_limit_gb"])
    with (
        torch.set_grad_enabled(order["train"]),
        torch.autocast(device.type, torch.bfloat16, order["dtype"] == "bfloat16"),
    ):
        step(*first)
        seconds = []
        while len(seconds) < order["repeats"] or (len(seconds) < 50 and sum(seconds) < 1):
            seconds.append(timed(step, inputs(1 + len(seconds)), device))
    median = statistics.median(seconds) / batch
    result |= {"status": OK, "seconds_per_image": median, "images_per_second": 1 / median, "passes": len(seconds)}
    kind = "torch.cuda.max_memory_allocated" if device.type == "cuda" else "resident set"
    return result | {MEMORY: peak_memory(device) - before, "memory_kind": kind}


def without_zeros(network: torch.nn.Module) -> torch.nn.Module:
    """Small random weights where the network starts with zeros: a GPU multiplies zeros at a higher clock."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network


def timed(step, arguments, device) -> float:
    """Seconds of step(*arguments); on a GPU between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        step(*arguments)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def start_memory(device, limit_gb: float | None) -> int:
    """Bytes in use now; forget the peak so far, and let an allocation beyond ``limit_gb`` more than now fail."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        now = torch.cuda.memory_allocated(device)
        if limit_gb is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (now + limit_gb * 1e9) / total), device)
        return now
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts again from what is resident now
    if limit_gb is not None:
        import resource  # POSIX only, and only where a limit is asked for

        data_now = _proc_status("VmData") if sys.platform == "linux" else 0
        resource.setrlimit(resource.RLIMIT_DATA, (data_now + int(limit_gb * 1e9),) * 2)
    return peak_memory(device)


def peak_memory(device) -> int:
    """Bytes at the highest since ``start_memory`` (Linux, CUDA) or since the process started (elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # not getrusage: its peak is inherited from the process that started this one
        return _proc_status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

"""Counts what each CUDA kernel asks of an H200's pipes and predicts its time; no GPU is needed.

    python -m benchmarks.counters [--only TEXT] [--lines] [--results [DIR]]      # `make counters`

Each case is run once by the emulation (csrc/emulation.h), on one item of its batch, and counted: distinct sectors of
memory (DRAM), sectors asked for (L2), wavefronts of shared memory with their bank conflicts and shuffles, multiply-adds
of matrix products, special functions. Issue slots come from the machine code that `make cuda-check` leaves: the
instructions of each basic block, times how often it ran, fitted to what the emulation counted of each line of the
source (issue_slots.py; misfit tells how well).
Time is that of the slowest pipe, if all overlap perfectly: latency, plain arithmetic and caches are not modelled.

It fails where a kernel's predicted time is more than 5 % above the committed one (benchmarks/results/
cuda_predicted.csv), or a limit of LIMITS is exceeded. --results writes that file: predictions, nothing measured.
"""

import argparse
import csv
import functools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks import issue_slots, sass
from benchmarks.ahead_of_time import nvdisasm
from hdit_kernels import cases, extension

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
OBJECTS = ROOT / "build" / "cuda-check" / "CMakeFiles" / "cuda_kernels.dir" / "csrc"
ARCH = "sm_90a"
WARPS, REGISTERS, SHARED = 64, 65536, 233472  # of a processor: warps, registers, bytes of shared memory
PIPES = ("dram", "l2", "shared", "mma", "mufu", "issue")
COLUMNS = ("what", "case", "dtype", "direction", "kernel", "blocks", "threads", "registers", "instructions",
           "shared_bytes", "blocks_per_processor", *(f"{pipe}_us" for pipe in PIPES), "predicted_us", "bound",
           "floor_us", "times_floor", "products", "misfit")  # fmt: skip
TOLERATED = 1.05  # × the committed prediction
# × floor of the flagship in bfloat16, by its slowest pipe
FLAGSHIP = "neighborhood_attention_qkvpacked[8x256x256x2x64 k7]"
LIMITS = {"forward": 1.01, "forward+backward": 1.2}  # lse and angles are not in the floor
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def gpu_cases() -> list[tuple[int, cases.Case, tuple[str, ...]]]:
    """(how many times the work of the case that is counted, the case, dtypes): HDiT's levels at 1024², batch 8."""
    full = dict(packed=True, cosine=True, rope=8, lse=False)
    found = []
    for side, heads, dtypes in (256, 2, ("bfloat16", "float16")), (128, 4, ("bfloat16",)), (64, 6, ("bfloat16",)):
        label = f"8x{side}x{side}x{heads}x64 k7"
        case = cases.attention_case(label, (1, side, side), heads, 64, kernel_size=7, **full)
        found.append((8, case, dtypes))
    case = cases.attention_case("8x256x256x2x64 k7", (1, 64, 64), 2, 64, kernel_size=7, **full)
    found.append((128, case, ("float32",)))
    for side, heads in (32, 12), (16, 16):
        case = cases.rope_case(f"8x{side}x{side}x{heads}x64 packed", (1, side, side), heads, 64, 8, "packed")
        found.append((8, case, ("bfloat16", "float32")))
    for side, width in (256, 128), (64, 384), (16, 1024):
        tokens = side * side
        part = max(1, tokens // 1024)
        gate = cases.geglu_case(f"8x{tokens}x{6 * width}", 1, tokens // part, 6 * width)
        norm = cases.norm_case(f"8x{tokens}x{width}", (1, tokens // part, width), (1, width))
        found += [(8 * part, case, ("bfloat16", "float32")) for case in (gate, norm)]
    return found


# ---- the emulation --------------------------------------------------------------------------------------------------


@functools.cache
def symbols() -> dict[int, str]:
    """Address in the emulated module → the kernel there, with its template arguments."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", extension.emulated.__file__], capture_output=True, text=True, check=True
    ).stdout
    found = (line.split(maxsplit=2) for line in listing.splitlines())
    return {int(address, 16): plain(name) for address, kind, name in found if kind in "tTwW"}


def plain(name: str) -> str:
    """A demangled kernel without its return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|hdit::|^void ", "", name)
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\((?:bool|int)\)", "", name[:end])


def counted(case: cases.Case, dtype: torch.dtype) -> dict[str, list[dict]]:
    """Forward and backward: what each launch did."""
    tensors, options = case.arguments(dtype)
    tensors = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    if "cosine_scale" in options:
        options["cosine_scale"].requires_grad_()
    module = extension.emulated
    module.set(count=True, races=False)
    try:
        with torch.random.fork_rng():
            outputs = case.function(*tensors, **options, backend="cuda")
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            forward = module.take_launches()
            torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
        return {"forward": forward, "backward": module.take_launches()}
    finally:
        module.set()


# ---- the machine code -----------------------------------------------------------------------------------------------


@functools.cache
def machine_code() -> dict[str, tuple[int, issue_slots.Function]]:
    """Kernel → (registers, machine code) as compiled for ARCH."""
    tool = Path(nvdisasm())
    objects = sorted(OBJECTS.rglob("*.cu.o"))
    if not objects:
        raise SystemExit(f"counters: {OBJECTS} has no object files; `make cuda-check` leaves them there")
    found = {}
    for path in objects:
        usage = [tool.with_name("cuobjdump"), "-res-usage", "-arch", ARCH, path]
        listing = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
        registers = {name: int(n) for name, n in re.findall(r"Function (\w+):\s*\n\s*REG:(\d+)", listing)}
        kernels = issue_slots.functions(path, tool, ARCH)
        for name, (mangled, function) in zip(demangled(list(kernels)), kernels.items(), strict=True):
            found[name] = registers.get(mangled, 0), function
    return found


def demangled(names: list[str]) -> list[str]:
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [plain(name) for name in out.splitlines()]


# ---- the prediction -------------------------------------------------------------------------------------------------


def beyond_first_level(launch: dict, times: int) -> float:
    """Sectors asked of the second-level cache. What one line reads again and again and is small, say the scales of a
    norm, each processor fetches once."""
    total = 0.0
    for _, kind, line in launch["lines"]:
        if kind == "global_write" or line["sectors"] * 32 > sass.FIRST_LEVEL:
            total += line["units"]
        elif kind == "global_read":
            total += min(line["units"], sass.PROCESSORS * line["sectors"] / times)
    return total


def predict(launch: dict, times: int) -> dict:
    """A row of the table: `times` the work of a counted launch."""
    kernel = symbols()[launch["kernel"]]
    counts, units = launch["counts"], defaultdict(int)
    for _, kind, line in launch["lines"]:
        units[kind] += line["units"]
    processor = sass.PROCESSORS * sass.CLOCK
    shared = units["shared_read"] + units["shared_write"] + counts["shuffles"]
    registers, function = machine_code()[kernel]
    issued, misfit = issue_slots.fitted(function, launch)
    seconds = {
        "dram": (counts["sectors_read"] + counts["sectors_written"]) * 32 / sass.DRAM,
        "l2": beyond_first_level(launch, times) * 32 / sass.L2,
        "shared": shared / processor,
        "mma": counts["mma_fma"] / sass.MMA / processor,
        "mufu": counts["special"] / 16 / processor,
        "issue": issued / 4 / processor,
    }
    by_registers = REGISTERS // max(1, launch["threads"] * -(-registers // 8) * 8)
    resident = min(by_registers, SHARED // (launch["shared_bytes"] + 1024), WARPS * 32 // launch["threads"])
    times_us = {f"{pipe}_us": 1e6 * times * value for pipe, value in seconds.items()}
    return {"kernel": kernel, "blocks": counts["blocks"] * times, "threads": launch["threads"], "registers": registers,
            "instructions": len(function.instructions), "shared_bytes": launch["shared_bytes"],
            "blocks_per_processor": resident,
            "mma_fma": counts["mma_fma"] * times, "misfit": misfit, **times_us}  # fmt: skip


def rows_of(times: int, case: cases.Case, dtype: str) -> list[dict]:
    """A row for each launch, and for each pass, whose launches follow one another."""
    rows, passes = [], {}
    for direction, launches in counted(case, DTYPES[dtype]).items():
        index = direction == "backward"
        floor = (
            1e6
            * times
            * max(case.tensors[index] * DTYPES[dtype].itemsize / sass.DRAM, 2 * case.macs[index] / sass.FLOPS)
        )
        label = {"what": "predicted", "case": str(case), "dtype": dtype, "direction": direction, "floor_us": floor}
        mine = []
        for launch in launches:
            row = label | predict(launch, times)
            slowest = max(PIPES, key=lambda pipe: row[f"{pipe}_us"])
            mine.append(row | {"predicted_us": row[f"{slowest}_us"], "bound": slowest})
        predicted = sum(row["predicted_us"] for row in mine)
        total = label | {"kernel": "all", "predicted_us": predicted, "times_floor": predicted / floor}
        if useful := times * case.macs[index]:
            total["products"] = sum(row["mma_fma"] for row in mine) / useful
        rows += [*mine, total]
        passes[direction] = predicted, floor
    both = [sum(values) for values in zip(*passes.values(), strict=True)]
    label = {"what": "predicted", "case": str(case), "dtype": dtype, "direction": "forward+backward", "kernel": "all"}
    return [*rows, label | {"predicted_us": both[0], "floor_us": both[1], "times_floor": both[0] / both[1]}]


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("case", "dtype", "direction", "kernel"))


def complaints(rows: list[dict], committed: dict[tuple, float]) -> list[str]:
    """A sentence for every kernel and pass that became slower, or exceeds a limit."""
    found = []
    for row in rows:
        name = f"{row['case']} {row['dtype']} {row['direction']} {row['kernel']}"
        before, now = committed.get(key(row)), row["predicted_us"]
        if before is not None and now > TOLERATED * before + 0.05:  # µs, less than which a launch does not show
            found.append(f"{name}: predicted {now:.1f} µs, {now / before:.2f} × the committed {before:.1f}")
        limit = LIMITS.get(row["direction"]) if row["case"] == FLAGSHIP and row["dtype"] == "bfloat16" else None
        if limit is not None and row["kernel"] == "all" and round(row["times_floor"], 2) > limit:
            found.append(f"{name}: predicted {row['times_floor']:.2f} × floor, and {limit} is the limit")
    return found


def show(rows: list[dict]) -> None:
    print(f"Predicted for an H200 ({ARCH}), not measured: µs of each pipe, of the slowest, and × floor")
    columns = ("case", "dtype", "direction", "kernel", "registers", "blocks_per_processor", *(f"{p}_us" for p in PIPES),
               "predicted_us", "bound", "floor_us", "times_floor", "products", "misfit")  # fmt: skip
    text = lambda v: "" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)  # noqa: E731
    table = [columns, *(tuple(text(row.get(column)) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts what CUDA kernels ask of an H200, and predicts their time.")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--lines", action="store_true", help="also counts of every source line")
    parser.add_argument("--results", nargs="?", const=RESULTS, type=Path, metavar="DIR", help="write the CSV there")
    options = parser.parse_args()
    extension.load_emulated(ROOT / "build" / "emulated")
    rows = []
    for times, case, dtypes in gpu_cases():
        if options.only not in str(case):
            continue
        for dtype in dtypes:
            rows += rows_of(times, case, dtype)
            if options.lines:
                show_lines(case, dtype)
    if not rows:
        sys.exit(f"counters: no case with {options.only!r} in its name")
    show(rows)
    path = RESULTS / "cuda_predicted.csv"
    committed = {key(row): float(row["predicted_us"]) for row in csv.DictReader(path.open())} if path.exists() else {}
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        with (options.results / path.name).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        committed = {}
    if found := complaints(rows, committed):
        sys.exit("\n".join(f"counters: {sentence}" for sentence in found))


def show_lines(case: cases.Case, dtype: str) -> None:
    """Accesses by line of the source: requests of warps, lanes in each, and × the least sectors or wavefronts."""
    for direction, launches in counted(case, DTYPES[dtype]).items():
        for launch in launches:
            print(f"{case} {dtype} {direction} {symbols()[launch['kernel']]}")
            for place, kind, line in launch["lines"]:
                if kind not in ("shared_read", "shared_write", "global_read", "global_write"):
                    continue
                ratio = line["units"] / max(1, line["ideal"])
                lanes = line["lanes"] / line["requests"]
                requests = f"{line['requests']:10} requests of {lanes:4.1f} lanes"
                print(f"  {place:40} {kind:13} {requests}, {line['units']:10} units = {ratio:.2f} × the least")


if __name__ == "__main__":
    main()

"""One call of an op, forward and backward, for tools that watch a process; and the emulation beside the GPU.

python -m benchmarks.one_call OP BACKEND       # on the GPU: the first case of OP, for compute-sanitizer and ncu
python -m benchmarks.one_call --compare        # on both: results must agree, and what ncu counts is printed beside
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import counters
from hdit_kernels import cases, extension

OPS = ("geglu", "ada_rms_norm", "cosine_rope", "neighborhood_attention_qkvpacked")
# What ncu calls the things that the emulation counts.
METRICS = {
    "sectors asked for": "lts__t_sectors_op_read.sum,lts__t_sectors_op_write.sum",
    "wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "instructions": "smsp__inst_executed.sum",
}


def case_of(op: str) -> cases.Case:
    """With 64² tokens of HDiT's finest level, or the first timed one."""
    return next(case for case in cases.timed() if case.op.startswith(op))


def results(case: cases.Case, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    """Outputs and gradients, for the same values on every device."""
    arguments, options = case.arguments(dtype, device)
    leaves = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
    outputs = case.function(*arguments, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return [t.detach().double().cpu() for t in (*outputs, *grads)]


def emulated(case: cases.Case) -> dict[str, dict[str, float]]:
    """Kernel → what the emulation counts of it."""
    found: dict[str, dict[str, float]] = {}
    for launches in counters.counted(case, torch.bfloat16).values():
        for launch in launches:
            units = {kind: 0 for kind in ("shared_read", "shared_write", "global_read", "global_write")}
            for _, kind, line in launch["lines"]:
                units[kind] += line["units"]
            name = counters.symbols()[launch["kernel"]].split("<")[0]
            counts = found.setdefault(name, dict.fromkeys(METRICS, 0.0))
            counts["sectors asked for"] += units["global_read"] + units["global_write"]
            counts["wavefronts"] += units["shared_read"] + units["shared_write"]
            counts["instructions"] += counters.issue_slots(counters.symbols()[launch["kernel"]], launch)
    return found


def measured(op: str) -> dict[str, dict[str, float]] | None:
    """Kernel → the same from ncu; None where it is not there or may not count."""
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    if not Path(ncu).exists():
        return None
    metrics = ",".join(METRICS.values())
    command = [ncu, "--csv", "--metrics", metrics, sys.executable, "-m", "benchmarks.one_call", op, "cuda"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if not lines:
        return None
    names = {metric: name for name, joined in METRICS.items() for metric in joined.split(",")}
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if row["Metric Name"] in names:
            kernel = counters.plain(row["Kernel Name"]).split("<")[0].split("::")[-1]
            counts = found.setdefault(kernel, dict.fromkeys(METRICS, 0.0))
            counts[names[row["Metric Name"]]] += float(row["Metric Value"].replace(",", ""))
    return found


def compare() -> int:
    """Exit code: 1 where the emulation and the GPU disagree by more than rounding."""
    failed = 0
    for op in OPS:
        case = case_of(op)
        for dtype in (torch.float32, torch.bfloat16):
            pairs = zip(results(case, dtype, "cpu", "cuda"), results(case, dtype, "cuda", "cuda"), strict=True)
            worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
            allowed = 16 * torch.finfo(dtype).eps
            failed |= worst > allowed
            print(f"{case} {dtype}: emulated and GPU differ by {worst:.2e} of the largest, {allowed:.2e} allowed")
        counted, seen = emulated(case), measured(op)
        if seen is None:
            print("  ncu is not there, or may not count on this machine")
            continue
        for kernel, counts in counted.items():
            for what, count in counts.items():
                gpu = seen.get(kernel, {}).get(what, 0)
                print(f"  {kernel:36}{what:20}emulated {count:14.0f}  ncu {gpu:14.0f}  ratio {gpu / max(count, 1):.2f}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="One call of an op, or the emulation beside the GPU.")
    parser.add_argument("--compare", action="store_true", help="the emulation beside the GPU, every op")
    parser.add_argument("op", nargs="?", default=OPS[-1])
    parser.add_argument("backend", nargs="?", default="cuda")
    options = parser.parse_args()
    if options.compare:
        extension.load_emulated(counters.ROOT / "build" / "emulated")
        sys.exit(compare())
    for result in results(case_of(options.op), torch.bfloat16, "cuda", options.backend):
        assert result.isfinite().all()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

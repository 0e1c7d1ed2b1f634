"""Compiles every CUDA kernel for sm_80 and sm_90a, prints what each needs, fails on a spill or a warning. Needs no GPU.

python3 csrc/cuda_check.py        # from a bare clone: wants cmake, a build tool (ninja or make), nvcc and c++filt
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda-check"
# One block per kernel and architecture of what `ptxas -v` says; numbers that are zero are left out of its "Used" line.
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'\n(.*?Used \d+ registers[^\n]*)", re.DOTALL)
COLUMNS = ("kernel", "arch", "registers", "spill stores B", "spill loads B", "stack B", "static shared B")


def compile_kernels() -> str:
    """The compiler's output of a build from nothing."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("cuda_check: cmake is not on PATH; install it with `pip install cmake ninja`")
    shutil.rmtree(BUILD, ignore_errors=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DHDIT_CUDA_CHECK=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real"]
    commands = [
        [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
        [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
    ]
    for command in commands:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise SystemExit(f"{result.stdout}\ncuda_check: `{' '.join(command)}` failed, its output is above")
    return result.stdout


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def resources(output: str) -> list[tuple[str, str, int, int, int, int, int]]:
    """COLUMNS of every kernel, by name and architecture."""
    entries = ENTRY.findall(output)
    mangled = "\n".join(name for name, _, _ in entries)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = []
    for name, (_, arch, text) in zip(names, entries, strict=True):
        short = re.sub(r"^void |\(.*|hdit::", "", name.replace("(anonymous namespace)::", ""))
        rows.append(
            (
                short.replace("__nv_", "").replace("__half", "float16"),
                arch,
                number(r"Used (\d+) registers", text),
                number(r"(\d+) bytes spill stores", text),
                number(r"(\d+) bytes spill loads", text),
                number(r"(\d+) bytes (?:stack frame|cumulative stack)", text),
                number(r"(\d+) bytes smem", text),
            )
        )
    return sorted(rows)


def main() -> None:
    output = compile_kernels()
    rows = resources(output)
    kernels = len(re.findall("Compiling entry function", output))
    if not rows or len(rows) != kernels:
        raise SystemExit(f"{output}\ncuda_check: understood {len(rows)} of {kernels} kernels in the output above")
    widths = [max(len(str(row[i])) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    for row in [COLUMNS, *rows]:
        first, *rest = (str(value) for value in row)
        print("  ".join([first.ljust(widths[0]), *(v.rjust(w) for v, w in zip(rest, widths[1:], strict=True))]))
    spilled = [f"{row[0]} on {row[1]}" for row in rows if row[3] or row[4]]
    print(f"{len(rows)} kernels, {len(spilled)} with spills (shared memory sized at launch is not in the table)")
    if spilled:
        sys.exit(f"cuda_check: registers are spilled to memory in {', '.join(spilled)}")


if __name__ == "__main__":
    main()

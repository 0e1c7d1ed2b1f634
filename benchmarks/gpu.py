"""Everything that only a GPU can show, one step after the other; needs no network.

    make gpu [PYTHON=python3] [WHEELS=folder] [STEPS="check sanitize"]

The Python that runs this must have PyTorch with CUDA, and nvcc and a C++ compiler must be there; what else is missing
is installed from the folder WHEELS (`make gpu-wheels` fills one, where there is a network). Each step takes less than
8 minutes and is left alone once it has passed at this commit: run the command again to go on. Logs: runs/gpu/.

build      the extension and the emulation of its CUDA kernels
check      every op × backend × case against the float64 reference, on the GPU
ops, triton, pytorch, models   the tests
sanitize   compute-sanitizer (memcheck, racecheck) on one case of every op, CUDA and Triton
emulation  what the emulation computes and counts against what the GPU does (ncu, where it may count)
time-*     benchmarks with peers: rows into benchmarks/results/
plots      roofline and scaling pictures, drawn again
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "runs" / "gpu"
LIMIT = 470  # seconds of a step
NEEDED = ("numpy", "einops", "safetensors", "tqdm", "tyro", "PIL", "pytest", "pytest_benchmark", "hypothesis", "pybind11",
          "cmake", "ninja", "matplotlib", "setuptools")  # fmt: skip
OPS = ("geglu", "ada_rms_norm", "cosine_rope", "neighborhood_attention")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
BENCH = ("-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--disable-warnings")


def sanitized(tool: str) -> list[list[str]]:
    """One small case of every op and backend under compute-sanitizer, which fails where it finds something."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    one = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.one_call"]
    return [[*one, op, backend] for op in OPS for backend in ("cuda", "triton")]


def steps() -> dict[str, list[list[str]]]:
    python = sys.executable
    tests = lambda *names: [python, *PYTEST, *names]  # noqa: E731
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    return {
        "build": [pip, ["make", "emulated", f"RUN={python}"]],
        "check": [[python, "-m", "hdit_kernels.info", "--check"]],
        "ops": [tests("tests/test_ops.py")],
        "triton": [tests("tests/test_triton.py", "tests/test_triton_attention.py")],
        "pytorch": [tests("tests/test_pytorch.py", "tests/test_natten.py", "tests/test_window.py")],
        "models": [tests("tests/test_models.py", "tests/test_dit.py", "tests/test_k_diffusion.py")],
        "sanitize": [*sanitized("memcheck"), *sanitized("racecheck")],
        "emulation": [[python, "-m", "benchmarks.one_call", "--compare"]],
        "time-attention": [[python, *BENCH, "-k", "test_op and attention"]],
        "time-others": [[python, *BENCH, "-k", "test_op and not attention"]],
        "time-models": [[python, *BENCH, "-k", "test_model"]],
        "plots": [
            [python, "benchmarks/roofline.py"],
            [python, "-m", "hdit", "scaling", "--output", "runs/gpu/scaling", "--budget-minutes", "4"],
        ],
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def install(wheels: str | None) -> None:
    """What cannot be imported, from a folder of wheels."""
    probe = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if not importlib.util.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", probe, *NEEDED], capture_output=True, text=True, check=True)
    missing = found.stdout.split()
    if not missing:
        return
    if wheels is None:
        sys.exit(f"gpu: {', '.join(missing)} cannot be imported; give WHEELS=folder (`make gpu-wheels` fills one)")
    files = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", *files]
    subprocess.run(pip, check=True)


def run(name: str, commands: list[list[str]]) -> tuple[bool, float]:
    """(passed, seconds); the output is shown and kept."""
    start = time.monotonic()
    passed = True
    with (LOGS / f"{name}.log").open("w") as log:
        for command in commands:
            left = LIMIT - (time.monotonic() - start)
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            try:
                result = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=max(left, 1))
                passed &= result.returncode == 0
            except subprocess.TimeoutExpired:
                log.write(f"\nstopped after {LIMIT} s\n")
                passed = False
                break
    return passed, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Tests, sanitizers and benchmarks on a GPU, resumable step by step.")
    parser.add_argument("--wheels", default=None, help="folder of wheels of what is missing")
    parser.add_argument("--again", action="store_true", help="also the steps that have passed at this commit")
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(steps())}; all by default")
    options = parser.parse_args()
    if unknown := [name for name in options.steps if name not in steps()]:
        sys.exit(f"gpu: steps must be of {', '.join(steps())}; got {', '.join(unknown)}")
    device = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"], capture_output=True, text=True
    )
    if device.returncode:
        sys.exit(f"gpu: {sys.executable} has no PyTorch that sees a GPU: {device.stderr.strip().splitlines()[-1]}")
    install(options.wheels)
    LOGS.mkdir(parents=True, exist_ok=True)
    state_file = LOGS / "state.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    if state.get("commit") != commit():
        state = {"commit": commit(), "device": device.stdout.strip(), "steps": {}}
    for name in options.steps or steps():
        if state["steps"].get(name, {}).get("passed") and not options.again:
            continue
        print(f"{name} …", flush=True)
        passed, seconds = run(name, steps()[name])
        state["steps"][name] = {"passed": passed, "seconds": round(seconds, 1)}
        temporary = state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1))
        os.replace(temporary, state_file)
        if not passed:
            print("\n".join((LOGS / f"{name}.log").read_text().splitlines()[-30:]))
        if name == "build" and not passed:
            break
    print(f"\n{state['device']}, commit {state['commit']}")
    for name in steps():
        step = state["steps"].get(name)
        print(f"  {name:16}{'not run' if step is None else 'passed' if step['passed'] else 'FAILED':8}"
              f"{'' if step is None else step['seconds']:>8} s")  # fmt: skip
    sys.exit(not all(step["passed"] for step in state["steps"].values()))


if __name__ == "__main__":
    main()

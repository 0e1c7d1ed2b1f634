"""`python -m hdit_kernels.info`: what is installed, and every op × backend: present, or the reason why not.

With `--check`, every present backend is compared with the float64 reference on this machine's own devices.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Iterator

import torch

from hdit_kernels import __version__, cases, extension
from hdit_kernels.op import BACKENDS, NAMES, OPS, BackendError, find

CHECKED = torch.float32, torch.bfloat16, torch.float16, torch.float64


def devices() -> tuple[str, ...]:
    """The types of device that ops can run on here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def report() -> str:
    """Versions, instruction sets, GPUs, and a line for each op and backend."""
    lines = [f"hdit_kernels {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"]
    if extension.module is None:
        lines.append(f"compiled extension: absent ({extension.missing})")
    else:
        build = ", ".join(f"{key} {value}" for key, value in extension.module.build_info.items() if value)
        lines.append(f"compiled extension: {build}")
        lines.append(f"CPU: {', '.join(extension.module.cpu.features())}; {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"GPU: {', '.join(gpus) or 'none that PyTorch sees'}")
    for device in devices():
        lines += ["", f"on {device} tensors, best first: {', '.join(BACKENDS[device])}"]
        for op in OPS.values():
            order = [*BACKENDS[device], *(b for b in NAMES if b not in BACKENDS[device])]
            lines += [f"  {op.name:34}{b:11}{op.missing(b, device) or 'present'}" for b in order]
    lines += ["", "linear_geglu is PyTorch's projection and then geglu, except for inference on a kernel of its own."]
    lines += [
        "",
        "Not yet run on a GPU: cuda kernels are compiled and emulated, triton kernels compiled and interpreted.",
    ]
    return "\n".join(lines)


def check(dtypes=CHECKED) -> Iterator[tuple[str, str, str, int, dict[str, float]]]:
    """For each device, op and present backend: (device, op, backend, comparisons made, {what disagrees: error}), the
    error in units of what is allowed."""
    for device in devices():
        for name, op in OPS.items():
            for backend in op.available(device):
                wrong, made = {}, 0
                mine = [c for c in cases.TESTED if name in (c.op, find(c.op).name)]
                for case, dtype in itertools.product(mine, dtypes):
                    try:
                        errors = cases.compare(case, dtype, device, backend)
                    except BackendError:  # declined, as `explain` tells; the reference serves
                        continue
                    made += len(errors)
                    label = f"{case} {str(dtype).removeprefix('torch.')}"
                    wrong |= {f"{label}: {what}": error for what, error in errors.items() if not error <= 1}
                yield device, name, backend, made, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hdit_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare every present backend with the float64 reference")
    options = parser.parse_args(arguments)
    print(report())
    if not options.check:
        return 0
    print("\nagainst the float64 reference (outputs and gradients; 1.0 is the allowed error):")
    failed = False
    for device, name, backend, made, wrong in check():
        verdict = "DISAGREES" if wrong else f"agrees in {made} comparisons"
        print(f"  {device:6}{name:34}{backend:11}{verdict}", flush=True)
        for what, error in wrong.items():
            print(f"      {what}: {error:.3g} × the allowed error")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

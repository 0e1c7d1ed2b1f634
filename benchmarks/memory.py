"""Peak memory of one call of attention above what its process held before: results, saved tensors, and scratch, also
what the kernels allocate themselves. Each is measured in a new process, whose memory is its own.

    python benchmarks/memory.py 256 float32 cpu forward 1
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path


def peak_memory(side: int, dtype: str, backend: str, direction: str, threads: int) -> int:
    """Bytes, for side × side tokens; `backend` and `direction` as in `calls`. The inputs and the gradient of the output
    are not counted. CalledProcessError where the call fails."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(side), dtype, backend, direction, str(threads)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def main(side: int, dtype: str, backend: str, direction: str, threads: int) -> None:
    import torch
    from calls import ATTENTION, calls

    from hdit import scaling
    from hdit_kernels import cases

    torch.set_num_threads(threads)
    (case,) = (c for c in cases.timed() if c.op == ATTENTION and c.label.startswith(f"{side}x{side}x"))
    call = calls(case, backend, getattr(torch, dtype))[direction]
    call()  # compilation, thread pools
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: it would hide the peak of the next call
    before = scaling.start_memory(torch.device("cpu"), None)
    call()
    print(scaling.peak_memory(torch.device("cpu")) - before)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]))

"""Every op × backend × timed shape, forward and forward + backward, beside the eager and the compiled reference, on one
thread and on all; neighborhood attention beside its peers too, with the peak memory of a call at the largest shape."""

import functools

import pytest
import torch
from calls import ATTENTION, COMPILED, EAGER, backends, calls, function
from conftest import ALL_THREADS, DEVICE, THREADS
from memory import peak_memory
from peers import PEERS, errors

from hdit_kernels import cases

DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "forward+backward")
CASES = cases.timed() if DEVICE == "cpu" else (*cases.timed(), *cases.timed_on_gpu())
SMALLEST, *_, LARGEST = [case for case in CASES if case.op == ATTENTION]


def why_not(case, dtype, threads, backend, direction) -> str | None:
    """Why a row is left out: where PyTorch cannot, or where it would take minutes. None: it is timed."""
    if backend in PEERS and not PEERS[backend].trains and direction != "forward":
        return "no backward pass on a CPU"
    if case.op != ATTENTION or DEVICE != "cpu" or case == SMALLEST:
        return None
    some = dtype is not torch.float32 or threads != ALL_THREADS
    if backend == "FlexAttention" and (some or case == LARGEST):
        return "beyond 64² only 128², in float32, on all threads: its mask is made of all pairs of tokens"
    if backend == "shifted products" and some:
        return "beyond 64² only in float32, on all threads: compiling it takes more than a minute each time"
    if backend == COMPILED and (some or case == LARGEST):
        return "beyond 64² only 128², in float32, on all threads: it holds gigabytes and is compiled each time"
    if backend == "reference" and some and case == LARGEST:
        return "at the largest only in float32, on all threads: it takes seconds"
    return None


ALL = [
    (case, dtype, threads, backend, direction)
    for case in CASES
    for dtype in DTYPES
    for threads in THREADS
    for backend in backends(case.op, DEVICE)
    for direction in DIRECTIONS
]
RUNS = [run for run in ALL if why_not(*run) is None]
LEFT_OUT = {f"{run[3]}: {why_not(*run)}": None for run in ALL if why_not(*run)}


@functools.lru_cache(maxsize=1)
def check(case, dtype, backend: str, threads: int) -> None:
    """A backend or peer that does not match the reference is not timed."""
    if case.op == ATTENTION:  # in bounded memory
        trains = backend not in PEERS or PEERS[backend].trains
        found = errors(function(case, backend, dtype, threads), case, dtype, trains)
    else:
        found = cases.compare(case, dtype, DEVICE, backend)
    wrong = {what: error for what, error in found.items() if not error <= 1}
    if wrong:
        pytest.fail(f"not timed: {backend} does not match the reference of {case}: {wrong} (times the allowed error)")


def label(case, dtype, threads, backend, direction) -> str:
    return f"{case}-{str(dtype).removeprefix('torch.')}-{threads}-thread{'s' * (threads > 1)}-{backend}-{direction}"


@pytest.mark.parametrize(
    ("case", "dtype", "threads", "backend", "direction"),
    [pytest.param(*run, id=label(*run)) for run in RUNS],
    indirect=["threads"],
)
def test_op(request, record, case, dtype, threads, backend, direction):
    if case.op == ATTENTION:
        request.config.left_out |= LEFT_OUT
    if backend not in (EAGER, COMPILED) and not (case.op == ATTENTION and backend == "reference"):
        check(case, dtype, backend, threads)
    call = calls(case, backend, dtype, DEVICE)[direction]
    both = direction != "forward"
    size = (case.tensors[0] + both * case.tensors[1]) * dtype.itemsize
    flops = 2 * (case.macs[0] + both * case.macs[1])
    memory = None
    if case == LARGEST and dtype is torch.float32 and threads == ALL_THREADS and DEVICE == "cpu":
        memory = peak_memory(256, "float32", backend, direction, threads)
    record("ops", str(case), direction, dtype, backend, call, size=size, flops=flops, memory=memory)

"""What is timed: every op on the backends that are here, as one writes it without us, as the reference, and peers."""

import functools

import torch
import torch.nn.functional as F
from peers import PEERS

import hdit_kernels
from hdit_kernels import cases
from hdit_kernels import op as machinery

ATTENTION = "neighborhood_attention_qkvpacked"
COMPILED = "compiled reference"
EAGER = "eager idiom"  # what one writes without us, where that is not the reference
IDIOMS = {
    "geglu": lambda x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
    "linear_geglu": lambda x, weight: IDIOMS["geglu"](F.linear(x, weight)),
    "ada_rms_norm": lambda x, scale, eps: F.rms_norm(x, x.shape[-1:], eps=eps) * scale[:, None],
}


def backends(op: str, device: str) -> list[str]:
    """Ours, best first, then the peers."""
    # on a CPU Triton is its interpreter and CUDA its emulation, whose times say nothing
    left_out = {"reference", "triton", "cuda"} if device == "cpu" else {"reference"}
    present = [b for b in hdit_kernels.available_backends(op, device) if b not in left_out]
    peers = list(PEERS) if op == ATTENTION else []
    return [*present, *peers, *([EAGER] if op in IDIOMS else []), "reference", COMPILED]


@functools.lru_cache(maxsize=1)
def function(case: cases.Case, backend: str, dtype: torch.dtype, threads: int):
    """What a user would call. Compiled code is for one dtype and number of threads, and only the last is kept."""
    if backend in PEERS:
        torch._dynamo.reset()
        (qkv,), options = case.arguments(dtype)
        return PEERS[backend].make(tuple(qkv.shape[1:3]), options.get("kernel_size", 7))
    if backend == EAGER:
        return IDIOMS[case.op]
    call = functools.partial(case.function, backend="reference" if backend == COMPILED else backend)
    if backend == COMPILED:
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True)
    return call


def calls(case: cases.Case, backend: str, dtype: torch.dtype, device: str = "cpu"):
    """{"forward": …, "forward+backward": …}: functions without arguments, of a user's call on random tensors."""
    call = function(case, backend, dtype, torch.get_num_threads())
    args, kwargs = case.arguments(dtype, device)
    for name in ("return_lse", "kernel_size") if backend in PEERS else ("return_lse",):
        kwargs.pop(name, None)  # a peer was made for its kernel size
    tensors = (*args, *kwargs.values())
    leaves = [t.requires_grad_() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def forward():
        with torch.no_grad():
            return call(*args, **kwargs)

    def both():
        return torch.autograd.grad(machinery._tuple(call(*args, **kwargs)), leaves, dys)

    dys = [torch.randn_like(o) for o in machinery._tuple(forward())]
    return {"forward": forward, "forward+backward": both}

"""Kernels of the Hourglass Diffusion Transformer: 2-D neighborhood attention with cosine-similarity and axial RoPE
inside, GEGLU and adaptive RMSNorm, each defined by a plain PyTorch reference.

    out = hdit_kernels.neighborhood_attention(q, k, v, kernel_size=7)   # q, k, v: (B, H, W, heads, dim)

`python -m hdit_kernels.info` says which backends this machine has.
"""

import importlib

from hdit_kernels.op import BACKENDS, BackendError, available_backends, explain, use  # isort: skip
from hdit_kernels.ada_rms_norm import ada_rms_norm
from hdit_kernels.cosine_rope import AxialRope, cosine_rope
from hdit_kernels.geglu import geglu, linear_geglu
from hdit_kernels.neighborhood_attention import neighborhood_attention, neighborhood_attention_qkvpacked

__version__ = "0.1.0"
__all__ = [
    "BACKENDS",
    "AxialRope",
    "BackendError",
    "ada_rms_norm",
    "available_backends",
    "cosine_rope",
    "explain",
    "geglu",
    "linear_geglu",
    "neighborhood_attention",
    "neighborhood_attention_qkvpacked",
    "use",
]


def __getattr__(name: str):
    """The submodules that need more than the ops do come with their first use."""
    if name in ("cases", "info", "natten"):
        return importlib.import_module(f"hdit_kernels.{name}")
    raise AttributeError(f"module 'hdit_kernels' has no attribute {name!r}")

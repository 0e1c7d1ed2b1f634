"""What an op is: a reference that defines it, backends that compute it, and what PyTorch needs to know about it.

Each op has one page (`geglu.py`, …) that builds one `Op`. The page says *what* is computed; this file says, once for
all ops, how a call finds its backend and how it behaves under autograd, `torch.compile`, `torch.func`, on the meta
device and under FLOP counters:

1. `Op.__call__` picks a backend (`BACKENDS`, best first) and then one of three routes:
   * the plain reference, wherever PyTorch itself should see through the op: under `torch.compile` when no kernel is
     present or `torch.func` is compiled too, and inside transforms that no kernel can serve (forward-mode AD, nested
     `torch.func.grad`);
   * the registered op `torch.ops.hdit.<name>` when nothing has to be differentiated;
   * an `autograd.Function` over `torch.ops.hdit.<name>` and `torch.ops.hdit.<name>_backward` otherwise.
2. Both registered ops allocate, then hand over to the page's `forward` or `backward`, which write what they are given.
   Where PyTorch's dispatcher would do nothing but call them (`unseen`), they are called without it.

`torch.library.register_autograd` is not used: it returns zero tangents under `torch.func.jvp` and cannot serve
`torch.func.grad`, without saying so.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.utils.flop_counter import register_flop_formula

from hdit_kernels import extension

# The order is policy; its only evidence is a committed benchmark row. No GPU row is committed yet.
BACKENDS = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}
NAMES = ("cpu", "triton", "cuda", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

OPS: dict[str, "Op"] = {}
_library = torch.library.Library("hdit", "DEF")
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


class BackendError(ValueError, RuntimeError):
    """A backend was asked for by name that does not exist, is not present, or does not take this call."""


def constant_under_compile(function):
    """`torch.compiler.assume_constant_result`, without its import of torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True
    return function


class use:
    """`with hdit_kernels.use("reference"): …` makes every op in the block take this backend, as `backend=` would.

    Process-wide. A backward pass takes the backend of its forward pass, wherever it runs.
    """

    def __init__(self, backend: str):
        if backend not in NAMES:
            raise BackendError(f"backend must be one of {', '.join(NAMES)}; got {backend!r}")
        self.backend = backend

    def __enter__(self):
        global _forced
        self.previous, _forced = _forced, self.backend

    def __exit__(self, *exc):
        global _forced
        _forced = self.previous


@dataclass(frozen=True, eq=False)
class Op:
    """One operation. Calls take `inputs` (tensors or None, in the order of `inputs`), then `params` (plain values)."""

    name: str
    inputs: tuple[str, ...]  # tensor arguments; a trailing "?" marks one that may be None
    params: dict[str, str]  # other arguments: name → type in an operator schema
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]  # the inputs that gradients flow to
    batched: tuple[str, ...]  # the inputs whose first axis is the batch: what torch.vmap may fold its axis into
    reference: Callable  # (*inputs, *params) → output or tuple: the definition, plain differentiable PyTorch
    allocate: Callable  # (*inputs, *params) → tuple of uninitialised outputs
    macs: Callable  # (*input shapes, *params) → (forward, backward) multiply-adds
    kernels: tuple[str, ...] = ()  # the backends that exist beside the reference
    forward: Callable | None = None  # (backend, inputs, outputs, params): a kernel writes the outputs
    backward: Callable | None = None  # (backend, grad_outputs, inputs, saved outputs, grads or None, params): the grads
    saved_outputs: tuple[str, ...] = ()  # outputs that the backward pass reads
    declines: Callable | None = None  # (backend, *inputs, *params) → reason or None
    reference_forward: Callable | None = None  # the reference in bounded memory, where `reference` is not
    reference_backward: Callable | None = None

    def __post_init__(self):
        names = [n.rstrip("?") for n in self.inputs]
        tensors = ", ".join(f"Tensor{'?' if n.endswith('?') else ''} {n.rstrip('?')}" for n in self.inputs)
        params = "".join(f", {kind} {name}" for name, kind in self.params.items())
        grads = ", ".join(f"Tensor? grad_{n}" for n in self.outputs)
        saved = "".join(f", Tensor {n}" for n in self.saved_outputs)
        returns = lambda n: "Tensor" if n == 1 else f"({', '.join(['Tensor'] * n)})"  # noqa: E731
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _library.define(f"{self.name}({tensors}{params}, str backend) -> {returns(len(self.outputs))}", tags=tags)
        _library.define(
            f"{self.name}_backward({grads}, {tensors}{saved}{params}, bool[] needs, str backend)"
            f" -> {returns(len(self.gradients))}",
            tags=tags,
        )
        implementations = {
            "": (self._run_forward, self._fake_forward, self._vmap_forward),
            "_backward": (self._run_backward, self._fake_backward, self._vmap_backward),
        }
        for suffix, (run, fake, vmap) in implementations.items():
            _library.impl(self.name + suffix, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"hdit::{self.name}{suffix}", fake, lib=_library)
            torch.library.register_vmap(f"hdit::{self.name}{suffix}", vmap, lib=_library)
        packets = getattr(torch.ops.hdit, self.name), getattr(torch.ops.hdit, self.name + "_backward")
        first = len(self.outputs)  # the backward op's inputs stand behind the gradients of the outputs
        skip = first + len(names) + len(self.saved_outputs)
        register_flop_formula(packets[0])(lambda *a, out_shape=None, **k: 2 * self.macs(*a[:-1])[0])
        register_flop_formula(packets[1])(
            lambda *a, out_shape=None, **k: 2 * self.macs(*a[first : first + len(names)], *a[skip:-2])[1]
        )
        # (frozen dataclass: what follows from the fields is set once, here)
        set_ = lambda key, value: object.__setattr__(self, key, value)  # noqa: E731
        set_("names", tuple(names))
        set_("wants", tuple(names.index(n) for n in self.gradients))
        set_("keeps", tuple(self.outputs.index(n) for n in self.saved_outputs))
        set_("op", packets[0].default)
        set_("op_backward", packets[1].default)
        OPS[self.name] = self

    # ---- choosing a backend -------------------------------------------------------------------------------------

    def missing(self, backend: str, device: str) -> str | None:
        """Why `backend` cannot serve this op on that type of device; None where it can."""
        if backend == "reference":
            return None
        if backend not in self.kernels:
            return f"{self.name} has no {backend} kernel"
        if backend in ("cpu", "cuda") and extension.module is None:
            return extension.missing
        if backend == "cuda" and device == "cpu" and extension.emulated is not None:
            return None
        if backend == "cpu":
            return None if device == "cpu" else f"the cpu kernels take CPU tensors, not {device} ones"
        if backend == "cuda" and not hasattr(extension.module, "cuda"):
            return "the compiled extension was built without nvcc"
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (interpreted and device == "cpu"):
            return f"the {backend} kernels take tensors on a GPU, not {device} ones"
        if not interpreted and not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        if backend == "cuda" and torch.version.hip:
            return "the cuda kernels need an NVIDIA GPU; triton serves AMD's"
        if backend == "triton":
            try:
                import triton  # noqa: F401
            except ImportError as error:
                return f"triton does not import: {error}"
        return None

    def available(self, device: str) -> tuple[str, ...]:
        """The backends that are present on that type of device, best first; on a CPU last, for tests, those that are
        interpreted or emulated there."""
        row = BACKENDS.get(device, ("reference",))
        row += ("triton", "cuda") if device == "cpu" else ()
        return tuple(b for b in row if self.missing(b, device) is None)

    def reasons(self, device: str, arguments: Sequence[Any] = ()) -> dict[str, str | None]:
        """Every backend → why it would not take this call, or None."""
        asked = self.declines and arguments
        decline = lambda b: self.declines(b, *arguments) if asked and b != "reference" else None  # noqa: E731
        return {b: self.missing(b, device) or decline(b) for b in NAMES}

    def choose(self, device: str, requested: str | None, arguments: Sequence[Any]) -> str:
        """The backend that takes this call: exactly the one requested (or forced by `use`), else the best present."""
        requested = requested or _forced
        if device == "meta":  # nothing is computed there
            return requested or "reference"
        present = _present(self.name, device, requested)
        if self.declines is None or present[0] == "reference":
            return present[0]
        for backend in present:
            reason = None if backend == "reference" else self.declines(backend, *arguments)
            if reason is None:
                return backend
            if requested:
                raise BackendError(f"{self.name}: backend {backend!r} does not take this call: {reason}")
            _warn_once(self.name, backend, reason)
        raise AssertionError("the reference takes every call")

    # ---- a call -------------------------------------------------------------------------------------------------

    def __call__(self, inputs: tuple, params: tuple = (), backend: str | None = None):
        """Outputs (a tensor, or a tuple of them) of the op for checked arguments."""
        arguments = (*inputs, *params)
        backend = self.choose(inputs[0].device.type, backend, arguments)
        transforms = _transforms()
        if transforms:
            if backend == "reference" or transforms == "beyond kernels" or torch.compiler.is_compiling():
                return self.reference(*arguments)
            return _one(TransformedKernel.apply(self.name, backend, *arguments))
        if backend == "reference" and torch.compiler.is_compiling():
            return self.reference(*arguments)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return _one(Kernel.apply(self.name, backend, *arguments))
        return self.dispatch(inputs, *arguments, backend)

    # ---- the two registered ops ---------------------------------------------------------------------------------

    def dispatch(self, tensors, *arguments):
        """The registered op, whose tensor arguments are `tensors`."""
        run = self._run_forward if unseen(tensors) else self.op
        return run(*arguments)

    def dispatch_backward(self, tensors, *arguments):
        """The same backward; the tensors are the inputs first, then the others."""
        run = self._run_backward if unseen(tensors) else self.op_backward
        return run(*arguments)

    def _run_forward(self, *arguments):
        *arguments, backend = arguments
        if backend == "reference":
            outputs = (self.reference_forward or self.reference)(*arguments)
            return _one(tuple(o.contiguous() for o in _tuple(outputs)))
        outputs = self.allocate(*arguments)
        extension.advise_large(outputs)
        n = len(self.inputs)
        self.forward(backend, arguments[:n], outputs, arguments[n:])
        return _one(outputs)

    def _fake_forward(self, *arguments):
        return _one(self.allocate(*arguments[:-1]))

    def _split_backward(self, arguments):
        first, last = len(self.outputs), len(self.outputs) + len(self.inputs)
        end = last + len(self.saved_outputs)
        *params, needs, backend = arguments[end:]
        return arguments[:first], arguments[first:last], arguments[last:end], tuple(params), needs, backend

    def _empty_grads(self, inputs, needs):
        """A contiguous gradient for each input that needs one; else an empty tensor, since an op returns tensors."""
        like = inputs[0]
        return tuple(
            torch.empty_like(inputs[i], memory_format=torch.contiguous_format) if need else like.new_empty(0)
            for i, need in zip(self.wants, needs, strict=True)
        )

    def _run_backward(self, *arguments):
        grad_outputs, inputs, saved, params, needs, backend = self._split_backward(arguments)
        grads = self._empty_grads(inputs, needs)
        extension.advise_large(grads)
        wanted = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        if all(g is None for g in grad_outputs):
            for grad in grads:
                grad.zero_()
        elif backend == "reference":
            (self.reference_backward or self._vjp)(grad_outputs, inputs, wanted, params)
        else:
            self.backward(backend, grad_outputs, inputs, saved, wanted, params)
        return _one(grads)

    def _fake_backward(self, *arguments):
        _, inputs, _, _, needs, _ = self._split_backward(arguments)
        return _one(self._empty_grads(inputs, needs))

    def _vjp(self, grad_outputs, inputs, grads, params):
        results = differentiate(
            self.reference, grad_outputs, inputs, [g is not None for g in grads], params, self.wants
        )
        for grad, result in zip(grads, results, strict=True):
            if grad is not None:
                grad.copy_(result)

    # ---- torch.vmap of the registered ops -----------------------------------------------------------------------

    def _vmap_forward(self, info, in_dims, *arguments):
        roles = [*self.names, *self.params, "backend"]
        return _vmap(self.op, info.batch_size, in_dims, arguments, [r in self.batched for r in roles])

    def _vmap_backward(self, info, in_dims, *arguments):
        # Gradients of inputs without a batch axis are sums over the batch: folding would sum over vmap's axis too.
        needs = arguments[-2]
        shared = any(need and n not in self.batched for n, need in zip(self.gradients, needs, strict=True))
        saved = [True] * len(self.saved_outputs)
        foldable = [True] * len(self.outputs) + [n in self.batched for n in self.names] + saved
        foldable = [f and not shared for f in foldable] + [False] * (len(arguments) - len(foldable))
        return _vmap(self.op_backward, info.batch_size, in_dims, arguments, foldable)


def _vmap(op, size: int, in_dims, arguments, foldable):
    """`op` over vmap's axis: folded into the batch in one call where every mapped tensor has one, else in a loop."""
    mapped = [isinstance(a, Tensor) and d is not None for a, d in zip(arguments, in_dims, strict=True)]
    arguments = [a.movedim(d, 0) if m else a for a, d, m in zip(arguments, in_dims, mapped, strict=True)]
    tensors = [(a, m, f) for a, m, f in zip(arguments, mapped, foldable, strict=True) if isinstance(a, Tensor)]
    if all(f or not m for _, m, f in tensors) and all(a.ndim - m >= 2 for a, m, f in tensors if f):
        fold = lambda a, m: (a if m else a.expand(size, *a.shape)).flatten(0, 1)  # noqa: E731
        folded = [
            fold(a, m) if f and isinstance(a, Tensor) else a
            for a, m, f in zip(arguments, mapped, foldable, strict=True)
        ]
        outputs = _tuple(op(*folded))
        outputs = tuple(o.unflatten(0, (size, -1)) if o.ndim > 1 else o.expand(size, *o.shape) for o in outputs)
    else:
        calls = [_tuple(op(*(a[i] if m else a for a, m in zip(arguments, mapped, strict=True)))) for i in range(size)]
        outputs = tuple(torch.stack(o) for o in zip(*calls, strict=True))
    return _one(outputs), (0 if len(outputs) == 1 else (0,) * len(outputs))


# ---- autograd -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording():
    """Autograd on, also inside a registered op that a dispatch mode (a FLOP counter, say) runs below autograd."""
    on = torch._C._SetExcludeDispatchKeyGuard
    key = torch._C.DispatchKey
    with torch.enable_grad(), on(key.AutogradFunctionality, False), on(key.ADInplaceOrView, False):
        yield


def differentiate(function, grad_outputs, inputs, needs, params, wants, create_graph=False):
    """Vector-Jacobian products of `function(*inputs, *params)`: one per entry of `wants`, None where not needed."""
    with recording():
        if not create_graph:
            inputs = [t.detach() if t is not None else None for t in inputs]
            for i, need in zip(wants, needs, strict=True):
                if need:
                    inputs[i].requires_grad_()
        outputs = _tuple(function(*inputs, *params))
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        leaves = [inputs[i] for i, need in zip(wants, needs, strict=True) if need]
        results = iter(vjp(pairs, leaves, create_graph) if pairs else [torch.zeros_like(t) for t in leaves])
    return [next(results) if need else None for need in needs]


def vjp(pairs, inputs, create_graph=False):
    """Gradients of Σ ⟨output, cotangent⟩ over the pairs, zeros where nothing flows."""
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, materialize_grads=True)


def _backward(op: Op, backend: str, needs, grad_outputs, inputs, saved, params):
    """Gradients for the arguments of `apply(name, backend, *inputs, *params)`."""
    wanted = [needs[2 + i] for i in op.wants]
    arguments = (*grad_outputs, *inputs, *saved, *params, wanted, backend)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        grads = op.dispatch_backward((*inputs, *saved, *grad_outputs), *arguments)
    elif backend == "reference" and peek_interpreter_stack() is None:
        grads = differentiate(op.reference, grad_outputs, inputs, wanted, params, op.wants, create_graph=True)
    else:
        grads = OnceDifferentiable.apply(op.name, *arguments)
    result = [None] * (2 + len(inputs) + len(params))
    for i, need, grad in zip(op.wants, wanted, _tuple(grads), strict=True):
        result[2 + i] = grad if need else None
    return tuple(result)


class Kernel(torch.autograd.Function):
    """One differentiable call in eager mode and under torch.compile."""

    @staticmethod
    def forward(ctx, name, backend, *arguments):
        op = OPS[name]
        n = len(op.inputs)
        outputs = _tuple(op.dispatch(arguments[:n], *arguments, backend))
        ctx.save_for_backward(*arguments[:n], *(outputs[i] for i in op.keeps))
        ctx.name, ctx.backend, ctx.params = name, backend, arguments[n:]
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs):
        op = OPS[ctx.name]
        n = len(op.inputs)
        saved = ctx.saved_tensors
        return _backward(op, ctx.backend, ctx.needs_input_grad, grad_outputs, saved[:n], saved[n:], ctx.params)


class TransformedKernel(torch.autograd.Function):
    """The same inside `torch.func.grad` and `torch.vmap`, which ask for this form (15 µs dearer a call)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, backend, *arguments):
        return _tuple(OPS[name].op(*arguments, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name, ctx.backend, *arguments = inputs
        op = OPS[ctx.name]
        n = len(op.inputs)
        ctx.save_for_backward(*arguments[:n], *(output[i] for i in op.keeps))
        ctx.params = tuple(arguments[n:])
        ctx.set_materialize_grads(False)

    backward = Kernel.backward


class OnceDifferentiable(torch.autograd.Function):
    """A kernel's gradient as a node of the graph: differentiating it again raises, and is never silently dropped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, *arguments):
        return _tuple(OPS[name].op_backward(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name}: a kernel's gradient cannot be differentiated again; second derivatives need the reference "
            f'(backend="reference", or torch.func.grad of torch.func.grad, which takes it by itself)'
        )


@constant_under_compile
def _transforms() -> str | None:
    """What `torch.func` and forward-mode AD do around this call: None, or whether kernels may serve it ("kernels": at
    most one level of grad, no forward-mode AD) or not ("beyond kernels")."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "beyond kernels"
    if peek_interpreter_stack() is None:
        return None
    kinds = [level.key() for level in get_interpreter_stack()]
    return "beyond kernels" if TransformType.Jvp in kinds or kinds.count(TransformType.Grad) > 1 else "kernels"


# ---- past the dispatcher ---------------------------------------------------------------------------------------------


def unseen(tensors) -> bool:
    """Whether the dispatcher would only hand these tensors on to the op's implementation: no mode, transform, tracer,
    profiler or subclass sees the call, and no tensor is lazily negated, sparse or otherwise not what its memory holds.
    The first tensor may not be None. A call of attention then costs 5 µs less; one of two tensors breaks even."""
    if torch.compiler.is_compiling() or _modes().raw_repr() not in _no_modes or _function_modes() or _profiled():
        return False
    device = tensors[0].device.type
    if device == "meta":  # nothing is computed there: the registered op has an implementation of its own
        return False
    plain = _plain(device)
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _ordinary or _keys(tensor).raw_repr() not in plain):
            return False
    return True


def _plain(device: str) -> frozenset[int]:
    """The dispatch keys of an ordinary tensor there, made outside and inside of inference mode."""
    if device not in _plain_cache:
        found = set()
        for inference in (False, True):
            with torch.inference_mode(inference):
                found.add(_keys(torch.empty(0, device=device)).raw_repr())
        _plain_cache[device] = frozenset(found)
    return _plain_cache[device]


_plain_cache: dict[str, frozenset[int]] = {}
_ordinary = (Tensor, torch.nn.Parameter)
_keys, _modes = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
_function_modes, _profiled = torch._C._len_torch_function_stack, torch.autograd._profiler_enabled
_no_modes = set()  # what is included in every call of an ordinary thread, outside and inside of inference mode
for _inference in (False, True):
    with torch.inference_mode(_inference):
        _no_modes.add(_modes().raw_repr())


# ---- small pieces ---------------------------------------------------------------------------------------------------


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on that type of device, None where it is off (or does not exist, as on meta)."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _tuple(x) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _one(outputs: tuple):
    return outputs[0] if len(outputs) == 1 else outputs


@constant_under_compile
def _present(name: str, device: str, requested: str | None) -> tuple[str, ...]:
    """The backends to try, best first; found once per op, device type and request; constant under torch.compile."""
    key = name, device, requested
    if key not in _present_cache:
        op = OPS[name]
        if requested is None:
            _present_cache[key] = op.available(device)
        elif requested not in NAMES:
            raise BackendError(f"backend must be None or one of {', '.join(NAMES)}; got {requested!r}")
        elif op.missing(requested, device):
            why = "; ".join(f"{b}: {reason or 'present'}" for b, reason in op.reasons(device).items())
            raise BackendError(f"{name}: backend {requested!r} is not present for {device} tensors ({why})")
        else:
            _present_cache[key] = (requested,)
    return _present_cache[key]


_present_cache: dict[tuple, tuple[str, ...]] = {}


@constant_under_compile
def _warn_once(name: str, backend: str, reason: str) -> None:
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        warnings.warn(
            f"hdit_kernels.{name}: {backend} does not take this call ({reason}); trying the next", stacklevel=3
        )


def find(op) -> Op:
    """The op of a name, or of a public function."""
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    name = {"linear_geglu": "geglu"}.get(name, name)  # whose backends it has: at least it is a projection, then geglu
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}; got {op!r}")
    return OPS[name]


def available_backends(op, device="cpu") -> tuple[str, ...]:
    """The backends of `op` (a name, or the public function) that are present on `device`, best first."""
    return find(op).available(torch.device(device).type)


def explain(op, *tensors: Tensor) -> str:
    """Which backend would take `op(*tensors)`, and why each other one would not: a line for each backend."""
    op = find(op)
    if not tensors:
        raise ValueError(f"explain needs the tensors of a call of {op.name}: {', '.join(op.names)}; got none")
    device = tensors[0].device.type
    given = tensors[: len(op.inputs)]  # what follows is the weight of linear_geglu
    arguments = (*given, *(None,) * (len(op.inputs) - len(given)), *(None,) * len(op.params))
    reasons = op.reasons(device, arguments)
    row = BACKENDS.get(device, ("reference",))
    taker = next(b for b in row if reasons[b] is None)
    order = [*row, *(b for b in NAMES if b not in row)]
    after = lambda b: "takes this call" if b == taker else f"present; {taker} comes first"  # noqa: E731
    return "\n".join(f"{op.name} on {device}: {b}: {reasons[b] or after(b)}" for b in order)

"""CUDA kernels in their emulation (csrc/emulation.h), whatever order threads run in; tests/test_ops.py compares each of
them with the float64 reference in forward order."""

from random import Random

import hypothesis
import pytest
import torch

import hdit_kernels
from hdit_kernels import cases, extension

pytestmark = pytest.mark.skipif(extension.emulated is None, reason="a GPU is present, and orders its threads itself")

GEOMETRIES = 1000 if hypothesis.settings().max_examples < 1000 else 10_000  # --hypothesis-profile stress
ORDERS = [("reverse", 1), ("shuffled", 1), ("shuffled", 2)]


def results(case: cases.Case, dtype: torch.dtype, backend="cuda", seed=0) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call, for the same cotangents each time; of the cpu backend in float64, for the same
    values."""
    widen = (lambda t: t.detach().double()) if backend == "cpu" else (lambda t: t)
    arguments, options = case.arguments(dtype, seed=seed)
    arguments = [widen(a).requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    leaves = {f"argument {i}": a for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
    for name in "cosine_scale", "additional_keys", "additional_values":
        if name in options:
            leaves[name] = options[name] = widen(options[name]).requires_grad_()
    if options.get("rope") is not None:
        options["rope"] = hdit_kernels.AxialRope(*map(widen, options["rope"]))
    outputs = case.function(*arguments, **options, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator).to(dtype).to(o.dtype) for o in outputs]
    flowing, cotangents = zip(
        *((o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad), strict=True
    )
    grads = torch.autograd.grad(flowing, list(leaves.values()), cotangents, allow_unused=True)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return found | {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in cases.TESTED if c.op != "linear_geglu"], ids=str)
def test_the_same_bits_in_every_order_of_threads(case, dtype, poisoned):
    """The shadow of memory reports a race by itself; what it cannot see would change bits here."""
    try:
        expected = results(case, dtype)
        for order, seed in ORDERS:
            extension.emulated.set(order=order, seed=seed)
            for name, got in results(case, dtype).items():
                assert torch.equal(got, expected[name]), f"{name}, {order} order, seed {seed}"
    finally:
        extension.emulated.set()


def random_case(random: Random) -> cases.Case:
    """Any geometry; half of them such that the fast path takes it, if the dtype has 16 bits."""
    fast = random.random() < 0.5
    sizes = []
    for _ in range(2):
        kernel = random.randint(2, 9) if fast else random.randint(1, 8)
        dilation = 1 if fast else random.randint(1, 3)
        length = kernel * dilation + random.randint(0, 12 if fast else 5)
        sizes.append((length, kernel, 1 if fast else random.randint(1, kernel), dilation))
    (height, width), kernel_size, stride, dilation = zip(*sizes, strict=True)
    dim = random.choice([32, 64]) if fast else random.randint(1, 40)
    options = dict(
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=(False, False) if fast else (random.random() < 0.3, random.random() < 0.3),
        cosine=random.random() < 0.6,
        rope=dim // 8 if fast else random.randint(0, dim // 4),
        scale=random.choice([None, -0.7, 1.5]),
        layout=random.choice(["plain", "packed", "heads first", "expanded", "every second feature"]),
    )
    if not fast:
        options |= dict(extra=random.randint(0, 3), mask=random.random() < 0.3)
        options |= dict(v_dim=random.randint(1, 40)) if options["layout"] != "packed" else {}
    grid = random.randint(1, 2), height, width
    return cases.attention_case(f"{grid} {options}", grid, random.randint(1, 3), dim, **options)


# × the largest element of an exact result. tests/test_ops.py has the computed tolerances; what random geometries may
# show is a wrong key, which is wrong by more.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def size(name, want, got, case, seed) -> float:
    """What the error of an output or gradient is relative to: its largest element, or that of the terms that cancel."""
    least = 0.1
    if name == "cosine_scale":  # a sum over all queries
        return max(got["output 1"][0].numel() ** 0.5, least)
    arguments, options = case.arguments(torch.float64, seed=seed)
    normalised = {"argument 0": arguments[0], "argument 1": arguments[1]}
    normalised["additional_keys"] = options.get("additional_keys")
    if "cosine_scale" in options and normalised.get(name) is not None:
        # 1/|token| times what is left without the part along the token, which in a head of 1 is all
        least /= min(1.0, normalised[name].norm(dim=-1).min().item())
    return max(want.abs().nan_to_num(posinf=0).max().item(), least)


@pytest.mark.parametrize("part", range(20))
def test_random_geometries(part, poisoned):
    """Forward and every gradient, in a random order of threads; `make stress` draws ten times as many."""
    random = Random(part)
    try:
        for number in range(GEOMETRIES // 20):
            case, dtype = random_case(random), random.choice(list(ALLOWED))
            extension.emulated.set(order=random.choice(["forward", "reverse", "shuffled"]), seed=number + 1)
            exact, got = (results(case, dtype, backend, number) for backend in ("cpu", "cuda"))
            assert exact.keys() == got.keys()
            for name, want in exact.items():
                difference = torch.where(got[name] == want, 0, got[name].double() - want).abs().max()  # infinities
                assert difference <= ALLOWED[dtype] * size(name, want, got, case, number), f"{case} in {dtype}: {name}"
    finally:
        extension.emulated.set()

"""CUDA kernels in their emulation (csrc/emulation.h), whatever order threads run in; tests/test_ops.py compares each of
them with the float64 reference in forward order."""

from random import Random

import hypothesis
import pytest
import torch

from hdit_kernels import cases, extension

pytestmark = pytest.mark.skipif(extension.emulated is None, reason="a GPU is present, and orders its threads itself")

GEOMETRIES = 1000 if hypothesis.settings().max_examples < 1000 else 10_000  # --hypothesis-profile stress
ORDERS = [("reverse", 1), ("shuffled", 1), ("shuffled", 2)]


def results(case: cases.Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of one call, for the same cotangents each time."""
    arguments, options = case.arguments(dtype)
    arguments = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    leaves = [a for a in arguments if isinstance(a, torch.Tensor)]
    for name in "cosine_scale", "additional_keys", "additional_values":
        if name in options:
            leaves.append(options[name].requires_grad_())
    outputs = case.function(*arguments, **options, backend="cuda")
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [t.detach() for t in (*outputs, *grads) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in cases.TESTED if c.op != "linear_geglu"], ids=str)
def test_the_same_bits_in_every_order_of_threads(case, dtype, poisoned):
    """The shadow of memory reports a race by itself; what it cannot see would change bits here."""
    try:
        expected = results(case, dtype)
        for order, seed in ORDERS:
            extension.emulated.set(order=order, seed=seed)
            for got, want in zip(results(case, dtype), expected, strict=True):
                assert torch.equal(got, want), f"{order} order, seed {seed}"
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


@pytest.mark.parametrize("seed", range(20))
def test_random_geometries(seed, poisoned):
    """Forward and every gradient, in a random order of threads. `make stress` draws more of them."""
    random = Random(seed)
    try:
        for number in range(GEOMETRIES // 20):
            case, dtype = random_case(random), random.choice([torch.float32, torch.bfloat16, torch.float16])
            extension.emulated.set(order=random.choice(["forward", "reverse", "shuffled"]), seed=number + 1)
            errors = cases.compare(case, dtype, backend="cuda", seed=number)
            wrong = {what: error for what, error in errors.items() if not error <= 1}
            assert not wrong, f"{case} in {dtype}: {wrong}"
    finally:
        extension.emulated.set()

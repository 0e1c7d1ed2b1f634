"""The compiled CPU kernels of hdit_kernels._C, called on raw addresses, against float64 formulas and autograd."""

import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hdit_kernels
from hdit_kernels import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INSTRUCTION_SETS = _C.cpu.instruction_sets()
EPS = 1e-6
# (rows, n): single elements, less than a vector, around every vector length, a cut row, more than one thread's worth
GEGLU_SHAPES = [(1, 1), (3, 5), (4, 15), (2, 16), (5, 33), (7, 64), (3, 129), (2, 8195), (600, 67)]
NORM_SHAPES = [(1, 1, 1), (2, 3, 5), (2, 1, 16), (3, 4, 33), (1, 7, 64), (2, 5, 131), (2, 300, 67), (70, 3, 128)]


@pytest.fixture(autouse=True)
def one_thread_for_pytorch():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    before = _C.cpu.instruction_set()
    _C.cpu.set_instruction_set(request.param)
    yield request.param
    _C.cpu.set_instruction_set(before)


def code(dtype: torch.dtype) -> int:
    return _C.dtypes[str(dtype).removeprefix("torch.")]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Output:
    """A tensor full of NaN between two guard zones, which must survive the call."""

    GUARD = 96

    def __init__(self, shape, dtype):
        size = math.prod(shape)
        self.memory = torch.full((size + 2 * self.GUARD,), math.nan, dtype=dtype)
        self.tensor = self.memory[self.GUARD : self.GUARD + size].view(shape)
        self.zones = [self.memory[: self.GUARD], self.memory[self.GUARD + size :]]
        for zone in self.zones:
            zone.copy_(torch.arange(self.GUARD) % 61 - 30.5)

    def address(self) -> int:
        return self.tensor.data_ptr()

    def result(self) -> torch.Tensor:
        for zone in self.zones:
            assert torch.equal(zone.double(), torch.arange(self.GUARD) % 61 - 30.5), "written outside the output"
        return self.tensor


def assert_close(got, exact, in_dtype, largest_term=0.0):
    """Within twice the error of the formula in `got`'s dtype, plus that dtype's rounding of the largest value.

    `largest_term` counts as a value: where terms cancel (the gradient of a norm over one channel), they set the error.
    """
    exact, got64 = exact.double(), got.double()
    if exact.numel() == 0:
        assert got.shape == exact.shape
        return
    largest = exact.abs().max().clamp(min=largest_term)
    if got.dtype == torch.float64:
        bound = 64 * torch.finfo(torch.float64).eps * largest
    else:
        bound = 2 * ((in_dtype.double() - exact).abs().max() + torch.finfo(got.dtype).eps * largest)
    error = (got64 - exact).abs().max()
    assert error <= bound, f"off by {error:.3e}, allowed {bound:.3e}"  # NaN fails as well


def strided(shape, dtype, layout, generator, size=1.0):
    """Random values with a contiguous last axis: rows side by side, rows with a gap, or one row for all (stride 0)."""
    gap = 3 if layout == "gaps" else 0
    rows = 1 if layout == "repeated" else shape[-2]
    whole = size * torch.randn(*shape[:-2], rows, shape[-1] + gap, generator=generator, dtype=torch.float64)
    whole = whole.to(dtype)
    return whole[..., : shape[-1]].expand(*shape)


# ---- GEGLU -------------------------------------------------------------------------------------------------


def geglu(x):
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def geglu_forward(x, threads=1):
    rows, n = x.shape[0], x.shape[1] // 2
    y = Output((rows, n), x.dtype)
    _C.cpu.geglu_forward(x.data_ptr(), y.address(), rows, n, x.stride(0), code(x.dtype), threads)
    return y.result()


def geglu_backward(x, dy, threads=1):
    rows, n = dy.shape
    dx = Output((rows, 2 * n), x.dtype)
    _C.cpu.geglu_backward(
        x.data_ptr(), dy.data_ptr(), dx.address(), rows, n, x.stride(0), dy.stride(0), code(x.dtype), threads
    )
    return dx.result()


def gradient(function, x, dy):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, dy)[0]


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_matches_float64(instruction_set, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    for rows, n in GEGLU_SHAPES:
        x = strided((rows, 2 * n), dtype, layout, generator, size=3.0)
        dy = strided((rows, n), dtype, layout, generator)
        assert_close(geglu_forward(x), geglu(x.double()), geglu(x))
        assert_close(geglu_backward(x, dy), gradient(geglu, x.double(), dy.double()), gradient(geglu, x, dy))


def test_gelu_is_accurate_over_the_whole_range(instruction_set):
    """Φ(g) and the slope Φ(g) + g·φ(g) in float32 at every size of g; the digits of Φ's tail too, down to g = −3."""
    gate = torch.cat([torch.linspace(-14, 14, 40001), torch.logspace(-30, 4, 2000), -torch.logspace(-30, 4, 2000)])
    x, exact = torch.stack([torch.ones_like(gate), gate], -1), gate.double()
    cdf = 0.5 * torch.special.erfc(-exact * math.sqrt(0.5))
    dvalue, dgate = geglu_backward(x, torch.ones_like(gate)[:, None]).double().unbind(-1)
    for got in (geglu_forward(x)[:, 0].double() / exact, dvalue / exact):
        assert (got - cdf).abs().max() < 1.3e-7
        assert ((got - cdf).abs() / cdf)[exact > -3].max() < 3.5e-7
    slope = cdf + exact * torch.exp(-0.5 * exact**2) / math.sqrt(2 * math.pi)
    assert (dgate - slope).abs().max() < 1.5e-7


def test_gelu_in_bfloat16_is_off_by_little_more_than_its_rounding(instruction_set):
    gate = torch.linspace(-5.75, 14, 8001).to(torch.bfloat16)
    exact = gate.double() * 0.5 * torch.special.erfc(-gate.double() * math.sqrt(0.5))
    got = geglu_forward(torch.stack([torch.ones_like(gate), gate], -1))[:, 0].double()
    off = ((got - exact).abs() / exact.abs().clamp(min=1e-30)).double()
    assert off[gate > -2].max() < 2**-8 + 3e-5 and off[gate > -3].max() < 2**-8 + 5e-4 and off.max() < 2**-8 + 7e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_of_special_numbers(instruction_set, dtype):
    """Infinities, NaN, signed zeros, the largest and smallest numbers: as PyTorch in the same dtype."""
    info = torch.finfo(dtype)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.max, -info.max, info.tiny, -info.tiny, 1.0, -40.0, 40.0]
    value, gate = torch.meshgrid(*[torch.tensor(special, dtype=dtype)] * 2, indexing="ij")
    x = torch.cat([value, gate], -1).contiguous()
    got, expected = geglu_forward(x).double(), geglu(x).double()
    torch.testing.assert_close(got, expected, rtol=4 * info.eps, atol=float(info.tiny), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(instruction_set, dtype):
    """A gate above 6 makes y = value·gate, exact in float32: stored must be PyTorch's rounding of it, to the bit."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4000, generator=generator) * torch.exp2(torch.randint(-30, 5, (4000,), generator=generator))
    x = torch.stack([value, 6 + 3 * torch.rand(4000, generator=generator)], -1).to(dtype)
    expected = (x[:, 0].float() * x[:, 1].float()).to(dtype)
    assert torch.equal(geglu_forward(x)[:, 0].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("n", [384, 383])
def test_results_larger_than_the_caches_are_the_same(instruction_set, n):
    """They are written past the caches where their rows are aligned; in parts they are not."""
    rows = (1 << 24) // n + 100  # the result of the forward pass is just above 64 MiB
    x = torch.randn(rows, 2 * n, generator=torch.Generator().manual_seed(0))
    dy = x[:, :n]
    y, dx = torch.full((rows, n), math.nan), torch.full((rows, 2 * n), math.nan)
    _C.cpu.geglu_forward(x.data_ptr(), y.data_ptr(), rows, n, 2 * n, 0, 2)
    _C.cpu.geglu_backward(x.data_ptr(), dy.data_ptr(), dx.data_ptr(), rows, n, 2 * n, 2 * n, 0, 2)
    for part in range(0, rows, rows // 5):
        some = slice(part, part + rows // 5)
        assert torch.equal(y[some], geglu_forward(x[some]))
        assert torch.equal(dx[some], geglu_backward(x[some], dy[some]))


# ---- AdaRMSNorm --------------------------------------------------------------------------------------------


def ada_rms_norm(x, scale):
    dtype = statistics_dtype(x.dtype)
    x, scale = x.to(dtype), scale.to(dtype)
    scale = scale[:, None] if scale.ndim == 2 else scale
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * scale


def batch_stride(scale):
    return scale.stride(0) if scale.ndim == 2 else 0


def norm_forward(x, scale, threads=1):
    y = Output(x.shape, x.dtype)
    strides = (x.stride(0), x.stride(1), batch_stride(scale))
    _C.cpu.ada_rms_norm_forward(
        x.data_ptr(), scale.data_ptr(), y.address(), *x.shape, *strides, EPS, code(x.dtype), threads
    )
    return y.result()


def norm_backward(x, scale, dy, threads=1, want_dx=True, want_dscale=True):
    dx, dscale = Output(x.shape, x.dtype), Output(scale.shape, scale.dtype)
    pointers = (dx.address() if want_dx else 0, dscale.address() if want_dscale else 0)
    strides = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1), batch_stride(scale))
    _C.cpu.ada_rms_norm_backward(
        x.data_ptr(), scale.data_ptr(), dy.data_ptr(), *pointers, *x.shape, *strides, EPS, code(x.dtype), threads
    )
    return dx.result(), dscale.result()


def norm_gradients(x, scale, dy):
    x, scale = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    y = ada_rms_norm(x, scale)
    return torch.autograd.grad(y, (x, scale), dy.to(y.dtype))


def norm_inputs(shape, dtype, layout, shared, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, _, channels = shape
    x, dy = (strided(shape, dtype, layout, generator) for _ in range(2))
    size = (channels,) if shared else (batch, channels)
    scale = 1 + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)
    return x, scale.to(statistics_dtype(dtype)), dy


@pytest.mark.parametrize("shared", [False, True], ids=["scale per sample", "one scale"])
@pytest.mark.parametrize("layout", ["contiguous", "gaps", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ada_rms_norm_matches_float64(instruction_set, dtype, layout, shared):
    for shape in NORM_SHAPES:
        x, scale, dy = norm_inputs(shape, dtype, layout, shared)
        assert_close(norm_forward(x, scale), ada_rms_norm(x.double(), scale), ada_rms_norm(x, scale).to(dtype))
        exact = norm_gradients(x.double(), scale.double(), dy.double())
        plain = norm_gradients(x, scale, dy)
        term = (dy * scale.abs().max() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True))).abs().max().item()
        dx, dscale = norm_backward(x, scale, dy)
        assert_close(dx, exact[0], plain[0], largest_term=term if shape[-1] == 1 else 0.0)
        assert_close(dscale, exact[1], plain[1])


@pytest.mark.parametrize("want", ["dx", "dscale"])
def test_gradients_that_are_not_wanted_are_not_written(instruction_set, want):
    x, scale, dy = norm_inputs((2, 40, 37), torch.float32, "contiguous", False)
    both = norm_backward(x, scale, dy)
    one = norm_backward(x, scale, dy, want_dx=want == "dx", want_dscale=want == "dscale")
    for name, full, got in zip(("dx", "dscale"), both, one, strict=True):
        assert torch.equal(got, full) if name == want else got.isnan().all()


def test_nan_stays_in_its_row(instruction_set):
    x, scale, dy = norm_inputs((2, 5, 67), torch.float32, "contiguous", False)
    x[1, 2, 66] = math.nan
    rows = torch.zeros(2, 5, dtype=torch.bool)
    rows[1, 2] = True
    for tensor in (norm_forward(x, scale), norm_backward(x, scale, dy)[0]):
        assert torch.equal(tensor.isnan().all(-1), rows) and torch.equal(tensor.isnan().any(-1), rows)
    assert torch.equal(norm_backward(x, scale, dy)[1].isnan().any(-1), torch.tensor([False, True]))
    assert torch.equal(geglu_forward(x.view(10, 67)[:, 1:]).isnan().any(-1), rows.view(10))


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_empty_tensors(instruction_set, shape, shared):
    """Nothing is written but the gradient of the scale, a sum over no tokens: zero."""
    x, scale, dy = norm_inputs(shape, torch.float32, "contiguous", shared)
    norm_forward(x, scale)
    dscale = norm_backward(x, scale, dy)[1]
    assert torch.equal(dscale, torch.zeros_like(scale))
    empty = torch.empty(shape[0], 2 * shape[1])
    geglu_forward(empty[:0])
    geglu_backward(empty[:0], torch.empty(0, shape[1]))


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(instruction_set, dtype):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1200, columns, generator=generator).to(dtype) for columns in (258, 129))
    tokens, scale, dtokens = norm_inputs((3, 700, 67), dtype, "contiguous", False)
    one_scale = scale[0].clone()
    wide, dwide = torch.randn(1, 200002).to(dtype), torch.randn(1, 100001).to(dtype)

    def everything(threads):
        return [
            geglu_forward(x, threads),
            geglu_backward(x, dy, threads),
            geglu_forward(wide, threads),
            geglu_backward(wide, dwide, threads),
            norm_forward(tokens, scale, threads),
            *norm_backward(tokens, scale, dtokens, threads),
            *norm_backward(tokens, one_scale, dtokens, threads),
        ]

    alone = everything(1)
    for threads in (2, 3):
        for one, many in zip(alone, everything(threads), strict=True):
            assert torch.equal(one, many)


FORKED = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("hdit_kernels._C", sys.argv[1])
_C = importlib.util.module_from_spec(spec); spec.loader.exec_module(_C)
import array
x, y = array.array("f", [0.5] * 400000), array.array("f", [0.0] * 200000)
call = lambda threads: _C.cpu.geglu_forward(x.buffer_info()[0], y.buffer_info()[0], 1000, 200, 400, 0, threads)
call(2)
child = os.fork()
if child == 0:
    call(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_one_thread_works_after_a_fork():
    """As data-loading workers do: OpenMP's threads do not survive a fork, so one thread must not wait for them."""
    process = subprocess.Popen([sys.executable, "-c", FORKED, _C.__file__], start_new_session=True)
    try:
        assert process.wait(timeout=20) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": -1}, "geglu_forward: rows is -1, but must be at least 0"),
        ({"n": -5}, "geglu_forward: n is -5, but must be at least 0"),
        ({"x_row_stride": -8}, "geglu_forward: x_row_stride is -8, but must be at least 0"),
        ({"x": 0}, "geglu_forward: x is 0, but must be the address of a tensor with elements"),
        ({"y": 0}, "geglu_forward: y is 0, but must be the address of a tensor with elements"),
        ({"threads": 0}, "geglu_forward: threads is 0, but must be at least 1"),
        (
            {"dtype": 4},
            "geglu_forward: dtype is 4, but must be one of 0 (float32), 1 (bfloat16), 2 (float16), 3 (float64)",
        ),
    ],
)
def test_errors_name_argument_value_and_what_is_accepted(change, sentence):
    x, y = torch.randn(2, 8), torch.randn(2, 4)
    arguments = dict(x=x.data_ptr(), y=y.data_ptr(), rows=2, n=4, x_row_stride=8, dtype=0, threads=1)
    before = y.clone()
    with pytest.raises(ValueError) as error:
        _C.cpu.geglu_forward(**{**arguments, **change})
    assert str(error.value) == sentence
    assert torch.equal(y, before)
    _C.cpu.geglu_forward(**arguments)
    assert not torch.equal(y, before)


def test_bad_arguments_of_cosine_rope_are_refused():
    x, angles = torch.randn(1, 2, 3, 1, 8), torch.randn(3, 1, 2)
    row, out = [x.data_ptr(), *x.stride()[:4]], [Output(x.shape, x.dtype) for _ in range(2)]
    arguments = dict(q=row, k=row, pointers=[torch.ones(1).data_ptr(), *[angles.data_ptr()] * 2], sizes=[*x.shape, 2])
    arguments |= dict(angles_dtype=0, dtype=0, q_prepared=out[0].address(), k_prepared=out[1].address(), threads=1)
    for change, sentence in (
        ({"sizes": [*x.shape, 3]}, "angles is 3, but must be at most dim/4 = 2"),
        ({"sizes": [1, -2, 3, 1, 8, 2]}, "height is -2, but must be at least 0"),
        ({"k": [0, *row[1:]]}, "k is 0, but must be the address of a tensor with elements"),
        ({"dtype": code(torch.float64)}, "angles_dtype is 0, but must be float64 or, unless dtype is float64, float32"),
        ({"threads": 0}, "threads is 0, but must be at least 1"),
    ):
        with pytest.raises(ValueError) as error:
            _C.cpu.cosine_rope_forward(**{**arguments, **change})
        assert str(error.value) == f"cosine_rope_forward: {sentence}"
    assert all(o.result().isnan().all() for o in out)


def test_unknown_instruction_set_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"name is 'MMX', but this CPU and this build have: {INSTRUCTION_SETS[0]}"):
        _C.cpu.set_instruction_set("MMX")
    assert _C.cpu.instruction_set() == INSTRUCTION_SETS[-1] == _C.cpu.features()[0]


def test_cuda_errors_name_kernel_and_shape():
    """Of a device that no machine has; without a driver the sentence is the same with another error."""
    assert hasattr(_C, "cuda") == (_C.build_info["cuda"] is not None)
    for module in [_C.cuda] if hasattr(_C, "cuda") else []:
        with pytest.raises(RuntimeError, match=r"geglu_forward of x \(3, 16\) failed: cudaError\w+ \(\d+\), "):
            module.geglu_forward(x=256, y=256, rows=3, n=8, x_row_stride=16, dtype=0, device=9999, stream=0)


def test_large_results_take_few_page_faults():
    """Fresh memory in large pages, where the system lets a program ask for them; always: the right numbers."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    x = torch.randn(1, 2**16, 512)  # a result of 64 MiB, which no allocator keeps
    hdit_kernels.geglu(x[:, :8])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = hdit_kernels.geglu(x, backend="cpu")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    if setting.exists() and "[never]" not in setting.read_text():
        assert faults < y.nbytes / 4096 / 4
    value, gate = x[:, ::997].double().chunk(2, -1)
    assert (y[:, ::997] - value * F.gelu(gate)).abs().max() < 1e-5

"""The Triton kernels where the cases of `hdit_kernels/cases.py` do not reach: edges of blocks, several programs a sum,
64-bit offsets, large grids, `torch.compile`, and the projection that is one kernel with its gate.

Without a GPU they run in Triton's interpreter, where a program costs about a millisecond: blocks are made small instead
of tensors large.
"""

import contextlib
import math

import pytest
import torch
import triton.runtime.interpreter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hdit_kernels
from hdit_kernels import ada_rms_norm_triton, cases, cosine_rope_triton, geglu_triton, triton_launch
from hdit_kernels import op as machinery
from hdit_kernels.geglu import LINEAR_GEGLU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = triton_launch.Target("cuda", "90", 132)


def agrees(case, dtype=torch.float32, lenient=()):
    errors = cases.compare(case, dtype, DEVICE, "triton")
    wrong = {what: error for what, error in errors.items() if not error <= 1 and what not in lenient}
    assert not wrong, (str(case), dtype, wrong)


def recorded(case, dtype=torch.bfloat16):
    """What a call launches on an H200, forward and backward, without running it."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    empty.angles = lambda *shape: empty(*shape, dtype=torch.float32)
    args, _ = case.make(empty)
    values = [v for a in args for v in (a if isinstance(a, tuple) else (a,))]
    op = machinery.find(case.op)
    inputs, params = values[: len(op.inputs)], values[len(op.inputs) :]
    with triton_launch.recorded(H200) as launches:
        outputs = op.allocate(*values)
        op.forward("triton", inputs, outputs, params)
        op.backward("triton", outputs, inputs, (), op._empty_grads(inputs, [True] * len(op.gradients)), params)
    return launches


# ---- edges of blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_geglu_at_the_edges_of_blocks(dtype, monkeypatch, poisoned):
    for n in (1, 2, 127, 128, 129, 384, 1025):
        for rows in (1, 17):
            agrees(cases.geglu_case(f"{rows}×{n}", rows, 2 * n), dtype)
    monkeypatch.setattr(geglu_triton, "BLOCK", 32)
    monkeypatch.setattr(geglu_triton, "COLUMNS", (16, 8))
    for n in (7, 8, 9, 15, 16, 17, 33):
        for rows in (3, 4, 5):
            agrees(cases.geglu_case(f"{rows}×{n} in small blocks", rows, 2 * n), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_at_the_edges_of_blocks(dtype, poisoned):
    longest = ada_rms_norm_triton.LONGEST // dtype.itemsize
    for channels, counts in [(c, (15, 16, 17)) for c in (1, 2, 3, 31, 32, 33, 129)] + [(2048, (1, 2)), (longest, (1,))]:
        for tokens in counts:
            agrees(cases.norm_case(f"{tokens}×{channels}", (2, tokens, channels), (2, channels)), dtype)
    agrees(cases.norm_case("in pieces", (1, 2, longest + 1), (longest + 1,)), dtype)


@pytest.mark.parametrize("scale", [(2, 40), (40,)], ids=["per item", "shared"])
def test_norm_of_rows_in_pieces(scale, monkeypatch, poisoned):
    monkeypatch.setattr(ada_rms_norm_triton, "LONGEST", 64)
    for piece in (8, 32):
        monkeypatch.setattr(ada_rms_norm_triton, "PIECE", piece)
        for dtype in (torch.float32, torch.bfloat16):
            case = cases.norm_case(f"pieces of {piece}", (2, 3, 40), scale)
            assert all("long" in launch.kernel.__name__ for launch in recorded(case, dtype))
            agrees(case, dtype)


def test_norm_without_eps_is_finite_where_tokens_fill_no_block():
    """What lies beyond the last token is read as zeros, whose norm would be infinite and spoil the scale's gradient."""
    agrees(cases.norm_case("eps 0", (2, 5, 8), (2, 8), eps=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosine_rope_of_every_head_size(dtype, poisoned):
    for dim in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 66, 129):
        # a head of one feature has a constant cosine: rounding is all there is of its gradient
        lenient = ("gradient of argument 0", "gradient of argument 1") if dim == 1 else ()
        agrees(cases.rope_case(f"dim {dim}", (1, 2, 3), 2, dim, dim // 4), dtype, lenient)


@pytest.mark.parametrize("grid", [(2, 1, 1), (1, 1, 33), (1, 33, 1), (1, 5, 9), (2, 3, 8)], ids=str)
def test_cosine_rope_at_the_edges_of_blocks(grid, monkeypatch, poisoned):
    monkeypatch.setattr(cosine_rope_triton, "TOKENS", 16)
    agrees(cases.rope_case(str(grid), grid, 3, 8, 2))
    monkeypatch.setattr(cosine_rope_triton, "TOKENS", 2)
    agrees(cases.rope_case(str(grid), grid, 1, 12, 1), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projection_at_the_edges_of_blocks(dtype, poisoned):
    """Blocks are 16 rows × 16 columns in steps of 16; more blocks of rows than go through the weight together."""
    for rows, width, hidden in (1, 1, 1), (15, 16, 17), (17, 15, 16), (16, 17, 15), (33, 48, 33), (145, 20, 34):
        for bias in (False, True):
            label = f"{rows}×{width}×{hidden}"
            agrees(cases.linear_geglu_case(label, (rows,), width, hidden, bias, gradients=False), dtype)


# ---- what each kernel leaves alone ----------------------------------------------------------------------------------

OPS = pytest.mark.parametrize("name", ["geglu", "linear_geglu", "ada_rms_norm", "cosine_rope"])
CASES = {
    "geglu": cases.geglu_case("", 5, 2 * 37),
    "linear_geglu": cases.linear_geglu_case("", (2, 9), 20, 19, True),
    "ada_rms_norm": cases.norm_case("", (3, 7, 24), (3, 24)),
    "cosine_rope": cases.rope_case("", (2, 3, 5), 2, 20, 3),
}


def leaves_of(case, dtype=torch.float32):
    """(function of the differentiable tensors on Triton, those tensors)"""
    args, kwargs = case.arguments(dtype, DEVICE)
    values = [*args, *kwargs.values()]
    places = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]

    def function(*tensors):
        given = dict(zip(places, tensors, strict=True))
        filled = [given.get(i, v) for i, v in enumerate(values)]
        return case.function(
            *filled[: len(args)], **dict(zip(kwargs, filled[len(args) :], strict=True)), backend="triton"
        )

    return function, [values[i] for i in places]


def everything(case, change=lambda t: t):
    """Outputs, outputs of inference and gradients on Triton, with the inputs laid out by `change`."""
    function, tensors = leaves_of(case)
    inference = machinery._tuple(function(*(change(t) for t in tensors)))
    tensors = [change(t).detach().requires_grad_() for t in tensors]
    outputs = machinery._tuple(function(*tensors))
    generator = torch.Generator().manual_seed(1)
    cotangents = [change(torch.randn(o.shape, generator=generator).to(o)) for o in outputs]
    return [*inference, *outputs, *torch.autograd.grad(outputs, tensors, cotangents)]


@OPS
def test_surroundings_are_neither_read_nor_written(name, poisoned):
    """Tensors inside larger ones of NaN, aligned to nothing."""
    whole = []

    def embed(t):
        around = torch.full([n + 2 for n in t.shape], math.nan, device=t.device)
        inside = around[tuple(slice(1, -1) for _ in t.shape)].copy_(t)
        whole.append((around, inside))
        return inside

    expected = everything(CASES[name])
    got = everything(CASES[name], embed)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(t.isfinite().all() for t in got)
    assert all(around.isnan().sum() == around.numel() - inside.numel() for around, inside in whole)


@OPS
def test_gradients_for_some_inputs_are_those_for_all(name):
    function, tensors = leaves_of(CASES[name])

    def gradients(wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        outputs = machinery._tuple(function(*leaves))
        loss = sum((o * torch.linspace(-1, 1, o.numel(), device=DEVICE).reshape(o.shape)).sum() for o in outputs)
        return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])

    n = len(tensors)
    everything = gradients([True] * n)
    for i in range(n):
        assert torch.equal(gradients([i == j for j in range(n)])[0], everything[i])


def test_cosine_rope_with_one_output_unused():
    function, tensors = leaves_of(CASES["cosine_rope"])
    tensors = [t.requires_grad_() for t in tensors]
    outputs = function(*tensors)
    weights = [torch.randn_like(o) for o in outputs]
    both = torch.autograd.grad(outputs, tensors, weights, retain_graph=True)
    for i, flows in enumerate([(True, False, True), (False, True, False)]):
        alone = torch.autograd.grad(outputs[i], tensors, weights[i], retain_graph=True, materialize_grads=True)
        for got, whole, flow in zip(alone, both, flows, strict=True):
            assert torch.equal(got, whole if flow else torch.zeros_like(whole))


def test_cosine_rope_reads_no_more_than_a_gradient_needs():
    q, k, dq, dk = (torch.empty(1, 2, 3, 2, 16, device="meta") for _ in range(4))
    scale, angles = torch.empty(2, device="meta"), [torch.empty(n, 2, 2, device="meta") for n in (2, 3)]
    with triton_launch.recorded(H200) as launches:
        for grads in (None, k, None), (q, None, None), (None, None, scale):
            cosine_rope_triton.backward((dq, dk), (q, k, scale, *angles), (), grads, ())
    read = [[any(a is t for a in launch.arguments) for t in (dq, dk)] for launch in launches]
    assert read == [[False, True], [True, False], [True, False]]


# ---- sums over programs, offsets, grids -----------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [False, True], ids=["whole rows", "rows in pieces"])
def test_the_scales_gradient_is_one_sum_over_any_number_of_programs(pieces, monkeypatch, poisoned):
    """From one program for all blocks of an item to one for each; the same bits twice."""
    monkeypatch.setattr(ada_rms_norm_triton, "BACKWARD_BLOCK", 256)  # two tokens
    if pieces:
        monkeypatch.setattr(ada_rms_norm_triton, "LONGEST", 32)
        monkeypatch.setattr(ada_rms_norm_triton, "PIECE", 16)
    counts = []
    for warps in (1, 16, 1000):
        monkeypatch.setattr(ada_rms_norm_triton, "WARPS", warps)
        for scale in (2, 24), (24,):
            case = cases.norm_case(f"{warps} warps", (2, 9, 24), scale)
            launches = triton_launches(lambda: agrees(case))  # noqa: B023 (called at once)
            counts += [programs for kernel, programs in launches if "backward" in kernel]
        first, again = everything(case), everything(case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if DEVICE == "cpu":  # whose one processor is known
        assert counts == [2, 1, 4, 4, 18, 18] if pieces else [2, 1, 4, 4, 10, 9]


def triton_launches(call) -> list[tuple[str, int]]:
    """(kernel, programs) of every launch of a call, which runs."""
    seen, launch = [], triton_launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_launch,
            "launch",
            lambda kernel, programs, *a, **k: (
                seen.append((kernel.__name__, programs)),
                launch(kernel, programs, *a, **k),
            ),
        )
        call()
    return seen


@OPS
def test_wide_offsets_are_the_same_numbers(name, monkeypatch):
    narrow = everything(CASES[name])
    asked = []
    monkeypatch.setattr(triton_launch, "wide_offsets", lambda *tensors: asked.append(tensors) or True)
    assert all(torch.equal(a, b) for a, b in zip(everything(CASES[name]), narrow, strict=True))
    assert len(asked) == 3


def test_wide_offsets_are_taken_where_storage_needs_them():
    """2³¹ elements and more, on the meta device: in x, and in what is written where x repeats one row."""
    for rows, wide in (2**20, False), (2**20 + 1, True):
        x = torch.empty(rows, 2048, device="meta", dtype=torch.bfloat16)
        repeated = x[:1].expand(2 * rows, 2048)
        scale, weight = (torch.empty(n, 2048, device="meta", dtype=torch.bfloat16) for n in (1, 2048))
        rope = hdit_kernels.AxialRope(*(torch.empty(n, 8, 8, device="meta") for n in (1, 4)))
        with triton_launch.recorded(H200) as launches, hdit_kernels.use("triton"), torch.no_grad():
            for tensor in x, repeated:
                machinery.find("geglu").forward("triton", (tensor,), (tensor.new_empty(len(tensor), 1024),), ())
                hidden = tensor[None, :rows]
                machinery.find("ada_rms_norm").forward("triton", (hidden, scale), (x[None],), (1e-6,))
            LINEAR_GEGLU.forward("triton", (x, weight, None), (x.new_empty(rows, 1024),), ())
            q = x.view(-1, 1, 4, 8, 64)
            inputs = q, q[:1].expand_as(q), torch.empty(8, device="meta"), *rope
            machinery.find("cosine_rope").forward("triton", inputs, (torch.empty_like(q),) * 2, ())
        assert [launch.constants["WIDE"] for launch in launches] == [wide] * 6


@pytest.fixture
def only_programs(monkeypatch):
    """Runs those programs of a grid alone, in the interpreter; on a GPU all of them run."""

    def choose(ids):
        chosen = lambda n: ids if n > 1 else range(n)  # noqa: E731
        monkeypatch.setattr(triton.runtime.interpreter, "range", chosen, raising=False)

    return choose


GRID = 70_001
PROGRAMS = (0, 1, 65_535, 65_536, GRID - 1)
LARGE = {  # one row a program, and 16 of the projection
    "geglu": lambda: (torch.randn(GRID, 2),),
    "ada_rms_norm": lambda: (torch.randn(GRID, 2), torch.randn(GRID, 2), 1e-6),
    "cosine_rope": lambda: (*torch.randn(2, GRID, 1, 1, 1, 3), torch.randn(1), *torch.zeros(2, 1, 1, 0)),
    "linear_geglu": lambda: (torch.randn(16 * GRID, 3), torch.randn(2, 3), None),
}


@OPS
def test_more_programs_than_the_short_axes_of_a_grid_take(name, monkeypatch, only_programs, poisoned):
    """Forward and backward: each program's rows are right, and it writes no other."""
    monkeypatch.setattr(geglu_triton, "BLOCK", 1)
    monkeypatch.setattr(ada_rms_norm_triton, "FORWARD_BLOCK", 8)
    monkeypatch.setattr(ada_rms_norm_triton, "BACKWARD_BLOCK", 8)
    monkeypatch.setattr(cosine_rope_triton, "TOKENS", 1)
    op = machinery.OPS[name]
    arguments = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in LARGE[name]()]
    inputs, params = arguments[: len(op.inputs)], arguments[len(op.inputs) :]
    rows = len(inputs[0])
    ran = torch.cat([torch.arange(rows // GRID) + i * rows // GRID for i in PROGRAMS])
    only_programs(PROGRAMS)

    def check(run, results, exact):
        assert triton_launches(run)[0][1] == GRID
        for got, value in zip(results, exact, strict=True):
            if len(value) == rows:  # (not what is summed over rows)
                torch.testing.assert_close(got[ran], value[ran])
                assert DEVICE != "cpu" or got.flatten(1).isnan().any(1).sum() == rows - len(ran)

    outputs, exact = op.allocate(*arguments), machinery._tuple(op.reference(*arguments))
    check(lambda: op.forward("triton", inputs, outputs, params), outputs, exact)
    if name != "linear_geglu":
        needs = [True] * len(op.gradients)
        grads, exact_grads = op._empty_grads(inputs, needs), op._empty_grads(inputs, needs)
        op._vjp(exact, inputs, exact_grads, params)
        check(lambda: op.backward("triton", exact, inputs, (), grads, params), grads, exact_grads)


# ---- PyTorch around the kernels -------------------------------------------------------------------------------------


@OPS
def test_compile_fullgraph_around_each_op(name):
    function, tensors = leaves_of(CASES[name])
    total = lambda *t: sum(o.sin().sum() for o in machinery._tuple(function(*t)))  # noqa: E731
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend=backend)
    leaves = [t.clone().requires_grad_() for t in tensors]
    got = torch.autograd.grad(compiled(*leaves), leaves)
    exact = torch.autograd.grad(total(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), total(*tensors))
    assert len(graphs) == 2
    assert f"hdit.{name}" in graphs[1].code.replace("\n", "")
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """The operators that are called and the sizes of what they return."""

    def __init__(self):
        super().__init__()
        self.operators, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        results = [t for t in machinery._tuple(result) if isinstance(t, torch.Tensor)]
        self.sizes += [t.numel() for t in results if t.is_floating_point()]  # (the interpreter copies bytes)
        return result


def test_inference_never_makes_what_lies_between_projection_and_gate():
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((3, 50, 16), (64, 16), (64,)))
    output, between = 3 * 50 * 32, 3 * 50 * 64
    with Calls() as calls:
        hdit_kernels.linear_geglu(x, weight, bias, backend="triton")
    assert calls.operators == ["hdit.linear_geglu.default"]
    with Calls() as inside:
        LINEAR_GEGLU._run_forward(x, weight, bias, "triton")
    assert max(inside.sizes) == output
    with Calls() as calls:  # where a gradient is needed, it is kept
        hdit_kernels.linear_geglu(x, weight.requires_grad_(), bias, backend="triton")
    assert between in calls.sizes and "hdit.linear_geglu.default" not in calls.operators


def test_which_calls_of_linear_geglu_are_one_kernel():
    x, weight = torch.randn(5, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE, requires_grad=True)
    first = "triton" if DEVICE == "cuda" else "cpu"
    call = hdit_kernels.linear_geglu
    once = [
        (torch.no_grad, lambda: call(x, weight, backend="triton")),
        (torch.inference_mode, lambda: call(x, weight, backend="triton")),
        (lambda: hdit_kernels.use("triton"), lambda: call(x, weight.detach())),
        (contextlib.nullcontext, lambda: call(x, weight.detach(), backend="triton")),
    ]
    twice = [
        (contextlib.nullcontext, lambda: call(x, weight, backend="triton")),
        (torch.no_grad, lambda: torch.vmap(lambda row: call(row, weight, backend="triton"))(x)),
        (contextlib.nullcontext, lambda: torch.func.grad(lambda t: call(t, weight.detach()).sum())(x)),
        (torch.no_grad, lambda: call(x, weight, backend="reference")),
        (lambda: hdit_kernels.use("reference"), lambda: call(x, weight.detach())),
        (torch.no_grad, lambda: call(x.double(), weight.double())),
    ]
    (once if first == "triton" else twice).append((torch.no_grad, lambda: call(x, weight)))
    for calls, expected in (once, True), (twice, False):
        for context, function in calls:
            with context():
                names = [kernel for kernel, _ in triton_launches(function)]
            assert ("linear_kernel" in names) == expected, (names, expected)


def test_linear_geglu_as_one_kernel_under_autocast_meta_and_counters():
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((2, 5, 16), (24, 16), (24,)))
    call = lambda *t, backend="triton": hdit_kernels.linear_geglu(*t, backend=backend)  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16):
        names = [kernel for kernel, _ in triton_launches(lambda: call(x, weight, bias))]
        lowered, mixed = call(x, weight, bias), call(x.bfloat16(), weight, bias)
        with pytest.raises(RuntimeError, match="dtype"):  # as F.linear
            call(x, weight.double())
    assert names == ["linear_kernel"] and lowered.dtype is torch.bfloat16 and torch.equal(lowered, mixed)
    exact = call(*(t.bfloat16().double() for t in (x, weight, bias)), backend="reference")
    assert cases.error(lowered, exact, exact.bfloat16(), torch.bfloat16) <= 1
    with FlopCounterMode(display=False) as counter:
        call(x, weight, bias)
    assert counter.get_total_flops() == 2 * 10 * 16 * 24
    meta = call(*(t.to("meta") for t in (x, weight, bias)))
    assert meta.shape == (2, 5, 12) and meta.device.type == "meta"
    assert set(torch.library.opcheck(LINEAR_GEGLU.op, (x, weight, bias, "triton")).values()) == {"SUCCESS"}
    direct = LINEAR_GEGLU((x.requires_grad_(), weight, bias), (), "triton")  # differentiable all the same
    (got,) = torch.autograd.grad(direct.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(call(x, weight, bias, backend="reference").sum(), x)[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3, 4), torch.ones(2, 4, device="meta")), ValueError, "weight must be on x's device"),
        ((torch.ones(3, 4), torch.ones(0, 4)), ValueError, r"weight must be \(2n, 4\); got \(0, 4\)"),
        ((torch.ones(3, 4).int(), torch.ones(2, 4).int()), TypeError, "x must be float32.*got torch.int32"),
    ],
    ids=["device", "no rows", "integers"],
)
def test_linear_geglu_refuses_what_the_kernel_cannot_read(arguments, error, message):
    with pytest.raises(error, match=message):
        hdit_kernels.linear_geglu(*arguments, backend="triton")


def test_the_backends_of_linear_geglu_are_those_of_geglu():
    available = hdit_kernels.available_backends
    assert (
        available("linear_geglu", DEVICE) == available(hdit_kernels.linear_geglu, DEVICE) == available("geglu", DEVICE)
    )
    x, weight = torch.randn(5, 16, device=DEVICE), torch.randn(12, 16, device=DEVICE)
    for arguments in (x,), (x, weight), (x, weight, weight[:, 0]):
        assert hdit_kernels.explain("linear_geglu", *arguments) == hdit_kernels.explain("geglu", x)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in the interpreter, where Φ is 0
def test_gelu_is_better_than_float32_everywhere():
    """Φ is a fitted polynomial: on a grid as dense as its ripples, and far outside of what it was fitted to."""
    near = torch.linspace(-9, 9, 6001, dtype=torch.float64)
    far = torch.tensor([10.0, 14, 20, 50, 1e3, 1e10, 1e30], dtype=torch.float64)
    gate = torch.cat([near, far, -far]).float()
    x = torch.stack([torch.ones_like(gate), gate], -1).to(DEVICE).requires_grad_()
    y = hdit_kernels.geglu(x, backend="triton")
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = gate.double().requires_grad_()
    value = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    large = gate.abs().double().clamp(min=1)
    allowed = 1.3e-7 if DEVICE == "cpu" else 2.6e-7  # a GPU's exp2 is good to about 2⁻²²
    assert ((y[:, 0].double().cpu() - value) / large).abs().max() < allowed
    assert ((dx[:, 0].double().cpu() - value) / large).abs().max() < allowed
    assert (dx[:, 1].double().cpu() - slope).abs().max() < 2 * allowed
    special = torch.tensor([[1.0, math.inf], [1.0, -math.inf], [1.0, math.nan], [math.inf, 0.0]], device=DEVICE)
    got, exact = (hdit_kernels.geglu(special, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got[~got.isnan()], exact[~exact.isnan()])


def test_turns_keep_the_digits_of_float64_angles():
    """Of 1600 turns, which float32 holds to 5e-4 radians; and one axis in float64 alone is enough for its own."""
    generator = torch.Generator().manual_seed(0)
    height, width = (1e4 * torch.rand(n, 2, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    exact = torch.cat([height, width])
    for angles in (height, width), (height.transpose(0, 1).contiguous().transpose(0, 1), width):
        cos, sin = cosine_rope_triton.turns(*angles)
        assert cos.dtype is sin.dtype is torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        assert (cos - exact.cos()).abs().max() < 1e-7 and (sin - exact.sin()).abs().max() < 1e-7
    cos, _ = cosine_rope_triton.turns(height, width.float())
    assert (cos[:4] - height.cos()).abs().max() < 1e-7


@pytest.mark.parametrize("case", [c for c in cases.timed() if c.op in CASES and c.op != "linear_geglu"], ids=str)
def test_timed_shapes_have_a_block_for_every_processor_or_one_access_each(case):
    """On an H200, in bfloat16: no thread of a full block moves less than 16 bytes at a time."""
    for launch in recorded(case):
        constants, threads = launch.constants, 32 * launch.options["num_warps"]
        piece = (
            constants["PAIRS"] * constants["ROWS"] * constants["COLUMNS"]
            if "PAIRS" in constants
            else math.prod(constants[k] for k in ("ROWS", "COLUMNS", "TOKENS", "CHANNELS") if k in constants)
        )
        assert piece >= 8 * threads

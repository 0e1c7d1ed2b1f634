"""The ahead-of-time check of the Triton kernels: what it makes of kernels of which everything is known.

It needs Triton's compiler, and the other tests its interpreter: everything is found out in one process of its own, by
`facts`, which prints it.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from hdit_kernels import cases

ROOT = Path(__file__).parent.parent
BLOCK = 128  # float32 elements: one access of 16 bytes for each thread of a warp


@triton.jit
def part(x, n, SIZE: tl.constexpr):
    total = tl.zeros([SIZE], tl.float32)
    for c in range(0, n):
        total += tl.load(x + c * SIZE + tl.arange(0, SIZE))
    return total


@triton.jit
def nested(x, y, rows, n, SIZE: tl.constexpr):
    for row in range(0, rows):
        total = part(x + row * n * SIZE, n, SIZE)
        for c in range(0, n):
            at = (row * n + c) * SIZE + tl.arange(0, SIZE)
            tl.store(y + at, tl.load(x + at) * total)


@triton.jit
def looked_up(x, table, y, n, SIZE: tl.constexpr):
    total = tl.zeros([SIZE], tl.float32)
    c = 0
    while c < n:
        total += tl.load(x + c * SIZE + tl.arange(0, SIZE)) * tl.load(table + (c & 3) * SIZE + tl.arange(0, SIZE))
        c += 1
    tl.store(y + tl.arange(0, SIZE), total)


@triton.jit
def multiplied(x, y, n, TIMES: tl.constexpr, IDLE: tl.constexpr, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for c in range(0, n):
        for d in range(0, TIMES):
            a = tl.load(x + (c * TIMES + d) * SIZE * SIZE + i * SIZE + j)
            total = tl.dot(a, tl.trans(a), total)
        for _d in range(0, IDLE):
            total = tl.dot(tl.load(x + i * SIZE + j), tl.load(x + i * SIZE + j), total)
    tl.store(y + i * SIZE + j, total)


@triton.jit
def crowded(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + at)
    tl.store(y + at, a * tl.sum(a, 0)[None, :] + tl.sum(a, 1)[:, None])


@triton.jit
def product(a, b, total):
    return tl.dot(a, tl.trans(b), total)


@triton.jit
def lost_factor(x, y, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    zero = tl.zeros([SIZE, SIZE], tl.bfloat16)
    now = zero
    before = zero
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for c in range(0, n):
        a = tl.load(x + c * SIZE * SIZE + i * SIZE + j)
        total = product(before, a, total)
        before = now
        now = a
        total = product(now, a, total)
    tl.store(y + i * SIZE + j, total)


@triton.jit
def kept_factor(x, y, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    now = tl.zeros([SIZE, SIZE], tl.bfloat16)
    before = tl.zeros([SIZE, SIZE], tl.bfloat16)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for c in range(0, n):
        a = tl.load(x + c * SIZE * SIZE + i * SIZE + j)
        total = product(before, a, total)
        before = now
        now = a
        total = product(now, a, total)
    tl.store(y + i * SIZE + j, total)


@triton.jit
def lost_sum(x, y, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    now, before = tl.zeros([SIZE, SIZE], tl.float32), 0.0
    before = now
    for c in range(0, n):
        a = tl.load(x + c * SIZE * SIZE + i * SIZE + j)
        tl.store(y + c * SIZE * SIZE + i * SIZE + j, before)
        before, now = now, tl.dot(a, tl.trans(a))


@triton.jit
def argued(x, shifted, nothing, pair, sixteen, odd, one, long, ratio, flag, KIND: tl.constexpr):
    tl.store(x, ratio + odd + sixteen)


# A loop that is in no source, and two copies of the inner loop in place of the outer one, which ran twice.
UNFOLDED = """
  tt.func public @kernel(%x: !tt.ptr<f32>, %n: i32) {
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %c2_i32 = arith.constant 2 : i32
    scf.for %i = %c0_i32 to %c2_i32 step %c1_i32  : i32 {
      scf.for %j = %c0_i32 to %n step %c1_i32  : i32 {
        %k = arith.addi %i, %j : i32
        %l = arith.addi %k, %j : i32
      }
    }
    tt.return
  }
"""
LISTING = """
	//## File "kernel.ttir", line 12
        /*0000*/                   MOV R0, R0 ;
.L_x_0:
        /*0010*/                   MOV R0, R0 ;
        /*0020*/              @P0 BRA `(.L_x_0) ;
.L_x_1:
	//## File "kernel.ttir", line 8
        /*0030*/                   IADD3 R1, R1, R1, RZ ;
        /*0040*/              @P0 BRA `(.L_x_1) ;
.L_x_2:
	//## File "kernel.ttir", line 9 inlined at "kernel.ttir", line 7
	//## File "kernel.ttir", line 7
        /*0050*/                   IADD3 R1, R1, R1, RZ ;
        /*0060*/              @P0 BRA `(.L_x_2) ;
        /*0070*/                   EXIT ;
"""


REGIONS = """\
scf.for %i = %a to %b step %c  : i32 {
  scf.if %p {
    %x = arith.addi %i, %i : i32
  } else {
    %y = arith.addi %i, %i : i32
  }
  %r = scf.while (%w = %z) : (i32) -> i32 {
    scf.condition(%p) %w : i32
  } do {
  ^bb0(%v: i32):
    scf.yield %v : i32
  }
}
"""
DROPPED = (  # before the loop, in the loop
    ("a = z; b = z", "a = b; b = g()"),
    ("a, b, c = z, z, 1", "a, b = b, c + a"),
    ("a = z; b = a", "a = b; b += 1"),
    ("a = z; b = a", "b += 1; a = b"),
    ("a = z; b = a", "c = a; a = b; b = c"),
    ("a = z", "a = g(a); z = a"),
    ("a = z; b = g()", "a = b; b = g()"),
    ("a, b = f()", "a = b; b = g()"),
)


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(folder: Path) -> dict:
    from benchmarks import ahead_of_time, sass, triton_check
    from hdit_kernels import triton_launch

    ahead_of_time.CACHE = folder / "cache"

    def noted(kernel, *arguments, **options):
        with triton_launch.recorded(ahead_of_time.TARGETS["sm_90a"]) as launches:
            triton_launch.launch(kernel, 1, *arguments, **options)
        return launches[0]

    def judged(launch, dtype="float32", arch="sm_90a"):
        """(what it needs, what the check says of it)"""
        job, complaints = ahead_of_time.specialised(launch, arch), triton_check.Complaints()
        needs = triton_check.compile_all([job])[job]
        one = triton_check.Pass("case", dtype, arch, "forward", ((launch, job),))
        triton_check.judge(job, needs, one, complaints)
        return needs, complaints.sentences()

    def ran(*command):
        """(what it prints, what it says in the end)"""
        out = io.StringIO()
        with mock.patch.object(sys, "argv", ["triton_check", *command]), contextlib.redirect_stdout(out):
            try:
                triton_check.main()
            except SystemExit as end:
                return out.getvalue(), str(end)
        return out.getvalue(), ""

    x, half, found = tensor(1 << 24), tensor(1 << 24, dtype=torch.bfloat16), {}

    needs, said = judged(noted(nested, x, x, 3, 7, SIZE=BLOCK, num_warps=1))
    counts = needs.profile.per_warp(needs.profile.trips((3, 5, 7)))
    issued = [needs.profile.per_warp((rows, 5, 7))["issue"] for rows in (0, 1, 2)]
    found["nested"] = {"read": counts["l2", 0], "written": counts["l2", None], "issued": issued, "said": said}
    needs, _ = judged(noted(looked_up, x, tensor(4 * BLOCK), tensor(BLOCK), 1000, SIZE=BLOCK, num_warps=1))
    counts = needs.profile.per_warp((1000,))
    found["l2_us"] = sass.microseconds(counts, 1, 1000, 1.0, [4 << 24, 16 * BLOCK, 4 * BLOCK])["l2"]
    launch = noted(multiplied, half, x, 9, TIMES=3, IDLE=0, SIZE=64)
    needs, said = judged(launch)
    found["multiplied"] = {
        "macs": 4 * needs.profile.per_warp(needs.profile.trips((9, 3, 0)))["macs"],
        "trips": {str(t): needs.profile.trips(t) for t in ((9, 3, 0), (1, 9, 3), (), (9,), (9, 4), (9, 3, 2))},
        "said": said,
    }
    unsaid = triton_check.Complaints()
    triton_check.predict(launch, needs, "kernel", "case", unsaid)
    found["unsaid"] = unsaid.sentences()
    fallback = noted(multiplied, half, x, 9, TIMES=3, IDLE=0, SIZE=64, trips=(0, 3))
    idle = noted(multiplied, half, x, 9, TIMES=3, IDLE=0, SIZE=64, trips=(0, 0))
    unsaid = triton_check.Complaints()
    found["idle"] = [triton_check.predict(one, needs, "kernel", "case", unsaid) for one in (fallback, idle)]
    found["not idle"] = unsaid.sentences()
    needs, _ = judged(noted(multiplied, half, x, 9, TIMES=3, IDLE=0, SIZE=64, num_warps=2))
    counts = needs.profile.per_warp((9, 3))
    found["two warps"] = 2 * counts["macs"], 2 * counts["tensor"]
    lines = (
        "HMMA.1688.F32.TF32 R0, R4, R8, R0",
        "HGMMA.64x32x16.F32.BF16 R0, R8, gdesc[UR4], R0",
        "LDSM.16.MT88.4 R0, [R4]",
    )
    found["costs"] = [sass.cost(line) for line in lines]
    unfolded = sass.profile(LISTING, UNFOLDED)
    found["unfolded"] = unfolded.loops, [unfolded.per_warp((2, n))["issue"] for n in (0, 1, 10)]

    for name, options in ("roomy", {}), ("crowded", {"maxnreg": 32}):
        needs, said = judged(noted(crowded, x, x, SIZE=64, num_warps=1, **options))
        found[name] = needs.registers, needs.spill, said
    with mock.patch.dict(triton_check.MAY_SPILL, {"test_triton_check.crowded float32": "it is a test"}):
        needs, said = judged(noted(crowded, x, x, SIZE=64, num_warps=1, maxnreg=64))
    found["may spill"] = needs.spill, said

    kernels = [*itertools.product(ahead_of_time.TARGETS, (lost_factor, kept_factor)), ("sm_90a", lost_sum)]
    for arch, kernel in kernels:
        needs, said = judged(noted(kernel, half, x, 5, SIZE=64), "bfloat16", arch)
        found[f"{kernel.fn.__name__} {arch}"] = said, needs.mma
    found["regions"] = list(sass.read_loops(REGIONS)[1].values())
    found["lost"] = [(function, name) for function, _, name in ahead_of_time.lost_names(Path(__file__).read_text())]
    found["dropped"] = {}
    for before, body in DROPPED:
        loop = "".join(f"        {line}\n" for line in body.split("; "))
        source = f"@triton.jit\ndef kernel(n):\n    {before}\n    while n > 0:\n{loop}"
        found["dropped"][f"{before} | {body}"] = [name for _, _, name in ahead_of_time.lost_names(source)]

    arguments = x, x[1:], None, (tensor(16), 32), 48, 17, 1, 1 << 40, 0.5, True
    job = ahead_of_time.specialised(noted(argued, *arguments, KIND="some", num_warps=8, maxnreg=64), "sm_90a")
    found["signature"] = {name: str(kind) for name, kind in job.signature}
    found["constants"] = {str(place): value for place, value in job.constants}
    found["divisible"] = [str(place) for place, known in job.attributes if ("tt.divisibility", 16) in known]
    found["options"] = dict(job.options)
    same = [ahead_of_time.specialised(noted(argued, x, x[4:], *arguments[2:], KIND="some"), "sm_90a") for _ in "ab"]
    found["one kernel"] = len(set(same))

    with mock.patch.object(triton_check, "compiled", lambda job: os.abort()):
        found["died"] = triton_check.compile_all([job])[job]
    found["no code"] = judged(noted(part, x, 5, SIZE=100))[1]  # tl.arange takes powers of 2
    with mock.patch("pathlib.Path.exists", lambda path: False), mock.patch("shutil.which", lambda name: None):
        found["no tool"] = judged(noted(crowded, x, x, SIZE=64, num_warps=1))[1]

    found["arch"] = ran("--arch", "sm_90a", "sm_70")[1]
    found["only"] = ran("--only", "no such case")[1]
    with mock.patch.object(triton_launch, "INTERPRETED", True):
        found["interpreter"] = ran()[1]
    found["geglu"] = ran("--only", "geglu[256x4608", "--arch", "sm_90a", "--results", str(folder))
    with mock.patch("hdit_kernels.geglu_triton.forward", side_effect=RuntimeError("it reads")):
        found["no launcher"] = ran("--only", "geglu[1x", "--arch", "sm_90a")[1]
    real = triton_launch.launch
    with mock.patch.object(triton_launch, "launch", lambda *a, **k: real(*a, **{**k, "moved": 1})):
        found["too fast"] = ran("--only", "geglu[256x4608", "--arch", "sm_90a")[1]
    gpu_sized = cases.timed_on_gpu()
    linear = next(case for case in gpu_sized if case.op == "linear_geglu")
    row = dict.fromkeys((*triton_check.US, "predicted_us", "macs"), 1.0)
    found["linear"] = [
        ([str(job) for _, job in one.launches], [list(triton_check.summed(one, [{**row, "dots": n}])) for n in (0, 1)])
        for one in triton_check.passes(linear, "bfloat16", "sm_90a")
    ]
    found["gpu"] = (
        triton_check.FLAGSHIP in map(str, gpu_sized),
        [max(c.tensors[0] for c in gpu_sized if c.op == op) for op in ("geglu", "ada_rms_norm")],
    )
    limited = triton_check.Complaints()
    row = {"case": triton_check.FLAGSHIP, "dtype": "bfloat16", "kernel": "all"}
    rows = [
        {**row, "direction": direction, "times_floor": limit + off}
        for direction, limit in triton_check.LIMITS.items()
        for off in (-0.01, 0.01)
    ]
    rows.append({**row, "direction": "forward", "dtype": "float32", "times_floor": 9.0})
    triton_check.judge_flagship(rows, limited)
    found["limits"] = limited.sentences()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("triton_check")


@pytest.fixture(scope="module")
def found(folder):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    script = "import json, pathlib, sys, test_triton_check as t; print(json.dumps(t.facts(pathlib.Path(sys.argv[1]))))"
    command = [sys.executable, "-c", script, str(folder)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_instructions_are_weighted_with_the_loops_they_lie_in(found):
    nested = found["nested"]
    assert nested["said"] == []
    assert nested["read"] == 3 * (5 + 7) * 4 * BLOCK  # `part` runs 5 times a row, the loop behind it 7 times
    assert nested["written"] == 3 * 7 * 4 * BLOCK
    before, one, two = nested["issued"]
    assert before > 0 and one - before == two - one > 12 * 5


def test_what_stays_in_the_first_level_cache_is_fetched_once_for_each_processor(found):
    streamed, table, written = 1000 * 1000 * 4 * BLOCK, 132 * 16 * BLOCK, 1000 * 4 * BLOCK
    assert found["l2_us"] == pytest.approx((streamed + table + written) / 7e12 * 1e6)


def test_multiply_adds_are_exact(found):
    assert found["multiplied"]["macs"] == 9 * 3 * 64**3
    assert found["multiplied"]["said"] == []  # what lies in a loop that never runs is not missing
    macs, clocks = found["two warps"]  # too few for wgmma
    assert macs == 1024 * clocks == 9 * 3 * 64**3
    tf32, wgmma, matrices = found["costs"]
    assert tf32 == {"issue": 1, "macs": 16 * 8 * 8, "tensor": 2.0}
    assert wgmma["macs"] == 64 * 32 * 16 / 4 and wgmma["l1"] == 32 * 16 * 2 / 4  # for one of four warps
    assert 1024 < wgmma["macs"] / wgmma["tensor"] < 2048 and matrices["l1"] == 4 * 64 * 2


def test_loops_that_a_compiler_unfolds_or_doubles(found):
    assert found["regions"] == [None, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, None]
    loops, (never, once, often) = found["unfolded"]
    assert loops == [2, None]
    assert never == 4  # two instructions outside of loops, and a loop that no line of the source is behind
    assert once - never == 2 * 2 and often - never == 10 * 2 * 2


def test_loops_that_triton_unfolds_may_be_named(found):
    assert found["multiplied"]["trips"] == {
        "(9, 3, 0)": [9, 3], "(1, 9, 3)": [9, 3], "()": None, "(9,)": None, "(9, 4)": None, "(9, 3, 2)": None
    }  # fmt: skip
    trips, moved = found["unsaid"]
    assert trips == "kernel of case must be launched with trips= of its loops, (?, 3); got ()"
    assert moved == "kernel of case must be launched with moved= > 0, the bytes that it moves; got 0"
    assert found["not idle"] == [moved]
    unknown, nothing = found["idle"]
    assert unknown == {} and nothing["predicted_us"] == 0


def test_spills_are_seen(found):
    registers, spill, said = found["roomy"]
    assert registers > 100 and spill == 0 and said == []
    registers, spill, (spills, gave_up) = found["crowded"]
    assert registers <= 32 and spill > 1000
    kernel = "test_triton_check.crowded of case forward in float32 for sm_90a"
    assert spills == f"{kernel} spills {spill} bytes ({registers} registers)"
    assert gave_up.startswith(f"{kernel} got {registers} registers and a stack of ") and "ptxas gave up" in gave_up
    spill, said = found["may spill"]
    assert spill > 0 and said == []


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "gfx942"])
def test_products_that_triton_loses_are_missed(found, arch):
    said, mma = found[f"kept_factor {arch}"]
    assert said == [] and mma > 0
    kernels = {"lost_factor": 2, "lost_sum": 1} if arch == "sm_90a" else {"lost_factor": 2}
    for kernel, dots in kernels.items():
        (sentence,), _ = found[f"{kernel} {arch}"]
        assert sentence == (
            f"test_triton_check.{kernel} of case forward in bfloat16 for {arch} has {dots} tl.dot in its source, "
            "and 1 of them vanish or multiply zeros"
        )


def test_names_that_triton_drops_are_found_in_the_source(found):
    assert found["lost"] == [["lost_factor", "before"], ["lost_sum", "before"]]
    lost = dict(zip(found["dropped"], (["a"], ["a"], ["a"], [], [], [], [], []), strict=True))
    assert {body: sorted(names) for body, names in found["dropped"].items()} == lost


def test_arguments_are_specialised_as_triton_does(found):
    assert found["signature"] == {
        "x": "*fp32", "shifted": "*fp32", "nothing": "constexpr", "pair": "('*fp32', 'i32')", "sixteen": "i32",
        "odd": "i32", "one": "constexpr", "long": "i64", "ratio": "fp32", "flag": "u1", "KIND": "constexpr",
    }  # fmt: skip
    assert found["constants"] == {"(2,)": None, "(6,)": 1, "(10,)": "some"}
    assert found["divisible"] == ["(0,)", "(3, 0)", "(3, 1)", "(4,)", "(7,)"]  # x[1:] begins 4 bytes too late
    assert found["options"] == {"num_warps": 8, "num_stages": 1, "maxnreg": 64, "debug": False}
    assert found["one kernel"] == 1


def test_a_compiler_that_fails_is_named(found):
    assert found["died"] == "the compiler died (exit code -6)"
    (sentence,) = found["no code"]
    assert sentence.startswith("test_triton_check.part of case forward in float32 for sm_90a does not compile: ")
    assert "power of 2" in sentence
    (sentence,) = found["no tool"]
    assert "nvdisasm is neither at " in sentence and "pip install nvidia-cuda-nvdisasm" in sentence


def test_bad_input_is_a_sentence(found):
    assert found["arch"] == "triton_check: --arch must be of sm_80, sm_90a, sm_100a, gfx942; got 'sm_70'"
    assert found["only"] == "triton_check: no case with 'no such case' in its name has a Triton kernel"
    assert found["interpreter"].startswith("triton_check: TRITON_INTERPRET must not be 1")


def test_a_launcher_that_fails_is_named(found):
    where = "geglu[1x1536] in float32 for sm_90a (and of 2 more)"
    assert found["no launcher"] == f"triton_check: a launcher of {where} fails: RuntimeError: it reads"


def test_every_launch_and_pass_is_a_row(found, folder):
    printed, said = found["geglu"]
    assert said == "" and "Predicted for an H200 (sm_90a), not measured" in printed
    with (folder / "triton_predicted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} == {"predicted"} and {row["triton"] for row in rows} == {triton.__version__}
    geglu = [row for row in rows if row["case"] == "geglu[256x4608]" and row["dtype"] == "bfloat16"]
    assert [(row["direction"], row["kernel"]) for row in geglu] == [
        ("forward", "geglu.forward_kernel"), ("forward", "all"), ("backward", "geglu.backward_kernel"),
        ("backward", "all"), ("forward+backward", "all"),
    ]  # fmt: skip
    forward, both = geglu[1], geglu[4]
    assert float(forward["floor_us"]) == pytest.approx(256 * 2304 * 3 * 2 / 4.3e12 * 1e6, abs=1e-3)
    assert 1 <= float(forward["times_floor"]) < 2 and forward["products"] == ""
    assert float(both["predicted_us"]) == pytest.approx(sum(float(geglu[i]["predicted_us"]) for i in (1, 3)), abs=2e-3)


def test_a_pass_whose_products_are_not_ours_has_no_floor(found):
    forward, backward = found["linear"]
    assert forward[0] == ["geglu.linear_kernel"] and backward[0] == ["geglu.backward_kernel"]
    for _, (without, with_products) in found["linear"]:
        assert "floor_us" not in without and "times_floor" not in without
        assert {"floor_us", "times_floor", "products"} <= set(with_products)


def test_a_prediction_below_the_floor_is_none(found):
    assert "× the floor: trips= or moved= of a launch must be too small" in found["too fast"]


def test_limits_of_the_flagship(found):
    exists, elements = found["gpu"]
    assert exists and min(elements) * 2 >= 256e6  # bytes in 16 bits
    forward, both = found["limits"]
    assert forward.startswith("forward of ") and "is predicted at 1.31 × its floor; the limit is 1.3" in forward
    assert both.startswith("forward+backward of ") and "× its floor; the limit is " in both

"""The benchmarks themselves: rows timed for real, peers that are right and wrong ones refused, ceilings and memory
that can be believed, results merged and never torn, the picture drawn."""

import csv
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hdit_kernels
from hdit_kernels import _C, cases

ROOT = Path(__file__).parent.parent
BREAK = """
from hdit_kernels import op
forward = op.OPS["ada_rms_norm"].forward
def broken(backend, inputs, outputs, params):
    forward(backend, inputs, outputs, params)
    outputs[0].mul_(1.001)
op.OPS["ada_rms_norm"].__dict__["forward"] = broken
"""


def page(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def conftest():
    return page("conftest")


@pytest.fixture(scope="module")
def peers():
    return page("peers")


def run(folder: Path, select: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--results", str(folder), "-k", select, *more],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if "XDIST" not in k} | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_one_row_is_timed_and_written(tmp_path, conftest):
    result = run(tmp_path, "ada_rms_norm and 1x256 and float32 and not compiled")
    assert result.returncode == 0, result.stdout
    (path,) = tmp_path.glob("ops_*.csv")
    rows = list(csv.DictReader(path.open()))
    assert {(r["backend"], r["direction"], r["threads"]) for r in rows} == {
        (backend, direction, str(threads))
        for backend in ("cpu", "eager idiom", "reference")
        for direction in ("forward", "forward+backward")
        for threads in conftest.THREADS
    }
    for row in rows:
        size = 4 * 256 * (2 if row["direction"] == "forward" else 5)
        assert float(row["gb_s"]) == pytest.approx(size / float(row["ms"]) / 1e6, rel=1e-3)
        assert float(row["percent_copy"]) == pytest.approx(100 * float(row["gb_s"]) / float(row["copy_gb_s"]), abs=1)
        assert row["gflop_s"] == row["percent_peak"] == ""  # no products
        assert tuple(row) == conftest.COLUMNS
        assert float(row["ms"]) > 0 and float(row["copy_gb_s"]) > 0.1 and float(row["matmul_gflop_s"]) > 1
        assert abs(float(row["times_floor"]) / (float(row["ms"]) / float(row["floor_ms"])) - 1) < 0.01
        assert row["device"] and row["date"] and row["commit"]
    assert "× floor" in result.stdout and "ada_rms_norm[1x256]" in result.stdout


def test_a_backend_that_does_not_match_is_not_timed(tmp_path):
    (tmp_path / "break_ada_rms_norm.py").write_text(BREAK)
    result = run(tmp_path, "ada_rms_norm and 1x256 and float32 and cpu", "-p", "break_ada_rms_norm")
    assert result.returncode == 1
    assert "not timed: cpu does not match the reference" in result.stdout
    assert not list(tmp_path.glob("*.csv"))


def row(conftest, **changes):
    return {**dict.fromkeys(conftest.COLUMNS, ""), "what": "ops", "device": "A B", "ms": "2.0", **changes}


def test_rows_of_the_same_case_are_replaced_and_others_kept(tmp_path, conftest):
    first = [row(conftest, case="a", threads=2), row(conftest, case="b", threads=2)]
    (path,) = conftest.write(first, tmp_path)
    conftest.write([row(conftest, case="b", threads=2, ms="3.0"), row(conftest, case="b", threads=1)], tmp_path)
    found = [(r["case"], r["threads"], r["ms"]) for r in csv.DictReader(path.open())]
    assert found == [("a", "2", "2.0"), ("b", "2", "3.0"), ("b", "1", "2.0")]
    assert [p.name for p in tmp_path.iterdir()] == ["ops_a-b.csv"]


def test_ratios_are_to_the_peers_of_the_same_case(conftest):
    rows = [
        row(conftest, case="a", backend="cpu", ms="2.0"),
        row(conftest, case="a", backend="reference", ms="8.0"),
        row(conftest, case="a", backend="compiled reference", ms="3.0"),
        row(conftest, case="b", backend="reference", ms="99.0"),
        row(conftest, case="c", backend="cpu", ms="1.0"),
    ]
    conftest.compare(rows)
    assert [(r["times_reference"], r["times_compiled"], r["times_best_peer"]) for r in rows] == [
        ("4.00", "1.50", "1.50"),
        ("1.00", "0.38", "0.38"),
        ("2.67", "1.00", "1.00"),
        ("1.00", "", "1.00"),
        ("", "", ""),
    ]


def test_rows_of_attention_know_their_share_of_the_peak_and_are_drawn(tmp_path):
    result = run(tmp_path, "attention and 64x64 and float32 and 1-thread and (cpu or tiled) and not backward")
    assert result.returncode == 0, result.stdout
    (path,) = tmp_path.glob("ops_*.csv")
    rows = {row["backend"]: row for row in csv.DictReader(path.open())}
    assert set(rows) == {"cpu", "tiled SDPA"}
    flops, size = 2 * 64**2 * 2 * 49 * 128, 4 * 64**2 * 2 * 4 * 64
    for row in rows.values():
        rate = flops / float(row["ms"]) / 1e6
        assert float(row["gflop_s"]) == pytest.approx(rate, rel=1e-3)
        assert float(row["gb_s"]) == pytest.approx(size / float(row["ms"]) / 1e6, rel=1e-3)
        assert float(row["percent_peak"]) == pytest.approx(100 * rate / float(row["peak_gflop_s"]), abs=0.1)
    best = float(rows["tiled SDPA"]["ms"]) / float(rows["cpu"]["ms"])
    assert float(rows["cpu"]["times_best_peer"]) == pytest.approx(best, abs=0.01)
    roofline = page("roofline")
    assert {row["backend"] for row in roofline.last_run(path)} == rows.keys()
    picture = roofline.draw(path)
    assert picture.parent == tmp_path and 10_000 < picture.stat().st_size < 150_000


def test_the_picture_is_of_the_last_run(tmp_path, conftest):
    roofline = page("roofline")
    same = dict(case="neighborhood_attention_qkvpacked[64x64x2x64 k7]", dtype="float32", threads=1, gflop_s="20",
                gb_s="2", copy_gb_s="10", peak_gflop_s="100")  # fmt: skip
    rows = [
        row(conftest, **same, backend="cpu", direction="forward", date="2026-01-02", commit="new"),
        row(conftest, **same, backend="reference", direction="forward", date="2026-01-01", commit="old"),
        row(conftest, **{**same, "gflop_s": ""}, backend="tiled SDPA", direction="forward", date="2026-01-03"),
    ]
    (path,) = conftest.write(rows, tmp_path)
    assert [(r["backend"], r["commit"], r["gflop_s"]) for r in roofline.last_run(path)] == [("cpu", "new", 20.0)]
    assert roofline.side(rows[0]) == 64
    (path,) = conftest.write([row(conftest, **same, backend="other")], tmp_path / "other")
    with pytest.raises(ValueError, match="no rows of attention in float32"):
        roofline.last_run(path)


@pytest.mark.parametrize(
    ("peer", "grid"),
    [("shifted products", (9, 13)), ("shifted products", (7, 8)), ("tiled SDPA", (16, 24)), ("tiled SDPA", (8, 32)),
     ("FlexAttention", (9, 13))],
)  # fmt: skip
def test_peers_are_neighborhood_attention(peers, peer, grid):
    case = cases.attention_case("peer", (2, *grid), 3, 16, packed=True, cosine=True, rope=2, lse=False)
    make, trains = peers.PEERS[peer]
    with torch.compiler.set_stance("force_eager"):
        wrong = peers.errors(make(grid, 7), case, torch.float32, trains)
    assert wrong.keys() == {"output", *(["gradient of qkv", "gradient of cosine_scale"] if trains else [])}
    assert max(wrong.values()) <= 1, wrong


def test_a_wrong_peer_is_noticed(peers):
    case = cases.attention_case("peer", (1, 9, 8), 2, 16, packed=True, cosine=True, rope=2, lse=False)
    attention = functools.partial(hdit_kernels.neighborhood_attention_qkvpacked, backend="reference")

    def wrong(change):
        errors = peers.errors(change, case, torch.float32)
        return {name for name, error in errors.items() if not error <= 1}

    assert wrong(attention) == set()
    everything = {"output", "gradient of qkv", "gradient of cosine_scale"}
    assert wrong(lambda qkv, **options: attention(qkv, **options) * 1.001) == everything
    assert wrong(lambda qkv, **options: attention(qkv, 5, **options)) == everything
    off = lambda qkv, cosine_scale, rope: attention(  # noqa: E731
        qkv, cosine_scale=cosine_scale.detach() + 0.999 * (cosine_scale - cosine_scale.detach()), rope=rope
    )
    assert wrong(off) == {"gradient of cosine_scale"}


def test_the_peak_is_above_a_matmul_and_below_what_a_core_can_do():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    matmul = 2 * 512**3 / page("conftest").seconds(lambda: a @ a, rounds=20)
    torch.set_num_threads(before)
    peak = _C.cpu.peak_flops("float32", 1)
    assert 0.95 * matmul < peak < 6e9 * 2 * 2 * 16  # two vectors of 16 multiply-adds a cycle at 6 GHz
    if len(_C.cpu.instruction_sets()) > 1:
        best = _C.cpu.instruction_set()
        _C.cpu.set_instruction_set(_C.cpu.instruction_sets()[0])
        baseline = _C.cpu.peak_flops("float32", 1)
        _C.cpu.set_instruction_set(best)
        assert peak > 1.5 * baseline
    bfloat16 = _C.cpu.peak_flops("bfloat16", 1)
    assert bfloat16 > peak if "avx512_bf16" in _C.cpu.features() else bfloat16 == 0
    with pytest.raises(ValueError, match="dtype is 'int8', but must be 'float32' or 'bfloat16'"):
        _C.cpu.peak_flops("int8", 1)
    with pytest.raises(ValueError, match="threads is 0"):
        _C.cpu.peak_flops("float32", 0)


def test_attention_holds_no_copies_of_its_inputs():
    peak_memory, tokens = page("memory").peak_memory, 256**2 * 2 * 64 * 4  # bytes of q, of k, of v
    results = tokens + tokens // 64  # out and lse
    forward = peak_memory(256, "float32", "cpu", "forward", 1)
    assert 0.95 * results < forward < results + tokens / 4
    both = peak_memory(256, "float32", "cpu", "forward+backward", 1)
    assert 0.95 * (results + 3 * tokens) < both < results + 3 * tokens + tokens / 4  # and the gradient of qkv

"""The benchmarks themselves: one row timed for real, a wrong backend refused, results merged and never torn."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BREAK = """
from hdit_kernels import op
forward = op.OPS["ada_rms_norm"].forward
def broken(backend, inputs, outputs, params):
    forward(backend, inputs, outputs, params)
    outputs[0].mul_(1.001)
op.OPS["ada_rms_norm"].__dict__["forward"] = broken
"""


@pytest.fixture
def conftest():
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, select: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--results", str(folder), "-k", select, *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_one_row_is_timed_and_written(tmp_path, conftest):
    result = run(tmp_path, "ada_rms_norm and 1x256 and float32 and not compiled")
    assert result.returncode == 0, result.stdout
    (path,) = tmp_path.glob("ops_*.csv")
    rows = list(csv.DictReader(path.open()))
    assert {(r["backend"], r["direction"]) for r in rows} == {
        (b, d) for b in ("cpu", "eager idiom", "reference") for d in ("forward", "forward+backward")
    }
    for row in rows:
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
    ]
    conftest.compare(rows)
    assert [(r["times_reference"], r["times_compiled"]) for r in rows] == [
        ("4.00", "1.50"),
        ("1.00", "0.38"),
        ("2.67", "1.00"),
        ("1.00", ""),
    ]

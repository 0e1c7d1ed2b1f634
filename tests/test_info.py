"""`python -m hdit_kernels.info`, broken and absent binaries, worker processes, and the memory of the reference."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import hdit_kernels
from hdit_kernels import info
from hdit_kernels import op as machinery

PACKAGE = Path(hdit_kernels.__file__).parent


@pytest.fixture(autouse=True)
def without_the_interpreter(monkeypatch):
    """As on a user's machine: with it every Triton kernel would count as present, and be compared, slowly."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(machinery, "_present_cache", {})


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    before = ""
    if path:  # and no editable install, which finds what that path lacks in the source tree
        before = f"import sys; sys.path.insert(0, {str(path)!r})\n"
        before += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    return subprocess.run([sys.executable, "-W", "always", "-c", before + code], capture_output=True, text=True)


def test_report_has_every_op_and_backend():
    lines = info.report().splitlines()
    assert torch.__version__ in lines[0]
    for name, op in machinery.OPS.items():
        rows = [line.split(maxsplit=2) for line in lines if line.split()[:1] == [name]]
        assert sorted(row[1] for row in rows[:4]) == sorted(machinery.NAMES)
        for _, backend, text in rows[:4]:
            assert (text == "present") == (backend in op.available("cpu")), (name, backend, text)


def test_check_agrees_here_and_names_what_does_not(capsys, monkeypatch):
    dtypes = (torch.float32,)
    assert all(made > 0 and not wrong for *_, made, wrong in info.check(dtypes))
    op = machinery.find("geglu")
    if op.available("cpu")[0] == "reference":
        pytest.fail("the compiled extension is not built")

    def broken(backend, inputs, outputs, params):
        outputs[0].fill_(0.25)

    monkeypatch.setitem(op.__dict__, "forward", broken)
    monkeypatch.setattr(info, "CHECKED", dtypes)
    monkeypatch.setattr(info.check, "__defaults__", (dtypes,))
    assert info.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "DISAGREES" in printed and "geglu[odd width] float32: output 0" in printed
    assert printed.count("DISAGREES") == len(set(op.available("cpu")) - {"reference"})


@pytest.mark.parametrize("binary", [b"not a shared library", None], ids=["broken", "absent"])
def test_a_broken_binary_warns_and_an_absent_one_is_reported(binary, tmp_path):
    """Either way the reference serves."""
    target = tmp_path / "hdit_kernels"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    if binary:
        (target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(binary)
    run = python(
        "import hdit_kernels, torch; print(hdit_kernels.__file__)\n"
        "print(hdit_kernels.geglu(torch.ones(2, 4)).sum().item(), hdit_kernels.available_backends('geglu'))\n"
        "print(hdit_kernels.explain('geglu', torch.ones(2)))",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert str(target) in run.stdout and "('reference',)" in run.stdout
    assert ("does not load" if binary else "is not built") in run.stdout
    assert ("the PyTorch reference serves instead" in run.stderr) == bool(binary)


def test_ops_run_in_forked_workers():
    """A DataLoader's workers are forks of a process whose threads have run."""
    run = python(
        "import torch, hdit_kernels\n"
        "x = torch.randn(512, 1024)\n"
        "scale = torch.ones(1024)\n"
        "work = lambda i: hdit_kernels.geglu(hdit_kernels.ada_rms_norm(x, scale))\n"
        "expected = work(0)\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    __len__ = lambda self: 4\n"
        "    __getitem__ = lambda self, i: work(i)\n"
        "for y in torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, timeout=60):\n"
        "    assert torch.equal(y, expected)\n"
    )
    assert run.returncode == 0, run.stderr


def test_the_reference_never_holds_all_gathered_keys():
    """Forward and backward at 96×96: gathered at once, the 49 keys and values of each query take 460 MB each."""
    run = python(
        "import resource, torch, hdit_kernels\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def call(side):\n"
        "    qkv = torch.randn(1, side, side, 3, 4, 64, requires_grad=True)\n"
        "    hdit_kernels.neighborhood_attention_qkvpacked(qkv, 7, backend='reference').square().sum().backward()\n"
        "call(8)\n"
        "before = peak()\n"
        "call(96)\n"
        "print(peak() - before)\n"
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 250, "MB; q, k, v, their gradients in two forms and the outputs take about 130"

"""The command line: what it prints, what it writes, and one line and exit code 2 for what a user gets wrong."""

import csv
import subprocess
import sys

import pytest

from hdit import HDiT, configs, flops
from hdit.__main__ import main


def test_flops_prints_the_table_of_the_paper(capsys, tmp_path):
    """GMAC of the paper, which truncates them to integers, and the share that HDiT saves."""
    assert main(["flops", "--csv", str(tmp_path / "t.csv")]) == 0
    printed = capsys.readouterr().out
    assert "1 MAC = 2 FLOP" in printed
    lines = {line.split()[0]: line.split() for line in reversed(printed.splitlines()) if "%" in line}
    for side, dit, hdit, saved in ((128, 106, 31, 70.6), (256, 657, 64, 90.2), (512, 6341, 198, 96.9)):
        cells = lines[f"{side}²"]
        assert int(float(cells[1].replace(",", ""))) == dit
        assert int(float(cells[2].replace(",", ""))) == hdit
        assert abs(float(cells[3].rstrip("%")) - saved) < 0.1
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    totals = {(r["model"], r["height"], r["width"]): int(r["macs"]) for r in rows if r["part"] == "total"}
    assert totals["dit", "1024", "1024"] == pytest.approx(84_738.4e9, rel=1e-4)
    assert len(totals) == 8
    for part in ("kind", "level"):
        for (model, height, _), total in totals.items():
            members = [r for r in rows if (r["model"], r["height"], r["part"]) == (model, height, part)]
            assert sum(int(r["macs"]) for r in members) == total


def test_flops_of_a_configuration_by_kind_and_level(capsys, tmp_path):
    name, height, width = "oxford_flowers_256", 128, 192
    options = ["--config", name, "--height", str(height), "--width", str(width), "--csv", str(tmp_path / "c.csv")]
    assert main(["flops", *options]) == 0
    printed = capsys.readouterr().out
    want = flops.count(HDiT(configs.get(name).config), height, width)
    assert f"{height} x {width} pixels" in printed
    assert "22,361,274 parameters" in printed
    for macs in (want.macs, *want.by_kind.values(), *want.by_level.values()):
        assert f"{macs / 1e9:,.3f}" in printed
    with (tmp_path / "c.csv").open() as file:
        rows = {(r["part"], r["name"]): int(r["macs"]) for r in csv.DictReader(file)}
    assert rows == {("total", "total"): want.macs} | {("kind", k): n for k, n in want.by_kind.items()} | {
        ("level", k): n for k, n in want.by_level.items()
    }


def test_flops_takes_the_resolution_of_the_configuration(capsys):
    assert main(["flops", "--config", "imagenet_128"]) == 0
    assert "128 x 128 pixels" in capsys.readouterr().out


def test_info_names_ops_and_backends(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("neighborhood_attention", "ada_rms_norm", "reference", "PyTorch"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["flops", "scaling", "info"]),
        (["paint"], ["paint"]),
        (["flops", "--depth", "3"], ["--depth"]),
        (["flops", "--height", "tall"], ["--height", "'tall'"]),
        (["flops", "--height", "64"], ["height 64", "--config"]),
        (["flops", "--config", "imagenet"], ["'imagenet'", "imagenet_128"]),
        (["flops", "--config", "ffhq_1024", "--height", "1000"], ["1000", "64"]),
        (["flops", "--config", "ffhq_1024", "--width", "-64"], ["width", "-64"]),
        (["flops", "--csv", "/no/such/folder/t.csv"], ["/no/such/folder/t.csv"]),
        (["scaling", "--dtype", "float8"], ["float8", "bfloat16"]),
        (["scaling", "--threads", "0"], ["threads", "got 0"]),
        (["scaling", "--output", "/dev/null/x"], ["/dev/null/x"]),
    ],
)
def test_user_errors_are_one_line_and_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hdit: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_a_folder_of_images_that_cannot_be_read(capsys, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"broken\.png is not a readable image"):
        assert main(["scaling", "--images", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "none of the 1 image files" in capsys.readouterr().err


def test_the_process_ends_with_the_code_and_help_is_no_error():
    run = subprocess.run([sys.executable, "-m", "hdit", "flops", "--config", "x"], capture_output=True, text=True)
    assert (run.returncode, run.stderr.count("\n"), run.stdout) == (2, 1, "")
    with pytest.raises(SystemExit) as ending:
        main(["scaling", "--help"])
    assert not ending.value.code

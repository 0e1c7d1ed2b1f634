"""hdit evaluate: where images come from, what is written, what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hdit import HDiT, data, evaluate, evaluate_images, evaluate_metrics, evaluate_plots, sample
from hdit.diffusion import losses
from hdit.evaluate import Evaluate
from hdit.evaluate_images import DataSet, Npz, open_real, open_samples
from hdit.models import Global, HDiTConfig, Level


def pixels(count, height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def folder(path, count, seed=0, **size):
    path.mkdir()
    for number, picture in enumerate(pixels(count, seed=seed, **size)):
        Image.fromarray(picture).save(path / f"{number:03d}.png")
    return str(path)


def tensors(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


def random_model(seed=0):
    torch.manual_seed(seed)
    model = HDiT(HDiTConfig.for_resolution(16, 16, inner=Level(1, 32, attention=Global(16)), num_classes=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def everything(source):
    return torch.cat(list(source.batches()))


# ---- Where images come from ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_pieces(tmp_path, save, monkeypatch):
    pictures = pixels(150)
    save(tmp_path / "x.npz", pictures, np.arange(3))
    monkeypatch.setattr(np, "load", None)  # it would read all of them at once
    found = Npz(str(tmp_path / "x.npz"), None)
    assert found.size == (16, 24) and found.count == 150
    assert [len(batch) for batch in found.batches()] == [64, 64, 22]
    assert (everything(found) - tensors(pictures)).abs().max() < 1e-6
    assert torch.equal(everything(Npz(str(tmp_path / "x.npz"), 70)), everything(found)[:70])


def test_npz_that_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", pixels(3).astype(np.float32))
    with pytest.raises(ValueError, match=r"must be \(N, H, W, 3\) uint8, got \(3, 16, 24, 3\) float32"):
        Npz(str(tmp_path / "x.npz"), None)
    np.savez(tmp_path / "x.npz", images=pixels(3))
    with pytest.raises(ValueError, match=r"neither images \(arr_0\) nor statistics .*'images\.npy'"):
        Npz(str(tmp_path / "x.npz"), None)
    (tmp_path / "x.npz").write_text("text")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        Npz(str(tmp_path / "x.npz"), None)


def test_a_set_against_other_images_of_itself(tmp_path):
    name = folder(tmp_path / "a", 10)
    real = open_real(name, (16, 24), 4, seed=3)
    (own,) = open_samples((name,), name, None, 6, 3, "cpu", {})
    other = DataSet(data.open_images(name, 16, 24), 6, 3, backwards=True)
    seen = torch.cat([everything(real), everything(other)])
    assert len(seen.flatten(1).unique(dim=0)) == 10
    assert torch.equal(everything(own), everything(DataSet(data.open_images(name, 16, 24), 6, 3)))


def test_samples_have_one_size_and_broken_ones_are_counted(tmp_path):
    name = folder(tmp_path / "a", 8)
    (tmp_path / "a" / "000.png").write_text("broken")
    (source,) = open_samples((name,), "builtin", None, None, 0, "cpu", {})
    assert source.size == (16, 24)
    with pytest.warns(UserWarning, match=r"left out: .*000\.png is not a readable image"):
        assert len(everything(source)) == 7
    assert source.unreadable == 1
    Image.fromarray(pixels(1, 8, 8)[0]).save(tmp_path / "a" / "007.png")
    (source,) = open_samples((name,), "builtin", (16, 24), None, 0, "cpu", {})
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"must have one size; 007\.png of .* has 8×8 pixels, others 16×24"),
    ):
        warnings.simplefilter("ignore")
        everything(source)


def test_the_folder_of_hdit_sample(tmp_path):
    (tmp_path / "out").mkdir()
    folder(tmp_path / "out" / "images", 6)
    (tmp_path / "out" / "samples.json").write_text("{}")
    Image.fromarray(pixels(1, 50, 60)[0]).save(tmp_path / "out" / "grid.png")
    (source,) = open_samples((str(tmp_path / "out"),), "builtin", None, None, 0, "cpu", {})
    assert source.size == (16, 24) and len(everything(source)) == 6


def test_a_checkpoint_is_sampled_as_its_file_says(tmp_path):
    model = random_model()
    spec = {"type": "edm", "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 20.0}
    facts = {"objective": spec, "resolution": [16, 16], "sampler": {"name": "dpmpp_2m", "steps": 3}}
    model.save_pretrained(tmp_path / "m.safetensors", **facts)
    (source,) = open_samples((str(tmp_path / "m.safetensors"),), "builtin", None, 7, 5, "cpu", {})
    got = everything(source)
    with torch.inference_mode():
        want = sample.generate(
            losses.objective(spec, model.eval()), 7, (16, 16), sampler="dpmpp_2m", steps=3, seed=5, sigma_min=0.02,
            sigma_max=20.0, num_classes=3, classes=[0, 1, 2],
        )  # fmt: skip
    assert ((got - want.clamp(-1, 1)).abs().max()) <= 1 / 255 + 1e-5, "at 8 bits"
    source.options |= {"classes": None}
    assert (everything(source) - got).abs().max() > 0.05, "classes take turns"
    steps = open_samples((str(tmp_path / "m.safetensors"),), "builtin", None, 7, 5, "cpu", {"steps": 4})
    assert not torch.equal(everything(steps[0]), got)
    model.save_pretrained(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not name its resolution"):
        open_samples((str(tmp_path / "m.safetensors"),), "builtin", None, 7, 5, "cpu", {})


# ---- What is written ----


def test_every_number_comes_with_what_it_depends_on(tmp_path, capsys):
    real, own = folder(tmp_path / "real", 20), folder(tmp_path / "own-7", 9, seed=1)
    (tmp_path / "own-7" / "broken.png").write_text("no image")
    command = Evaluate(
        real, (own, "noise"), count=12, extractor=("pixels", "patches"), resize=8, output=tmp_path / "new" / "x.json",
        plot=tmp_path / "x.png",
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"left out: .*broken\.png"):
        command.run()
    rows = json.loads(command.output.read_text())
    assert [(row["samples"], row["extractor"]) for row in rows] == [
        (name, each) for name in (own, "noise") for each in ("pixels", "patches", "spectrum")
    ]
    for row in rows:
        assert row["images"] == (12 if row["samples"] == "noise" else 9)
        assert row["real_images"] == 20 and row["real_unreadable"] == 0
        assert row["unreadable"] == (row["samples"] == own)
        assert row["version"] and row["resize"] and row["resolution"] == [16, 24] and row["seed"] == 0
    # the first number again, by hand
    features = [evaluate.extractor("pixels", resize=8)(evaluate_images.rounded(tensors(pixels(n, seed=seed))), 0)[:, 0]
                for n, seed in ((20, 0), (9, 1))]  # fmt: skip
    moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in features]
    want = evaluate_metrics.frechet_distance(*moments[0], *moments[1])
    assert rows[0]["frechet_distance"] == pytest.approx(want, rel=1e-6)
    assert rows[0]["resize"] == "bicubic, antialiased, longer side 8"
    want = evaluate_metrics.kernel_distance(*features)
    kid = rows[0]["kid"], rows[0]["kid_standard_error"]
    assert abs(kid[0] - want[0]) < 3 * want[1]  # the order of the images changes the groups, not the estimate
    assert kid[0] == pytest.approx(want[0], abs=1e-6)
    assert set(rows[2]) >= {"high_frequency_ratio", "slope", "slope_real", "grid_peak", "grid_peak_real", "patch_size"}
    printed = capsys.readouterr().out
    assert "Fréchet" in printed and f"{rows[0]['frechet_distance']:.4g}" in printed and "longer side 8" in printed
    with Image.open(tmp_path / "x.png") as picture:
        assert len(picture.convert("RGB").getcolors(100_000)) > 10


def test_spectra_alone_and_values_that_are_not_finite(tmp_path):
    own = folder(tmp_path / "own", 6)
    Evaluate(own, (own,), metrics=("spectrum",), output=tmp_path / "x.json").run()
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["extractor"] == "spectrum" and row["high_frequency_ratio"] == pytest.approx(1)
    with pytest.raises(ValueError, match="samples 'mine' have values that are not finite, after 3 images"):
        evaluate.collect("mine", [torch.rand(3, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)], [])


def test_checkpoints_of_several_steps_with_several_guidances(tmp_path):
    """Each is sampled with each scale; rows say which; noise and a folder without a number have neither."""
    for step in (100, 20):
        facts = {"resolution": [16, 16], "sampler": {"name": "dpmpp_2m", "steps": 2}, "step": step}
        random_model(seed=step).save_pretrained(tmp_path / f"{step}.safetensors", **facts)
    names = [str(tmp_path / f"{step}.safetensors") for step in (100, 20)]
    own, numbered = (folder(tmp_path / name, 8, width=16) for name in ("step-7x", "a-step-0050"))
    command = Evaluate(
        own, (*names, "noise", numbered, own), guidance=(3.0, 1.0), count=8, extractor=("pixels",), low_pass=4,
        metrics=("frechet",), output=tmp_path / "x.json", plot=tmp_path / "x.svg",
    )  # fmt: skip
    command.run()
    rows = json.loads(command.output.read_text())
    assert [(row["step"], row["guidance"]) for row in rows[::2]] == [
        (100, 3.0), (100, 1.0), (20, 3.0), (20, 1.0), (None, None), (50, None), (None, None),
    ]  # fmt: skip
    assert [row["extractor"] for row in rows] == ["pixels", "pixels, low-pass 4"] * 7
    (source,) = open_samples((names[1],), "builtin", None, 8, 0, "cpu", {"guidance": 3.0})
    found = [
        evaluate.collect("", each.batches(), [evaluate.extractor("pixels")])
        for each in (open_real(own, (16, 16), None, 0), source)
    ]
    want = evaluate.compare(*found, ("frechet",))[0]["frechet_distance"]
    assert rows[4]["frechet_distance"] == pytest.approx(want, rel=1e-9)
    assert rows[4]["frechet_distance"] != pytest.approx(rows[6]["frechet_distance"], rel=1e-3)
    drawn = command.plot.read_text()
    assert "<!-- training step -->" in drawn and "<!-- scale of classifier-free guidance -->" in drawn
    with pytest.raises(ValueError, match=r"guidance 3.0 needs classes"):
        HDiT(HDiTConfig.for_resolution(16, 16, inner=Level(1, 32, attention=Global(16)))).save_pretrained(
            tmp_path / "plain.safetensors", resolution=[16, 16]
        )
        open_samples((str(tmp_path / "plain.safetensors"),), own, None, 8, 0, "cpu", {}, (3.0,))


def test_curves_are_in_order_and_apart():
    """A line for each extractor and value of the other quantity; what has no value is a level."""

    def row(samples, step, guidance, distance, extractor="pixels"):
        return {
            "samples": samples,
            "step": step,
            "guidance": guidance,
            "frechet_distance": distance,
            "extractor": extractor,
        }

    rows = [
        row("b", 20, 1.0, 3.0), row("a", 10, 1.0, 5.0), row("b", 20, 2.0, 2.0), row("a", 10, 2.0, 7.0),
        row("a", 10, 1.0, 9.0, "patches"), row("b", 20, 1.0, 8.0, "patches"), row("noise", None, None, 50.0),
    ]  # fmt: skip
    axes = Figure().subplots()
    evaluate_plots.distances(axes, rows, "step")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert [lines.pop(name) for name in ("pixels, guidance 1.0", "pixels, guidance 2.0", "patches, guidance 1.0")] == [
        [[10, 5], [20, 3]], [[10, 7], [20, 2]], [[10, 9], [20, 8]],
    ]  # fmt: skip
    (level,) = lines.values()
    assert [y for _, y in level] == [50, 50]
    axes = Figure().subplots()
    evaluate_plots.distances(axes, rows, "guidance")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["pixels, step 20"] == [[1, 3], [2, 2]] and lines["pixels, step 10"] == [[1, 5], [2, 7]]


def test_statistics_of_inception(tmp_path, monkeypatch):
    """ADM's reference files: mu and sigma are the real side of the Fréchet distance, arr_0 of the other metrics."""

    class Inception(evaluate.Extractor):
        name = "inception"

        def __call__(self, images, first):
            return images.mean((2, 3))[:, None]

    monkeypatch.setattr(evaluate, "extractor", lambda name, **options: Inception())
    mu, sigma = np.full(3, 0.1), np.diag([0.1, 0.2, 0.3])
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    own = folder(tmp_path / "own", 12)
    options = {"extractor": ("inception",), "output": tmp_path / "x.json"}
    Evaluate(str(tmp_path / "ref.npz"), (own,), metrics=("frechet",), **options).run()
    (row,) = json.loads((tmp_path / "x.json").read_text())
    x = tensors(pixels(12)).double().mean((2, 3))
    want = evaluate_metrics.frechet_distance(torch.from_numpy(mu), torch.from_numpy(sigma), x.mean(0), torch.cov(x.T))
    assert row["frechet_distance"] == pytest.approx(want, rel=1e-5)
    np.savez(tmp_path / "ref.npz", pixels(15, seed=1), mu=mu, sigma=sigma)
    Evaluate(str(tmp_path / "ref.npz"), (own,), metrics=("frechet", "precision"), **options).run()
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["frechet_distance"] == pytest.approx(want, rel=1e-5)
    assert row["real_images"] == row["real_rows"] == 15
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match="has statistics and no images; metrics must be frechet alone"):
        Evaluate(str(tmp_path / "ref.npz"), (own,), metrics=("frechet", "kid"), **options).run()
    with pytest.raises(ValueError, match="statistics of Inception; extractor must be inception alone"):
        Evaluate(str(tmp_path / "ref.npz"), (own,), output=tmp_path / "x.json").run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": ("noise",)}, "resolution must be given for samples noise"),
        ({"low_pass": 0}, "low_pass must be at least 1, got 0"),
        ({"low_pass": 24}, "low_pass must be smaller than images of 16×24 pixels, got 24"),
        ({"count": 5}, "count must be at least 6, got 5"),
        ({"metrics": ("inception-score",)}, "inception-score needs the extractor inception, got pixels, patches"),
        ({"metrics": ("clip-score",)}, "clip-score needs the extractor clip, got pixels, patches"),
        ({"caption": "a photo"}, "caption must have {} where the caption of an image goes, got 'a photo'"),
        ({"metrics": ()}, "metrics must name at least one"),
        ({"resolution": (16, 0)}, r"resolution must be positive, got \(16, 0\)"),
        ({"resolution": (8, 8)}, "samples .*own' have 16×24 pixels; the resolution is 8×8"),
        ({"samples": ("absent",), "resolution": (8, 8)}, "source 'absent' is not a folder"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        ({"plot": evaluate.Path("absent/x.png")}, "lies in no existing folder"),
    ],
)
def test_bad_options_are_named(tmp_path, options, words):
    own = folder(tmp_path / "own", 6)
    with pytest.raises(ValueError, match=words):
        Evaluate(**({"real": own, "samples": (own,), "output": tmp_path / "x.json"} | options)).run()
    assert not (tmp_path / "x.json").exists()

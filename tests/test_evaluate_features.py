"""Feature extractors: what the bundled ones measure, and what external ones are given and must give."""

import importlib.metadata
import importlib.util
import math
import sys
import types

import pytest
import torch

from hdit import data, evaluate
from hdit.evaluate_features import LowPass, extractor
from hdit.evaluate_images import rounded
from hdit.evaluate_metrics import frechet_distance


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(left, right, name, **options):
    """Fréchet distance of two stacks of images."""
    found = [evaluate.collect("", each.split(50), [extractor(name, **options)], ("frechet",)) for each in (left, right)]
    return evaluate.compare(*found, ("frechet",))[0]["frechet_distance"]


# ---- pixels ----


def test_pixels_keep_what_is_coarse_and_drop_what_is_fine():
    x = torch.arange(64) + 0.5
    coarse = (2 * math.pi * x / 64).cos().expand(1, 3, 48, 64) * 0.8
    fine = (2 * math.pi * x * 0.4).cos().expand(1, 3, 48, 64) * 0.8
    for images, size in ((coarse, 0.8), (fine, 0.0)):
        got = extractor("pixels")(images, 0).view(3, 12, 16)  # the aspect is kept
        want = size * (2 * math.pi * (torch.arange(16) + 0.5) / 16).cos()
        assert (got - want).abs().max() < 0.06
    small = extractor("pixels", resize=4)
    assert small(coarse, 0).shape == (1, 1, 3 * 3 * 4)
    assert small.resize == "bicubic, antialiased, longer side 4"
    own = noise(2, 3, 16, 16)
    assert torch.equal(extractor("pixels")(own, 0), own.flatten(1)[:, None])


def test_low_pass_keeps_what_is_coarse_and_drops_what_is_fine():
    """A wave of the image's size and one of four pixels, at full resolution, through the features of another one."""
    x = torch.arange(64) + 0.5
    coarse = (2 * math.pi * x / 64).cos().expand(2, 3, 64, 64) * 0.8
    fine = (2 * math.pi * x / 4).cos().expand(2, 3, 64, 64) * 0.3
    seen = []
    smooth = LowPass(extractor(lambda images: seen.append(images) or images.flatten(1)), 8)
    got = smooth(coarse + fine, 0)[:, 0].view(2, 3, 64, 64)
    assert torch.equal(got, seen[0]) and got.dtype == torch.float32
    assert (got - coarse)[:, :, 8:-8, 8:-8].abs().max() < 0.05, "0.8 of a wave whose samples are 8 pixels apart"
    assert smooth.resize == "bicubic, antialiased, longer side 8, and back; then none"
    bright = LowPass(extractor(lambda images: images.flatten(1)), 8)(torch.where(coarse > 0, 1.0, -1.0), 0)
    assert bright.abs().max() == 1, "no overshoot, which 8 bits would wrap"


# ---- patches ----


def test_patches_are_weighted_cosine_transforms_with_their_magnitudes():
    """An image of one patch, against the transform written as sums."""
    image = noise(1, 3, 8, 8).double()
    got = extractor("patches")(image.float(), 0)
    assert got.shape == (1, 64, 381)
    assert (got == got[:, :1]).all(), "there is one place for a patch"
    mix = torch.tensor([[1, 1, 1], [1.5**0.5, 0, -(1.5**0.5)], [0.5**0.5, -(2**0.5), 0.5**0.5]]) / 3**0.5
    for c, k, m in ((0, 0, 0), (0, 3, 5), (1, 7, 0), (2, 2, 6)):
        places = math.pi / 8 * (torch.arange(8) + 0.5)
        waves = [(f * places).cos() * (1 / 4 if f else 1 / 8) ** 0.5 for f in (k, m)]
        want = (torch.einsum("c,chw->hw", mix[c].double(), image[0]) * torch.outer(*waves)).sum()
        want = want * (1 + math.hypot(k, m))
        assert abs(got[0, 0, 64 * c + 8 * k + m] - want) < 1e-5
        if k or m:
            assert abs(got[0, 0, 192 + 63 * c + 8 * k + m - 1] - want.abs()) < 1e-5


def test_patches_do_not_depend_on_the_batch_and_move_with_the_seed():
    images = noise(6, 3, 20, 30)
    whole = extractor("patches")(images, 0)
    parts = [extractor("patches")(images[i : i + 2], i) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(extractor("patches", seed=1)(images, 0), whole)


@pytest.fixture(scope="module")
def photographs():
    images = data.open_images("builtin", 32, 32)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return rounded(torch.stack([images.example(index)[0] for index in order[:400]]))


@pytest.mark.parametrize("name", ["pixels", "patches"])
def test_distances_of_photographs_rank_as_they_look(photographs, name):
    """Other photographs of the set are nearer than slightly noisy ones, those nearer than noise."""
    real, other = photographs[:200], photographs[200:]
    floor = distance(real, other, name)
    noisy = distance(real, other + 0.3 * noise(*other.shape), name)
    assert floor < noisy / (1.2 if name == "pixels" else 10)  # a reduced image shows less of the noise
    assert noisy < distance(real, 0.5 * noise(*real.shape), name) / 3


def test_patches_see_blur_and_what_spectra_do_not(photographs):
    """Blur; and photographs with random phases: mean and covariance of their patches stay, magnitudes change."""
    real, other = photographs[:200], photographs[200:]
    floor = distance(real, other, "patches")
    blurred = torch.nn.functional.avg_pool2d(other, 3, 1, 1, count_include_pad=False)
    assert distance(real, blurred, "patches") > 5 * floor
    spectrum = torch.fft.fft2(other)
    phases = torch.fft.fft2(noise(len(other), 1, 32, 32)).angle()
    phases[:, :, 0, 0] = 0
    scrambled = torch.fft.ifft2(torch.polar(spectrum.abs(), spectrum.angle() + phases)).real
    assert distance(real, scrambled, "patches") > 3 * floor

    def without_magnitudes(left, right):
        features = [extractor("patches")(each, 0).flatten(0, 1)[:, :192] for each in (left, right)]
        moments = [(each.mean(0), torch.cov(each.T)) for each in features]
        return frechet_distance(*moments[0], *moments[1])

    seen = distance(real, scrambled, "patches") - without_magnitudes(real, scrambled)
    assert seen > 3 * (floor - without_magnitudes(real, other)), "the magnitudes tell them apart"


# ---- External extractors ----


class Channels(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.flatten(1)[:, :1] * 0 + x.shape[3]], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_files(tmp_path):
    torch.jit.script(Channels()).save(tmp_path / "channels.pt")
    images = noise(5, 3, 24, 32)
    for resize, width in ((None, 32), (16, 16)):
        found = extractor(str(tmp_path / "channels.pt"), resize=resize)
        got = found(images, 0)
        assert (got[:, 0, 3] == width).all()
        assert (got[:, 0, :3] - images.mean((2, 3))).abs().max() < (1e-6 if resize is None else 0.2)
        assert found.name == "channels.pt" and len(found.version) == len("sha256 ") + 16
    before = found.version
    torch.jit.script(torch.nn.Sequential(Channels())).save(tmp_path / "channels.pt")
    assert extractor(str(tmp_path / "channels.pt")).version != before
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.pt' is no TorchScript file"):
        extractor(str(tmp_path / "text.pt"))


def test_callables():
    images = noise(4, 3, 8, 8)
    found = extractor(lambda x: x.mean((2, 3)))
    assert torch.equal(found(images, 0)[:, 0], images.mean((2, 3)))
    with pytest.raises(ValueError, match=r"must give \(4, d\) features, got \(4, 3, 8, 8\)"):
        extractor(lambda x: x)(images, 0)


def test_torch_fidelity_is_given_8_bits(monkeypatch):
    """A stand-in for the package: which network is asked for, what it gets, what is reported."""
    asked = []

    class Network(torch.nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.uint8
            return x.float().mean((2, 3)), x.float().flatten(1)[:, :5]

    def create(name, layers, cuda, **options):
        asked.append((name, layers, cuda, options["feature_extractor_weights_path"]))
        return Network(1, 1)

    package, utils = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.utils")
    utils.create_feature_extractor = create
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torch_fidelity" or found(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch-fidelity": "9.9"}[name])
    inception = extractor("inception")
    levels = torch.randint(256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    got = inception(levels / 127.5 - 1, 0)
    assert torch.equal(got[:, 0], levels.float().mean((2, 3))), "exactly the 8 bits that the file had"
    assert torch.allclose(inception.probabilities, levels.double().flatten(1)[:, :5].softmax(1))
    assert asked == [("inception-v3-compat", ["2048", "logits_unbiased"], False, None)]
    assert inception.version.startswith("torch-fidelity 9.9 inception-v3-compat, weights sha256 ")
    assert inception.version != extractor("inception").version, "other weights, another hash"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("clip:x", {"resize": 8}, "resize 8 is for pixels and external extractors; clip:x resizes by itself"),
        ("patches", {"resize": 8}, "resize 8 is for pixels and external extractors; patches works at"),
        ("pixels", {"resize": 0}, "resize must be a positive integer, got 0"),
        ("pixels", {"weights": evaluate.Path("x")}, "weights 'x' are for the extractor inception, got 'pixels'"),
        ("inception", {"weights": evaluate.Path("absent")}, "weights 'absent' is not a file"),
        ("vgg", {}, "extractor 'vgg' is unknown; accepted are pixels, patches, inception, dinov2, clip or a Torch"),
    ],
)
def test_bad_arguments_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        extractor(name, **options)


def test_a_missing_package_and_small_images(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'dinov2' needs the package torch-fidelity: pip install"):
        extractor("dinov2")
    with pytest.raises(ValueError, match="patches need images of at least 8 pixels, got 7×9"):
        extractor("patches")(noise(1, 3, 7, 9), 0)

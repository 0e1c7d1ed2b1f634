"""Classifier-free guidance and thresholding around a denoiser, in each sampler."""

import math

import pytest
import torch

from hdit.diffusion import samplers
from hdit.diffusion.guidance import Guided, Thresholded, quantile

SIGMAS = [20.0, 5.0, 1.5, 0.4, 0.0]


@pytest.fixture
def x():
    return 20 * torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


CLASSES = torch.tensor([0, 1, 3])
NONE = 4  # of four classes


class Denoiser:
    """Depends on the class, the vector and sigma of each image; remembers its calls."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, class_cond, vector=None):
        self.batches.append(len(x))
        shift = torch.sin(1.0 + class_cond) if vector is None else torch.sin(1.0 + class_cond) + vector.sum(1)
        return torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1))) * 0.4 + shift.view(-1, 1, 1, 1)


def with_and_without(x, sigma):
    plain = Denoiser()
    return plain(x, sigma, CLASSES), plain(x, sigma, torch.full_like(CLASSES, NONE))


@pytest.mark.parametrize("batched", [True, False])
def test_formula(x, batched):
    inner, sigma = Denoiser(), torch.tensor([20.0, 3.0, 0.5], dtype=torch.float64)
    got = Guided(inner, 2.5, num_classes=NONE, batched=batched)(x, sigma, class_cond=CLASSES)
    cond, without = with_and_without(x, sigma)
    assert (got - (without + 2.5 * (cond - without))).abs().max() <= 1e-14
    assert inner.batches == ([6] if batched else [3, 3])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_scale_one_is_no_guidance_and_costs_nothing(x, name):
    def run(denoiser):
        torch.manual_seed(0)
        return samplers.SAMPLERS[name](denoiser, x, SIGMAS, extra={"class_cond": CLASSES})

    inner, plain = Denoiser(), Denoiser()
    assert torch.equal(run(Guided(inner, 1.0, num_classes=NONE, rescale=0.7)), run(plain))
    assert inner.batches == plain.batches
    direct = Guided(inner, 1, num_classes=NONE)(x, torch.full((3,), 2.0).double(), class_cond=CLASSES)
    assert torch.equal(direct, plain(x, torch.full((3,), 2.0).double(), CLASSES))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_guidance_reaches_every_sampler(x, name):
    """A guided run is the run of the formula."""

    def formula(x, sigma, class_cond):
        cond, without = with_and_without(x, sigma)
        return without + 2 * (cond - without)

    def run(denoiser):
        torch.manual_seed(0)
        return samplers.SAMPLERS[name](denoiser, x, SIGMAS, extra={"class_cond": CLASSES})

    assert (run(Guided(Denoiser(), 2, num_classes=NONE)) - run(formula)).abs().max() <= 1e-12


def test_interval(x):
    """Guidance acts where low < sigma ≤ high; elsewhere one image each is evaluated."""
    inner, outside, inside = Denoiser(), Denoiser(), Guided(Denoiser(), 3, num_classes=NONE)
    guided, seen = Guided(inner, 3, num_classes=NONE, interval=(1.5, 5.0)), []
    samplers.euler(guided, x, SIGMAS, extra={"class_cond": CLASSES}, callback=seen.append)
    assert inner.batches == [3, 6, 3, 3]
    for info, expected in zip(seen, [outside, inside, outside, outside], strict=True):
        sigma = torch.full((3,), info["sigma"], dtype=torch.float64)
        assert torch.equal(info["denoised"], expected(info["x"], sigma, class_cond=CLASSES))
    # called with a tensor of sigmas, each image has its own
    sigma = torch.tensor([1.5, 5.0, 5.1], dtype=torch.float64)
    got = guided(x, sigma, class_cond=CLASSES)
    for i, expected in enumerate([outside, inside, outside]):
        assert torch.equal(got[i], expected(x, sigma, class_cond=CLASSES)[i])


def test_rescale(x):
    """0.7 of the way back to the deviation of the conditional estimate, image by image."""
    sigma = torch.full((3,), 2.0, dtype=torch.float64)
    got = Guided(Denoiser(), 4, num_classes=NONE, rescale=0.7)(x, sigma, class_cond=CLASSES)
    cond, without = with_and_without(x, sigma)
    for i in range(3):
        guided = without[i] + 4 * (cond[i] - without[i])
        rescaled = guided * cond[i].std() / guided.std()
        assert (got[i] - (0.7 * rescaled + 0.3 * guided)).abs().max() <= 1e-13
    full = Guided(Denoiser(), 4, num_classes=NONE, rescale=1)(
        x * torch.linspace(0, 1, 8).double(), sigma, class_cond=CLASSES
    )
    cond = Denoiser()(x * torch.linspace(0, 1, 8).double(), sigma, CLASSES)
    assert (full.std((1, 2, 3)) - cond.std((1, 2, 3))).abs().max() <= 1e-13


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("null", [0, torch.tensor([0.5, 0.0])])
def test_other_conditions(x, batched, null):
    """null names what is dropped; what it does not name goes to both."""
    vector, sigma = torch.tensor([[0.3, 0.1], [0.2, -1], [2, 1]], dtype=torch.float64), torch.ones(3).double()
    guided = Guided(Denoiser(), 2, null={"vector": null}, batched=batched)
    got = guided(x, sigma, class_cond=CLASSES, vector=vector)
    plain, dropped = Denoiser(), torch.zeros(3, 2).double() + null
    without = plain(x, sigma, CLASSES, dropped)
    assert (got - (without + 2 * (plain(x, sigma, CLASSES, vector) - without))).abs().max() <= 1e-13


def test_dynamic_thresholding():
    """Each image is clipped to its own quantile of |D|, where that is above 1, and divided by it."""
    generator = torch.Generator().manual_seed(1)
    estimate = torch.randn(3, 3, 8, 8, generator=generator) * torch.tensor([0.2, 1.0, 5.0]).view(3, 1, 1, 1)
    got = Thresholded(lambda x, sigma: estimate, 0.9)(estimate, torch.ones(3))
    assert torch.equal(got[0], estimate[0])  # within [-1, 1] already
    for i in (1, 2):
        s = torch.quantile(estimate[i].abs().flatten(), 0.9)
        assert s > 1
        assert (got[i] - estimate[i].clamp(-s, s) / s).abs().max() <= 1e-6
        assert (got[i].abs() > 1 - 1e-6).float().mean().item() == pytest.approx(0.1, abs=0.01)
    static = Thresholded(lambda x, sigma: estimate, None, limit=0.8)(estimate, torch.ones(3))
    assert torch.equal(static, estimate.clamp(-0.8, 0.8))


@pytest.mark.parametrize("q", [0.01, 0.5, 0.995, 1.0])
def test_quantile(q):
    rows = torch.randn(4, 1001, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (quantile(rows, q) - torch.quantile(rows, q, dim=1)).abs().max() <= 1e-14


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_they_compose(x, name):
    """Thresholding around guidance in an interval: the result lies in [-1, 1], and the interval still saves passes."""
    inner = Denoiser()
    denoiser = Thresholded(Guided(inner, 6, num_classes=NONE, interval=(1.0, 6.0)), 0.9)
    image = samplers.SAMPLERS[name](denoiser, x, SIGMAS, extra={"class_cond": CLASSES})
    plain = samplers.SAMPLERS[name](Denoiser(), x, SIGMAS, extra={"class_cond": CLASSES})
    assert image.abs().max() <= 1 + 1e-9 < plain.abs().max()
    assert inner.batches[0] == 3 and 6 in inner.batches and inner.batches[-1] == 3
    sigma = torch.full((3,), 2.0, dtype=torch.float64)
    within = Guided(Denoiser(), 6, num_classes=NONE)(x, sigma, class_cond=CLASSES)
    assert torch.equal(denoiser(x, sigma, class_cond=CLASSES), Thresholded(lambda x, s: within, 0.9)(x, sigma))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Guided(3, 2, num_classes=4), TypeError, "denoiser .*int"),
        (lambda: Guided(abs, -1, num_classes=4), ValueError, "scale .*-1"),
        (lambda: Guided(abs, math.nan, num_classes=4), ValueError, "scale .*nan"),
        (lambda: Guided(abs, 2, num_classes=4, rescale=1.5), ValueError, r"rescale .*1\.5"),
        (lambda: Guided(abs, 2, num_classes=4, interval=(3, 1)), ValueError, r"interval .*\(3, 1\)"),
        (lambda: Guided(abs, 2), ValueError, "num_classes or null"),
        (lambda: Guided(abs, 2, num_classes=4, null={"vector": 0}), ValueError, "num_classes or null"),
        (lambda: Guided(abs, 2, num_classes=4)(torch.ones(1, 1), torch.ones(1)), ValueError, "class_cond, got none"),
        (lambda: Thresholded(None), TypeError, "denoiser .*NoneType"),
        (lambda: Thresholded(abs, 1.5), ValueError, r"percentile .*1\.5"),
        (lambda: Thresholded(abs, 0.9, limit=0), ValueError, "limit .*0"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()

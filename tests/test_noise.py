"""Noise of the samplers: the law of Brownian motion, one path under refinement, seeds of images."""

import itertools
import math

import pytest
import torch

from hdit.diffusion.noise import Brownian, Gaussian, image_seeds, initial

X = torch.empty(2, 3, 16, 16)
WIDE = X.double()


@pytest.mark.parametrize("exponent", [-2.0, -0.8, 0.5, 1.0, 2.0])
def test_weights_have_the_covariance_of_brownian_motion(exponent):
    """An increment is a sum of independent standard normals: its weights alone tell the law, for any pair of them."""
    w = Brownian(X, 0, exponent=exponent)
    sigmas = [80.0, 33.0, 32.5, 1.0, 0.97, 0.02, 0.002]
    paths = [w._path(sigma) for sigma in sigmas]

    def covariance(i, j):  # of the increments after sigmas[i] and sigmas[j]
        (a, b), (c, d) = paths[i : i + 2], paths[j : j + 2]
        nodes = set(a) | set(b) | set(c) | set(d)
        return sum((b.get(n, 0) - a.get(n, 0)) * (d.get(n, 0) - c.get(n, 0)) for n in nodes)

    elapsed = [abs(b**exponent - a**exponent) for a, b in itertools.pairwise(sigmas)]
    for i, j in itertools.product(range(6), repeat=2):
        want = elapsed[i] if i == j else 0.0
        assert abs(covariance(i, j) - want) <= 1e-9 * math.sqrt(elapsed[i] * elapsed[j])


@pytest.mark.parametrize("exponent", [-2.0, 1.0])
def test_samples_are_standard_normal_and_independent(exponent):
    """Over n draws, mean and products have deviation 1/√n, the mean square √(2/n): none is off by 5 deviations."""
    w = Brownian(torch.empty(8, 64, 64), 3, exponent=exponent)
    noise = [w(a, b).flatten() for a, b in itertools.pairwise([60.0, 20.0, 7.0, 1.0, 0.9, 0.05])]
    n = noise[0].numel()
    for i, z in enumerate(noise):
        assert abs(z.mean()) <= 5 / math.sqrt(n)
        assert abs(z.square().mean() - 1) <= 5 * math.sqrt(2 / n)
        for other in noise[:i]:
            assert abs((z * other).mean()) <= 5 / math.sqrt(n)


def test_variance_of_increments():
    """Exponent 2: the variance is that of the noise between two levels, sigma² − sigma'²."""
    w = Brownian(torch.empty(8, 64, 64), 3, exponent=2)
    for a, b in ((60.0, 20.0), (0.9, 0.05)):
        z = w.increment(a, b)
        assert abs(z.square().mean() / (a * a - b * b) - 1) <= 5 * math.sqrt(2 / z.numel())


@pytest.mark.parametrize("exponent", [-2.0, 1.0])
def test_increments_add_up_in_any_order(exponent):
    points = [60.0, 31.0, 8.0, 7.9, 1.0, 0.3, 0.02]
    want = Brownian(WIDE, 5, exponent=exponent).increment(points[0], points[-1])
    for order in (range(6), reversed(range(6)), (3, 0, 5, 1, 4, 2)):
        w = Brownian(WIDE, 5, exponent=exponent)
        parts = {i: w.increment(points[i], points[i + 1]) for i in order}
        assert (sum(parts.values()) - want).abs().max() <= 1e-13 * want.abs().max()


def test_queries_do_not_change_what_follows():
    fresh, used = Brownian(X, 5), Brownian(X, 5)
    for a, b in ((50.0, 3.0), (3.0, 50.0), (0.1, 0.07)):
        used(a, b)
    assert torch.equal(fresh(10.0, 4.0), used(10.0, 4.0))
    assert torch.equal(fresh(10.0, 4.0), -fresh(4.0, 10.0))
    assert not fresh(4.0, 4.0).any()


@pytest.mark.parametrize("make", [Brownian, Gaussian])
def test_images_of_a_batch_have_their_own_seeds(make):
    """Image i of seed s is image 0 of seed s + i, in each call; other images and other calls are unrelated."""
    both, alone, listed = make(X, 11), make(X[1:], 12), make(X, [12, 11])
    steps = [(9.0, 4.0), (4.0, 0.5)]
    calls = [[m(*step) for step in steps] for m in (both, alone, listed)]
    for z, y, w in zip(*calls, strict=True):
        assert torch.equal(z[1:], y) and torch.equal(z.flip(0), w)
    draws = torch.stack([z for step in calls[0] for z in step.flatten(1)])
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert correlation.abs().max() <= 5 / math.sqrt(X[0].numel())


@pytest.mark.parametrize("make", [Brownian, Gaussian])
def test_wider_and_narrower_states_see_the_same_noise(make):
    narrow, wide, half = (make(x, 2)(3.0, 1.0) for x in (X, WIDE, X.bfloat16()))
    assert (narrow.dtype, wide.dtype, half.dtype) == (torch.float32, torch.float64, torch.bfloat16)
    assert (wide - narrow).abs().max() <= 1e-6
    assert torch.equal(half, narrow.bfloat16())


def test_gaussian_calls_differ_and_follow_a_generator():
    first, second = (Gaussian(X, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    a, b, c = first(3.0, 2.0), second(7.0, 1.0), first(3.0, 2.0)
    assert torch.equal(a, b)
    assert abs((a * c).mean()) <= 5 / math.sqrt(a.numel()) < a.square().mean()


def test_initial_noise():
    """The image of a seed is what that seed gives PyTorch, alone or in a batch, and unlike the noise of the steps."""
    z = initial((3, 3, 32, 32), 20)
    assert torch.equal(z[2], torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(22)))
    assert torch.equal(initial((2, 3, 32, 32), [22, 20], dtype=torch.float64), z[[2, 0]].double())
    for other in (Gaussian(z, 20)(2.0, 1.0), Brownian(z, 20)(2.0, 1.0)):
        assert abs((other * z).mean()) <= 5 / math.sqrt(z.numel())
    assert initial((0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_unseeded_noise_follows_the_global_generator():
    torch.manual_seed(1)
    a, b = Brownian(X)(2.0, 1.0), Brownian(X)(2.0, 1.0)
    torch.manual_seed(1)
    assert torch.equal(Brownian(X)(2.0, 1.0), a) and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Brownian(X, -1), "seed .*-1"),
        (lambda: Gaussian(X, 1.5), "seed .*1.5"),
        (lambda: Gaussian(X, [1, "2"]), "seed .*'2'"),
        (lambda: Brownian(X, [1, 2, 3]), "seed .*2, got 3"),
        (lambda: Gaussian(X, 1, generator=torch.Generator()), "seed 1 and a generator"),
        (lambda: Brownian(X, 1, exponent=0), "exponent .*got 0"),
        (lambda: Brownian(X, 1, exponent=math.nan), "exponent .*nan"),
        (lambda: Brownian(X, 1, resolution=0), "resolution .*got 0"),
        (lambda: Brownian(X, 1)(1.0, 0.0), r"sigma .*got 0\.0"),
        (lambda: Brownian(X, 1)(1e9, 1.0), r"sigma .*1000000000\.0"),
        (lambda: Brownian(X, 1)(math.nan, 1.0), "sigma .*nan"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_seeds_of_images():
    assert image_seeds(7, 3) == [7, 8, 9] and image_seeds((5, 1), 2) == [5, 1]

"""Metrics against closed forms, brute force, and their own statistics over many draws."""

import math

import numpy as np
import pytest
import torch

from hdit import evaluate_metrics as metrics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def covariance(d, seed):
    a = normal(d, d + 3, seed=seed)
    return a @ a.T / d


# ---- Moments and the Fréchet distance ----


def test_moments_of_batches_are_numpy_s_also_far_from_zero():
    rows = normal(500, 7) @ normal(7, 7, seed=1) + 1e6
    moments = metrics.Moments()
    for part in rows.split([1, 99, 250, 150]):
        moments.add(part)
    mean, found = moments.statistics()
    want = np.cov((rows - 1e6).numpy().T)
    assert (mean - rows.mean(0)).abs().max() < 1e-9
    # the rows themselves are rounded to 1e6 · 2^-53 = 1e-10
    assert np.abs(found.numpy() - want).max() < 1e-8 * np.abs(want).max()


def test_frechet_distance_of_commuting_covariances():
    """With common eigenvectors: |m − m'|² + Σ (√a − √b)². Neither has full rank, and their product less."""
    basis = torch.linalg.qr(normal(60, 60)).Q
    a, b = normal(60, seed=1).square(), normal(60, seed=2).square()
    a[40:] = b[:35] = 0
    means = normal(2, 60, seed=3)
    got = metrics.frechet_distance(means[0], basis * a @ basis.T, means[1], basis * b @ basis.T)
    want = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert abs(got - want) < 1e-12 * want


@pytest.mark.parametrize("d", [1, 2, 30])
def test_frechet_distance_of_any_covariances(d):
    """tr (C C')^½ from the eigenvalues of the product, which are real and positive."""
    means, left, right = normal(2, d), covariance(d, 1), covariance(d, 2)
    got = metrics.frechet_distance(means[0], left, means[1], right)
    root = torch.linalg.eigvals(left @ right).real.clamp(min=0).sqrt().sum()
    want = (means[0] - means[1]).square().sum() + left.trace() + right.trace() - 2 * root
    assert abs(got - want) < 1e-9 * want
    assert abs(got - metrics.frechet_distance(means[1], right, means[0], left)) < 1e-11 * want


def test_frechet_distance_with_fewer_images_than_features():
    """Of rank one: |a|² + |b|² − 2 |a·b|; and 0 for equal sets of any rank. A root of the product would leave 1e-8."""
    a, b, zero = normal(50), normal(50, seed=1), torch.zeros(50)
    got = metrics.frechet_distance(zero, torch.outer(a, a), zero, torch.outer(b, b))
    want = a @ a + b @ b - 2 * (a @ b).abs()
    assert abs(got - want) < 1e-11 * want
    moments = metrics.Moments()
    moments.add(normal(20, 300, seed=2))
    mean, found = moments.statistics()
    assert metrics.frechet_distance(mean, found, mean, found) < 1e-11 * found.trace()
    # scaled by s: (s − 1)² of the trace
    got = metrics.frechet_distance(mean, found, mean, found * 1.21)
    assert abs(got - 0.01 * found.trace()) < 1e-11 * found.trace()


def test_frechet_distance_refuses_other_features():
    with pytest.raises(ValueError, match="one number of features, got 3 and 2"):
        metrics.frechet_distance(normal(3), covariance(3, 0), normal(2), covariance(2, 0))
    moments = metrics.Moments()
    moments.add(normal(1, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        moments.statistics()


# ---- KID ----


def test_kernel_distance_is_the_mean_over_pairs():
    x, y = normal(31, 5), normal(47, 5, seed=1) + 0.3
    kernel = lambda a, b: (float(a @ b) / 5 + 1) ** 3  # noqa: E731
    within = []
    for side in (x, y):
        pairs = [kernel(a, b) for i, a in enumerate(side) for j, b in enumerate(side) if i != j]
        within.append(sum(pairs) / len(pairs))
    across = sum(kernel(a, b) for a in x for b in y) / len(x) / len(y)
    want = within[0] + within[1] - 2 * across
    assert abs(metrics.kernel_distance(x, y)[0] - want) < 1e-11


def test_kernel_distance_is_unbiased_and_its_error_is_honest():
    """Over 200 pairs of sets: the mean is the true distance within its error; the errors agree with the deviation."""
    for shift, true in ((0.0, 0.0), (1.0, None)):
        found = [
            metrics.kernel_distance(normal(80, 2, seed=2 * i), normal(80, 2, seed=2 * i + 1) + shift)
            for i in range(1, 201)
        ]
        values, errors = torch.tensor(found, dtype=torch.float64).T
        deviation = values.std()
        if true is None:
            true = gaussian_kernel_distance(shift)
        assert abs(values.mean() - true) < 4 * deviation / 200**0.5
        assert 0.6 < errors.square().mean().sqrt() / deviation < 1.8
    assert (values > errors).all(), "a shift by one deviation is seen in 80 images"


def gaussian_kernel_distance(shift):
    """Of N(0, 1) and N(shift, 1) in two features: moments of x·y up to the third, from tensors of moments."""

    def moments(mean):
        one = [1, mean, 1 + mean**2, 3 * mean + mean**3]  # E xᵏ of N(mean, 1)
        return {(i, j): one[i] * one[j] for i in range(4) for j in range(4) if i + j <= 3}

    def expectation(p, q):  # E (x·y / 2 + 1)³
        return sum(
            math.factorial(3) / (math.factorial(i) * math.factorial(j) * math.factorial(3 - i - j))
            * 0.5 ** (i + j) * p[i, j] * q[i, j]
            for i, j in p
        )  # fmt: skip

    p, q = moments(0.0), moments(shift)
    return expectation(p, p) + expectation(q, q) - 2 * expectation(p, q)


# ---- Precision, recall, density, coverage ----


def brute_force(real, samples, k=3, density_k=5):
    def radius(points, i, k):
        return sorted(float((points[i] - other).norm()) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(point, balls, radii):
        return [float((point - ball).norm()) <= r for ball, r in zip(balls, radii, strict=True)]

    radii = [radius(real, i, k) for i in range(len(real))]
    wide = [radius(real, i, density_k) for i in range(len(real))]
    own = [radius(samples, i, k) for i in range(len(samples))]
    return (
        sum(any(inside(s, real, radii)) for s in samples) / len(samples),
        sum(any(inside(r, samples, own)) for r in real) / len(real),
        sum(sum(inside(s, real, wide)) for s in samples) / (density_k * len(samples)),
        sum(any(float((r - s).norm()) <= w for s in samples) for r, w in zip(real, wide, strict=True)) / len(real),
    )


def test_neighbours_against_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 16)
    real, samples = normal(40, 3), 0.7 * normal(55, 3, seed=1) + 0.5
    got = metrics.neighbours(real, samples)
    assert got == pytest.approx(brute_force(real, samples), abs=1e-12)
    assert len({round(value, 3) for value in got}) == 4, "four different numbers"


def test_neighbours_of_constructed_sets():
    near, far = normal(60, 4), normal(60, 4, seed=1) + 1000
    half = torch.cat([near, far])
    collapsed = metrics.neighbours(half, near + 0.01)  # samples of one of two modes
    assert collapsed.precision == 1 and collapsed.recall == 0.5 and 0.4 <= collapsed.coverage <= 0.5
    invented = metrics.neighbours(near, torch.cat([near, far]))  # half of the samples are like nothing real
    assert invented.precision == 0.5 and invented.recall == 1
    same = metrics.neighbours(near, near.clone())
    assert same.precision == same.recall == same.coverage == 1
    with pytest.raises(ValueError, match="samples must be more than 5 images for precision, got 5"):
        metrics.neighbours(near, near[:5])


# ---- Inception Score ----


def test_inception_score():
    certain = torch.eye(8, dtype=torch.float64).repeat(5, 1)
    assert metrics.inception_score(certain, splits=5) == pytest.approx((8.0, 0.0))
    assert metrics.inception_score(torch.full((20, 8), 1 / 8), splits=2)[0] == pytest.approx(1.0)
    p = normal(30, 6).softmax(1)
    scores = []
    for part in p.split(10):
        terms = [float(a * math.log(a / b)) for row in part for a, b in zip(row, part.mean(0), strict=True)]
        scores.append(math.exp(sum(terms) / 10))
    want = (np.mean(scores), np.std(scores))
    assert metrics.inception_score(p, splits=3) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match=r"must be \(10 or more, classes\), got \(5, 6\)"):
        metrics.inception_score(p[:5])
    with pytest.raises(ValueError, match="rows of 0 or more that sum"):
        metrics.inception_score(2 * p)


def test_clip_score_is_the_mean_positive_cosine_in_percent():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 0.0]])
    captions = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, 0.0], [3.0, 4.0]])
    score, error = metrics.clip_score(images, captions)  # 100, 0 (the cosine is −1), 70.7, 60
    scores = np.array([100, 0, 100 / 2**0.5, 60])
    assert score == pytest.approx(scores.mean(), rel=1e-12)
    assert error == pytest.approx(scores.std(ddof=1) / 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"images and captions must be \(n, d\), got \(4, 2\) and \(3, 2\)"):
        metrics.clip_score(images, captions[:3])

"""Distances between two sets of features, in float64: Fréchet, kernel (KID), precision and recall, density and
coverage; the Inception Score of class probabilities; the CLIP score. Every function takes tensors of any features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 20  # of the jackknife
CHUNK = 1024  # rows of a matrix of distances at a time


class Moments:
    """Mean and covariance of rows that come in batches, in float64; the rows are not kept.

    Sums are taken about the first batch's mean, so features far from zero lose no digits.
    """

    def __init__(self):
        self.count = 0

    def add(self, rows: Tensor):
        """rows (n, d)."""
        rows = rows.double()
        if self.count == 0:
            self.centre = rows.mean(0)
            self.total = torch.zeros_like(self.centre)
            self.products = self.total.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.centre
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def statistics(self) -> tuple[Tensor, Tensor]:
        """mean (d,) and covariance (d, d), with n − 1 below as numpy.cov. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return self.centre + mean, covariance


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; of Inception's pool features it is FID (Heusel et al.
    2017, arXiv 1706.08500): |m − m'|² + tr(C + C' − 2 (C C')^½).

    tr (C C')^½ is the sum of the singular values of F' ᵀF, with C = F Fᵀ and C' = F' F'ᵀ from eigenvalues. No square
    root is taken of a product's rounding errors, so covariances without full rank (fewer images than features) are
    safe, and equal ones give 0 to 1e-12 of the trace.
    """
    mean, covariance, other_mean, other_covariance = (
        value.double() for value in (mean, covariance, other_mean, other_covariance)
    )
    if mean.shape != other_mean.shape:
        raise ValueError(f"means must have one number of features, got {len(mean)} and {len(other_mean)}")
    factors = (_factor(covariance), _factor(other_covariance))
    shared = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * shared
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F (d, rank) with F Fᵀ = covariance; eigenvalues that are rounding errors are left out."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    real = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors[:, real] * values[real].sqrt()


def kernel_distance(real: Tensor, samples: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): the unbiased squared maximum mean discrepancy of the kernel
    (x·y / d + 1)³ over all pairs, and its standard error.

    real (n, d), samples (m, d). The error is the jackknife's: the distance with each of 20 groups of images left out.
    It can be negative, as an unbiased estimate of 0 must.
    """
    groups = min(GROUPS, len(real), len(samples))
    if groups < 3:
        raise ValueError(f"KID needs at least 3 images on both sides, got {len(real)} and {len(samples)}")
    sides = real.double(), samples.double()
    # (images, groups): 1 where an image is in a group, of which there is one after the other
    groupings = [_grouping(len(side), groups).to(side.device) for side in sides]
    within = [_kernel_sums(side, side, own, own) for side, own in zip(sides, groupings, strict=True)]
    across = _kernel_sums(*sides, *groupings)
    diagonals = [
        own.T @ (side.square().sum(1) / side.shape[1] + 1) ** 3 for side, own in zip(sides, groupings, strict=True)
    ]
    sizes = [own.sum(0) for own in groupings]

    def distance(kept: Tensor) -> Tensor:
        n, m = ((size * kept).sum() for size in sizes)
        pairs = torch.outer(kept, kept)
        terms = [(s * pairs).sum() - (d * kept).sum() for s, d in zip(within, diagonals, strict=True)]
        return terms[0] / (n * (n - 1)) + terms[1] / (m * (m - 1)) - 2 * (across * pairs).sum() / (n * m)

    everything = torch.ones_like(sizes[0])
    left_out = torch.stack([distance(everything - row) for row in torch.eye(groups).to(everything)])
    error = ((groups - 1) / groups * (left_out - left_out.mean()).square().sum()).sqrt()
    return float(distance(everything)), float(error)


def _grouping(count: int, groups: int) -> Tensor:
    return torch.eye(groups, dtype=torch.float64)[torch.arange(count) * groups // count]


def _kernel_sums(x: Tensor, y: Tensor, x_groups: Tensor, y_groups: Tensor) -> Tensor:
    """(groups, groups): the kernel's sum over the pairs of each two groups."""
    total = 0
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        total = total + x_groups[rows].T @ ((x[rows] @ y.T / x.shape[1] + 1) ** 3 @ y_groups)
    return total


class Neighbours(NamedTuple):
    """Shares of samples and of real images that lie near the other set."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Tensor, samples: Tensor, k: int = 3, density_k: int = 5) -> Neighbours:
    """Precision and recall of Kynkäänniemi et al. 2019 (arXiv 1904.06991; balls to the k-th neighbour, k = 3), density
    and coverage of Naeem et al. 2020 (arXiv 2002.09797; k = 5).

    precision: samples inside a ball around any real image; recall: real images inside a ball around any sample;
    density: how many real balls hold a sample, over k; coverage: real balls that hold any sample.
    real (n, d), samples (m, d), n and m > 5.
    """
    for name, side in (("real", real), ("samples", samples)):
        if len(side) <= max(k, density_k):
            raise ValueError(f"{name} must be more than {max(k, density_k)} images for precision, got {len(side)}")
    centre = real.double().mean(0)
    real, samples = real.double() - centre, samples.double() - centre
    radii = _radii(real, (k, density_k))
    sample_radius = _radii(samples, (k,))[0]
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    held, covered = 0, torch.zeros_like(recalled)
    for start in range(0, len(samples), CHUNK):
        distances = squared_distances(samples[start : start + CHUNK], real)
        precise += int((distances <= radii[0]).any(1).sum())
        recalled |= (distances <= sample_radius[start : start + CHUNK, None]).any(0)
        inside = distances <= radii[1]
        held += int(inside.sum())
        covered |= inside.any(0)
    n, m = len(real), len(samples)
    return Neighbours(precise / m, int(recalled.sum()) / n, held / (density_k * m), int(covered.sum()) / n)


def _radii(points: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance of each point to its k-th nearest other point, for each k."""
    found = []
    for start in range(0, len(points), CHUNK):
        distances = squared_distances(points[start : start + CHUNK], points)
        distances[torch.arange(len(distances)), torch.arange(start, start + len(distances))] = math.inf
        found.append(distances.topk(max(ks), largest=False).values)
    nearest = torch.cat(found)
    return [nearest[:, k - 1] for k in ks]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) from (n, d) and (m, d); what rounding leaves of equal points is 0."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = norms - 2 * x @ y.T
    return torch.where(distances > 1e-13 * x.shape[1] * norms, distances, 0.0)


def inception_score(probabilities: Tensor, splits: int = 10) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL divergence of p(class | image) from
    p(class), as mean and standard deviation over ``splits`` parts of the images in their order.

    probabilities (n, classes), rows that sum to 1; n ≥ splits.
    """
    if probabilities.dim() != 2 or len(probabilities) < splits:
        raise ValueError(f"probabilities must be ({splits} or more, classes), got {tuple(probabilities.shape)}")
    if (probabilities < 0).any() or (probabilities.double().sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("probabilities must be rows of 0 or more that sum to 1")
    scores = []
    for part in probabilities.double().tensor_split(splits):
        entropies = torch.special.entr(part).sum(1).mean()
        scores.append((torch.special.entr(part.mean(0)).sum() - entropies).exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def clip_score(images: Tensor, captions: Tensor) -> tuple[float, float]:
    """CLIP score (Hessel et al. 2021, arXiv 2104.08718): the mean of 100 · max(cosine, 0) of the embeddings of images
    and of their captions, and its standard error. Papers print it in percent, as here, or with the original's 2.5.

    images, captions (n, d): row i of one belongs to row i of the other; n ≥ 2.
    """
    if images.shape != captions.shape or images.dim() != 2 or len(images) < 2:
        raise ValueError(f"images and captions must be (n, d), got {tuple(images.shape)} and {tuple(captions.shape)}")
    scores = 100 * torch.cosine_similarity(images.double(), captions.double()).clamp(min=0)
    return float(scores.mean()), float(scores.std() / len(scores) ** 0.5)

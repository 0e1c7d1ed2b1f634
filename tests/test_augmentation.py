"""Karras augmentation: the vector is the transform; mirrors are exact; a probability of 0 is the identity."""

import itertools
import math

import pytest
import torch

from hdit import augmentation
from hdit.augmentation import KarrasAugmentation, draw, transform


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def waves(height, width, forward=None):
    """A smooth picture (3, H, W) float64 as a function of position: at each pixel, or where it was before ``forward``.

    Of the height and the width alone, so that it can be moved without sampling; slow enough for bicubic sampling.
    """
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (height, width)), indexing="ij")
    points = torch.stack([x, y], -1)
    if forward is not None:
        points = (points - forward[:, 2]) @ torch.linalg.inv(forward[:, :2]).T
    x, y = points.unbind(-1)
    return 0.5 * torch.stack([(0.19 * x + 0.07 * y + 1).sin(), (0.11 * y - 0.13 * x).cos(), (0.2 * y + 0.3).sin()])


def by_hand(vector, height, width):
    """The transform from k-diffusion's matrices, one by one: mirror · scale · rotate · stretch · shift, x first."""
    a0, a1, a2, cosine, sine, along, across, a6, a7 = vector.double().tolist()
    angle, a5 = math.atan2(across, along), math.hypot(along, across)
    theta = math.atan2(sine, cosine + 1)

    def turn(t):
        return torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=torch.float64)

    def diagonal(x, y):
        return torch.diag(torch.tensor([x, y], dtype=torch.float64))

    step = 2**0.2
    linear = diagonal(1 - 2 * a0, 1 - 2 * a1) @ diagonal(step**a2, step**a2) @ turn(-theta)
    linear = linear @ turn(angle) @ diagonal(step**a5, step**-a5) @ turn(-angle)
    shift = torch.tensor([width / 8 * a6, height / 8 * a7], dtype=torch.float64)
    return torch.cat([linear, (linear @ shift)[:, None]], 1)


def test_probability_0_is_the_identity_bit_for_bit():
    image = torch.rand(3, 9, 7, generator=generator()) * 2 - 1
    for seed in range(20):
        got, vector = KarrasAugmentation(0.0)(image, generator(seed))
        assert torch.equal(got, image)
        assert torch.equal(vector, torch.zeros(9))


@pytest.mark.parametrize("flips", list(itertools.product((0.0, 1.0), repeat=2)))
def test_mirrors_are_exact(flips):
    image = torch.rand(3, 8, 11, generator=generator(1)) * 2 - 1
    got = transform(image, torch.tensor([*flips, *[0.0] * 7]))
    rows, columns = (slice(None, None, -1) if flip else slice(None) for flip in (flips[1], flips[0]))
    assert torch.equal(got, torch.from_numpy(image.numpy()[:, rows, columns].copy()))


@pytest.mark.parametrize("seed", range(8))
def test_the_vector_alone_determines_the_transform(seed):
    """Against the picture's formula, evaluated where each pixel came from by matrices composed one by one."""
    height, width = 60, 48
    vector = draw(1.0, generator(seed))
    got = transform(waves(height, width), vector)
    want = waves(height, width, by_hand(vector, height, width))
    forward = by_hand(vector, height, width)
    # pixels whose source lies well inside; the others show the mirrored picture
    ones = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (width, height)), indexing="xy"),
        -1,
    )
    source = (ones - forward[:, 2]) @ torch.linalg.inv(forward[:, :2]).T
    inside = (source[..., 0].abs() < width / 2 - 8) & (source[..., 1].abs() < height / 2 - 8)
    assert inside.sum() > 100
    error = (got - want).abs().amax(0)[inside].max()
    assert error < 0.012  # of bicubic sampling; the picture spans one


def test_each_part_does_what_its_name_says():
    image = waves(40, 64)
    right = torch.tensor([0.0] * 7 + [1.0, 0.0])  # an eighth of the width: eight whole pixels
    down = torch.tensor([0.0] * 8 + [1.0])
    assert (transform(image, right)[:, :, 16:] - image[:, :, 8:-8]).abs().max() < 0.004
    assert (transform(image, down)[:, 13:] - image[:, 8:-5]).abs().max() < 0.004
    turned = transform(waves(48, 48), torch.tensor([0.0] * 3 + [-1.0, 1.0] + [0.0] * 4))  # sin = 1: a quarter
    assert (turned - torch.rot90(waves(48, 48), 1, (1, 2)))[:, 4:-4, 4:-4].abs().max() < 0.004


def test_beyond_the_border_lies_the_mirror_image():
    image = torch.rand(3, 16, 16, generator=generator(2)).double() * 2 - 1
    image = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    got = transform(image, torch.tensor([0.0] * 7 + [2.0, 0.0]))  # four pixels to the right
    assert (got[:, :, :4] - image[:, :, :4].flip(-1)).abs().max() < 0.05
    assert (got[:, :, :4] - image[:, :, :1]).abs().max() > 0.2, "not the repeated border"


def test_shrinking_does_not_alias():
    """Stripes of one pixel, shrunk to half: grey. Without the finer grid their sampling is a wave of full contrast."""
    stripes = torch.ones(3, 64, 64, dtype=torch.float64)
    stripes[:, :, ::2] = -1
    got = transform(stripes, torch.tensor([0.0, 0.0, -4.0] + [0.0] * 6))  # scale 2^(-0.8)
    assert got[:, 20:-20, 20:-20].abs().max() < 0.1
    flat = transform(torch.full((3, 20, 20), 0.3), torch.tensor([0.0, 0.0, -4.0] + [0.0] * 6))
    assert (flat - 0.3).abs().max() < 1e-5


def test_how_often_and_how_much():
    """Frequencies of each part, and second moments of the vector, within five standard errors."""
    count, p = 4000, 0.12
    vectors = torch.stack([draw(p, generator(seed)) for seed in range(count)]).double()
    applied = torch.stack([vectors[:, 0], vectors[:, 1], *(vectors[:, i] != 0 for i in (2, 4, 5, 7))])
    expected = torch.tensor([0.5, p / 2, p, p, p, p], dtype=torch.float64)
    assert ((applied.mean(1) - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    full = torch.stack([draw(1.0, generator(seed)) for seed in range(count)]).double()
    # E v² and E v⁴, normal: 1, 3. E (cos − 1)² = 3/2, ⁴ = 35/8; E sin² = 1/2, ⁴ = 3/8; stretch, a cos: 1/2, 3 · 3/8.
    second = torch.tensor([1, 3 / 2, 1 / 2, 1 / 2, 1 / 2, 1, 1], dtype=torch.float64)
    fourth = torch.tensor([3, 35 / 8, 3 / 8, 9 / 8, 9 / 8, 3, 3], dtype=torch.float64)
    errors = ((fourth - second**2) / count).sqrt()
    assert ((full[:, 2:].square().mean(0) - second).abs() < 5 * errors).all()
    assert full[:, 2:].mean(0)[[0, 2, 3, 4, 5, 6]].abs().max() < 5 / count**0.5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        KarrasAugmentation(1.5)
    with pytest.raises(ValueError, match=r"vector must have shape \(9,\), got \(8,\)"):
        augmentation.transform(torch.rand(3, 4, 4), torch.zeros(8))

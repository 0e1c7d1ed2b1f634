"""Spectra of pictures whose spectrum is known: waves, white and coloured noise, checkerboards."""

import math

import pytest
import torch

from hdit.evaluate_spectrum import Spectrum, compare_spectra, frequencies


def spectrum(images):
    found = Spectrum()
    for part in images.split(5):
        found.add(part)
    return found


def noise(count, height, width, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wave(fy, fx, height=64, width=64, amplitude=1.0):
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return (amplitude * (2 * math.pi * (fy * y + fx * x) + 0.7).cos()).expand(1, 3, -1, -1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64)])
@pytest.mark.parametrize(("fy", "fx"), [(0.25, 0.125), (0.0, 0.3125), (0.375, -0.375)])
def test_energy_of_a_wave_is_where_it_is(fy, fx, height, width):
    """A wave of amplitude a has a²/2 per pixel, within one frequency step (the window's) of its frequency."""
    power = spectrum(wave(fy, fx, height, width, 0.6)).power()
    y, x = round(fy * height) % height, round(fx * width) % width
    around = sum(power[(y + dy) % height, (x + dx) % width] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    assert abs(2 * around - height * width * 0.18) < 1e-3 * height * width * 0.18
    assert power[y, x] == power.max()
    assert abs(power.sum() - 2 * around) < 1e-3 * power.sum()


def test_rings_hold_what_is_at_their_distance():
    found, power = spectrum(wave(0.1875, 0.25)).radial()  # 3-4-5: 0.3125
    assert found[power.argmax()] == 0.3125
    assert len(found) == 32 and found[0] == 1 / 64 and found[-1] == 0.5


def test_white_noise_is_flat_at_its_variance():
    frequency, power = spectrum(0.3 * noise(200, 32, 32)).radial()
    assert (power[2:] / 0.09 - 1).abs().max() < 0.05  # the mean that is removed lowers the first rings
    assert abs(spectrum(noise(100, 32, 32)).slope()) < 0.05
    assert len(frequency) == 16


@pytest.mark.parametrize("exponent", [-1.0, -2.0, -3.0])
def test_slope_of_coloured_noise(exponent):
    white = torch.fft.fft2(noise(150, 64, 64, seed=1))
    radius = frequencies(torch.empty(64, 64))
    radius[0, 0] = 1
    coloured = torch.fft.ifft2(white * radius ** (exponent / 2)).real
    assert abs(spectrum(coloured).slope() - exponent) < 0.15


def test_high_energy_is_what_blur_removes():
    """A wave above half of Nyquist counts with a²/2 per pixel, one below does not."""
    high, low = wave(0.0, 0.375, amplitude=0.5), wave(0.125, 0.0)
    total = spectrum(high + low).high_energy()
    assert abs(total - 64 * 64 * 0.125) < 0.001 * total
    blurred = spectrum(0.4 * high + low)
    found = compare_spectra(spectrum(high + low), blurred, 4)
    assert abs(found["high_frequency_ratio"] - 0.16) < 0.002


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_a_grid_is_seen_at_its_patch_size(patch_size):
    """Noise and 2 % of its variance in a pattern that repeats with the patches, against noise alone.

    The pattern's p² − 1 waves share that variance; the window leaves 4/9 of a wave's power at its own frequency.
    """
    images = noise(60, 64, 96)
    pattern = torch.randn(
        3, patch_size, patch_size, generator=torch.Generator().manual_seed(patch_size), dtype=torch.float64
    )
    pattern = pattern - pattern.mean((1, 2), keepdim=True)
    pattern = (pattern / pattern.square().mean() ** 0.5).repeat(1, 64 // patch_size, 96 // patch_size)
    clean, tiled = spectrum(images), spectrum(images + 0.02**0.5 * pattern)
    assert clean.grid_peak(patch_size) < 1.6
    assert tiled.grid_peak(patch_size) > 1 + 0.02 / (patch_size**2 - 1) * 64 * 96 * 4 / 9
    if patch_size > 2:
        assert spectrum(images + 0.3 * wave(0.21, 0.0, 64, 96)).grid_peak(patch_size) < 1.6, "a wave off the grid"


def test_a_few_images_of_high_contrast_do_not_hide_the_grid_of_the_others():
    pattern = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(1, 16, 16)
    tiled = noise(60, 64, 64) + 0.1 * (pattern - pattern.mean((1, 2), keepdim=True))
    few = 30 * noise(3, 64, 64, seed=1)
    alone, together = (spectrum(images).grid_peak(4) for images in (tiled, torch.cat([tiled, few])))
    assert alone > 4
    # the others are 60 of 63; of three images alone the peak is the largest of seven with an error of 1 / √9
    assert abs(math.log(together) - 60 / 63 * math.log(alone)) < 3 / 63 * 2


def test_stripes_of_every_width_are_no_grid():
    """They have all their power on one axis, where its multiples are to be compared with what is beside them."""
    for axis in (2, 3):
        stripes = noise(100, 64, 64).mean(axis, keepdim=True).expand(-1, -1, 64, 64)
        assert spectrum(stripes + 0.01 * noise(100, 64, 64, seed=1)).grid_peak(4) < 1.6


def test_a_checkerboard_of_patches_is_a_grid():
    board = torch.ones(8, 8).double()
    board[::2, 1::2] = board[1::2, ::2] = -1
    board = board.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, 3, -1, -1)
    # squares of 8 pixels repeat after 16, with odd multiples along each axis: at (1, 1) / 16, not on the grid of 8
    assert spectrum(board + 0.01 * noise(20, 64, 64)).grid_peak(16) > 1000
    assert spectrum(board + 0.01 * noise(20, 64, 64)).grid_peak(8) < 3


def test_images_that_say_nothing():
    flat = spectrum(torch.full((3, 3, 32, 32), 0.25))
    assert flat.slope() is None
    assert flat.grid_peak(4) == pytest.approx(1)
    found = compare_spectra(flat, flat, 4)
    assert found["high_frequency_ratio"] is None
    assert "grid_peak" not in compare_spectra(flat, flat, 16)


def test_bad_use_is_named():
    found = spectrum(noise(1, 16, 16))
    with pytest.raises(ValueError, match=r"images must be \(16, 16\) pixels like the first, got \(16, 8\)"):
        found.add(noise(1, 16, 8))
    with pytest.raises(ValueError, match="patch_size must be at least 2 and a quarter of the image at most, got 8"):
        found.grid_peak(8)
    with pytest.raises(ValueError, match="at least one image"):
        Spectrum().power()

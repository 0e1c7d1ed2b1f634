"""What distances of features at 299² or less do not see: energy by spatial frequency, and peaks at the patch grid."""

import torch
from torch import Tensor

HIGH = 0.25  # cycles per pixel: half of Nyquist
SLOPE_RANGE = (1 / 16, 0.4)  # cycles per pixel


class Spectrum:
    """Mean power spectrum of images that come in batches: (H, W) float64, and the mean of its logarithm.

    Each channel has its mean removed and is multiplied by a Hann window, since the borders of a photograph do not
    match; power is |FFT|² over the window's energy, so white noise of variance v has power v at every frequency.
    """

    def __init__(self):
        self.count = 0

    def add(self, images: Tensor):
        """images (B, C, H, W) in [-1, 1], all batches of one size."""
        images = images.double()
        height, width = images.shape[2:]
        if self.count == 0:
            self.total, self.logarithms = images.new_zeros(2, height, width)
        elif self.total.shape != (height, width):
            raise ValueError(f"images must be {tuple(self.total.shape)} pixels like the first, got {(height, width)}")
        window = torch.outer(
            *(torch.hann_window(side, dtype=torch.float64, device=images.device) for side in (height, width))
        )
        centred = images - images.mean((2, 3), keepdim=True)
        power = (torch.fft.fft2(centred * window).abs().square() / window.square().sum()).mean(1)
        self.total += power.sum(0)
        least = 1e-12 * power.mean((1, 2), keepdim=True) + 1e-30  # so that images without variance have a logarithm
        self.logarithms += (power + least).log().sum(0)
        self.count += len(images)

    def power(self) -> Tensor:
        """(H, W), frequencies in the order of ``torch.fft.fftfreq``."""
        if self.count == 0:
            raise ValueError("a spectrum needs at least one image, got none")
        return (self.total / self.count).cpu()

    def radial(self) -> tuple[Tensor, Tensor]:
        """Frequencies (cycles per pixel, up to Nyquist's 0.5) and the mean power on a ring around each.

        Rings are as wide as the coarser frequency step, 1 / min(H, W).
        """
        power = self.power()
        step = 1 / min(power.shape)
        ring = (frequencies(power) / step).round().long()
        last = min(power.shape) // 2
        counts = torch.bincount(ring.flatten())[1 : last + 1]
        sums = torch.bincount(ring.flatten(), power.flatten())[1 : last + 1]
        return torch.arange(1, len(counts) + 1, dtype=torch.float64) * step, sums / counts

    def high_energy(self) -> float:
        """Sum of the power at 0.25 cycles per pixel and above, the corners included."""
        power = self.power()
        return float(power[frequencies(power) >= HIGH].sum())

    def slope(self) -> float | None:
        """Exponent of power = c · frequency^slope, least squares on logarithms between 1/16 and 0.4 cycles per pixel;
        about −2 for photographs (Field 1987). None for images that are too small or have no variance."""
        frequency, power = self.radial()
        kept = (frequency >= SLOPE_RANGE[0]) & (frequency <= SLOPE_RANGE[1]) & (power > 0)
        if kept.sum() < 2:
            return None
        x, y = frequency[kept].log(), power[kept].log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    def grid_peak(self, patch_size: int) -> float:
        """Largest ratio of the power at a multiple of the patch grid's frequency (1 / patch_size along each axis) to
        the geometric mean of its neighbours. 1 where the grid does not show; photographs are near it.

        Neighbours lie two to four frequency steps away (the window spreads a wave over one), along the axis where the
        multiple is on one: there photographs have more power than beside it. All means are geometric, over images too,
        or the few with most contrast would decide: of n photographs it is uncertain by about 1 / √n.
        """
        self.power()  # refuses a spectrum of nothing
        logarithms = (self.logarithms / self.count).cpu()
        height, width = logarithms.shape
        if patch_size < 2 or min(height, width) < 4 * patch_size:
            raise ValueError(
                f"patch_size must be at least 2 and a quarter of the image at most, got {patch_size} for "
                f"{height}×{width} pixels"
            )
        reach = [max(2, min(4, side // patch_size // 2)) for side in (height, width)]
        ratios = []
        for a in range(patch_size // 2 + 1):
            for b in range(-(patch_size // 2), patch_size // 2 + 1):
                if a == b == 0:
                    continue
                y, x = round(a * height / patch_size), round(b * width / patch_size)
                rows, columns = (reach[0] if a else 0), (reach[1] if b else 0)
                around = [
                    logarithms[(y + dy) % height, (x + dx) % width]
                    for dy in range(-rows, rows + 1)
                    for dx in range(-columns, columns + 1)
                    if max(abs(dy), abs(dx)) >= 2
                ]
                ratios.append(logarithms[y % height, x % width] - torch.stack(around).mean())
        return float(torch.stack(ratios).max().exp())


def frequencies(power: Tensor) -> Tensor:
    """(H, W): distance of each frequency from zero, in cycles per pixel."""
    y, x = (torch.fft.fftfreq(side, dtype=torch.float64) for side in power.shape)
    return torch.hypot(y[:, None], x[None, :])


def compare_spectra(real: Spectrum, samples: Spectrum, patch_size: int) -> dict[str, float | int | None]:
    """high_frequency_ratio: energy above half of Nyquist, samples over real (below 1: blurred); slopes; grid peaks.

    None for what is undefined: of images without any variance, or too small for the patch size.
    """
    high = real.high_energy()
    found = {
        "high_frequency_ratio": samples.high_energy() / high if high else None,
        "slope": samples.slope(),
        "slope_real": real.slope(),
    }
    if min(samples.power().shape) >= 4 * patch_size:
        found |= {"grid_peak": samples.grid_peak(patch_size), "grid_peak_real": real.grid_peak(patch_size)}
    return found | {"patch_size": patch_size}

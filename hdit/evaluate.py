"""hdit evaluate: how far samples are from real images, by numbers that say how they were made.

Images pass once through every feature extractor; what is kept are sums and one row of features per image, never images.
"""

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from . import data, evaluate_images, flops
from . import evaluate_metrics as metrics_
from .evaluate_features import BUNDLED, Extractor, extractor
from .evaluate_spectrum import Spectrum, compare_spectra

METRICS = ("frechet", "kid", "precision", "inception-score", "spectrum")
MOST_ROWS = 10_000  # of features for KID and precision, whose cost is their square


@dataclass
class Features:
    """What one extractor makes of one set: the moments of all rows, and the first row of every image."""

    extractor: Extractor
    moments: metrics_.Moments = field(default_factory=metrics_.Moments)
    rows: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    statistics: tuple[Tensor, Tensor] | None = None  # read from a file, in place of the moments

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        return self.moments.statistics() if self.statistics is None else self.statistics

    def some_rows(self) -> Tensor:
        """At most MOST_ROWS, evenly over the set."""
        rows = torch.cat(self.rows)
        if len(rows) > MOST_ROWS:
            rows = rows[torch.linspace(0, len(rows) - 1, MOST_ROWS).long()]
        return rows


@dataclass
class Collected:
    """One set of images, measured."""

    name: str
    images: int = 0
    unreadable: int = 0
    features: list[Features] = field(default_factory=list)
    spectrum: Spectrum | None = None


def collect(
    name: str, batches: Iterable[Tensor], extractors: list[Extractor], metrics=METRICS, device="cpu", total=None
) -> Collected:
    """Pass batches of images, (B, 3, H, W) in [-1, 1], through every extractor; ``device`` is where those run.

    total: number of images, for the progress bar, which is shown where standard error is a terminal.
    """
    found = Collected(name, features=[Features(each) for each in extractors])
    found.spectrum = Spectrum() if "spectrum" in metrics else None
    with tqdm(total=total, desc=name, unit="image", disable=None, leave=False) as bar:
        for images in batches:
            images = evaluate_images.rounded(images)
            if found.spectrum is not None:
                found.spectrum.add(images)
            for each in found.features if set(metrics) - {"spectrum"} else ():
                rows = each.extractor(images.to(device), found.images)
                rows = rows if rows.device.type == "cuda" else rows.cpu()  # others have no float64
                each.moments.add(rows.flatten(0, 1))
                each.rows.append(rows[:, 0].float().cpu())
                if each.extractor.probabilities is not None:
                    each.probabilities.append(each.extractor.probabilities.cpu())
            found.images += len(images)
            bar.update(len(images))
    return found


def compare(real: Collected, samples: Collected, metrics=METRICS, patch_size: int = 4, device="cpu") -> list[dict]:
    """One row per extractor and one of the spectrum: the numbers, with what they depend on.

    Keys: samples, images, unreadable, real, real_images, real_unreadable, extractor, version, resize, and of the
    metrics that were asked for frechet_distance, kid, kid_standard_error, precision, recall, density, coverage,
    rows, real_rows (images of which KID and precision were taken), inception_score, inception_score_deviation; or
    high_frequency_ratio, slope, slope_real, grid_peak, grid_peak_real, patch_size.
    """
    counts = {"samples": samples.name, "images": samples.images, "unreadable": samples.unreadable}
    counts |= {"real": real.name, "real_images": real.images, "real_unreadable": real.unreadable}
    rows = []
    for reference, own in zip(real.features, samples.features, strict=True):
        row = counts | {key: getattr(own.extractor, key) for key in ("version", "resize")}
        row["extractor"] = own.extractor.name
        if "frechet" in metrics:
            row["frechet_distance"] = metrics_.frechet_distance(
                *reference.mean_and_covariance(), *(value.cpu() for value in own.mean_and_covariance())
            )
        if {"kid", "precision"} & set(metrics) and reference.rows:
            device = device if torch.device(device).type == "cuda" else "cpu"
            pair = reference.some_rows().to(device), own.some_rows().to(device)
            row |= {"real_rows": len(pair[0]), "rows": len(pair[1])}
            if "kid" in metrics:
                row["kid"], row["kid_standard_error"] = metrics_.kernel_distance(*pair)
            if "precision" in metrics:
                row |= metrics_.neighbours(*pair)._asdict()
        if "inception-score" in metrics and own.probabilities:
            score = metrics_.inception_score(torch.cat(own.probabilities))
            row["inception_score"], row["inception_score_deviation"] = score
        rows.append(row)
    if real.spectrum is not None and samples.spectrum is not None:
        found = compare_spectra(real.spectrum, samples.spectrum, patch_size)
        facts = {"extractor": "spectrum", "version": "Hann window, mean over channels", "resize": "none"}
        rows.append(counts | facts | found)
    return rows

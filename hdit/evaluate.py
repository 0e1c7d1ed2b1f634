"""hdit evaluate: how far samples are from real images, by numbers that say how they were made.

Images pass once through every feature extractor; what is kept are sums and one row of features per image, never images.
"""

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from . import evaluate_images, evaluate_metrics, evaluate_plots, flops
from .evaluate_features import Clip, Extractor, LowPass, TorchFidelity, extractor
from .evaluate_spectrum import Spectrum, compare_spectra
from .files import replacing

METRICS = ("frechet", "kid", "precision", "inception-score", "clip-score", "spectrum")
MOST_ROWS = 10_000  # of features for KID and precision, whose cost is their square


@dataclass
class Features:
    """What one extractor makes of one set: the moments of all rows, and the first row of every image."""

    extractor: Extractor
    moments: evaluate_metrics.Moments = field(default_factory=evaluate_metrics.Moments)
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
    captions: list[str] | None = None  # of every image


def collect(
    name: str, batches: Iterable[Tensor], extractors: list[Extractor], metrics=METRICS, total: int | None = None
) -> Collected:
    """Pass batches of images, (B, 3, H, W) in [-1, 1], through every extractor.

    total: number of images, for the progress bar, which is shown where standard error is a terminal. Raises ValueError
    for values that are not finite.
    """
    found = Collected(name, features=[Features(each) for each in extractors])
    found.spectrum = Spectrum() if "spectrum" in metrics else None
    keep = {"kid", "precision", "clip-score"} & set(metrics)
    with tqdm(total=total, desc=name, unit="image", disable=None, leave=False) as bar:
        for images in batches:
            if not images.isfinite().all():
                raise ValueError(f"samples {name!r} have values that are not finite, after {found.images} images")
            images = evaluate_images.rounded(images)
            if found.spectrum is not None:
                found.spectrum.add(images)
            for each in found.features:
                rows = each.extractor(images, found.images).cpu()  # where there is float64
                each.moments.add(rows.flatten(0, 1))
                if keep:
                    each.rows.append(rows[:, 0].float())
                if each.extractor.probabilities is not None:
                    each.probabilities.append(each.extractor.probabilities.cpu())
            found.images += len(images)
            bar.update(len(images))
    return found


def compare(real: Collected, samples: Collected, metrics=METRICS, patch_size: int = 4, device="cpu") -> list[dict]:
    """One row per extractor and one of the spectrum: the numbers, with what they depend on.

    Keys: samples, images, unreadable, real, real_images, real_unreadable, extractor, version, resize, and of the
    metrics that were asked for frechet_distance, kid, kid_standard_error, precision, recall, density, coverage,
    rows, real_rows (images of which KID and precision were taken), inception_score, inception_score_deviation,
    clip_score, clip_score_standard_error; or high_frequency_ratio, slope, slope_real, grid_peak, grid_peak_real,
    patch_size.
    """
    counts = {"samples": samples.name, "images": samples.images, "unreadable": samples.unreadable}
    counts |= {"real": real.name, "real_images": real.images, "real_unreadable": real.unreadable}
    rows = []
    for reference, own in zip(real.features, samples.features, strict=True):
        row = counts | {key: getattr(own.extractor, key) for key in ("version", "resize")}
        row["extractor"] = own.extractor.name
        if "frechet" in metrics:
            row["frechet_distance"] = evaluate_metrics.frechet_distance(
                *reference.mean_and_covariance(), *own.mean_and_covariance()
            )
        if {"kid", "precision"} & set(metrics) and reference.rows:
            device = device if torch.device(device).type == "cuda" else "cpu"
            pair = reference.some_rows().to(device), own.some_rows().to(device)
            row |= {"real_rows": len(pair[0]), "rows": len(pair[1])}
            if "kid" in metrics:
                row["kid"], row["kid_standard_error"] = evaluate_metrics.kernel_distance(*pair)
            if "precision" in metrics:
                row |= evaluate_metrics.neighbours(*pair)._asdict()
        if "inception-score" in metrics and own.probabilities:
            score = evaluate_metrics.inception_score(torch.cat(own.probabilities))
            row["inception_score"], row["inception_score_deviation"] = score
        if "clip-score" in metrics and isinstance(own.extractor, Clip) and samples.captions:
            texts = own.extractor.captions(samples.captions)
            row["clip_score"], row["clip_score_standard_error"] = evaluate_metrics.clip_score(
                torch.cat(own.rows), texts
            )
        rows.append(row)
    if real.spectrum is not None and samples.spectrum is not None:
        found = compare_spectra(real.spectrum, samples.spectrum, patch_size)
        facts = {"extractor": "spectrum", "version": "Hann window, mean over channels", "resize": "none"}
        rows.append(counts | facts | found)
    return rows


@dataclass
class Evaluate:
    """Compare samples with real images: Fréchet distance, KID, precision and recall, spectra; each number is written
    with the feature extractor, its version or hash, the resizing and the numbers of images that it was made with."""

    real: tyro.conf.Positional[str]
    """Real images: what `hdit train` accepts as data (a folder, tar shards, hf:NAME, builtin, …), or an .npz file with
    arr_0 (N, H, W, 3) uint8, or with Inception's mu and sigma, as ADM publishes them."""
    samples: tyro.conf.Positional[tuple[str, ...]]
    """One or several of: a folder of images, an .npz file, a checkpoint to sample from, `noise`, or a data set."""
    count: int | None = None
    """Samples of each, at most; checkpoints and noise make so many, 1000 unless given."""
    real_count: int | None = None
    """Real images, at most; drawn by the seed."""
    resolution: tuple[int, int] | None = None
    """Height and width in pixels; those of the samples unless given."""
    extractor: tuple[str, ...] = ("pixels", "patches")
    """Feature extractors: pixels (reduced images), patches (8×8 pixels at full resolution), inception and dinov2 (of
    torch-fidelity: pip install 'hdit[evaluate]'), clip or clip:MODEL (of transformers), or a TorchScript file:
    (B, 3, H, W) in [-1, 1] to (B, d)."""
    resize: int | None = None
    """Longer side of what the extractor sees: pixels (16 unless given; smaller ones see global structure alone) and
    TorchScript files (not resized unless given)."""
    low_pass: int | None = None
    """Give every extractor the images without their details, too: reduced to this longer side and enlarged again. Tells
    when global structure is learned."""
    weights: Path | None = None
    """Inception's weights for torch-fidelity, in place of its download."""
    metrics: tuple[Literal["frechet", "kid", "precision", "inception-score", "clip-score", "spectrum"], ...] = (
        "frechet", "kid", "precision", "spectrum",
    )  # fmt: skip
    """precision is precision, recall, density and coverage; spectrum is energy by frequency and the patch grid's peak;
    inception-score is for the extractor inception, clip-score for clip and samples with captions: NAME.txt beside each
    NAME.png, or a checkpoint with names of its classes."""
    caption: str = "{}"
    """What clip-score compares images with; {} stands for the caption or the name of the class."""
    patch_size: int = 4
    """Pixels of the grid whose peak is looked for."""
    sampler: str | None = None
    """Of checkpoints; what they name unless given."""
    steps: int | None = None
    """Of the sampler, as above."""
    guidance: tuple[float, ...] = ()
    """Scales of classifier-free guidance: checkpoints, which must have classes, are sampled with each."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1."""
    seed: int = 0
    """Of samples, patches, and which images are taken where count is less than there are."""
    output: Path = Path("runs/evaluate.json")
    """The JSON file to write: a list of objects, one for each samples and extractor."""
    plot: Path | None = None
    """Also draw into this image file: spectra; and Fréchet distances against the training step of the checkpoints (a
    folder has one if its name ends in step-NUMBER) and against guidance, where there are several."""

    def check(self):
        """Raises ValueError, one sentence, for fields that cannot be used."""
        for name, least in (("count", 6), ("real_count", 6), ("patch_size", 2), ("steps", 1), ("low_pass", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("samples", "extractor", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        if self.resolution is not None and min(self.resolution) < 1:
            raise ValueError(f"resolution must be positive, got {self.resolution}")
        if "inception-score" in self.metrics and "inception" not in self.extractor:
            raise ValueError(f"metrics inception-score needs the extractor inception, got {', '.join(self.extractor)}")
        if "clip-score" in self.metrics and not any(name.split(":")[0] == "clip" for name in self.extractor):
            raise ValueError(f"metrics clip-score needs the extractor clip, got {', '.join(self.extractor)}")
        if "{}" not in self.caption:
            raise ValueError(f"caption must have {{}} where the caption of an image goes, got {self.caption!r}")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise ValueError(f"plot {self.plot} lies in no existing folder")
        if self.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("plot needs matplotlib: pip install 'hdit[plots]'")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} is not available: this torch sees no CUDA device")

    def run(self):
        """Measure, print the tables, write the JSON and the plot."""
        self.check()
        options = {"sampler": self.sampler, "steps": self.steps}
        options = {key: value for key, value in options.items() if value is not None}
        samples = evaluate_images.open_samples(
            self.samples, self.real, self.resolution, self.count, self.seed, self.device, options, self.guidance
        )
        silent = [source.name for source in samples if source.captions is None]
        if "clip-score" in self.metrics and silent:
            raise ValueError(f"metrics clip-score needs captions, and samples {silent[0]!r} have none")
        real = evaluate_images.open_real(self.real, samples[0].size, self.real_count, self.seed)
        extractors = [self._extractor(name) for name in self.extractor if self.metrics != ("spectrum",)]
        if self.low_pass is not None:
            extractors = [each for own in extractors for each in (own, LowPass(own, self.low_pass))]
        reference = self._reference(real, extractors)
        rows, spectra = [], {}
        for source in samples:
            found = collect(source.name, source.batches(), extractors, self.metrics, source.count)
            found.unreadable = source.unreadable
            found.captions = source.captions and [self.caption.replace("{}", text) for text in source.captions]
            compared = compare(reference, found, self.metrics, self.patch_size, self.device)
            facts = {"step": source.step, "guidance": source.guidance}
            rows += [{**row, **facts, "resolution": list(source.size), "seed": self.seed} for row in compared]
            if found.spectrum is not None:
                spectra[source.name] = found.spectrum
        print(tables(rows))
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.output) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"\n{self.output}")
        if self.plot is not None:
            with replacing(self.plot) as path:
                evaluate_plots.draw(
                    reference.spectrum, spectra, rows, self.patch_size, path, self.plot.suffix.lstrip(".") or "png"
                )
            print(self.plot)

    def _extractor(self, name: str) -> Extractor:
        """Its own options alone, where there are others that take them."""
        alone = len(self.extractor) == 1
        resize = self.resize if alone or name not in ("patches", *TorchFidelity.KINDS) else None
        weights = self.weights if alone or name == "inception" else None
        return extractor(name, resize=resize, weights=weights, seed=self.seed, device=self.device)

    def _reference(self, real: evaluate_images.Source, extractors: list[Extractor]) -> Collected:
        """The real images, measured; of an .npz with statistics those are the moments."""
        statistics = real.has_statistics
        if statistics and (self.extractor != ("inception",) or self.low_pass is not None):
            raise ValueError(
                f"real {self.real!r} has statistics of Inception; extractor must be inception alone, without low_pass"
            )
        if statistics and not real.count:
            if self.metrics != ("frechet",):
                raise ValueError(f"real {self.real!r} has statistics and no images; metrics must be frechet alone")
            found = Collected(real.name, features=[Features(extractors[0])])
        else:
            found = collect(real.name, real.batches(), extractors, self.metrics, real.count)
            found.unreadable = real.unreadable
        if statistics and found.features:
            found.features[0].statistics = real.statistics()
        return found


COLUMNS = {
    "frechet_distance": "Fréchet", "kid": "KID", "precision": "precision", "recall": "recall", "density": "density",
    "coverage": "coverage", "inception_score": "IS", "clip_score": "CLIP",
}  # fmt: skip
SPECTRUM_COLUMNS = {
    "high_frequency_ratio": "energy > Nyquist/2, of real", "slope": "slope", "slope_real": "of real",
    "grid_peak": "grid peak", "grid_peak_real": "of real",
}  # fmt: skip


def tables(rows: list[dict]) -> str:
    """The numbers as text: a table of distances and one of spectra, and below what the extractors are."""
    parts = []
    for columns, own in (
        (COLUMNS, [row for row in rows if row["extractor"] != "spectrum"]),
        (SPECTRUM_COLUMNS, [row for row in rows if row["extractor"] == "spectrum"]),
    ):
        present = [key for key in columns if any(key in row for row in own)]
        if not present:
            continue
        head = ["samples", "images", "real images", "extractor", *(columns[key] for key in present)]
        lines = [
            [row["samples"], str(row["images"]), str(row["real_images"]), row["extractor"]]
            + [cell(row, key) for key in present]
            for row in own
        ]
        parts.append(flops.table(head, lines))
    about = {f"{row['extractor']}: {row['version']}; resize: {row['resize']}": None for row in rows}
    return "\n\n".join([*parts, "\n".join(about)])


def cell(row: dict, key: str) -> str:
    """A number, with its error where it has one."""
    value = row.get(key)
    if value is None:
        return "-"
    error = {
        "kid": "kid_standard_error",
        "inception_score": "inception_score_deviation",
        "clip_score": "clip_score_standard_error",
    }.get(key)
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return text if error is None else f"{text} ± {row[error]:.2g}"

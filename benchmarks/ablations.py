"""`python -m benchmarks.ablations [--table hdit] [--steps 400]`: the papers' ablations as short runs, in one table.

Every row trains `configs.ablations.small` of a row of HDiT's Tables 1 and 2, or of simple diffusion's section 4, on
crops of the photographs inside the package, with the same seed, images and noise, and compares samples of its averaged
weights with images of the set: Fréchet distances of small pixels (structure) and of native patches (texture). Minutes
on a CPU tell what learns quickly, not what the papers measured after days. A row that is in the file is kept.
"""

import csv
import dataclasses
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import tyro

from hdit import data, evaluate, sample
from hdit.configs import ablations
from hdit.evaluate_features import Patches, Pixels
from hdit.evaluate_images import DataSet
from hdit.files import replacing
from hdit.train import Train
from hdit.train_step import Trainer

HDIT = ablations.HDIT["F soft-min-SNR (HDiT)"]
EDM = dataclasses.replace(HDIT, training=dataclasses.replace(HDIT.training, loss_weighting="karras"))
TABLES = {"hdit": {**ablations.HDIT, "F' EDM's weighting": EDM}, "simple-diffusion": ablations.SIMPLE_DIFFUSION}
SOURCE, SIDE, SAMPLES, SAMPLING_STEPS = "builtin", 64, 256, 12
COLUMNS = (
    "table", "row", "pixels_fd", "patches_fd", "paper_fid", "loss", "parameters", "gmac", "steps", "batch", "seconds",
    "date", "commit",
)  # fmt: skip


def measured(batches, real=None):
    """Fréchet distances (pixels, patches) of batches of images to the set; without ``real``, what it collects."""
    extractors = [Pixels(8), Patches()]
    found = evaluate.collect("samples", batches, extractors, metrics=("frechet",))
    return found if real is None else [row["frechet_distance"] for row in evaluate.compare(real, found, ("frechet",))]


def real_images():
    """The set, and its distances to other crops of it and to noise: the ends of the scale."""
    fixed = data.open_images(SOURCE, SIDE, SIDE)
    real = measured(DataSet(fixed, None, 0).batches())
    others = data.open_images(SOURCE, SIDE, SIDE, crop="random", flip=True)
    torch.manual_seed(0)
    batches = [torch.stack([others.example(i)[0] for i in range(start, start + 64)]) for start in range(0, SAMPLES, 64)]
    noise = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / 2
    scale = {"other crops of the set": measured(batches, real), "noise": measured(noise.split(64), real)}
    return real, scale


def row_of(name: str, full, steps: int, real) -> dict:
    """Train one configuration, and measure it."""
    small = ablations.small(full, side=SIDE)
    recipe = dataclasses.replace(small.training, steps=steps, ema_decay=0.99, lr=1e-3)
    options = Train(config=name, data=SOURCE, crop="random", flip=True, recipe=recipe, cpu=True)
    run = Trainer(options, small)
    begun, losses = time.monotonic(), []
    while run.step < steps:
        losses.append(run.take_step()[0].item())
    seconds = time.monotonic() - begun
    run.network.eval()
    schedule = "simple-diffusion" if recipe.objective == "simple-diffusion" else "karras"
    classes = run.network.config.num_classes
    with run.ema.applied(), torch.no_grad():
        images = sample.stream(
            run.denoiser, SAMPLES, (SIDE, SIDE), sampler="dpmpp_2m", steps=SAMPLING_STEPS, schedule=schedule,
            sigma_min=1e-2, sigma_max=160.0, batch_size=64, classes=range(classes), num_classes=classes,
        )  # fmt: skip
        pixels, patches = measured(images, real)
    return {
        "pixels_fd": f"{pixels:.3f}",
        "patches_fd": f"{patches:.3f}",
        "paper_fid": ablations.FID.get(name, ""),
        "loss": f"{sum(losses[-50:]) / len(losses[-50:]):.5f}",
        "parameters": sum(p.numel() for p in run.network.parameters()),
        "gmac": f"{run.macs / 1e9:.4f}",
        "steps": steps,
        "batch": recipe.batch_size,
        "seconds": f"{seconds:.0f}",
    }


def main(
    table: Literal["hdit", "simple-diffusion"] = "hdit",
    steps: int = 400,
    only: tuple[str, ...] = (),
    output: Path = Path("benchmarks/results/ablations.csv"),
):
    """One table of ablations, or ONLY those rows of it; what OUTPUT has with as many steps is kept."""
    rows = list(csv.DictReader(output.open(newline=""))) if output.is_file() else []
    done = {(row["table"], row["row"]) for row in rows if not row["steps"] or int(row["steps"]) == steps}
    facts = {
        "table": table,
        "date": date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }
    real, scale = real_images()
    for name in [*scale, *TABLES[table]]:
        if (table, name) in done or (only and name not in (*scale, *only)):
            continue
        if name in scale:
            found = dict(zip(("pixels_fd", "patches_fd"), (f"{value:.3f}" for value in scale[name]), strict=True))
        else:
            found = row_of(name, TABLES[table][name], steps, real)
        rows = [row for row in rows if (row["table"], row["row"]) != (table, name)]
        rows.append({**dict.fromkeys(COLUMNS, ""), **facts, "row": name, **found})
        with replacing(output) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if key not in facts and value), flush=True)


if __name__ == "__main__":
    tyro.cli(main)

"""hdit sample and its functions, with a tiny HDiT whose parameters are random."""

import dataclasses
import hashlib
import json
import math
import typing

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from hdit import HDiT, HDiTConfig, sample
from hdit.diffusion import samplers
from hdit.diffusion.losses import SimpleDiffusion, objective
from hdit.models import Global, Level, Neighborhood, pretrained
from hdit.pictures import grid, to_pixels, write_image
from hdit.sample import Sample, generate, noise_levels, stream

LEVELS = (Level(1, 16, attention=Neighborhood(8, 3)), Level(1, 32, attention=Global(8)))
CONFIG = HDiTConfig(levels=LEVELS, patch_size=2, num_classes=3, mapping_width=16, mapping_depth=1)
EDM = {"type": "edm", "sigma_data": 0.5, "sigma_min": 0.02, "sigma_max": 80.0}
NAMES = ["anemone", "bluebell", "crocus"]


def random_model(config=CONFIG):
    """Fresh ones end in zeros: their output would not depend on anything."""
    torch.manual_seed(0)
    model = HDiT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def denoiser():
    return objective(EDM, random_model())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    metadata = {"resolution": [16, 16], "class_names": NAMES, "sampler": {"name": "dpmpp_2m", "steps": 3}}
    random_model().save_pretrained(path, objective=EDM, **metadata)
    return path


OPTIONS = {"num_classes": 3, "classes": [0, 1, 2], "steps": 4, "seed": 5}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_an_image_depends_on_its_seed_alone(denoiser, name):
    """In batches of any size, image i is the image of seed + i, with its class, to float32 rounding."""
    options = {**OPTIONS, "sampler": name, "guidance": 2.0}
    whole = generate(denoiser, 5, (16, 16), **options)
    scale = whole.abs().max()
    assert (generate(denoiser, 5, (16, 16), **options, batch_size=2) - whole).abs().max() <= 1e-4 * scale
    alone = generate(denoiser, 1, (16, 16), **{**options, "seed": 8, "classes": [0]})  # image 3: class 3 mod 3
    assert (alone - whole[3:4]).abs().max() <= 1e-4 * scale
    distance = torch.cdist(whole.flatten(1), whole.flatten(1)) + torch.eye(5) * 1e9
    assert distance.min() > 0.01 * whole.flatten(1).norm(dim=1).max()


def test_guidance_of_one_is_none(denoiser):
    plain = generate(denoiser, 3, (16, 16), **OPTIONS)
    assert torch.equal(generate(denoiser, 3, (16, 16), **OPTIONS, guidance=1.0, guidance_rescale=0.7), plain)
    rounding = 1000 * torch.finfo(torch.float32).eps * plain.abs().max()  # of four steps through a network

    def by_hand(x, sigma, class_cond):
        without = denoiser(x, sigma, class_cond=torch.full_like(class_cond, 3))
        return without + 2 * (denoiser(x, sigma, class_cond=class_cond) - without)

    guided = generate(denoiser, 3, (16, 16), **OPTIONS, guidance=2.0)
    assert (guided - generate(by_hand, 3, (16, 16), **OPTIONS)).abs().max() <= rounding
    assert (guided - plain).abs().max() > 10 * rounding
    rescaled = generate(denoiser, 3, (16, 16), **OPTIONS, guidance=2.0, guidance_rescale=1.0)
    assert (rescaled - guided).abs().max() > 10 * rounding


def test_classes_and_options_reach_the_denoiser():
    """What each evaluation gets, and what the options make of it."""
    calls = []

    def record(x, sigma, class_cond):
        calls.append((x.shape, sigma[0].item(), class_cond.tolist()))
        return torch.tanh(x) * (1 + class_cond.view(-1, 1, 1, 1))

    image = generate(record, 3, (4, 6), num_classes=7, classes=[2, 5], sampler="euler", steps=2, sigma_min=0.5,
                     sigma_max=8.0, schedule="exponential", guidance=3.0, guidance_interval=(1.0, 10.0))  # fmt: skip
    assert [call[0] for call in calls] == [(6, 3, 4, 6), (3, 3, 4, 6)]
    assert [call[1] for call in calls] == pytest.approx([8.0, 0.5], rel=1e-6)
    assert [call[2] for call in calls] == [[2, 5, 2, 7, 7, 7], [2, 5, 2]]
    assert image.abs().max() > 1.5
    clipped = generate(record, 3, (4, 6), num_classes=7, classes=[2, 5], sampler="euler", steps=2, threshold=0.9)
    assert clipped.abs().max() <= 1
    calls.clear()
    generate(record, 2, (4, 6), num_classes=7, steps=1)
    assert calls[0][2] == [7, 7]  # no class


def test_no_classes():
    def plain(x, sigma):
        return torch.tanh(x)

    images = generate(plain, 2, (4, 4), steps=3, channels=1, eta=0.0, sampler="dpmpp_2m_sde")
    assert torch.equal(images, generate(plain, 2, (4, 4), steps=3, channels=1, sampler="dpmpp_2m"))


def test_progress_adds_up_to_the_images(denoiser):
    worth = []
    batches = list(stream(denoiser, 5, (16, 16), **OPTIONS, batch_size=2, progress=worth.append))
    assert [len(batch) for batch in batches] == [1, 2, 2]
    assert len(worth) == 12 and sum(worth) == pytest.approx(5)


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
def test_portrait_and_landscape(denoiser, height, width):
    """Transposing the noise transposes nothing else: the model sees the sides as they are."""
    images = generate(denoiser, 2, (height, width), **OPTIONS)
    assert images.shape == (2, 3, height, width) and images.isfinite().all()
    assert images.std() > 0.1


def test_noise_levels():
    for schedule in sample.SCHEDULES:
        levels = noise_levels(schedule, 6, 0.02, 50.0, (64, 32))
        assert levels.dtype == torch.float64 and len(levels) == 7 and levels[-1] == 0
        assert (levels[:-1] > levels[1:]).all()
        if schedule.endswith(("karras", "exponential")):
            assert levels[[0, -2]].tolist() == pytest.approx([50.0, 0.02])
    assert noise_levels("simple-diffusion", 6, 0.02, 50.0, (64, 32), zero_terminal=True)[0] == math.inf


@pytest.mark.parametrize("brightness", [-0.9, 0.9])
def test_zero_terminal_snr_reaches_dark_and_bright_images(brightness):
    """A v network that knows the one image of its data; from pure noise its first step sets the mean."""

    seen = []

    def network(z, sigma):
        seen.append(sigma[0].item())
        one = sigma.view(-1, 1, 1, 1).double()
        alpha, s = (1 + one**2).rsqrt(), one * (1 + one**2).rsqrt()
        return ((alpha * z - brightness) / s).float()  # v of that image

    images = generate(SimpleDiffusion(network), 2, (8, 8), schedule="simple-diffusion", zero_terminal=True, steps=8)
    assert (images - brightness).abs().max() <= 1e-3
    assert seen[0] == 1e4 > seen[1] and len(seen) == 8  # what stands for infinity, then finite levels


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "plms"}, "sampler .*dpmpp_3m_sde.*plms"),
        ({"schedule": "linear"}, "schedule .*karras.*linear"),
        ({"sampler": "heun", "eta": 0.5}, "eta .*euler_ancestral.*heun"),
        ({"guidance": 2.0}, r"guidance 2\.0 needs classes"),
        ({"classes": [3], "num_classes": 3}, r"classes .*3, got \[3\]"),
        ({"classes": [], "num_classes": 3}, r"classes .*got \[\]"),
        ({"classes": [0]}, "classes .*num_classes is 0"),
        ({"steps": 0}, "steps .*0"),
        ({"batch_size": 0}, "batch_size .*0"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"zero_terminal": True, "schedule": "simple-diffusion", "steps": 1}, "zero_terminal .*1"),
        ({"zero_terminal": True}, "zero_terminal .*karras"),
        ({"seed": -1}, "seed .*-1"),
        ({"threshold": 2.0}, "percentile .*2"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        generate(lambda x, sigma, **cond: x, 2, (8, 8), **options)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0])
    images = values.view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_pixels(images)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert torch.equal(to_pixels(images[:, :1]), to_pixels(images))


def test_a_written_image_is_read_back(tmp_path):
    image = torch.rand(3, 5, 9) * 2 - 1
    write_image(image, tmp_path / "image.png")
    pixels = np.array(Image.open(tmp_path / "image.png"))
    assert np.array_equal(pixels, to_pixels(image[None])[0].numpy()) and pixels.shape == (5, 9, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def find(picture, image):
    """(left, top) of the one place of ``picture`` that shows ``image``."""
    pixels, wanted = np.array(picture), to_pixels(image[None])[0].numpy()
    height, width = wanted.shape[:2]
    places = [
        (left, top)
        for top in range(pixels.shape[0] - height + 1)
        for left in range(pixels.shape[1] - width + 1)
        if np.array_equal(pixels[top : top + height, left : left + width], wanted)
    ]
    (place,) = places
    return place


@pytest.mark.parametrize("captions", [None, ["a", "b", "c", "a much longer name", "e"]])
def test_grid_shows_the_images_row_by_row(captions):
    images = torch.rand(5, 3, 6, 10) * 2 - 1
    picture = grid(images, columns=3, captions=captions)
    places = [find(picture, image) for image in images]
    assert len({top for _, top in places[:3]}) == 1 and len({top for _, top in places[3:]}) == 1
    assert places[0][1] < places[3][1]
    assert [left for left, _ in places] == sorted(left for left, _ in places[:3]) + [left for left, _ in places[:2]]
    below = np.array(picture)[places[0][1] + 6 : places[3][1], places[0][0] : places[0][0] + 10]
    assert (below < 128).any() == (captions is not None)


def test_grid_of_gray_images():
    images = torch.rand(2, 1, 6, 6) * 2 - 1
    picture = grid(images)
    assert find(picture, images[1].expand(3, 6, 6))[0] > find(picture, images[0].expand(3, 6, 6))[0]


@pytest.mark.parametrize(
    ("count", "height", "width", "columns"),
    [
        (1, 8, 8, 1),
        (2, 8, 8, 2),
        (6, 8, 8, 3),
        (16, 8, 8, 4),
        (64, 8, 8, 8),
        (4, 16, 8, 4),
        (4, 8, 24, 1),
        (12, 8, 8, 4),
    ],
)
def test_columns_are_chosen(count, height, width, columns):
    gap = 2
    picture = grid(torch.rand(count, 3, height, width))
    assert (picture.width - gap) // (width + gap) == columns


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.rand(2, 4, 4, 4), {}, r"images .*\(2, 4, 4, 4\)"),
        (torch.rand(0, 3, 4, 4), {}, "1 image"),
        (torch.rand(2, 3, 4, 4), {"columns": 0}, "columns 0"),
        (torch.rand(2, 3, 4, 4), {"captions": ["a"]}, "captions .*2, got 1"),
    ],
)
def test_bad_grids_are_named(images, options, words):
    with pytest.raises(ValueError, match=words):
        grid(images, **options)


# ---- The command ----------------------------------------------------------------------------------------------------


def test_command(checkpoint, denoiser, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [str(checkpoint), "--output", str(output), "--count", "5", "--batch-size", "2", "--seed", "7"]
    tyro.cli(Sample, args=[*arguments, "--guidance", "1.5"]).run()
    assert sorted(path.name for path in output.iterdir()) == ["grid.png", "images", "samples.json"]
    found = json.loads((output / "samples.json").read_text())
    assert [image["file"] for image in found["images"]] == [f"images/{seed:06}.png" for seed in range(7, 12)]
    assert [image["class"] for image in found["images"]] == [0, 1, 2, 0, 1]
    assert found["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert found["settings"]["resolution"] == [16, 16] and found["versions"]["torch"] == torch.__version__
    assert found["settings"]["sampler"] == "dpmpp_2m" and found["settings"]["steps"] == 3  # the checkpoint's
    assert 0 < found["seconds_per_image"] < 60

    options = {key: found["settings"][key] for key in ("classes", "num_classes", "sampler", "steps", "seed")}
    want = generate(denoiser, 5, (16, 16), guidance=1.5, sigma_min=0.02, sigma_max=80.0, **options)
    picture = Image.open(output / "grid.png")
    for image, made in zip(found["images"], want, strict=True):
        pixels = np.array(Image.open(output / image["file"])).astype(int)
        difference = pixels - to_pixels(made[None])[0].numpy().astype(int)
        assert abs(difference).max() <= 1  # of 255: other batches, other rounding
        find(picture, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    captioned = grid(want, captions=[*NAMES, *NAMES[:2]])
    assert picture.size == captioned.size
    assert abs(np.array(picture).astype(int) - np.array(captioned)).max() <= 1
    assert "5 images" in capsys.readouterr().out


def test_every_sampler_and_schedule_is_an_option():
    options = {field.name: field.type for field in dataclasses.fields(Sample)}
    assert typing.get_args(typing.get_args(options["sampler"])[0]) == tuple(samplers.SAMPLERS)
    assert typing.get_args(options["schedule"]) == sample.SCHEDULES


def test_checkpoint_of_training(checkpoint, tmp_path):
    """Its averaged weights, which are those of ``checkpoint``, and not those of the last step."""
    tensors, header = pretrained.read_tensors(checkpoint), pretrained.read_header(checkpoint)
    both = {f"ema.{name}": t for name, t in tensors.items()} | {f"model.{name}": 2 * t for name, t in tensors.items()}
    pretrained.write(tmp_path / "checkpoint.safetensors", both, header | {"format": pretrained.TRAINING_FORMAT})
    Sample(checkpoint, tmp_path / "model", count=1).run()
    Sample(tmp_path / "checkpoint.safetensors", tmp_path / "training", count=1).run()
    images = [(tmp_path / name / "images/000000.png").read_bytes() for name in ("model", "training")]
    assert images[0] == images[1]


def test_command_line_wins_over_the_checkpoint(checkpoint, tmp_path):
    command = Sample(checkpoint, tmp_path, count=2, class_name=("crocus",), height=32, sampler="heun", steps=2,
                     sigma_max=40.0, grid_count=0, dtype="bfloat16")  # fmt: skip
    command.run()
    found = json.loads((tmp_path / "samples.json").read_text())
    settings = found["settings"]
    assert [image["class"] for image in found["images"]] == [2, 2]
    assert (settings["resolution"], settings["sampler"], settings["steps"]) == ([32, 16], "heun", 2)
    assert (settings["sigma_min"], settings["sigma_max"], settings["dtype"]) == (0.02, 40.0, "bfloat16")
    assert Image.open(tmp_path / "images/000001.png").size == (16, 32)
    assert not (tmp_path / "grid.png").exists()
    narrow = np.array(Image.open(tmp_path / "images/000001.png")).astype(int)
    dataclasses.replace(command, dtype="float32").run()  # the same files again
    wide = np.array(Image.open(tmp_path / "images/000001.png"))
    assert 0 < abs(narrow - wide).mean() < 8  # of 255
    with pytest.raises(ValueError, match=r"output .*000001\.png of another run"):
        dataclasses.replace(command, count=1).run()


def test_unconditional(checkpoint, tmp_path):
    Sample(checkpoint, tmp_path / "none", count=1, unconditional=True, backend="reference").run()
    Sample(checkpoint, tmp_path / "one", count=1, backend="reference").run()
    reports = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("none", "one")]
    assert reports[0]["settings"]["classes"] is None and "class" not in reports[0]["images"][0]
    assert reports[0]["backend"] == "reference"
    images = [np.array(Image.open(tmp_path / name / "images/000000.png")) for name in ("none", "one")]
    assert not np.array_equal(*images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count .*0"),
        ({"height": 18}, "height .*multiple of 4.*18"),
        ({"width": -4}, "width .*-4"),
        ({"class_name": ("rose",)}, "class_name 'rose' .*anemone, bluebell, crocus"),
        ({"classes": (3,)}, r"classes .*\[3\]"),
        ({"classes": (1,), "unconditional": True}, "classes and unconditional"),
        ({"unconditional": True, "guidance": 2.0}, r"guidance 2\.0 needs classes"),
        ({"backend": "nonsense"}, "nonsense"),
        ({"checkpoint": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"device": "cuda:0"}, "device 'cuda:0' is not available")
        if not torch.cuda.is_available()
        else ({"steps": 0}, "steps"),
    ],
)
def test_bad_commands_are_named(checkpoint, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Sample(**{"checkpoint": checkpoint, "output": tmp_path / "out", "steps": 1} | options).run()
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_say_little(tmp_path):
    path = tmp_path / "bare.safetensors"
    random_model(dataclasses.replace(CONFIG, num_classes=0)).save_pretrained(path)
    with pytest.raises(ValueError, match=r"height must be given.*bare\.safetensors"):
        Sample(path, tmp_path / "out").run()
    with pytest.raises(ValueError, match="classes is for models with classes"):
        Sample(path, tmp_path / "out", height=16, width=16, classes=(0,)).run()
    random_model(dataclasses.replace(CONFIG, num_classes=0, mapping_cond_dim=4)).save_pretrained(path)
    with pytest.raises(ValueError, match="mapping_cond"):
        Sample(path, tmp_path / "out", height=16, width=16).run()
    random_model(dataclasses.replace(CONFIG, num_classes=0, in_channels=4, out_channels=4)).save_pretrained(path)
    with pytest.raises(ValueError, match="another way to show an image"):
        Sample(path, tmp_path / "out", height=16, width=16).run()

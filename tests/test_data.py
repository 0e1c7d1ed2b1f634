"""Photographs: what the packages ship, folders, centre crops, and one sentence for what cannot be read."""

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import data


def save_random(path, height=20, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_every_sample_is_a_photograph():
    found = data.photographs(height=64, width=96)
    assert list(found) == list(data.SAMPLES)
    for image in found.values():
        assert image.shape == (3, 64, 96)
        assert image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1
        # Neighbouring pixels of a photograph resemble each other; those of noise do not.
        step = (image[:, :, 1:] - image[:, :, :-1]).square().mean()
        assert step < 0.5 * (2 * image.var())
    stack = torch.stack(list(found.values())).flatten(1)
    assert torch.corrcoef(stack).fill_diagonal_(0).max() < 0.9, "two samples are the same picture"


def test_values_span_minus_one_to_one(tmp_path):
    pixels = save_random(tmp_path / "a.png")
    got = data.photographs(tmp_path)["a.png"]
    want = torch.from_numpy(pixels).double().permute(2, 0, 1) / 255 * 2 - 1
    assert (got - want).abs().max() < 1e-6
    assert got.min() == -1
    assert got.max() == 1


@pytest.mark.parametrize(("height", "width"), [(20, 20), (10, 30), (8, 8), (64, 64), (5, 9)])
def test_crop_is_centred_and_keeps_the_aspect(height, width):
    """A picture whose value is its column (row): the crop must sample columns (rows) at a uniform scale, centred."""
    ramp = np.zeros((120, 200, 3), np.uint8)
    ramp[..., 0] = np.arange(200)[None]
    ramp[..., 1] = np.arange(120)[:, None]
    got = np.asarray(data.crop_resize(Image.fromarray(ramp), height, width)).astype(float)
    scale = min(200 / width, 120 / height)
    columns = 100 + (np.arange(width) + 0.5 - width / 2) * scale - 0.5
    rows = 60 + (np.arange(height) + 0.5 - height / 2) * scale - 0.5
    inner = slice(height // 4, height - height // 4), slice(width // 4, width - width // 4)  # clear of Lanczos' borders
    assert np.abs(got[..., 0] - columns[None])[inner].max() <= 1
    assert np.abs(got[..., 1] - rows[:, None])[inner].max() <= 1


def test_downsampling_is_antialiased():
    """One-pixel stripes become their mean; plain subsampling would give black or white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(data.crop_resize(Image.fromarray(stripes), 8, 8)).astype(float)
    assert np.abs(small[2:-2, 2:-2] - 127.5).max() < 8


def test_grey_transparent_and_rotated_files(tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (6, 7), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    pixels = np.random.default_rng(2).integers(0, 256, (4, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = data.photographs(tmp_path)
    assert torch.equal(found["grey.png"], data.to_tensor(Image.fromarray(np.stack([grey] * 3, -1))))
    assert (found["clear.png"] == 1).all(), "a transparent pixel shows the white below"
    assert torch.equal(found["turned.png"], data.to_tensor(Image.fromarray(np.rot90(pixels, -1).copy())))


def test_unreadable_file_of_a_folder_is_named_counted_and_left_out(tmp_path):
    save_random(tmp_path / "good.png", seed=3)
    (tmp_path / "text.png").write_text("not an image")
    save_random(tmp_path / "cut.jpg", 200, 200)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    (tmp_path / "notes.txt").write_text("not to be read")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = data.photographs(tmp_path)
    messages = [str(w.message) for w in caught]
    assert list(found) == ["good.png"]
    assert len(messages) == 3
    assert "cut.jpg is not a readable image" in messages[0]
    assert "text.png is not a readable image" in messages[1]
    assert "2 of 3 image files" in messages[2]


def test_unreadable_single_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(data.UnreadableImage, match=r"a\.png is not a readable image"):
        data.read_image(tmp_path / "a.png")
    with pytest.raises(data.UnreadableImage, match=r"absent\.png is not a readable image"):
        data.read_image(tmp_path / "absent.png")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(tmp_path / "deep.png")
    with pytest.raises(data.UnreadableImage, match=r"deep\.png has I;16 pixels; 8 bits"):
        data.read_image(tmp_path / "deep.png")


def test_folder_with_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match=r"has no file ending in \.bmp"):
        data.photographs(tmp_path)
    with pytest.raises(ValueError, match=r"'.*absent' is not a folder"):
        data.photographs(tmp_path / "absent")
    (tmp_path / "a.png").write_text("x")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(data.UnreadableImage, match="none of the 1 image"):
        data.photographs(tmp_path)


def test_missing_package_says_how_to_install_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else found(name))
    with pytest.raises(ModuleNotFoundError, match=r"'coffee' ships inside skimage.*pip install 'hdit\[demo\]'"):
        data.photographs(["coffee"])
    assert list(data.photographs(["china"], 8, 8)) == ["china"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["cat"],), "'cat' is unknown.*astronaut"),
        (([],), "source must name"),
        ((["china"], 8), "height=8, width=None"),
        ((["china"], 0, 8), "height must be a positive integer, got 0"),
        ((["china"], 8, 8.5), "width must be a positive integer, got 8.5"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.photographs(*arguments)

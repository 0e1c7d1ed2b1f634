"""Data sets: folders, tar shards, samples, Hugging Face: what they hold, what they call classes, what they refuse."""

import importlib.util
import io
import json
import sys
import tarfile
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import data
from hdit.data_shards import expand_braces


def pixels(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(seed, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, kind)
    return buffer.getvalue()


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed))


def as_tensor(seed):
    return torch.from_numpy(pixels(seed)).permute(2, 0, 1) / 127.5 - 1


def write_shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# ---- Folders ----


def test_subfolders_one_level_down_are_classes(tmp_path):
    for seed, name in enumerate(("zebra/a.png", "ant/b.png", "ant/c.PNG", "zebra/d.png")):
        save(tmp_path / name, seed)
    (tmp_path / "ant" / "notes.txt").write_text("not to be read")
    (tmp_path / "ant" / ".hidden.png").write_text("neither")
    images = data.open_images(tmp_path, 20, 30)
    assert images.class_names == ("ant", "zebra")
    assert len(images) == 4
    for index, (seed, label) in enumerate(((1, 0), (2, 0), (0, 1), (3, 1))):
        image, found = images.example(index, None)
        assert torch.equal(image, as_tensor(seed))
        assert found == label


@pytest.mark.parametrize("names", [("a.png", "x/b.png"), ("x/y/a.png", "x/b.png"), ("a.png", "b.png")])
def test_images_at_other_depths_have_no_classes(tmp_path, names):
    for seed, name in enumerate(names):
        save(tmp_path / name, seed)
    (tmp_path / "loop").symlink_to(tmp_path)
    images = data.open_images(tmp_path, 20, 30)
    assert images.class_names is None
    assert [images.example(index)[1] for index in range(len(images))] == [-1, -1]


def test_random_crops_reach_both_ends_and_flips_are_even(tmp_path):
    """A picture whose value is its column: a crop tells where it was taken."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    images = data.open_images(tmp_path, 100, 100, crop="random", flip=True)
    generator = torch.Generator().manual_seed(0)
    columns = (torch.stack([images.example(0, generator)[0] for _ in range(400)])[:, 0, 50] + 1) * 127.5
    flipped = columns[:, 0] > columns[:, -1]
    assert abs(flipped.sum() - 200) < 5 * 10
    left = columns.amin(1)
    assert (columns.amax(1) - left - 99).abs().max() <= 1, "the largest part, at its own scale"
    assert left.min() < 3 and left.max() > 97
    assert abs(left.mean() - 50) < 5 * 100 / 12**0.5 / 20
    centred = data.open_images(tmp_path, 100, 100).example(0)[0]
    assert ((centred[0, 50] + 1) * 127.5 - torch.arange(50, 150)).abs().max() < 0.6


def test_broken_files_are_named(tmp_path, monkeypatch):
    for name in ("cut.png", "empty.jpg", "good.png", "text.png"):
        save(tmp_path / name, 0)
    (tmp_path / "cut.png").write_bytes(encoded(0)[:500])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (300, 300)).save(tmp_path / "zbomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    batches = data.Batches(data.open_images(tmp_path, 8, 8), 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = next(batches)
    messages = sorted(str(w.message) for w in caught)
    for message, words in zip(messages, ("cut.png", "empty.jpg", "text.png", "zbomb.png"), strict=True):
        assert f"{words} is not a readable image" in message
    assert "it is empty" in messages[1] and "decompression bomb" in messages[3]
    assert sorted(batches.unreadable) == [0, 1, 3, 4]
    assert (batch.images == batch.images[:1]).all(), "ten times the good one"


# ---- Tar shards ----


@pytest.fixture
def shards(tmp_path):
    """Five examples in two shards: .cls, a second image per example, folders, an example without an image."""
    first = {
        "a/0.cls": b"2",
        "a/0.png": encoded(0),
        "a/0.edge.png": encoded(90),
        "a/1.png": encoded(1),
        "a/1.cls": b"0",
    }
    second = {f"b/{i}.{kind}": content for i in (2, 3) for kind, content in (("png", encoded(i)), ("cls", b"1"))}
    second |= {"readme.txt": b"no image", "b/4.PNG": encoded(4), "b/4.cls": b"3\n"}
    write_shard(tmp_path / "s-00.tar", first)
    write_shard(tmp_path / "s-01.tar", second)
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "/s-{00..01}.tar", "/s-0{0,1}.tar"])
def test_shards_by_folder_and_braces(shards, pattern):
    images = data.open_images(f"{shards}{pattern}", 20, 30)
    assert images.class_names == ("0", "1", "2", "3")
    for index in (3, 0, 4, 1, 2, 0):  # any order
        image, label = images.example(index)
        assert torch.equal(image, as_tensor(index)), index
        assert label == (2, 0, 1, 1, 3)[index]


def test_image_key_chooses_among_images(shards):
    images = data.open_images(shards, 20, 30, image_key="edge.png")
    assert len(images) == 1
    assert torch.equal(images.example(0)[0], as_tensor(90))
    with pytest.raises(ValueError, match=r"hold no file with extension 'webp'"):
        data.open_images(shards, 20, 30, image_key="webp")


def test_json_labels(tmp_path):
    rows = [{"label": "rose", "colour": "red"}, {"label": "iris", "colour": "blue"}, {"label": "iris", "colour": "red"}]
    files = {}
    for i, row in enumerate(rows):
        files |= {f"{i}.png": encoded(i), f"{i}.json": json.dumps(row).encode()}
    write_shard(tmp_path / "x.tar", files | {"3.png": encoded(3)})
    for key, names, labels in ((None, ("iris", "rose"), [1, 0, 0, -1]), ("colour", ("blue", "red"), [1, 0, 1, -1])):
        images = data.open_images(tmp_path / "x.tar", 20, 30, class_key=key)
        assert images.class_names == names
        assert [images.example(index)[1] for index in range(4)] == labels
    with pytest.raises(ValueError, match=r"class_key 'size' is not in .*x\.tar:0\.json, which has label, colour"):
        data.open_images(tmp_path / "x.tar", 20, 30, class_key="size")
    write_shard(tmp_path / "x.tar", files | {"2.json": b"{"})
    with pytest.raises(ValueError, match=r"the label .*x\.tar:2\.json cannot be read"):
        data.open_images(tmp_path / "x.tar", 20, 30)


def test_a_shard_cut_short_keeps_what_is_whole(shards):
    whole = (shards / "s-01.tar").read_bytes()
    with tarfile.open(shards / "s-01.tar") as archive:
        last = archive.getmember("b/4.PNG")
    (shards / "s-01.tar").write_bytes(whole[: last.offset_data + 700])
    with pytest.warns(UserWarning, match=r"left out: what follows .* in shard .*s-01\.tar'"):
        images = data.open_images(shards, 20, 30)
    assert torch.equal(images.example(3)[0], as_tensor(3))
    with pytest.raises(data.UnreadableImage, match=r"s-01\.tar:b/4 is not a readable image"):
        images.example(4)


def test_shards_that_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    for name in ("x.tar.gz", "x.tar"):
        with pytest.raises(ValueError, match="is compressed by gzip, which has no random access"):
            data.open_images(tmp_path / name, 8, 8)
        (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar.gz").read_bytes())
    with pytest.raises(ValueError, match=r"shard '.*y\.tar' is missing"):
        data.open_images(tmp_path / "y.tar", 8, 8)
    with pytest.raises(ValueError, match="is no local path: download"):
        data.open_images("https://example.org/x-{0..3}.tar", 8, 8)


def test_braces_are_those_of_a_shell():
    assert expand_braces("x-{008..011}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar", "x-011.tar"]
    assert expand_braces("{b,a}{1..0}") == ["b1", "b0", "a1", "a0"]
    for wrong in ("x{1..}", "x{1", "x}", "x{a}"):
        with pytest.raises(ValueError, match=r"brace|accepted are"):
            expand_braces(wrong)


# ---- Samples ----


def test_builtin_needs_nothing_and_says_where_it_is_from(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    images = data.open_images("builtin", 32, 32)
    assert len(images) == 256 * len(images.class_names) == 2304
    readme = (data.BUILTIN / "README.md").read_text()
    for name in images.class_names:
        line = next(line for line in readme.splitlines() if line.startswith(f"| {name}.jpg"))
        assert line.rstrip(" |").endswith(("CC0", "public domain"))
    assert sum(path.stat().st_size for path in data.BUILTIN.iterdir()) < 600_000


@pytest.mark.parametrize("source", ["builtin", "photos"])
def test_crops_are_fixed_unless_random(source):
    """The same one every time without random crops; all of them different."""
    images = data.open_images(source, 16, 16)
    generator = torch.Generator().manual_seed(0)
    random = data.open_images(source, 16, 16, crop="random")
    for index in (0, 1, 5, 9, 300):
        image, label = images.example(index)
        assert label == index % len(images.class_names)
        assert torch.equal(image, images.example(index)[0])
        assert not torch.equal(image, random.example(index, generator)[0])
    first = torch.stack([images.example(i * len(images.class_names))[0] for i in range(20)])
    assert len(first.flatten(1).unique(dim=0)) == 20


def test_digits_and_faces():
    digits = data.open_images("digits", 8, 8)
    assert len(digits) == 1797
    assert digits.class_names == tuple("0123456789")
    from sklearn.datasets import load_digits

    for index in (0, 7, 1796):
        image, label = digits.example(index)
        assert ((image + 1) * 8 - torch.from_numpy(load_digits().images[index])).abs().max() < 0.04
        assert label == load_digits().target[index]
    large = data.open_images("digits", 32, 32).example(0)[0]
    assert (large[:, 1:] - large[:, :-1]).abs().max() < 1, "smooth: no step of more than half the range"
    faces = data.open_images("faces", 25, 25)
    assert len(faces) == 100 and faces.class_names is None
    found = torch.stack([faces.example(index)[0] for index in range(100)])
    # a mean of unlike pictures would have a hundredth of their variance
    assert found.mean(0).var() > 10 * found.var() / 100, "what a face is made of has its place"


# ---- Hugging Face ----


class StandIn:
    """What is used of a table of the library ``datasets``."""

    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def cast_column(self, name, kind):
        assert not kind.decode
        return StandIn(self.features | {name: kind}, self.columns)

    def select_columns(self, name):
        return StandIn(self.features, {name: self.columns[name]})

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    module = types.ModuleType("datasets")
    module.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    module.ClassLabel = type("ClassLabel", (), {"names": ["cat", "dog"]})
    module.DatasetDict = dict
    save(tmp_path / "1.png", 1)
    table = StandIn(
        {"caption": "string", "image": module.Image(), "label": module.ClassLabel(), "size": "int64"},
        {
            "caption": ["x", "y", "z"],
            "image": [{"bytes": encoded(0)}, {"bytes": None, "path": str(tmp_path / "1.png")}, {"bytes": b"broken"}],
            "label": [1, 0, None],
            "size": [4, 2, 0],
        },
    )
    module.load_dataset = lambda name, split: {("me/pets", "train"): table}[name, split]
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "datasets" or found(name))


def test_hugging_face_columns(hugging_face):
    images = data.open_images("hf:me/pets", 20, 30)
    assert images.class_names == ("cat", "dog")
    assert torch.equal(images.example(0)[0], as_tensor(0)) and images.example(0)[1] == 1
    assert torch.equal(images.example(1)[0], as_tensor(1)) and images.example(1)[1] == 0
    with pytest.raises(data.UnreadableImage, match="image 2 of hf:me/pets is not a readable image"):
        images.example(2)
    assert data.open_images("hf:me/pets:train", 8, 8, class_key="size").class_names == ("0", "1", "2", "3", "4")
    with pytest.raises(ValueError, match="class_key 'kind' is no column of 'hf:me/pets'; accepted are caption, image"):
        data.open_images("hf:me/pets", 8, 8, class_key="kind")
    with pytest.raises(ValueError, match="class_key 'caption' of 'hf:me/pets' must hold integers, got 'x'"):
        data.open_images("hf:me/pets", 8, 8, class_key="caption")


def test_missing_packages_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'hf:mnist' needs the package datasets: pip install 'hdit\[data"):
        data.open_images("hf:mnist", 8, 8)
    with pytest.raises(ModuleNotFoundError, match=r"'digits' ships inside sklearn.*pip install 'hdit\[demo\]'"):
        data.open_images("digits", 8, 8)
    with pytest.raises(ModuleNotFoundError, match=r"'faces' ships inside skimage.*pip install 'hdit\[demo\]'"):
        data.open_images("faces", 8, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("builtin", 0, 8), {}, "height must be a positive integer, got 0"),
        (("builtin", 8, 8), {"crop": "left"}, "crop must be 'center' or 'random', got 'left'"),
        (("builtin", 8, 8), {"class_key": "kind"}, "class_key 'kind' are for tar shards and Hugging Face"),
        (("absent", 8, 8), {}, "source 'absent' is not a folder; accepted are a folder, .tar shards, hf:NAME, builtin"),
    ],
)
def test_bad_arguments_are_named(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        data.open_images(*arguments, **options)


def test_an_empty_folder_and_an_index_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"has no file ending in \.bmp"):
        data.open_images(tmp_path, 8, 8)
    with pytest.raises(IndexError, match=r"index must be in \[0, 2304\), got -1"):
        data.open_images("builtin", 8, 8).example(-1)

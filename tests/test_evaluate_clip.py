"""CLIP as a feature extractor and the CLIP score, with a stand-in for transformers that knows three colours."""

import importlib.metadata
import importlib.util
import json
import sys
import types

import pytest
import torch
from PIL import Image, ImageColor
from test_evaluate import random_model

from hdit.evaluate import Evaluate
from hdit.evaluate_features import extractor
from hdit.evaluate_images import open_samples

WORDS = dict(zip(("red", "lime", "blue"), torch.eye(3), strict=True))
MEAN, DEVIATION = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])


class Clip(torch.nn.Module):
    """Embeds an image as the mean of its pixels, a text as the colour that it ends with."""

    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(image_size=8))
    vision_model = staticmethod(lambda pixel_values: types.SimpleNamespace(pooler_output=pixel_values.mean((2, 3))))
    text_model = staticmethod(lambda input_ids, attention_mask: types.SimpleNamespace(pooler_output=input_ids.float()))
    visual_projection = text_projection = torch.nn.Identity()


@pytest.fixture
def clip_of_colours(monkeypatch):
    """What was asked of transformers: models, in order, and texts."""
    asked = types.SimpleNamespace(models=[], texts=[])

    class Tokens(types.SimpleNamespace):
        def to(self, device):
            return self

    def tokenize(texts, padding, truncation, return_tensors):
        assert padding and truncation and return_tensors == "pt"
        asked.texts += texts
        return Tokens(input_ids=torch.stack([WORDS[text.split()[-1]] for text in texts]), attention_mask=None)

    def load(what):
        return types.SimpleNamespace(from_pretrained=lambda name: asked.models.append(name) or what)

    package = types.ModuleType("transformers")
    package.CLIPModel, package.AutoTokenizer = load(Clip()), load(tokenize)
    monkeypatch.setitem(sys.modules, "transformers", package)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "transformers" or found(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"transformers": "9.9"}[name])
    return asked


def test_clip_sees_the_centre_in_its_own_units(clip_of_colours):
    found = extractor("clip")
    assert clip_of_colours.models == ["openai/clip-vit-large-patch14"] * 2, "network and tokenizer"
    colour = torch.tensor([0.5, -0.25, 1.0])
    images = torch.full((2, 3, 16, 32), -1.0)
    images[:, :, :, 4:28] = colour[:, None, None]
    got = found(images, 0)[:, 0]
    assert (got - ((colour + 1) / 2 - MEAN) / DEVIATION).abs().max() < 0.01, "of a colour; the sides are cut off"
    assert found.captions(["red", "blue"] * 200).tolist() == [[1, 0, 0], [0, 0, 1]] * 200
    assert found.version.startswith("transformers 9.9, weights sha256 ") and found.name.startswith("clip:openai")
    assert extractor("clip:a/folder").name == "clip:a/folder" and clip_of_colours.models[-1] == "a/folder"


def test_clip_score_compares_each_image_with_its_own_caption(tmp_path, clip_of_colours):
    """In whatever order they are read, with a broken one among them; and of a checkpoint with its classes' names."""
    own = tmp_path / "own"
    own.mkdir()
    colours = ["red", "lime", "blue"] * 4
    for number, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(own / f"{number:02}.png")
        (own / f"{number:02}.txt").write_text(f"{colour}\n")
    (own / "04.png").write_text("broken")
    command = Evaluate(
        "builtin", (str(own),), real_count=6, extractor=("clip",), metrics=("clip-score",), caption="a photo of {}",
        output=tmp_path / "x.json",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out"):
        command.run()
    (row,) = json.loads(command.output.read_text())
    kept = colours[:4] + colours[5:]
    seen = [(torch.tensor(ImageColor.getrgb(colour)) / 255 - MEAN) / DEVIATION for colour in kept]
    cosines = [float(torch.cosine_similarity(x, WORDS[colour], 0)) for x, colour in zip(seen, kept, strict=True)]
    assert min(cosines) > 0.5
    assert row["clip_score"] == pytest.approx(100 * sum(cosines) / 11, rel=1e-2)
    assert sorted(clip_of_colours.texts) == sorted(f"a photo of {colour}" for colour in kept)
    model = tmp_path / "m.safetensors"
    random_model().save_pretrained(model, resolution=[16, 16], class_names=["red", "lime", "blue"])
    (source,) = open_samples((str(model),), "builtin", None, 7, 0, "cpu", {})
    assert source.captions == ["red", "lime", "blue"] * 2 + ["red"]
    (own / "03.txt").unlink()
    with pytest.raises(ValueError, match=r"metrics clip-score needs captions, and samples .*own' have none"):
        command.run()

"""The stream of batches: a function of the position alone, whatever the ranks, the workers, restarts, broken images."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hdit import data
from hdit.augmentation import KarrasAugmentation


class Numbered(data.Images):
    """``count`` random pictures of 12×10 pixels with their index as class; those in ``broken`` cannot be read."""

    def __init__(self, count, broken=(), crop="random", flip=True):
        super().__init__("numbered", 8, 8, crop, flip)
        self.count, self.broken = count, frozenset(broken)

    def __len__(self):
        return self.count

    def read(self, index):
        if index in self.broken:
            raise data.UnreadableImage(f"picture {index} is not a readable image: broken")
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def label(self, index):
        return index


def take(batches, count):
    """``count`` batches as one, elements in the order of the stream."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data.Batch(*(torch.cat(parts) for parts in zip(*(next(batches) for _ in range(count)), strict=True)))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def stream(count=11, broken=(), batch_size=5, **options):
    return data.Batches(Numbered(count, broken), batch_size, augment=KarrasAugmentation(0.5), **options)


def test_every_epoch_is_another_permutation():
    classes = take(stream(11, batch_size=11), 6).classes.view(6, 11)
    assert (classes.sort(1).values == torch.arange(11)).all()
    assert len({tuple(row) for row in classes.tolist()}) == 6
    assert not torch.equal(classes, take(stream(11, batch_size=11, seed=1), 6).classes.view(6, 11))


def test_crop_flip_and_augmentation_change_with_the_epoch_and_are_the_example_s_own():
    """One picture in a batch of seven: seven epochs, so seven different crops; and the same seven in any batch size."""
    images = take(stream(1, batch_size=7), 1).images
    assert len(images.flatten(1).unique(dim=0)) == 7
    assert torch.equal(images, take(stream(1, batch_size=1), 7).images)
    assert torch.equal(take(stream(11, batch_size=3), 22).images, take(stream(11, batch_size=66), 1).images)


@pytest.mark.parametrize("broken", [(), (2, 5, 6)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_stream_of_one(world_size, broken):
    whole = take(stream(broken=broken, batch_size=6), 6)
    for rank in range(world_size):
        own = take(stream(broken=broken, batch_size=6 // world_size, rank=rank, world_size=world_size), 6)
        assert same(own, [part[rank::world_size] for part in whole]), f"rank {rank}"


@pytest.mark.parametrize("broken", [(), (0, 3, 9)])
def test_a_resumed_stream_continues_exactly(broken):
    whole = take(stream(broken=broken), 12)
    for stop in (0, 1, 4, 9):
        first = stream(broken=broken)
        if stop:
            take(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(broken=broken, seed=99)  # the state's seed counts
        take(second, 2)
        second.load_state_dict(state)
        assert same(take(second, 12 - stop), [part[5 * stop :] for part in whole]), f"after {stop} batches"
        assert second.state_dict() == {"seed": 0, "images": 11, "position": 60}
        # … with another number of ranks
        ranks = [stream(broken=broken, batch_size=1, rank=rank, world_size=2) for rank in range(2)]
        for rank, batches in enumerate(ranks):
            batches.load_state_dict(state)
            assert same(take(batches, 3), [part[5 * stop + rank :: 2][:3] for part in whole])


def test_workers_change_nothing():
    whole = take(stream(broken=(4,)), 6)
    batches = stream(broken=(4,), workers=2)
    assert same(take(batches, 4), [part[:20] for part in whole])
    assert list(batches.unreadable) == [4]
    assert batches.state_dict()["position"] == 20, "what workers prepared ahead was not given yet"
    batches.load_state_dict(batches.state_dict())
    assert same(take(batches, 2), [part[20:] for part in whole])


def test_broken_images_are_named_once_counted_and_leave_no_gap():
    batches = data.Batches(Numbered(10, broken=(3, 7)), 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [next(batches) for _ in range(40)]
    messages = sorted(str(w.message) for w in caught)
    left_out = "left out, and another image in its place: "
    assert messages == [f"{left_out}picture {index} is not a readable image: broken" for index in (3, 7)]
    assert batches.unreadable == {index: f"picture {index} is not a readable image: broken" for index in (3, 7)}
    assert all(len(batch.classes) == 20 for batch in found)
    counts = Counter(torch.cat([batch.classes for batch in found]).tolist())
    assert set(counts) == set(range(10)) - {3, 7}
    # 80 epochs: each of the eight once per epoch, and its share of 160 vacant places (20, binomial, ± 5 deviations)
    assert all(abs(count - 100) <= 5 * (160 * 1 / 8 * 7 / 8) ** 0.5 for count in counts.values())


def test_nothing_to_read_is_an_error():
    for workers in (0, 1):
        batches = data.Batches(Numbered(4, broken=range(4)), 2, workers=workers)
        with pytest.raises(data.UnreadableImage, match="none of the 4 images of 'numbered'"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            next(batches)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(stream(), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size 2, got 2"),
        ({"workers": 1.0}, r"workers must be an integer of at least 0, got 1\.0"),
        ({"count": 0}, "images 'numbered' holds none"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        stream(**options)


def test_the_state_of_another_set_is_refused():
    with pytest.raises(ValueError, match="state is of a set of 12 images, and 'numbered' has 11"):
        stream().load_state_dict(stream(12).state_dict())
    with pytest.raises(ValueError, match=r"state must have seed, images and position, got \['seed'\]"):
        stream().load_state_dict({"seed": 0})

"""Generated scenes: classes lie where a street has them, nothing depends on the number of processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from datamodules.synthetic_scenes import BUILDING, CAR, GROUND, SKY, SyntheticScenes, draw_scenes

SMALL = {"num_train": 24, "num_val": 8, "num_test": 12, "image_size": 32, "batch_size": 8, "eval_batch_size": 5}


def test_what_stands_where():
    image, label = draw_scenes(200, 64, (1, 4), (1, 4), 0.0, seed=3)
    assert image.shape == (200, 3, 64, 64) and image.dtype == torch.float32
    assert label.shape == (200, 64, 64) and label.dtype == torch.int64
    assert set(label.unique().tolist()) == {SKY, GROUND, BUILDING, CAR}
    assert (label[:, 0] == SKY).all()  # buildings end below the upper edge
    assert ((label[:, -1] == GROUND) | (label[:, -1] == CAR)).all()
    rows = torch.arange(64).view(1, 64, 1)
    lowest_sky = torch.where(label == SKY, rows, -1).amax((1, 2))
    highest_ground = torch.where(label == GROUND, rows, 64).amin((1, 2))
    assert (lowest_sky < highest_ground).all()  # one horizon
    lowest_building = torch.where(label == BUILDING, rows, -1).amax((1, 2))
    assert (lowest_building <= highest_ground + 0.05 * 64 + 1).all()  # they stand at it


def test_colours_do_not_tell_the_class():
    """Else a network without context would do: the mean colour of a class says nothing about a scene's own."""
    image, label = draw_scenes(300, 32, (1, 4), (1, 4), 0.0, seed=0)
    flat, kind = image.movedim(1, -1).reshape(-1, 3), label.reshape(-1)
    means = torch.stack([flat[kind == k].mean(0) for k in range(4)])
    nearest = torch.cdist(flat, means).argmin(1)
    for thing in (BUILDING, CAR):
        assert (nearest[kind == thing] == thing).double().mean() < 0.6


def test_cars_stand_in_front():
    _, without = draw_scenes(100, 64, (4, 4), (0, 0), 0.0, seed=5)
    _, cars = draw_scenes(100, 64, (4, 4), (4, 4), 0.0, seed=5)
    assert not (without == CAR).any()
    assert ((cars == without) | (cars == CAR)).all()


def test_noise_has_the_deviation_that_was_asked_for():
    clean, noisy = (draw_scenes(50, 32, (1, 2), (1, 2), noise, seed=1)[0] for noise in (0.0, 0.2))
    assert (noisy - clean).std() == pytest.approx(0.2, rel=0.02)


def test_parts_differ_and_repeat():
    first, again, other = SyntheticScenes(**SMALL), SyntheticScenes(**SMALL), SyntheticScenes(**SMALL, scene_seed=1)
    assert len(first.part("train")) == 24 and len(first.part("test")) == 12
    assert torch.equal(first.part("val").image, again.part("val").image)
    assert not torch.equal(first.part("val").image, first.part("train").image[:8])
    for part in ("train", "val", "test"):
        assert not torch.equal(first.part(part).image, other.part(part).image)


def batches(data, loader):
    found = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


def test_mirrored_scenes_and_their_classes_belong_together():
    data = SyntheticScenes(**SMALL, drop_last=False)
    data.trainer = SimpleNamespace(training=True, current_epoch=0, distributed_sampler_kwargs=None)
    seen = batches(data, data.train_dataloader())
    part, mirrored = data.part("train"), 0
    for image, label, index in zip(seen["image"], seen["label"], seen["index"], strict=True):
        if torch.equal(label, part.label[index]) and torch.equal(image, part.image[index]):
            continue
        assert torch.equal(image, part.image[index].flip(-1)) and torch.equal(label, part.label[index].flip(-1))
        mirrored += 1
    assert 4 < mirrored < 20
    data.trainer.training = False
    seen = batches(data, data.test_dataloader())
    assert torch.equal(seen["image"], data.part("test").image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": 0}, r"data\.num_val=0: must be at least 1"),
        ({"image_size": 4}, r"data\.image_size=4: a scene needs 8 pixels"),
        ({"min_cars": 3, "max_cars": 2}, r"data\.min_cars=3, data\.max_cars=2: give 0 <= min <= max"),
        ({"noise": -0.1}, r"data\.noise=-0\.1"),
        ({"predict_part": "all"}, r"data\.predict_part='all': choose train, val, test"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticScenes(**options)

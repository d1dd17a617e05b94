from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from datamodules.images import Images
from datamodules.readers.digits import DIGITS
from tests.composing import SERIES
from tests.datamodules.files import write_idx, write_images, zip_folder

DATA = Path(os.environ.get("WATTLIGHT_DATA", SERIES.parent))
DIGIT_PARTS = {"test_size": 360, "test_from": "random", "normalize": "none"}
SYNTHETIC = {
    "reader": "synthetic",
    "max_train": 60,
    "max_test": 20,
    "num_classes": 3,
    "num_channels": 3,
    "image_size": 8,
}


class Stage:
    """What the data ask a Trainer."""

    def __init__(self, stage: str, current_epoch: int = 0, layout: dict | None = None) -> None:
        self.training, self.testing, self.predicting = (stage == name for name in ("train", "test", "predict"))
        self.validating = stage == "val"
        self.current_epoch, self.distributed_sampler_kwargs = current_epoch, layout
        self.lightning_module = SimpleNamespace(dtype=torch.float32)


def ready(stage: str | None = None, **options) -> Images:
    data = Images(**options)
    if stage is not None:
        data.trainer = Stage(stage)
    data.prepare_data()
    data.setup("fit")
    return data


def every(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def write_npz(folder: Path, number: int = 40, num_classes: int = 4, channels: int = 1, size: int = 8) -> dict:
    """Random images; options of `Images` that read them."""
    rng = np.random.default_rng(0)
    shape = (number, size, size, channels)
    arrays = {"x_train": rng.integers(0, 256, shape).astype(np.uint8), "y_train": np.arange(number) % num_classes}
    arrays |= {"x_test": rng.integers(0, 256, shape).astype(np.uint8)[:12], "y_test": np.arange(12) % num_classes}
    np.savez(folder / "a.npz", **arrays)
    return {"reader": "npz", "file": "a.npz", "data_dir": str(folder)}


# --- digits -----------------------------------------------------------------------------------------------------------


def test_the_embedded_digits_are_unmodified():
    assert hashlib.sha256(DIGITS.read_bytes()).hexdigest() in (DIGITS.parent / "SOURCE.md").read_text()


def test_the_digits():
    data = ready(**DIGIT_PARTS)
    assert {part: len(data.images(part).rows) for part in ("train", "val", "test")} == {
        "train": 1293,
        "val": 144,
        "test": 360,
    }
    assert (data.num_classes, data.num_channels, data.input_shape) == (10, 1, (1, 8, 8))
    seen = data.normalized(every(data.test_dataloader()))["image"]
    assert seen.min() == 0 and seen.max() == 1  # 16 is white
    assert (seen * 16 == (seen * 16).round()).all()


def test_all_digits_are_in_one_part_each():
    """Named by their places in the file, from which the end can be cut off too."""
    for options in ({"test_from": "random"}, {"test_from": "end"}):
        data = ready(**DIGIT_PARTS | options)
        names = [set(data.images(part).names) for part in ("train", "val", "test")]
        assert len(set.union(*names)) == sum(map(len, names)) == 1797
        if options["test_from"] == "end":
            assert names[2] == {f"digit_{i:05d}" for i in range(1437, 1797)}
    assert set(ready(**DIGIT_PARTS | {"split_seed": 1}).images("test").names) != names[2]


def test_the_split_of_the_design_documents():
    """A permutation by a generator of its own: the first 1,347 train, the last 450 test, standardised."""
    data = ready(test_size=450, test_from="random", split_seed=3, val_fraction=0)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(3)).tolist()
    assert data.images("train").names == [f"digit_{i:05d}" for i in order[:1347]]
    assert data.images("test").names == [f"digit_{i:05d}" for i in order[1347:]]
    values = data.normalized(every(data.train_dataloader()))["image"].double()
    assert len(values) == 1347 - 1347 % 64
    pixels = data.images("train").pixels[data.images("train").rows] / 16
    assert data.mean == pytest.approx([pixels.mean()]) and data.std == pytest.approx([pixels.std()])
    assert data.val_dataloader() == []


# --- parts ------------------------------------------------------------------------------------------------------------


def test_validation_takes_its_share_of_every_class():
    data = ready(**DIGIT_PARTS, val_fraction=0.2)
    train, val = (np.bincount(data.images(part).labels) for part in ("train", "val"))
    assert np.abs(val / (train + val) - 0.2).max() < 0.005


def test_parts_depend_on_their_own_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ready(**DIGIT_PARTS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for other in (ready(**DIGIT_PARTS, seed=1), ready(**DIGIT_PARTS, seed=0)):
        assert all(other.images(p).names == first.images(p).names for p in ("train", "val", "test"))
    assert ready(**DIGIT_PARTS, split_seed=1).images("val").names != first.images("val").names


def test_the_first_of_every_class_are_kept(tmp_path):
    data = ready(**write_npz(tmp_path), max_train=8, max_test=4, val_fraction=0.5)
    names = data.images("train").names + data.images("val").names
    assert sorted(names) == [f"train_{i:05d}" for i in range(8)]
    assert np.bincount(data.images("val").labels).tolist() == [1, 1, 1, 1]
    assert data.images("test").names == [f"test_{i:05d}" for i in range(4)]


def test_some_classes_get_new_labels():
    data = ready(**DIGIT_PARTS | {"test_size": 60}, classes=[7, 2], num_classes=2)
    whole = ready(**DIGIT_PARTS)
    assert data.class_names == ["7", "2"] and data.num_classes == 2
    for part in ("train", "val", "test"):
        images = data.images(part)
        known = {}
        for other in ("train", "val", "test"):
            known |= dict(zip(whole.images(other).names, whole.images(other).labels.tolist(), strict=True))
        assert [known[name] for name in images.names] == [[7, 2][label] for label in images.labels]
        assert set(images.labels.tolist()) == {0, 1}


def test_an_archive_of_folders_trains_on_both_parts(tmp_path):
    for part, number in (("train", 6), ("test", 2)):
        for base, name in ((0, "cat"), (100, "dog")):
            files = {f"{i}.png": np.full((4, 4), base + 10 * i + (part == "test")) for i in range(number)}
            write_images(tmp_path / "set" / part / name, files)
    zip_folder(tmp_path / "set", tmp_path / "set.zip")
    options = {"reader": "image_folder", "data_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    for file in ("set", "set.zip"):
        data = ready(**options, file=file, val_fraction=0.34, normalize="none", num_channels=1, num_classes=2)
        batch = every(data.test_dataloader())
        assert batch["image"][:, 0, 0, 0].tolist() == [1, 11, 101, 111] and batch["label"].tolist() == [0, 0, 1, 1]
        assert data.images("test").names[3] == "test/dog/1.png" and data.class_names == ["cat", "dog"]
        values = [
            every(loader)["image"][:, 0, 0, 0].tolist() for loader in (data._loader("train", 4), data.val_dataloader())
        ]
        assert sorted(values[0] + values[1]) == [0, 10, 20, 30, 40, 50, 100, 110, 120, 130, 140, 150]
        assert len(values[1]) == 4
    cached = len(list((tmp_path / "cache").glob("*.npy")))
    data = ready(**options, file="set.zip", max_train=4, max_test=2, val_fraction=0.5, normalize="none")
    assert sorted(data.images("train").names + data.images("val").names)[0::2] == ["train/cat/0.png", "train/dog/0.png"]
    small = [np.load(p, mmap_mode="r").shape[0] for p in (tmp_path / "cache").glob("*.npy")]
    assert len(small) == cached + 2 and sorted(small)[:2] == [2, 4]  # only what is needed is decoded
    only = ready(**options, file="set", test_folder=None, test_size=3, test_from="random", val_fraction=0)
    assert len(only.images("train").rows) == 9 and len(only.images("test").rows) == 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_compressed_or_not(tmp_path, suffix):
    rng = np.random.default_rng(0)
    names = ["train-images", "train-labels", "test-images", "test-labels"]
    for name, number in zip(names, (20, 20, 6, 6), strict=True):
        values = rng.integers(0, 256, (number, 4, 4)) if "images" in name else np.arange(number) % 2
        write_idx(tmp_path / f"{name}{suffix}", values)
    options = {"reader": "idx", "data_dir": str(tmp_path), "val_fraction": 0.1}
    for wanted in ("", ".gz"):  # whichever is named, the other one is found
        data = ready(**options, file=[f"{name}{wanted}" for name in names])
        assert [len(data.images(part).rows) for part in ("train", "val", "test")] == [18, 2, 6]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_see_standardised_values(tmp_path, channels):
    data = ready("validate", **write_npz(tmp_path, channels=channels), drop_last=False)
    batch = every(data.train_dataloader())
    assert batch["image"].dtype == torch.uint8
    seen = data.on_after_batch_transfer(batch, 0)
    assert seen.keys() == set(data.batch_keys) and seen["image"].is_contiguous()
    assert seen["image"].dtype == torch.float32 and seen["image"].shape[1:] == data.input_shape == (channels, 8, 8)
    assert seen["image"].mean((0, 2, 3)).numpy() == pytest.approx(0, abs=1e-6)
    assert seen["image"].std((0, 2, 3), correction=0).numpy() == pytest.approx(1, abs=1e-6)


def test_legacy_statistics_are_means_over_images(tmp_path):
    options = write_npz(tmp_path, channels=3)
    data = ready(**options, normalize="legacy", val_fraction=0)
    pixels = np.load(tmp_path / "a.npz")["x_train"] / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(data.std, pixels.std((1, 2)).mean(0))
    given = ready(**options, mean=[0.5, 0.5, 0.5], val_fraction=0)
    assert given.mean == [0.5, 0.5, 0.5] and given.std == pytest.approx(pixels.std((0, 1, 2)).tolist())


def test_statistics_of_the_training_go_with_the_checkpoint(tmp_path):
    """Other images at hand are normalised as the network has learnt it; what the configuration gives comes first."""
    trained = ready(**write_npz(tmp_path), val_fraction=0)
    other = ready(**DIGIT_PARTS | {"normalize": "dataset"})
    mean = other.mean
    other.load_state_dict(trained.state_dict())
    assert other.mean == trained.mean != mean
    given = ready(**DIGIT_PARTS | {"normalize": "dataset"}, mean=[0.1], std=[0.2])
    given.load_state_dict(trained.state_dict())
    assert (given.mean, given.std) == ([0.1], [0.2])
    assert ready(**DIGIT_PARTS).state_dict() == {}


def test_grey_images_in_three_channels(tmp_path):
    options = write_npz(tmp_path)
    grey, colour = ready("test", **options), ready("test", **options, to_rgb=True, num_channels=3)
    assert colour.input_shape == (3, 8, 8) and colour.channel_names == ["red", "green", "blue"]
    (first, *_), (second, *_) = (list(data.test_dataloader()) for data in (grey, colour))
    expected = grey.on_after_batch_transfer(first, 0)["image"]
    assert torch.equal(colour.on_after_batch_transfer(second, 0)["image"], expected.expand(-1, 3, -1, -1))


def test_smaller_images_are_block_means(tmp_path):
    data = ready(**write_npz(tmp_path), image_size=4, normalize="none")
    assert data.input_shape == (1, 4, 4)
    batch = next(iter(data.test_dataloader()))
    whole = torch.from_numpy(np.load(tmp_path / "a.npz")["x_test"]).permute(0, 3, 1, 2).float()
    assert (F.avg_pool2d(whole, 2) - batch["image"].float()).abs().max() <= 0.5


# --- views ------------------------------------------------------------------------------------------------------------


def test_training_sees_other_views_every_epoch_and_the_same_after_a_restart(tmp_path):
    data = ready(**write_npz(tmp_path, channels=3), augment=True, padding=2, batch_size=16)
    batch = next(iter(data.train_dataloader()))

    def views(epoch, batch=batch, stage="train"):
        data.trainer = Stage(stage, epoch)
        return data.on_after_batch_transfer(batch, 0)["image"]

    assert views(0).shape == (16, 3, 8, 8)
    assert torch.equal(views(0), views(0)) and not torch.equal(views(0), views(1))
    # A sample keeps its view whatever shares its batch, for instance on two processes.
    half = {key: value[1::2] for key, value in batch.items()}
    torch.testing.assert_close(views(0, half), views(0)[1::2], rtol=0, atol=1e-5)
    assert torch.equal(views(0, stage="validate"), data.normalized(batch)["image"])
    other = ready(**write_npz(tmp_path, channels=3), augment=True, padding=2, seed=1)
    other.trainer = Stage("train", 0)
    assert not torch.equal(other.on_after_batch_transfer(batch, 0)["image"], views(0))


def test_samples_of_the_weights_may_see_views_of_their_own(tmp_path):
    data = ready(**write_npz(tmp_path, channels=3), augment=True, padding=2, noise=0.1, batch_size=16)
    batch = next(iter(data.train_dataloader()))
    streams = [data.augmented(batch, 2, [stream])["image"] for stream in range(3)]
    assert torch.equal(streams[0], data.augmented(batch, 2)["image"])  # as without samples
    assert not torch.equal(streams[0], streams[1]) and not torch.equal(streams[1], streams[2])
    found = data.augmented(batch, 2, [0, 2, 2, 1])
    assert torch.equal(found["image"], torch.cat([streams[s] for s in (0, 2, 2, 1)]))  # sample after sample
    assert torch.equal(found["label"], batch["label"])
    assert torch.equal(data.augmented(batch, 2, [1, 1])["image"], streams[1])  # one view for all of them

    data.trainer = Stage("train", 2)
    data.trainer.lightning_module.view_streams = lambda: [2, 0]
    asked = data.on_after_batch_transfer(batch, 0)["image"]
    assert torch.equal(asked, torch.cat([streams[2], streams[0]]))
    for stage in ("validate", "test"):  # the module is asked in training alone
        data.trainer = Stage(stage)
        data.trainer.lightning_module.view_streams = None
        assert len(data.on_after_batch_transfer(batch, 0)["image"]) == 16


def test_views_are_cuts_of_the_padded_image_or_of_its_mirror_image(tmp_path):
    data = ready("train", **write_npz(tmp_path), augment=True, padding=2, normalize="none", drop_last=False)
    batch = every(data.train_dataloader())
    views = data.on_after_batch_transfer(batch, 0)["image"]
    seen = set()
    for image, view in zip(batch["image"].float() / 255, views, strict=True):
        found = {
            (flip, row, column)
            for flip, source in enumerate((image, image.flip(-1)))
            for row in range(5)
            for column in range(5)
            if (F.pad(source, (2,) * 4)[:, row : row + 8, column : column + 8] - view).abs().max() < 1e-5
        }
        assert len(found) == 1
        seen |= found
    assert {flip for flip, _, _ in seen} == {0, 1} and len(seen) > 15


def test_cuts_of_random_size(tmp_path):
    options = write_npz(tmp_path, size=16) | {
        "augment": True,
        "padding": 0,
        "crop_scale": [0.2, 0.9],
        "noise": 0.1,
        "batch_size": 32,
    }
    data, again = ready("train", **options), ready("train", **options)
    batch = next(iter(data.train_dataloader()))
    views = data.on_after_batch_transfer(batch, 0)["image"]
    assert views.shape == (32, 1, 16, 16)
    few = {key: value[3:7] for key, value in batch.items()}  # whatever batch an image is in
    assert torch.equal(again.on_after_batch_transfer(few, 0)["image"], views[3:7])
    again.trainer = Stage("train", 1)
    assert not torch.equal(again.on_after_batch_transfer(batch, 0)["image"], views)
    # Neither places nor noise share numbers with the sizes.
    quiet = ready("train", **options | {"noise": 0.0, "normalize": "none"})
    noisy = ready("train", **options | {"normalize": "none"})
    noise = noisy.on_after_batch_transfer(batch, 0)["image"] - quiet.on_after_batch_transfer(batch, 0)["image"]
    assert noise.std() > 0.05 and abs(noise.mean()) < 0.02
    uncut = {"crop_scale": [1.0, 1.0], "crop_ratio": [1, 1], "noise": 0.0, "flip_probability": 0.0}
    whole = ready("train", **options | uncut)
    seen = whole.on_after_batch_transfer(batch, 0)["image"]
    torch.testing.assert_close(seen, whole.normalized(batch)["image"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"crop_scale": [0.0, 1.0]}, r"data\.crop_scale=\[0\.0, 1\.0\]: .* at most 1"),
        ({"crop_scale": [0.5, 0.2]}, r"data\.crop_scale=\[0\.5, 0\.2\]"),
        ({"crop_scale": [0.5, 1.5]}, r"data\.crop_scale=\[0\.5, 1\.5\]"),
        ({"crop_ratio": [2.0]}, r"data\.crop_ratio=\[2\.0\]: .* width over height"),
        ({"crop_scale": [0.5, 1.0], "padding": 2}, r"data\.padding=2 and data\.crop_scale=\[0\.5, 1\.0\]"),
    ],
)
def test_impossible_cuts_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Images(**{"padding": 0} | options)


def test_cutout_sets_a_square_to_the_mean(tmp_path):
    options = {"augment": True, "flip_probability": 0, "padding": 0, "cutout": 4, "drop_last": False}
    data = ready("train", **write_npz(tmp_path, channels=3), **options)
    batch = every(data.train_dataloader())
    views, whole = data.on_after_batch_transfer(batch, 0)["image"], data.normalized(batch)["image"]
    changed = views != whole
    assert (views[changed] == 0).all() and torch.equal(changed[:, 0], changed[:, 2])
    number = changed[:, 0].sum((1, 2))
    assert number.min() >= 4 and number.max() <= 16 and (number == 16).any()


def test_noise_is_drawn_per_sample_and_epoch(tmp_path):
    options = {"augment": True, "flip_probability": 0, "padding": 0, "noise": 0.1, "drop_last": False}
    data = ready("train", **write_npz(tmp_path, channels=3), **options)
    batch = every(data.train_dataloader())
    whole = data.normalized(batch)["image"]
    first, again, other = (data.augmented(batch, epoch)["image"] - whole for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.float32
    some = {key: value[3:5] for key, value in batch.items()}
    torch.testing.assert_close(data.augmented(some, 0)["image"] - whole[3:5], first[3:5])
    # On values in [0, 1], so a channel's noise is divided by its deviation.
    unit = {key: value.float() * 0 for key, value in batch.items() if key == "image"} | {"index": batch["index"]}
    step = data.normalized({"image": unit["image"] + 255})["image"] - data.normalized(unit)["image"]
    noise = first / step
    assert abs(noise.mean()) < 0.005 and noise.std() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match=r"data\.noise=-1"):
        ready("train", **write_npz(tmp_path, channels=3), noise=-1)


def test_shifts_are_for_the_test_images_alone(tmp_path):
    options = write_npz(tmp_path)
    data, plain = (ready(**options, shift=shift, severity=5) for shift in ("gaussian_noise", None))
    batch = every(data.test_dataloader())

    def seen(data, stage):
        data.trainer = Stage(stage)
        return data.on_after_batch_transfer(batch, 0)["image"]

    shifted = seen(data, "test")
    assert torch.equal(seen(data, "predict"), shifted) and not torch.equal(shifted, seen(plain, "test"))
    assert torch.equal(seen(data, "validate"), seen(plain, "test"))
    # The same shifted images whatever the seed of the training, the batch or the process.
    again = ready(**options, shift="gaussian_noise", severity=5, seed=7)
    assert torch.equal(seen(again, "test"), shifted)
    half = {key: value[::2] for key, value in batch.items()}
    assert torch.equal(data.shifted(half)["image"], shifted[::2])
    data.predict_part = "val"
    assert torch.equal(seen(data, "predict"), seen(plain, "test"))


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_ranks_share_a_global_batch(tmp_path):
    options = write_npz(tmp_path)
    alone = ready(**options, batch_size=8, eval_batch_size=4)
    shares = []
    for rank in range(2):
        data = ready("train", **options, batch_size=8, eval_batch_size=4)
        data.trainer = Stage("train", 0, {"num_replicas": 2, "rank": rank})
        shares.append(data)
    for batch, *halves in zip(*(data.train_dataloader() for data in (alone, *shares)), strict=True):
        together = torch.cat([half["index"] for half in halves])
        assert sorted(together.tolist()) == sorted(batch["index"].tolist()) and len(halves[0]["index"]) == 4
    seen = torch.cat([every(data.test_dataloader())["index"] for data in shares])
    assert sorted(seen.tolist()) == list(range(12))


def test_worker_processes_give_the_same_batches(tmp_path):
    options = write_npz(tmp_path)
    alone = [batch["index"].tolist() for batch in ready(**options, batch_size=8).train_dataloader()]
    data = ready(**options, batch_size=8, num_workers=1)
    assert [batch["index"].tolist() for batch in data.train_dataloader()] == alone


def test_predictions_have_the_names_of_images_and_classes():
    data = ready(**DIGIT_PARTS, predict_part="val", eval_batch_size=100)
    tables = []
    for batch in data.predict_dataloader():
        probability = F.one_hot(batch["label"], 10) * 0.5 + 0.05
        outputs = {"prediction": batch["label"], "probability": probability, "index": batch["index"]}
        tables.append(data.prediction_table(outputs | {"target": batch["label"]}))
    table = pd.concat(tables)
    assert list(table.columns) == ["image", "prediction", "probability", "label", "origin"]
    assert table["image"].tolist() == data.images("val").names and (table["probability"] == 0.55).all()
    assert (table["prediction"] == table["label"]).all() and table["origin"].tolist() == list(range(144))
    assert "label" not in data.prediction_table(outputs).columns


def test_synthetic_images_are_made_at_their_size():
    data = ready(**SYNTHETIC)
    assert data.input_shape == (3, 8, 8) and data.num_classes == 3
    assert [len(data.images(part).rows) for part in ("train", "val", "test")] == [54, 6, 20]
    assert len(ready(**SYNTHETIC | {"num_channels": 3, "to_rgb": True}).images("train").pixels[0, 0, 0]) == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reader": "cifar"}, r"data\.reader='cifar' is unknown; use one of digits, idx, image_folder, npz, synthetic"),
        ({"predict_part": "next"}, r"data\.predict_part='next' is unknown; use one of train, val, test"),
        ({"normalize": "z"}, r"data\.normalize='z' is unknown; use one of dataset, legacy, none"),
        ({"test_from": "start"}, r"data\.test_from='start' is unknown"),
        ({"shift": "snow"}, r"data\.shift='snow' is unknown; use one of gaussian_noise, .*salt_and_pepper"),
        ({"severity": 6}, r"data\.severity=6: must be 1 to 5"),
        ({"max_train": 0}, r"data\.max_train=0: must be at least 1"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"padding": -1}, r"data\.padding=-1: must not be negative"),
        ({"flip_probability": 1.5}, r"data\.flip_probability=1\.5"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0: must be at least 0 and below 1"),
        ({"file": "x"}, r"data\.file=\['x'\]: data\.reader=digits needs 0 file"),
        ({"reader": "idx", "file": ["a", "b"]}, r"data\.reader=idx needs 4 file"),
        ({"reader": "npz", "file": "a", "md5": ["1", "2"]}, r"data\.md5 has 2 checksums for 1 file"),
        ({"classes": [1, 1]}, r"data\.classes=\[1, 1\]: name every class once"),
        ({"to_rgb": True, "num_channels": 1}, r"data\.num_channels=1: data\.to_rgb=true gives 3; set it to 3"),
        ({"reader": "synthetic", "max_train": 5}, r"needs data\.max_test, data\.num_classes, .*data\.image_size"),
    ],
)
def test_wrong_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Images(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"the embedded digits: there is no test part; set data\.test_size"),
        ({"test_size": 1797}, r"data\.test_size=1797: the embedded digits has 1797 images; leave some"),
        ({"test_size": 360, "max_train": 2000}, r"data\.max_train=2000 is larger than the train part .*1437 images"),
        ({"test_size": 360, "max_test": 361}, r"data\.max_test=361 .* at most 360, or null"),
        (
            {"test_size": 360, "image_size": 3},
            r"data\.image_size=3 does not divide the 8 pixels .*use one of 1, 2, 4, 8",
        ),
        ({"test_size": 360, "image_size": 16}, r"data\.image_size=16 does not divide the 8 pixels"),
        ({"test_size": 360, "num_classes": 5}, r"data\.num_classes=5, but .* has 10 classes \(0, 1, .*=10"),
        ({"test_size": 360, "classes": [1, 12]}, r"data\.classes: the embedded digits has no class 12; it has 0 to 9"),
        ({"test_size": 360, "classes": [1, 2], "num_classes": 10}, r"has 2 classes \(data\.classes=\[1, 2\]\): set"),
        (
            {"test_size": 360, "num_channels": 3},
            r"expects 3 channels \(data\.num_channels\), .*has 1: set data\.to_rgb=true, or set data\.num_channels=1",
        ),
        ({"test_size": 360, "val_fraction": 0.001}, r"data\.val_fraction=0\.001 leaves no image for validation"),
    ],
)
def test_what_does_not_fit_the_images_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        ready(**options)


def test_files_that_do_not_fit_are_named(tmp_path):
    options = write_npz(tmp_path, channels=3)
    with pytest.raises(ValueError, match=r"data\.test_size=3: .*a\.npz has a test part; set data\.test_size=null"):
        ready(**options, test_size=3)
    with pytest.raises(ValueError, match=r"data\.to_rgb=true: .*a\.npz has 3 channels already"):
        ready(**options, to_rgb=True)
    with pytest.raises(ValueError, match=r"data\.std=\[0\.5\]: .*a\.npz has 3 channels, one value each"):
        ready(**options, std=[0.5])
    with pytest.raises(ValueError, match=r"label 3 of image 3 is outside 0\.\.2; .*data\.num_classes"):
        ready(**options, num_classes=3)
    with pytest.raises(ValueError, match=r"a\.npz: MD5"):
        ready(**options, md5="0")
    np.savez(tmp_path / "a.npz", x_train=np.full((8, 4, 4), 7, dtype=np.uint8), y_train=np.arange(8) % 2)
    with pytest.raises(ValueError, match=r"a channel has one value everywhere; set data\.normalize=none"):
        ready(**options, test_size=2, val_fraction=0)


def test_missing_files_are_named(tmp_path):
    file = {"reader": "npz", "file": "none.npz", "data_dir": str(tmp_path), "source": "the moon"}
    match = rf"no file {tmp_path}/none\.npz \(data\.data_dir={tmp_path}, data\.file=none\.npz\): .*data_dir.*the moon"
    with pytest.raises(FileNotFoundError, match=match):
        Images(**file).prepare_data()
    with pytest.raises(FileNotFoundError, match=match):
        Images(**file).setup("fit")


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (DATA / "cifar10-imagefolder.zip").is_file(), reason=f"no cifar10-imagefolder.zip in WATTLIGHT_DATA ({DATA})"
)
def test_the_small_cifar10(tmp_path):
    from runner.job import instantiate
    from tests.composing import composed, plain

    overrides = ("experiment=classification/cifar10_small", f"data_dir={DATA}", f"data.cache_dir={tmp_path}")
    config = plain(composed(*overrides))
    data = instantiate("data", config["data"])
    data.prepare_data()
    data.setup("fit")
    assert data.input_shape == (3, 16, 16) and data.class_names[5] == "dog"
    counts = [np.bincount(data.images(part).labels).tolist() for part in ("train", "val", "test")]
    assert counts == [[450] * 10, [50] * 10, [100] * 10]
    # Means over 2 x 2 pixels have the mean of the pixels; their deviation is smaller than that of CIFAR-10.
    np.testing.assert_allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    assert all(0.2 < std < limit for std, limit in zip(data.std, (0.2470, 0.2435, 0.2616), strict=True))
    legacy = instantiate("data", config["data"] | {"normalize": "legacy", "image_size": 32})
    legacy.setup("fit")
    np.testing.assert_allclose(legacy.std, (0.2023, 0.1994, 0.2010), atol=0.006)


def test_validation_as_some_published_code_does_it():
    """Random views, and no incomplete batch; the usual validation sees all images as they are."""
    options = DIGIT_PARTS | {"augment": True, "padding": 2, "eval_batch_size": 100}
    usual, legacy = ready("val", **options), ready("val", **options, legacy_eval=True)
    assert [len(batch["label"]) for batch in usual.val_dataloader()] == [100, 44]
    (batch,) = legacy.val_dataloader()
    assert len(batch["label"]) == 100
    plain = usual.normalized(batch)["image"]
    assert torch.equal(usual.on_after_batch_transfer(batch, 0)["image"], plain)
    view = legacy.on_after_batch_transfer(batch, 0)["image"]
    assert not torch.equal(view, plain) and torch.equal(view, legacy.augmented(batch, 0)["image"])
    small = ready("val", **options | {"eval_batch_size": 500}, legacy_eval=True)
    assert len(every(small.val_dataloader())["label"]) == 144  # rather an incomplete batch than none
    with pytest.raises(ValueError, match=r"data\.legacy_eval=true .* data\.augment=true"):
        Images(**DIGIT_PARTS, legacy_eval=True)

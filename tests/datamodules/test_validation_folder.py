"""Validation on a folder of its own, and on as many images as the training has."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.images import Images
from runner import job
from tests.composing import composed, plain
from tests.datamodules.files import write_images
from tests.datamodules.test_images import Stage, every, ready


@pytest.fixture
def folder(tmp_path):
    """Eight images to train on, four to validate, two to test, of two classes."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4), ("test", 2)):
        for name in ("cat", "dog"):
            images = {f"{i}.png": rng.integers(0, 256, (32, 32, 3)) for i in range(number)}
            write_images(tmp_path / "imagenet" / part / name, images)
    return tmp_path


def options(folder, **more):
    found = {"reader": "image_folder", "data_dir": str(folder), "file": "imagenet", "cache_dir": str(folder / "cache")}
    return found | {"val_fraction": 0, "normalize": "none"} | more


@pytest.mark.parametrize(("val", "test", "sizes"), [("val", "test", [16, 8, 4]), ("val", "val", [16, 8, 8])])
def test_validation_takes_the_whole_folder(folder, val, test, sizes):
    data = ready(**options(folder, val_folder=val, test_folder=test))
    assert [len(data.images(part).rows) for part in ("train", "val", "test")] == sizes
    assert {name.split("/")[0] for name in data.images("val").names} == {"val"}
    assert (every(data.val_dataloader())["label"].numpy() == data.images("val").labels).all()


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.1: data\.val_folder has the images; set it to 0"):
        ready(**options(folder, val_folder="val", val_fraction=0.1))
    with pytest.raises(ValueError, match=r"data\.val_folder=val: data\.reader=digits has no folders"):
        Images(reader="digits", val_folder="val")
    write_images(folder / "imagenet" / "small" / "cat", {"0.png": np.zeros((16, 16, 3))})
    write_images(folder / "imagenet" / "small" / "dog", {"0.png": np.zeros((16, 16, 3))})
    with pytest.raises(ValueError, match=r"have the shape \(32, 32, 3\), val images \(16, 16, 3\)"):
        ready(**options(folder, val_folder="small"))


def test_validation_grows_with_the_training_set():
    """N_val n f / N of the validation images, by class; all of them outside of a training (section 2.2)."""
    data = ready(reader="digits", test_size=360, val_fraction=0.1, normalize="none", samples_per_device=100)
    train, val = (len(data.images(part).rows) for part in ("train", "val"))
    for devices in (1, 2, 4):
        data.trainer = Stage("train", layout={"num_replicas": devices, "rank": 0})
        data.trainer.state = SimpleNamespace(fn="fit")
        wanted = round(val * 100 * devices / train)
        loader = data.val_dataloader()
        assert len(loader.dataset) == wanted
        counts = np.bincount(loader.dataset.images.labels, minlength=10)
        assert np.abs(counts - np.bincount(data.images("val").labels, minlength=10) * wanted / val).max() < 1
    data.trainer.state.fn = "validate"
    assert len(data.val_dataloader().dataset) == val


def test_the_preset_of_the_paper_trains_on_folders(folder):
    overrides = (
        "experiment=energy_scaling/paper", f"data_dir={folder}", f"data.cache_dir={folder / 'cache'}", "debug=tiny",
        "data.num_classes=2", "data.stored_size=32", "data.image_size=32", "data.local_batch_size=4",
        "model.top_k=null", "data.num_workers=0", "model.net.width=0.0625", "trainer=cpu", "logger=none",
        "callbacks=none", "num_threads=1",
    )  # fmt: skip
    config = plain(composed(*overrides, run_dir=folder / "run"))
    assert config["model"]["net"] | {"depth": 50, "stem": "imagenet", "zero_init": False} == config["model"]["net"]
    result = job.run(config)
    assert result["status"] == "completed", result.get("error")
    assert {"val/accuracy", "test/accuracy"} <= result["metrics"].keys()

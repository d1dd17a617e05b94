from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules.xray import MODELS, XrayDataModule
from networks.vgg import final_size
from tests.composing import composed
from tests.datamodules.files import write_images

SIZES = {"image_size": 20, "stored_size": 24, "padding": 2, "batch_size": 4, "eval_batch_size": 3}


class Stage:
    """What the data ask a Trainer."""

    def __init__(self, training: bool, current_epoch: int = 0) -> None:
        self.training, self.current_epoch = training, current_epoch
        self.distributed_sampler_kwargs = None
        self.lightning_module = SimpleNamespace(dtype=torch.float32)


@pytest.fixture
def folder(tmp_path):
    """Twelve images for training, five for validation, four without labels; their grey value tells which."""
    rng = np.random.default_rng(0)
    start = 0
    for part, number in (("train", 12), ("valid", 5), ("test", 4)):
        names = [f"{part}_{i}.{'jpg' if i % 2 else 'png'}" for i in range(number)]
        shapes = [(int(h), int(w)) for h, w in rng.integers(30, 60, (number, 2))]
        write_images(
            tmp_path / "imgs",
            {n: np.full(s, 8 * (start + i)) for i, (n, s) in enumerate(zip(names, shapes, strict=True))},
        )
        table = pd.DataFrame(
            {"image": names, "label": ["positive" if i % 3 == 0 else "negative" for i in range(number)]}
        )
        table.drop(columns=[] if part != "test" else ["label"]).to_csv(tmp_path / f"{part}.csv", index=False)
        start += number
    return tmp_path


def ready(folder, **options) -> XrayDataModule:
    data = XrayDataModule(str(folder), **SIZES | options)
    for stage in ("fit", "validate", "predict"):
        data.setup(stage)
    return data


def every(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("cache", [False, True])
def test_images_and_labels_belong_together(folder, cache):
    data = ready(folder, cache=cache, drop_last=False)
    batch = every(data.train_dataloader())
    assert batch["image"].shape == (12, 1, 24, 24) and batch["image"].dtype == torch.uint8
    assert sorted(batch["index"].tolist()) == list(range(12)) != batch["index"].tolist()
    assert torch.equal(batch["label"], (batch["index"] % 3 == 0).long())
    assert (batch["image"][:, 0, 12, 12] - 8 * batch["index"]).abs().max() <= 1
    batch = every(data.val_dataloader())
    assert batch["image"].shape == (5, 1, 20, 20) and batch["index"].tolist() == list(range(5))
    assert batch["label"].tolist() == [1, 0, 0, 1, 0]


def test_networks_see_normalised_images(folder):
    data = ready(folder)
    data.trainer = Stage(training=False)
    (batch, *_) = list(data.val_dataloader())
    seen = data.on_after_batch_transfer(batch, 0)
    assert seen["image"].shape[1:] == data.input_shape and seen["image"].dtype == torch.float32
    torch.testing.assert_close(seen["image"], (batch["image"] / 255 - 0.8180) / 0.1748)
    assert {"label", "index"} <= seen.keys() and seen.keys() == set(data.batch_keys)


def test_training_sees_other_views_every_epoch_and_the_same_after_a_restart(folder):
    data = ready(folder)
    (batch, *_) = list(data.train_dataloader())
    images = torch.rand(4, 1, 24, 24)

    def views(epoch, batch=batch, images=images):
        data.trainer = Stage(training=True, current_epoch=epoch)
        return data.on_after_batch_transfer(batch | {"image": (images * 255).to(torch.uint8)}, 0)["image"]

    assert views(0).shape == (4, 1, 20, 20)
    assert torch.equal(views(0), views(0)) and not torch.equal(views(0), views(1))
    # A sample keeps its view whatever shares its batch, for instance on two processes.
    half = {key: value[::2] for key, value in batch.items()}
    torch.testing.assert_close(views(0, half, images[::2]), views(0)[::2], rtol=0, atol=1e-5)
    # Padding is black before normalisation.
    white = torch.ones_like(images)
    assert views(0, images=white).min() >= -0.8180 / 0.1748 - 1e-5


def test_without_augmentation_training_sees_the_images_as_they_are(folder):
    data = ready(folder, augment=False)
    data.trainer = Stage(training=True)
    (batch, *_) = list(data.train_dataloader())
    assert batch["image"].shape == (4, 1, 20, 20)
    torch.testing.assert_close(data.on_after_batch_transfer(batch, 0)["image"], data.normalized(batch)["image"])


def test_prediction_goes_through_a_part_several_times_and_is_written_once(folder):
    data = ready(folder, predict_part="train", repeat=3, eval_batch_size=5)
    tables, seen = [], 0
    for batch in data.predict_dataloader():
        assert batch["image"].shape[-1] == 20
        seen += len(batch["index"])
        outputs = {
            "index": batch["index"],
            "prediction": batch["label"],
            "probability": torch.full((len(batch["index"]),), 0.25),
        }
        tables.append(data.prediction_table(outputs | {"target": batch["label"]}))
    table = pd.concat(tables)
    assert seen == 36 and len(table) == 12
    assert list(table.columns) == ["image", "prediction", "probability", "label", "origin"]
    assert table["image"].tolist() == pd.read_csv(folder / "train.csv")["image"].tolist()
    assert table["prediction"].tolist() == pd.read_csv(folder / "train.csv")["label"].tolist()


def test_held_out_images_without_labels_can_only_be_predicted(folder):
    data = ready(folder, predict_part="test")
    (batch, *_) = list(data.predict_dataloader())
    assert "label" not in batch
    with pytest.raises(ValueError, match=r"test images have no labels.*test=false"):
        data.test_dataloader()


def test_missing_files_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv .*data\.train_file=none\.csv.*from: the moon"):
        XrayDataModule(str(folder), train_file="none.csv", source="the moon").setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no folder .*pictures: set data\.image_folder"):
        XrayDataModule(str(folder), image_folder="pictures").setup("fit")
    with pytest.raises(ValueError, match=r"the val part has no labels"):
        XrayDataModule(str(folder), val_file="test.csv").setup("validate")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"repeat": 0}, r"data\.repeat=0"),
        ({"std": 0}, r"data\.std=0"),
        ({"flip_probability": 2}, r"data\.flip_probability=2"),
        ({"padding": -1}, r"data\.padding=-1"),
        ({"predict_part": "next"}, r"data\.predict_part='next' is unknown; use one of train, val, test"),
        ({"image_size": 224}, r"data\.stored_size=220, and a network for images of that size: model=xray_vgg$"),
        ({"image_size": 64}, r"data\.stored_size=60, and a network for images of that size: model=xray_vgg_small$"),
        ({"image_size": 100}, r"No network takes .*model=xray_vgg_small: 32 to 95, model=xray_vgg: 122 to 607 pixels"),
        ({"image_size": 30}, r"data\.image_size=30 cannot be cut out of data\.stored_size=24.*data\.stored_size=26"),
    ],
)
def test_wrong_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        XrayDataModule("nowhere", **SIZES | options)


def test_the_models_that_a_message_names_take_the_sizes_that_it_names():
    for name, (least, most) in MODELS.items():
        stride = composed("experiment=energy_measurement/xray", f"model={name}").model.net.pool_stride
        fitting = [size for size in range(1, 1000) if final_size(size, stride) == 1]
        assert (fitting[0], fitting[-1]) == (least, most)

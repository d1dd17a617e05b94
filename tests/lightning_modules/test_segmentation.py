"""Segmenter: scores against torchmetrics, void pixels, learning, figures, the same numbers on several ranks."""

from __future__ import annotations

import os
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from callbacks.figures.segmentation import scenes
from datamodules.synthetic_scenes import SyntheticScenes
from lightning_modules.metrics.segmentation import PixelScores
from lightning_modules.segmentation import Segmenter
from networks.unet import UNet

SMALL = {"num_train": 96, "num_val": 16, "num_test": 22, "image_size": 16, "batch_size": 16, "eval_batch_size": 6}


def module(**options):
    torch.manual_seed(0)
    return Segmenter(UNet(4, 3, width=8, depth=2), partial(torch.optim.AdamW, lr=1e-2), **options)


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, use_distributed_sampler=False,
        **quiet | options,
    )  # fmt: skip


@pytest.mark.parametrize("ignored", [None, 255])
def test_scores_are_those_of_torchmetrics(ignored):
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(4, (9, 8, 8), generator=generator)
    label[label == 2] = 1  # a class that is only predicted
    prediction = torch.where(torch.rand(label.shape, generator=generator) < 0.6, label, 3 - label)
    if ignored is not None:
        label[torch.rand(label.shape, generator=generator) < 0.2] = ignored
    scores = PixelScores(5, ignored)  # one class that nobody has
    theirs = MulticlassJaccardIndex(5, average=None, ignore_index=ignored)
    for part in (slice(0, 4), slice(4, 9)):
        scores.update(prediction[part], label[part])
        theirs.update(prediction[part], label[part])
    found = scores.compute()
    torch.testing.assert_close(found["iou"][:4], theirs.compute()[:4].double(), atol=1e-6, rtol=0)
    assert found["iou"][4].isnan() and found["miou"] == found["iou"][:4].mean()
    kept = label != (-1 if ignored is None else ignored)
    assert found["pixel_accuracy"] == (prediction == label)[kept].double().mean()


def test_void_pixels_do_not_count():
    net = torch.nn.Conv2d(3, 4, 1)
    batch = {"image": torch.randn(2, 3, 6, 6), "label": torch.randint(4, (2, 6, 6)), "index": torch.arange(2)}
    half = batch | {"label": batch["label"].clone()}
    half["label"][:, :3] = 255
    step = Segmenter(net, ignore_index=255)._logits_and_loss
    _, loss, number = step(half)
    lower = {"image": batch["image"][:, :, 3:], "label": batch["label"][:, 3:], "index": batch["index"]}
    torch.testing.assert_close(loss, step(lower)[1])
    assert number == 36
    half["label"].fill_(255)
    assert step(half)[1] == 0  # and not NaN


def test_it_learns_to_see_scenes(tmp_path):
    model = module()
    run = trainer(tmp_path, max_epochs=40)
    data = SyntheticScenes(**SMALL)
    run.fit(model, datamodule=data)
    (found,) = run.test(model, datamodule=data, verbose=False)
    assert found["test/miou"] > 0.6 and found["test/pixel_accuracy"] > 0.85
    names = [f"test/iou/{name}" for name in data.class_names]
    assert found["test/miou"] == pytest.approx(sum(found[name] for name in names) / 4)


def shares(folder):
    """Metrics of a run with synchronised statistics, of this process or of two."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if world > 1:
        os.environ["WORLD_SIZE"] = str(world)  # the teardown of a run before has removed it
    from strategies.ddp import DDP

    model, data = module(), SyntheticScenes(**SMALL)
    options = {"strategy": DDP(), "devices": 2, "sync_batchnorm": True} if world > 1 else {}
    run = trainer(folder, max_epochs=1, **options)
    model.double()
    data.setup("fit")
    for part in ("train", "val", "test"):
        data.part(part).image = data.part(part).image.double()
    run.fit(model, datamodule=data)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    run.test(model, datamodule=data, verbose=False)
    return found | {name: float(value) for name, value in run.callback_metrics.items()}


def test_two_processes_with_synchronised_statistics_are_one(ranks2, tmp_path):
    alone = shares(str(tmp_path))
    for found in ranks2(shares, str(tmp_path)):
        assert found.keys() == alone.keys() and {"val/miou", "test/miou", "train/pixel_accuracy"} <= found.keys()
        assert found == pytest.approx(alone, abs=1e-9)


def test_the_figure_shows_images_truth_and_what_was_found():
    data = SyntheticScenes(**SMALL)
    part = data.part("test")
    index = torch.tensor([3, 0, 2, 1])
    outputs = {"index": index, "target": part.label[index], "prediction": part.label[index].clone()}
    outputs["prediction"][1, :4] = 3
    figure = scenes(outputs, data, number=3)
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(panels) == 12
    assert [panel.std() > 0 for panel in panels[9:]] == [True, False, False]  # only image 0 has wrong pixels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(data.class_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, r"model\.num_classes=1"),
        ({"ignore_index": 2}, r"model\.ignore_index=2 is one of the 4 classes"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(torch.nn.Conv2d(3, 4, 1), **options)


def test_network_and_data_must_fit(tmp_path):
    model = Segmenter(UNet(3, 3, width=4, depth=1), partial(torch.optim.SGD, lr=0.1), num_classes=3)
    with pytest.raises(ValueError, match=r"model\.num_classes=3, but the data have 4: set model\.num_classes=4"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=SyntheticScenes(**SMALL))
    model = Segmenter(UNet(4, 1, width=4, depth=1), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"model\.net\.num_channels=1, but the data have 3"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=SyntheticScenes(**SMALL))
    model = Segmenter(UNet(4, 3, width=4, depth=5), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"data\.image_size=48: the network takes multiples of 32, such as 32 or 64"):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=SyntheticScenes(**SMALL | {"image_size": 48}))

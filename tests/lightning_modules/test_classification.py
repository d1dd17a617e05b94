"""The classifier as a Trainer runs it: metrics by other code, on two ranks, learning, resuming, mistakes."""

from __future__ import annotations

import functools

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from callbacks.predictions import PredictionWriter
from datamodules.images import Images
from lightning_modules.classification import Classifier
from lightning_modules.metrics.classification import ClassificationScores, Separation
from lightning_modules.schedules import WarmupCosine
from networks.cnn import CNN
from networks.mlp import MLP
from networks.resnet import ResNet
from networks.vgg import VGG
from networks.vit import ViT
from tests.lightning_modules.tiny_series import quiet_trainer

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
DIGITS = {"test_size": 360, "test_from": "random", "normalize": "none"}
# 151 test images: neither ranks nor batches share them evenly.
FEW = DIGITS | {"test_size": 151, "max_train": 200, "batch_size": 20, "eval_batch_size": 40}


@pytest.fixture(autouse=True)
def seeded():
    pl.seed_everything(0, verbose=False)


def run(module, data, *stages, **kwargs) -> dict[str, float]:
    """Metrics of all stages."""
    kwargs.setdefault("max_epochs", 1)
    trainer = quiet_trainer(**kwargs)
    values = {}
    for stage in stages:
        getattr(trainer, stage)(module, datamodule=data, **({} if stage == "fit" else {"verbose": False}))
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return values


# --- scores -----------------------------------------------------------------------------------------------------------


def expected_scores(logits: torch.Tensor, label: torch.Tensor, bins: int = 15) -> dict[str, float]:
    """The same scores by torchmetrics' functions, or straight from their definitions."""
    number = logits.shape[1]
    probability = logits.double().softmax(1)
    options = {"num_classes": number}
    return {
        "accuracy": multiclass_accuracy(probability, label, average="micro", **options).item(),
        "top3_accuracy": multiclass_accuracy(probability, label, average="micro", top_k=3, **options).item(),
        "nll": F.cross_entropy(logits.double(), label).item(),
        "brier": ((probability - F.one_hot(label, number)) ** 2).sum(1).mean().item(),
        "ece": multiclass_calibration_error(probability, label, n_bins=bins, **options).item(),
        "f1_macro": multiclass_f1_score(probability, label, average="macro", **options).item(),
    }


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_scores_are_those_of_other_code(scale, batch):
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 6, (500,), generator=generator)
    label[label == 4] = 5  # a class that is only ever predicted
    logits = scale * (torch.randn(500, 6, generator=generator) + F.one_hot(label, 6))
    scores = ClassificationScores(6, top_k=3)
    for part, truth in zip(logits.split(batch), label.split(batch), strict=True):
        scores.update(part, truth)
    found = {name: value.item() for name, value in scores.compute().items()}
    expected = expected_scores(logits, label)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-6), name


def test_scores_that_are_known():
    scores = ClassificationScores(4, top_k=None, num_bins=10)
    scores.update(torch.zeros(8, 4), torch.arange(8) % 4)
    found = {name: value.item() for name, value in scores.compute().items()}
    # Probabilities of a quarter: a quarter is right, so that it is calibrated; every prediction is class 0.
    assert found == pytest.approx(
        {"accuracy": 0.25, "nll": np.log(4), "brier": 0.75, "ece": 0.0, "f1_macro": 0.4 / 4}, abs=1e-12
    )
    scores.reset()
    scores.update(torch.eye(4).repeat(2, 1) * 1e4, torch.tensor([0, 1, 2, 3, 0, 1, 2, 0]))
    found = {name: value.item() for name, value in scores.compute().items()}
    assert found["accuracy"] == 7 / 8 and found["ece"] == 1 / 8 and found["brier"] == 2 / 8
    scores.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(value.isnan() for value in scores.compute().values())


# --- as a Trainer runs it ---------------------------------------------------------------------------------------------


def test_what_is_logged_is_what_the_network_says():
    data, module = Images(**FEW), Classifier(MLP(hidden=[16]), SGD, top_k=3, label_smoothing=0.1)
    found = run(module, data, "fit", "validate", "test")
    for stage in ("val", "test"):
        batch = next(iter(data._loader(stage, 1000)))
        with torch.no_grad():
            logits = module(data.normalized(batch)["image"])
        expected = expected_scores(logits, batch["label"])
        expected["loss"] = F.cross_entropy(logits, batch["label"], label_smoothing=0.1).item()
        assert {name.split("/")[1] for name in found if name.startswith(stage)} == set(expected)
        for name, value in expected.items():
            assert found[f"{stage}/{name}"] == pytest.approx(value, rel=1e-5), name
    assert {"train/loss", "train/accuracy"} <= found.keys()


def test_training_reports_the_batches_it_was_trained_on():
    """With a rate of zero these are the training images as they are."""
    data, module = Images(**FEW), Classifier(MLP(hidden=[16]), functools.partial(torch.optim.SGD, lr=0.0))
    found = run(module, data, "fit")
    batch = next(iter(data._loader("train", 1000)))
    with torch.no_grad():
        logits = module(data.normalized(batch)["image"])
    assert len(logits) == 180  # nothing is dropped: 9 batches of 20
    assert found["train/loss"] == pytest.approx(F.cross_entropy(logits, batch["label"]).item(), rel=1e-5)
    assert found["train/accuracy"] == pytest.approx((logits.argmax(1) == batch["label"]).float().mean().item())


def test_outputs_of_the_steps():
    data, module = Images(**FEW), Classifier(MLP(hidden=[16]))
    data.setup("fit")
    batch = data.normalized(next(iter(data.val_dataloader())))
    with torch.no_grad():
        out, predicted = module.test_step(batch, 0), module.predict_step(batch, 0)
    assert out.keys() == {"loss", "prediction", "target", "probability", "index"}
    assert predicted.keys() == out.keys() - {"loss"}
    assert out["probability"].shape == (len(batch["label"]), 10)
    torch.testing.assert_close(out["probability"].sum(1), torch.ones(len(batch["label"])))
    assert torch.equal(out["prediction"], out["probability"].argmax(1)) and torch.equal(out["index"], batch["index"])
    del batch["label"]
    assert "target" not in module.predict_step(batch, 0)


def test_batches_count_as_their_first_tensor():
    """What the energy record divides joules by: no hook is needed, dimension 0 of the first tensor is the samples."""
    data = Images(**FEW)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(next(iter(batch.values()))) == len(batch["index"]) == data.batch_size


def test_table_of_predictions(tmp_path):
    data = Images(**FEW)
    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path, "predictions.csv")])
    module = Classifier(MLP(hidden=[16]))
    trainer.predict(module, datamodule=data, return_predictions=False)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert list(table.columns) == ["image", "prediction", "probability", "label", "origin"]
    assert table["image"].tolist() == data.images("test").names
    assert table["label"].tolist() == data.images("test").labels.tolist()
    batch = next(iter(data._loader("test", 1000)))
    with torch.no_grad():
        probability = module(data.normalized(batch)["image"]).softmax(1)
    assert table["prediction"].tolist() == probability.argmax(1).tolist()
    np.testing.assert_allclose(table["probability"], probability.max(1).values, atol=1e-6)


def _on_ranks(devices: int) -> dict[str, float]:
    torch.manual_seed(3)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    data = Images(**FEW, augment=True, padding=1)
    module = Classifier(MLP(hidden=[16]), SGD, functools.partial(WarmupCosine, total_epochs=2, warmup=1))
    return run(module, data, "fit", "test", max_epochs=2, devices=devices, strategy=strategy)


def test_two_ranks_report_what_one_process_reports(ranks2):
    """Training on global batches of 20 with random views, 151 test images."""
    alone = _on_ranks(1)
    first, second = ranks2(_on_ranks, 2)
    assert {"train/loss", "val/loss", "test/ece", "test/f1_macro"} <= alone.keys() == first.keys()
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
        assert second[name] == first[name]


def test_digits_are_learnt_in_seconds():
    """The settings of experiment=classification: 0.97 to 0.98 when written."""
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=15)
    module = Classifier(MLP(), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), cosine)
    found = run(module, Images(**DIGITS), "fit", "test", max_epochs=15)
    assert found["test/accuracy"] >= 0.95 and found["test/top5_accuracy"] >= 0.99
    assert found["test/ece"] < 0.05 and found["train/accuracy"] > 0.99


# --- images that the network cannot know ------------------------------------------------------------------------------


def test_the_area_under_the_curve_is_that_of_other_code():
    metric, rng = Separation(), np.random.default_rng(0)
    first = torch.from_numpy(rng.normal(0, 1, 500).round(1))  # with ties
    second = torch.from_numpy(rng.normal(0.7, 1, 300).round(1))
    for part in first.split(70):
        metric.update(part, second=False)
    for part in second.split(130):
        metric.update(part, second=True)
    truth = torch.cat([torch.zeros(500), torch.ones(300)]).int()
    scores = torch.cat([first, second])
    expected = binary_auroc((scores - scores.min()) / (scores.max() - scores.min()), truth)
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-6)
    pairs = (second[:, None] > first).double() + 0.5 * (second[:, None] == first).double()
    assert float(metric.compute()) == pytest.approx(float(pairs.mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "area"),
    [([1.0, 2.0], [3.0, 4.0], 1.0), ([3.0], [1.0, 2.0], 0.0), ([1.0, 1.0], [1.0], 0.5), ([], [1.0], float("nan"))],
)
def test_areas_that_are_known(first, second, area):
    metric = Separation()
    metric.update(torch.tensor(first), second=False)
    metric.update(torch.tensor(second), second=True)
    assert float(metric.compute()) == pytest.approx(area, nan_ok=True)


def few_digits(**options):
    return Images(**FEW | {"max_train": None, "classes": [0, 1, 2, 3, 4], "test_size": 151} | options)


def unknown_digits(**options):
    return Images(**FEW | {"max_train": None, "classes": [5, 6, 7, 8, 9], "test_size": 97} | options)


def test_entropy_tells_unknown_digits_from_known_ones():
    data = few_digits(ood=unknown_digits())
    module = Classifier(MLP(5, hidden=[64]), SGD, num_classes=5, top_k=None)
    values = run(module, data, "fit", "test", max_epochs=10)
    with torch.no_grad():
        known, other = (
            torch.cat([module.net(convert(batch)["image"]) for batch in loader])
            for loader, convert in zip(data.test_dataloader(), (data.normalized, data.unknown), strict=True)
        )
    assert (len(known), len(other)) == (151, 97)
    entropy = [-(p * p.log()).sum(1) for p in (logits.double().softmax(1) for logits in (known, other))]
    area = (entropy[1][:, None] > entropy[0]).double().mean()
    assert values["test/ood_auroc_entropy"] == pytest.approx(float(area), abs=1e-9)
    assert area > 0.85
    # The other scores are those of a test without unknown images.
    without = run(module, few_digits(), "test")
    assert without == {name: value for name, value in values.items() if name in without} and len(without) == 6


def separated(devices):
    pl.seed_everything(0, verbose=False)
    data = few_digits(ood=unknown_digits(test_size=3))  # one batch: a rank has two images, the other one
    module = Classifier(MLP(5, hidden=[8]), SGD, num_classes=5, top_k=None)
    options = {"devices": devices, "strategy": DDPStrategy() if devices == 2 else "auto"}
    return run(module, data, "test", **options)


def test_two_ranks_separate_as_one_process_does(ranks2):
    alone = separated(1)
    for values in ranks2(separated, 2):
        assert values == pytest.approx(alone, abs=1e-6) and 0 < values["test/ood_auroc_entropy"] < 1


def test_unknown_images_are_brought_to_the_size_and_scale_of_the_known_ones(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (20, 16, 16, 1)).astype(np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(20) % 2 for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays)
    other = Images("npz", "a.npz", str(tmp_path))
    data = few_digits(ood=other, normalize="dataset")
    data.setup("test")
    seen = data.unknown(next(iter(data.test_dataloader()[1])))["image"]
    assert seen.shape == (20, 1, 8, 8)
    pixels = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2) / 255
    smooth = F.interpolate(pixels, (8, 8), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(seen, (smooth - data.mean[0]) / data.std[0])


def test_unknown_images_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.ood\.ood: unknown images have no unknown images"):
        few_digits(ood=unknown_digits(ood=unknown_digits()))
    color = Images("synthetic", max_train=20, max_test=8, num_classes=2, num_channels=3, image_size=8)
    with pytest.raises(ValueError, match=r"data\.ood: synthetic images has 3 channels, the embedded digits has 1: set"):
        few_digits(ood=color).setup("test")


def test_shifted_images_are_harder():
    module, data = Classifier(MLP(hidden=[64]), SGD), Images(**DIGITS)
    plain = run(module, data, "fit", "test", max_epochs=8)
    for shift in ("gaussian_noise", "rotation"):
        shifted = run(module, Images(**DIGITS, shift=shift, severity=5), "test")
        assert shifted["test/accuracy"] < plain["test/accuracy"] - 0.2 and shifted["test/nll"] > plain["test/nll"]


@pytest.mark.parametrize(
    "net",
    [
        functools.partial(CNN, widths=(16, 32)),
        functools.partial(ResNet, 18, num_channels=1, num_classes=10, stem="cifar", width=0.125),
        functools.partial(ViT, 10, 1, 8, 2, 32, 2, 4),
    ],
    ids=["cnn", "resnet", "vit"],
)
def test_every_network_learns_a_few_images_by_heart(net):
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    data = Images(**DIGITS | {"max_train": 60, "batch_size": 20, "val_fraction": 0, "normalize": "dataset"})
    found = run(Classifier(net(), adam), data, "fit", max_epochs=60)
    assert found["train/accuracy"] > 0.95


def test_vgg_learns_images_of_32_pixels():
    kind = {"num_classes": 4, "num_channels": 1, "image_size": 32}
    data = Images(reader="synthetic", max_train=200, max_test=64, batch_size=20, **kind)
    net = VGG(11, 4, 1, width=0.125, pool_stride=2, image_size=32)
    adam = functools.partial(torch.optim.Adam, lr=3e-3)
    found = run(Classifier(net, adam, num_classes=4, top_k=2), data, "fit", "test", max_epochs=10)
    assert found["test/accuracy"] > 0.8


def test_channels_last_computes_the_same():
    torch.manual_seed(0)
    net = CNN(widths=(8, 16))
    first = Classifier(net).eval()
    images = torch.randn(4, 1, 8, 8)
    expected = first(images)
    last = Classifier(net, channels_last=True).eval()
    seen = []
    net.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.testing.assert_close(last(images.repeat(1, 1, 1, 1)), expected)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert net.features[4].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    def fit(epochs, checkpoint=None):
        pl.seed_everything(0, verbose=False)
        schedule = functools.partial(WarmupCosine, total_epochs=4, warmup=1)
        module = Classifier(MLP(hidden=[16]), SGD, schedule, scheduler_interval="step")
        trainer = quiet_trainer(max_epochs=epochs)
        trainer.fit(module, datamodule=Images(**FEW, augment=True, padding=1), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.state_dict(), float(trainer.callback_metrics["train/loss"])

    whole = fit(4)
    fit(2)
    resumed = fit(4, tmp_path / "2.ckpt")
    assert whole[1] == resumed[1]
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())


def test_statistics_of_the_training_are_in_the_checkpoint(tmp_path):
    module = Classifier(MLP(hidden=[16]), SGD)
    data = Images(**FEW | {"normalize": "dataset"})
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = Images(**DIGITS | {"normalize": "dataset", "max_train": 10, "val_fraction": 0})
    quiet_trainer().test(module, datamodule=other, ckpt_path=str(tmp_path / "x.ckpt"), weights_only=True, verbose=False)
    assert other.mean == data.mean and other.std == data.std


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 1}, r"model\.num_classes=1"),
        ({"label_smoothing": 1.0}, r"model\.label_smoothing=1\.0: must be at least 0 and below 1"),
        ({"num_classes": 4}, r"model\.top_k=5: must be 1 to 4 \(model\.num_classes\), or null"),
        ({"top_k": 0}, r"model\.top_k=0"),
        ({"num_bins": 0}, r"model\.num_bins=0"),
        ({"scheduler_interval": "day"}, r"model\.scheduler_interval='day'"),
    ],
)
def test_wrong_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Classifier(MLP(), **options)


@pytest.mark.parametrize(
    ("net", "options", "match"),
    [
        (
            MLP(num_channels=3),
            {},
            r"the model expects 3 channels, the data have 1: set data\.to_rgb=true data\.num_channels=3 or "
            r"model\.net\.num_channels=1",
        ),
        (MLP(num_classes=5), {}, r"model\.net\.num_classes=5, but model\.num_classes=10"),
        (MLP(num_classes=5), {"num_classes": 5}, r"model\.num_classes=5, but the data have 10 classes"),
    ],
)
def test_networks_that_do_not_fit_the_data_are_named(net, options, match):
    with pytest.raises(ValueError, match=match):
        run(Classifier(net, SGD, **options), Images(**FEW), "fit")


def test_any_module_without_attributes_of_its_own_is_taken():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert 0 <= run(Classifier(net), Images(**FEW), "test")["test/accuracy"] <= 1

"""The two workloads of the energy study as a Trainer runs them."""

from __future__ import annotations

import functools
import json
import warnings

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from callbacks.predictions import PredictionWriter
from datamodules.electric_load import ElectricLoadDataModule
from datamodules.synthetic_load import SyntheticLoadDataModule
from datamodules.synthetic_xray import SyntheticXrayDataModule
from lightning_modules.workloads import LoadLSTM, XrayVGG
from networks.load_lstm import WeekAheadLSTM
from networks.vgg import VGG
from tests.composing import SERIES
from tests.datamodules.files import hourly_values, write_wide
from tests.lightning_modules.tiny_series import quiet_trainer

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
LOADS = {"num_days": 85, "num_countries": 3, "origin_stride": 12}
XRAYS = {"num_train": 64, "num_val": 20, "num_test": 13, "batch_size": 16, "eval_batch_size": 4}
SMALL_VGG = {"depth": 11, "width": 0.25, "pool_stride": 2, "image_size": 64}


class LastWeek(nn.Module):
    """The forecast that MASE compares with; the parameter changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, history):
        return history + 0 * self.unused


class Linear(nn.Module):
    """A linear classifier of 64 x 64 pixels: no batch statistics, so that ranks compute what one process computes."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64 * 64, 2)

    def forward(self, image):
        return self.classifier(image.flatten(1))


def run(module, data, *stages, **kwargs) -> dict[str, float]:
    """Metrics of all stages."""
    kwargs.setdefault("max_epochs", 1)
    trainer = quiet_trainer(**kwargs)
    values = {}
    for stage in stages:
        options = {} if stage == "fit" else {"verbose": False}
        getattr(trainer, stage)(module, datamodule=data, **options)
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return values


@pytest.fixture(autouse=True)
def seeded():
    pl.seed_everything(0, verbose=False)


# --- load -------------------------------------------------------------------------------------------------------------


def test_baselines_and_errors_by_brute_force(tmp_path):
    values = 1000 + 100 * hourly_values(150, 2)
    write_wide(tmp_path / "s.csv", values)
    data = ElectricLoadDataModule(
        "s.csv", str(tmp_path), layout="wide", time_column="ts", eval_batch_size=50, origin_stride=5
    )
    module = LoadLSTM(WeekAheadLSTM())
    found = run(module, data, "test")
    extent = np.ptp(values[:2160], axis=0)
    low = values[:2160].min(0)
    by_hour = np.stack([values[h:2160:168].mean(0) for h in range(168)])
    errors: dict[str, list] = {"": [], "previous_week_": [], "previous_day_": [], "seasonal_mean_": []}
    scaled, relative = [], []
    for c in range(2):
        for o in range(2880 + 168, 3600 - 168 + 1, 5):
            past, future = values[o - 168 : o, c], values[o : o + 168, c]
            with torch.no_grad():
                inputs = torch.tensor((past - low[c]) / extent[c], dtype=torch.float32)[None, :, None]
                forecast = module.net(inputs).numpy()[0, :, 0] * extent[c] + low[c]
            errors[""].append(np.abs(forecast - future))
            errors["previous_week_"].append(np.abs(past - future))
            errors["previous_day_"].append(np.abs(np.tile(past[-24:], 7) - future))
            errors["seasonal_mean_"].append(np.abs(by_hour[np.arange(o, o + 168) % 168, c] - future))
            scaled.append(errors[""][-1] / extent[c])
            relative.append(errors[""][-1] / future)
    for name, error in errors.items():
        assert found[f"test/{name}mae"] == pytest.approx(np.mean(error), rel=1e-5), name
    assert found["test/mae_scaled"] == pytest.approx(np.mean(scaled), rel=1e-5)
    assert found["test/mape_percent"] == pytest.approx(100 * np.mean(relative), rel=1e-5)
    assert found["test/loss"] == pytest.approx(np.mean(np.square(scaled)), rel=1e-5)


def test_repeating_last_week_has_a_mase_of_one():
    found = run(LoadLSTM(LastWeek()), SyntheticLoadDataModule(**LOADS), "validate", "test")
    assert found["val/mase"] == found["test/mase"] == 1
    assert found["val/mae"] == found["val/previous_week_mae"]
    assert not any("previous_day" in name for name in found if name.startswith("val/"))


def test_outputs_are_in_the_units_of_the_data():
    data = SyntheticLoadDataModule(**LOADS)
    data.setup()
    module = LoadLSTM(LastWeek())
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        out = module.validation_step(batch, 0)
    loads = data._values
    for i in (0, 5):
        series, origin = int(batch["series"][i]), int(batch["origin"][i])
        np.testing.assert_allclose(out["target"][i, :, 0], loads[series, origin : origin + 168], rtol=1e-5)
        np.testing.assert_allclose(out["prediction"][i, :, 0], loads[series, origin - 168 : origin], rtol=1e-5)
    assert {"loss", "series", "origin", "index"} <= out.keys()
    assert "loss" not in module.predict_step(batch, 0)


def test_a_short_training_learns_the_week():
    """30 epochs of 25 steps; the seed is fixed, the margin is wide."""
    data = SyntheticLoadDataModule(num_days=120, num_countries=2, origin_stride=4, batch_size=32)
    module = LoadLSTM(WeekAheadLSTM(), functools.partial(torch.optim.Adam, lr=1e-2))
    before = run(LoadLSTM(WeekAheadLSTM()), data, "validate")
    after = run(module, data, "fit", "test", max_epochs=15)
    assert after["val/mae_scaled"] < 0.3 * before["val/mae_scaled"]
    assert after["train/loss"] < 0.02
    assert after["test/mae"] < after["test/previous_day_mae"]


def test_forecasts_do_not_change_from_one_prediction_to_the_next(tmp_path):
    def predicted(module, folder):
        data = SyntheticLoadDataModule(**LOADS)
        trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path / folder)])
        trainer.predict(module, datamodule=data, return_predictions=False)
        return (tmp_path / folder / "forecast.csv").read_bytes()

    torch.manual_seed(0)
    module = LoadLSTM(WeekAheadLSTM(), weights=None)
    with pytest.warns(UserWarning, match="these weights are random"):
        first = predicted(module, "a")
    assert first == predicted(module, "b")
    legacy = LoadLSTM(WeekAheadLSTM(random_cell=True))
    assert predicted(legacy, "c") != predicted(legacy, "d")


def test_table_of_forecasts(tmp_path):
    data = SyntheticLoadDataModule(**LOADS, predict_part="train", repeat=5, eval_batch_size=64)
    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path)])
    trainer.predict(LoadLSTM(LastWeek()), datamodule=data, return_predictions=False)
    table = pd.read_csv(tmp_path / "forecast.csv", parse_dates=["origin"])
    assert table.shape == (len(data.windows("train")), 170)
    row = table.iloc[20]
    series, origin = data.channel_names.index(row["series"]), data.timestamps.get_loc(row["origin"])
    np.testing.assert_allclose(row.iloc[2:].astype(float), data._values[series, origin - 168 : origin], rtol=1e-5)
    assert table["series"].is_monotonic_increasing


def test_published_weights_and_legacy_evaluation(tmp_path):
    torch.manual_seed(5)
    torch.save(WeekAheadLSTM().state_dict(), tmp_path / "energy_baseline.pt")
    module = LoadLSTM(WeekAheadLSTM(), weights=str(tmp_path / "energy_baseline.pt"), legacy=True)
    data = SyntheticLoadDataModule(**LOADS, eval_batch_size=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="these weights")  # somebody trained them
        found = run(module, data, "test")
    percentages = []
    for batch in data.test_dataloader():
        units = {
            k: batch[k] * batch["scale"].view(-1, 1, 1) + batch["location"].view(-1, 1, 1)
            for k in ("history", "target")
        }
        low, high = units["history"].min(), units["history"].max()
        with torch.no_grad():
            forecast = module.net((units["history"] - low) / (high - low)) * (high - low) + low
        percentages.append(100 * (1 - forecast / units["target"]).abs())
    expected = torch.cat(percentages).double().mean().item()
    assert found["test/mape_batch_scaled_percent"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - found["test/mape_percent"]) > 1  # it is another number
    with pytest.raises(FileNotFoundError, match=r"model\.weights="):
        LoadLSTM(WeekAheadLSTM(), weights=str(tmp_path / "none.pt"))


def test_the_scaling_is_in_the_checkpoint(tmp_path):
    """Weights see the inputs that they were trained on, also where other data would be scaled in another way."""
    data = SyntheticLoadDataModule(**LOADS)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    module = LoadLSTM(WeekAheadLSTM(), ADAM)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(content["SyntheticLoadDataModule"]["scale"], data._scale)
    other = SyntheticLoadDataModule(**LOADS, data_seed=1)
    quiet_trainer().test(module, datamodule=other, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    assert torch.equal(other.target_scale[1], data.target_scale[1])


def test_optimizer_and_schedule():
    module = LoadLSTM(WeekAheadLSTM(), ADAM, functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=1, limit_val_batches=1)
    trainer.fit(module, datamodule=SyntheticLoadDataModule(**LOADS))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.125)
    with pytest.raises(ValueError, match=r"model\.loss='huber' is unknown; choose one of mse, l1"):
        LoadLSTM(WeekAheadLSTM(), loss="huber")
    with pytest.raises(ValueError, match=r"model\.scheduler_interval='day'"):
        XrayVGG(Linear(), scheduler_interval="day")


# --- X-ray ------------------------------------------------------------------------------------------------------------


def test_classification_metrics_by_brute_force():
    data = SyntheticXrayDataModule(**XRAYS)
    module = XrayVGG(VGG(**SMALL_VGG).eval())
    found = run(module, data, "validate", "test")
    for part, stage in (("val", "val"), ("test", "test")):
        images = data.images(part, 64)
        with torch.no_grad():
            stored = images.read(range(len(images.names)))
            logits = module.net((stored.float() / 255 - data.mean) / data.std)
        label, probability = images.labels.numpy(), logits.softmax(1)[:, 1].numpy()
        positive = probability > 0.5
        counts = {
            "true_negatives": (~positive & (label == 0)).sum(),
            "false_positives": (positive & (label == 0)).sum(),
            "false_negatives": (~positive & (label == 1)).sum(),
            "true_positives": (positive & (label == 1)).sum(),
        }
        pairs = probability[label == 1][:, None] - probability[label == 0]
        expected = counts | {
            "loss": torch.nn.functional.cross_entropy(logits, images.labels).item(),
            "accuracy": (positive == (label == 1)).mean(),
            "auroc": ((pairs > 0) + 0.5 * (pairs == 0)).mean(),
            "sensitivity": counts["true_positives"] / (label == 1).sum(),
            "specificity": counts["true_negatives"] / (label == 0).sum(),
        }
        assert {name.removeprefix(f"{stage}/") for name in found if name.startswith(stage)} == set(expected)
        for name, value in expected.items():
            assert found[f"{stage}/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_table_of_classes(tmp_path):
    data = SyntheticXrayDataModule(**XRAYS, predict_part="train", repeat=5)
    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path, "predictions.csv")])
    trainer.predict(XrayVGG(Linear()), datamodule=data, return_predictions=False)
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert len(table) == 64
    assert list(table.columns) == ["image", "prediction", "probability", "label", "origin"]
    assert ((table["probability"] > 0.5) == (table["prediction"] == "positive")).all()
    labels = data.images("train", 64).labels
    assert ((table["label"] == "positive") == (labels == 1).numpy()).all()
    assert table["image"].tolist() == data.images("train", 64).names


def test_training_takes_random_views_and_logs_both_numbers():
    data = SyntheticXrayDataModule(**XRAYS)
    module = XrayVGG(Linear(), functools.partial(torch.optim.SGD, lr=1e-3))
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append((module.training, inputs[0].clone())))
    found = run(module, data, "fit", max_epochs=2)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/auroc"} <= found.keys()
    training = torch.cat([images for in_training, images in seen if in_training])
    assert training.shape == (2 * 64, 1, 64, 64) and len(training.flatten(1).unique(dim=0)) == 128
    evaluated = torch.cat([images for in_training, images in seen if not in_training])
    assert evaluated.shape == (2 * 20, 1, 64, 64) and len(evaluated.flatten(1).unique(dim=0)) == 20


def test_one_class_alone_has_no_auroc():
    data = SyntheticXrayDataModule(**XRAYS)
    data.sizes["test"] = 1
    found = run(XrayVGG(Linear()), data, "test")
    assert np.isnan(found["test/auroc"]) and found["test/accuracy"] in (0, 1)


def test_a_few_images_are_learnt_by_heart():
    data = SyntheticXrayDataModule(num_train=32, num_val=4, num_test=4, batch_size=16, augment=False, contrast=3.0)
    sgd = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)
    found = run(XrayVGG(VGG(**SMALL_VGG), sgd), data, "fit", max_epochs=25, limit_val_batches=0)
    assert found["train/accuracy"] > 0.9


# --- both -------------------------------------------------------------------------------------------------------------


def _evaluate(kind: str, devices: int) -> dict[str, float]:
    torch.manual_seed(3)
    strategy = DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto"
    trainer = quiet_trainer(max_epochs=1, devices=devices, strategy=strategy)
    if kind == "load":
        # 19 test samples: two ranks cannot share them evenly.
        data = SyntheticLoadDataModule(num_days=90, num_countries=1, origin_stride=5, batch_size=8, eval_batch_size=6)
        module = LoadLSTM(WeekAheadLSTM(), functools.partial(torch.optim.SGD, lr=0.01))
    else:
        data = SyntheticXrayDataModule(**XRAYS)
        module = XrayVGG(Linear(), functools.partial(torch.optim.SGD, lr=1e-4))
    trainer.fit(module, datamodule=data)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, datamodule=data, verbose=False)
    return values | {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", ["load", "xray"])
def test_two_ranks_report_what_one_process_reports(ranks2, kind):
    alone = _evaluate(kind, 1)
    first, second = ranks2(_evaluate, kind, 2)
    assert {"train/loss", "val/loss", "test/loss"} <= alone.keys() == first.keys()
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), name
        assert second[name] == pytest.approx(first[name], nan_ok=True)


@pytest.mark.parametrize("kind", ["load", "xray"])
def test_batches_count_as_their_first_tensor(kind):
    """What the energy record divides joules by: no hook is needed, dimension 0 of the first tensor is the samples."""
    data = SyntheticLoadDataModule(**LOADS) if kind == "load" else SyntheticXrayDataModule(**XRAYS)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert len(next(iter(batch.values()))) == len(batch["index"]) == data.batch_size


def test_random_weights_are_reported_until_there_are_others(tmp_path):
    data = SyntheticXrayDataModule(**XRAYS)
    module = XrayVGG(Linear(), ADAM)
    with pytest.warns(UserWarning, match=r"these weights are random: energy and time are right.*ckpt_path="):
        run(module, data, "test")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(module, data, "test", "test")
    assert not [w for w in said if "these weights are random" in str(w.message)]  # once is enough
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = XrayVGG(Linear())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="these weights")
        trainer.test(module, datamodule=data, verbose=False)
        quiet_trainer().test(XrayVGG(Linear()), datamodule=data, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
        other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
        run(other, data, "test")


@pytest.mark.parametrize("kind", ["load", "xray"])
def test_the_inference_job_of_the_study_takes_what_its_training_job_has_learned(tmp_path, kind):
    from runner.resume import find_checkpoint
    from tests.composing import composed, plain

    study = ("experiment=energy_measurement", "data_dir=/nowhere")
    trained, evaluated = (
        plain(composed(*study, f"experiment/energy_measurement={job}", run_dir=tmp_path / str(number)))
        for number, job in enumerate((kind, f"{kind}_inference"))
    )
    best = tmp_path / "0" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    best.touch()
    assert find_checkpoint(evaluated) is None
    record = {"status": "completed", "config": trained, "best_checkpoint": str(best)}
    (tmp_path / "0" / "results.json").write_text(json.dumps(record))
    assert find_checkpoint(evaluated) == str(best)


# --- what the workloads reach -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not all((SERIES / f"ETTh{i}.csv").is_file() for i in (1, 2)), reason=f"no ETTh1.csv and ETTh2.csv in {SERIES}"
)
def test_three_epochs_on_fourteen_real_series_beat_last_week(tmp_path):
    """The settings of experiment=energy_measurement/load_ett: 3 x 2,213 steps; 0.063 to 0.064 against 0.0663."""
    from runner import job
    from tests.composing import composed, plain

    lean = ("logger=none", "num_threads=1", "callbacks=none", "test=false", f"data_dir={SERIES}")
    config = plain(composed("experiment=energy_measurement/load_ett", *lean, run_dir=tmp_path))
    result = job.run(config)
    assert result["status"] == "completed", result.get("error")
    metrics = result["metrics"]
    assert metrics["val/previous_week_mae_scaled"] == pytest.approx(0.0663, abs=2e-4)
    assert metrics["val/mae_scaled"] < metrics["val/previous_week_mae_scaled"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_small_vgg_sees_what_brightness_does_not_tell(tmp_path):
    """experiment=energy_measurement/xray: 384 steps of 32 images; a logistic model on brightness reaches 0.54."""
    from runner import job
    from tests.composing import composed, plain

    lean = ("logger=none", "num_threads=1", "callbacks=none")
    result = job.run(plain(composed("experiment=energy_measurement/xray", *lean, run_dir=tmp_path)))
    assert result["status"] == "completed", result.get("error")
    assert result["metrics"]["test/accuracy"] > 0.8
    assert result["metrics"]["test/auroc"] > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_load_beats_last_week(tmp_path):
    """The settings of experiment=energy_measurement/load."""
    from runner import job
    from tests.composing import composed, plain

    lean = ("logger=none", "num_threads=1", "callbacks=none")
    result = job.run(plain(composed("experiment=energy_measurement/load", *lean, run_dir=tmp_path)))
    assert result["status"] == "completed", result.get("error")
    assert result["metrics"]["test/mase"] < 1

from __future__ import annotations

import logging
import time

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules.electric_load import ElectricLoadDataModule
from datamodules.synthetic_load import SyntheticLoadDataModule, synthetic_loads
from tests.composing import SERIES
from tests.datamodules.files import hourly_values, write_wide

WEEK = 168
WIDE = {"layout": "wide", "time_column": "ts", "series_column": None, "value_column": None}


def written(path, values, **options) -> ElectricLoadDataModule:
    write_wide(path, values)
    return ElectricLoadDataModule(path.name, str(path.parent), **WIDE | options)


def ready(path, values, **options) -> ElectricLoadDataModule:
    data = written(path, values, **options)
    data.setup()
    return data


def every(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def in_units(batch, key):
    return (batch[key].squeeze(2) * batch["scale"][:, None] + batch["location"][:, None]).double().numpy()


# --- samples --------------------------------------------------------------------------------------------------------


def test_every_sample_by_brute_force(tmp_path):
    values = 1000 + 100 * hourly_values(150, 2)
    data = ready(tmp_path / "s.csv", values)
    bounds = {"train": (0, 2160), "val": (2160, 2880), "test": (2880, 3600)}
    low, extent = values[:2160].min(0), np.ptp(values[:2160], axis=0)
    hours = np.arange(2160) % WEEK
    mean = np.stack([values[:2160][hours == h].mean(0) for h in range(WEEK)])
    for part, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        start, stop = bounds[part]
        samples = loader.dataset
        number = stop - start - 2 * WEEK + 1
        assert len(samples) == 2 * number
        for index in (0, 1, number - 1, number, 2 * number - 1):  # index = series * number + t
            batch = samples.__getitems__([index])
            series, t = divmod(index, number)
            assert (int(batch["series"]), int(batch["origin"]), int(batch["index"])) == (
                series,
                start + t + WEEK,
                index,
            )
            past = values[start + t : start + t + WEEK, series]
            future = values[start + t + WEEK : start + t + 2 * WEEK, series]
            np.testing.assert_allclose(batch["history"][0, :, 0], (past - low[series]) / extent[series], atol=1e-6)
            np.testing.assert_allclose(batch["target"][0, :, 0], (future - low[series]) / extent[series], atol=1e-6)
            np.testing.assert_allclose(in_units(batch, "target")[0], future, rtol=1e-6)
            if part == "train":
                assert "seasonal_mean" not in batch
            else:
                steps = (start + t + WEEK + np.arange(WEEK)) % WEEK
                np.testing.assert_allclose(in_units(batch, "seasonal_mean")[0], mean[steps, series], rtol=1e-6)
    assert data.batch_keys == tuple(ElectricLoadDataModule.batch_keys)
    assert set(every(data.val_dataloader())) == set(data.batch_keys)
    change = np.abs(values[WEEK:2160] - values[: 2160 - WEEK]).mean(0)
    np.testing.assert_allclose(data.mase_scale, change, rtol=1e-6)


def test_scaling_knows_the_training_part_alone(tmp_path):
    values = hourly_values(150, 2)
    values[2500, 0], values[3300, 1] = 1e4, -1e4
    data = ready(tmp_path / "s.csv", values)
    low, extent = values[:2160].min(0), np.ptp(values[:2160], axis=0)
    np.testing.assert_allclose(data.target_scale[0], low, rtol=1e-6)
    np.testing.assert_allclose(data.target_scale[1], extent, rtol=1e-6)
    assert every(data.val_dataloader())["target"].max() > 100


def test_legacy_scales_each_part_by_itself_and_leaves_out_the_last_sample(tmp_path):
    values = hourly_values(150, 2)
    values[2200, 0] = 1e4
    data, legacy = ready(tmp_path / "s.csv", values), ready(tmp_path / "s.csv", values, legacy=True)
    for part in ("train", "val", "test"):
        assert len(legacy.windows(part)) == len(data.windows(part)) - 2
    whole = legacy._values[:, 2160:2880]
    np.testing.assert_allclose(legacy.windows("val").location, whole.amin(1))
    np.testing.assert_allclose(legacy.windows("val").scale, whole.amax(1) - whole.amin(1))
    batch = every(legacy.val_dataloader())
    assert batch["history"].min() >= 0 and batch["history"].max() == 1


def test_long_samples_in_a_hurry(tmp_path):
    """A batch of 64 takes well below a millisecond or two: the loader is no part of the measured energy."""
    data = ready(tmp_path / "s.csv", hourly_values(400, 14))
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    begin = time.process_time()
    for _ in range(50):
        next(iterator)
    assert (time.process_time() - begin) / 50 < 0.01


def test_stride_and_max_steps(tmp_path):
    data = ready(tmp_path / "s.csv", hourly_values(150, 2), origin_stride=24, max_steps=2400, splits=[0.5, 0.25, 0.25])
    assert len(data.timestamps) == 2400
    origins = data.windows("train").origins
    assert origins[:3].tolist() == [168, 192, 216] and int(origins[-1]) <= 1200 - WEEK
    assert len(origins) == 2 * len(range(168, 1200 - WEEK + 1, 24))


def test_gaps(tmp_path, caplog):
    values = hourly_values(150, 2)
    values[500:502, 0] = np.nan  # filled
    values[1000:1010, 1] = np.nan  # too long
    with caplog.at_level(logging.INFO):
        data = ready(tmp_path / "s.csv", values, max_gap=3)
    assert "12 values are missing, 2 of them were filled" in caplog.text
    number = 2160 - 2 * WEEK + 1
    samples = data.windows("train")
    assert (samples.series == 0).sum() == number
    assert (samples.series == 1).sum() == number - (2 * WEEK + 10 - 1)
    batch = every(data.train_dataloader())
    assert batch["history"].isfinite().all() and batch["target"].isfinite().all()
    np.testing.assert_allclose(data._values[0, 500:502], values[499, 0])
    with pytest.raises(ValueError, match=r"line 502.*data\.max_gap"):
        ready(tmp_path / "s.csv", values, max_gap=None)


def test_prediction_goes_through_a_part_several_times_and_is_written_once(tmp_path):
    data = ready(tmp_path / "s.csv", hourly_values(150, 2), predict_part="train", repeat=3, eval_batch_size=500)
    number = 2 * (2160 - 2 * WEEK + 1)
    tables = []
    seen = 0
    for batch in data.predict_dataloader():
        seen += len(batch["index"])
        outputs = {k: batch[k] for k in ("series", "origin", "index")} | {"prediction": batch["target"]}
        tables.append(data.prediction_table(outputs))
    table = pd.concat(tables)
    assert seen == 3 * number and len(table) == number
    assert list(table.columns) == ["series", "origin", *(f"step_{i}" for i in range(1, 169))]
    assert not table.duplicated(["series", "origin"]).any()
    row = table.iloc[5]
    assert row["series"] == "y0" and row["origin"] == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=WEEK + 5)


def test_next_week(tmp_path):
    values = hourly_values(150, 2)
    data = ready(tmp_path / "s.csv", values, predict_part="next")
    (batch,) = data.predict_dataloader()
    assert batch["origin"].tolist() == [3600, 3600] and "target" not in batch
    np.testing.assert_allclose(in_units(batch, "history"), values[-WEEK:].T, rtol=1e-5)
    table = data.prediction_table(
        {k: batch[k] for k in ("series", "origin", "index")} | {"prediction": batch["history"]}
    )
    assert (table["origin"] == data.timestamps[-1] + pd.Timedelta(hours=1)).all()
    values[-1, 0] = np.nan
    (batch,) = ready(tmp_path / "s.csv", values, predict_part="next", max_gap=0).predict_dataloader()
    assert batch["series"].tolist() == [1]


# --- the scaling travels with the checkpoint --------------------------------------------------------------------------


def test_a_checkpoint_brings_its_scaling(tmp_path, recwarn):
    values = hourly_values(150, 2)
    trained, other = ready(tmp_path / "s.csv", values), written(tmp_path / "o.csv", 2 * values)
    state = trained.state_dict()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state)  # before setup ...
    other.setup()
    assert torch.equal(other.target_scale[1], trained.target_scale[1])
    other = ready(tmp_path / "o.csv", 2 * values)
    assert not torch.equal(other.target_scale[1], trained.target_scale[1])
    other.load_state_dict(state)  # ... or after it
    assert torch.equal(other.windows("test").scale, trained.windows("test").scale)
    assert not recwarn.list
    strange = ready(tmp_path / "t.csv", hourly_values(150, 3))
    before = strange.target_scale[1]
    with pytest.warns(UserWarning, match="other series"):
        strange.load_state_dict(state)
    assert torch.equal(strange.target_scale[1], before)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window_length": 0}, r"data\.window_length=0"),
        ({"origin_stride": 0}, r"data\.origin_stride=0"),
        ({"repeat": 0}, r"data\.repeat=0"),
        ({"batch_size": 0}, r"data\.batch_size=0"),
        ({"max_gap": -1}, r"data\.max_gap=-1"),
        ({"predict_part": "all"}, r"data\.predict_part='all' is unknown; use one of train, val, test, next"),
        ({"splits": [0.5, 0.5]}, r"data\.splits=\[0\.5, 0\.5\] must be three numbers"),
        ({"splits": [0.8, 0.2, 0.2]}, r"data\.splits=.* add up to more than 1"),
        ({"splits": [100.5, 10, 10]}, r"data\.splits=.*whole numbers"),
        ({"layout": "tall"}, r"data\.layout='tall' is unknown"),
        ({"layout": "long", "series_column": None}, r"data\.layout=long needs data\.series_column"),
    ],
)
def test_wrong_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ElectricLoadDataModule("s.csv", **WIDE | options)


def test_wrong_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv .*data\.data_dir.*obtained from: the moon"):
        ElectricLoadDataModule("none.csv", str(tmp_path), source="the moon").prepare_data()
    with pytest.raises(ValueError, match=r"data\.window_length=168 steps are 1 days 18:00:00.*data\.window_length=672"):
        write_wide(tmp_path / "q.csv", hourly_values(20, 1), freq="15min")
        ElectricLoadDataModule("q.csv", str(tmp_path), **WIDE).setup()
    with pytest.raises(ValueError, match=r"the val part is shorter than two weeks \(336 steps\)"):
        ready(tmp_path / "s.csv", hourly_values(60, 1))
    with pytest.raises(ValueError, match=r"do not fit the 1440 steps of the data: they need 3000"):
        ready(tmp_path / "s.csv", hourly_values(60, 1), splits=[1000, 1000, 1000])
    values = hourly_values(150, 2)
    values[2160:2880, 1] = np.nan
    with pytest.raises(ValueError, match=r"series 'y1': no value from .*data\.targets"):
        ready(tmp_path / "s.csv", values)


def test_a_constant_series_stays_finite(tmp_path):
    values = hourly_values(150, 2)
    values[:, 1] = 7.0
    batch = every(ready(tmp_path / "s.csv", values).test_dataloader())
    assert batch["history"].isfinite().all()
    np.testing.assert_allclose(in_units(batch, "target")[batch["series"] == 1], 7.0)


# --- real and generated data ------------------------------------------------------------------------------------------


def test_embedded_load():
    data = ElectricLoadDataModule("hourly_electricity.csv", **WIDE, splits=[0.6, 0.2, 0.2])
    data.setup()
    assert len(data.timestamps) == 26_304 and len(data.windows("train")) == 15_782 - 335


@pytest.mark.skipif(not (SERIES / "ETTh1.csv").is_file(), reason=f"no ETTh1.csv in {SERIES}")
def test_ett_has_the_shape_of_the_study():
    options = WIDE | {"time_column": "date"}
    data = ElectricLoadDataModule(["ETTh1.csv", "ETTh2.csv"], str(SERIES), **options)
    data.setup()
    assert data._values.shape == (14, 17_420)
    assert data.channel_names[0] == "ETTh1/HUFL" and data.channel_names[-1] == "ETTh2/OT"
    assert len(data.windows("train")) == 14 * (10_452 - 335)
    batch = every(data.val_dataloader())
    error = (batch["history"] - batch["target"]).abs().mean().item()
    assert error == pytest.approx(0.0663, abs=2e-4)  # previous week, in parts of the training range


def test_generated_loads_differ_and_repeat():
    one, again, other = synthetic_loads(60, seed=1), synthetic_loads(60, seed=1), synthetic_loads(60, seed=2)
    assert one.values.shape == (1440, 14)
    np.testing.assert_array_equal(one.values, again.values)
    assert not np.allclose(one.values, other.values)
    mean = one.values.mean(0)
    assert mean.min() > 4000 and mean.max() < 90_000 and mean.max() / mean.min() > 2
    assert (one.values > 0).all()


def test_generated_loads_have_the_documented_parts():
    loads = synthetic_loads(7 * 60, 3, seed=0)
    noise = (loads.values - loads.expected) / loads.expected.mean(0)
    np.testing.assert_allclose(noise.std(0), 0.02, rtol=0.15)
    memory = (noise[1:] * noise[:-1]).mean(0) / noise.var(0)
    np.testing.assert_allclose(memory, 0.9, atol=0.04)
    by_day = loads.expected.reshape(-1, 24, 3).mean(1)
    weekday = loads.timestamps[::24].day_of_week
    assert (by_day[weekday == 6].mean(0) < by_day[weekday == 5].mean(0)).all()
    assert (by_day[weekday == 5].mean(0) < by_day[weekday < 5].mean(0)).all()
    by_hour = loads.expected.reshape(-1, 24, 3)[weekday < 5].mean(0)
    peaks = (by_hour > np.roll(by_hour, 1, 0)) & (by_hour > np.roll(by_hour, -1, 0))
    assert (peaks.sum(0) == 2).all()


def test_generated_loads_as_data():
    data = SyntheticLoadDataModule(num_days=70, num_countries=3, splits=[0.6, 0.2, 0.2])
    data.setup()
    assert data.channel_names == ["country_01", "country_02", "country_03"]
    assert len(data.windows("train")) == 3 * (1008 - 335) and len(data.windows("val")) == 3
    with pytest.raises(ValueError, match=r"data\.num_countries=0"):
        SyntheticLoadDataModule(num_countries=0)

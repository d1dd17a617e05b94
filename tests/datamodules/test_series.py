from __future__ import annotations

import hashlib
import logging
import time

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules.calendar import clock_marks, day_calendar
from datamodules.gaps import fill_gaps, mask_leading_zeros
from datamodules.series import EMBEDDED, SeriesDataModule
from networks.recycle.profile import RecentHistoricProfile
from tests.datamodules.files import hourly_values, write_long, write_wide

SMALL = {"history_length": 72, "horizon": 48, "batch_size": 4}


def module(path, **options) -> SeriesDataModule:
    targets = options.pop("targets", ["y"])
    return SeriesDataModule(path.name, targets, str(path.parent), **(SMALL | options))


def ready(path, **options) -> SeriesDataModule:
    data = module(path, **options)
    data.setup()
    return data


def every(loader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


# --- acceptance numbers -------------------------------------------------------------------------------------------


def test_traffic_windows_and_profile_error():
    data = SeriesDataModule("hourly_sf_traffic.csv", ["y"], country="US", frequency="1h")
    data.setup("fit")
    assert len(data.timestamps) == 731 * 24
    test = every(data.test_dataloader())
    assert (test["origin"] // 24).tolist() == list(range(584, 725)) and (test["origin"] % 24 == 0).all()
    assert every(data.val_dataloader())["origin"].tolist() == [24 * day for day in range(438, 578)]
    train = data.train_dataloader().dataset.origins
    assert train.tolist() == [24 * day for day in range(21, 432)]

    def profile_error(batch):
        return (batch["forecast_profile"].double() - batch["target"].double()).abs().mean().item()

    assert profile_error(test) == pytest.approx(0.2453286, abs=1e-6)
    data._origins["test"] = torch.arange(627, 724) * 24
    error = profile_error(every(data.test_dataloader()))
    assert error == pytest.approx(0.26918995, abs=1e-6)
    assert error * data.target_scale[1].item() == pytest.approx(0.016578434, abs=1e-7)


def test_embedded_files_are_unmodified():
    source = (EMBEDDED / "SOURCE.md").read_text()
    for name in ("hourly_sf_traffic.csv", "hourly_electricity.csv"):
        assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest() in source


def test_ett_protocol(tmp_path):
    path = write_wide(tmp_path / "ett.csv", hourly_values(726)[:17420])
    data = ready(path, history_length=336, horizon=96, any_origin=True, origin_stride=1, splits=[8640, 2880, 2880])
    origins = {part: data._origins[part] for part in ("train", "val", "test")}
    assert {part: (int(o[0]), int(o[-1]), len(o)) for part, o in origins.items()} == {
        "train": (336, 8640 - 96, 8640 - 336 - 96 + 1),
        "val": (8640, 11520 - 96, 2880 - 96 + 1),
        "test": (11520, 14400 - 96, 2880 - 96 + 1),
    }
    assert next(iter(data.predict_dataloader()))["origin"].tolist() == [17420]


# --- every key by brute force -------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_origin", [False, True])
@pytest.mark.parametrize(("cycle", "channels"), [(24, 1), (24, 3), (48, 2)])
def test_every_key_by_brute_force(tmp_path, cycle, channels, any_origin):
    history, horizon = 3 * cycle, 2 * cycle + (5 if any_origin else 0)
    values = hourly_values(60, channels, cycle_length=cycle)
    names = [f"y{i}" for i in range(channels)]
    freq = pd.Timedelta(days=1) / cycle
    path = write_wide(tmp_path / "s.csv", values, names=names, freq=freq, start="2023-12-11")
    data = ready(
        path, targets=names, country=["DE", "US", None][:channels], history_length=history, horizon=horizon,
        cycle_length=cycle, any_origin=any_origin, origin_stride=7 if any_origin else None,
        profile=RecentHistoricProfile(depth=2),
    )  # fmt: skip
    train_end = 36 * cycle
    location, scale = values[:train_end].mean(axis=0), values[:train_end].std(axis=0)
    torch.testing.assert_close(data.target_scale[0].double().numpy(), location, rtol=1e-6, atol=0)
    scaled = (values - location) / scale
    calendar = day_calendar(pd.Timestamp("2023-12-11"), 70, data.countries)
    marks = clock_marks(pd.date_range("2023-12-11", periods=70 * cycle, freq=freq), cycle)
    windows = data.test_dataloader().dataset
    chosen = [0, len(windows) // 2, len(windows) - 1]
    batch = windows.__getitems__(chosen)
    assert set(batch) == set(SeriesDataModule.batch_keys)
    for i, index in enumerate(chosen):
        o = int(batch["origin"][i])
        assert o == int(windows.origins[index])
        past, future = np.arange(o - history, o), np.arange(o, o + horizon)
        np.testing.assert_allclose(batch["history"][i], scaled[past], atol=1e-6)
        np.testing.assert_allclose(batch["target"][i], scaled[future], atol=1e-6)
        np.testing.assert_array_equal(batch["history_marks"][i], marks[past])
        np.testing.assert_array_equal(batch["forecast_marks"][i], marks[future])
        np.testing.assert_array_equal(batch["history_calendar"][i], calendar.vector[past[::cycle] // cycle])
        np.testing.assert_array_equal(batch["forecast_calendar"][i], calendar.vector[future[::cycle] // cycle])
        np.testing.assert_array_equal(batch["target_day_type"][i], calendar.day_type[future // cycle])
        np.testing.assert_array_equal(batch["target_holiday"][i], calendar.holiday[future // cycle])
        assert batch["valid"][i].all()

        def known_at_origin(step, c, o=o):
            """Mean of the last two values before o of the same step of the day and type of day."""
            day_type = calendar.day_type[step // cycle, c]
            days = [
                j for j in range(o // cycle + 1)
                if j * cycle + step % cycle < o and calendar.day_type[j, c] == day_type
            ]  # fmt: skip
            return np.mean([scaled[j * cycle + step % cycle, c] for j in days[-2:]]) if days else 0.0

        for key, steps in (("history_profile", past), ("forecast_profile", future)):
            expected = [[known_at_origin(step, c) for c in range(channels)] for step in steps]
            np.testing.assert_allclose(batch[key][i], expected, atol=1e-5)
    single = windows[chosen[1]]
    assert all(torch.equal(single[key], batch[key][1]) for key in batch)
    assert {batch[key].dtype for key in batch} == {torch.float32, torch.bool, torch.int64}


def test_covariates(tmp_path):
    values = hourly_values(40, 3)
    values[35 * 24 :, 0] = np.nan  # the weather forecast goes on, the load ends
    names = ["y", "wind", "temperature"]
    path = write_wide(tmp_path / "s.csv", values, names=names)
    data = ready(path, past_covariates=["wind"], known_covariates=["temperature"])
    assert len(data.timestamps) == 35 * 24
    train = values[: 21 * 24, 1:]
    scaled = (values[:, 1:] - train.mean(axis=0)) / train.std(axis=0)
    batch = every(data.test_dataloader())
    o = int(batch["origin"][0])
    np.testing.assert_allclose(batch["history_covariates"][0], scaled[o - 72 : o], atol=1e-6)
    np.testing.assert_allclose(batch["forecast_covariates"][0], scaled[o : o + 48, 1:], atol=1e-6)
    batch = next(iter(data.predict_dataloader()))
    np.testing.assert_allclose(batch["forecast_covariates"][0], scaled[35 * 24 : 37 * 24, 1:], atol=1e-6)

    values = hourly_values(35, 3)
    data = ready(write_wide(tmp_path / "short.csv", values, names=names), known_covariates=["temperature"])
    with pytest.raises(ValueError, match="known covariates of the next horizon"):
        data.predict_dataloader()


# --- no leakage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["z", "min_max", "abs_max", "none"])
def test_test_part_does_not_reach_training_or_scaler(tmp_path, scaling):
    values = hourly_values(60)
    boundary = 48 * 24
    values[boundary - 2 : boundary + 1] = np.nan  # a short gap across the border must not be bridged
    values[36 * 24 - 1] = np.nan
    changed = values.copy()
    changed[boundary:] = 1000 + 7 * changed[boundary:]
    kept, other = (
        ready(write_wide(tmp_path / name, v), scaling=scaling) for name, v in (("a.csv", values), ("b.csv", changed))
    )
    for part in ("train_dataloader", "val_dataloader"):
        first, second = every(getattr(kept, part)()), every(getattr(other, part)())
        assert all(torch.equal(first[key], second[key]) for key in first)
    for a, b in zip((*kept.target_scale, kept.mase_scale), (*other.target_scale, other.mase_scale), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(every(kept.test_dataloader())["target"], every(other.test_dataloader())["target"])


def test_inputs_never_depend_on_values_from_the_origin_on(tmp_path):
    values = hourly_values(40)
    origin = 34 * 24
    values[origin - 2 : origin] = np.nan
    changed = values.copy()
    changed[origin:] += 5
    batches = []
    for name, v in (("a.csv", values), ("b.csv", changed)):
        data = ready(write_wide(tmp_path / name, v))
        data._origins["test"] = torch.tensor([origin])
        batches.append(every(data.test_dataloader()))
    for key in set(batches[0]) - {"target"}:
        assert torch.equal(batches[0][key], batches[1][key]), key


def test_scales(tmp_path):
    values = hourly_values(60)
    path = write_wide(tmp_path / "s.csv", values)
    train = values[: 36 * 24]
    expected = {
        "z": (train.mean(), train.std()),
        "min_max": (train.min(), train.max() - train.min()),
        "abs_max": (0.0, np.abs(train).max()),
        "none": (0.0, 1.0),
    }
    for scaling, numbers in expected.items():
        data = ready(path, scaling=scaling)
        assert [x.item() for x in data.target_scale] == pytest.approx(numbers, rel=1e-6)
        weekly = np.abs(train[168:] - train[:-168]).mean()
        assert data.mase_scale.item() == pytest.approx(weekly, rel=1e-6)
    assert data.season_length == 168 and data.num_channels == 1 and data.channel_names == ["y"]


def test_constant_series_stays_finite(tmp_path):
    data = ready(write_wide(tmp_path / "s.csv", np.full((60 * 24, 1), 3.3)))
    assert data.target_scale[1].item() == 1.0 and data.mase_scale.item() > 0
    assert all(torch.isfinite(b["history"]).all() for b in data.test_dataloader())


# --- trimming, gaps, daylight saving ------------------------------------------------------------------------------


def test_partial_days_are_trimmed(tmp_path):
    values = hourly_values(41)[: 40 * 24]
    path = write_wide(tmp_path / "noon.csv", values, start="2024-01-01 12:00")
    data = ready(path)
    assert data.timestamps[0] == pd.Timestamp("2024-01-02") and len(data.timestamps) == 39 * 24
    assert (data.report["trimmed_leading_steps"], data.report["trimmed_trailing_steps"]) == (12, 12)
    data = ready(path, max_steps=20 * 24, splits=[0.5, 0.25, 0.25])
    assert data.timestamps[-1] == pd.Timestamp("2024-01-21 23:00")
    data = ready(path, day_start="06:00")
    assert data.timestamps[0] == pd.Timestamp("2024-01-02 06:00") and len(data.timestamps) == 39 * 24
    data = ready(path, any_origin=True)
    batch = next(iter(data.predict_dataloader()))
    assert batch["origin"].tolist() == [39 * 24 + 12]
    assert data.time_of(int(batch["origin"][0]), 1)[0] == pd.Timestamp("2024-02-10 12:00")
    with pytest.raises(ValueError, match=r"no step begins at data\.day_start=.*00:30"):
        ready(path, day_start="00:30")


def test_fill_gaps_interpolates_holds_at_origins_and_leaves_long_gaps():
    column = np.arange(20.0)
    column[[2, 3, 6, 7, 11, 12, 13, 14, 18, 19]] = np.nan
    values = column[:, None].copy()
    assert fill_gaps(values, 3, origin_stride=8).tolist() == [6]
    # 2-3 straight; 6-7 touch the origin 8: held; 11-14 too long; 18-19 before the end of the data: held
    expected = [0, 1, 2, 3, 4, 5, 5, 5, 8, 9, 10, *[np.nan] * 4, 15, 16, 17, 17, 17]
    np.testing.assert_array_equal(values[:, 0], expected)


def test_leading_zeros_of_a_day_or_more_are_missing():
    values = np.array([[0.0, 0.0, np.nan], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 2.0]])
    assert mask_leading_zeros(values, 2).tolist() == [3, 0, 2]
    np.testing.assert_array_equal(np.isnan(values).sum(axis=0), [3, 0, 3])


def test_gaps_make_windows_invalid_and_drop_them_when_nothing_is_left(tmp_path):
    values = hourly_values(60, 2)
    names = ["a", "b"]
    values[100:103, 0] = np.nan  # filled
    values[20 * 24 : 20 * 24 + 10, 0] = np.nan  # a only
    values[50 * 24 : 50 * 24 + 10] = np.nan  # both
    values[: 3 * 24, 1] = 0.0
    data = ready(write_wide(tmp_path / "s.csv", values, names=names), targets=names)
    report = data.report
    assert report["filled"] == {"a": 3} and report["leading_zeros"] == {"b": 72}
    assert report["missing"] == {"a": 23, "b": 82}
    # train origins 3..34; b misses days 0-2; a misses day 20: windows [o-3, o+2) that contain it
    train = every(data._loader(data._windows("train"), 100))
    days = (train["origin"] // 24).tolist()
    assert days == list(range(3, 35))
    for day, valid in zip(days, train["valid"].tolist(), strict=True):
        assert valid == [not day - 3 <= 20 < day + 2, day - 3 >= 3]
    assert report["partly_valid_windows"]["train"] == 5 + 3
    # test origins 48..58: day 50 in [o-3, o+2) for o = 49..53, day 48 looks to 49 only
    assert report["windows"]["test"] == 6 and report["dropped_windows"]["test"] == 5
    assert (every(data.test_dataloader())["origin"] // 24).tolist() == [48, 54, 55, 56, 57, 58]
    gap = train["history"][days.index(22), :, 0]
    assert (gap[24:34] == 0).all() and (gap[34:] != 0).all()
    location = data.target_scale[0]
    observed = values[: 36 * 24].copy()
    observed[:72, 1] = np.nan
    torch.testing.assert_close(location.numpy(), np.nanmean(observed, axis=0).astype(np.float32))


def test_no_gap_allowed(tmp_path):
    values = hourly_values(60)
    values[7] = np.nan
    with pytest.raises(ValueError, match=r"column 'y', line 9: .*data\.max_gap"):
        ready(write_wide(tmp_path / "s.csv", values), max_gap=None)


def test_all_windows_touch_gaps(tmp_path):
    values = hourly_values(60)
    values[::24][:40] = np.nan
    with pytest.raises(ValueError, match=r"every training window .* data\.max_gap"):
        ready(write_wide(tmp_path / "s.csv", values), max_gap=0)


def test_series_without_training_values(tmp_path):
    values = hourly_values(60, 2)
    values[: 40 * 24, 1] = np.nan
    with pytest.raises(ValueError, match=r"s\.csv, column 'y1': no value in the training part.*data\.splits"):
        ready(write_wide(tmp_path / "s.csv", values), targets=["y0", "y1"])


def test_23_and_25_hour_days_keep_midnight_at_midnight(tmp_path):
    aware = pd.date_range("2024-01-01", "2024-12-31", freq="1h", tz="Europe/Berlin", inclusive="left")
    value = aware.hour.to_numpy(dtype=float)
    path = write_wide(tmp_path / "s.csv", value[:, None], stamps=aware.tz_localize(None))
    data = ready(path, timezone="Europe/Berlin", scaling="none", country="DE", max_gap=None)
    assert data.report["dst_averaged"] == 1 and data.report["dst_interpolated"] == 1
    assert len(data.timestamps) == 365 * 24
    for part in (data._loader(data._windows("train"), 400), data.test_dataloader()):
        history = every(part)["history"].reshape(-1, 3, 24)
        assert (history == torch.arange(24.0)).all()


# --- errors before and while reading ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"horizon": 40},
            r"data\.horizon=40 is not a multiple of data\.cycle_length=24: use 24 or 48, or set .*any_",
        ),
        ({"horizon": 0}, r"data\.horizon=0 must be at least 1"),
        ({"history_length": 70}, r"data\.history_length=70 is not a multiple .*use 48 or 72"),
        ({"origin_stride": 5}, r"data\.origin_stride=5 .*any_origin=true"),
        ({"cycle_length": 7}, r"data\.cycle_length=7 does not cut the day"),
        ({"country": "USS"}, r"data\.country='USS' .*Did you mean"),
        ({"targets": []}, r"data\.targets is empty"),
        ({"targets": ["y", "y"]}, r"name \['y'\] twice"),
        ({"past_covariates": ["y"]}, r"name \['y'\] twice"),
        ({"scaling": "robust"}, r"data\.scaling='robust' is unknown: use one of z, min_max"),
        ({"splits": [0.6, 0.3, 0.2]}, r"data\.splits=.* add up to more than 1"),
        ({"splits": [0.6, 0.4]}, r"data\.splits=.* must be three numbers"),
        ({"splits": [600.5, 48, 48]}, r"data\.splits=.* whole numbers of steps"),
        ({"splits": [600, 48, 50]}, r"not multiples of data\.cycle_length=24"),
        ({"max_gap": -1}, r"data\.max_gap=-1 must not be negative"),
        ({"frequency": "hourly"}, r"data\.frequency='hourly' is not a time span"),
        ({"timezone": "Berlin"}, r"data\.timezone='Berlin' is unknown"),
        ({"day_start": "noon"}, r"data\.day_start='noon' is not a time of day"),
        ({"layout": "tall"}, r"data\.layout='tall' is unknown"),
        ({"layout": "long"}, r"data\.layout=long needs data\.series_column"),
    ],
)
def test_arguments_are_checked_before_any_file_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        module(tmp_path / "absent.csv", **options)
    assert "\n" not in str(error.value)


def test_missing_file_says_where_to_get_it(tmp_path):
    data = module(tmp_path / "absent.csv", source="https://example.org/absent.csv")
    for call in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError) as error:
            call()
        text = str(error.value)
        assert str(tmp_path / "absent.csv") in text and "data.data_dir" in text and "https://example.org" in text


def test_wrong_frequency_for_the_cycle(tmp_path):
    path = write_wide(tmp_path / "s.csv", hourly_values(60, cycle_length=48), freq="30min")
    with pytest.raises(ValueError, match=r"set data\.cycle_length=48, or data\.resample to 0 days 01:00:00"):
        ready(path)
    assert len(ready(path, resample="1h").timestamps) == 60 * 24
    with pytest.raises(ValueError, match=r"data\.frequency=1h"):
        ready(path, frequency="1h")


@pytest.mark.parametrize("splits", [[0.6, 0.2, 0.2], [120, 48, 48]])
def test_too_short_names_the_days_that_suffice(tmp_path, splits):
    with pytest.raises(ValueError, match=r"8 days are too short: windows of 3 \+ 2 days .* need (\d+) days") as error:
        ready(write_wide(tmp_path / "s.csv", hourly_values(8)), splits=splits)
    needed = int(str(error.value).split(" need ")[1].split()[0])
    values = hourly_values(needed)
    assert len(ready(write_wide(tmp_path / "t.csv", values), splits=splits, batch_size=1)._windows("train")) >= 1
    with pytest.raises(ValueError, match="too short"):
        ready(write_wide(tmp_path / "u.csv", values[:-24]), splits=splits)


def test_more_than_a_batch_is_needed(tmp_path):
    data = ready(write_wide(tmp_path / "s.csv", hourly_values(30)), batch_size=100)
    with pytest.raises(ValueError, match=r"data\.batch_size=100"):
        data.train_dataloader()


# --- loaders, tables, cost ----------------------------------------------------------------------------------------


def test_workers_give_the_same_batches(tmp_path):
    path = write_wide(tmp_path / "s.csv", hourly_values(60, 2))
    here, there = (ready(path, targets=["y0", "y1"], num_workers=n).train_dataloader() for n in (0, 2))
    count = 0
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
        count += 1
    assert count == 8  # 32 windows in fours


def test_setup_is_done_once(tmp_path, monkeypatch):
    data = module(write_wide(tmp_path / "s.csv", hourly_values(60)))
    reads = []
    original = data.read
    monkeypatch.setattr(data, "read", lambda: reads.append(1) or original())
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert len(reads) == 1
    assert data.train_dataloader().dataset.arrays is data.test_dataloader().dataset.arrays


def test_report_is_logged_once(tmp_path, caplog):
    values = hourly_values(60)
    values[5] = np.nan
    data = module(write_wide(tmp_path / "s.csv", values))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("test")
    assert sum("repaired or left out" in record.message and "'filled': {'y': 1}" in record.message
               for record in caplog.records) == 1  # fmt: skip


def test_long_and_wide_files_give_the_same_windows(tmp_path):
    values = hourly_values(60, 2)
    wide = ready(write_wide(tmp_path / "w.csv", values, names=["a", "b"]), targets=["a", "b"])
    long = ready(
        write_long(tmp_path / "l.csv", values, ["a", "b"]), targets=["a", "b"], layout="long", time_column="time",
        series_column="sensor", value_column="load",
    )  # fmt: skip
    first, second = every(wide.test_dataloader()), every(long.test_dataloader())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_predict_starts_behind_the_last_observation(tmp_path):
    data = ready(write_wide(tmp_path / "s.csv", hourly_values(60)), country="US")
    (batch,) = list(data.predict_dataloader())
    assert set(batch) == set(SeriesDataModule.batch_keys) - {"target"}
    assert batch["origin"].tolist() == [60 * 24] and batch["valid"].all()
    outputs = {"prediction": batch["forecast_profile"], "profile": batch["forecast_profile"], "origin": batch["origin"]}
    table = data.prediction_table(outputs)
    assert list(table.columns) == ["series", "origin", "timestamp", "forecast", "rhp"] and len(table) == 48
    assert table.timestamp.iloc[0] == data.timestamps[-1] + data.step == table.origin.iloc[0]
    assert (table.timestamp.diff().dropna() == pd.Timedelta("1h")).all()


def test_prediction_without_recent_values(tmp_path):
    values = hourly_values(60, 2)
    values[-10:-1] = np.nan
    data = ready(write_wide(tmp_path / "s.csv", values), targets=["y0", "y1"])
    with pytest.raises(ValueError, match=r"no forecast after 2024-02-29 23:00:00: .*data\.max_gap"):
        data.predict_dataloader()


def test_prediction_table_orders_origins_steps_and_series(tmp_path):
    data = ready(write_wide(tmp_path / "s.csv", hourly_values(60, 2)), targets=["y0", "y1"])
    batch = data._windows("test").__getitems__([0, 3])
    prediction = torch.arange(2 * 48 * 2 * 3, dtype=torch.float32).reshape(2, 48, 2, 3)
    valid = torch.tensor([[True, False], [True, True]])
    outputs = {
        "prediction": prediction, "profile": batch["forecast_profile"], "origin": batch["origin"],
        "target": batch["target"], "valid": valid, "quantiles": torch.tensor([0.1, 0.5, 0.975]),
    }  # fmt: skip
    table = data.prediction_table([outputs, outputs])
    assert list(table.columns) == [
        "series", "origin", "timestamp", "forecast", "rhp", "q10", "q50", "q97.5", "actual",
    ]  # fmt: skip
    assert len(table) == 2 * 2 * 48 * 2
    row = table.iloc[(1 * 48 + 7) * 2 + 1]  # second origin, step 7, second series
    assert (
        row.series == "y1" and row.q10 == prediction[1, 7, 1, 0] and row.forecast == row.q50 == prediction[1, 7, 1, 1]
    )
    assert row.origin == data.timestamps[int(batch["origin"][1])]
    assert row.timestamp == row.origin + pd.Timedelta("7h") and row.actual == pytest.approx(
        batch["target"][1, 7, 1].item()
    )
    first = table.iloc[: 48 * 2]
    assert first[first.series == "y1"].actual.isna().all() and first[first.series == "y0"].actual.notna().all()
    one_sided = outputs | {"quantiles": torch.tensor([0.5, 0.7, 0.9])}
    assert data.prediction_table(one_sided).forecast.iloc[0] == prediction[0, 0, 0, 0]


def test_many_series_set_up_in_seconds(tmp_path):
    values = hourly_values(61368 // 24, 21)
    rng = np.random.default_rng(0)
    values[rng.random(values.shape) < 0.02] = np.nan  # 2 % random gaps: 25,000 of them
    path = write_wide(tmp_path / "s.csv", values.round(2), start="2019-01-01")
    data = module(path, targets=[f"y{i}" for i in range(21)], country="NZ", history_length=504, horizon=168)
    start = time.process_time()
    data.setup()
    assert time.process_time() - start < 10  # measured 0.7 to 1.0 s of CPU time
    assert data.report["windows"]["train"] == 1534 - 21 - 7 + 1  # floor(0.6 * 2557) days


def test_half_hourly_with_random_gaps(tmp_path):
    values = hourly_values(60, cycle_length=48)
    clean = ready(write_wide(tmp_path / "a.csv", values, freq="30min"), cycle_length=48, history_length=144, horizon=96)
    values[np.random.default_rng(1).random(len(values)) < 0.02] = np.nan
    gappy = ready(write_wide(tmp_path / "b.csv", values, freq="30min"), cycle_length=48, history_length=144, horizon=96)

    def error(data):
        batch = every(data.test_dataloader())
        return ((batch["forecast_profile"] - batch["target"]) * data.target_scale[1]).abs().mean().item()

    assert error(gappy) == pytest.approx(error(clean), rel=0.1)
    assert gappy.report["filled"]["y"] > 20

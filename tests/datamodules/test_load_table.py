from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from datamodules.readers.load_table import read_loads
from tests.datamodules.files import hourly_values, write_wide


def write_original(path, values, names, start):
    """A file of the study: sorted by country, then by time; the time is text in spite of its unit."""
    stamps = pd.date_range(start, periods=len(values), freq="1h").strftime("%Y-%m-%d %H:%M:%S")
    frames = [
        pd.DataFrame({"Load [MW]": values[:, i], "Time [s]": stamps, "Country": name}) for i, name in enumerate(names)
    ]
    pd.concat(frames).to_csv(path, index=False)
    return path


@pytest.fixture
def original(tmp_path):
    """The three files of the study, 20 days in all, and their values."""
    values = 1000 * hourly_values(20, 3)
    names = ["de", "fr", "at"]
    paths = []
    for file, start, stop in (("train", 0, 10), ("valid", 10, 15), ("test", 15, 20)):
        part = values[24 * start : 24 * stop]
        day = pd.Timestamp("2015-01-01") + pd.Timedelta(days=start)
        paths.append(write_original(tmp_path / f"{file}.csv", part, names, day))
    return paths, values


OPTIONS = {"time_column": "Time [s]"}


def test_original_files_continue_each_other(original):
    paths, values = original
    series, names = read_loads(paths, **OPTIONS)
    assert names == ["at", "de", "fr"]  # sorted, as the published code groups them
    np.testing.assert_array_equal(series.values, values[:, [2, 0, 1]])
    assert series.timestamps[0] == pd.Timestamp("2015-01-01") and series.step == pd.Timedelta("1h")
    again, _ = read_loads(paths[::-1], **OPTIONS)  # the order of the list does not matter
    np.testing.assert_array_equal(again.values, series.values)
    some, names = read_loads(paths, targets=["fr", "at"], **OPTIONS)
    assert names == ["fr", "at"]
    np.testing.assert_array_equal(some.values, values[:, [1, 2]])


def test_what_lies_between_two_files_is_missing(original):
    paths, _values = original
    series, _ = read_loads([paths[0], paths[2]], **OPTIONS)
    assert len(series.values) == 480
    assert np.isnan(series.values[240:360]).all() and not np.isnan(np.delete(series.values, range(240, 360), 0)).any()


def test_files_that_overlap_are_refused(original, tmp_path):
    paths, _values = original
    copy = tmp_path / "energy_test.csv"  # the study's own copy of the training set
    copy.write_bytes(paths[0].read_bytes())
    with pytest.raises(
        ValueError, match=r"energy_test\.csv: it begins at 2015-01-01.*before an earlier file has ended"
    ):
        read_loads([paths[0], copy], **OPTIONS)


def test_the_version_of_the_hackathon(tmp_path):
    values = hourly_values(3, 2)
    path = write_original(tmp_path / "train.csv", values, ["h", "bs"], "2014-01-01")
    path.write_text(path.read_text().replace("Load [MW]", "Load [MWh]").replace("Country", "City"))
    series, names = read_loads([path], series_column="City", value_column="Load [MWh]", **OPTIONS)
    assert names == ["bs", "h"]
    np.testing.assert_array_equal(series.values, values[:, [1, 0]])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_wide_files_stand_side_by_side(tmp_path, suffix):
    one, two = hourly_values(4, 2), hourly_values(4, 3, seed=1)
    paths = [write_wide(tmp_path / f"one.{suffix}", one), write_wide(tmp_path / f"two.{suffix}", two)]
    options = {"time_column": "ts", "layout": "wide", "series_column": None, "value_column": None}
    series, names = read_loads(paths, **options)
    assert names == ["one/y0", "one/y1", "two/y0", "two/y1", "two/y2"]
    np.testing.assert_array_equal(series.values, np.concatenate([one, two], 1))
    _alone, names = read_loads(paths[1:], **options)
    assert names == ["y0", "y1", "y2"]
    some, names = read_loads(paths, targets=["two/y1", "one/y0"], **options)
    np.testing.assert_array_equal(some.values, np.stack([two[:, 1], one[:, 0]], 1))
    with pytest.raises(ValueError, match=r"data\.targets names 'y1'.*'one/y0'"):
        read_loads(paths, targets=["y1"], **options)


def test_quarter_hours_are_averaged_not_added_up(tmp_path):
    """A load in MW is a mean; the study's preparation adds four quarters to an "hourly" value four times too large."""
    path = write_wide(tmp_path / "s.csv", np.full((8 * 24, 1), 50.0), freq="15min")
    series, _ = read_loads([path], time_column="ts", layout="wide", resample=pd.Timedelta("1h"))
    assert len(series.values) == 48 and (series.values == 50).all()


def test_errors_name_file_and_column(tmp_path, original):
    paths, _ = original
    with pytest.raises(ValueError, match=r"train\.csv: no column 'Region'"):
        read_loads(paths, series_column="Region", **OPTIONS)
    text = paths[0].read_text().splitlines()
    text[5] = text[5].replace(text[5].split(",")[0], "many")
    paths[0].write_text("\n".join(text))
    with pytest.raises(ValueError, match=r"train\.csv, column 'Load \[MW\]', line 6: 'many' is not a number"):
        read_loads(paths, **OPTIONS)

from __future__ import annotations

import builtins

import numpy as np
import pandas as pd
import pytest

from datamodules.readers.series_csv import read_series
from tests.datamodules.files import edit_lines, hourly_values, write_long, write_wide

HOUR = pd.Timedelta("1h")


def read(path, **options):
    return read_series(path, **({"time_column": "ts", "targets": ["y"]} | options))


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.parquet"])
def test_values_survive_exactly(tmp_path, name):
    values = hourly_values(3, 2)
    series = read(write_wide(tmp_path / name, values), targets=["y1", "y0"])
    np.testing.assert_array_equal(series.values, values[:, ::-1])
    assert series.timestamps[0] == pd.Timestamp("2024-01-01") and series.step == HOUR
    assert series.counts["rows"] == 72 and series.counts["missing_rows"] == 0


def test_long_layout(tmp_path):
    values = hourly_values(3, 2)
    path = write_long(tmp_path / "long.csv", values, ["north", "south"])
    long = {"time_column": "time", "layout": "long", "series_column": "sensor", "value_column": "load"}
    series = read(path, targets=["south", "north"], **long)
    np.testing.assert_array_equal(series.values, values[:, ::-1])
    with pytest.raises(ValueError, match=r"long\.csv, column 'sensor': no series 'nort'. Did you mean 'north'"):
        read(path, targets=["nort"], **long)
    edit_lines(path, {6: "2024-01-01 01:00:00,north,oops"})
    with pytest.raises(ValueError, match=r"column 'load', line 6: 'oops' is not a number"):
        read(path, targets=["north"], **long)


def test_long_series_with_different_starts_are_aligned(tmp_path):
    path = write_long(tmp_path / "long.csv", hourly_values(1, 2), ["a", "b"])
    edit_lines(path, {3: None, 5: None})  # the first two values of b
    series = read(
        path, targets=["a", "b"], time_column="time", layout="long", series_column="sensor", value_column="load"
    )
    assert np.isnan(series.values[:, 1]).tolist() == [True, True] + [False] * 22


def test_date_and_hour_range_columns(tmp_path):
    path = tmp_path / "ranges.csv"
    rows = [f"2024-01-0{d},{h}:00-{h}:59,{24 * d + h}" for d in (1, 2) for h in range(24)]
    path.write_text("date,hour,y\n" + "\n".join(rows) + "\n\n")  # and an empty line at the end
    series = read(path, time_column=["date", "hour"])
    assert series.step == HOUR and len(series.values) == 48
    assert series.timestamps[6] == pd.Timestamp("2024-01-01 06:00") and series.values[6, 0] == 30


def test_negative_utc_offset_is_no_range(tmp_path):
    stamps = [f"2024-01-01T{h:02d}:00-05:00" for h in range(24)]
    series = read(write_wide(tmp_path / "s.csv", hourly_values(1), stamps=stamps), timezone="America/New_York")
    assert series.timestamps[0] == pd.Timestamp("2024-01-01") and len(series.values) == 24


def test_foreign_csv(tmp_path):
    path = tmp_path / "de.csv"
    path.write_text("zeit;last\n31.12.2023 23:00;1,5\n01.01.2024 00:00;2,5\n")
    series = read(path, time_column="zeit", targets=["last"], delimiter=";", decimal=",", time_format="%d.%m.%Y %H:%M")
    assert series.values[:, 0].tolist() == [1.5, 2.5]


def test_missing_rows_and_cells_become_nan(tmp_path):
    values = hourly_values(2)
    values[5] = np.nan
    path = edit_lines(write_wide(tmp_path / "s.csv", values), {12: None, 13: None})
    series = read(path)
    assert np.flatnonzero(np.isnan(series.values[:, 0])).tolist() == [5, 10, 11]
    assert series.counts["missing_rows"] == 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"targets": ["z"]}, r"no column 'z'; the header \(line 1\) has 'ts', 'y'.*data\.targets"),
        ({}, {"time_column": "t"}, r"no column 't'. Did you mean 'ts'"),
        ({5: "2024-01-01 02:00:00,1"}, {}, r"column 'ts', line 5: the time stamp .* is duplicated.*data\.timezone"),
        ({5: "2023-01-01 03:00:00,1"}, {}, r"column 'ts', line 5: time stamps are not sorted.*sort the file"),
        ({5: "2024-01-01 03:10:00,1"}, {}, r"line 5: 2024-01-01 03:10:00 does not lie on the uniform axis.*resample"),
        ({5: "2024-01-01 03:00:00,x"}, {}, r"column 'y', line 5: 'x' is not a number.*correct the cell"),
        ({5: "2024-01-01 03:00:00,inf"}, {}, r"column 'y', line 5: infinite value; correct"),
        ({5: "2024-01-01 03:00:00,"}, {"allow_missing": False}, r"column 'y', line 5: the value is missing.*max_gap"),
        ({5: None}, {"allow_missing": False}, r"column 'ts': 1 rows are missing, the first at 2024-01-01 03:00"),
        ({5: "yesterday,1"}, {}, r"column 'ts', line 5: 'yesterday' is not a time stamp.*data\.time_format"),
        ({5: ",1"}, {}, r"column 'ts', line 5: no time stamp; fill the cell"),
        ({25: "2094-01-01 00:00:00,1"}, {}, r"line 25: 613,\d+ steps are missing before 2094"),
        ({}, {"frequency": pd.Timedelta("30min")}, r"1h apart, but data\.frequency=30min.*data\.resample"),
        ({}, {"resample": pd.Timedelta("90min")}, r"data\.resample=90min is not a multiple of the spacing 1h"),
        ({5: "2024-01-01 03:00:00+01:00,1"}, {}, r"line 5: .*either all time stamps carry a UTC offset or none"),
        (dict.fromkeys(range(2, 26)), {}, r"the file has no rows"),
        ({1: "", **dict.fromkeys(range(2, 26))}, {}, r"the file is empty"),
    ],
)
def test_errors_name_file_column_line_and_remedy(tmp_path, changes, options, message):
    path = edit_lines(write_wide(tmp_path / "bad.csv", hourly_values(1)), changes)
    with pytest.raises(ValueError, match=message) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    if "resample" not in options:
        assert "bad.csv" in str(error.value)


def test_empty_column(tmp_path):
    path = write_wide(tmp_path / "s.csv", np.full((24, 1), np.nan))
    with pytest.raises(ValueError, match=r"column 'y', line 2: the column has no values"):
        read(path)


def test_numbers_are_no_time_stamps(tmp_path):
    path = write_wide(tmp_path / "s.csv", hourly_values(1), stamps=range(24))
    with pytest.raises(ValueError, match=r"is a number, not a time stamp; set data\.time_format"):
        read(path)


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.csv"):
        read(tmp_path / "s.xlsx")


def test_parquet_row_in_message_and_index_as_time(tmp_path):
    values = hourly_values(1)
    frame = pd.DataFrame({"y": values[:, 0]}, index=pd.date_range("2024-01-01", periods=24, freq="1h", name="ts"))
    frame.to_parquet(tmp_path / "s.parquet")
    np.testing.assert_array_equal(read(tmp_path / "s.parquet").values, values)
    frame.iloc[3] = np.inf
    frame.to_parquet(tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=r"row 4: infinite"):
        read(tmp_path / "s.parquet")


def test_parquet_without_pyarrow_names_the_remedy(tmp_path, monkeypatch):
    path = write_wide(tmp_path / "s.parquet", hourly_values(1))
    original = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name == "pyarrow":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read(path)


def test_block_mean_drops_incomplete_blocks_and_skips_missing_steps(tmp_path):
    values = np.arange(22.0)[:, None]
    values[5] = np.nan
    series = read(write_wide(tmp_path / "s.csv", values, start="2024-01-01 00:30", freq="15min"), resample=HOUR)
    # 00:30 and 00:45 are half a block; the last block of four ends at 05:45
    assert series.timestamps[0] == pd.Timestamp("2024-01-01 01:00")
    assert series.values[:, 0].tolist() == [(2 + 3 + 4) / 3, 7.5, 11.5, 15.5, 19.5]
    assert series.counts["partial_blocks"] == 1


def local_stamps(start: str, stop: str, freq: str = "1h") -> pd.DatetimeIndex:
    return pd.date_range(start, stop, freq=freq, tz="Europe/Berlin", inclusive="left")


@pytest.mark.parametrize("kind", ["naive", "offset", "utc"])
def test_25_hour_day_is_averaged(tmp_path, kind):
    aware = local_stamps("2024-10-26", "2024-10-29")  # clock put back on the 27th
    stamps = {"naive": aware.tz_localize(None), "offset": aware, "utc": aware.tz_convert("UTC")}[kind]
    assert len(aware) == 73
    path = write_wide(tmp_path / "s.csv", np.arange(73.0)[:, None], stamps=stamps)
    series = read(path, timezone="Europe/Berlin")
    assert len(series.values) == 72
    assert series.values[25:29, 0].tolist() == [25, 26.5, 28, 29]
    assert series.counts["dst_averaged"] == 1 and series.counts["dst_interpolated"] == 0


@pytest.mark.parametrize("kind", ["naive", "utc"])
def test_23_hour_day_is_interpolated(tmp_path, kind):
    aware = local_stamps("2024-03-30", "2024-04-02")  # clock put forward on the 31st
    assert len(aware) == 71
    stamps = aware.tz_localize(None) if kind == "naive" else aware.tz_convert("UTC")
    path = write_wide(tmp_path / "s.csv", np.arange(71.0)[:, None], stamps=stamps)
    series = read(path, timezone="Europe/Berlin", allow_missing=False)
    assert len(series.values) == 72
    assert series.values[24:28, 0].tolist() == [24, 25, 25.5, 26]
    assert series.counts["dst_interpolated"] == 1 and series.counts["missing_rows"] == 0


def test_half_hourly_25_hour_day(tmp_path):
    aware = local_stamps("2024-10-26", "2024-10-29", "30min")
    path = write_wide(tmp_path / "s.csv", np.arange(146.0)[:, None], stamps=aware.tz_localize(None))
    series = read(path, timezone="Europe/Berlin")  # 02:00, 02:30, 02:00, 02:30: goes backwards once
    assert len(series.values) == 144 and series.counts["dst_averaged"] == 2
    assert series.values[51:54, 0].tolist() == [51, 53, 54]


def test_doubled_hour_without_or_with_the_wrong_time_zone(tmp_path):
    aware = local_stamps("2024-10-26", "2024-10-29")
    path = write_wide(tmp_path / "s.csv", np.arange(73.0)[:, None], stamps=aware.tz_localize(None))
    with pytest.raises(ValueError, match=r"line 29: .*duplicated; set data\.timezone"):
        read(path)
    with pytest.raises(ValueError, match=r"data\.timezone='America/New_York' does not put the clock back here"):
        read(path, timezone="America/New_York")


def test_offsets_need_a_time_zone(tmp_path):
    path = write_wide(
        tmp_path / "s.csv", hourly_values(1), stamps=pd.date_range("2024", periods=24, freq="1h", tz="UTC")
    )
    with pytest.raises(ValueError, match=r"line 2: .*carries a UTC offset; set data\.timezone"):
        read(path)


def test_aware_duplicates_are_not_mistaken_for_the_doubled_hour(tmp_path):
    stamps = [*local_stamps("2024-10-26", "2024-10-29").tz_convert("UTC")]
    stamps[27] = stamps[26]
    path = write_wide(tmp_path / "s.csv", np.arange(73.0)[:, None], stamps=[str(s) for s in stamps])
    with pytest.raises(ValueError, match=r"line 29: .*duplicated or not sorted"):
        read(path, timezone="Europe/Berlin")

"""Loads of many regions from one file or several: parts of one period, or regions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.readers.series_csv import read_series, series_names
from datamodules.readers.time_axis import RegularSeries, align


def read_loads(
    paths: Sequence[Path],
    *,
    time_column: str | Sequence[str],
    layout: str = "long",
    series_column: str | None = "Country",
    value_column: str | None = "Load [MW]",
    targets: Sequence[str] | None = None,
    time_format: str | None = None,
    delimiter: str = ",",
    decimal: str = ".",
    resample: pd.Timedelta | None = None,
    timezone: str | None = None,
    allow_missing: bool = True,
) -> tuple[RegularSeries, list[str]]:
    """Read the same series from all files.

    Long files (a row per value) continue each other in time, as the study's train.csv, valid.csv and test.csv do. Wide
    files (a column per series) stand side by side; with more than one, a series is called ``<file>/<column>``, where
    file has no suffix.

    Args:
        paths: CSV (also compressed) or Parquet files.
        targets: Names of the series, in the order of the result; None: all.
        time_column: See `datamodules.readers.series_csv.read_series`, as the others.
        layout: ``long`` or ``wide``.
        series_column: Long layout: column with the name of the series.
        value_column: Long layout: column with the value.
        time_format: ``strptime`` format.
        delimiter: Of CSV files.
        decimal: Of CSV files.
        resample: Spacing to average to.
        timezone: IANA name of the local time.
        allow_missing: Whether empty cells and missing rows may become NaN.

    Returns:
        The series, ``(time, series)``, and their names.

    Raises:
        ValueError: Names file, column, line and remedy.
    """
    options = {"time_column": time_column, "layout": layout, "series_column": series_column, "delimiter": delimiter}
    more = {"value_column": value_column, "time_format": time_format, "decimal": decimal, "resample": resample}
    more |= {"timezone": timezone, "allow_missing": allow_missing}

    def read(path: Path, names: Sequence[str]) -> RegularSeries:
        return read_series(path, targets=names, **options, **more)

    if layout == "long":
        names = [str(name) for name in targets or series_names(paths[0], **options)]
        return _in_a_row([read(path, names) for path in paths], paths), names
    columns = [(path, name) for path in paths for name in series_names(path, **options)]
    by_name = {f"{path.name.split('.')[0]}/{name}" if len(paths) > 1 else name: (path, name) for path, name in columns}
    names = list(by_name) if targets is None else [str(name) for name in targets]
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"data.targets names {unknown[0]!r}; the files have {', '.join(map(repr, by_name))}")
    parts: dict[str, RegularSeries] = {}
    for path in paths:
        mine = [name for name in names if by_name[name][0] == path]
        if mine:
            series = read(path, [by_name[name][1] for name in mine])
            parts |= {name: series._replace(values=series.values[:, [i]]) for i, name in enumerate(mine)}
    return align([parts[name] for name in names], names), names


def _in_a_row(parts: Sequence[RegularSeries], paths: Sequence[Path]) -> RegularSeries:
    """Join series that follow each other in time; what lies between two files is missing."""
    order = sorted(range(len(parts)), key=lambda i: parts[i].timestamps[0])
    first, step = parts[order[0]], parts[order[0]].step
    axis = pd.date_range(first.timestamps[0], max(part.timestamps[-1] for part in parts), freq=step)
    values = np.full((len(axis), first.values.shape[1]), np.nan)
    counts: dict[str, int] = {}
    end = 0
    for i in order:
        lead, rest = divmod(parts[i].timestamps[0] - first.timestamps[0], step)
        if parts[i].step != step or rest != pd.Timedelta(0):
            raise ValueError(
                f"{paths[i]}: its steps of {parts[i].step} do not continue those of {paths[order[0]]} ({step}); set "
                "data.resample or correct the files"
            )
        if lead < end:
            raise ValueError(
                f"{paths[i]}: it begins at {parts[i].timestamps[0]}, before an earlier file has ended; remove the rows "
                "that are in both, or read only one of them (data.file)"
            )
        end = lead + len(parts[i].values)
        values[lead:end] = parts[i].values
        counts = {key: counts.get(key, 0) + number for key, number in parts[i].counts.items()}
    return RegularSeries(axis, values, step, counts)

"""Time series from CSV and Parquet files, one column per series (wide) or one row per value (long)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datamodules.readers.time_axis import RegularSeries, align, block_mean, regular_axis

_CSV_SUFFIXES = (".csv", ".txt", ".tsv")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zip", ".zst")
_OFFSET = r"(?:Z|[+-]\d{2}:?\d{2})$"  # Z, +02:00 or -0500 behind a time of day
_RANGE = r"(?<![:\d])(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})$"
_ISO = r"^\d{4}-\d{2}-\d{2}(?:[T ]|$)"


def read_series(
    path: str | Path,
    *,
    time_column: str | Sequence[str],
    targets: Sequence[str],
    layout: str = "wide",
    series_column: str | None = None,
    value_column: str | None = None,
    covariates: Sequence[str] = (),
    time_format: str | None = None,
    delimiter: str = ",",
    decimal: str = ".",
    frequency: pd.Timedelta | None = None,
    resample: pd.Timedelta | None = None,
    timezone: str | None = None,
    allow_missing: bool = True,
) -> RegularSeries:
    """Read series onto a uniform axis of local time.

    Args:
        path: CSV (also compressed) or Parquet file.
        time_column: Column of the time stamps, or several (date, hour) that are joined. Naive stamps are local time;
            stamps with an offset are converted to ``timezone``. ``6:00-6:59`` stands for its beginning.
        targets: Columns (wide) or names in ``series_column`` (long), in the order of the result.
        layout: ``wide`` or ``long``.
        series_column: Long layout: column with the name of the series.
        value_column: Long layout: column with the value.
        covariates: Wide layout: further columns, behind the targets in the result.
        time_format: ``strptime`` format; None reads ISO 8601 and what pandas recognises.
        delimiter: Of the CSV file.
        decimal: Decimal mark of the CSV file.
        frequency: Expected spacing of the rows; None takes the most frequent one.
        resample: Spacing to average to, None to keep that of the file.
        timezone: IANA name of the local time, None if the clock never changes.
        allow_missing: Whether empty cells and missing rows may become NaN.

    Returns:
        Values ``(time, len(targets) + len(covariates))``.

    Raises:
        ValueError: Names file, column, line and remedy.
    """
    path = Path(path)
    time_columns = [time_column] if isinstance(time_column, str) else list(time_column)
    columns = [*targets, *covariates] if layout == "wide" else [series_column, value_column]
    frame, first_line, unit = _read_frame(path, [*time_columns, *columns], delimiter, decimal)
    lines = np.arange(len(frame)) + first_line
    blank = frame.isna().all(axis=1).to_numpy()  # e.g. empty lines at the end of a CSV file
    frame, lines = frame[~blank], lines[~blank]
    if frame.empty:
        raise ValueError(f"{path}: the file has no rows")
    time_name = "+".join(time_columns)

    def naming(column: str, of_lines: np.ndarray) -> Callable[[int], str]:
        return lambda row: f"{path}, column {column!r}, {unit} {of_lines[row]}"

    where = naming(time_name, lines)
    stamps, shown = _parse_time(frame, time_columns, time_format, where)
    stamps = _local(stamps, shown, timezone, where, strict=layout == "wide")
    if layout == "wide":
        values = np.stack([_numbers(frame[name], naming(name, lines), allow_missing) for name in columns], axis=1)
        series = regular_axis(stamps, values, where=where, frequency=frequency, timezone=timezone)
    else:
        of_series = frame[series_column].astype(str).to_numpy()
        parts = []
        for name in targets:
            rows = np.flatnonzero(of_series == str(name))
            if len(rows) == 0:
                raise ValueError(
                    f"{path}, column {series_column!r}: no series {name!r}{_hint(str(name), sorted(set(of_series)))}; "
                    "correct data.targets"
                )
            values = _numbers(frame[value_column].iloc[rows], naming(value_column, lines[rows]), allow_missing)
            of_rows = naming(time_name, lines[rows])
            part = regular_axis(stamps[rows], values[:, None], where=of_rows, frequency=frequency, timezone=timezone)
            parts.append(part)
        series = align(parts, list(targets))
    if not allow_missing and series.counts["missing_rows"]:
        gap = np.isnan(series.values).any(axis=1)
        raise ValueError(
            f"{path}, column {time_name!r}: {series.counts['missing_rows']} rows are missing, the first at "
            f"{series.timestamps[int(np.argmax(gap))]}; add them or set data.max_gap to interpolate short gaps"
        )
    return series if resample is None else block_mean(series, resample)


def series_names(
    path: str | Path,
    *,
    time_column: str | Sequence[str],
    layout: str = "wide",
    series_column: str | None = None,
    delimiter: str = ",",
) -> list[str]:
    """List the series of a file: all columns but the time (wide, in order) or the names in a column (long, sorted).

    Raises:
        ValueError: Names file and remedy.
    """
    path = Path(path)
    if layout == "long":
        frame, _, _ = _read_frame(path, [series_column], delimiter, ".")
        return sorted(frame[series_column].dropna().astype(str).unique())
    if _kind(path) in _PARQUET_SUFFIXES:
        columns = _read_parquet(path).columns
    else:
        columns = _header(path, {"sep": "\t" if _kind(path) == ".tsv" else delimiter, "encoding": "utf-8-sig"})
    times = {time_column} if isinstance(time_column, str) else set(time_column)
    return [str(column) for column in columns if column not in times]


def _kind(path: Path) -> str:
    """Suffix of the file, that of a compression left out."""
    kinds = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
    return kinds[-1].lower() if kinds else ""


def _header(path: Path, options: dict[str, str]) -> list[str]:
    try:
        return list(pd.read_csv(path, nrows=0, **options).columns)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty") from None


def _read_frame(path: Path, columns: list[str], delimiter: str, decimal: str) -> tuple[pd.DataFrame, int, str]:
    """Read the named columns; also the number of the first row in the file, and what a row is called there."""
    kind = _kind(path)
    wanted = list(dict.fromkeys(columns))
    if kind in _PARQUET_SUFFIXES:
        frame = _read_parquet(path)
        _require(path, wanted, list(frame.columns))
        return frame[wanted].reset_index(drop=True), 1, "row"
    if kind not in _CSV_SUFFIXES:
        known = ", ".join((*_CSV_SUFFIXES, *_PARQUET_SUFFIXES))
        raise ValueError(f"{path}: data.file must end in one of {known} (CSV also compressed)")
    options = {"sep": "\t" if kind == ".tsv" else delimiter, "decimal": decimal, "encoding": "utf-8-sig"}
    _require(path, wanted, _header(path, options))
    try:
        # Empty lines are kept: they count in the line numbers of error messages.
        frame = pd.read_csv(
            path,
            usecols=wanted,
            skip_blank_lines=False,
            low_memory=False,
            **options,
        )
    except pd.errors.ParserError as error:
        raise ValueError(f"{path}: {error}; is data.delimiter={delimiter!r} right?") from None
    return frame[wanted], 2, "line"


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow  # noqa: F401  (pandas needs it for Parquet)
    except ImportError:
        raise ImportError(f"reading {path.name} needs pyarrow: pip install pyarrow") from None
    frame = pd.read_parquet(path, engine="pyarrow")
    named = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return frame.reset_index(level=named) if named else frame


def _require(path: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if name not in present:
            raise ValueError(
                f"{path}: no column {name!r}{_hint(str(name), [str(column) for column in present])}; the header (line "
                f"1) has {', '.join(map(repr, present))}. Correct data.time_column, data.targets or the covariates"
            )


def _hint(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f". Did you mean {matches[0]!r}?" if matches else ""


def _numbers(cells: pd.Series, where: Callable[[int], str], allow_missing: bool) -> np.ndarray:
    """Return the cells as float64; text and infinities are errors that name their line."""
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    absent = cells.isna().to_numpy()
    if (text := np.isnan(numbers) & ~absent).any():
        row = int(np.argmax(text))
        raise ValueError(
            f"{where(row)}: {str(cells.iloc[row])!r} is not a number; correct the cell, leave it empty if the value is "
            "missing, or check data.decimal"
        )
    if (infinite := np.isinf(numbers)).any():
        row = int(np.argmax(infinite))
        raise ValueError(f"{where(row)}: infinite value; correct the cell or leave it empty if the value is missing")
    if absent.all():
        raise ValueError(f"{where(0)}: the column has no values; remove it from data.targets or the covariates")
    if absent.any() and not allow_missing:
        row = int(np.argmax(absent))
        raise ValueError(
            f"{where(row)}: the value is missing (NaN) and data.max_gap=null forbids gaps; fill the cell or set "
            "data.max_gap to interpolate short gaps"
        )
    return numbers


def _parse_time(
    frame: pd.DataFrame, columns: list[str], time_format: str | None, where: Callable[[int], str]
) -> tuple[pd.DatetimeIndex, pd.Series]:
    """Parse the time stamps; also return the cells for messages."""
    cells = frame[columns[0]]
    if len(columns) == 1 and pd.api.types.is_datetime64_any_dtype(cells):
        if cells.isna().any():
            raise ValueError(f"{where(int(np.argmax(cells.isna())))}: no time stamp; fill the cell or remove the row")
        return pd.DatetimeIndex(cells), cells
    if len(columns) == 1 and time_format is None and pd.api.types.is_numeric_dtype(cells):
        raise ValueError(
            f"{where(0)}: {cells.iloc[0]} is a number, not a time stamp; set data.time_format (e.g. '%Y%m%d%H') or "
            "write the stamps as YYYY-MM-DD HH:MM"
        )
    text = _as_text(cells)
    for column in columns[1:]:
        text = text.str.cat(_as_text(frame[column]), sep=" ")
    if (absent := text.isna().to_numpy()).any():
        raise ValueError(f"{where(int(np.argmax(absent)))}: no time stamp; fill the cell or remove the row")
    text = text.str.strip()
    if time_format is None:
        text = _begin_of_range(text).str.replace(r"([T ])(\d:\d{2})", r"\g<1>0\2", regex=True)  # ISO: two digits
    offset = text.str.contains(rf":\d{{2}}(?:\.\d+)?\s*{_OFFSET}", regex=True).to_numpy()
    if offset.any() and not offset.all():
        row = int(np.argmax(offset != offset[0]))
        raise ValueError(f"{where(row)}: {text.iloc[row]!r}: either all time stamps carry a UTC offset or none does")
    iso = time_format is None and bool(text.str.match(_ISO).iloc[0])
    stamps = pd.to_datetime(text, format="ISO8601" if iso else time_format, utc=bool(offset.any()), errors="coerce")
    if (wrong := stamps.isna().to_numpy()).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{where(row)}: {text.iloc[row]!r} is not a time stamp; correct the cell or set data.time_format"
        )
    return pd.DatetimeIndex(stamps), text


def _begin_of_range(text: pd.Series) -> pd.Series:
    """Reduce hours written as a range (``6:00-6:59``) to their beginning.

    ``06:00-05:00`` may also be a time with a UTC offset; a range has the same length, at most an hour, in every row.
    """
    if not re.search(_RANGE, text.iloc[0]):
        return text
    times = text.str.extract(_RANGE)
    if times.isna().any(axis=None):
        return text
    hour, minute, end_hour, end_minute = (times[i].astype(int) for i in range(4))
    length = ((end_hour - hour) * 60 + end_minute - minute) % 1440
    if length.nunique() > 1 or not 0 < length.iloc[0] <= 60:
        return text
    return text.str.replace(r"\s*-\s*\d{1,2}:\d{2}$", "", regex=True)


def _as_text(cells: pd.Series) -> pd.Series:
    """Return the cells as text; dates as YYYY-MM-DD so that an hour can be appended."""
    if pd.api.types.is_datetime64_any_dtype(cells):
        return cells.dt.strftime("%Y-%m-%d")
    return cells.astype("string")


def _local(
    stamps: pd.DatetimeIndex,
    shown: pd.Series,
    timezone: str | None,
    where: Callable[[int], str],
    *,
    strict: bool,
) -> pd.DatetimeIndex:
    """Convert stamps with an offset to naive local time."""
    if stamps.tz is None:
        return stamps
    if timezone is None:
        raise ValueError(
            f"{where(0)}: {str(shown.iloc[0])!r} carries a UTC offset; set data.timezone (e.g. Europe/Berlin) to the "
            "local time in which days and holidays are counted"
        )
    utc = stamps.tz_convert("UTC")
    # In UTC no hour is doubled: whatever repeats here is an error that local time would hide.
    backwards = np.diff(utc.as_unit("ns").asi8) <= 0
    if strict and backwards.any():
        row = int(np.argmax(backwards)) + 1
        raise ValueError(
            f"{where(row)}: the time stamp {shown.iloc[row]} does not follow {shown.iloc[row - 1]} (duplicated or not "
            "sorted); sort the file by time and remove repeated rows"
        )
    return utc.tz_convert(timezone).tz_localize(None)

"""Windows of measured series with their calendars and recent historic profiles (ReCycle, section 6.3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pandas as pd
from typing_extensions import override

from datamodules.readers.series_csv import read_series
from datamodules.readers.time_axis import RegularSeries
from datamodules.windowed_series import Scaling, WindowedSeries
from networks.recycle.profile import RecentHistoricProfile

EMBEDDED = Path(__file__).parent / "embedded"


class SeriesDataModule(WindowedSeries):
    """Windows of series in a CSV or Parquet file.

    One window is one origin with all series. A batch is a dictionary; float32 unless said otherwise. L =
    ``history_length``, T = ``horizon``, D = ``cycle_length``, H = L / D, F = ceil(T / D), C series, P past-only and K
    known covariates:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    history               (B, L, C)          scaled values before the origin, missing ones 0
    target                (B, T, C)          scaled values from the origin on (not in predict)
    valid                 (B, C) bool        the series misses no value in this window
    history_profile       (B, L, C)          recent historic profile of the history steps, scaled axis
    forecast_profile      (B, T, C)          recent historic profile of the forecast steps, scaled axis
    history_calendar      (B, H, C, 9)       calendar vector of each history token (section 2.2)
    forecast_calendar     (B, F, C, 9)       the same for the forecast tokens
    history_marks         (B, L, 4)          hour, weekday, day of month, day of year in [-0.5, 0.5]
    forecast_marks        (B, T, 4)          the same for the forecast steps
    target_day_type       (B, T, C) int64    0 working day, 1 Saturday, 2 Sunday or holiday
    target_holiday        (B, T, C) bool     public holiday
    origin                (B,) int64         index of the first forecast step on `timestamps`
    history_covariates    (B, L, P + K)      only with covariates; past-only columns first
    forecast_covariates   (B, T, K)          only with covariates
    ===================== ================== ====================================================================

    Training windows lie wholly in the training part; validation and test windows may look back into the part before,
    their targets never. Scaling, `target_scale` and `mase_scale` use the training part only.

    Args:
        file: Name of the file in ``data_dir``, or a path.
        data_dir: Folder of the file; None = the data that ship with the program.
        source: Where the file can be obtained; shown when it is missing.
        time_column: Column of the time stamps, or several (date, hour) that are joined.
        time_format: ``strptime`` format; None recognises ISO 8601 and common forms.
        targets: Columns to forecast; in the long layout names in ``series_column``.
        layout: ``wide`` (a column per series) or ``long`` (a row per value).
        series_column: Long layout: column with the name of the series.
        value_column: Long layout: column with the value.
        delimiter: Of the CSV file.
        decimal: Decimal mark of the CSV file.
        country: Country code for public holidays (``US``, ``DE-BY``), one for all series or one per series; None =
            no holidays.
        frequency: Spacing of the rows (``1h``, ``15min``); None takes what the file has.
        resample: Spacing to average blocks to; None keeps that of the file.
        timezone: IANA name of the local time (``Europe/Berlin``); needed if the clock changes in the file or the
            stamps carry a UTC offset. 25-hour days are averaged, 23-hour days interpolated.
        day_start: Time of day at which a day (and its first token) begins.
        history_length: L, steps; a multiple of the cycle length.
        horizon: T, steps; a multiple of the cycle length unless ``any_origin``.
        cycle_length: D, steps per day.
        any_origin: Whether forecasts may start at any step of the day.
        origin_stride: Steps between two windows; None = one day.
        splits: Training, validation and test as fractions of the whole days, or as numbers of steps.
        scaling: ``z``, ``min_max`` (to [0, 1]), ``abs_max`` or ``none``.
        profile: Recent historic profile; None = its defaults.
        max_gap: Longest gap that is interpolated, in steps; windows of a series that touch a longer one are invalid.
            None refuses files with gaps.
        max_steps: Use only this many steps, counted from the first whole day; None = all.
        past_covariates: Columns (wide layout) known up to the origin.
        known_covariates: Columns (wide layout) known for the horizon too.
        unit: Unit of the targets, for tables and figures.
        batch_size: Windows per training step over all devices.
        eval_batch_size: Windows per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes; batches are so cheap that 0 is best for few series.
        seed: Seed of the order of the training windows.

    Attributes:
        timestamps: Local time of every step, from the first whole day to the last observation.
        step: Spacing of ``timestamps``.
        report: What was trimmed, interpolated and dropped.

    Raises:
        ValueError: Names the argument, or file, column and line, and the remedy.
        FileNotFoundError: Names the expected path and where the file can be obtained.
    """

    input_files: ClassVar[tuple[str, ...]] = ("file",)  # runner/check.py looks for them
    batch_keys: ClassVar[tuple[str, ...]] = (
        "history",
        "target",
        "valid",
        "history_profile",
        "forecast_profile",
        "history_calendar",
        "forecast_calendar",
        "history_marks",
        "forecast_marks",
        "target_day_type",
        "target_holiday",
        "origin",
    )

    def __init__(
        self,
        file: str,
        targets: Sequence[str],
        data_dir: str | None = None,
        source: str | None = None,
        time_column: str | Sequence[str] = "ts",
        time_format: str | None = None,
        layout: Literal["wide", "long"] = "wide",
        series_column: str | None = None,
        value_column: str | None = None,
        delimiter: str = ",",
        decimal: str = ".",
        country: str | Sequence[str | None] | None = None,
        frequency: str | None = None,
        resample: str | None = None,
        timezone: str | None = None,
        day_start: str = "00:00",
        history_length: int = 504,
        horizon: int = 168,
        cycle_length: int = 24,
        any_origin: bool = False,
        origin_stride: int | None = None,
        splits: Sequence[float] = (0.6, 0.2, 0.2),
        scaling: Scaling = "z",
        profile: RecentHistoricProfile | None = None,
        max_gap: int | None = 3,
        max_steps: int | None = None,
        past_covariates: Sequence[str] = (),
        known_covariates: Sequence[str] = (),
        unit: str = "",
        batch_size: int = 32,
        eval_batch_size: int = 256,
        drop_last: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            targets=targets,
            country=country,
            day_start=day_start,
            history_length=history_length,
            horizon=horizon,
            cycle_length=cycle_length,
            any_origin=any_origin,
            origin_stride=origin_stride,
            splits=splits,
            scaling=scaling,
            profile=profile,
            max_gap=max_gap,
            max_steps=max_steps,
            past_covariates=past_covariates,
            known_covariates=known_covariates,
            unit=unit,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            seed=seed,
        )
        self.file, self.data_dir, self.source = file, data_dir, source
        self.path = (EMBEDDED if data_dir is None else Path(data_dir)) / file
        self.time_column, self.time_format = time_column, time_format
        self.layout, self.series_column, self.value_column = layout, series_column, value_column
        self.delimiter, self.decimal, self.timezone = delimiter, decimal, timezone
        self.frequency, self.resample = _spacing("frequency", frequency), _spacing("resample", resample)
        if layout not in ("wide", "long"):
            raise ValueError(f"data.layout={layout!r} is unknown: use wide or long")
        if layout == "long" and (series_column is None or value_column is None):
            raise ValueError("data.layout=long needs data.series_column and data.value_column")
        if layout == "long" and (past_covariates or known_covariates):
            raise ValueError("covariates need data.layout=wide: write one column per series and covariate")
        if timezone is not None:
            _check_timezone(timezone)

    @property
    @override
    def name(self) -> str:
        return str(self.path)

    @override
    def prepare_data(self) -> None:
        if not self.path.is_file():
            obtain = f" It can be obtained from: {self.source}" if self.source else ""
            raise FileNotFoundError(
                f"no file {self.path} (data.data_dir={self.data_dir}, data.file={self.file}): set data.data_dir to the "
                f"folder that holds it.{obtain}"
            )

    @override
    def read(self) -> RegularSeries:
        self.prepare_data()  # also when setup() is called without a Trainer
        return read_series(
            self.path,
            time_column=self.time_column,
            targets=self.targets,
            layout=self.layout,
            series_column=self.series_column,
            value_column=self.value_column,
            covariates=[*self.past_covariates, *self.known_covariates],
            time_format=self.time_format,
            delimiter=self.delimiter,
            decimal=self.decimal,
            frequency=self.frequency,
            resample=self.resample,
            timezone=self.timezone,
            allow_missing=self.max_gap is not None,
        )


def _spacing(key: str, text: str | None) -> pd.Timedelta | None:
    if text is None:
        return None
    try:
        spacing = pd.Timedelta(text if text[:1].isdigit() else f"1{text}")
    except ValueError:
        spacing = pd.Timedelta(0)
    if not spacing > pd.Timedelta(0):
        raise ValueError(f"data.{key}={text!r} is not a time span: write 1h, 30min or 15min")
    return spacing.as_unit("ns")


def _check_timezone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"data.timezone={name!r} is unknown: use an IANA name such as Europe/Berlin") from None

"""Electric load of several countries: the series workload of the energy study (sections 2.2 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from typing_extensions import override

from datamodules.load_weeks import LoadWeeks, PredictPart
from datamodules.readers.load_table import read_loads
from datamodules.readers.time_axis import RegularSeries

EMBEDDED = Path(__file__).parent / "embedded"


class ElectricLoadDataModule(LoadWeeks):
    """Weeks of electric load from CSV or Parquet files; the batch is that of `datamodules.load_weeks.LoadWeeks`.

    Args:
        file: Name of the file in ``data_dir``, or several: long ones continue each other in time, wide ones stand side
            by side (their series are called ``<file>/<column>``).
        data_dir: Folder of the files; None = the data that ship with the program.
        source: Where the files can be obtained; shown when one is missing.
        targets: Names of the series; None = all.
        layout: ``long`` (a row per value) or ``wide`` (a column per series).
        time_column: Column of the time stamps, in UTC or in a time without changes of the clock.
        series_column: Long layout: column with the name of the series.
        value_column: Long layout: column with the value.
        time_format: ``strptime`` format; None recognises ISO 8601 and common forms.
        delimiter: Of CSV files.
        decimal: Decimal mark of CSV files.
        resample: Spacing to average blocks to (loads in MW are averaged, never added up); None keeps that of the file.
        timezone: IANA name of the local time, if the clock changes in the file or the stamps carry a UTC offset.
        window_length: L, steps of a week: the history, and the forecast.
        origin_stride: Steps between two samples of a series.
        splits: Training, validation and test as fractions of the steps, or as numbers of steps.
        max_gap: Longest gap that is filled (with the last value), in steps; samples that touch a longer one are left
            out. None refuses files with gaps.
        max_steps: Use only this many steps; None = all.
        legacy: Whether to do as the published code does: scale every part by its own extremes (which nobody knows in
            advance), and leave out the last sample of every series and part.
        predict_part: What is forecast: every sample of ``train``, ``val`` or ``test``, or ``next``: the week after the
            data.
        repeat: How often prediction goes through the part: a longer run gives a steadier energy figure. Rows are
            written once.
        unit: Unit of the load, for tables and figures.
        batch_size: Samples per training step over all devices.
        eval_batch_size: Samples per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Seed of the order of the training samples.

    Raises:
        ValueError: Names the argument, or file, column and line, and the remedy.
        FileNotFoundError: Names the expected path and where the file can be obtained.
    """

    # Repeated as a literal: the check of a configuration reads it without importing torch.
    input_files: ClassVar[tuple[str, ...]] = ("file",)  # runner/check.py looks for them
    batch_keys: ClassVar[tuple[str, ...]] = (
        "history",
        "target",
        "location",
        "scale",
        "series",
        "origin",
        "index",
        "seasonal_mean",
    )

    def __init__(
        self,
        file: str | Sequence[str],
        data_dir: str | None = None,
        source: str | None = None,
        targets: Sequence[str] | None = None,
        layout: Literal["long", "wide"] = "long",
        time_column: str | Sequence[str] = "Time [s]",
        series_column: str | None = "Country",
        value_column: str | None = "Load [MW]",
        time_format: str | None = None,
        delimiter: str = ",",
        decimal: str = ".",
        resample: str | None = None,
        timezone: str | None = None,
        window_length: int = 168,
        origin_stride: int = 1,
        splits: Sequence[float] = (0.6, 0.2, 0.2),
        max_gap: int | None = 3,
        max_steps: int | None = None,
        legacy: bool = False,
        predict_part: PredictPart = "test",
        repeat: int = 1,
        unit: str = "MW",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        drop_last: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            window_length=window_length,
            origin_stride=origin_stride,
            splits=splits,
            max_gap=max_gap,
            max_steps=max_steps,
            legacy=legacy,
            predict_part=predict_part,
            repeat=repeat,
            unit=unit,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            seed=seed,
        )
        self.files = [file] if isinstance(file, str) else list(file)
        self.data_dir, self.source, self.targets = data_dir, source, targets
        self.layout, self.time_column, self.time_format = layout, time_column, time_format
        self.series_column, self.value_column = series_column, value_column
        self.delimiter, self.decimal, self.resample, self.timezone = delimiter, decimal, resample, timezone
        if not self.files:
            raise ValueError("data.file is empty: name at least one file")
        if layout not in ("long", "wide"):
            raise ValueError(f"data.layout={layout!r} is unknown: use long or wide")
        if layout == "long" and (series_column is None or value_column is None):
            raise ValueError("data.layout=long needs data.series_column and data.value_column")

    @property
    def paths(self) -> list[Path]:
        """The files, with their folder."""
        return [(EMBEDDED if self.data_dir is None else Path(self.data_dir)) / file for file in self.files]

    @property
    @override
    def name(self) -> str:
        return ", ".join(map(str, self.paths))

    @override
    def prepare_data(self) -> None:
        for path in self.paths:
            if not path.is_file():
                obtain = f" It can be obtained from: {self.source}" if self.source else ""
                raise FileNotFoundError(
                    f"no file {path} (data.data_dir={self.data_dir}, data.file={path.name}): set data.data_dir to the "
                    f"folder that holds it.{obtain}"
                )

    @override
    def read(self) -> tuple[RegularSeries, list[str]]:
        import pandas as pd

        self.prepare_data()  # also when setup() is called without a Trainer
        return read_loads(
            self.paths,
            time_column=self.time_column,
            layout=self.layout,
            series_column=self.series_column,
            value_column=self.value_column,
            targets=self.targets,
            time_format=self.time_format,
            delimiter=self.delimiter,
            decimal=self.decimal,
            resample=None if self.resample is None else pd.Timedelta(self.resample),
            timezone=self.timezone,
            allow_missing=self.max_gap is not None,
        )

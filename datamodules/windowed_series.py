"""What every source of series shares: splits, scaling, gaps, profiles, windows, loaders (ReCycle, section 6.3)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.calendar import clock_marks, country_per_series, day_calendar
from datamodules.gaps import fill_gaps, mask_leading_zeros
from datamodules.loading import make_loader, whole_batch
from datamodules.readers.time_axis import RegularSeries
from datamodules.series_parts import Part, SeriesParts
from datamodules.series_predictions import prediction_table
from datamodules.series_scaling import Scaling, count_before, mean_absolute_change, training_scale
from datamodules.series_windows import SeriesArrays, SeriesWindows
from networks.recycle.profile import RecentHistoricProfile

log = logging.getLogger(__name__)


class WindowedSeries(LightningDataModule):
    """Everything behind the source of the series: split, scale, fill, tabulate profiles, cut windows.

    Subclasses say where the series come from (`read`, `name`); the arguments are those of `SeriesDataModule`.
    """

    def __init__(
        self,
        *,
        targets: Sequence[str],
        country: str | Sequence[str | None] | None,
        day_start: str,
        history_length: int,
        horizon: int,
        cycle_length: int,
        any_origin: bool,
        origin_stride: int | None,
        splits: Sequence[float],
        scaling: Scaling,
        profile: RecentHistoricProfile | None,
        max_gap: int | None,
        max_steps: int | None,
        past_covariates: Sequence[str],
        known_covariates: Sequence[str],
        unit: str,
        batch_size: int,
        eval_batch_size: int,
        drop_last: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # predict has one window, one rank takes it
        self.targets = [str(name) for name in targets]
        self.past_covariates, self.known_covariates = list(past_covariates), list(known_covariates)
        self.history_length, self.horizon, self.cycle_length = history_length, horizon, cycle_length
        self.any_origin, self.origin_stride = any_origin, cycle_length if origin_stride is None else origin_stride
        self.splits, self.scaling, self.unit = list(splits), scaling, unit
        self.profile = RecentHistoricProfile() if profile is None else profile
        self.max_gap, self.max_steps = max_gap, max_steps
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.seed = num_workers, seed
        self.report: dict[str, Any] = {}
        self._arrays: SeriesArrays | None = None
        self._parts = SeriesParts(self.splits, cycle_length, history_length, horizon)
        self._check_arguments()
        self.day_start = _time_of_day(day_start)
        self.countries = country_per_series(country, len(self.targets))

    @property
    @abstractmethod
    def name(self) -> str:
        """What error messages call the source."""

    @abstractmethod
    def read(self) -> RegularSeries:
        """Return targets, past and known covariates, in this order."""

    def _check_arguments(self) -> None:
        """Refuse what cannot work before any file is touched."""
        sizes = ("history_length", "horizon", "cycle_length", "origin_stride", "batch_size", "eval_batch_size")
        for key in sizes:
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1")
        cycle = self.cycle_length
        if not self.targets:
            raise ValueError("data.targets is empty: name at least one series")
        columns = [*self.targets, *self.past_covariates, *self.known_covariates]
        if repeated := sorted({name for name in columns if columns.count(name) > 1}):
            raise ValueError(f"data.targets and the covariates name {repeated} twice: name every column once")
        if 86_400 % cycle:
            raise ValueError(f"data.cycle_length={cycle} does not cut the day into steps of whole seconds")
        if self.history_length % cycle:
            raise ValueError(
                f"data.history_length={self.history_length} is not a multiple of data.cycle_length={cycle}: "
                f"use {_multiples(self.history_length, cycle)}"
            )
        if self.horizon % cycle and not self.any_origin:
            raise ValueError(
                f"data.horizon={self.horizon} is not a multiple of data.cycle_length={cycle}: "
                f"use {_multiples(self.horizon, cycle)}, or set data.any_origin=true"
            )
        if self.origin_stride % cycle and not self.any_origin:
            raise ValueError(
                f"data.origin_stride={self.origin_stride} is not a multiple of data.cycle_length={cycle}: "
                f"use {_multiples(self.origin_stride, cycle)}, or set data.any_origin=true"
            )
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"data.scaling={self.scaling!r} is unknown: use one of {', '.join(get_args(Scaling))}")
        for key in ("max_gap", "max_steps", "num_workers"):
            if (value := getattr(self, key)) is not None and value < 0:
                raise ValueError(f"data.{key}={value} must not be negative")
        self._parts.check(whole_days=not self.any_origin)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read and prepare once; later calls (test after fit) return at once."""
        if self._arrays is not None:
            return
        series = self.read()
        self._check_cycle(series.step)
        axis, matrix = self._trim(series)
        num_targets = len(self.targets)
        values, covariates = matrix[:, :num_targets].copy(), matrix[:, num_targets:].copy()
        observed = self._end_of_observations(values)
        values = values[:observed]
        self.report["leading_zeros"] = self._by_series(mask_leading_zeros(values, self.cycle_length))
        self.timestamps, self.step = axis[:observed], series.step
        self._bounds = self._parts.bounds(observed, self.name)
        train_end = self._bounds["train"][1]
        location, scale = training_scale(values[:train_end], self.scaling, self.targets, self.name)
        weekly = mean_absolute_change(values[:train_end], self.season_length)
        # A series that repeats itself exactly has no scale of its own; no number of it may become infinite.
        self._mase_scale = torch.as_tensor(np.maximum(weekly, 1e-8 * scale), dtype=torch.float32)
        self._target_scale = tuple(torch.as_tensor(x, dtype=torch.float32) for x in (location, scale))
        self.report["missing"] = self._by_series(np.isnan(values).sum(axis=0))
        self.report["filled"] = self._by_series(fill_gaps(values, self.max_gap or 0, self._origin_grid))
        arrays = self._tabulate(axis, (values - location) / scale, covariates, train_end)
        self._origins = {part: self._find_origins(arrays, part) for part in get_args(Part)}
        if len(self._origins["train"]) == 0:
            raise ValueError(
                f"{self.name}: every training window of every series touches a gap; raise data.max_gap, shorten "
                "data.history_length or remove incomplete series from data.targets"
            )
        self._arrays = arrays
        self._log_report()

    def _check_cycle(self, step: pd.Timedelta) -> None:
        day = pd.Timedelta(days=1)
        if step * self.cycle_length != day:
            fitting = day / step
            remedy = f"data.cycle_length={fitting:.0f}, or " if fitting == int(fitting) and fitting > 1 else ""
            raise ValueError(
                f"{self.name}: the steps are {step} apart, so that data.cycle_length={self.cycle_length} steps are "
                f"{step * self.cycle_length} instead of one day; set {remedy}data.resample to {day / self.cycle_length}"
            )

    def _trim(self, series: RegularSeries) -> tuple[pd.DatetimeIndex, np.ndarray]:
        """Begin with a whole day and cut to ``max_steps``."""
        since_midnight = series.timestamps[0] - series.timestamps[0].normalize()
        lead, rest = divmod((self.day_start - since_midnight) % pd.Timedelta(days=1), series.step)
        if rest != pd.Timedelta(0):
            raise ValueError(
                f"{self.name}: no step begins at data.day_start={self.day_start} (the first is at "
                f"{series.timestamps[0]}, the step {series.step}); choose a time of the file"
            )
        stop = len(series.timestamps) if self.max_steps is None else lead + self.max_steps
        self.report = {"source": self.name, **series.counts, "trimmed_leading_steps": lead}
        return series.timestamps[lead:stop], series.values[lead:stop]

    def _end_of_observations(self, values: np.ndarray) -> int:
        """Return the number of steps to keep: rows after the last value only carry known covariates."""
        present = np.flatnonzero(~np.isnan(values).all(axis=1))
        if len(present) == 0:
            raise ValueError(f"{self.name}: no whole day with a value; check data.targets, data.day_start")
        end = int(present[-1]) + 1
        partial = 0 if self.any_origin else end % self.cycle_length
        self.report["trimmed_trailing_steps"] = partial
        return end - partial

    @property
    def _origin_grid(self) -> int:
        """Spacing of the steps at which a window may begin, counted from the first step."""
        starts = [start for start, _ in self._bounds.values()]
        return self.cycle_length if all(x % self.cycle_length == 0 for x in (self.origin_stride, *starts)) else 1

    def _tabulate(
        self, axis: pd.DatetimeIndex, values: np.ndarray, covariates: np.ndarray, train_end: int
    ) -> SeriesArrays:
        """Build the arrays that all windows share from scaled values ``(time, channel)`` with NaN."""
        cycle, num_steps = self.cycle_length, len(values)
        extended = num_steps + self.horizon
        num_days = -(-num_steps // cycle)
        day_of_step = torch.arange(extended) // cycle
        calendar = day_calendar(axis[0], -(-extended // cycle) + 1, self.countries)
        day_type = torch.from_numpy(calendar.day_type)
        days = np.full((num_days * cycle, values.shape[1]), np.nan)
        days[:num_steps] = values
        table = self.profile.table(
            torch.from_numpy(days).reshape(num_days, cycle, -1), day_type[:num_days].contiguous()
        )
        missing = np.isnan(values)
        extra: dict[str, Any] = {}
        if covariates.shape[1]:
            extra = self._covariates(covariates, num_steps, train_end)
        return SeriesArrays(
            values=torch.from_numpy(np.where(missing, 0.0, values).astype(np.float32)),
            missing_before=count_before(missing),
            profile=self.profile,
            profile_table=table.to(torch.float32),
            day_type=day_type,
            step_day_type=day_type[day_of_step],
            step_holiday=torch.from_numpy(calendar.holiday)[day_of_step],
            calendar=torch.from_numpy(calendar.vector),
            marks=torch.from_numpy(clock_marks(self.time_of(0, extended), cycle)),
            **extra,
        )

    def _covariates(self, covariates: np.ndarray, num_steps: int, train_end: int) -> dict[str, Any]:
        """Scale and fill the covariates; those known in advance may reach ``horizon`` steps past the series."""
        names, past = [*self.past_covariates, *self.known_covariates], len(self.past_covariates)
        full = np.full((num_steps + self.horizon, len(names)), np.nan)
        available = covariates[: len(full)]
        full[: len(available)] = available
        location, scale = training_scale(full[:train_end], self.scaling, names, self.name)
        fill_gaps(full[:num_steps, :past], self.max_gap or 0, self._origin_grid)
        fill_gaps(full[:, past:], self.max_gap or 0, self._origin_grid)
        missing = np.isnan(full)
        kinds = np.stack([missing[:, :past].any(axis=1), missing[:, past:].any(axis=1)], axis=1)
        scaled = np.where(missing, 0.0, (full - location) / scale)
        return {
            "covariates": torch.from_numpy(scaled.astype(np.float32)),
            "num_past_covariates": past,
            "covariates_missing_before": count_before(kinds),
        }

    def _find_origins(self, arrays: SeriesArrays, part: Part) -> Tensor:
        """List the origins of a part; windows in which no series is complete are dropped."""
        start, stop = self._bounds[part]
        first = max(start, self.history_length)
        origins = torch.arange(first, max(stop - self.horizon + 1, first), self.origin_stride)
        valid = arrays.valid(origins, self.history_length, self.horizon)
        keep = valid.any(dim=1)
        self.report.setdefault("windows", {})[part] = int(keep.sum())
        self.report.setdefault("dropped_windows", {})[part] = int((~keep).sum())
        self.report.setdefault("partly_valid_windows", {})[part] = int((keep & ~valid.all(dim=1)).sum())
        return origins[keep]

    def _by_series(self, counts: np.ndarray) -> dict[str, int]:
        return {name: int(count) for name, count in zip(self.targets, counts, strict=True) if count}

    def _log_report(self) -> None:
        report = self.report
        log.info(
            "%s: %d series, %d steps from %s to %s; windows %s",
            self.name, self.num_channels, len(self.timestamps), self.timestamps[0], self.timestamps[-1],
            report["windows"],
        )  # fmt: skip
        quiet = ("source", "rows", "windows")
        if repaired := {key: value for key, value in report.items() if key not in quiet and _any(value)}:
            log.info("%s: repaired or left out: %s", self.name, repaired)
        if trailing := report["trimmed_trailing_steps"]:
            log.info(
                "%s: the last %d steps are not a whole day and are left out; data.any_origin=true keeps them and "
                "forecasts from the last one on",
                self.name, trailing,
            )  # fmt: skip

    def _windows(self, part: Part) -> SeriesWindows:
        assert self._arrays is not None, "setup() comes first"
        return SeriesWindows(self._arrays, self._origins[part], self.history_length, self.horizon)

    def _loader(self, data: SeriesWindows, batch_size: int, **options: Any) -> DataLoader:
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return make_loader(
            data,
            batch_size,
            seed=self.seed,
            layout=layout,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            **options,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader(self._windows("train"), self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader(self._windows("val"), self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader(self._windows("test"), self.eval_batch_size)

    def calibration_dataloader(self) -> DataLoader:
        """Give the windows of validation and then of test, in the order of time, all of them on every rank."""
        assert self._arrays is not None, "setup() comes first"
        origins = torch.cat([self._origins["val"], self._origins["test"]])
        data = SeriesWindows(self._arrays, origins, self.history_length, self.horizon)
        return make_loader(data, self.eval_batch_size, seed=self.seed, collate_fn=whole_batch)

    @override
    def predict_dataloader(self) -> DataLoader:
        """Give the one window whose origin is the first step after the last observation."""
        assert self._arrays is not None, "setup() comes first"
        origin = torch.tensor([len(self.timestamps)])
        valid = self._arrays.valid(origin, self.history_length, self.horizon, with_target=False)[0]
        if not valid.any():
            known = self.known_covariates and "the known covariates of the next horizon or "
            raise ValueError(
                f"{self.name}: no forecast after {self.timestamps[-1]}: {known or ''}the last {self.history_length} "
                "steps of every series are incomplete; add the rows (targets may be empty behind the last "
                "observation) or raise data.max_gap"
            )
        if not valid.all():
            names = [name for name, good in zip(self.targets, valid.tolist(), strict=True) if not good]
            log.warning("%s: gaps in the last %d steps of %s: missing values enter as 0 on the scaled axis",
                        self.name, self.history_length, names)  # fmt: skip
        data = SeriesWindows(self._arrays, origin, self.history_length, self.horizon, with_target=False)
        return self._loader(data, self.eval_batch_size)

    @property
    def num_channels(self) -> int:
        """Number of series C."""
        return len(self.targets)

    @property
    def channel_names(self) -> list[str]:
        """Names of the series, in the order of the channels."""
        return list(self.targets)

    @property
    def season_length(self) -> int:
        """Steps per week."""
        return 7 * self.cycle_length

    @property
    def target_scale(self) -> tuple[Tensor, Tensor]:
        """Location and scale ``(channel,)`` each: physical = scaled * scale + location."""
        return self._target_scale

    @property
    def mase_scale(self) -> Tensor:
        """``(channel,)`` mean absolute error of repeating the last week in the training part, data's units."""
        return self._mase_scale

    def time_of(self, origin: int, num_steps: int) -> pd.DatetimeIndex:
        """Return the local times of ``num_steps`` steps from ``origin`` on, also past the last observation."""
        return pd.date_range(self.timestamps[0] + self.step * origin, periods=num_steps, freq=self.step)

    def prediction_table(self, outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Tabulate step outputs, one row per origin, step and series; see `datamodules.series_predictions`."""
        return prediction_table(outputs, self.targets, self.time_of)


def _any(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else bool(value)


def _multiples(number: int, cycle: int) -> str:
    lower = number // cycle * cycle
    return f"{lower} or {lower + cycle}" if lower else str(cycle)


def _time_of_day(text: str) -> pd.Timedelta:
    try:
        time = pd.Timestamp(f"2000-01-01 {text}") - pd.Timestamp("2000-01-01")
    except ValueError:
        raise ValueError(f"data.day_start={text!r} is not a time of day: write HH:MM, in YAML with quotes") from None
    return time

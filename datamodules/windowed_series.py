"""What every source of series shares: splits, scaling, gaps, profiles, windows, loaders (ReCycle, section 6.3)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.calendar import clock_marks, country_per_series, day_calendar
from datamodules.gaps import fill_gaps, mask_leading_zeros
from datamodules.loading import make_loader
from datamodules.readers.time_axis import RegularSeries
from datamodules.series_windows import SeriesArrays, SeriesWindows, same_batch
from networks.recycle.profile import RecentHistoricProfile

log = logging.getLogger(__name__)

Scaling = Literal["z", "min_max", "abs_max", "none"]
Part = Literal["train", "val", "test"]


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
        if len(self.splits) != 3 or min(self.splits) < 0 or self.splits[0] <= 0:
            raise ValueError(f"data.splits={self.splits} must be three numbers: training, validation, test")
        if self._fractional:
            if sum(self.splits) > 1 + 1e-9:
                raise ValueError(
                    f"data.splits={self.splits} add up to more than 1: use fractions such as 0.6, 0.2, 0.2"
                )
        elif any(part != int(part) for part in self.splits):
            raise ValueError(f"data.splits={self.splits} must be fractions up to 1 or whole numbers of steps")
        elif not self.any_origin and any(part % cycle for part in self.splits):
            raise ValueError(
                f"data.splits={self.splits} are not multiples of data.cycle_length={cycle}: use whole days, or set "
                "data.any_origin=true"
            )

    @property
    def _fractional(self) -> bool:
        return max(self.splits) <= 1

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
        self._bounds = self._part_bounds(observed)
        train_end = self._bounds["train"][1]
        location, scale = _scale(values[:train_end], self.scaling, self.targets, self.name)
        weekly = _mean_absolute_change(values[:train_end], self.season_length)
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

    def _part_bounds(self, num_steps: int) -> dict[Part, tuple[int, int]]:
        """Return the steps [start, stop) of each part; its targets lie inside."""
        cycle, needed = self.cycle_length, self._needed
        if not self._fits(num_steps):
            days = num_steps // cycle
            if self._fractional:
                while not self._fits(days * cycle):
                    days += 1
            else:
                parts = [max(int(part), size if part else 0) for part, size in zip(self.splits, needed, strict=True)]
                days = -(-sum(parts) // cycle)
            raise ValueError(
                f"{self.name}: {num_steps / cycle:g} days are too short: windows of {self.history_length / cycle:g} + "
                f"{self.horizon / cycle:g} days with data.splits={self.splits} need {days} days "
                f"(at least {needed[0] / cycle:g} in training, {needed[1] / cycle:g} in validation and in test); "
                "give a longer file, change data.splits, or shorten data.history_length and data.horizon"
            )
        cuts = self._cuts(num_steps)
        return dict(zip(get_args(Part), pairwise(cuts), strict=True))

    @property
    def _needed(self) -> tuple[int, int, int]:
        """Steps that one window needs in each part."""
        return self.history_length + self.horizon, self.horizon, self.horizon

    def _fits(self, num_steps: int) -> bool:
        """Tell whether every part that is wanted (its split is not 0) holds a window."""
        cuts = self._cuts(num_steps)
        sizes = zip(self.splits, self._needed, cuts[:-1], cuts[1:], strict=True)
        return cuts[-1] <= num_steps and all(split == 0 or stop - start >= size for split, size, start, stop in sizes)

    def _cuts(self, num_steps: int) -> list[int]:
        """Return the steps at which training, validation and test begin and end: floor(f N) days, or the counts."""
        sums = [0, self.splits[0], sum(self.splits[:2]), sum(self.splits)]
        if not self._fractional:
            return [int(part) for part in sums]
        days = num_steps // self.cycle_length
        return [int(part * days + 1e-9) * self.cycle_length for part in sums]

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
            missing_before=_count_before(missing),
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
        location, scale = _scale(full[:train_end], self.scaling, names, self.name)
        fill_gaps(full[:num_steps, :past], self.max_gap or 0, self._origin_grid)
        fill_gaps(full[:, past:], self.max_gap or 0, self._origin_grid)
        missing = np.isnan(full)
        kinds = np.stack([missing[:, :past].any(axis=1), missing[:, past:].any(axis=1)], axis=1)
        scaled = np.where(missing, 0.0, (full - location) / scale)
        return {
            "covariates": torch.from_numpy(scaled.astype(np.float32)),
            "num_past_covariates": past,
            "covariates_missing_before": _count_before(kinds),
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
            collate_fn=same_batch,
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
        return make_loader(data, self.eval_batch_size, seed=self.seed, collate_fn=same_batch)

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
        """Tabulate step outputs, one row per origin, step and series.

        Args:
            outputs: Outputs of a test or predict step in the data's units, or a list of them: ``prediction``
                (batch, time, channel[, quantile]), ``profile`` (batch, time, channel), ``origin`` (batch,), and where
                present ``target``, ``valid``, ``quantiles``, and ``std``, ``lower_<percent>`` and ``upper_<percent>``
                (batch, time, channel) of forecasts that are samples.

        Returns:
            Columns series, origin, timestamp, forecast, rhp, one per quantile (q10, q50, ...), std, lower_50, upper_50,
            ... where the module delivers them, and actual when the target is known (NaN where the series has a gap in
            that window).
        """
        frames = [self._table_of_batch(batch) for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)]
        return pd.concat(frames, ignore_index=True)

    def _table_of_batch(self, outputs: Mapping[str, Any]) -> pd.DataFrame:
        prediction = outputs["prediction"].detach().cpu().double()
        batch, horizon, channels = prediction.shape[:3]
        times = [self.time_of(origin, horizon) for origin in outputs["origin"].tolist()]
        columns: dict[str, Any] = {
            "series": np.tile(np.array(self.targets, dtype=object), batch * horizon),
            "origin": np.repeat(np.array([stamps[0] for stamps in times], dtype="datetime64[ns]"), horizon * channels),
            "timestamp": np.repeat(np.concatenate([stamps.as_unit("ns").to_numpy() for stamps in times]), channels),
            "forecast": prediction,
            "rhp": outputs["profile"].detach().cpu().double(),
        }
        if prediction.ndim == 4:
            levels = outputs["quantiles"].detach().cpu().double()
            # The level next to the median is the point forecast, the upper one of two; of one-sided sets as well.
            distance = (levels - 0.5).abs().round(decimals=6)  # levels arrive in float32
            columns["forecast"] = prediction[..., len(levels) - 1 - int(distance.flip(0).argmin())]
            for i, level in enumerate(levels.tolist()):
                columns[f"q{round(100 * level, 4):g}"] = prediction[..., i]
        for name in outputs:
            if name == "std" or name.startswith(("lower_", "upper_")):
                columns[name] = outputs[name].detach().cpu().double()
        if outputs.get("target") is not None:
            actual = outputs["target"].detach().cpu().double()
            valid = outputs.get("valid")
            columns["actual"] = actual if valid is None else actual.where(valid.cpu()[:, None, :], torch.nan)
        return pd.DataFrame({key: np.asarray(value).reshape(-1) for key, value in columns.items()})


def _scale(values: np.ndarray, scaling: Scaling, names: Sequence[str], source: str) -> tuple[np.ndarray, np.ndarray]:
    """Return location and scale of each column of the training part, NaN skipped."""
    if (empty := np.isnan(values).all(axis=0)).any():
        raise ValueError(
            f"{source}, column {names[int(np.argmax(empty))]!r}: no value in the training part; remove the column or "
            "raise the first of data.splits"
        )
    columns = values.shape[1]
    if scaling == "z":
        location, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    elif scaling == "min_max":
        location = np.nanmin(values, axis=0)
        scale = np.nanmax(values, axis=0) - location
    elif scaling == "abs_max":
        location, scale = np.zeros(columns), np.nanmax(np.abs(values), axis=0)
    else:
        location, scale = np.zeros(columns), np.ones(columns)
    # A constant series stays finite: rounding alone leaves about 1e-16 of its level.
    size = np.nanmax(np.abs(values), axis=0)
    return location, np.where(scale > 1e-10 * size, scale, 1.0)


def _mean_absolute_change(values: np.ndarray, lag: int) -> np.ndarray:
    """Return the mean absolute error of repeating the value ``lag`` steps ago, NaN if there is none."""
    error = np.abs(values[lag:] - values[:-lag])
    number = (~np.isnan(error)).sum(axis=0)
    return np.nansum(error, axis=0) / np.where(number > 0, number, np.nan)


def _count_before(missing: np.ndarray) -> Tensor:
    """Return the number of missing steps before each step, ``(time + 1, column)``."""
    count = np.zeros((len(missing) + 1, missing.shape[1]), dtype=np.int32)
    np.cumsum(missing, axis=0, out=count[1:])
    return torch.from_numpy(count)


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

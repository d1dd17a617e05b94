"""Forecast windows over series in memory: nothing is copied until a batch is gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.loading import WholeBatches
from networks.recycle.profile import RecentHistoricProfile


@dataclass(frozen=True)
class SeriesArrays:
    """What all windows of all parts share.

    Calendars and marks reach beyond the last observation, so that the next horizon can be forecast. ``time'`` and
    ``day'`` are the lengths including that extension.

    Attributes:
        values: ``(time, channel)`` float32, scaled, missing ones 0.
        missing_before: ``(time + 1, channel)`` int32, missing values before each step.
        profile: How the profiles are looked up in ``profile_table``.
        profile_table: ``(day + 1, 3, step, channel)`` float32, scaled axis.
        day_type: ``(day', channel)`` int64.
        step_day_type: ``(time', channel)`` int64, the type of the day of each step.
        step_holiday: ``(time', channel)`` bool, public holiday.
        calendar: ``(day', channel, 9)`` float32.
        marks: ``(time', 4)`` float32.
        covariates: ``(time', P + K)`` float32 scaled, past-only columns first; None without covariates.
        num_past_covariates: P.
        covariates_missing_before: ``(time' + 1, 2)`` int32, steps at which a past-only / a known covariate is missing.
    """

    values: Tensor
    missing_before: Tensor
    profile: RecentHistoricProfile
    profile_table: Tensor
    day_type: Tensor
    step_day_type: Tensor
    step_holiday: Tensor
    calendar: Tensor
    marks: Tensor
    covariates: Tensor | None = None
    num_past_covariates: int = 0
    covariates_missing_before: Tensor | None = None

    @property
    def cycle_length(self) -> int:
        """Steps per day D."""
        return self.profile_table.shape[2]

    def valid(self, origins: Tensor, history_length: int, horizon: int, *, with_target: bool = True) -> Tensor:
        """Tell which series miss no value in the windows at ``origins``.

        Args:
            origins: ``(batch,)`` int64.
            history_length: L.
            horizon: T.
            with_target: Whether the steps from the origin on count too.

        Returns:
            ``(batch, channel)`` bool; false for all series where a covariate is missing.
        """
        end = origins + horizon if with_target else origins
        valid = self.missing_before[end] == self.missing_before[origins - history_length]
        if self.covariates_missing_before is not None:
            gaps, start = self.covariates_missing_before, origins - history_length
            past = gaps[origins, 0] == gaps[start, 0]
            known = gaps[origins + horizon, 1] == gaps[start, 1]
            valid = valid & (past & known)[:, None]
        return valid


class SeriesWindows(WholeBatches):
    """Windows at given origins; the batch dictionary is that of `datamodules.series.SeriesDataModule`.

    Args:
        arrays: Shared by all data sets of a DataModule.
        origins: ``(window,)`` int64, first forecast step of each window.
        history_length: L, a multiple of the cycle length.
        horizon: T.
        with_target: False for origins whose future is not known.
    """

    def __init__(
        self, arrays: SeriesArrays, origins: Tensor, history_length: int, horizon: int, *, with_target: bool = True
    ) -> None:
        self.arrays, self.origins = arrays, origins
        self.history_length, self.horizon, self.with_target = history_length, horizon, with_target

    def __len__(self) -> int:
        return len(self.origins)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        arrays, length, horizon = self.arrays, self.history_length, self.horizon
        profile, table, cycle = arrays.profile, arrays.profile_table, arrays.cycle_length
        origins = self.origins[torch.as_tensor(indices)]
        start = origins - length
        # A token has the calendar of its first step; D divides L, so that history and forecast tokens share a grid.
        first_day, origin_day = start // cycle, origins // cycle
        batch = {
            "history": _runs(arrays.values, start, length),
            "valid": arrays.valid(origins, length, horizon, with_target=self.with_target),
            "history_profile": profile.history_profile(table, origins, arrays.day_type, length),
            "forecast_profile": profile.forecast(table, origins, arrays.day_type, horizon),
            "history_calendar": _runs(arrays.calendar, first_day, length // cycle),
            "forecast_calendar": _runs(arrays.calendar, origin_day, -(-horizon // cycle)),
            "history_marks": _runs(arrays.marks, start, length),
            "forecast_marks": _runs(arrays.marks, origins, horizon),
            "target_day_type": _runs(arrays.step_day_type, origins, horizon),
            "target_holiday": _runs(arrays.step_holiday, origins, horizon),
            "origin": origins,
        }
        if self.with_target:
            batch["target"] = _runs(arrays.values, origins, horizon)
        if arrays.covariates is not None:
            batch["history_covariates"] = _runs(arrays.covariates, start, length)
            batch["forecast_covariates"] = _runs(arrays.covariates, origins, horizon)[..., arrays.num_past_covariates :]
        return batch


def _runs(values: Tensor, start: Tensor, length: int) -> Tensor:
    """Gather ``values[s : s + length]`` for every start, ``(batch, length, ...)``.

    The overlapping view makes one index per window, not per step; each window is one contiguous copy.
    """
    row = values[0].numel()
    windows = values.as_strided((len(values) - length + 1, length * row), (row, 1))
    return windows.index_select(0, start).view(len(start), length, *values.shape[1:])

"""Generator of series with a daily cycle whose best forecast is known (ReCycle, section 6.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import lfilter
from typing_extensions import override

from datamodules.calendar import day_calendar
from datamodules.readers.time_axis import RegularSeries
from datamodules.windowed_series import Scaling, WindowedSeries
from networks.recycle.profile import RecentHistoricProfile

TEMPERATURE = "temperature"


class SyntheticSeries(NamedTuple):
    """Generated series and the temperature they depend on.

    Attributes:
        timestamps: ``(time,)``.
        values: ``(time, channel)`` float64, NaN in missing blocks.
        temperature: ``(time,)`` degrees Celsius.
    """

    timestamps: pd.DatetimeIndex
    values: np.ndarray
    temperature: np.ndarray


def day_profiles(cycle_length: int) -> np.ndarray:
    """Return the profiles S of working day (two peaks), Saturday (flat) and Sunday (late morning), mean 1.

    Returns:
        ``(3, cycle_length)``.
    """
    hour = np.arange(cycle_length) * 24 / cycle_length

    def peak(centre: float, width: float) -> np.ndarray:
        distance = np.minimum(np.abs(hour - centre), 24 - np.abs(hour - centre))
        return np.exp(-0.5 * (distance / width) ** 2)

    profiles = np.stack(
        [
            0.5 + 0.9 * peak(8, 1.5) + 1.1 * peak(18, 2.5),
            0.8 + 0.3 * peak(14, 5),
            0.6 + 0.7 * peak(11, 2.5),
        ]
    )
    return profiles / profiles.mean(axis=1, keepdims=True)


def synthetic_series(
    num_days: int,
    num_series: int = 1,
    *,
    start: str = "2023-01-02",
    cycle_length: int = 24,
    countries: Sequence[str | None] | None = None,
    level: float = 100.0,
    level_walk: float = 0.0,
    annual_amplitude: float = 0.0,
    annual_phase: float = 0.0,
    noise: float = 0.03,
    noise_memory: float = 0.9,
    cooling: float = 0.0,
    heating: float = 0.0,
    missing_blocks: int = 0,
    missing_length: int = 12,
    regime_change: float | None = None,
    regime_factor: float = 0.7,
    seed: int = 0,
) -> SyntheticSeries:
    """Generate ``y_t = L(t) S_c(t)[s(t)] (1 + a cos(2 pi doy / 365.25 + phi)) + temperature term + e_t``.

    With ``noise=0`` and a constant level (no walk, season, temperature or regime change) every day equals the last day
    of its type, so that the recent historic profile is the exact forecast.

    Args:
        num_days: Whole days.
        num_series: Series; the i-th has ``level * (1 + i / 2)`` and its own noise, walk and gaps.
        start: Date of the first day.
        cycle_length: Steps per day.
        countries: Code per series for public holidays; None = no holidays.
        level: L(0) of the first series.
        level_walk: Standard deviation of the daily step of L, relative to L(0).
        annual_amplitude: a.
        annual_phase: phi, radian.
        noise: Standard deviation of the AR(1) error e, relative to L(0).
        noise_memory: First-order coefficient of e, per step.
        cooling: b, per degree above 18, relative to L(0).
        heating: h, per degree below 15, relative to L(0).
        missing_blocks: Blocks of missing values per series.
        missing_length: Length of a block, steps.
        regime_change: Fraction of the days after which L is multiplied by ``regime_factor``; None = never.
        regime_factor: See ``regime_change``.
        seed: Seed of everything random.
    """
    rng = np.random.default_rng(seed)
    num_steps = num_days * cycle_length
    timestamps = pd.date_range(start, periods=num_steps, freq=pd.Timedelta(days=1) / cycle_length)
    calendar = day_calendar(timestamps[0], num_days, [None] * num_series if countries is None else list(countries))
    day = np.arange(num_steps) // cycle_length
    year = 2 * np.pi * timestamps.day_of_year.to_numpy() / 365.25
    phase = 2 * np.pi * np.arange(num_steps) / cycle_length
    temperature = 12 - 9 * np.cos(year) - 4 * np.cos(phase - np.pi / 12)
    temperature = temperature + _autoregressive(rng, (num_steps, 1), 0.98, 2.5)[:, 0]

    levels = level * (1 + np.arange(num_series) / 2)
    drift = 1 + np.cumsum(level_walk * rng.standard_normal((num_days, num_series)), axis=0)
    if regime_change is not None:
        drift[int(regime_change * num_days) :] *= regime_factor
    profile = day_profiles(cycle_length)[calendar.day_type[day], (np.arange(num_steps) % cycle_length)[:, None]]
    values = drift[day] * profile * (1 + annual_amplitude * np.cos(year + annual_phase))[:, None]
    warm, cold = np.maximum(temperature - 18, 0), np.maximum(15 - temperature, 0)
    values += (cooling * warm + heating * cold)[:, None]
    values += _autoregressive(rng, values.shape, noise_memory, noise)
    values *= levels
    for channel in range(num_series):
        for block in rng.integers(0, max(num_steps - missing_length, 1), missing_blocks):
            values[block : block + missing_length, channel] = np.nan
    return SyntheticSeries(timestamps, values, temperature)


def _autoregressive(rng: np.random.Generator, shape: tuple[int, int], memory: float, deviation: float) -> np.ndarray:
    """Draw stationary AR(1) series ``(time, channel)`` with the given standard deviation."""
    shocks = rng.standard_normal(shape) * deviation
    shocks[1:] *= np.sqrt(1 - memory**2)
    return lfilter([1.0], [1.0, -memory], shocks, axis=0)


class SyntheticSeriesDataModule(WindowedSeries):
    """Windows of generated series; the batch is that of `datamodules.series.SeriesDataModule`.

    Args:
        targets: Names of the series; their number is the number of series.
        num_days: Days that are generated.
        start: Date of the first day.
        level: See `synthetic_series`, as the following up to ``data_seed``.
        level_walk: Daily step of the level.
        annual_amplitude: Amplitude of the yearly cycle.
        annual_phase: Its phase, radian.
        noise: Standard deviation of the error relative to the level.
        noise_memory: AR(1) coefficient of the error.
        cooling: Load per degree above 18.
        heating: Load per degree below 15.
        missing_blocks: Blocks of missing values per series.
        missing_length: Steps of a block.
        regime_change: Fraction of the days after which the level changes; None = never.
        regime_factor: Factor of that change.
        data_seed: Seed of the series (``seed`` orders the training windows), so that repeated trainings share data.
        country: As in `SeriesDataModule`, like all that follow.
        day_start: Time of day at which a day begins.
        history_length: L, steps.
        horizon: T, steps.
        cycle_length: D, steps per day.
        any_origin: Whether forecasts may start at any step of the day.
        origin_stride: Steps between two windows; None = one day.
        splits: Fractions of the days or numbers of steps.
        scaling: ``z``, ``min_max``, ``abs_max`` or ``none``.
        profile: Recent historic profile; None = its defaults.
        max_gap: Longest gap that is interpolated, steps.
        max_steps: Use only this many steps; None = all.
        past_covariates: ``[temperature]`` or nothing.
        known_covariates: ``[temperature]`` or nothing: also known for the horizon.
        unit: Unit of the targets.
        batch_size: Windows per training step over all devices.
        eval_batch_size: Windows per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Seed of the order of the training windows.
    """

    # Repeated as a literal: the check of a configuration reads it without importing torch.
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
        targets: Sequence[str] = ("series_0",),
        num_days: int = 120,
        start: str = "2023-01-02",
        level: float = 100.0,
        level_walk: float = 0.0,
        annual_amplitude: float = 0.0,
        annual_phase: float = 0.0,
        noise: float = 0.03,
        noise_memory: float = 0.9,
        cooling: float = 0.0,
        heating: float = 0.0,
        missing_blocks: int = 0,
        missing_length: int = 12,
        regime_change: float | None = None,
        regime_factor: float = 0.7,
        data_seed: int = 0,
        country: str | Sequence[str | None] | None = None,
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
        if unknown := [name for name in (*past_covariates, *known_covariates) if name != TEMPERATURE]:
            raise ValueError(f"synthetic series have no covariate {unknown[0]!r}: the only one is {TEMPERATURE!r}")
        if num_days < 1:
            raise ValueError(f"data.num_days={num_days} must be at least 1")
        self.num_days = num_days
        self.generator = {
            "start": start,
            "level": level,
            "level_walk": level_walk,
            "annual_amplitude": annual_amplitude,
            "annual_phase": annual_phase,
            "noise": noise,
            "noise_memory": noise_memory,
            "cooling": cooling,
            "heating": heating,
            "missing_blocks": missing_blocks,
            "missing_length": missing_length,
            "regime_change": regime_change,
            "regime_factor": regime_factor,
            "seed": data_seed,
        }

    @property
    @override
    def name(self) -> str:
        return "synthetic series"

    @override
    def read(self) -> RegularSeries:
        num_series = len(self.targets)
        # The temperature of the next horizon is known in advance; the series end before it.
        ahead = -(-self.horizon // self.cycle_length) if self.known_covariates else 0
        series = synthetic_series(
            self.num_days + ahead,
            num_series,
            cycle_length=self.cycle_length,
            countries=self.countries,
            **self.generator,
        )
        values = series.values
        values[self.num_days * self.cycle_length :] = np.nan
        num_covariates = len(self.past_covariates) + len(self.known_covariates)
        matrix = np.concatenate([values, np.repeat(series.temperature[:, None], num_covariates, axis=1)], axis=1)
        return RegularSeries(series.timestamps, matrix, pd.Timedelta(days=1) / self.cycle_length, {"rows": len(matrix)})

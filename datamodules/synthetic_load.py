"""Generator of hourly electric loads of many countries (energy study, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
from scipy.signal import lfilter
from typing_extensions import override

from datamodules.load_weeks import LoadWeeks, PredictPart
from datamodules.readers.time_axis import RegularSeries

HOURS_PER_WEEK, HOURS_PER_YEAR = 168, 8760


class SyntheticLoads(NamedTuple):
    """Generated loads and their parts.

    Attributes:
        timestamps: ``(time,)``, hourly, UTC.
        values: ``(time, country)`` float64, MW.
        expected: ``(time, country)`` MW: the load without its noise, which no forecast can beat by more than the noise.
    """

    timestamps: pd.DatetimeIndex
    values: np.ndarray
    expected: np.ndarray


def synthetic_loads(
    num_days: int,
    num_countries: int = 14,
    *,
    start: str = "2015-01-01",
    annual_amplitude: float = 0.1,
    noise: float = 0.02,
    noise_memory: float = 0.9,
    seed: int = 0,
) -> SyntheticLoads:
    """Generate ``load_k(t) = base_k (1 + a cos(2 pi (t - t0_k) / 8760) + weekday_k(t) + profile_k(t) + e_k(t))``.

    Countries differ in base (5 to 80 GW), depth of the weekend, height and hour of their two daily peaks, phase of
    the year and noise e, which is AR(1).

    Args:
        num_days: Whole days.
        num_countries: Series.
        start: Date of the first day.
        annual_amplitude: a.
        noise: Standard deviation of e, relative to the base.
        noise_memory: First-order coefficient of e, per hour.
        seed: Seed of everything random.
    """
    rng = np.random.default_rng(seed)
    timestamps = pd.date_range(start, periods=num_days * 24, freq="1h")
    hour = timestamps.hour.to_numpy()[:, None]
    weekday = timestamps.day_of_week.to_numpy()[:, None]
    t = np.arange(len(timestamps))[:, None]

    def per_country(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, num_countries)

    def peak(centre: np.ndarray, width: float) -> np.ndarray:
        distance = (hour - centre + 12) % 24 - 12
        return np.exp(-0.5 * (distance / width) ** 2)

    base = 1000 * np.exp(per_country(np.log(5), np.log(80)))
    year = annual_amplitude * np.cos(2 * np.pi * (t - 24 * per_country(0, 40)) / HOURS_PER_YEAR)
    profile = per_country(0.10, 0.16) * peak(per_country(7.5, 10.5), 2.2)
    profile += per_country(0.12, 0.22) * peak(per_country(18, 20.5), 2.2)
    profile -= per_country(0.10, 0.18) * peak(per_country(2, 4), 3)
    weekend = np.where(weekday == 5, per_country(0.04, 0.10), np.where(weekday == 6, per_country(0.08, 0.18), 0.0))
    expected = base * (1 + year + profile - weekend)
    shocks = rng.standard_normal((len(t), num_countries)) * noise
    shocks[1:] *= np.sqrt(1 - noise_memory**2)
    return SyntheticLoads(timestamps, expected + base * lfilter([1.0], [1.0, -noise_memory], shocks, axis=0), expected)


class SyntheticLoadDataModule(LoadWeeks):
    """Weeks of generated electric load; the batch is that of `datamodules.load_weeks.LoadWeeks`.

    Args:
        num_days: Days that are generated.
        num_countries: Series.
        start: Date of the first day.
        annual_amplitude: Amplitude of the yearly cycle.
        noise: Standard deviation of the noise relative to the base.
        noise_memory: AR(1) coefficient of the noise, per hour.
        data_seed: Seed of the loads (``seed`` orders the training samples), so that repeated trainings share data.
        window_length: As in `datamodules.electric_load.ElectricLoadDataModule`, like all that follow.
        origin_stride: Steps between two samples of a series.
        splits: Training, validation and test as fractions of the steps, or as numbers of steps.
        max_gap: Longest gap that is filled; there are none.
        max_steps: Use only this many steps; None = all.
        legacy: Whether to do as the published code does.
        predict_part: ``train``, ``val``, ``test`` or ``next``.
        repeat: How often prediction goes through the part.
        unit: Unit of the load.
        batch_size: Samples per training step over all devices.
        eval_batch_size: Samples per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Seed of the order of the training samples.
    """

    # Repeated as a literal: the check of a configuration reads it without importing torch.
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
        num_days: int = 120,
        num_countries: int = 14,
        start: str = "2015-01-01",
        annual_amplitude: float = 0.1,
        noise: float = 0.02,
        noise_memory: float = 0.9,
        data_seed: int = 0,
        window_length: int = HOURS_PER_WEEK,
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
        for key, value in (("num_days", num_days), ("num_countries", num_countries)):
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if not 0 <= noise_memory < 1:
            raise ValueError(f"data.noise_memory={noise_memory}: must be at least 0 and below 1")
        self.num_days, self.num_countries = num_days, num_countries
        self.generator = {
            "start": start,
            "annual_amplitude": annual_amplitude,
            "noise": noise,
            "noise_memory": noise_memory,
            "seed": data_seed,
        }

    @property
    @override
    def name(self) -> str:
        return "synthetic loads"

    @override
    def read(self) -> tuple[RegularSeries, list[str]]:
        loads = synthetic_loads(self.num_days, self.num_countries, **self.generator)
        names = [f"country_{i + 1:02d}" for i in range(self.num_countries)]
        return RegularSeries(loads.timestamps, loads.values, pd.Timedelta(hours=1), {"rows": len(loads.values)}), names

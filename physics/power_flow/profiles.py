"""Loads and generation over time, made up but plausible: a function of (seed, step) alone.

A step has the same values whichever steps are asked for with it, in whatever order and in however many processes, so a
year of quarter-hours needs no storage. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.signal import lfilter
from scipy.special import ndtr

# Steps whose noise is drawn together.
BLOCK = 1024
# What of an AR(1) process is left after its memory is cut off.
FORGOTTEN = 1e-12
# Load of France in 2012 by hour, weekday and month over its mean (RTE, consumption in real time): the profile of the
# paper's time series, there with the factors of a Monday in October.
FRENCH_HOUR = (
    1.00, 0.93, 0.91, 0.86, 0.84, 0.85, 0.90, 0.97, 1.03, 1.06, 1.08, 1.09,
    1.09, 1.09, 1.06, 1.03, 1.00, 1.00, 1.04, 1.09, 1.05, 1.01, 0.99, 1.03,
)  # fmt: skip
FRENCH_WEEKDAY = (1.01, 1.05, 1.05, 1.05, 1.03, 0.93, 0.88)  # from Monday
FRENCH_MONTH = (1.21, 1.40, 1.05, 1.01, 0.86, 0.84, 0.84, 0.79, 0.85, 0.94, 1.01, 1.20)

Shape = Literal["flat", "sine", "french"]
SHAPES: tuple[str, ...] = ("flat", "sine", "french")

# Streams of random numbers.
_LOAD, _REACTIVE, _GENERATION, _CLOUD, _PLACES = range(5)


@dataclass(frozen=True)
class Profile:
    """How loads and generation vary.

    A load is its value in the grid times ``shape(t) (1 + sigma z(t))``, where ``z`` is an AR(1) process of its own with
    variance 1, and generators follow the total load. Solar generation, ``solar_share`` of the load of a bus at noon
    under a clear sky, is subtracted from the load of a part of the buses.

    Args:
        shape: ``flat``; ``sine``: ``1 + daily sin(2 pi t / day) + weekly sin(2 pi t / week)``; ``french``: factors by
            hour (between them a periodic cubic spline), weekday and month.
        steps_per_day: 96 are quarter-hours, 288 the five minutes of the paper.
        start: Date of step 0, for weekdays, months and time stamps.
        daily: Amplitude of the day, for ``sine``.
        weekly: Amplitude of the week, for ``sine``.
        rho: Correlation of the noise from one step to the next; 0: every step is independent.
        sigma: Standard deviation of the noise of a load, relative; active and reactive power together.
        sigma_reactive: The same for reactive power alone, on top.
        sigma_generation: The same for the generators, beside what the total load asks of them.
        solar_share: Peak of solar generation over the load of its bus; 0: none.
        solar_fraction: Part of the buses with load that have solar generation.
        seed: Seed of everything random.

    Raises:
        ValueError: Names the argument.
    """

    shape: Shape = "sine"
    steps_per_day: int = 96
    start: str = "2012-10-01"
    daily: float = 0.15
    weekly: float = 0.05
    rho: float = 0.9
    sigma: float = 0.05
    sigma_reactive: float = 0.0
    sigma_generation: float = 0.0
    solar_share: float = 0.0
    solar_fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; choose {', '.join(SHAPES)}")
        if self.steps_per_day < 1:
            raise ValueError(f"steps_per_day={self.steps_per_day}: must be at least 1")
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho={self.rho}: must be at least 0 and below 1")
        for name in ("sigma", "sigma_reactive", "sigma_generation", "solar_share"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.solar_fraction <= 1:
            raise ValueError(f"solar_fraction={self.solar_fraction}: must be from 0 to 1")
        try:
            np.datetime64(self.start, "s")
        except ValueError:
            raise ValueError(f"start={self.start!r} is no date; write it like 2012-10-01") from None

    def times(self, steps: np.ndarray) -> np.ndarray:
        """Time stamps of steps, datetime64 in seconds."""
        return np.datetime64(self.start, "s") + np.round(86400 / self.steps_per_day * np.asarray(steps)).astype(
            "timedelta64[s]"
        )


class Injections(NamedTuple):
    """Loads and generation of some steps.

    Attributes:
        p_load_mw: Active power drawn at every bus, solar generation subtracted, (step, bus).
        q_load_mvar: Reactive power drawn, (step, bus).
        gen_p_mw: Active power of every generator, (step, generator).
    """

    p_load_mw: np.ndarray
    q_load_mvar: np.ndarray
    gen_p_mw: np.ndarray


def injections(
    steps: Sequence[int] | np.ndarray,
    p_load_mw: np.ndarray,
    q_load_mvar: np.ndarray,
    gen_p_mw: np.ndarray,
    profile: Profile,
) -> Injections:
    """Loads and generation at some steps.

    Args:
        steps: (step,) numbers of the steps, in any order, not negative.
        p_load_mw: Active power drawn at every bus in the case at hand, (bus,).
        q_load_mvar: Reactive power, (bus,).
        gen_p_mw: Active power of the generators, (generator,).
        profile: How they vary.
    """
    steps = np.asarray(steps, dtype=np.int64)
    level = load_factor(steps, profile)[:, None]
    noise = 1 + profile.sigma * _noise(profile, _LOAD, steps, len(p_load_mw), profile.sigma)
    p = p_load_mw * (level * noise)
    q = q_load_mvar * (level * noise)
    if profile.sigma_reactive:
        q = q * (1 + profile.sigma_reactive * _noise(profile, _REACTIVE, steps, len(p_load_mw), 1.0))
    total = p_load_mw.sum()
    followed = p.sum(1, keepdims=True) / total if total else np.ones((len(steps), 1))
    generation = gen_p_mw * followed
    if profile.sigma_generation:
        generation = generation * (
            1 + profile.sigma_generation * _noise(profile, _GENERATION, steps, len(gen_p_mw), 1.0)
        )
    if profile.solar_share:
        peaks = profile.solar_share * np.maximum(p_load_mw, 0) * _solar_places(profile, len(p_load_mw))
        p = p - peaks * solar_factor(steps, len(p_load_mw), profile)
    return Injections(p, q, generation)


def load_factor(steps: np.ndarray, profile: Profile) -> np.ndarray:
    """Load of all over that of the case at hand, without noise, (step,)."""
    steps = np.asarray(steps, dtype=np.int64)
    day = steps / profile.steps_per_day
    if profile.shape == "flat":
        return np.ones(len(steps))
    if profile.shape == "sine":
        return 1 + profile.daily * np.sin(2 * np.pi * day) + profile.weekly * np.sin(2 * np.pi * day / 7)
    hour = CubicSpline(np.arange(25), [*FRENCH_HOUR, FRENCH_HOUR[0]], bc_type="periodic")
    times = profile.times(steps)
    dates = times.astype("datetime64[D]")
    weekday = (dates.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    month = dates.astype("datetime64[M]").astype(np.int64) % 12
    seconds = (times - dates).astype(np.int64)
    return hour(seconds / 3600) * np.array(FRENCH_WEEKDAY)[weekday] * np.array(FRENCH_MONTH)[month]


def solar_factor(steps: np.ndarray, size: int, profile: Profile) -> np.ndarray:
    """Solar generation over its peak: a bell from 6 to 18 hours, times the clouds of every place, (step, size)."""
    steps = np.asarray(steps, dtype=np.int64)
    hour = 24 * (steps % profile.steps_per_day) / profile.steps_per_day
    bell = np.maximum(0.0, np.sin(np.pi * (hour - 6) / 12)) ** 1.5
    clear = 0.2 + 0.8 * ndtr(0.5 + _noise(profile, _CLOUD, steps, size, 1.0))
    return bell[:, None] * clear


def _solar_places(profile: Profile, size: int) -> np.ndarray:
    """Which buses have solar generation, (size,) bool."""
    return _generator(profile.seed, _PLACES, 0).random(size) < profile.solar_fraction


# ------------------------------------------------------------------------------------------------------------- noise


def _generator(seed: int, stream: int, block: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, block))))


def _noise(profile: Profile, stream: int, steps: np.ndarray, size: int, sigma: float) -> np.ndarray:
    if not sigma or not size:
        return np.zeros((len(steps), size))
    return ar1(profile.seed, stream, steps, size, profile.rho)


def ar1(seed: int, stream: int, steps: np.ndarray, size: int, rho: float) -> np.ndarray:
    """Independent stationary AR(1) processes of variance 1 at some steps, (step, size).

    ``z(t) = sqrt(1 - rho^2) sum_k rho^k e(t - k)`` with white noise ``e`` that is drawn in blocks, each from (seed,
    stream, block). The sum ends where ``rho^k`` is below 1e-12, and begins anew in every block, so that a value does
    not depend on what else is computed.

    Args:
        seed: Of the scenario.
        stream: Which of its processes.
        steps: (step,) int64, not negative.
        size: Number of processes.
        rho: Correlation of consecutive steps, in [0, 1).
    """
    if len(steps) and steps.min() < 0:
        raise ValueError(f"step {steps.min()}: steps are counted from 0")
    memory = math.ceil(math.log(FORGOTTEN) / math.log(rho)) if rho > 0 else 0
    out = np.empty((len(steps), size))
    drawn: dict[int, np.ndarray] = {}

    def white(block: int) -> np.ndarray:
        if block not in drawn:  # those before step 0 have numbers of their own
            number = block if block >= 0 else 2**32 + block
            drawn[block] = _generator(seed, stream, number).standard_normal((BLOCK, size))
        return drawn[block]

    for block in np.unique(steps // BLOCK).tolist():
        inside = steps // BLOCK == block
        before = -(-memory // BLOCK)
        for old in [b for b in drawn if b < block - before]:
            del drawn[old]
        noise = np.concatenate([white(b) for b in range(block - before, block + 1)])
        noise = noise[before * BLOCK - memory :]
        if rho > 0:
            noise = lfilter([math.sqrt(1 - rho * rho)], [1.0, -rho], noise, axis=0)
        out[inside] = noise[memory:][steps[inside] - block * BLOCK]
    return out

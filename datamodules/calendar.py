"""Day types, public holidays, calendar vectors and clock marks (ReCycle, section 2.2)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import holidays
import numpy as np
import pandas as pd

WORKING_DAY, SATURDAY, SUNDAY_OR_HOLIDAY = 0, 1, 2
CALENDAR_FEATURES = 9
CLOCK_MARKS = 4


class DayCalendar(NamedTuple):
    """What is known in advance about consecutive days, for every series.

    Attributes:
        day_type: ``(day, channel)`` int64: 0 working day, 1 Saturday, 2 Sunday or public holiday.
        holiday: ``(day, channel)`` bool, public holiday.
        vector: ``(day, channel, 9)`` float32, the calendar vector m of section 2.2.
    """

    day_type: np.ndarray
    holiday: np.ndarray
    vector: np.ndarray


def split_country(code: str) -> tuple[str, str | None]:
    """Split ``US-CA`` into country and subdivision; a plain country code has none."""
    country, _, subdivision = code.partition("-")
    return country, subdivision or None


def country_per_series(country: str | Sequence[str | None] | None, num_series: int) -> list[str | None]:
    """Return one checked country code per series.

    Args:
        country: One code for all series, one per series, or None for a calendar without holidays.
        num_series: Number of series.

    Raises:
        ValueError: A code that the ``holidays`` package does not know, or a wrong number of codes.
    """
    codes = [country] * num_series if country is None or isinstance(country, str) else list(country)
    if len(codes) != num_series:
        raise ValueError(
            f"data.country names {len(codes)} countries for {num_series} series in data.targets: give one code for "
            "all series or one per series"
        )
    supported = holidays.list_supported_countries()
    for code in dict.fromkeys(codes):
        if code is None:
            continue
        name, subdivision = split_country(code)
        if name not in supported:
            raise ValueError(
                f"data.country={code!r} is not a country code that the holidays package knows{_hint(name, supported)}; "
                "use an ISO code such as US, DE or NZ, or null for a calendar without holidays"
            )
        if subdivision is not None and subdivision not in supported[name]:
            known = supported[name]
            raise ValueError(
                f"data.country={code!r}: {name} has no subdivision {subdivision!r}{_hint(subdivision, known)}; "
                f"known are {', '.join(known) or 'none'}"
            )
    return codes


def _hint(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word.upper(), known, n=3, cutoff=0.5)
    return f". Did you mean {' or '.join(matches)}?" if matches else ""


def public_holidays(days: pd.DatetimeIndex, country: str | None) -> np.ndarray:
    """Tell for each day whether it is a public holiday of the country, ``(day,)`` bool."""
    if country is None or len(days) == 0:
        return np.zeros(len(days), dtype=bool)
    name, subdivision = split_country(country)
    years = range(days[0].year, days[-1].year + 1)
    dates = holidays.country_holidays(name, subdiv=subdivision, years=years)
    return days.normalize().isin(pd.to_datetime(sorted(dates)))


def day_types(weekday: np.ndarray, holiday: np.ndarray) -> np.ndarray:
    """Return the type c(l) of each day: 0 working day, 1 Saturday, 2 Sunday or public holiday (section 2.2).

    Args:
        weekday: ``(day,)``, Monday = 0.
        holiday: ``(day, channel)`` bool.

    Returns:
        ``(day, channel)`` int64.
    """
    by_weekday = np.where(weekday == 5, SATURDAY, np.where(weekday == 6, SUNDAY_OR_HOLIDAY, WORKING_DAY))
    return np.where(holiday, SUNDAY_OR_HOLIDAY, by_weekday[:, None]).astype(np.int64)


def day_calendar(first_day: pd.Timestamp, num_days: int, countries: Sequence[str | None]) -> DayCalendar:
    """Build the calendar of ``num_days`` consecutive days for every series.

    A day that does not begin at midnight (``day_start``) has the date of its first step.

    Args:
        first_day: Date of the first day.
        num_days: Number of days.
        countries: One code per series, None for no holidays.
    """
    days = pd.date_range(pd.Timestamp(first_day).normalize(), periods=num_days + 1, freq="D")
    of_country = {code: public_holidays(days, code) for code in dict.fromkeys(countries)}
    holiday = np.stack([of_country[code] for code in countries], axis=1)
    weekday = days.day_of_week.to_numpy()[:-1]
    vector = np.zeros((num_days, len(countries), CALENDAR_FEATURES), dtype=np.float32)
    vector[np.arange(num_days), :, weekday] = 1.0
    vector[:, :, 7] = holiday[:-1]
    vector[:, :, 8] = holiday[1:]
    return DayCalendar(day_types(weekday, holiday[:-1]), holiday[:-1], vector)


def clock_marks(timestamps: pd.DatetimeIndex, cycle_length: int) -> np.ndarray:
    """Return hour of day, weekday, day of month and day of year, each scaled to [-0.5, 0.5].

    Args:
        timestamps: One per step.
        cycle_length: Steps per day D; the hour counts in steps, so the last step of a day is 0.5.

    Returns:
        ``(time, 4)`` float32.
    """
    seconds = (timestamps - timestamps.normalize()).total_seconds().to_numpy()
    marks = np.stack(
        [
            np.floor(seconds * cycle_length / 86400) / max(cycle_length - 1, 1),
            timestamps.day_of_week.to_numpy() / 6,
            (timestamps.day.to_numpy() - 1) / 30,
            (timestamps.day_of_year.to_numpy() - 1) / 365,
        ],
        axis=1,
    )
    return (marks - 0.5).astype(np.float32)

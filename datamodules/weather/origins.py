"""Which records follow which: forecasts begin where the record after every step exists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

HOUR = np.timedelta64(1, "h") / np.timedelta64(1, "ns")


def within(times: np.ndarray, period: Sequence[str] | None, key: str) -> np.ndarray:
    """Numbers of the records of a period.

    Args:
        times: datetime64 of all records.
        period: First and last moment; a bare date as the last one means all of that day, year or month. None: all.
        key: Setting, for messages.

    Raises:
        ValueError: If the period is malformed, or holds no record.
    """
    if period is None:
        return np.arange(len(times))
    try:
        first, last = (np.datetime64(str(moment)) for moment in period)
    except ValueError as error:
        raise ValueError(f"{key}={list(period)}: give the first and the last moment as ISO dates ({error})") from None
    end = (last + 1).astype("datetime64[ns]")  # one unit of what was written
    found = np.flatnonzero((times >= first.astype("datetime64[ns]")) & (times < end))
    if not len(found):
        span = f"{times[0].astype('datetime64[h]')} to {times[-1].astype('datetime64[h]')}"
        raise ValueError(f"{key}={list(period)}: the store has no record in this period; it has {span}")
    return found


def following(times: np.ndarray, part: np.ndarray, step_h: float | None, steps: Sequence[int]) -> np.ndarray:
    """Records with everything that a forecast from them is compared with.

    Args:
        times: datetime64 of all records.
        part: Numbers of the records of the part; targets come from it too.
        step_h: Hours of a step; None: a step goes to the next record, whenever that is.
        steps: Numbers of steps after which there is a target.

    Returns:
        (forecast, 1 + target): number of the first record and of each target's.
    """
    if step_h is None:
        last = int(part[-1])
        columns = np.stack([part, *(part + step for step in steps)], 1)
        return columns[columns[:, -1] <= last]
    stamps = times.astype(np.int64)
    wanted = stamps[part][:, None] + np.round(np.asarray(steps) * step_h * HOUR).astype(np.int64)
    places = np.searchsorted(stamps, wanted).clip(max=len(stamps) - 1)
    there = (stamps[places] == wanted) & (places <= part[-1])
    return np.concatenate([part[:, None], places], 1)[there.all(1)]


def steps_of_leads(leads_h: Sequence[float], step_h: float | None, key: str = "data.leads_h") -> list[int]:
    """Leads as numbers of steps.

    Args:
        leads_h: Hours; numbers of records where steps have no fixed length.
        step_h: Hours of a step, or None.
        key: Setting, for messages.

    Raises:
        ValueError: If a lead is no whole number of steps, or leads do not increase.
    """
    unit = 1.0 if step_h is None else step_h
    steps = [round(lead / unit) for lead in leads_h]
    for lead, step in zip(leads_h, steps, strict=True):
        if step < 1 or abs(step * unit - lead) > 1e-6:
            raise ValueError(f"{key}: {lead:g} is not a whole number of steps of {unit:g} h (data.step_h)")
    if not steps or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"{key}={list(leads_h)}: must increase, and there must be one")
    return steps

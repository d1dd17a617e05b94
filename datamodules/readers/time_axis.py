"""A regular, local time axis for measured series: order, spacing, missing rows, daylight saving, block means."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd


class RegularSeries(NamedTuple):
    """Series on a uniform axis of naive local time.

    Attributes:
        timestamps: ``(time,)`` naive local time, uniform.
        values: ``(time, column)`` float64, NaN where missing.
        step: Spacing of the axis.
        counts: What was repaired on the way (rows, missing_rows, dst_averaged, dst_interpolated, ...).
    """

    timestamps: pd.DatetimeIndex
    values: np.ndarray
    step: pd.Timedelta
    counts: dict[str, int]


def regular_axis(
    stamps: pd.DatetimeIndex,
    values: np.ndarray,
    *,
    where: Callable[[int], str],
    frequency: pd.Timedelta | None = None,
    timezone: str | None = None,
) -> RegularSeries:
    """Bring rows with naive local stamps onto a uniform axis.

    Missing rows become NaN. With a time zone, the doubled hour of a 25-hour day is averaged and the missing hour of a
    23-hour day interpolated; both are counted.

    Args:
        stamps: ``(row,)`` naive local time.
        values: ``(row, column)`` float64.
        where: Names the file, the column and the line of a row for error messages.
        frequency: Expected spacing; None takes the most frequent one.
        timezone: IANA name; None = the clock never changes.

    Raises:
        ValueError: Unsorted, duplicated or non-uniform stamps, or a spacing other than ``frequency``.
    """
    if len(stamps) < 2:
        raise ValueError(f"{where(0)}: a series needs at least two rows")
    counts = {"rows": len(stamps), "missing_rows": 0, "dst_averaged": 0, "dst_interpolated": 0}
    ticks = stamps.as_unit("ns").asi8
    rows = np.arange(len(stamps))
    ambiguous = _ambiguous(stamps, timezone)
    _check_order(stamps, ticks, ambiguous, where, timezone)

    unique, first, inverse, repeats = np.unique(ticks, return_index=True, return_inverse=True, return_counts=True)
    if len(unique) < len(ticks):
        if (repeats > 2).any():
            row = int(first[np.argmax(repeats > 2)])
            raise ValueError(f"{where(row)}: {stamps[row]} occurs more than twice; remove the surplus rows")
        counts["dst_averaged"] = int((repeats > 1).sum())
        values, rows, ticks = _mean_of_groups(values, inverse, len(unique)), first, unique

    step = _spacing(ticks, where, frequency)
    offset = ticks - ticks[0]
    if (uneven := offset % step != 0).any():
        i = int(np.argmax(uneven))
        raise ValueError(
            f"{where(int(rows[i]))}: {pd.Timestamp(ticks[i])} does not lie on the uniform axis that starts at "
            f"{pd.Timestamp(ticks[0])} with a step of {_text(step)}; correct the time stamp or resample the file first"
        )
    position = offset // step
    total = int(position[-1]) + 1
    if total > 10 * len(ticks) + 10_000:
        i = int(np.argmax(np.diff(position)))
        raise ValueError(
            f"{where(int(rows[i + 1]))}: {position[i + 1] - position[i] - 1:,} steps are missing before "
            f"{pd.Timestamp(ticks[i + 1])}; correct the time stamp or cut the file there"
        )
    counts["missing_rows"] = total - len(ticks)
    full = np.full((total, values.shape[1]), np.nan)
    full[position] = values
    axis = pd.date_range(pd.Timestamp(ticks[0]), periods=total, freq=pd.Timedelta(step, unit="ns"))
    if timezone is not None:
        skipped = _nonexistent(axis, timezone)
        absent = skipped.copy()
        absent[position] = False
        counts["dst_interpolated"] = int(absent.sum())
        counts["missing_rows"] -= counts["dst_interpolated"]
        _bridge(full, skipped)
    return RegularSeries(axis, full, pd.Timedelta(step, unit="ns"), counts)


def block_mean(series: RegularSeries, step: pd.Timedelta) -> RegularSeries:
    """Average blocks of steps, e.g. four quarter hours to one hour.

    Blocks are aligned to midnight; an incomplete first or last block is dropped. Missing steps of a block are skipped,
    a block without any value stays missing.

    Raises:
        ValueError: ``step`` is not a multiple of the spacing of the series.
    """
    block, rest = divmod(step.value, series.step.value)
    if rest or block < 1:
        raise ValueError(
            f"data.resample={_text(step.value)} is not a multiple of the spacing {_text(series.step.value)} of the file"
        )
    if block == 1:
        return series
    ticks = series.timestamps.as_unit("ns").asi8
    lead = (-(int(ticks[0]) % step.value) % step.value) // series.step.value
    blocks = (len(ticks) - lead) // block
    if blocks == 0:
        raise ValueError(f"data.resample={_text(step.value)}: the file is shorter than one block")
    values = series.values[lead : lead + blocks * block].reshape(blocks, block, -1)
    present = ~np.isnan(values)
    number = present.sum(axis=1)
    mean = np.where(present, values, 0.0).sum(axis=1) / np.where(number > 0, number, np.nan)
    counts = series.counts | {"partial_blocks": int(((number > 0) & (number < block)).any(axis=1).sum())}
    axis = pd.date_range(series.timestamps[lead], periods=blocks, freq=step)
    return RegularSeries(axis, mean, step, counts)


def align(parts: list[RegularSeries], names: list[str]) -> RegularSeries:
    """Put single series side by side on the union of their axes.

    Raises:
        ValueError: Series of different spacing or phase.
    """
    step = parts[0].step
    start = min(part.timestamps[0] for part in parts)
    stop = max(part.timestamps[-1] for part in parts)
    axis = pd.date_range(start, stop, freq=step)
    values = np.full((len(axis), len(parts)), np.nan)
    counts: dict[str, int] = {}
    for column, (part, name) in enumerate(zip(parts, names, strict=True)):
        lead, rest = divmod(part.timestamps[0] - start, step)
        if part.step != step or rest != pd.Timedelta(0):
            raise ValueError(
                f"series {name!r} (first at {part.timestamps[0]}, step {part.step}) does not share the axis of "
                f"{names[0]!r} (first at {parts[0].timestamps[0]}, step {step}); set data.resample or correct the file"
            )
        values[lead : lead + len(part.values), column] = part.values[:, 0]
        counts = {key: counts.get(key, 0) + number for key, number in part.counts.items()}
    return RegularSeries(axis, values, step, counts)


def _check_order(
    stamps: pd.DatetimeIndex,
    ticks: np.ndarray,
    ambiguous: np.ndarray,
    where: Callable[[int], str],
    timezone: str | None,
) -> None:
    """Refuse steps backwards or on the spot unless both ends lie in the doubled hour of a 25-hour day."""
    wrong = (np.diff(ticks) <= 0) & ~(ambiguous[1:] & ambiguous[:-1])
    if not wrong.any():
        return
    i = int(np.argmax(wrong)) + 1
    if ticks[i] == ticks[i - 1]:
        if timezone is None:
            clock = "set data.timezone if the clock was put back here, else remove one of the two rows"
        else:
            clock = f"data.timezone={timezone!r} does not put the clock back here: remove one of the two rows"
        raise ValueError(f"{where(i)}: the time stamp {stamps[i]} is duplicated; {clock}")
    clock = ", or set data.timezone if the clock was put back here" if timezone is None else ""
    raise ValueError(
        f"{where(i)}: time stamps are not sorted ({stamps[i]} follows {stamps[i - 1]}); sort the file by time{clock}"
    )


def _spacing(ticks: np.ndarray, where: Callable[[int], str], frequency: pd.Timedelta | None) -> int:
    """Return the most frequent spacing in ns; it must be the expected one."""
    spacing, number = np.unique(np.diff(ticks), return_counts=True)
    step = int(spacing[np.argmax(number)])
    if frequency is not None and frequency.value != step:
        raise ValueError(
            f"{where(1)}: the rows are {_text(step)} apart, but data.frequency={_text(frequency.value)}; correct "
            "data.frequency, or keep it at the spacing of the file and set data.resample to the spacing you want"
        )
    return step


def _mean_of_groups(values: np.ndarray, group: np.ndarray, num_groups: int) -> np.ndarray:
    """Average the rows of each group, skipping NaN."""
    total = np.zeros((num_groups, values.shape[1]))
    number = np.zeros_like(total)
    np.add.at(total, group, np.nan_to_num(values, nan=0.0))
    np.add.at(number, group, ~np.isnan(values))
    return total / np.where(number > 0, number, np.nan)


def _ambiguous(stamps: pd.DatetimeIndex, timezone: str | None) -> np.ndarray:
    """Mark the stamps of hours that the local clock shows twice."""
    if timezone is None:
        return np.zeros(len(stamps), dtype=bool)
    return np.asarray(stamps.tz_localize(timezone, ambiguous="NaT", nonexistent="shift_forward").isna())


def _nonexistent(axis: pd.DatetimeIndex, timezone: str) -> np.ndarray:
    """Mark the stamps of hours that the local clock skips."""
    always_first = np.ones(len(axis), dtype=bool)
    return np.asarray(axis.tz_localize(timezone, ambiguous=always_first, nonexistent="NaT").isna())


def _bridge(values: np.ndarray, skipped: np.ndarray) -> None:
    """Interpolate missing values of the skipped hour between its two neighbours, in place."""
    edges = np.diff(np.concatenate([[0], skipped.astype(np.int8), [0]]))
    for start, stop in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
        if start == 0 or stop == len(values):
            continue
        weight = (np.arange(1, stop - start + 1) / (stop - start + 1))[:, None]
        line = values[start - 1] * (1 - weight) + values[stop] * weight
        values[start:stop] = np.where(np.isnan(values[start:stop]), line, values[start:stop])


def _text(nanoseconds: int) -> str:
    """Write a spacing the way the configuration does, e.g. ``30min``."""
    for unit, size in (("h", 3_600_000_000_000), ("min", 60_000_000_000), ("s", 1_000_000_000)):
        if nanoseconds % size == 0:
            return f"{nanoseconds // size}{unit}"
    return f"{nanoseconds}ns"

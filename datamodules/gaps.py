"""Missing values of series: leading flat lines and short gaps (ReCycle, section 2.7)."""

from __future__ import annotations

import numpy as np


def mask_leading_zeros(values: np.ndarray, shortest: int) -> np.ndarray:
    """Set the zeros before the first other value of each series to NaN, in place.

    A meter that is not yet connected reports zeros for weeks; a solar plant is zero for a night. Only runs of at least
    ``shortest`` steps are taken for the former.

    Args:
        values: ``(time, channel)``, NaN where missing.
        shortest: Length of the shortest run that is masked, in steps.

    Returns:
        Masked steps of each series, ``(channel,)`` int64.
    """
    masked = np.zeros(values.shape[1], dtype=np.int64)
    for channel in range(values.shape[1]):
        column = values[:, channel]
        other = np.flatnonzero(~np.isnan(column) & (column != 0))
        zeros = np.flatnonzero(column[: other[0]] == 0) if len(other) else np.array([], dtype=np.int64)
        if len(zeros) and zeros[-1] - zeros[0] + 1 >= shortest:
            column[zeros] = np.nan
            masked[channel] = len(zeros)
    return masked


def fill_gaps(values: np.ndarray, max_gap: int, origin_stride: int) -> np.ndarray:
    """Fill gaps of at most ``max_gap`` steps, in place, without looking past a forecast origin.

    A gap is interpolated linearly. If an origin falls between its first step and the value behind it, the line would
    carry a future value into the history of that window: there the last value is repeated instead.

    Args:
        values: ``(time, channel)``, NaN where missing.
        max_gap: Longest gap that is filled, in steps.
        origin_stride: Origins are possible at multiples of this number of steps.

    Returns:
        Filled steps of each series, ``(channel,)`` int64.
    """
    filled = np.zeros(values.shape[1], dtype=np.int64)
    end = len(values)
    for channel in range(values.shape[1]):
        column = values[:, channel]
        edges = np.diff(np.concatenate([[0], np.isnan(column).astype(np.int8), [0]]))
        starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        short = (stops - starts <= max_gap) & (starts > 0)
        for start, stop in zip(starts[short], stops[short], strict=True):
            before = column[start - 1]
            # The end of the data is an origin too: that of the prediction.
            crosses = stop == end or stop // origin_stride > start // origin_stride
            weight = np.arange(1, stop - start + 1) / (stop - start + 1)
            column[start:stop] = before if crosses else before + weight * (column[stop] - before)
            filled[channel] += stop - start
    return filled

"""Numbers of the columns of a series: location and scale, error of repeating the past, counts of gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Scaling = Literal["z", "min_max", "abs_max", "none"]


def training_scale(
    values: np.ndarray, scaling: Scaling, names: Sequence[str], source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return location and scale of each column of the training part, NaN skipped.

    Args:
        values: ``(time, column)`` of the training part.
        scaling: ``z``: mean and standard deviation. ``min_max``, ``abs_max``: by the range. ``none``: 0 and 1.
        names: Of the columns.
        source: What an error message calls the data.

    Raises:
        ValueError: If a column has no value.
    """
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


def mean_absolute_change(values: np.ndarray, lag: int) -> np.ndarray:
    """Return the mean absolute error of repeating the value ``lag`` steps ago, NaN if there is none."""
    error = np.abs(values[lag:] - values[:-lag])
    number = (~np.isnan(error)).sum(axis=0)
    return np.nansum(error, axis=0) / np.where(number > 0, number, np.nan)


def count_before(missing: np.ndarray) -> Tensor:
    """Return the number of missing steps before each step, ``(time + 1, column)``."""
    count = np.zeros((len(missing) + 1, missing.shape[1]), dtype=np.int32)
    np.cumsum(missing, axis=0, out=count[1:])
    return torch.from_numpy(count)

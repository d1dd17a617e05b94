"""How sure a forecast of a linear fit is: wider where the runs say less about what was planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]

_NOTHING = 1e-8  # singular values of columns of length one that are zero but for rounding


@dataclass(frozen=True)
class Uncertainty:
    """Of a fit of relative errors, A c = 1 with the columns of A divided by what was measured.

    The half width of a 95 % interval of a new run with the row a (divided by what is predicted) is

        t(0.975; n - p) s sqrt(1 + h),    h = a' (A'A)^-1 a,    s^2 = sum of squared errors / (n - p)

    with n runs and p independent columns: the classical prediction interval, for errors that are relative. h, the
    leverage, is about p / n among the runs and grows with the square of the distance from them. Coefficients that the
    fit holds at zero count among the p: that they are zero is not known either.

    Attributes:
        deviation: s; infinite if there are no more runs than columns: then nothing was tested.
        freedom: n - p.
        axes: ``(direction, term)``, so that h is the squared length of ``axes @ a``. Directions that hardly any run has
            anything of are left out: whoever asks about them is refused.
    """

    deviation: float
    freedom: int
    axes: tuple[tuple[float, ...], ...]

    def leverage(self, row: Sequence[float]) -> float:
        """H of a row."""
        return float(np.square(np.array(self.axes) @ np.array(row)).sum())

    def of_coefficients(self) -> list[float]:
        """Half widths of the 95 % intervals of the coefficients c themselves, t s sqrt((A'A)^-1)_kk."""
        terms = len(self.axes[0]) if self.axes else 0
        if self.freedom < 1:
            return [math.inf] * terms
        scale = float(student.ppf(0.975, self.freedom)) * self.deviation
        return [scale * math.sqrt(self.leverage(unit)) for unit in np.eye(terms)]

    def half_width(self, row: Sequence[float]) -> float:
        """Relative half width of the 95 % interval of a new run; infinite where nothing was tested."""
        if self.freedom < 1:
            return math.inf
        quantile = float(student.ppf(0.975, self.freedom))
        return quantile * self.deviation * math.sqrt(1 + self.leverage(row))


def uncertainty(matrix: Array, errors: Sequence[float], weak: float) -> Uncertainty:
    """Of a fit.

    Args:
        matrix: A, ``(run, term)``; columns that are zero everywhere say nothing.
        errors: Relative errors of the fit.
        weak: Singular values of the columns, each of length one, below which a direction is not determined.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    lengths[lengths == 0] = 1.0
    _, values, directions = np.linalg.svd(matrix / lengths, full_matrices=False)
    axes = [direction / value / lengths for direction, value in zip(directions, values, strict=True) if value >= weak]
    freedom = len(matrix) - int((values > _NOTHING).sum())
    deviation = math.sqrt(float(np.square(errors).sum()) / freedom) if freedom > 0 else math.inf
    return Uncertainty(deviation, freedom, tuple(tuple(float(x) for x in axis) for axis in axes))

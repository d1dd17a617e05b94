"""Summary statistics of columns as an estimator: exact for rows that come in blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.learning.base import Estimator, Step
from parallel.array.moments import Moments, merged, moments
from parallel.array.reductions import max as largest
from parallel.array.reductions import min as smallest


class Summary(Estimator):
    """Count, mean, standard deviation, skewness, kurtosis, smallest and largest value of every column, in one pass.

    Args:
        ddof: Degrees of freedom that are taken off in standard deviations.

    Attributes:
        n: ``(f,)``, as all of ``mean``, ``m2``, ``m3``, ``m4``, ``least``, ``most``; float64.
    """

    fitted: ClassVar[tuple[str, ...]] = ("n", "mean", "m2", "m3", "m4", "least", "most")

    def __init__(self, ddof: int = 0) -> None:
        super().__init__(1)
        self.ddof = ddof
        for name in self.fitted:
            setattr(self, name, None)

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Forget what was fitted."""
        super().begin(x, y)
        for name in self.fitted:
            setattr(self, name, None)

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """The moments of the rows, merged with those of earlier ones."""
        x = self.rows(x)
        found, _ = moments(x, 0)
        found = found if self.n is None else merged(self.moments, found)
        if x.shape[0]:
            least, most = (f(x, 0).resplit(None).local.double() for f in (smallest, largest))
            self.least = least if self.least is None else torch.minimum(self.least, least)
            self.most = most if self.most is None else torch.maximum(self.most, most)
        self.n, self.mean, self.m2, self.m3, self.m4 = found
        return Step(float(found.variance(self.ddof).mean()), 0.0, True)

    def partial_fit(self, x: SplitArray) -> Step:
        """Add the rows of a block."""
        return self.step(x)

    @property
    def moments(self) -> Moments:
        """The moments of all rows so far."""
        self.require_fitted()
        return Moments(self.n, self.mean, self.m2, self.m3, self.m4)

    def table(self) -> dict[str, Tensor]:
        """Statistics by name, ``(f,)`` each."""
        found = self.moments
        return {
            "mean": found.mean, "std": found.variance(self.ddof).sqrt(), "skewness": found.skewness(),
            "kurtosis": found.kurtosis(), "min": self.least, "max": self.most,
        }  # fmt: skip

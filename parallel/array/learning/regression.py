"""Ordinary least squares and ridge regression."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.decompositions import lstsq
from parallel.array.learning.base import Estimator, Step, aligned_labels, all_reduce, like_rows
from parallel.array.learning.lasso import linear, r2


class Ridge(Estimator):
    """``argmin |y - X w - w0|^2 + penalty |w|^2`` with an intercept that is not penalised.

    Args:
        penalty: 0: ordinary least squares.
        method: As of `parallel.array.decompositions.lstsq`.

    Attributes:
        weights: ``(f,)`` float64.
        intercept: Number.
    """

    fitted: ClassVar[tuple[str, ...]] = ("weights", "intercept")
    supervised: ClassVar[bool] = True

    def __init__(self, penalty: float = 1.0, method: Literal["auto", "gram", "tsqr"] = "auto") -> None:
        super().__init__(1)
        if not penalty >= 0:
            raise ValueError(f"penalty={penalty}: must be 0 or more")
        if method not in ("auto", "gram", "tsqr"):
            raise ValueError(f"method={method!r}: choose auto, gram or tsqr")
        self.penalty, self.method = penalty, method
        self.weights: Tensor | None = None
        self.intercept: Tensor | None = None

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All of it."""
        x = self.rows(x)
        target = aligned_labels(x, y, "Ridge").double()
        sums = all_reduce(x, torch.cat([x.local.sum(0, dtype=torch.float64), target.sum()[None]])) / max(x.shape[0], 1)
        centred = like_rows(x, x.local.double() - sums[:-1])
        self.weights = lstsq(centred, like_rows(x, target - sums[-1]), self.penalty, self.method)
        self.intercept = sums[-1] - sums[:-1] @ self.weights
        error = (target - sums[-1] - centred.local @ self.weights).square().sum()
        return Step(float(all_reduce(x, error)), 0.0, True)

    def predict(self, x: SplitArray) -> SplitArray:
        """Fitted value of every row."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, len(self.weights))
        return like_rows(x, linear(x.local, self.weights, self.intercept))

    def score(self, x: SplitArray, y: SplitArray) -> float:
        """R^2."""
        return r2(y, self.predict(x))

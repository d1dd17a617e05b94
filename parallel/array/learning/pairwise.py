"""All distances of rows to each other: how far the nearest ones are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.distance import Metric, cdist, nearest
from parallel.array.learning.base import Estimator, Step, all_reduce, like_rows
from parallel.array.sorting import percentile

_PERCENT = tuple(float(q) for q in range(0, 101))


class Pairwise(Estimator):
    """Distances to the nearest other rows, in one pass over all pairs.

    Args:
        k: Neighbours.
        metric: As of `parallel.array.distance.nearest`.
        matrix: Compute and store the whole matrix, ``n^2 / P`` numbers a rank, and look into it.

    Attributes:
        quantiles: Percentiles 0 to 100 of the distance to the nearest other row.
        train: The rows.
    """

    fitted: ClassVar[tuple[str, ...]] = ("quantiles",)

    def __init__(self, k: int = 10, metric: Metric = "euclidean", matrix: bool = False) -> None:
        super().__init__(1)
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        self.k, self.metric, self.matrix = k, metric, matrix
        self.train: SplitArray | None = None
        self.distances: SplitArray | None = None
        self.quantiles: Tensor | None = None

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All pairs."""
        x = self.rows(x)
        if x.shape[0] < 2:
            raise ValueError(f"{x.shape[0]} rows have no distances between them: at least 2 are needed")
        self.train = x
        if self.matrix:
            self.distances = cdist(x, metric=self.metric)
            own = self.distances.local.diagonal(x.offset)
            saved = own.clone()
            own.fill_(torch.inf)
            least = self.distances.local.amin(1)
            own.copy_(saved)
        else:
            least = nearest(x, x, 1, self.metric, exclude_self=True)[0].local[:, 0]
        rows = like_rows(x, least)
        self.quantiles = percentile(rows, _PERCENT).resplit(None).local.double()
        mean = all_reduce(x, least.sum(dtype=torch.float64)) / x.shape[0]
        return Step(float(mean), 0.0, True)

    def neighbours(self, x: SplitArray) -> tuple[SplitArray, SplitArray]:
        """Distances and numbers of the k nearest fitted rows of each row."""
        if self.train is None:
            raise ValueError("Pairwise keeps no rows in its state: call fit(x) again after load_state")
        return nearest(self.rows(x), self.train, min(self.k, self.train.shape[0]), self.metric)

    predict = neighbours

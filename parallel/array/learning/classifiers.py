"""Classifiers that need no training loop: Gaussian naive Bayes by merged moments, nearest neighbours by a ring."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.distance import METRICS, Metric, nearest
from parallel.array.learning.base import Estimator, Step, aligned_labels, all_reduce, like_rows
from parallel.array.moments import Moments, merged, over_ranks


def class_values(x: SplitArray, y: Tensor) -> Tensor:
    """Different labels of all ranks, ascending, on every rank."""
    mine = torch.unique(y)
    if x.split != 0 or x.comm.size == 1:
        return mine
    return torch.unique(x.comm.all_gather_rows(mine, x.comm.gather_counts(len(mine))))


class GaussianNB(Estimator):
    """Independent normal columns within each class.

    Args:
        var_smoothing: Part of the largest variance of a column that is added to all variances.

    Attributes:
        classes: Labels, ascending.
        count: Rows of each class.
        mean: ``(classes, f)`` float64.
        m2: Sums of squared deviations, ``(classes, f)``.
        smoothing: What is added to variances.
    """

    fitted: ClassVar[tuple[str, ...]] = ("classes", "count", "mean", "m2", "smoothing")
    supervised: ClassVar[bool] = True

    def __init__(self, var_smoothing: float = 1e-9) -> None:
        super().__init__(1)
        if not var_smoothing >= 0:
            raise ValueError(f"var_smoothing={var_smoothing}: must be 0 or more")
        self.var_smoothing = var_smoothing
        for name in self.fitted:
            setattr(self, name, None)

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Forget what was fitted."""
        super().begin(x, y)
        for name in self.fitted:
            setattr(self, name, None)

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Moments of each class, merged over ranks, and with those of earlier rows.

        The objective is minus the mean log-likelihood of the rows.
        """
        x = self.rows(x)
        labels = aligned_labels(x, y, "GaussianNB")
        classes = class_values(x, labels)
        if self.classes is not None:
            classes = torch.unique(torch.cat([self.classes, classes]))
        found = (
            over_ranks(_class_moments(x.local, labels, classes), x.comm)
            if x.split == 0
            else _class_moments(x.local, labels, classes)
        )
        if self.classes is not None:
            found = merged(self._earlier(classes), found)
        self.classes, self.count, self.mean, self.m2 = classes, found.n[:, 0], found.mean, found.m2
        # Of all columns together: the classes merged.
        total = None
        for c in range(len(classes)):
            one = Moments(*(part[c] for part in found))
            total = one if total is None else merged(total, one)
        self.smoothing = self.var_smoothing * total.variance().max()
        likelihood = self.log_joint(x).logsumexp(1).sum()
        return Step(-float(all_reduce(x, likelihood)) / max(x.shape[0], 1), 0.0, True)

    def partial_fit(self, x: SplitArray, y: SplitArray) -> Step:
        """Add the rows of a block; classes may be new."""
        if self.classes is None:
            self.begin(x, y)
        return self.step(x, y)

    def _earlier(self, classes: Tensor) -> Moments:
        where = torch.searchsorted(classes, self.classes)
        shape = (len(classes), self.mean.shape[1])

        def placed(value: Tensor) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64).index_copy(0, where, value)

        zero = torch.zeros(shape, dtype=torch.float64)
        n = placed(self.count[:, None].expand_as(self.mean).contiguous())
        return Moments(n, placed(self.mean), placed(self.m2), zero, zero)

    def log_joint(self, x: SplitArray) -> Tensor:
        """Logarithm of prior times likelihood of the local rows, ``(rows, classes)`` float64."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, self.mean.shape[1])
        variance = self.m2 / self.count[:, None] + self.smoothing
        prior = (self.count / self.count.sum()).log()
        constant = prior - 0.5 * (2 * math.pi * variance).log().sum(1)
        rows = x.local.double()
        parts = [
            c - 0.5 * ((rows - m).square() / v).sum(1) for c, m, v in zip(constant, self.mean, variance, strict=True)
        ]
        return torch.stack(parts, 1)

    def predict(self, x: SplitArray) -> SplitArray:
        """Most probable class of every row."""
        return like_rows(self.rows(x), self.classes[self.log_joint(x).argmax(1)])

    def predict_proba(self, x: SplitArray) -> SplitArray:
        """Probabilities of the classes, ``(rows, classes)``."""
        return like_rows(self.rows(x), self.log_joint(x).softmax(1))

    def score(self, x: SplitArray, y: SplitArray) -> float:
        """Part of the rows whose class is right."""
        return accuracy(y, self.predict(x))


def _class_moments(rows: Tensor, labels: Tensor, classes: Tensor) -> Moments:
    """Counts, means and sums of squared deviations of every class and column, ``(classes, f)``."""
    shape = (len(classes), rows.shape[1])
    n, mean, m2 = (torch.zeros(shape, dtype=torch.float64, device=rows.device) for _ in range(3))
    for c, one in enumerate(classes):
        mine = rows[labels == one].double()
        if len(mine):
            n[c] = len(mine)
            mean[c] = mine.mean(0)
            m2[c] = (mine - mean[c]).square().sum(0)
    zero = torch.zeros(shape, dtype=torch.float64, device=rows.device)
    return Moments(n, mean, m2, zero, zero)


def accuracy(y: SplitArray, prediction: SplitArray) -> float:
    """Part of equal labels."""
    true = y.resplit(prediction.split, prediction.map or None).local
    right = (true == prediction.local).sum()
    return float(all_reduce(prediction, right)) / max(prediction.shape[0], 1)


class KNN(Estimator):
    """Majority of the k nearest rows; of classes with equally many votes the lowest, of equal distances the first row.

    Args:
        k: Neighbours.
        metric: As of `parallel.array.distance.nearest`.

    Attributes:
        train: The rows that were fitted, split.
        labels: Their labels.
        classes: Different labels.
    """

    fitted: ClassVar[tuple[str, ...]] = ("classes",)
    supervised: ClassVar[bool] = True

    def __init__(self, k: int = 5, metric: Metric = "euclidean") -> None:
        super().__init__(1)
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        if metric not in METRICS or metric == "gaussian":
            raise ValueError(f"metric={metric!r}: choose {', '.join(m for m in METRICS if m != 'gaussian')}")
        self.k, self.metric = k, metric
        self.train: SplitArray | None = None
        self.labels: Tensor | None = None
        self.classes: Tensor | None = None

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Check that there are enough rows.

        Raises:
            ValueError: If there are fewer than k.
        """
        super().begin(x, y)
        if self.k > x.shape[0]:
            raise ValueError(f"k={self.k}: there are only {x.shape[0]} rows; use at most as many neighbours")

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """Keep the rows: there is nothing to compute."""
        self.train = self.rows(x)
        labels = aligned_labels(self.train, y, "KNN")
        self.classes = class_values(self.train, labels)
        self.labels = like_rows(self.train, labels).resplit(None).local
        return Step(0.0, 0.0, True)

    def votes(self, x: SplitArray) -> SplitArray:
        """How many of the nearest rows have each class, ``(rows, classes)``."""
        self.require_fitted()
        if self.train is None:
            raise ValueError("KNN keeps no rows in its state: call fit(x, y) again after load_state")
        x = self.rows(x)
        _, where = nearest(x, self.train, self.k, self.metric)
        labels = torch.searchsorted(self.classes, self.labels[where.local])
        votes = torch.zeros(len(labels), len(self.classes), dtype=torch.int64, device=labels.device)
        votes.scatter_add_(1, labels, torch.ones_like(labels))
        return where.like(votes, (where.shape[0], len(self.classes)), where.split, where.map or None)

    def predict(self, x: SplitArray) -> SplitArray:
        """Class of every row."""
        votes = self.votes(x)
        # argmax leaves open which of equal votes it takes: the count, then the lower class.
        width = votes.shape[1]
        order = votes.local * width + torch.arange(width - 1, -1, -1)
        found = self.classes[order.argmax(1)]
        found = votes.like(found, (votes.shape[0],), votes.split, votes.map or None)
        return found.resplit(None) if x.split is None and found.split == 0 else found

    def score(self, x: SplitArray, y: SplitArray) -> float:
        """Part of the rows whose class is right."""
        return accuracy(y, self.predict(x))

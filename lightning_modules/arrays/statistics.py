"""Moments of columns, distances of rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.arrays.base import Batch, ClassicalModule, Stage, built, check_choice
from parallel.array import SplitArray, moments
from parallel.array.distance import METRICS
from parallel.array.learning import (
    Summary,
)
from parallel.array.learning.base import all_reduce
from parallel.array.learning.pairwise import Pairwise


class MomentsModule(ClassicalModule):
    """Mean, deviation, skewness, kurtosis and range of every column, in one pass; takes blocks.

    Logged: ``loss``, the mean over columns of the squared difference of the means of a part and of the training rows,
    in training deviations. Outputs: ``prediction``, deviations of each row from the mean (z-scores).

    Args:
        ddof: Degrees of freedom that are taken off in deviations.
        optimizer: Unused.
        scheduler: Unused.
    """

    streams = True

    def __init__(
        self,
        ddof: int = 0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(Summary(ddof))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = True  # every row has been seen once

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        part, _ = moments.moments(x, 0, order=2)
        own = self.estimator.moments
        distance = (part.mean - own.mean).square() / own.variance(self.estimator.ddof).clamp(min=1e-300)
        found = {"loss": float(distance.mean())}
        if stage == "test":
            table = self.estimator.table()
            found |= {f"{name}_of_means": float(table[name].mean()) for name in ("mean", "std", "skewness", "kurtosis")}
        return found

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        own = self.estimator.moments
        deviation = own.variance(self.estimator.ddof).sqrt().clamp(min=1e-300)
        return {"prediction": ((x.local.double() - own.mean) / deviation).to(x.dtype), "target": y.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return self.estimator.table()


class PairwiseModule(ClassicalModule):
    """Distances of all training rows to each other, and the nearest training rows of others.

    Logged: ``train/pairs_per_s``; ``loss``, mean distance of the rows of a part to the k-th nearest training row.
    Outputs: ``prediction``, distances to the k nearest training rows, and ``neighbour``, their numbers.

    Args:
        k: Neighbours that are kept.
        metric: ``euclidean``, ``sqeuclidean``, ``manhattan`` or ``cosine``.
        matrix: Whether the whole matrix is computed and stored, ``n^2 / P`` numbers a process, as in the paper's
            benchmark; else tile by tile.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        k: int = 10,
        metric: Literal["euclidean", "sqeuclidean", "manhattan", "cosine"] = "euclidean",
        matrix: bool = False,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        check_choice("metric", metric, [m for m in METRICS if m != "gaussian"])
        super().__init__(built(Pairwise, k=k, metric=metric, matrix=matrix))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def _iterate(self, batch: Batch) -> None:
        began = time.perf_counter()
        super()._iterate(batch)
        pairs = float(batch["map"].sum()) ** 2
        pairs_per_s = pairs / (time.perf_counter() - began)
        self.log_exact({"train/pairs_per_s": pairs_per_s}, on_step=False, on_epoch=True)

    def _prepare(self) -> None:
        if self.estimator.train is None:
            self.estimator.train = self.trainer.datamodule.arrays("train")[0]

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        distances, _ = self.estimator.neighbours(x)
        total = all_reduce(distances, distances.local[:, -1].sum(dtype=torch.float64))
        return {"loss": float(total) / max(x.shape[0], 1)}

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        self._prepare()
        distances, where = self.estimator.neighbours(x)
        return {"prediction": distances.local, "neighbour": where.local, "target": y.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"quantiles": self.estimator.quantiles}

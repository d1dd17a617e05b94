"""Classifiers that need no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.arrays.base import Batch, ClassicalModule, Stage, built
from parallel.array import SplitArray
from parallel.array.learning import (
    KNN,
    GaussianNB,
)


class ClassifierModule(ClassicalModule):
    """Base of classifiers. Logged: ``accuracy``, ``loss`` (1 - accuracy). Outputs: ``prediction``, ``target``."""

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        right = self.estimator.score(x, y)
        return {"loss": 1 - right, "accuracy": right}

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.predict(x).local, "target": y.local}


class GaussianNBModule(ClassifierModule):
    """Gaussian naive Bayes; takes blocks.

    Args:
        var_smoothing: Part of the largest variance that is added to all.
        optimizer: Unused.
        scheduler: Unused.
    """

    streams = True

    def __init__(
        self,
        var_smoothing: float = 1e-9,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(GaussianNB, var_smoothing=var_smoothing))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = True  # every row has been seen once


class KNNModule(ClassifierModule):
    """The k nearest training rows vote; they are read again where a checkpoint is loaded, not stored in it.

    Args:
        k: Neighbours.
        metric: ``euclidean``, ``sqeuclidean``, ``manhattan`` or ``cosine``.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        k: int = 5,
        metric: Literal["euclidean", "sqeuclidean", "manhattan", "cosine"] = "euclidean",
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(KNN, k=k, metric=metric))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def _step(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        if self.begun and self.estimator.train is None:
            self.estimator.iterate(*self.trainer.datamodule.arrays("train"))
        return super()._step(batch, stage)

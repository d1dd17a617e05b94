"""Linear regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.arrays.base import Batch, ClassicalModule, Stage, built, half_error
from parallel.array import SplitArray
from parallel.array.learning import (
    Lasso,
    Ridge,
)


class LassoModule(ClassicalModule):
    """Lasso or elastic net: an iteration is a sweep over all coordinates.

    Logged: ``loss`` (mean squared error of a part over two), ``r2``; ``train/gap`` is the gap over ``y^T y / n``; in
    the test ``nonzero`` coefficients, and where the truth is known ``coefficient_error``, the largest. Outputs:
    ``prediction``, ``target``.

    Args:
        lam: Penalty.
        l1_ratio: Part of it on absolute values.
        tol: Gap at which to stop.
        mode: ``auto``, ``gram`` or ``residual``.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        lam: float = 0.1,
        l1_ratio: float = 1.0,
        tol: float = 1e-8,
        mode: Literal["auto", "gram", "residual"] = "auto",
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(Lasso, lam=lam, l1_ratio=l1_ratio, tol=tol, mode=mode))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def _iterate(self, batch: Batch) -> None:
        super()._iterate(batch)
        self.log_exact({"train/gap": float(self.estimator.gap)}, on_step=False, on_epoch=True)

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        found = {"loss": half_error(self.estimator, x, y), "r2": self.estimator.score(x, y)}
        if stage == "test":
            w = self.estimator.weights
            found["nonzero"] = float((w != 0).sum())
            truth = getattr(self.trainer.datamodule.generator, "weights", None)
            if truth is not None:
                found["coefficient_error"] = float((w - torch.from_numpy(truth)).abs()[1:].max())
        return found

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.predict(x).local, "target": y.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"weights": self.estimator.weights}


class RidgeModule(ClassicalModule):
    """Ridge regression, in one iteration. Logged and returned: as of `LassoModule`.

    Args:
        penalty: 0: ordinary least squares.
        method: ``auto``, ``gram`` or ``tsqr``.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        penalty: float = 1.0,
        method: Literal["auto", "gram", "tsqr"] = "auto",
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(Ridge, penalty=penalty, method=method))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        return {"loss": half_error(self.estimator, x, y), "r2": self.estimator.score(x, y)}

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.predict(x).local, "target": y.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"weights": self.estimator.weights}

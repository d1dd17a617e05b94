"""Principal components and dynamic modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.arrays.base import ClassicalModule, Stage, built
from parallel.array import SplitArray
from parallel.array.learning import (
    DMD,
    PCA,
)
from parallel.array.learning.base import all_reduce


class PCAModule(ClassicalModule):
    """Principal components.

    Logged: ``loss``, the part of the squared deviations of a part that the components do not explain;
    ``reconstruction_error``, its root. Outputs: ``prediction``, the coordinates of each row.

    Args:
        k: Components; None: all.
        method: ``gram``, ``tsqr``, ``hsvd``, ``rsvd``, or ``incremental`` (with data.block_rows).
        power: Power iterations of ``rsvd``.
        seed: Of ``rsvd``.
        optimizer: Unused.
        scheduler: Unused.
    """

    streams = True

    def __init__(
        self,
        k: int | None = 5,
        method: Literal["gram", "tsqr", "hsvd", "rsvd", "incremental"] = "gram",
        power: int = 4,
        seed: int = 0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(PCA, k=k, method=method, power=power, seed=seed))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def on_fit_start(self) -> None:
        if self.trainer.datamodule.block_rows is not None and self.estimator.method != "incremental":
            raise ValueError(
                f"model.method={self.estimator.method} needs all rows at once, and data.block_rows="
                f"{self.trainer.datamodule.block_rows} gives blocks: use model.method=incremental, data.block_rows=null"
            )

    @override
    def on_train_epoch_end(self) -> None:
        if self.estimator.method == "incremental":  # every row has been seen once
            self.trainer.should_stop = True

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        error = self.estimator.reconstruction_error(x)
        return {"loss": error**2, "reconstruction_error": error}

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.transform(x).local, "target": y.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        pca = self.estimator
        return {"components": pca.components, "explained": pca.explained, "singular_values": pca.singular_values}


class DMDModule(ClassicalModule):
    """Dynamic mode decomposition: rows are points, columns snapshots; of the training rows.

    Logged: ``loss``, squared error of one-step forecasts of the training rows, relative. Outputs: ``prediction``, the
    snapshots that the modes give, ``target`` the rows themselves.

    Args:
        rank: Modes.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        rank: int = 5,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(built(DMD, rank=rank))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    def _prepare(self) -> None:
        if self.estimator.modes is None:
            self.estimator.iterate(self.trainer.datamodule.arrays("train")[0])

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        given, back = x.local.double(), self.estimator.forecast(x, x.shape[1]).local
        both = all_reduce(x, torch.stack([(given - back).square().sum(), given.square().sum()]))
        return {"loss": float(both[0] / both[1].clamp(min=1e-300))}

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        self._prepare()
        return {"prediction": self.estimator.forecast(x, x.shape[1]).local.to(x.dtype), "target": x.local}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"eigenvalues": torch.view_as_real(self.estimator.eigenvalues)}

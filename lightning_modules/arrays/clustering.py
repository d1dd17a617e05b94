"""Clusters of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.arrays.base import ClassicalModule, Stage, built, check_choice
from parallel.array import SplitArray
from parallel.array.learning import (
    KMeans,
    KMedians,
    KMedoids,
    MiniBatchKMeans,
    Spectral,
    silhouette,
)
from parallel.array.learning.base import all_reduce
from parallel.array.sorting import unique


class KMeansModule(ClassicalModule):
    """k-means: Lloyd's iterations, mini-batches of blocks, medians or medoids.

    Logged: ``loss`` (mean squared distance of the rows of a part to their centres; Manhattan distance of medians),
    ``inertia`` (their sum), in the test ``silhouette`` of a sample. Outputs: ``prediction`` cluster, ``target`` label,
    ``plane`` (first two columns, for figures).

    Args:
        k: Clusters.
        algorithm: ``lloyd``, ``minibatch`` (with data.block_rows), ``medians`` or ``medoids``.
        init: ``k-means||`` or ``random``.
        tol: See `parallel.array.learning.KMeans`; 0: until no centre moves.
        empty: A centre without rows: ``keep`` or ``farthest``.
        silhouette_rows: Rows of the sample; 0: none.
        seed: Of the start.
        optimizer: Unused.
        scheduler: Unused.
    """

    streams = True
    totals = ("inertia",)

    def __init__(
        self,
        k: int = 8,
        algorithm: Literal["lloyd", "minibatch", "medians", "medoids"] = "lloyd",
        init: Literal["k-means||", "random"] = "k-means||",
        tol: float = 1e-4,
        empty: Literal["keep", "farthest"] = "keep",
        silhouette_rows: int = 1000,
        seed: int = 0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        kinds = {"lloyd": KMeans, "minibatch": MiniBatchKMeans, "medians": KMedians, "medoids": KMedoids}
        check_choice("algorithm", algorithm, kinds)
        options = {"empty": empty} if algorithm == "lloyd" else {}
        super().__init__(built(kinds[algorithm], k=k, init=init, tol=tol, seed=seed, **options))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.algorithm, self.silhouette_rows = algorithm, silhouette_rows
        self.streams_blocks = algorithm == "minibatch"

    @override
    def on_fit_start(self) -> None:
        if self.trainer.datamodule.block_rows is not None and not self.streams_blocks:
            raise ValueError(
                f"model.algorithm={self.algorithm} needs all rows in every iteration, and data.block_rows="
                f"{self.trainer.datamodule.block_rows} gives blocks; use algorithm=minibatch, or data.block_rows=null"
            )

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        inertia = -self.estimator.score(x)
        found = {"loss": inertia / max(x.shape[0], 1), "inertia": inertia}
        if stage == "test" and self.silhouette_rows and self.estimator.k > 1:
            labels = self.estimator.predict(x)
            found["silhouette"] = silhouette(x, labels, self.silhouette_rows)
        return found

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.predict(x).local, "target": y.local, "plane": x.local[:, :2]}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"centres": self.estimator.centres}


class SpectralModule(ClassicalModule):
    """Spectral clustering of the training rows; it has no rule for others (set data.val_fraction=0, test_fraction=0).

    Logged: ``loss``, the inertia of k-means on the eigenvectors; where there are labels, ``ari``, the adjusted Rand
    index. Outputs: ``prediction``, ``target``, ``plane`` (first two columns).

    Args:
        k: Clusters.
        affinity: ``knn`` or ``gaussian``.
        neighbours: Of ``knn``.
        gamma: Of ``gaussian``.
        steps: Largest size of the Krylov basis.
        seed: Of Lanczos and k-means.
        optimizer: Unused.
        scheduler: Unused.
    """

    def __init__(
        self,
        k: int = 2,
        affinity: Literal["knn", "gaussian"] = "knn",
        neighbours: int = 10,
        gamma: float = 1.0,
        steps: int = 500,
        seed: int = 0,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        options = {"k": k, "affinity": affinity, "neighbours": neighbours, "gamma": gamma, "steps": steps, "seed": seed}
        super().__init__(built(Spectral, **options))
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    @override
    def evaluate(self, x: SplitArray, y: SplitArray, stage: Stage) -> dict[str, float]:
        found = {"loss": self.estimator.objective}
        labels = self.estimator.predict(x)
        if not y.dtype.is_floating_point:
            found["ari"] = adjusted_rand_index(y, labels)
        return found

    @override
    def outputs(self, x: SplitArray, y: SplitArray) -> dict[str, Tensor]:
        return {"prediction": self.estimator.predict(x).local, "target": y.local, "plane": x.local[:, :2]}

    @override
    def fitted(self) -> dict[str, Tensor]:
        return {"values": self.estimator.values}


def adjusted_rand_index(a: SplitArray, b: SplitArray) -> float:
    """Agreement of two labellings: 1 for equal ones, about 0 for independent ones (Hubert and Arabie, 1985)."""
    (va, ia), (vb, ib) = unique(a, return_inverse=True), unique(b, return_inverse=True)
    m, k = va.shape[0], vb.shape[0]
    joint = torch.bincount(ia.local * k + ib.resplit(a.split, a.map or None).local, minlength=m * k)
    table = all_reduce(a, joint).double().view(m, k)

    def pairs(n: Tensor) -> Tensor:
        return (n * (n - 1) / 2).sum()

    total, rows, columns = pairs(table.sum()), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / total.clamp(min=1)
    best = (rows + columns) / 2
    return float((pairs(table) - expected) / (best - expected)) if best != expected else 1.0

"""Spectral clustering: leading eigenvectors of the normalised affinity by Lanczos, then k-means on them.

Rows of the graph are split as the data; a step of Lanczos gathers one vector of n numbers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import owner_bounds
from parallel.array.decompositions import lanczos
from parallel.array.distance import cdist, nearest
from parallel.array.learning.base import Estimator, Step, all_reduce, like_rows
from parallel.array.learning.k_means import KMeans


class _Edges:
    """Local rows of a graph whose edges weigh one half each, as often as they are listed."""

    def __init__(self, rows: Tensor, columns: Tensor, number: int) -> None:
        order = torch.argsort(rows, stable=True)
        self.rows, self.columns, self.number = rows[order], columns[order], number

    def __matmul__(self, vector: Tensor) -> Tensor:
        return vector.new_zeros(self.number).index_add_(0, self.rows, 0.5 * vector[self.columns])


class Spectral(Estimator):
    """Clusters of a graph of neighbours (Ng, Jordan and Weiss, 2001; Shi and Malik, 2000).

    Args:
        k: Clusters.
        affinity: ``knn``: the graph of the nearest rows, made symmetric; ``gaussian``: ``exp(-gamma d^2)``, dense.
        neighbours: Of ``knn``, the row itself among them.
        gamma: Of ``gaussian``.
        steps: Largest size of the Krylov basis.
        seed: Of Lanczos and k-means.

    Attributes:
        labels: Cluster of each fitted row (global order, on all ranks).
        values: Leading eigenvalues of ``D^-1/2 W D^-1/2``, descending.
    """

    fitted: ClassVar[tuple[str, ...]] = ("labels", "values")

    def __init__(
        self,
        k: int = 8,
        affinity: Literal["knn", "gaussian"] = "knn",
        neighbours: int = 10,
        gamma: float = 1.0,
        steps: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(1)
        if affinity not in ("knn", "gaussian"):
            raise ValueError(f"affinity={affinity!r}: choose knn or gaussian")
        for name, value in (("k", k), ("neighbours", neighbours), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not gamma > 0:
            raise ValueError(f"gamma={gamma}: must be above 0")
        self.k, self.affinity, self.neighbours, self.gamma = k, affinity, neighbours, gamma
        self.steps, self.seed = steps, seed
        self.labels: Tensor | None = None
        self.values: Tensor | None = None
        self.embedding: SplitArray | None = None

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All of it."""
        x = self.rows(x)
        if self.k > x.shape[0]:
            raise ValueError(f"k={self.k}: there are only {x.shape[0]} rows; use at most as many clusters")
        graph = self._graph(x)
        ones = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
        degree = (graph @ ones).clamp(min=1e-300)
        root = degree.rsqrt()
        map_ = x.map if x.split == 0 else ()

        def product(v: Tensor) -> Tensor:
            scaled = root * v
            whole = x.comm.all_gather_rows(scaled, x.map) if x.split == 0 else scaled
            return root * (graph @ whole)

        # Shifted by one, so that the wanted end is the largest in size too.
        found = lanczos(lambda v: product(v) + v, x.shape[0], map_, x, self.k, self.steps, self.seed)
        self.values = found.values - 1
        self.embedding = like_rows(x, found.vectors * root[:, None])
        scale = all_reduce(x, found.vectors.square().sum(0)).sqrt()
        self.embedding.local.div_(scale)
        best = min(
            (KMeans(self.k, seed=self.seed + i, max_iter=100, tol=0.0).fit(self.embedding) for i in range(5)),
            key=lambda m: m.inertia,
        )
        self.labels = best.predict(self.embedding).resplit(None).local
        return Step(best.inertia, 0.0, True)

    def _graph(self, x: SplitArray) -> Tensor | _Edges:
        """Local rows of the affinity, ``(local rows, n)`` float64; sparse for ``knn``."""
        if self.affinity == "gaussian":
            return cdist(x.astype(torch.float64), metric="sqeuclidean").local.mul_(-self.gamma).exp_()
        number = min(self.neighbours, x.shape[0])
        _, where = nearest(x, x, number)
        i = (x.offset + torch.arange(len(x.local)))[:, None].expand_as(where.local).reshape(-1)
        j = where.local.reshape(-1)
        # (W + W^T) / 2: every edge also goes to the owner of its other end.
        edges = torch.stack([torch.cat([i, j]), torch.cat([j, i])], 1)
        if x.split == 0 and x.comm.size > 1:
            owner = torch.searchsorted(torch.tensor(owner_bounds(x.map)), edges[:, 0].contiguous(), right=True)
            order = torch.argsort(owner, stable=True)
            counts = torch.bincount(owner, minlength=x.comm.size).tolist()
            edges = torch.cat(x.comm.exchange_rows(edges[order].split(counts)))
        return _Edges(edges[:, 0] - x.offset, edges[:, 1], len(x.local))

    def predict(self, x: SplitArray) -> SplitArray:
        """Clusters of the fitted rows.

        Raises:
            ValueError: For other rows: the method has no rule for them.
        """
        self.require_fitted()
        if x.shape[0] != len(self.labels):
            raise ValueError(f"Spectral has clusters of the {len(self.labels)} fitted rows only, not of {x.shape[0]}")
        rows = self.rows(x)
        return like_rows(rows, self.labels[rows.offset : rows.offset + len(rows.local)])

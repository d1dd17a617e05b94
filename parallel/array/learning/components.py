"""Principal components, in memory or block by block, and dynamic modes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.decompositions import hsvd, rsvd, svd
from parallel.array.gram import GramMoments, gram_of, gram_over_ranks, merged_gram
from parallel.array.learning.base import Estimator, Step, all_reduce, finite_rows, like_rows

Method = Literal["gram", "tsqr", "hsvd", "rsvd", "incremental"]
METHODS = ("gram", "tsqr", "hsvd", "rsvd", "incremental")


class PCA(Estimator):
    """Directions of largest variance, with the sign that makes the largest loading positive.

    Args:
        k: Components; None: all columns.
        method: ``gram``: eigenvectors of the covariance matrix in float64, one pass. ``tsqr``: QR, as accurate as an
            SVD of all rows. ``hsvd``: hierarchical SVD. ``rsvd``: randomised SVD. ``incremental``: one pass over blocks
            (`partial_fit`), by the covariance matrix.
        power: Power iterations of ``rsvd``.
        seed: Of ``rsvd``.

    Attributes:
        components: ``(k, f)`` float64.
        mean: ``(f,)`` float64.
        singular_values: ``(k,)``, of the centred rows.
        variance: ``(k,)``, with n - 1 degrees of freedom.
        total_variance: Of all columns.
    """

    fitted: ClassVar[tuple[str, ...]] = (
        "components", "mean", "singular_values", "variance", "total_variance", "n", "scatter",
    )  # fmt: skip

    def __init__(self, k: int | None = None, method: Method = "gram", power: int = 4, seed: int = 0) -> None:
        super().__init__(1)
        if method not in METHODS:
            raise ValueError(f"method={method!r}: choose {', '.join(METHODS)}")
        if k is not None and k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        self.k, self.method, self.power, self.seed = k, method, power, seed
        self._clear()

    def _clear(self) -> None:
        for name in self.fitted:
            setattr(self, name, None)

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """Forget what was fitted.

        Raises:
            ValueError: If more components are wanted than there are.
        """
        super().begin(x)
        self._clear()
        if self.k is not None and self.k > x.shape[1]:
            raise ValueError(f"k={self.k}: the rows have only {x.shape[1]} columns")

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All of it; of ``incremental`` the rows of one block."""
        x = self.rows(x)
        k = x.shape[1] if self.k is None else self.k
        if self.method in ("gram", "incremental"):
            mine = gram_of(x.local)
            mine = gram_over_ranks(mine, x.comm) if x.split == 0 else mine
            _require_finite(x, mine.mean)
            if self.method == "incremental" and self.scatter is not None:
                mine = merged_gram(GramMoments(self.n, self.mean, self.scatter), mine)
            self._from_scatter(mine, k)
        else:
            self._from_rows(x, k)
        left = float(self.total_variance - self.variance.sum())
        return Step(max(left, 0.0), 0.0, self.method != "incremental")

    def partial_fit(self, x: SplitArray) -> Step:
        """Add the rows of a block."""
        if self.method != "incremental":
            raise ValueError(f"partial_fit: method={self.method} needs all rows at once; use method=incremental")
        if self.mean is None:
            self.begin(x)
        return self.step(x)

    def _from_scatter(self, found: GramMoments, k: int) -> None:
        self.n, self.mean = found.n, found.mean
        self.scatter = found.scatter if self.method == "incremental" else None
        values, vectors = torch.linalg.eigh(found.scatter)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        self._set(values[:k].sqrt(), vectors[:, :k].mT, float(values.sum()))

    def _from_rows(self, x: SplitArray, k: int) -> None:
        sums = all_reduce(x, x.local.sum(0, dtype=torch.float64))
        self.n = torch.tensor(float(x.shape[0]), dtype=torch.float64)
        self.mean = sums / max(x.shape[0], 1)
        _require_finite(x, self.mean)
        centred = like_rows(x, (x.local.double() - self.mean).to(x.dtype))
        total = float(all_reduce(x, (x.local.double() - self.mean).square().sum()))
        k = min(k, x.shape[0])
        if self.method == "tsqr":
            # The factor is small: float64 costs little and keeps small singular values.
            found = svd(centred.astype(torch.float64), "tsqr", k)
        elif self.method == "hsvd":
            found = hsvd(centred, rank=min(k, min(x.shape)))
        else:
            found = rsvd(centred, k, self.power, seed=self.seed)
        v = found.v.resplit(None).local.double()
        self._set(found.s.double(), v.mT, total)

    def _set(self, s: Tensor, components: Tensor, total: float) -> None:
        largest = components.abs().argmax(1, keepdim=True)
        self.components = components * torch.where(components.gather(1, largest) < 0, -1.0, 1.0)
        degrees = max(float(self.n) - 1, 1.0)
        self.singular_values, self.variance = s, s.square() / degrees
        self.total_variance = torch.tensor(total / degrees, dtype=torch.float64)

    @property
    def explained(self) -> Tensor:
        """Part of the variance in each component."""
        self.require_fitted()
        return self.variance / self.total_variance.clamp(min=1e-300)

    def transform(self, x: SplitArray) -> SplitArray:
        """Coordinates of every row, ``(rows, k)``."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, self.components.shape[1])
        v, mean = self.components.to(x.device), self.mean.to(x.device)
        blocks = [((block.double() - mean) @ v.mT).to(x.dtype) for block in x.local.split(1 << 14)]
        return like_rows(x, torch.cat(blocks) if blocks else x.local.new_empty(0, len(v)))

    predict = transform

    def inverse_transform(self, z: SplitArray) -> SplitArray:
        """Rows of coordinates."""
        self.require_fitted()
        local = (z.local.double() @ self.components + self.mean).to(z.dtype)
        return like_rows(z, local)

    def reconstruction_error(self, x: SplitArray) -> float:
        """``|x - back and forth|_F / |x - mean|_F``."""
        x = self.rows(x)
        back = self.inverse_transform(self.transform(x)).local.double()
        rows = x.local.double()
        both = all_reduce(x, torch.stack([(rows - back).square().sum(), (rows - self.mean).square().sum()]))
        return math.sqrt(float(both[0]) / max(float(both[1]), 1e-300))


def _require_finite(x: SplitArray, mean: Tensor) -> None:
    """Name the first row that is not finite, on all ranks, where the mean of all rows is not."""
    if not bool(torch.isfinite(mean).all()):
        finite_rows(x, "raise")


class DMD(Estimator):
    """Dynamic mode decomposition of snapshots: ``x_{t+1} = A x_t`` on the leading directions.

    Rows are points in space, columns are times: the points are split.

    Args:
        rank: Directions of the snapshots that are kept.

    Attributes:
        modes: ``(points of this rank, rank)`` complex.
        eigenvalues: ``(rank,)`` complex, growth per step.
        amplitudes: ``(rank,)`` complex, of the first snapshot.
        step_matrix: The operator on the leading directions, ``(rank, rank)``.
    """

    fitted: ClassVar[tuple[str, ...]] = ("eigenvalues", "amplitudes", "step_matrix", "eigenvectors", "right")

    def __init__(self, rank: int = 4) -> None:
        super().__init__(1)
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        self.rank = rank
        self.modes: Tensor | None = None
        for name in self.fitted:
            setattr(self, name, None)

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """All of it."""
        x = self.rows(x).astype(torch.float64)
        times = x.shape[1] - 1
        if times < self.rank:
            raise ValueError(f"rank={self.rank}: {times + 1} snapshots have {times} steps; use at most that many")
        before, after = like_rows(x, x.local[:, :-1]), x.local[:, 1:]
        values, vectors = torch.linalg.eigh(all_reduce(x, before.local.mT @ before.local))
        s, v = values.flip(0)[: self.rank].clamp(min=1e-300).sqrt(), vectors.flip(1)[:, : self.rank]
        u = before.local @ (v / s)
        step = all_reduce(x, u.mT @ after) @ (v / s)
        eigenvalues, w = torch.linalg.eig(step)
        order = torch.argsort(eigenvalues.abs(), descending=True)
        self.eigenvalues, self.eigenvectors = eigenvalues[order], w[:, order]
        self.step_matrix, self.right = step, v / s
        self.modes = u.to(torch.complex128) @ self.eigenvectors
        start = all_reduce(x, u.mT @ x.local[:, 0])
        self.amplitudes = torch.linalg.solve(self.eigenvectors, start.to(torch.complex128))
        error = all_reduce(
            x,
            (after - u @ (step @ (u.mT @ before.local if x.split is None else all_reduce(x, u.mT @ before.local))))
            .square()
            .sum(),
        )
        return Step(float(error), 0.0, True)

    def forecast(self, x: SplitArray, steps: int) -> SplitArray:
        """Snapshots ``0 ... steps - 1`` of the fitted points, ``(points, steps)``, from the modes."""
        self.require_fitted()
        times = torch.arange(steps, dtype=torch.float64)
        dynamics = self.amplitudes[:, None] * self.eigenvalues[:, None] ** times.to(torch.complex128)
        return like_rows(x, (self.modes @ dynamics).real)

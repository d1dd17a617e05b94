"""Data sets that are made where they are needed: row i is a function of (seed, i), whatever the number of ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.array.rng import normal_at, uniform_at

_BLOCK = 1 << 14


class Rows(NamedTuple):
    """Rows of a data set with their labels (classes, targets)."""

    x: Tensor
    y: Tensor


def _normals(begin: int, end: int, columns: int, seed: int, stream: int) -> np.ndarray:
    numbers = np.arange(begin * columns, end * columns)
    return normal_at(numbers, seed, stream).reshape(end - begin, columns)


def _uniforms(begin: int, end: int, columns: int, seed: int, stream: int) -> np.ndarray:
    numbers = np.arange(begin * columns, end * columns)
    return uniform_at(numbers, seed, stream).reshape(end - begin, columns)


class Generated:
    """Base of data sets: `rows` gives any range of them.

    Args:
        num_rows: Length.
        num_features: Columns.
        seed: Of everything.
    """

    def __init__(self, num_rows: int, num_features: int, seed: int = 0) -> None:
        for name, value in (("num_rows", num_rows), ("num_features", num_features)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.num_rows, self.num_features, self.seed = num_rows, num_features, seed

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def rows(self, begin: int, end: int, dtype: torch.dtype = torch.float32) -> Rows:
        """Rows ``begin:end``."""
        x = torch.empty(end - begin, self.num_features, dtype=dtype)
        y = []
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            values, labels = self._block(first, last)
            x[first - begin : last - begin] = torch.from_numpy(values)
            y.append(torch.from_numpy(labels))
        labels = torch.cat(y) if y else torch.from_numpy(self._block(0, 0)[1])
        return Rows(x, labels.to(dtype) if labels.is_floating_point() else labels)


class Blobs(Generated):
    """Normal clouds around centres N(0, ``spread``^2 I), unit noise; the label is the number of the cloud.

    Args:
        num_rows: Length.
        num_features: Columns.
        num_groups: Clouds.
        spread: Standard deviation of the centres.
        seed: Of everything.
    """

    def __init__(
        self, num_rows: int, num_features: int = 18, num_groups: int = 8, spread: float = 2.0, seed: int = 0
    ) -> None:
        super().__init__(num_rows, num_features, seed)
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups}: must be at least 1")
        self.num_groups = num_groups
        self.centres = spread * _normals(0, num_groups, num_features, seed, 1)

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        group = np.minimum(
            (_uniforms(begin, end, 1, self.seed, 2)[:, 0] * self.num_groups).astype(np.int64), self.num_groups - 1
        )
        return self.centres[group] + _normals(begin, end, self.num_features, self.seed, 3), group


class SusyLike(Generated):
    """Two classes of collisions with 18 columns as those of SUSY: 8 low-level ones, 10 nonlinear functions of them.

    Transverse momenta have exponential tails, directions are uniform, pseudorapidities normal. Signal has larger scales
    of momenta and missing energy; a linear classifier reaches an AUC of about 0.8.

    Args:
        num_rows: Length.
        seed: Of everything.
        signal: Part of the rows that is signal.
    """

    num_groups = 2

    def __init__(self, num_rows: int, seed: int = 0, signal: float = 0.46) -> None:
        super().__init__(num_rows, 18, seed)
        self.signal = signal

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        u = _uniforms(begin, end, 6, self.seed, 2)
        z = _normals(begin, end, 4, self.seed, 3)
        label = (u[:, 0] < self.signal).astype(np.int64)
        scale = np.where(label == 1, 2.4, 1.0)
        pt1 = 0.3 - scale * np.log1p(-u[:, 1])
        pt2 = 0.2 - 0.8 * scale * np.log1p(-u[:, 2])
        met = 0.1 - 1.4 * scale * np.log1p(-u[:, 3])
        eta1, eta2 = z[:, 0], 0.9 * z[:, 1]
        phi1, phi2 = 2 * math.pi * u[:, 4] - math.pi, 2 * math.pi * u[:, 5] - math.pi
        met_phi = phi1 + math.pi + 0.8 * z[:, 2]
        dphi = np.arccos(np.clip(np.cos(phi1 - phi2), -1, 1))
        mass = np.sqrt(np.maximum(2 * pt1 * pt2 * (np.cosh(eta1 - eta2) - np.cos(dphi)), 0))
        transverse = [
            np.sqrt(np.maximum(2 * pt * met * (1 - np.cos(phi - met_phi)), 0)) for pt, phi in ((pt1, phi1), (pt2, phi2))
        ]
        total = pt1 + pt2 + met
        axial = met * np.cos(met_phi - phi1)
        high = [
            met / np.sqrt(pt1 + pt2 + 0.1),
            axial,
            mass,
            total,
            transverse[0],
            transverse[1],
            mass / (total + 0.1),
            np.minimum(*transverse),
            np.cos(dphi) * (pt1 - pt2) + 0.1 * z[:, 3],
            (pt1 - pt2) / (pt1 + pt2),
        ]
        wrapped = np.arctan2(np.sin(met_phi), np.cos(met_phi))
        return np.stack([pt1, eta1, phi1, pt2, eta2, phi2, met, wrapped, *high], 1), label


class SparseRegression(Generated):
    """``y = X w + noise`` with few non-zero ``w``; columns are normal, their correlations ``rho^|i - j|``.

    The first column is 1. Column scales grow from 1 to ``scale``, so that they are not standardised.

    Args:
        num_rows: Length.
        num_features: Columns.
        num_nonzero: Coefficients that are not zero.
        rho: Correlation of neighbours.
        snr: Variance of the signal over that of the noise.
        scale: Of the last column.
        seed: Of everything.
    """

    def __init__(
        self,
        num_rows: int,
        num_features: int = 64,
        num_nonzero: int = 10,
        rho: float = 0.5,
        snr: float = 10.0,
        scale: float = 3.0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_rows, num_features, seed)
        if not 0 < num_nonzero < num_features:
            raise ValueError(f"num_nonzero={num_nonzero}: use 1 to {num_features - 1}")
        free = num_features - 1
        lags = np.abs(np.subtract.outer(np.arange(free), np.arange(free)))
        self.scales = np.linspace(1.0, scale, free)
        self.factor = np.linalg.cholesky(rho**lags) * self.scales[:, None]
        order = np.argsort(uniform_at(np.arange(free), seed, 1), kind="stable")[:num_nonzero]
        self.weights = np.zeros(num_features)
        signs = np.sign(normal_at(np.arange(num_nonzero), seed, 2))
        self.weights[1 + order] = signs * (1 + uniform_at(np.arange(num_nonzero), seed, 4))
        self.intercept = 2.0
        variance = self.weights[1:] @ (self.factor @ self.factor.T) @ self.weights[1:]
        self.noise = math.sqrt(variance / snr)

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        normals = _normals(begin, end, self.num_features, self.seed, 3)
        x = np.concatenate([np.ones((end - begin, 1)), normals[:, :-1] @ self.factor.T], 1)
        return x, self.intercept + x @ self.weights + self.noise * normals[:, -1]


class LowRank(Generated):
    """``U diag(s) V^T`` plus noise, ``s`` falling geometrically; ``V`` is orthonormal, the rows of ``U`` normal.

    Args:
        num_rows: Length.
        num_features: Columns.
        rank: Directions.
        decay: Ratio of consecutive scales.
        noise: Standard deviation.
        seed: Of everything.
    """

    def __init__(
        self,
        num_rows: int,
        num_features: int = 18,
        rank: int = 5,
        decay: float = 0.6,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(num_rows, num_features, seed)
        if not 0 < rank <= num_features:
            raise ValueError(f"rank={rank}: use 1 to {num_features}")
        self.rank, self.noise = rank, noise
        self.scales = 3.0 * decay ** np.arange(rank)
        self.directions = np.linalg.qr(normal_at(np.arange(num_features * rank), seed, 1).reshape(num_features, rank))[
            0
        ]

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        u = _normals(begin, end, self.rank, self.seed, 2)
        noise = self.noise * _normals(begin, end, self.num_features, self.seed, 3)
        return (u * self.scales) @ self.directions.T + noise, np.zeros(end - begin, dtype=np.int64)


class Moons(Generated):
    """Two half circles that reach into each other.

    Args:
        num_rows: Length.
        noise: Standard deviation.
        seed: Of everything.
    """

    num_groups = 2

    def __init__(self, num_rows: int, noise: float = 0.06, seed: int = 0) -> None:
        super().__init__(num_rows, 2, seed)
        self.noise = noise

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        u = _uniforms(begin, end, 2, self.seed, 1)
        label = (u[:, 0] < 0.5).astype(np.int64)
        angle = math.pi * u[:, 1]
        x = np.stack([np.cos(angle), np.sin(angle)], 1)
        x = np.where(label[:, None] == 0, x, np.stack([1 - x[:, 0], 0.5 - x[:, 1]], 1))
        return x + self.noise * _normals(begin, end, 2, self.seed, 2), label


class Waves(Generated):
    """Points in space (rows) over time (columns): two damped travelling waves and a standing one, with noise.

    Args:
        num_rows: Points.
        num_features: Snapshots.
        noise: Standard deviation.
        seed: Of everything.
    """

    eigenvalues = (0.98 * np.exp(0.35j), 0.995 * np.exp(0.12j), 0.97 + 0j)

    def __init__(self, num_rows: int, num_features: int = 64, noise: float = 1e-3, seed: int = 0) -> None:
        super().__init__(num_rows, num_features, seed)
        self.noise = noise

    def _block(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        place = 2 * math.pi * np.arange(begin, end)[:, None] / self.num_rows
        times = np.arange(self.num_features)
        a, b, c = self.eigenvalues
        field = (np.exp(2j * place) * a**times).real + 0.7 * (np.exp(5j * place) * b**times).real
        field = field + np.cos(place) * (c**times).real
        return field + self.noise * _normals(begin, end, self.num_features, self.seed, 2), np.zeros(
            end - begin, dtype=np.int64
        )


GENERATORS = {
    "blobs": Blobs,
    "susy_like": SusyLike,
    "sparse_regression": SparseRegression,
    "low_rank": LowRank,
    "moons": Moons,
    "waves": Waves,
}

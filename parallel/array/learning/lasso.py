"""Lasso and elastic net by coordinate descent: on the Gram matrix, without communication, or on the residual.

Objective: ``|y - X w - w0|^2 / (2 n) + lam (l1 |w|_1 + (1 - l1) |w|^2 / 2)``; the intercept is not penalised, columns
need not be standardised. HeAT assumes ``|X_j|^2 = n`` and returns other coefficients where that does not hold.
"""

from __future__ import annotations

from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.gram import GramMoments, gram_of, gram_over_ranks, merged_gram, well_conditioned
from parallel.array.learning.base import Estimator, Step, aligned_labels, all_reduce, like_rows

GRAM_COLUMNS = 4096
"""Columns up to which the Gram matrix, 128 MiB then, is formed."""
_LEAST_EIGENVALUE = 0.1  # of a correlation matrix whose coefficients do not suffer from products in float32
_LARGEST_FACE = 256  # coefficients that one linear system is solved for
_BLOCK_COLUMNS = 64  # of a block of coordinates in residual mode


class Problem(NamedTuple):
    """A least-squares problem of centred columns, on every rank, float64.

    Attributes:
        gram: ``X^T X / n``.
        xy: ``X^T y / n``.
        yy: ``y^T y / n``.
        x_mean: Means of the columns.
        y_mean: Mean of the target.
        rows: n.
    """

    gram: np.ndarray
    xy: np.ndarray
    yy: float
    x_mean: np.ndarray
    y_mean: float
    rows: float

    @classmethod
    def of(cls, moments: GramMoments) -> Problem:
        """From the scatter matrix of columns and target (the last one)."""
        n = max(float(moments.n), 1.0)
        scatter, mean = (moments.scatter / n).cpu().numpy(), moments.mean.cpu().numpy()
        return cls(
            np.ascontiguousarray(scatter[:-1, :-1]),
            scatter[:-1, -1].copy(),
            float(scatter[-1, -1]),
            mean[:-1],
            float(mean[-1]),
            n,
        )


def problem_moments(x: SplitArray, y: Tensor) -> GramMoments:
    """Scatter matrix of columns and target over all ranks: one pass, one all-reduce of ``(f + 1)^2`` numbers.

    Products of float32 rows are those of float32, twice as fast, and taken again in float64 where the columns are so
    much alike that their rounding would show in the coefficients.
    """

    def over_all(precise: bool) -> GramMoments:
        mine = gram_of(x.local, target=y, precise=precise)
        return gram_over_ranks(mine, x.comm) if x.split == 0 else mine

    if x.dtype == torch.float32:
        quick = over_all(False)
        if well_conditioned(quick.scatter[:-1, :-1], _LEAST_EIGENVALUE):
            return quick
    return over_all(True)


def duality_gap(problem: Problem, w: np.ndarray, lam: float, l1: float) -> tuple[float, float]:
    """Objective and duality gap of coefficients, both divided by n.

    The dual point is the residual, scaled to be feasible; the quadratic penalty counts as further rows.
    """
    l1_, l2_ = lam * l1, lam * (1 - l1)
    gw = problem.gram @ w
    residual = problem.yy - 2 * w @ problem.xy + w @ gw  # |y - Xw|^2 / n
    gradient = problem.xy - gw - l2_ * w
    top = float(np.abs(gradient).max(initial=0.0))
    scale = 1.0 if top <= l1_ else l1_ / top
    norm = np.abs(w).sum()
    primal = 0.5 * residual + l1_ * norm + 0.5 * l2_ * w @ w
    y_residual = problem.yy - w @ problem.xy  # y^T (y - Xw) / n
    dual = scale * y_residual - 0.5 * scale**2 * (residual + l2_ * (w @ w))
    return float(primal), float(max(primal - dual, 0.0))


def sweep(problem: Problem, w: np.ndarray, lam: float, l1: float, active: np.ndarray | None = None) -> float:
    """One pass over the coordinates, in place: ``w_j = S(rho_j, lam l1) / (G_jj + lam (1 - l1))``.

    Args:
        problem: Gram form.
        w: Coefficients.
        lam: Penalty.
        l1: Its part on absolute values.
        active: Coordinates to visit; None: all.

    Returns:
        The largest change of a fitted value per row, ``max_j |dw_j| sqrt(G_jj)``.
    """
    gram, threshold, ridge = problem.gram, lam * l1, lam * (1 - l1)
    rest = problem.xy - gram @ w
    largest = 0.0
    for j in range(len(w)) if active is None else active:
        z = gram[j, j]
        if z <= 0:
            continue
        old = w[j]
        rho = rest[j] + z * old
        new = max(abs(rho) - threshold, 0.0) / (z + ridge)
        new = new if rho > 0 else -new
        if new != old:
            w[j] = new
            rest -= (new - old) * gram[j]
            largest = max(largest, abs(new - old) * z**0.5)
    return largest


def _solve_face(problem: Problem, w: np.ndarray, lam: float, l1: float) -> bool:
    """Go to the minimum among coefficients of the same signs, in place, if it lies among them.

    There the gradient is linear: ``(G_AA + lam (1 - l1) I) w_A = (X^T y / n)_A - lam l1 sign(w_A)``.
    """
    kept = np.flatnonzero(w)
    if not 0 < len(kept) <= _LARGEST_FACE:
        return False
    sign = np.sign(w[kept])
    matrix = problem.gram[np.ix_(kept, kept)] + lam * (1 - l1) * np.eye(len(kept))
    try:
        found = np.linalg.solve(matrix, problem.xy[kept] - lam * l1 * sign)
    except np.linalg.LinAlgError:  # columns that depend on each other: coordinate descent goes on
        return False
    if not (np.isfinite(found).all() and (np.sign(found) == sign).all()):
        return False
    w[kept] = found
    return True


def descend(
    problem: Problem, w: np.ndarray, lam: float, l1: float = 1.0, tol: float = 1e-8, max_sweeps: int = 10_000
) -> tuple[int, float]:
    """Coordinate descent on an active set, with its exact minimum once the signs are found.

    It ends where the duality gap is at most ``tol`` times ``y^T y / n``.

    Returns:
        Sweeps and the gap.
    """
    limit = tol * max(problem.yy, 1e-300)
    sweeps, gap = 0, np.inf
    while sweeps < max_sweeps:
        # A coefficient of 0 whose gradient is within the threshold stays 0: only the others are visited. What their
        # changes bring above the threshold is found by the gap, and visited in the next round.
        gradient = problem.xy - problem.gram @ w
        active = np.flatnonzero((w != 0) | (np.abs(gradient) > lam * l1))
        while sweeps < max_sweeps:
            moved = sweep(problem, w, lam, l1, active)
            sweeps += 1
            if moved <= 0.1 * np.sqrt(limit) or _solve_face(problem, w, lam, l1):
                break
        gap = duality_gap(problem, w, lam, l1)[1]
        if gap <= limit:
            break
    return sweeps, float(gap)


class Lasso(Estimator):
    """Linear regression with an absolute penalty, or an elastic net.

    An iteration is one sweep over all coordinates.

    Args:
        lam: Penalty.
        l1_ratio: Part of it on absolute values, the rest on squares.
        max_iter: Most sweeps.
        tol: Duality gap over ``y^T y / n`` at which to stop.
        mode: ``gram`` (one all-reduce, then none), ``residual`` (an all-reduce for every block of coordinates), or
            ``auto``, by the number of columns.

    Attributes:
        weights: ``(f,)`` float64.
        intercept: Number.
        gap: Last duality gap, relative to ``y^T y / n``.
    """

    fitted: ClassVar[tuple[str, ...]] = ("weights", "intercept", "gap")
    supervised: ClassVar[bool] = True

    def __init__(
        self,
        lam: float = 0.1,
        l1_ratio: float = 1.0,
        max_iter: int = 1000,
        tol: float = 1e-8,
        mode: Literal["auto", "gram", "residual"] = "auto",
    ) -> None:
        super().__init__(max_iter)
        if not lam >= 0:
            raise ValueError(f"lam={lam}: a penalty is 0 or more")
        if not 0 <= l1_ratio <= 1:
            raise ValueError(f"l1_ratio={l1_ratio}: give a part between 0 and 1")
        if mode not in ("auto", "gram", "residual"):
            raise ValueError(f"mode={mode!r}: choose auto, gram or residual")
        self.lam, self.l1_ratio, self.tol, self.mode = lam, l1_ratio, tol, mode
        self.weights: Tensor | None = None
        self.intercept: Tensor | None = None
        self.gap: Tensor | None = None
        self._problem: Problem | None = None
        self._source: Tensor | None = None

    def begin(self, x: SplitArray, y: SplitArray | None = None) -> None:
        """All coefficients 0."""
        super().begin(x, y)
        self.weights = torch.zeros(x.shape[1], dtype=torch.float64)
        self._problem = None
        self.prepare(x, y)

    def prepare(self, x: SplitArray, y: SplitArray | None) -> None:
        """Form the Gram matrix, or the means, of the rows; needed again after a restart."""
        x = self.rows(x)
        target = aligned_labels(x, y, "Lasso")
        if self._problem is not None and self._source is x.local:
            return
        self._source = x.local
        self._by_gram = self.mode == "gram" or (self.mode == "auto" and x.shape[1] <= GRAM_COLUMNS)
        if self._by_gram:
            self._problem = Problem.of(problem_moments(x, target))
            return
        sums = torch.cat([x.local.sum(0, dtype=torch.float64), target.sum(dtype=torch.float64)[None]])
        mean = (all_reduce(x, sums) / x.shape[0]).numpy()
        yy = all_reduce(x, (target.double() - mean[-1]).square().sum()) / x.shape[0]
        self._problem = Problem(np.zeros((0, 0)), np.zeros(0), float(yy), mean[:-1], float(mean[-1]), x.shape[0])

    def iterate(self, x: SplitArray, y: SplitArray | None = None) -> Step:
        """One sweep."""
        x = self.rows(x)
        self.prepare(x, y)
        problem, w = self._problem, self.weights.numpy().copy()
        before = w.copy()
        if self._by_gram:
            sweep(problem, w, self.lam, self.l1_ratio)
            objective, gap = duality_gap(problem, w, self.lam, self.l1_ratio)
        else:
            objective, gap = self._residual_sweep(x, aligned_labels(x, y, "Lasso").double(), w)
        self.weights = torch.from_numpy(w)
        self.intercept = torch.tensor(problem.y_mean - problem.x_mean @ w, dtype=torch.float64)
        relative = gap / max(problem.yy, 1e-300)
        self.gap = torch.tensor(relative, dtype=torch.float64)
        return Step(objective, float(np.abs(w - before).max(initial=0.0)), relative <= self.tol)

    def _residual_sweep(self, x: SplitArray, y: Tensor, w: np.ndarray) -> tuple[float, float]:
        """Blocks of coordinates: the Gram matrix of a block and its product with the residual, one all-reduce each."""
        problem, n, lam = self._problem, x.shape[0], self.lam
        mean = torch.from_numpy(problem.x_mean)
        residual = y - problem.y_mean - x.local.double() @ torch.from_numpy(w) + float(problem.x_mean @ w)
        for begin in range(0, len(w), _BLOCK_COLUMNS):
            block = slice(begin, begin + _BLOCK_COLUMNS)
            columns = x.local[:, block].double() - mean[block]
            both = all_reduce(x, torch.cat([columns.mT @ columns, (columns.mT @ residual)[:, None]], 1) / n).numpy()
            old = w[block].copy()
            gram, xr = both[:, :-1], both[:, -1]
            small = Problem(gram, xr + gram @ old, 0.0, problem.x_mean[block], 0.0, n)
            new = old.copy()
            sweep(small, new, lam, self.l1_ratio)
            w[block] = new
            residual = residual - columns @ torch.from_numpy(new - old)
        centred = (x.local.double() - mean).mT @ residual
        found = all_reduce(
            x, torch.cat([centred, (residual @ residual)[None], (residual @ (y - problem.y_mean))[None]]) / n
        )
        gradient, rr, yr = found[:-2].numpy(), float(found[-2]), float(found[-1])
        l1_, l2_ = lam * self.l1_ratio, lam * (1 - self.l1_ratio)
        top = float(np.abs(gradient - l2_ * w).max(initial=0.0))
        scale = 1.0 if top <= l1_ else l1_ / top
        primal = 0.5 * rr + l1_ * np.abs(w).sum() + 0.5 * l2_ * w @ w
        dual = scale * yr - 0.5 * scale**2 * (rr + l2_ * (w @ w))
        return float(primal), float(max(primal - dual, 0.0))

    def predict(self, x: SplitArray) -> SplitArray:
        """Fitted value of every row."""
        self.require_fitted()
        x = self.rows(x)
        self.check_columns(x, len(self.weights))
        return like_rows(x, linear(x.local, self.weights, self.intercept))

    def score(self, x: SplitArray, y: SplitArray) -> float:
        """R^2 of the predictions."""
        return r2(y, self.predict(x))

    def load_state(self, state) -> None:
        """Continue; the Gram matrix is formed anew."""
        super().load_state(state)
        self._problem = None


def linear(x: Tensor, weights: Tensor, intercept: Tensor | float) -> Tensor:
    """``x w + w0`` in float64, block by block, in the type of the rows."""
    blocks = [(block.double() @ weights.to(block.device) + intercept).to(x.dtype) for block in x.split(1 << 14)]
    return torch.cat(blocks) if blocks else x.new_empty(0)


def r2(y: SplitArray, prediction: SplitArray) -> float:
    """1 - (sum of squared errors) / (sum of squared deviations from the mean)."""
    from parallel.array.moments import moments

    found, _ = moments(y, None, order=2)
    true = y.resplit(prediction.split, prediction.map or None).local.double()
    error = (true - prediction.local.double()).square().sum()
    return 1 - float(all_reduce(prediction, error)) / max(float(found.m2), 1e-300)


class LassoPath(NamedTuple):
    """Coefficients of every penalty: ``lam`` descending, ``weights`` ``(penalties, f)``, ``intercepts``, ``gaps``."""

    lam: np.ndarray
    weights: np.ndarray
    intercepts: np.ndarray
    gaps: np.ndarray


def largest_penalty(problem: Problem, l1: float = 1.0) -> float:
    """The smallest penalty at which all coefficients are 0."""
    return float(np.abs(problem.xy).max(initial=0.0)) / max(l1, 1e-3)


def lasso_path(
    x: SplitArray, y: SplitArray, num: int = 50, ratio: float = 1e-3, l1: float = 1.0, tol: float = 1e-8
) -> LassoPath:
    """Coefficients for penalties from the largest one that matters down to ``ratio`` of it, each from the one before.

    The rows are read once.
    """
    x = x.resplit(0) if x.split == 1 else x
    problem = Problem.of(problem_moments(x, aligned_labels(x, y, "lasso_path")))
    return path_of(problem, largest_penalty(problem, l1) * np.logspace(0, np.log10(ratio), num), l1, tol)


def path_of(problem: Problem, lams: np.ndarray, l1: float = 1.0, tol: float = 1e-8) -> LassoPath:
    """The path of a Gram form."""
    w, found, gaps = np.zeros(len(problem.xy)), [], []
    for lam in lams:
        gaps.append(descend(problem, w, float(lam), l1, tol)[1])
        found.append(w.copy())
    weights = np.array(found)
    return LassoPath(np.asarray(lams), weights, problem.y_mean - weights @ problem.x_mean, np.array(gaps))


class CrossValidation(NamedTuple):
    """Mean squared errors ``(penalties, folds)``, and the best penalty with its coefficients on all rows."""

    lam: np.ndarray
    errors: np.ndarray
    best: float
    weights: np.ndarray
    intercept: float


def lasso_cv(
    x: SplitArray, y: SplitArray, folds: int = 5, num: int = 50, ratio: float = 1e-3, l1: float = 1.0, tol: float = 1e-8
) -> CrossValidation:
    """The best penalty by K-fold cross-validation, from one pass over the rows.

    Row i belongs to fold ``i mod folds``. The Gram matrix of all folds but one is a difference, and so is the error of
    the one that was left out: everything after the pass is free of communication.
    """
    x = x.resplit(0) if x.split == 1 else x
    target = aligned_labels(x, y, "lasso_cv")
    if not 2 <= folds <= x.shape[0]:
        raise ValueError(f"folds={folds}: use 2 to the number of rows, {x.shape[0]}")
    number = (x.offset + torch.arange(len(x.local), device=x.device)) % folds
    parts = []
    for fold in range(folds):
        mine = number == fold
        rows = torch.cat([x.local[mine].double(), target[mine].double()[:, None]], 1)
        one = gram_of(rows)
        parts.append(gram_over_ranks(one, x.comm) if x.split == 0 else one)
    whole = Problem.of(reduce(merged_gram, parts))
    lams = largest_penalty(whole, l1) * np.logspace(0, np.log10(ratio), num)
    errors = np.zeros((num, folds))
    for fold in range(folds):
        rest = reduce(merged_gram, [p for i, p in enumerate(parts) if i != fold])
        path = path_of(Problem.of(rest), lams, l1, tol)
        left = parts[fold]
        n = float(left.n)
        scatter, mean = left.scatter.cpu().numpy() / n, left.mean.cpu().numpy()
        for i, w in enumerate(path.weights):
            v = np.append(-w, 1.0)  # y - X w
            errors[i, fold] = v @ scatter @ v + (mean @ v - path.intercepts[i]) ** 2
    best = float(lams[errors.mean(1).argmin()])
    w = np.zeros(x.shape[1])
    descend(whole, w, best, l1, tol)
    return CrossValidation(lams, errors, best, w, whole.y_mean - whole.x_mean @ w)

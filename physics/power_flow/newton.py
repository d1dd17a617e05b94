"""Newton's method for batches, with backtracking where it is asked for, and Levenberg-Marquardt for hard cases.

Every scenario has its own Jacobian. On a CPU those of several scenarios are factorised as one block-diagonal matrix in
an order that is found once; on a GPU they are dense.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import bmat, csc_matrix, eye
from scipy.sparse.linalg import splu
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import SingularMatrix, sparse_lu
from physics.power_flow.outcome import Outcome, Recorder

# Mismatch (per unit) beyond which a scenario has run away, and steps in a row without progress that are borne.
RUN_AWAY = 1e8
# Entries of the Jacobians that are factorised together on a CPU; elements of dense Jacobians together on a GPU.
NNZ_TOGETHER = 100_000
DENSE_TOGETHER = 2**28
# Halvings of a step at most.
HALVINGS = 12
# Of the homotopy: Newton steps at a level, and the least step between levels.
_LEVEL_ITERATIONS, _LEAST_STRIDE = 15, 0.01
# Damped steps that must take away this share of |F|^2; otherwise it is a minimum that is no solution.
STALL_STEPS, LEAST_DECREASE = 8, 0.1


class NewtonSteps:
    """Solves ``J_b du_b = F_b`` for every scenario of a batch.

    Args:
        equations: Whose Jacobians.
    """

    def __init__(self, equations: Equations) -> None:
        self.eq = equations
        self._order: np.ndarray | None = None
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __call__(self, state: State, mismatch: Tensor, batch: Batch, transposed: bool = False) -> Tensor:
        """``du``, ``[N_u, B]``; nan for scenarios whose Jacobian is singular."""
        size, count = mismatch.shape
        dense = mismatch.device.type != "cpu"
        together = max(1, DENSE_TOGETHER // size**2 if dense else NNZ_TOGETHER // max(self.eq.pattern.nnz, 1))
        out = torch.empty_like(mismatch)
        for start in range(0, count, together):
            part = torch.arange(start, min(start + together, count), device=mismatch.device)
            changes = None if batch.changes is None else batch.changes.select(part)
            values = self.eq.jacobian_values(state.select(part), changes)
            solve = self._dense if dense else self._sparse
            out[:, part] = solve(values, mismatch[:, part], transposed)
        return out

    def _dense(self, values: Tensor, b: Tensor, transposed: bool) -> Tensor:
        jacobian = self.eq.pattern.dense(values)
        x, info = torch.linalg.solve_ex(jacobian.mT if transposed else jacobian, b.mT[..., None])
        return torch.where(info[:, None] == 0, x[..., 0], torch.nan).mT

    def _sparse(self, values: Tensor, b: Tensor, transposed: bool) -> Tensor:
        pattern, size = self.eq.pattern, self.eq.num_unknowns
        if self._order is None:
            try:
                self._order = np.argsort(sparse_lu(pattern.matrix(values[:, 0].numpy())).perm_c)
            except SingularMatrix:
                return self._one_by_one(values, b, transposed)
        count = values.shape[1]
        if count not in self._blocks:
            self._blocks[count] = self._block_pattern(count)
        taken, rows, indptr = self._blocks[count]
        data = values.numpy().T.reshape(count, -1)[:, taken].reshape(-1)
        matrix = csc_matrix((data, rows, indptr), shape=(size * count,) * 2)
        right = b.numpy().T[:, self._order].reshape(-1)
        try:
            x = sparse_lu(matrix, order=False).solve(right, "T" if transposed else "N")
        except SingularMatrix:
            return self._one_by_one(values, b, transposed)
        out = np.empty((count, size))
        out[:, self._order] = x.reshape(count, size)
        return torch.from_numpy(np.ascontiguousarray(out.T))

    def _one_by_one(self, values: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """One of the matrices cannot be factorised; the others are not to suffer."""
        out = torch.full_like(b, torch.nan)
        for column in range(b.shape[1]):
            try:
                lu = sparse_lu(self.eq.pattern.matrix(values[:, column].numpy()))
            except SingularMatrix:
                continue
            out[:, column] = torch.from_numpy(lu.solve(b[:, column].contiguous().numpy(), "T" if transposed else "N"))
        return out

    def _block_pattern(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Entries of one block in the new order, and rows and starts of columns of the block-diagonal matrix."""
        pattern, size = self.eq.pattern, self.eq.num_unknowns
        place = np.empty(size, dtype=np.int64)
        place[self._order] = np.arange(size)
        row, column = place[pattern.rows], place[pattern.columns]
        taken = np.lexsort((row, column))
        starts = np.cumsum(np.bincount(column, minlength=size))
        offset = np.arange(count)[:, None]
        rows = (row[taken] + offset * size).reshape(-1)
        indptr = np.concatenate([[0], (starts + offset * len(row)).reshape(-1)])
        return taken, rows.astype(np.int32), indptr.astype(np.int32)


def newton(
    eq: Equations,
    batch: Batch,
    state: State,
    tol: float,
    max_iter: int,
    recorder: Recorder,
    line_search: bool = False,
    steps: NewtonSteps | None = None,
) -> Outcome:
    """Newton's method from ``state``.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most steps.
        recorder: Of the history.
        line_search: Halve steps that do not decrease ``|F|``.
        steps: To share the order of elimination between calls.
    """
    steps = steps or NewtonSteps(eq)
    outcome = Outcome(eq, state)
    active = torch.arange(state.vm.shape[1], device=state.vm.device)
    now, given = state.clone(), batch
    mismatch = eq.mismatch(now, given)
    stuck = torch.zeros_like(active, dtype=torch.bool)
    for iteration in range(max_iter + 1):
        recorder(iteration, active, mismatch)
        size = mismatch.abs().amax(0)
        leaves = ~(size > tol) | ~(size < RUN_AWAY) | stuck
        if iteration == max_iter:
            leaves[:] = True
        if leaves.any():
            outcome.write(active[leaves], now.select(leaves), mismatch[:, leaves], iteration)
            stays = ~leaves
            active, now, given, mismatch = active[stays], now.select(stays), given.select(stays), mismatch[:, stays]
        if not len(active):
            break
        du = steps(now, mismatch, given)
        if line_search:
            mismatch, stuck = _searched(eq, now, given, mismatch, du)
        else:
            stuck = torch.zeros_like(active, dtype=torch.bool)
            eq.step(now, du)
            mismatch = eq.mismatch(now, given)
    return outcome


def _searched(eq: Equations, now: State, given: Batch, mismatch: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
    """Step in place by the largest of 1, 1/2, 1/4, ... that decreases ``|F|`` enough.

    Returns:
        The new ``F``, and which scenarios did not move.
    """
    before = mismatch.square().sum(0)
    best, best_mismatch = now.clone(), mismatch.clone()
    left = torch.arange(du.shape[1], device=du.device)
    left = left[du.isfinite().all(0)]
    scale = 1.0
    for _ in range(HALVINGS):
        if not len(left):
            break
        trial = now.select(left)
        eq.step(trial, du[:, left], -scale)
        found = eq.mismatch(trial, given.select(left))
        # Also False for nan. Magnitudes that turn negative are no voltages.
        good = (found.square().sum(0) < (1 - 1e-4 * scale) * before[left]) & (trial.vm > 0).all(0)
        for mine, theirs in zip(best, trial, strict=True):
            mine[:, left[good]] = theirs[:, good]
        best_mismatch[:, left[good]] = found[:, good]
        left = left[~good]
        scale /= 2
    for mine, theirs in zip(now, best, strict=True):
        mine.copy_(theirs)
    return best_mismatch, (best_mismatch == mismatch).all(0)


def homotopy(
    eq: Equations,
    batch: Batch,
    state: State,
    tol: float,
    max_iter: int,
    recorder: Recorder,
    steps: NewtonSteps | None = None,
) -> Outcome:
    """Raise all injections from nothing to what is scheduled, with Newton's method at every level.

    A level that cannot be reached is tried again from half way; a scenario whose steps become too short has no solution
    near, and its outcome is the mismatch at the last level it reached.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where the set-points are; levels begin at its magnitudes with the angles of the slack.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most levels.
        recorder: Of the history.
        steps: To share the order of elimination between calls.
    """
    steps = steps or NewtonSteps(eq)
    outcome = Outcome(eq, state)
    count = state.vm.shape[1]
    state.va[eq.num_slack :] = state.va[:1]
    level, stride = state.vm.new_zeros(count), state.vm.new_full((count,), 0.5)
    taken = torch.zeros(count, dtype=torch.int64, device=level.device)
    active, silent = torch.arange(count, device=level.device), Recorder(eq, batch, False)
    for _ in range(max_iter):
        aim = (level[active] + stride[active]).clamp(max=1)
        given = batch.select(active)
        part = Batch(aim * given.p, aim * given.q, given.changes)
        found = newton(eq, part, state.select(active), tol, _LEVEL_ITERATIONS, silent, True, steps)
        taken[active] += found.iterations
        reached = found.mismatch <= tol
        for mine, theirs in zip(state, found.state, strict=True):
            mine[:, active[reached]] = theirs[:, reached]
        level[active[reached]] = aim[reached]
        stride[active] *= torch.where(reached, 1.5, 0.5)
        active = active[(level[active] < 1) & (stride[active] > _LEAST_STRIDE)]
        recorder(0, torch.arange(count, device=level.device), eq.mismatch(state, batch))
        if not len(active):
            break
    everyone = torch.arange(count, device=level.device)
    outcome.write(everyone, state, eq.mismatch(state, batch), 0)
    outcome.iterations[:] = taken
    return outcome


def levenberg_marquardt(
    eq: Equations, batch: Batch, state: State, tol: float, max_iter: int, recorder: Recorder
) -> Outcome:
    """Levenberg-Marquardt: ``min |J du - F|^2 + mu |du|^2``, for Jacobians that are nearly singular.

    The augmented system ``[[1, J], [J^T, -mu]]`` is solved, whose condition is that of ``J`` and not its square. The
    damping follows the ratio of actual to predicted decrease (Nielsen, 1999).

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most steps.
        recorder: Of the history.
    """
    outcome = Outcome(eq, state)
    count, device = state.vm.shape[1], state.vm.device
    now = state.clone()
    for column in range(count):
        index = torch.tensor([column], device=device)
        _damped(eq, batch.select(index), now.select(index), tol, max_iter, outcome, index, recorder)
    return outcome


def _damped(
    eq: Equations,
    given: Batch,
    now: State,
    tol: float,
    max_iter: int,
    outcome: Outcome,
    index: Tensor,
    recorder: Recorder,
) -> None:
    """Levenberg-Marquardt on one scenario."""
    size = eq.num_unknowns
    one, zero = eye(size, format="csc"), np.zeros(size)
    mismatch = eq.mismatch(now, given)
    damping, growth, iteration = 1e-3, 2.0, 0
    squares: list[float] = []
    jacobian = eq.jacobian(now, given.changes)
    for iteration in range(max_iter + 1):
        recorder(iteration, index, mismatch)
        if not float(mismatch.abs().max()) > tol or iteration == max_iter or damping > 1e12:
            break
        f = mismatch[:, 0].cpu().numpy()
        squares.append(float(f @ f))
        if iteration >= STALL_STEPS and squares[-1] > (1 - LEAST_DECREASE) * squares[-1 - STALL_STEPS]:
            break
        scale = float(abs(jacobian).sum(0).max()) ** 2 * 1e-6
        system = bmat([[one, jacobian], [jacobian.T, -damping * scale * one]], format="csc")
        try:
            du = splu(system).solve(np.concatenate([f, zero]))[size:]
        except RuntimeError:  # exactly singular, although damped
            damping, growth = damping * growth, growth * 2
            continue
        trial = now.clone()
        eq.step(trial, torch.from_numpy(du)[:, None].to(now.vm))
        found = eq.mismatch(trial, given)
        predicted = float(f @ f) - float(np.square(f - jacobian @ du).sum())
        gained = float(f @ f) - float(found.square().sum())
        if gained > 0 and bool((trial.vm > 0).all()):
            now, mismatch = trial, found
            jacobian = eq.jacobian(now, given.changes)
            ratio = min(gained / max(predicted, 1e-300), 1.0)
            damping, growth = damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 2.0
            damping = max(damping, 1e-15)
        else:
            damping, growth = damping * growth, growth * 2
    outcome.write(index, now, mismatch, iteration)

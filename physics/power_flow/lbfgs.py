"""L-BFGS on the mean square of the mismatch, with a history and a line search for every scenario of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.outcome import Outcome, Recorder

_ARMIJO = 1e-4
_HALVINGS = 20


def lbfgs(
    eq: Equations, batch: Batch, state: State, tol: float, max_iter: int, recorder: Recorder, memory: int = 20
) -> Outcome:
    """Limited-memory BFGS with backtracking, all scenarios in step.

    Pairs without positive curvature are left out, scenario by scenario; a scenario whose line search fails starts anew
    from the gradient and leaves if that fails too.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start; the outcome keeps it.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most iterations; each has at least one evaluation.
        recorder: Of the history.
        memory: Pairs that are kept.
    """
    outcome = Outcome(eq, state)
    active = torch.arange(state.vm.shape[1], device=state.vm.device)
    now, given = state.clone(), batch
    loss, mismatch, gradient = _evaluated(eq, now, given)
    steps: list[Tensor] = []
    turns: list[Tensor] = []
    fresh = torch.ones_like(active, dtype=torch.bool)
    stuck = torch.zeros_like(fresh)
    for iteration in range(max_iter + 1):
        recorder(iteration, active, mismatch)
        leaves = ~(mismatch.abs().amax(0) > tol) | stuck
        if iteration == max_iter:
            leaves[:] = True
        if leaves.any():
            outcome.write(active[leaves], now.select(leaves), mismatch[:, leaves], iteration)
            stays = ~leaves
            active, now, given = active[stays], now.select(stays), given.select(stays)
            loss, mismatch, gradient, fresh = loss[stays], mismatch[:, stays], gradient[:, stays], fresh[stays]
            steps, turns = [p[:, stays] for p in steps], [p[:, stays] for p in turns]
        if not len(active):
            break
        direction = _direction(gradient, steps, turns)
        slope = (direction * gradient).sum(0)
        uphill = ~(slope < 0)
        direction = torch.where(uphill | fresh, -gradient, direction)
        slope = torch.where(uphill | fresh, -gradient.square().sum(0), slope)
        scale = torch.where(uphill | fresh, 0.1 / gradient.abs().sum(0).clamp(min=1e-300), 1.0)
        scale, moved = _searched(eq, now, given, loss, direction, slope, scale)
        du = torch.where(moved, scale * direction, 0.0)
        eq.step(now, du, 1.0)
        before = gradient
        loss, mismatch, gradient = _evaluated(eq, now, given)
        turn = gradient - before
        curved = (du * turn).sum(0) > 1e-12 * turn.square().sum(0)
        stuck = ~moved & (fresh | uphill)
        fresh = ~moved
        steps.append(torch.where(curved, du, 0.0))
        turns.append(torch.where(curved, turn, 0.0))
        if (~moved).any():  # forget what led there
            steps, turns = ([torch.where(moved, p, 0.0) for p in pairs] for pairs in (steps, turns))
        del steps[:-memory], turns[:-memory]
    return outcome


def _evaluated(eq: Equations, state: State, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mismatch, gradient."""
    ef, p, q = eq.injections(state, batch.changes)
    mismatch = eq.mismatch_of(p, q, state, batch)
    gradient = eq.transposed_product_of(ef, p, q, state, mismatch * (2 / len(mismatch)), batch.changes)
    return mismatch.square().mean(0), mismatch, gradient


def _direction(gradient: Tensor, steps: list[Tensor], turns: list[Tensor]) -> Tensor:
    """Two-loop recursion (Nocedal and Wright, algorithm 7.4); pairs of zeros count for nothing."""
    q = gradient.clone()
    weights = []
    for s, y in zip(reversed(steps), reversed(turns), strict=True):
        curvature = (s * y).sum(0)
        rho = torch.where(curvature > 0, 1 / curvature, 0.0)
        alpha = rho * (s * q).sum(0)
        q -= alpha * y
        weights.append((rho, alpha))
    size = torch.ones_like(gradient[0])
    for s, y in zip(steps, turns, strict=True):  # the last pair that counts
        curvature = (s * y).sum(0)
        size = torch.where(curvature > 0, curvature / y.square().sum(0).clamp(min=1e-300), size)
    q *= size
    for (s, y), (rho, alpha) in zip(zip(steps, turns, strict=True), reversed(weights), strict=True):
        q += (alpha - rho * (y * q).sum(0)) * s
    return -q


def _searched(
    eq: Equations, now: State, given: Batch, loss: Tensor, direction: Tensor, slope: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps that decrease the loss enough (Armijo), by halving; and whether one was found."""
    scale = scale.clone()
    moved = torch.zeros_like(loss, dtype=torch.bool)
    for _ in range(_HALVINGS):
        left = (~moved).nonzero()[:, 0]
        if not len(left):
            break
        trial = now.select(left)
        eq.step(trial, scale[left] * direction[:, left], 1.0)
        found = eq.mismatch(trial, given.select(left)).square().mean(0)
        good = found <= loss[left] + _ARMIJO * scale[left] * slope[left]
        moved[left[good]] = True
        scale[left[~good]] *= 0.5
    return scale, moved

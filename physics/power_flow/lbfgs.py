"""L-BFGS on the mean square of the mismatch, with a history and a line search for every scenario of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.outcome import Outcome, Recorder

# Of the Wolfe conditions; evaluations of a line search.
_ARMIJO, _CURVATURE = 1e-4, 0.9
_EVALUATIONS = 25


def lbfgs(
    eq: Equations, batch: Batch, state: State, tol: float, max_iter: int, recorder: Recorder, memory: int = 100
) -> Outcome:
    """Limited-memory BFGS with a line search that ends at the weak Wolfe conditions, all scenarios in step.

    A scenario whose search fails forgets its history and starts anew from the gradient; if that fails too it leaves.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most iterations; each has at least one evaluation.
        recorder: Of the history.
        memory: Pairs that are kept.
    """
    outcome = Outcome(eq, state)
    active = torch.arange(state.vm.shape[1], device=state.vm.device)
    now, given = state.clone(), batch
    point = _Point(eq.unknowns(now), *eq.loss_and_gradient(now, given))
    steps: list[Tensor] = []
    turns: list[Tensor] = []
    fresh = torch.ones_like(active, dtype=torch.bool)
    stuck = torch.zeros_like(fresh)
    for iteration in range(max_iter + 1):
        recorder(iteration, active, point.mismatch)
        leaves = ~(point.mismatch.abs().amax(0) > tol) | stuck
        if iteration == max_iter:
            leaves[:] = True
        if leaves.any():
            final = eq.with_unknowns(now, point.u).select(leaves)
            outcome.write(active[leaves], final, point.mismatch[:, leaves], iteration)
            stays = ~leaves
            active, now, given, fresh = active[stays], now.select(stays), given.select(stays), fresh[stays]
            point = _Point(*(value[..., stays] for value in point))
            steps, turns = [p[:, stays] for p in steps], [p[:, stays] for p in turns]
        if not len(active):
            break
        direction = _direction(point.gradient, steps, turns)
        fresh = fresh | ~((direction * point.gradient).sum(0) < 0)
        direction = torch.where(fresh, -point.gradient, direction)
        scale = torch.where(fresh, 0.1 / point.gradient.abs().sum(0).clamp(min=1e-300), 1.0)
        before = point
        point, moved = _searched(eq, now, given, before, direction, scale)
        du, turn = point.u - before.u, point.gradient - before.gradient
        curved = (du * turn).sum(0) > 1e-12 * turn.square().sum(0)
        stuck = ~moved & fresh
        fresh = ~moved
        if not bool(moved.all()):  # forget what led there
            steps, turns = ([torch.where(moved, p, 0.0) for p in pairs] for pairs in (steps, turns))
        steps.append(torch.where(curved, du, 0.0))
        turns.append(torch.where(curved, turn, 0.0))
        del steps[:-memory], turns[:-memory]
    return outcome


class _Point(NamedTuple):
    """Unknowns ``[N_u, B]`` with loss ``[B]``, gradient and mismatch ``[N_u, B]`` there."""

    u: Tensor
    loss: Tensor
    gradient: Tensor
    mismatch: Tensor


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
    eq: Equations, now: State, given: Batch, start: _Point, direction: Tensor, scale: Tensor
) -> tuple[_Point, Tensor]:
    """Where the weak Wolfe conditions hold, by bisection (Lewis and Overton, 2013), or the lowest loss on the way.

    Returns:
        The points, and whether each is lower than where its scenario started.
    """
    slope = (direction * start.gradient).sum(0)
    low, high = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    best = _Point(*(value.clone() for value in start))
    left = torch.arange(len(scale), device=scale.device)
    scale = scale.clone()
    for _ in range(_EVALUATIONS):
        u = start.u[:, left] + scale[left] * direction[:, left]
        part = now.select(left)
        found = _Point(u, *eq.loss_and_gradient(eq.with_unknowns(part, u), given.select(left)))
        enough = found.loss <= start.loss[left] + _ARMIJO * scale[left] * slope[left]
        flat = (found.gradient * direction[:, left]).sum(0) >= _CURVATURE * slope[left]
        lower = found.loss < best.loss[left]  # False for nan
        for mine, theirs in zip(best, found, strict=True):
            mine[..., left[lower]] = theirs[..., lower]
        high[left[~enough]] = scale[left[~enough]]
        low[left[enough]] = scale[left[enough]]
        left = left[~(enough & flat)]
        if not len(left):
            break
        scale = torch.where(high.isfinite(), (low + high) / 2, 2 * low)
    return best, best.loss < start.loss

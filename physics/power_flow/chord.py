"""Chord ("dishonest") Newton: all scenarios of a batch share one factorised Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.factorization import Factorization
from physics.power_flow.outcome import Outcome, Recorder

# A scenario is given up when this many steps have not brought max|F| down by the factor.
WINDOW, LEAST_PROGRESS = 6, 0.5
# Scenarios are taken out of the arrays when at most this share still iterates.
COMPACT_AT = 0.75


def chord(
    eq: Equations,
    batch: Batch,
    state: State,
    factors: Factorization,
    tol: float,
    max_iter: int,
    recorder: Recorder,
) -> Outcome:
    """``u -= J0^-1 F(u)`` until ``max|F| <= tol``, scenario by scenario; those that stop contracting leave unsolved.

    A scenario leaves as soon as it has converged, so its result does not depend on how long others take.

    Args:
        eq: The equations.
        batch: Scenarios.
        state: Where they start.
        factors: Of the shared Jacobian; in float32 they are a preconditioner, ``F`` stays in float64.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most steps.
        recorder: Of the history.
    """
    outcome = Outcome(eq, state)
    active = torch.arange(state.vm.shape[1], device=state.vm.device)
    there = torch.ones_like(active, dtype=torch.bool)  # columns of the arrays that still iterate
    now, given = state.clone(), batch
    earlier: list[Tensor] = []
    for iteration in range(max_iter + 1):
        mismatch = eq.mismatch(now, given)
        size = mismatch.abs().amax(0)
        if recorder.enabled:
            recorder(iteration, active[there], mismatch[:, there])
        leaves = ~(size > tol)
        if iteration == max_iter:
            leaves = torch.ones_like(leaves)
        elif iteration >= WINDOW:
            leaves |= ~(size < LEAST_PROGRESS * earlier[-WINDOW])
        leaves &= there
        if leaves.any():
            outcome.write(active[leaves], now.select(leaves), mismatch[:, leaves], iteration)
            there &= ~leaves
            remaining = int(there.sum())
            if not remaining:
                break
            if remaining <= COMPACT_AT * len(active):
                active, now, given, mismatch = active[there], now.select(there), given.select(there), mismatch[:, there]
                earlier = [value[there] for value in earlier[-WINDOW:]]
                size, there = size[there], torch.ones_like(active, dtype=torch.bool)
        earlier.append(size)
        eq.step(now, factors.solve(mismatch))
    return outcome

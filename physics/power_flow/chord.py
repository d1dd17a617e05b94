"""Chord ("dishonest") Newton: all scenarios of a batch share one factorised Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.power_flow.buffers import Buffers
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
    now: State,
    factors: Factorization,
    tol: float,
    max_iter: int,
    outcome: Outcome,
    columns: Tensor,
    recorder: Recorder,
    buffers: Buffers,
) -> None:
    """``u -= J0^-1 F(u)`` until ``max|F| <= tol``, scenario by scenario; those that stop contracting leave unsolved.

    A scenario leaves as soon as it has converged, so its result does not depend on how long others take.

    Args:
        eq: The equations.
        batch: Scenarios.
        now: Where they start; it is iterated in place.
        factors: Of the shared Jacobian; in float32 they are a preconditioner, ``F`` stays in float64.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Most steps.
        outcome: Where results go.
        columns: The scenarios' numbers there, ``[B]``.
        recorder: Of the history.
        buffers: Memory to share between calls.
    """
    active, given = columns, batch
    there = torch.ones_like(active, dtype=torch.bool)  # columns of the arrays that still iterate
    earlier: list[Tensor] = []
    for iteration in range(max_iter + 1):
        mismatch = eq.mismatch(now, given, buffers)
        size = torch.abs(mismatch, out=buffers("size", *mismatch.shape)).amax(0)
        if recorder.enabled:
            recorder(iteration, active[there], mismatch[:, there])
        leaves = there if iteration == max_iter else there & ~(size > tol)
        if iteration >= WINDOW:
            leaves = leaves | (there & ~(size < LEAST_PROGRESS * earlier[-WINDOW]))
        leaving = int(leaves.sum())
        if leaving == len(active):
            outcome.write(active, now, mismatch, iteration)
            return
        if leaving:
            outcome.write(active[leaves], now.select(leaves), mismatch[:, leaves], iteration)
            there = there & ~leaves
            remaining = int(there.sum())
            if not remaining:
                return
            if remaining <= COMPACT_AT * len(active):
                kept = there.nonzero()[:, 0]
                active, now, given, mismatch = active[kept], now.select(kept), given.select(kept), mismatch[:, kept]
                earlier = [value[kept] for value in earlier[-WINDOW:]]
                size, there = size[kept], torch.ones_like(kept, dtype=torch.bool)
        earlier.append(size)
        eq.step(now, factors.solve(mismatch))

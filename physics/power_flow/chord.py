"""Chord ("dishonest") Newton: all scenarios of a batch share one factorised Jacobian."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from physics.power_flow.buffers import Buffers
from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.mixing import Mixing
from physics.power_flow.outcome import Outcome, Recorder

# A scenario is given up when this many steps have not brought max|F| down by the factor.
WINDOW, LEAST_PROGRESS = 6, 0.5
# Scenarios are taken out of the arrays when at most this share still iterates.
COMPACT_AT = 0.75


class Preconditioner(Protocol):
    """An approximate inverse of every scenario's Jacobian."""

    def solve(self, b: Tensor) -> Tensor:
        """Apply it to ``[N_u, B]``; the result lasts until the next call."""
        ...

    def select(self, columns: Tensor) -> Preconditioner:
        """That of some scenarios."""
        ...


def chord(
    eq: Equations,
    batch: Batch,
    now: State,
    inverse: Preconditioner,
    tol: float,
    max_iter: int,
    outcome: Outcome,
    columns: Tensor,
    recorder: Recorder,
    buffers: Buffers,
) -> None:
    """``u -= J0^-1 F(u)`` until ``max|F| <= tol``, scenario by scenario; those that stop contracting leave unsolved.

    Steps are mixed with the one before (Anderson, 1965, of depth 1), which halves the iterations of scenarios far from
    the shared Jacobian. A scenario leaves as soon as it has converged, so its result does not depend on how long others
    take.

    Args:
        eq: The equations.
        batch: Scenarios.
        now: Where they start; it is iterated in place.
        inverse: Of the shared Jacobian; float32 is enough, since ``F`` stays in float64 and so does the fixed point.
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
    mixing = Mixing(buffers)
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
                inverse, earlier = inverse.select(kept), [value[kept] for value in earlier[-WINDOW:]]
                size, there = size[kept], torch.ones_like(kept, dtype=torch.bool)
                mixing.select(kept)
        earlier.append(size)
        eq.step(now, mixing.step(inverse.solve(mismatch)))

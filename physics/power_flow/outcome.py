"""What the solvers share: the state of every scenario when it left, and the record of how it went."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from physics.power_flow.equations import Batch, Equations, State
from physics.power_flow.solution import HistoryPoint


class Outcome:
    """State, iterations and mismatch of ``B`` scenarios, written as they leave a solver.

    Args:
        state: Where all start; it is copied.
        equations: Whose scenarios.
    """

    def __init__(self, equations: Equations, state: State) -> None:
        count, device = state.vm.shape[1], state.vm.device
        self.state = state.clone()
        self.iterations = torch.zeros(count, dtype=torch.int64, device=device)
        self.mismatch = state.vm.new_full((count,), torch.inf)
        self.worst_row = torch.zeros(count, dtype=torch.int64, device=device)

    @classmethod
    def empty(cls, equations: Equations, count: int) -> Outcome:
        """For ``count`` scenarios that will all be written."""
        new = equations.grid.vm.new_empty
        shapes = (equations.num_buses, count), (equations.num_buses, count), (int(equations.distributed), count)
        outcome = cls.__new__(cls)
        outcome.state = State(*(new(shape) for shape in shapes))
        outcome.mismatch = new(count).fill_(torch.inf)
        outcome.iterations = torch.zeros_like(outcome.mismatch, dtype=torch.int64)
        outcome.worst_row = torch.zeros_like(outcome.iterations)
        return outcome

    def write(self, columns: Tensor, state: State, mismatch: Tensor, iteration: int) -> None:
        """Put down what scenarios have come to.

        Args:
            columns: Which scenarios.
            state: Theirs.
            mismatch: Their ``F``, ``[N_u, len(columns)]``.
            iteration: Steps taken.
        """
        for mine, theirs in zip(self.state, state, strict=True):
            mine.index_copy_(1, columns, theirs)
        worst = mismatch.abs().max(0)
        self.mismatch[columns], self.worst_row[columns] = worst.values, worst.indices
        self.iterations[columns] = iteration

    def adopt(self, columns: Tensor, other: Outcome) -> Tensor:
        """Take over what a later solver made of some scenarios, where it is better; returns which it is, bool."""
        better = other.mismatch < self.mismatch[columns]  # False for nan
        chosen = columns[better]
        for mine, theirs in zip(self.state, other.state, strict=True):
            mine[:, chosen] = theirs[:, better]
        self.mismatch[chosen], self.worst_row[chosen] = other.mismatch[better], other.worst_row[better]
        self.iterations[columns] += other.iterations
        return better


class Recorder:
    """History of a batch. The time that recording takes is left out.

    Args:
        equations: Whose scenarios.
        batch: All of them.
        enabled: Otherwise every call does nothing.
    """

    def __init__(self, equations: Equations, batch: Batch, enabled: bool = True) -> None:
        self.points: list[HistoryPoint] = []
        self.enabled = enabled
        self._device = batch.p.device
        self._columns: Tensor | None = None
        if enabled:
            self._targets = float(equations.targets(batch).abs().sum())
            self._max, self._square, self._absolute = (batch.p.new_full((batch.p.shape[1],), torch.inf) for _ in "123")
            self._rows = equations.num_unknowns
            self._iteration = 0
        self._left_out = 0.0
        self._start = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.perf_counter()
        return time.process_time()

    def restrict(self, columns: Tensor | None) -> None:
        """Let indices that follow count within these scenarios; None: within all."""
        self._columns = columns

    def __call__(self, iteration: int, columns: Tensor, mismatch: Tensor) -> None:
        """Put down ``F`` of some scenarios; those that have left keep their last."""
        if not self.enabled:
            return
        now = self._now()
        seconds = now - self._start - self._left_out
        if self._columns is not None:
            columns = self._columns[columns]
        size = mismatch.abs()
        self._max[columns], self._absolute[columns] = size.amax(0), size.sum(0)
        self._square[columns] = mismatch.square().sum(0)
        count = self._rows * len(self._max)
        deviation = 100 * float(self._absolute.sum()) / self._targets if self._targets else torch.inf
        offset = self.points[-1].iteration + 1 if iteration == 0 and self.points else None
        if offset is not None:  # another solver goes on
            self._iteration = offset
        self.points.append(
            HistoryPoint(
                seconds,
                self._iteration + iteration,
                float(self._max.max()),
                float(self._square.sum()) / count,
                deviation,
            )
        )
        self._left_out += self._now() - now

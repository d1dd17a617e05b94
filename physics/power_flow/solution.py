"""What a solver hands back: voltages with, for every scenario, how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from physics.power_flow.grid import Grid, called, listed
from physics.power_flow.scenarios import Scenarios


class NotConverged(RuntimeError):
    """Scenarios that no solver brought below the tolerance; the message names them and their worst bus."""


class HistoryPoint(NamedTuple):
    """State of a batch during a solution, for error against time.

    ``seconds`` are CPU seconds since the start on a CPU, wall seconds on a GPU; what recording itself takes is left
    out. ``mse`` is the mean of ``F^2``, ``flow_deviation_percent`` is ``100 sum|F| / sum|target|``, both over the
    whole batch.
    """

    seconds: float
    iteration: int
    max_mismatch: float
    mse: float
    flow_deviation_percent: float


@dataclass(frozen=True, eq=False)
class Solution:
    """Voltages of ``B`` scenarios and their quality. Check ``converged``, or call `require_converged`.

    Args:
        vm, va: Voltage magnitude (per unit) and angle (rad), ``[n, B]``. Where a scenario has not converged they are
            the best that was found, never nan.
        converged: Whether ``max|F| <= tol``, ``[B]`` bool.
        iterations: Steps that the scenario took part in, all methods together, ``[B]`` int64.
        max_mismatch: ``max|F|`` over the equations of the scenario, per unit, ``[B]``.
        worst_bus: Index of the bus of that mismatch, ``[B]`` int64.
        method: What brought each scenario to its end, ``[B]`` names (``chord``, ``newton``, ...).
        history: States during the solution if they were asked for.
        slack_power: With a distributed slack, the imbalance that is shared, per unit, ``[B]``.
        bus_type: With limits of reactive power, the types after PV buses gave up their set-point, ``[n, B]`` int64.
    """

    vm: Tensor
    va: Tensor
    converged: Tensor
    iterations: Tensor
    max_mismatch: Tensor
    worst_bus: Tensor
    method: tuple[str, ...]
    history: tuple[HistoryPoint, ...] = ()
    slack_power: Tensor | None = None
    bus_type: Tensor | None = None

    @property
    def v(self) -> Tensor:
        """Complex voltages, ``[n, B]``."""
        return torch.polar(self.vm, self.va)

    def __len__(self) -> int:
        return self.vm.shape[1]

    def failures(self, grid: Grid, scenarios: Scenarios) -> list[str]:
        """One line for every scenario that has not converged: its name, the mismatch and the worst bus."""
        return [
            f"{scenarios.names[b]}: max|F| = {float(self.max_mismatch[b]):.2e} at "
            f"{called('bus', [grid.bus_names[int(self.worst_bus[b])]])} after {int(self.iterations[b])} iterations"
            for b in (~self.converged).nonzero()[:, 0].tolist()
        ]

    def require_converged(self, grid: Grid, scenarios: Scenarios) -> Solution:
        """Return the solution if all scenarios have converged.

        Raises:
            NotConverged: Otherwise.
        """
        if failures := self.failures(grid, scenarios):
            raise NotConverged(f"{grid.name}: {len(failures)} of {len(self)} not converged: {listed(failures, 5)}")
        return self

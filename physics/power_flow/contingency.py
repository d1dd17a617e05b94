"""Outages of branches: which ones island buses, exact solutions of the others, quick screening."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from physics.power_flow.grid import Grid
from physics.power_flow.scenarios import Scenarios
from physics.power_flow.solution import Solution


@dataclass(frozen=True, eq=False)
class Contingencies:
    """Outages of ``k`` branches at once.

    Args:
        branches: Indices of the branches that are out, ``[C, k]`` int64.
        islanding: Whether the outage cuts buses off from every slack, ``[C]`` bool. These have no power flow.
        islanded_buses: Number of buses cut off, ``[C]`` int64.
        names: ``names of the branches``, joined by `` + ``.
    """

    branches: Tensor
    islanding: Tensor
    islanded_buses: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, index: Tensor) -> Contingencies:
        """Some of the outages, by index or mask."""
        raise NotImplementedError

    def solvable(self) -> Contingencies:
        """Those that island nothing."""
        return self.select(~self.islanding)

    def scenarios(self, grid: Grid, s: Tensor | None = None) -> Scenarios:
        """As scenarios with ``status``, all with the injections ``s`` ``[n]`` (None: the grid's)."""
        raise NotImplementedError


def contingencies(grid: Grid, k: int = 1, among: Tensor | None = None) -> Contingencies:
    """All outages of ``k`` branches in service.

    Args:
        grid: The grid.
        k: 1 or 2.
        among: Indices of the branches that may go out; None: all in service.
    """
    raise NotImplementedError


def solve_contingencies(
    grid: Grid, outages: Contingencies, s: Tensor | None = None, tol: float = 1e-8, max_iter: int = 40
) -> Solution:
    """Voltages after every outage, by chord iterations with the base case's Jacobian corrected by Woodbury's formula.

    Outages that do not contract go to Newton's method; islanding outages are refused (`Contingencies.solvable`).

    Args:
        grid: The grid.
        outages: None of them islanding.
        s: Complex injections ``[n]``; None: the grid's.
        tol: Bound on ``max|F|``, per unit.
        max_iter: Chord iterations before Newton's method takes over.
    """
    raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Screening:
    """Estimated state after every outage, from few steps.

    Args:
        loading: Largest current of either end of every branch, as a share of its limit, ``[L, C]``.
        overloaded: ``loading > 1``, ``[L, C]`` bool.
        vm: Voltage magnitudes, per unit, ``[n, C]``.
        max_mismatch: What is left of ``max|F|``, ``[C]``.
    """

    loading: Tensor
    overloaded: Tensor
    vm: Tensor
    max_mismatch: Tensor


def screen(
    grid: Grid, outages: Contingencies, limits: Tensor | None = None, steps: int = 1, method: str = "woodbury"
) -> Screening:
    """Estimate flows after outages without solving them.

    Args:
        grid: The grid.
        outages: None of them islanding.
        limits: Current limits of the branches, per unit, ``[L]``; None: ``rate_mva``.
        steps: Woodbury chord steps from the base case.
        method: ``woodbury``, or ``dc`` for the linear approximation.
    """
    raise NotImplementedError

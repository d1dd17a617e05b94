"""Voltages as a differentiable function of injections, set-points and everything about the grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from physics.power_flow.grid import Grid
from physics.power_flow.solution import Solution


class PowerFlow(torch.autograd.Function):
    """Implicit differentiation at the solution: one adjoint solve per scenario."""


def power_flow(
    grid: Grid,
    s: Tensor | None = None,
    vm: Tensor | None = None,
    status: Tensor | None = None,
    *,
    method: str = "chord",
    tol: float = 1e-10,
    start: Any = "dc",
) -> tuple[Tensor, Tensor, Solution]:
    """Solve and differentiate.

    Gradients flow to ``s``, ``vm``, ``status`` and to whichever tensors of ``grid`` need one:
    ``power_flow(grid.replace(x=log_x.exp()), s)``.

    Args:
        grid: The grid.
        s: Complex injections, per unit, ``[n, B]`` (None: the grid's).
        vm: Set-points, per unit, ``[n, B]`` or ``[n]``; rows of PQ buses are not read (None: the grid's).
        status: Weights of the branches, ``[L, B]`` (None: the grid's).
        method: See `solve`.
        tol: Bound on ``max|F|``, per unit.
        start: See `solve`.

    Returns:
        Voltage magnitude (per unit) and angle (rad), ``[n, B]``, and the solution they were taken from.

    Raises:
        NotConverged: If a scenario has no solution.
    """
    raise NotImplementedError


class PowerFlowLayer(nn.Module):
    """`power_flow` as a module that holds its grid and starts from its last solution.

    Args:
        grid: The grid; ``.to(device)`` moves it.
        method: See `solve`.
        tol: Bound on ``max|F|``, per unit.
    """

    def __init__(self, grid: Grid, method: str = "chord", tol: float = 1e-10) -> None:
        super().__init__()
        self.grid, self.method, self.tol = grid, method, tol

    def forward(self, s: Tensor | None = None, vm: Tensor | None = None, **fields: Tensor) -> tuple[Tensor, Tensor]:
        """Voltages ``(vm, va)``, ``[n, B]``; ``fields`` replace those of the grid (``x=...``, ``tap=...``)."""
        raise NotImplementedError

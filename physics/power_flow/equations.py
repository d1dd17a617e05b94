"""The mismatch equations."""

from __future__ import annotations

from torch import Tensor

from physics.power_flow.grid import Grid


class Equations:
    """Which voltages are unknown, which mismatches must vanish; order ``[va_pv, va_pq, vm_pq]`` and ``[P, Q]``."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid


def residual(
    grid: Grid, vm: Tensor, va: Tensor, s: Tensor, status: Tensor | None = None, **parameters: Tensor
) -> Tensor:
    """Mismatch ``F = [Re(S_calc - S) at pv, pq; Im(S_calc - S) at pq]``, per unit, ``[N_u, B]``; differentiable.

    Args:
        grid: The grid.
        vm, va: Voltages, per unit and rad, ``[n, B]``.
        s: Complex injections, per unit, ``[n, B]``.
        status: Weights of the branches, ``[L, B]``; None: the grid's.
        parameters: Branch parameters other than the grid's, ``[L]`` or ``[B, L]``.
    """
    raise NotImplementedError

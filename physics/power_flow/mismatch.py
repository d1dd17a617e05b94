"""The mismatch in the order of the grid, as a differentiable function; `Equations` has the fast one for solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.power_flow.flows import branch_flows, shunt_power
from physics.power_flow.grid import Grid


def residual(
    grid: Grid,
    vm: Tensor,
    va: Tensor,
    s: Tensor,
    status: Tensor | None = None,
    share: Tensor | None = None,
    **parameters: Tensor,
) -> Tensor:
    """Mismatch ``F = [Re(S_calc - S) at pv, pq; Im(S_calc - S) at pq]``, per unit, ``[N_u, B]``.

    Differentiable, as often as one likes, with respect to every argument and every tensor of the grid.

    Args:
        grid: The grid.
        vm: Voltage magnitudes, per unit, ``[n, B]``.
        va: Voltage angles, rad, ``[n, B]``.
        s: Complex injections, per unit, ``[n, B]``.
        status: Weights of the branches, ``[L, B]``; None: the grid's.
        share: With a distributed slack, the imbalance that is shared, per unit, ``[1, B]``.
        parameters: Branch parameters other than the grid's, ``[L]`` or ``[B, L]``.
    """
    flows = branch_flows(grid, vm, va, status, **parameters)
    drawn = shunt_power(grid, vm)
    total = drawn.index_add(0, grid.from_bus, flows.s_from).index_add(0, grid.to_bus, flows.s_to)
    difference = total - s
    if grid.slack_weights is None:
        pvpq = torch.cat([grid.pv, grid.pq])
        return torch.cat([difference.real[pvpq], difference.imag[grid.pq]])
    active = difference.real
    if share is not None:
        active = active - grid.slack_weights[:, None] * share
    held = torch.cat([grid.pv, grid.slack[1:]]).sort().values
    pvpq = torch.cat([held, grid.pq])
    return torch.cat([active[pvpq], difference.imag[grid.pq], active[grid.slack[:1]]])

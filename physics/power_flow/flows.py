"""What voltages mean for the branches: currents, powers, losses, loadings. Differentiable, scenarios in columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from physics.power_flow.admittance import BranchAdmittances, admittances, shunts
from physics.power_flow.grid import Grid


class BranchFlows(NamedTuple):
    """Complex currents into and powers through both ends of every branch, per unit, ``[L, B]``."""

    i_from: Tensor
    i_to: Tensor
    s_from: Tensor
    s_to: Tensor

    @property
    def losses(self) -> Tensor:
        """Power that stays in the branch, charging included, per unit, ``[L, B]``."""
        return self.s_from + self.s_to


def voltage(vm: Tensor, va: Tensor) -> Tensor:
    """Complex voltage of magnitude (per unit) and angle (rad)."""
    return torch.polar(vm, va)


def columns(y: BranchAdmittances) -> BranchAdmittances:
    """Admittances ``[..., L]`` as rows of branches: ``[L, 1]`` or, with a batch axis, ``[L, B]``."""
    return BranchAdmittances(*(value.unsqueeze(-1) if value.ndim == 1 else value.mT for value in y))


def branch_flows(grid: Grid, vm: Tensor, va: Tensor, status: Tensor | None = None, **parameters: Tensor) -> BranchFlows:
    """Currents and powers of the branches.

    Args:
        grid: The grid.
        vm: Voltage magnitudes, per unit, ``[n, B]``.
        va: Voltage angles, rad, ``[n, B]``.
        status: Weights of the branches ``[L, B]``; None: the grid's.
        parameters: Branch parameters other than the grid's, ``[L]`` or ``[B, L]``.
    """
    y = columns(admittances(grid, None if status is None else status.mT, **parameters))
    v = voltage(vm, va)
    v_from, v_to = v[grid.from_bus], v[grid.to_bus]
    i_from, i_to = y.ff * v_from + y.ft * v_to, y.tf * v_from + y.tt * v_to
    return BranchFlows(i_from, i_to, v_from * i_from.conj(), v_to * i_to.conj())


def currents_ka(grid: Grid, flows: BranchFlows) -> tuple[Tensor, Tensor]:
    """Magnitude of the currents at the *from* and the *to* end, kA, ``[L, B]``: ``|S| S_base / (sqrt(3) |V| Vn)``.

    They are nan where the nominal voltage is not known (0 in some files).
    """
    scale = torch.where(grid.vn_kv > 0, (grid.base_mva / 3**0.5) / grid.vn_kv, torch.nan)
    return scale[grid.from_bus, None] * flows.i_from.abs(), scale[grid.to_bus, None] * flows.i_to.abs()


def loadings(grid: Grid, flows: BranchFlows, of: str = "current") -> Tensor:
    """Larger of both ends' current (at nominal voltage) or apparent power, as a share of ``rate_mva``, ``[L, B]``.

    Branches without a limit have no loading: nan.

    Args:
        grid: The grid.
        flows: Of `branch_flows`.
        of: ``current`` or ``power``.

    Raises:
        ValueError: If ``of`` is neither.
    """
    if of not in ("current", "power"):
        raise ValueError(f"of={of!r}: choose 'current' or 'power'")
    ends = (flows.i_from, flows.i_to) if of == "current" else (flows.s_from, flows.s_to)
    share = torch.maximum(ends[0].abs(), ends[1].abs()) * (grid.base_mva / grid.rate_mva)[:, None]
    return torch.where(grid.rate_mva.isfinite()[:, None], share, torch.nan)


def shunt_power(grid: Grid, vm: Tensor) -> Tensor:
    """Complex power that the bus shunts draw, per unit, ``[n, B]``."""
    return (vm * vm) * shunts(grid).conj()[:, None]

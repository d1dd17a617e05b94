"""What meters see of a solved grid, with noise and gaps. Per unit and radians; scenarios in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from physics.power_flow.admittance import shunts
from physics.power_flow.flows import branch_flows
from physics.power_flow.grid import Grid

AT_BUSES = ("vm", "va", "p", "q")
AT_BRANCHES = ("p_from", "q_from", "p_to", "q_to")
QUANTITIES = (*AT_BUSES, *AT_BRANCHES)
"""Magnitude, angle (PMU) and injected power of buses; power into branches at both ends."""


def simulate(grid: Grid, vm: Tensor, va: Tensor, quantities: Sequence[str] = QUANTITIES) -> dict[str, Tensor]:
    """Values of the quantities, per unit and rad, ``[n, B]`` or ``[L, B]`` each; differentiable.

    Args:
        grid: The grid; gradients flow to its tensors too.
        vm: Voltage magnitudes, per unit, ``[n, B]``.
        va: Voltage angles, rad, ``[n, B]``.
        quantities: Which, of `QUANTITIES`.
    """
    if unknown := [name for name in quantities if name not in QUANTITIES]:
        raise ValueError(f"quantity {unknown[0]!r} is unknown; choose from {', '.join(QUANTITIES)}")
    found = {"vm": vm, "va": va}
    if set(quantities) - {"vm", "va"}:
        flows = branch_flows(grid, vm, va)
        s_from, s_to = flows.s_from, flows.s_to
        found |= {"p_from": s_from.real, "q_from": s_from.imag, "p_to": s_to.real, "q_to": s_to.imag}
        if {"p", "q"} & set(quantities):
            drawn = (vm * vm) * shunts(grid).conj()[:, None]
            s = drawn.index_add(0, grid.from_bus, s_from).index_add(0, grid.to_bus, s_to)
            found |= {"p": s.real, "q": s.imag}
    return {name: found[name] for name in quantities}


def with_noise(
    values: Mapping[str, Tensor],
    sigma: Mapping[str, float],
    missing: float,
    seed: int,
    scenarios: Sequence[int],
) -> dict[str, Tensor]:
    """Measurements: Gaussian noise on every value, and a share of them lost (nan).

    The noise of a scenario depends on (seed, scenario, quantity) alone.

    Args:
        values: True values, ``[elements, B]`` each.
        sigma: Standard deviation by quantity, per unit or rad.
        missing: Share of the values that is lost.
        seed: Of the noise.
        scenarios: Numbers of the scenarios.
    """
    out = {}
    for name, value in values.items():
        kind = QUANTITIES.index(name)
        columns = []
        for scenario in scenarios:
            rng = np.random.default_rng((seed, kind, int(scenario)))
            noise = sigma[name] * rng.standard_normal(len(value))
            columns.append(np.where(rng.random(len(value)) < missing, np.nan, noise))
        noise = torch.from_numpy(np.stack(columns, axis=1)).to(value.device, value.dtype)
        out[name] = value + noise
    return out


def misfit(simulated: Mapping[str, Tensor], measured: Mapping[str, Tensor], sigma: Mapping[str, float]) -> Tensor:
    """Simulated minus measured in units of ``sigma``, ``[M, B]`` over all quantities; 0 where nothing was measured.

    Args:
        simulated: Of `simulate`.
        measured: The same quantities; nan: not measured.
        sigma: Scale of each quantity, above 0.
    """
    parts = []
    for name, value in measured.items():
        there = value.isfinite()
        difference = simulated[name] - torch.where(there, value, simulated[name].detach())
        if name == "va":  # angles are measured modulo a turn
            difference = torch.atan2(difference.sin(), difference.cos())
        parts.append(torch.where(there, difference / sigma[name], torch.zeros_like(difference)))
    return torch.cat(parts)


def count(measured: Mapping[str, Tensor]) -> Tensor:
    """Number of values that were measured."""
    return sum(value.isfinite().sum() for value in measured.values())

"""Grids made of grids: scaled, with feeders at their buses, several copies joined by ties, other limits of branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from physics.power_flow import BusType, Grid, branch_flows, solve
from physics.power_flow.synthetic import TieAdmittance, Ties, attach, copies


@dataclass(frozen=True)
class Composition:
    """What becomes of a grid; the attributes are arguments of `datamodules.power_grids.PowerGrids`.

    Attributes:
        load_scale: Multiplies all loads and all generation.
        num_feeders: Copies of another grid that are attached at PQ buses.
        feeder_share: What the loads of a feeder are multiplied by.
        copies: Copies of the whole in one.
        ties: Which buses of two copies are joined.
        tie_admittance: Of the branches that join them.
        seed: Of everything drawn.
    """

    load_scale: float
    num_feeders: int
    feeder_share: float
    copies: int
    ties: Ties
    tie_admittance: TieAdmittance
    seed: int

    def apply(self, grid: Grid, feeder: Grid | None, feeder_name: str | None) -> Grid:
        """Make the composed grid.

        Args:
            grid: The grid.
            feeder: What is attached to it; None: nothing.
            feeder_name: What an error message calls that.

        Raises:
            ValueError: If there is no bus to attach a feeder at.
        """
        if self.load_scale != 1:
            fields = ("p_load_mw", "q_load_mvar", "gen_p_mw", "gen_q_mvar")
            grid = grid.replace(**{name: self.load_scale * getattr(grid, name) for name in fields})
        if feeder is not None:
            grid = self._with_feeders(grid, feeder, feeder_name)
        if self.copies > 1:
            base = solve(grid)  # realistic ties join buses of like voltage
            if bool(base.converged.all()):
                grid = grid.replace(vm=base.vm[:, 0], va=base.va[:, 0])
            grid = copies(grid, self.copies, self.ties, self.tie_admittance, self.seed)
        return grid

    def _with_feeders(self, grid: Grid, feeder: Grid, name: str | None) -> Grid:
        grid = attach(grid, [(feeder, bus) for bus in self._feeding_buses(grid, name)], self.feeder_share)
        # The source of a feeder is held in its own case (limits 1 and 1), and is a bus like others here.
        held = (grid.bus_type == BusType.PQ) & (grid.vm_min >= grid.vm_max)
        return grid.replace(vm_min=torch.where(held, 0.9, grid.vm_min), vm_max=torch.where(held, 1.1, grid.vm_max))

    def _feeding_buses(self, grid: Grid, name: str | None) -> list[str]:
        """PQ buses with load, drawn with the seed; as many feeders share a bus as there must."""
        with_load = [i for i in grid.pq.tolist() if float(grid.p_load_mw[i]) > 0] or grid.pq.tolist()
        if not with_load:
            raise ValueError(f"data.feeder={name}: {grid.name} has no PQ bus to attach a feeder at")
        order = np.random.default_rng(self.seed).permutation(with_load)
        return [grid.bus_names[order[i % len(order)]] for i in range(self.num_feeders)]


def limited(grid: Grid, limits: Literal["case", "base"], factor: float) -> Grid:
    """The grid with limits from the flows of its base case, or scaled.

    Args:
        grid: The grid.
        limits: ``base``: its flows times ``factor``; ``case``: its limits times ``factor``.
        factor: Multiplies.

    Raises:
        ValueError: If the base case has no solution.
    """
    if limits == "case":
        return grid.replace(rate_mva=grid.rate_mva * factor)
    base = solve(grid, tol=1e-9)
    if not bool(base.converged.all()):
        raise ValueError(
            f"data.limits=base: the base case of {grid.name} has no solution (max|F| = "
            f"{float(base.max_mismatch[0]):.1e} p.u.); use data.limits=case"
        )
    flows = branch_flows(grid, base.vm, base.va)
    current = torch.maximum(flows.i_from.abs(), flows.i_to.abs())[:, 0]
    return grid.replace(rate_mva=factor * grid.base_mva * current)

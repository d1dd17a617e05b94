"""What modules of power flows share: the grid of the DataModule, scenarios of a batch, results by name."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_modules.metrics.power_flow import FlowErrors
from physics.power_flow import METHODS, Grid, Scenarios, Solution, Solver, branch_flows, currents_ka, loadings
from physics.power_flow.equations import Equations
from physics.power_flow.first_order import adam_settings
from physics.power_flow.grid import BusType

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Stage = Literal["val", "test"]
# Scenarios without a solution that are named one by one.
MOST_NAMED = 10
# Mismatch that methods are timed to, per unit.
REACHED = 1e-3
# Columns of ``history``: number in `METHODS`, iteration, seconds, max|F|, mean F^2, flow deviation in percent.
HISTORY_COLUMNS = 6


class GridModule(pl.LightningModule):
    """Base of modules whose batches are those of `datamodules.power_grids.PowerGrids`.

    It takes the grid from the DataModule (``grid``, ``scenario_name``) when a stage begins, and moves it to the device.

    Args:
        dense: Whether to multiply by a dense admittance matrix.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("scenario", "p_mw", "q_mvar", "vm_pu", "outage", "islanding")

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.val_errors, self.test_errors = FlowErrors(), FlowErrors()
        self._solver: Solver | None = None
        self._source: Grid | None = None
        self._compared: dict[str, dict[str, float]] = {}

    @property
    def solver(self) -> Solver:
        """Solver of the DataModule's grid, on the device of the module."""
        source = self.trainer.datamodule.grid
        if self._solver is None or self._source is not source or self._solver.grid.device != self.device:
            self._source, self._solver = source, Solver(source.to(self.device), dense=self.dense)
        return self._solver

    @property
    def grid(self) -> Grid:
        """The grid, on the device of the module."""
        return self.solver.grid

    @property
    def equations(self) -> Equations:
        """The equations of the grid."""
        return self.solver.equations

    def scenarios(self, batch: Batch, columns: Tensor | None = None) -> Scenarios:
        """Scenarios of a batch.

        Args:
            batch: Of the DataModule.
            columns: Which of them, indices; None: all.
        """
        if columns is not None:
            batch = {key: value[columns] for key, value in batch.items()}
        grid = self.grid
        s = torch.complex(batch["p_mw"], batch["q_mvar"]).mT / grid.base_mva
        status = None
        if bool((batch["outage"] >= 0).any()):
            status = grid.status[:, None].repeat(1, len(batch["outage"]))
            # -1 stands for no branch: a row that is cut off again.
            padded = torch.cat([status, status.new_zeros(1, status.shape[1])])
            status = padded.scatter(0, batch["outage"].mT % len(padded), 0.0)[:-1]
        names = tuple(self.trainer.datamodule.scenario_name(i) for i in batch["scenario"].tolist())
        return Scenarios(s, batch["vm_pu"].mT, status, names)

    def clock(self) -> float:
        """CPU seconds of this process on a CPU, wall seconds on a GPU whose work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    # ------------------------------------------------------------------------------------------------------- results

    def mismatch(self, vm: Tensor, va: Tensor, scenarios: Scenarios) -> tuple[Tensor, Tensor]:
        """``F`` and scheduled powers of the equations, per unit, (equation, scenario) each."""
        equations = self.equations
        given = equations.batch(scenarios)
        return equations.mismatch(equations.state(vm, va), given), equations.targets(given)

    def violations(self, loading: Tensor, vm: Tensor) -> dict[str, Tensor]:
        """Counts per scenario (S,) of ``overloads`` (branch, S), and of PQ buses (bus, S) outside their limits."""
        grid = self.grid
        free = (grid.bus_type == BusType.PQ)[:, None]
        return {
            "overloads": (loading > 1).sum(0),
            "low_voltages": ((vm < grid.vm_min[:, None]) & free).sum(0),
            "high_voltages": ((vm > grid.vm_max[:, None]) & free).sum(0),
        }

    def reference(self, scenarios: Scenarios, start: Solution | None = None) -> Solution:
        """The solutions of Newton's method."""
        return self.solver.solve(scenarios, "newton", tol=1e-10, start=start)

    def difference(self, vm: Tensor, va: Tensor, reference: Solution) -> dict[str, Tensor]:
        """Largest differences of voltages to those of a reference, per unit and degrees, (scenario,).

        Where the reference has not converged there is nothing to compare with: zero.
        """
        known = reference.converged
        turn = (va - reference.va + torch.pi).remainder(2 * torch.pi) - torch.pi
        dv, dtheta = (vm - reference.vm).abs().amax(0), torch.rad2deg(turn.abs().amax(0))
        return {"dv": torch.where(known, dv, 0.0), "dtheta": torch.where(known, dtheta, 0.0)}

    def warn_of_failures(self, solution: Solution, scenarios: Scenarios) -> None:
        """Name scenarios that no solver brought below the tolerance, with their worst bus."""
        failures = solution.failures(self.grid, scenarios)
        for line in failures[:MOST_NAMED]:
            log.warning("%s: not converged: %s", self.grid.name, line)
        if len(failures) > MOST_NAMED:
            log.warning("%s: not converged: %d more", self.grid.name, len(failures) - MOST_NAMED)

    def flow_outputs(self, vm: Tensor, va: Tensor, status: Tensor | None, *, everything: bool) -> dict[str, Tensor]:
        """Voltages and flows by name, scenarios first.

        Args:
            vm: Per unit, (bus, scenario).
            va: Rad, (bus, scenario).
            status: Weights of the branches, (branch, scenario), or None.
            everything: Also powers and currents; otherwise ``vm_pu``, ``va_degree`` and ``loading_percent`` alone.
        """
        grid = self.grid
        flows = branch_flows(grid, vm, va, status)
        out = {"vm_pu": vm, "va_degree": torch.rad2deg(va), "loading_percent": 100 * loadings(grid, flows)}
        if everything:
            s_from, s_to = flows.s_from * grid.base_mva, flows.s_to * grid.base_mva
            drawn = (vm * vm) * torch.complex(grid.g_shunt, -grid.b_shunt)[:, None] * grid.base_mva
            fed = drawn.index_add(0, grid.from_bus, s_from).index_add(0, grid.to_bus, s_to)
            i_from, i_to = (  # cases without nominal voltages (0 kV) have no kA
                torch.where(current.isfinite(), current, torch.nan) for current in currents_ka(grid, flows)
            )
            out |= {"p_mw": fed.real, "q_mvar": fed.imag, "p_from_mw": s_from.real, "q_from_mvar": s_from.imag}
            out |= {"p_to_mw": s_to.real, "q_to_mvar": s_to.imag, "i_from_ka": i_from, "i_to_ka": i_to}
        return {name: value.mT for name, value in out.items()}

    @staticmethod
    def spread(values: dict[str, Tensor], columns: Tensor, size: int) -> dict[str, Tensor]:
        """Rows of some scenarios among those of all of a batch; the others are nan, zero or false.

        Args:
            values: (S, ...) each.
            columns: Place of each of the S scenarios in the batch.
            size: Scenarios of the batch.
        """
        out = {}
        for name, value in values.items():
            empty = torch.nan if value.is_floating_point() or value.is_complex() else 0
            full = torch.full((size, *value.shape[1:]), empty, dtype=value.dtype, device=value.device)
            full[columns] = value
            out[name] = full
        return out

    # ---------------------------------------------------------------------------------------------------- comparison

    def compare(
        self, scenarios: Scenarios, methods: Sequence[str], tol: float, iterations: Mapping[str, int]
    ) -> list[tuple[float, ...]]:
        """Run methods on the same scenarios from a flat start; rows of ``history``, and numbers that are logged.

        Args:
            scenarios: All of them count together.
            methods: Names of `METHODS`.
            tol: Largest mismatch, per unit.
            iterations: Most iterations of a method, by name; its default where it is not named.
        """
        reference = self.reference(scenarios)
        paper = adam_settings(self.trainer.datamodule.grid_name)  # also where the grid is made of several
        rows = []
        for method in methods:
            solution = Solver(self.grid).solve(  # what it prepares counts
                scenarios, method, tol=tol, max_iter=iterations.get(method), start="flat", fallback=False,
                record=True, settings=paper if method == "adam" else None,
            )  # fmt: skip
            points = solution.history
            number = METHODS.index(method)
            rows += [(number, p.iteration, p.seconds, p.max_mismatch, p.mse, p.flow_deviation_percent) for p in points]
            self._compared[method] = {
                "seconds": points[-1].seconds,
                "seconds_to_1e-3": next((p.seconds for p in points if p.max_mismatch < REACHED), math.inf),
                "iterations": float(solution.iterations.max()),
                "max_mismatch_pu": float(solution.max_mismatch.max()),
                "flow_deviation_percent": points[-1].flow_deviation_percent,
                "dv_max_pu": float(self.difference(solution.vm, solution.va, reference)["dv"].max()),
            }
        return rows

    def log_comparison(self) -> None:
        """Log what `compare` has found in this test, with the size of the grid and the peak of memory."""
        for method, values in self._compared.items():
            self.log_exact({f"test/{method}_{name}": value for name, value in values.items()})
        if self._compared:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.log_exact({"test/buses": float(self.grid.num_buses), "test/peak_mib": peak})

    # ------------------------------------------------------------------------------------------------------- logging

    def log_exact(self, values: dict[str, Any], prog_bar: bool = False) -> None:
        """Log values that are already equal on all ranks."""
        for name, value in values.items():
            self.log(name, value, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True)

    def log_errors(self, stage: Stage) -> None:
        """Log everything that the errors of a stage have seen; ``loss`` is the mean of ``F^2``."""
        values = getattr(self, f"{stage}_errors").compute()
        self.log_exact({f"{stage}/loss": values["mse"]}, prog_bar=True)
        self.log_exact({f"{stage}/{name}": value for name, value in values.items()})

"""Exact power flow of every scenario, and how long each method takes to which accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.power_flow.base import HISTORY_COLUMNS, Batch, GridModule, Stage
from physics.power_flow import METHODS, Scenarios, Solution
from physics.power_flow.limits import solve_with_q_limits


class PowerFlowSolver(GridModule):
    """Solves the scenarios of a batch; it has nothing to train.

    Steps of validation, test and predict return for all scenarios of the batch (NaN where an outage islands buses)
    ``prediction``, complex voltages per unit (B, bus), and with a reference ``target``; ``vm_pu``, ``va_degree``
    (B, bus), ``loading_percent`` (B, branch), ``scenario``, ``converged``, ``islanding``, ``iterations``,
    ``max_mismatch`` (B,). Validation and test also ``loss``, the mean of ``F^2``; predict also ``p_mw``, ``q_mvar``
    (B, bus), powers and currents at both ends of the branches (B, branch). The first step of a test has ``history``,
    the course of the methods of ``compare``: (row, 6) with number of the method in `physics.power_flow.METHODS`,
    iteration, seconds, ``max|F|``, ``mse``, flow deviation in percent.

    Logged: what `metrics.power_flow.FlowErrors` computes, ``seconds_per_flow``, and for every method ``m`` of
    ``compare`` ``test/m_...`` with ``seconds``, ``iterations``, ``max_mismatch_pu``, ``flow_deviation_percent``,
    ``dv_max_pu`` and ``seconds_to_1e-3`` (infinite: not reached). Seconds are CPU seconds on a CPU.

    Args:
        method: One of `physics.power_flow.METHODS`: ``chord``, ``newton``, ``fdlf_xb``, ``fdlf_bx``, ``lm``, ``lbfgs``,
            ``adam``, ``rmsprop``, ``dc``.
        tol: Largest mismatch of a solved scenario, per unit.
        max_iter: Most iterations; None: the default of the method.
        start: ``flat``, ``dc``, ``case``, or ``auto``: of the last two the one with less mismatch.
        fallback: Whether scenarios that the method leaves unsolved go to Newton's method.
        q_limits: Whether PV buses whose generators reach a limit of reactive power give up their set-point; then
            ``q_limited`` (B, bus) says which, and voltages are compared with no reference.
        reference: Whether voltages are compared with those of Newton's method at 1e-10.
        compare: Methods to run on the first scenarios of the test, for the figure of error against seconds.
        compare_scenarios: How many scenarios.
        compare_iterations: Most iterations of a method, by name; the default of the method where it is not named.
        optimizer: Unused; accepted so that one optimizer group serves all models of a sweep.
        scheduler: Unused, like ``optimizer``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        method: str = "chord",
        tol: float = 1e-8,
        max_iter: int | None = None,
        start: str = "auto",
        fallback: bool = True,
        q_limits: bool = False,
        reference: bool = True,
        compare: Sequence[str] = (),
        compare_scenarios: int = 1,
        compare_iterations: dict[str, int] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        for key, value in [("method", method), *(("compare", one) for one in compare)]:
            if value not in METHODS:
                raise ValueError(f"model.{key}={value!r} is unknown; choose {', '.join(METHODS)}")
        if not 0 < tol < 1:
            raise ValueError(f"model.tol={tol}: give the largest mismatch in per unit, for instance 1e-8")
        if start not in ("auto", "dc", "flat", "case"):
            raise ValueError(f"model.start={start!r} is unknown; choose auto, dc, flat, case")
        if unknown := sorted(set(compare_iterations or {}) - set(METHODS)):
            raise ValueError(f"model.compare_iterations names {unknown[0]!r}; choose {', '.join(METHODS)}")
        for key, value in (("max_iter", max_iter), ("compare_scenarios", compare_scenarios)):
            if value is not None and value < 1:
                raise ValueError(f"model.{key}={value}: must be at least 1")
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.method, self.tol, self.max_iter, self.start, self.fallback = method, tol, max_iter, start, fallback
        self.q_limits, self.with_reference = q_limits, reference and not q_limits
        self.compared_methods, self.compare_scenarios = list(compare), compare_scenarios
        self.compare_iterations = dict(compare_iterations or {})
        self.val_seconds, self.test_seconds = SumRatio(), SumRatio()

    @override
    def configure_optimizers(self) -> None:
        return None

    def solve(self, scenarios: Scenarios) -> Solution:
        """Solve scenarios with the method of the module."""
        options = {"tol": self.tol, "max_iter": self.max_iter, "start": self.start, "fallback": self.fallback}
        if self.q_limits:
            return solve_with_q_limits(self.grid, scenarios, self.method, **options)
        return self.solver.solve(scenarios, self.method, **options)

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        columns = (~batch["islanding"]).nonzero()[:, 0]
        size = len(batch["islanding"])
        out = {key: batch[key] for key in ("scenario", "islanding")}
        scenarios = self.scenarios(batch, columns)
        begin = self.clock()
        solution = self.solve(scenarios)
        seconds = self.clock() - begin
        self.warn_of_failures(solution, scenarios)
        found = self.flow_outputs(solution.vm, solution.va, scenarios.status, everything=stage is None)
        found["prediction"] = solution.v.mT
        if self.q_limits:
            found["q_limited"] = (solution.bus_type != self.grid.bus_type[:, None]).mT
        found |= {key: getattr(solution, key) for key in ("converged", "iterations", "max_mismatch")}
        if stage is None:
            return out | self.spread(found, columns, size)
        mismatch, target = self.mismatch(solution.vm, solution.va, scenarios)
        distance = {}
        if self.with_reference and len(columns):
            reference = self.reference(scenarios)
            distance = self.difference(solution.vm, solution.va, reference)
            found["target"] = reference.v.mT
        getattr(self, f"{stage}_seconds").update(torch.tensor(seconds), torch.tensor(len(columns)))
        getattr(self, f"{stage}_errors").update(
            islanded=batch["islanding"], converged=solution.converged, iterations=solution.iterations,
            mismatch=mismatch, target=target,
            violations=self.violations(found["loading_percent"].mT / 100, solution.vm), **distance,
        )  # fmt: skip
        return out | self.spread(found, columns, size) | {"loss": mismatch.square().mean()}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = self._step(batch, "test")
        rows = []
        if batch_idx == 0 and self.compared_methods:
            columns = (~batch["islanding"]).nonzero()[: self.compare_scenarios, 0]
            if len(columns):
                rows = self.compare(
                    self.scenarios(batch, columns), self.compared_methods, self.tol, self.compare_iterations
                )
        return out | {"history": out["loss"].new_tensor(rows).reshape(-1, HISTORY_COLUMNS)}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, None)

    # ------------------------------------------------------------------------------------------------------- logging

    def _reset(self, stage: Stage) -> None:
        getattr(self, f"{stage}_errors").reset()
        getattr(self, f"{stage}_seconds").reset()

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._reset("test")
        self._compared = {}

    def _log(self, stage: Stage) -> None:
        self.log_errors(stage)
        self.log_exact({f"{stage}/seconds_per_flow": getattr(self, f"{stage}_seconds").compute()})

    @override
    def on_validation_epoch_end(self) -> None:
        self._log("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log("test")
        self.log_comparison()

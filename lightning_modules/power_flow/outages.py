"""Every outage of one or two branches: exact voltages, what is overloaded, what quick estimates would have found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.power_flow import ScreeningErrors
from lightning_modules.power_flow.base import Batch, GridModule, Stage
from physics.power_flow import Contingencies, Screening, screen, solve_contingencies

_ESTIMATE = re.compile(r"woodbury_([1-9]\d*)|dc")


class OutageAnalysis(GridModule):
    """N-1 or N-2 of a grid; it has nothing to train.

    All outages have the injections of the case; a batch is solved together by chord iterations with the base case's
    Jacobian, corrected for each outage by Woodbury's formula, and Newton's method for what does not contract. Outages
    that island buses are reported as such, by name, never as failures.

    Steps return what those of `PowerFlowSolver` do, and ``overloads``, ``low_voltages``, ``high_voltages`` and
    ``severity``, the sum over branches of the squared overload, and ``estimated``, whether only the estimate is known
    (B,): magnitudes, loadings and what follows from them are then its, and everything else is nan. Logged besides:
    ``seconds_per_flow``, and for every estimate ``e`` of ``screen`` ``test/e_recall``, ``test/e_precision`` (of pairs
    of outage and overloaded branch, of outages that were solved), ``test/e_outage_recall`` (of outages with any
    overload) and ``test/e_seconds_per_flow``.

    Args:
        tol: Largest mismatch of a solved outage, per unit.
        max_iter: Chord iterations before Newton's method takes over.
        screen: Quick estimates to compare: ``woodbury_1`` is one step of the iteration, ``woodbury_2`` two, ``dc`` the
            linear approximation.
        exact: ``all`` outages are solved, or those that the first estimate ``flagged``; the others keep the estimate
            and count in no error.
        flag_percent: An outage is flagged if its estimated largest loading is at least this.
        reference: Whether voltages are compared with those of Newton's method at 1e-10.
        optimizer: Unused; accepted so that one optimizer group serves all models of a sweep.
        scheduler: Unused, like ``optimizer``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        tol: float = 1e-8,
        max_iter: int = 40,
        screen: Sequence[str] = (),
        exact: Literal["all", "flagged"] = "all",
        flag_percent: float = 95.0,
        reference: bool = True,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        for one in screen:
            if not _ESTIMATE.fullmatch(one):
                raise ValueError(f"model.screen={one!r} is unknown; choose dc, woodbury_1, woodbury_2, ...")
        if exact not in ("all", "flagged"):
            raise ValueError(f"model.exact={exact!r} is unknown; choose all or flagged")
        if exact == "flagged" and not screen:
            raise ValueError("model.exact=flagged needs an estimate: model.screen=[woodbury_1]")
        if not 0 < tol < 1:
            raise ValueError(f"model.tol={tol}: give the largest mismatch in per unit, for instance 1e-8")
        if max_iter < 1:
            raise ValueError(f"model.max_iter={max_iter}: must be at least 1")
        if not flag_percent > 0:
            raise ValueError(f"model.flag_percent={flag_percent}: must be above 0")
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.tol, self.max_iter, self.with_reference = tol, max_iter, reference
        self.estimates, self.exact, self.flag_percent = list(screen), exact, flag_percent
        self.val_seconds, self.test_seconds = SumRatio(), SumRatio()
        self.flagged = SumRatio()
        for name in self.estimates:
            setattr(self, f"{name}_errors", ScreeningErrors())
            setattr(self, f"{name}_outage_errors", ScreeningErrors())
            setattr(self, f"{name}_seconds", SumRatio())

    @override
    def configure_optimizers(self) -> None:
        return None

    @override
    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        if datamodule.kind != "contingencies":
            raise ValueError(
                f"data.kind={datamodule.kind}: outages of one base case need data.kind=contingencies; model=power_flow "
                "solves scenarios whose injections differ too"
            )
        if self.estimates and bool(datamodule.grid.rate_mva.isinf().all()):
            raise ValueError(
                f"{datamodule.grid.name}: no branch has a limit, so that nothing can be overloaded; set "
                "data.limits=base data.limit_factor=1.2"
            )

    # --------------------------------------------------------------------------------------------------------- steps

    def _step(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        columns = (~batch["islanding"]).nonzero()[:, 0]
        size = len(batch["islanding"])
        out = {key: batch[key] for key in ("scenario", "islanding")}
        scenarios = self.scenarios(batch, columns)
        outages = self.trainer.datamodule.outages.select(batch["scenario"][columns].cpu())
        estimates = {name: self._estimate(name, outages, stage) for name in self.estimates}
        wanted = torch.ones(len(columns), dtype=torch.bool, device=self.device)
        if self.exact == "flagged":
            wanted = 100 * next(iter(estimates.values())).loading.amax(0) >= self.flag_percent
            self.flagged.update(wanted.sum(), torch.tensor(len(wanted)))
        begin = self.clock()
        solved = wanted.nonzero()[:, 0]
        s = scenarios.s[:, 0] if len(columns) else None
        solution = solve_contingencies(
            self.grid, outages.select(solved.cpu()), s, self.tol, self.max_iter, solver=self.solver
        )
        seconds = self.clock() - begin
        chosen = scenarios.select(solved)
        self.warn_of_failures(solution, chosen)
        found = self.flow_outputs(solution.vm, solution.va, chosen.status, everything=stage is None)
        found["prediction"] = solution.v.mT
        found |= {key: getattr(solution, key) for key in ("converged", "iterations", "max_mismatch")}
        loading = found["loading_percent"].mT / 100
        found |= (violations := self._judged(loading, solution.vm))
        if stage is not None:
            mismatch, target = self.mismatch(solution.vm, solution.va, chosen)
            distance = {}
            if self.with_reference and len(solved):
                reference = self.reference(chosen)
                distance = self.difference(solution.vm, solution.va, reference)
                found["target"] = reference.v.mT
            getattr(self, f"{stage}_seconds").update(torch.tensor(seconds), torch.tensor(len(solved)))
            islanded = torch.cat([batch["islanding"][batch["islanding"]], wanted[wanted].logical_not()])
            getattr(self, f"{stage}_errors").update(
                islanded=islanded, converged=solution.converged, iterations=solution.iterations, mismatch=mismatch,
                target=target, violations=violations, **distance,
            )  # fmt: skip
            out["loss"] = mismatch.square().mean() if mismatch.numel() else mismatch.new_zeros(())
        if stage == "test":
            self._judge(estimates, solved, solution.converged, loading)
        return out | self._with_estimates(
            self.spread(found, columns[solved], size), columns[~wanted], ~wanted, estimates
        )

    def _judged(self, loading: Tensor, vm: Tensor) -> dict[str, Tensor]:
        """Violations of limits and ``severity``, (S,), of loadings (branch, S) and magnitudes (bus, S)."""
        return self.violations(loading, vm) | {"severity": (loading - 1).clamp(min=0).square().nansum(0)}

    def _with_estimates(
        self, out: dict[str, Tensor], columns: Tensor, left: Tensor, estimates: dict[str, Screening]
    ) -> dict[str, Tensor]:
        """Outputs with the first estimate where nothing was solved.

        Args:
            out: (B, ...) each.
            columns: Places in the batch that keep the estimate.
            left: Which of the estimated outages these are, bool.
            estimates: In the order of the module.
        """
        out["estimated"] = torch.zeros_like(out["converged"])
        if len(columns):
            first = next(iter(estimates.values()))
            loading, vm = first.loading[:, left], first.vm[:, left]
            known = {"vm_pu": vm.mT, "loading_percent": 100 * loading.mT, "max_mismatch": first.max_mismatch[left]}
            for name, value in (known | self._judged(loading, vm)).items():
                out[name][columns] = value
            out["estimated"][columns] = True
        return out

    def _estimate(self, name: str, outages: Contingencies, stage: Stage | None) -> Screening:
        match = _ESTIMATE.fullmatch(name)
        begin = self.clock()
        if match[1] is None:
            found = screen(self.grid, outages, method="dc", solver=self.solver)
        else:
            found = screen(self.grid, outages, steps=int(match[1]), solver=self.solver)
        if stage == "test":
            getattr(self, f"{name}_seconds").update(torch.tensor(self.clock() - begin), torch.tensor(len(outages)))
        return found

    def _judge(self, estimates: dict[str, Screening], solved: Tensor, converged: Tensor, loading: Tensor) -> None:
        """Compare estimates with what was solved exactly."""
        true = (loading > 1)[:, converged]
        for name, estimate in estimates.items():
            found = estimate.overloaded[:, solved][:, converged]
            getattr(self, f"{name}_errors").update(found, true)
            getattr(self, f"{name}_outage_errors").update(found.any(0), true.any(0))

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, None)

    # ------------------------------------------------------------------------------------------------------- logging

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_errors.reset()
        self.val_seconds.reset()

    @override
    def on_test_epoch_start(self) -> None:
        metrics = [self.test_errors, self.test_seconds, self.flagged]
        for name in self.estimates:
            metrics += [getattr(self, f"{name}_{what}") for what in ("errors", "outage_errors", "seconds")]
        for metric in metrics:
            metric.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_errors("val")
        self.log_exact({"val/seconds_per_flow": self.val_seconds.compute()})

    @override
    def on_test_epoch_end(self) -> None:
        self.log_errors("test")
        self.log_exact({"test/seconds_per_flow": self.test_seconds.compute()})
        for name in self.estimates:
            values = getattr(self, f"{name}_errors").compute()
            self.log_exact({f"test/{name}_{key}": values[key] for key in ("recall", "precision")})
            outage = getattr(self, f"{name}_outage_errors").compute()
            self.log_exact({f"test/{name}_outage_recall": outage["recall"]})
            self.log_exact({f"test/{name}_seconds_per_flow": getattr(self, f"{name}_seconds").compute()})
        if self.exact == "flagged":
            self.log_exact({"test/flagged_share": self.flagged.compute()})

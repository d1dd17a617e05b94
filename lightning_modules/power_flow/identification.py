"""Which reactances, taps or loads explain what was measured (section 2.6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.power_flow import VoltageErrors
from lightning_modules.power_flow.base import Stage
from physics.power_flow import Grid, NotConverged, Scenarios, power_flow, solve
from physics.power_flow.identification import (
    LINEAR_FIELDS,
    NormalEquations,
    Unknown,
    Unknowns,
    condition_number,
    damped_step,
    normal_equations,
    sensitivity,
    standard_errors,
)
from physics.power_flow.measurements import AT_BUSES, QUANTITIES, misfit, simulate

Batch = dict[str, Tensor]
# What noise is taken to be where the data say none, per unit and rad.
LEAST_SIGMA = 1e-6
# Damping of Levenberg-Marquardt: where it begins, and how it changes after better and worse steps.
_DAMPING, _EASED, _RAISED, _HOPELESS = 1e-3, 0.2, 10.0, 1e12
# Relative decrease of the cost that is rounding.
_ROUNDING = 1e-13


class _Steps(torch.optim.Optimizer):
    """What Lightning counts; the step itself is that of the normal equations."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params, {})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


class GridIdentification(pl.LightningModule):
    """Finds the unknown parameters of a grid from measurements of many scenarios.

    Minimises half the mean square of (simulated - measured) / sigma, plus that of the priors over the number of
    measurements. ``gauss_newton`` takes a Levenberg-Marquardt step at the end of every epoch, with the sensitivities of
    all scenarios by the implicit function theorem: exact for any number of batches and processes. ``gradient``
    differentiates through the solved power flow and leaves the step to an optimizer (L-BFGS, Adam).

    Batches are those of `datamodules.grid_measurements.GridMeasurements`, which also has ``grid``, ``elements`` of the
    unknown fields, ``measured`` quantities and their ``sigma_of``, and ``truth`` or None.

    Steps of validation, test and predict return ``prediction``, complex voltages per unit (B, bus), ``target`` where
    the truth is known, and ``scenario``; the first of a test and of a prediction ``parameter_start``,
    ``parameter_found``, ``parameter_std`` (standard error) and ``parameter_true`` (parameter,), NaN where not known.

    Logged: ``train/``, ``val/`` and ``test/`` ``loss``; ``val/`` and ``test/`` ``vm_rms_pu``, ``vm_max_pu``,
    ``va_rms_degree``, ``va_max_degree``, errors of the voltages of held-out scenarios; ``train/condition_number`` of
    the weighted sensitivities (``gauss_newton``); where the truth is known ``test/parameter_error_median``, ``_p90``
    and ``_max``, relative, and the same of the start.

    Args:
        method: ``gauss_newton`` or ``gradient``.
        forms: ``log`` or ``linear`` by field; not named: linear for ``tap`` and ``shift``, else log.
        bounds: Smallest and largest value by field (of the magnitude, with ``log``).
        prior: Standard deviation of a Gaussian prior around the start by field; with ``log`` relative.
        stop_below: ``gauss_newton`` ends when no parameter would move by more than this (relative).
        optimizer: Partial that takes the parameters, for ``gradient``.
        scheduler: Partial that takes the optimizer, or None.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("scenario", "p_mw", "q_mvar", "vm_pu", "measured", "exact")

    def __init__(
        self,
        method: Literal["gauss_newton", "gradient"] = "gauss_newton",
        forms: Mapping[str, Literal["log", "linear"]] | None = None,
        bounds: Mapping[str, Sequence[float]] | None = None,
        prior: Mapping[str, float] | None = None,
        stop_below: float = 1e-10,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if method not in ("gauss_newton", "gradient"):
            raise ValueError(f"model.method={method!r} is unknown; choose gauss_newton or gradient")
        if method == "gradient" and optimizer is None:
            raise ValueError("model.method=gradient needs an optimizer: optimizer=lbfgs")
        for field, pair in (bounds or {}).items():
            if len(pair) != 2:
                raise ValueError(f"model.bounds.{field}={list(pair)}: give the smallest and the largest value")
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.method, self.stop_below = method, stop_below
        self.forms, self.bounds, self.prior = dict(forms or {}), dict(bounds or {}), dict(prior or {})
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.automatic_optimization = method == "gradient"
        # (parameter,): the deviation from the start; the size is known when the data are.
        self.raw = nn.Parameter(torch.empty(0, dtype=torch.float64))
        self.register_buffer("trial", torch.empty(0, dtype=torch.float64))
        self.register_buffer("matrix", torch.empty(0, 0, dtype=torch.float64))
        self.register_buffer("gradient", torch.empty(0, dtype=torch.float64))
        self.register_buffer("cost", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("damping", torch.tensor(_DAMPING, dtype=torch.float64))
        self._unknowns: Unknowns | None = None
        self._sums: tuple[NormalEquations, Tensor] | None = None
        self.train_loss, self.val_loss, self.test_loss = SumRatio(), SumRatio(), SumRatio()
        self.val_voltages, self.test_voltages = VoltageErrors(), VoltageErrors()

    # ---------------------------------------------------------------------------------------------------- parameters

    @override
    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        grid: Grid = datamodule.grid
        for key, named in (("forms", self.forms), ("bounds", self.bounds), ("prior", self.prior)):
            if wrong := [field for field in named if field not in datamodule.elements]:
                raise ValueError(
                    f"model.{key} names {wrong[0]!r}, which is not among data.unknown: {', '.join(datamodule.elements)}"
                )
        parts = []
        for field, index in datamodule.elements.items():
            form = self.forms.get(field, "linear" if field in LINEAR_FIELDS else "log")
            limits = tuple(self.bounds[field]) if field in self.bounds else None
            try:
                parts.append(Unknown(field, index, getattr(grid, field)[index], form, limits, self.prior.get(field)))
            except ValueError as error:
                raise ValueError(f"model.forms, model.bounds, model.prior: {error}") from None
        self._unknowns = Unknowns(parts)
        if len(self.raw) != len(self._unknowns):
            self._resize(len(self._unknowns))

    def _resize(self, size: int) -> None:
        with torch.no_grad():
            self.raw = nn.Parameter(self.raw.new_zeros(size))
            self.trial, self.gradient = self.raw.new_zeros(size), self.raw.new_zeros(size)
            self.matrix = self.raw.new_zeros(size, size)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the size of the checkpoint, which may be loaded without its data."""
        saved = state_dict.get(f"{prefix}raw")
        if saved is not None and saved.shape != self.raw.shape:
            self._resize(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def grid(self) -> Grid:
        """The grid with the parameters of the start."""
        return self.trainer.datamodule.grid.to(self.device)

    @property
    def unknowns(self) -> Unknowns:
        """The parameters, on the device of the module."""
        return self._unknowns.to(self.device)

    @property
    def sigma_of(self) -> dict[str, float]:
        """Scale of each measured quantity, per unit and rad."""
        known = self.trainer.datamodule.sigma_of
        return {name: max(known.get(name, 1e-3), LEAST_SIGMA) for name in QUANTITIES}

    def parameters_by_name(self) -> dict[str, float]:
        """Identified values, by field and element."""
        names = self.unknowns.names(self.grid)
        return dict(zip(names, self.unknowns.values(self.raw.detach()).tolist(), strict=True))

    @override
    def configure_optimizers(self) -> Any:
        if self.method == "gauss_newton":
            return _Steps([self.raw])
        optimizer = self.make_optimizer([self.raw])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer)}}

    # ---------------------------------------------------------------------------------------------------- simulation

    def _scenarios(self, batch: Batch) -> Scenarios:
        s = torch.complex(batch["p_mw"], batch["q_mvar"]).mT / self.grid.base_mva
        names = tuple(self.trainer.datamodule.scenario_name(i) for i in batch["scenario"].tolist())
        return Scenarios(s, batch["vm_pu"].mT, names=names)

    def _split(self, joined: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Some quantities (element, B) of a row per scenario."""
        grid = self.grid
        sizes = [grid.num_buses if name in AT_BUSES else grid.num_branches for name in QUANTITIES]
        parts = dict(zip(QUANTITIES, joined.mT.split(sizes), strict=True))
        return {name: parts[name] for name in names}

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        return self._split(batch["measured"], self.trainer.datamodule.measured)

    def _solved(self, raw: Tensor, batch: Batch) -> tuple[Grid, Tensor, Tensor]:
        """Grid and voltages with parameters, without gradients."""
        scenarios = self._scenarios(batch)
        with torch.no_grad():
            grid, ds = self.unknowns.apply(self.grid, raw)
            moved = Scenarios(scenarios.s + ds[:, None], scenarios.vm, names=scenarios.names)
            solution = solve(grid, moved, "newton", tol=1e-10).require_converged(grid, moved)
        return grid, solution.vm, solution.va

    # ------------------------------------------------------------------------------------------------------ training

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        measured = self._measured(batch)
        if self.method == "gradient":
            return self._differentiated(batch, measured)
        with torch.no_grad():
            new = self._normal(batch, measured)
        if self._sums is not None:
            new = self._sums[0] + new[0], self._sums[1] + new[1]
        self._sums = new
        if self.trainer.is_last_batch:
            self.optimizers().step(self._gauss_newton)
        return None

    def _differentiated(self, batch: Batch, measured: dict[str, Tensor]) -> Tensor:
        """Loss of a batch with its gradient through the power flow."""
        scenarios = self._scenarios(batch)
        grid, ds = self.unknowns.apply(self.grid, self.raw)
        vm, va, _ = power_flow(grid, scenarios.s + ds[:, None], scenarios.vm)
        residual = misfit(simulate(grid, vm, va, list(measured)), measured, self.sigma_of)
        count = residual.new_tensor(float(batch["measured"].isfinite().sum()))
        penalty = self.unknowns.penalty(self.raw).square().sum() / self.trainer.world_size
        total = 0.5 * (residual.square().sum() + penalty)
        self.train_loss.update(total.detach(), count)
        if (ranks := self.trainer.world_size) > 1:  # whose gradients are averaged
            dist.all_reduce(count)
            count = count / ranks
        return total / count

    def _normal(self, batch: Batch, measured: dict[str, Tensor]) -> tuple[NormalEquations, Tensor]:
        """Normal equations of a batch at the trial, and the number of its measurements."""
        size = len(self.trial)
        count = batch["measured"].isfinite().sum().double()
        nothing = self.trial.new_zeros(size, size), self.trial.new_zeros(size)
        too_far = NormalEquations(*nothing, self.trial.new_tensor(math.inf)), count  # which is refused
        try:
            grid, vm, va = self._solved(self.trial, batch)
        except NotConverged as error:
            if not bool(self.cost.isfinite()):
                raise ValueError(
                    f"with the first guess of its parameters {error}; give a better one (data.start_error, the case)"
                ) from None
            return too_far
        quantities, scale = list(measured), self.sigma_of
        residual = misfit(simulate(grid, vm, va, quantities), measured, scale)
        slopes = sensitivity(self.grid, self.unknowns, self.trial, self._scenarios(batch), vm, va, quantities)
        weighted = [
            torch.where(measured[name].isfinite()[..., None], slopes.measurements[name] / scale[name], 0.0)
            for name in quantities
        ]
        normal = normal_equations(residual.reshape(-1), torch.cat(weighted).reshape(-1, size))
        return (normal, count) if bool(normal.matrix.isfinite().all()) else too_far

    def _gauss_newton(self) -> None:
        """Take or refuse the trial, and propose the next one."""
        (matrix, gradient, cost), count = self._sums
        self._sums = None
        if self.trainer.world_size > 1:
            for tensor in (matrix, gradient, cost, count):
                dist.all_reduce(tensor)
        prior = self._prior(self.trial)
        new = NormalEquations(matrix, gradient, cost) + prior
        with torch.no_grad():
            if float(new.cost) <= float(self.cost):
                self.raw.copy_(self.trial)
                self.matrix, self.gradient, self.cost = new.matrix, new.gradient, new.cost
                self.damping = (self.damping * _EASED).clamp(min=1e-12)
            else:
                self.damping = self.damping * _RAISED
            step = damped_step(NormalEquations(self.matrix, self.gradient, self.cost), float(self.damping))
            self.trial = self.raw + step
        self.train_loss.update(self.cost, count)
        gain = -0.5 * float(self.gradient @ step)  # what the step would take off the cost, at most rounding
        small = float(step.abs().max()) < self.stop_below or gain < _ROUNDING * float(self.cost)
        if small or float(self.damping) > _HOPELESS:
            self.trainer.should_stop = True

    def _prior(self, raw: Tensor) -> NormalEquations:
        """Normal equations of the priors."""
        unknowns = self.unknowns
        with torch.enable_grad():
            slopes = torch.func.jacfwd(unknowns.penalty)(raw.detach())
        return normal_equations(unknowns.penalty(raw.detach()), slopes)

    @override
    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()
        self._sums = None

    @override
    def on_train_epoch_end(self) -> None:
        self._log({"train/loss": self.train_loss.compute() if self.method == "gradient" else self._mean_cost()})
        if self.method == "gauss_newton":
            normal = NormalEquations(self.matrix, self.gradient, self.cost)
            self._log({"train/condition_number": condition_number(normal), "train/damping": self.damping})

    def _mean_cost(self) -> Tensor:
        """Cost over measurements; `_gauss_newton` has added the same number on every rank."""
        return self.train_loss.numerator / self.train_loss.denominator

    # ---------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        grid, vm, va = self._solved(self.raw.detach(), batch)
        out = {"scenario": batch["scenario"], "prediction": torch.polar(vm, va).mT}
        exact = {} if self.trainer.datamodule.truth is None else self._split(batch["exact"], QUANTITIES)
        if exact:
            out["target"] = torch.polar(exact["vm"], exact["va"]).mT
        if stage is None:
            return out
        measured = self._measured(batch)
        residual = misfit(simulate(grid, vm, va, list(measured)), measured, self.sigma_of)
        count = batch["measured"].isfinite().sum()
        total = 0.5 * residual.square().sum()
        getattr(self, f"{stage}_loss").update(total, count)
        compared = exact or measured
        nothing = torch.full_like(vm, torch.nan)
        turn = (va - compared.get("va", nothing) + torch.pi).remainder(2 * torch.pi) - torch.pi
        getattr(self, f"{stage}_voltages").update(vm - compared.get("vm", nothing), turn)
        return out | {"loss": total / count}

    def _found(self, first: bool) -> dict[str, Tensor]:
        """Parameters, in the first batch alone: all scenarios share them."""
        unknowns = self.unknowns
        start = torch.cat([part.start for part in unknowns.parts])
        truth: Grid | None = self.trainer.datamodule.truth
        true = torch.full_like(start, torch.nan)
        if truth is not None:
            true = torch.cat([getattr(truth.to(self.device), p.field)[p.elements] for p in unknowns.parts])
        raw = self.raw.detach()
        values = {"start": start, "found": unknowns.values(raw), "true": true, "std": torch.full_like(raw, torch.nan)}
        if self.method == "gauss_newton" and bool(self.cost.isfinite()):
            values["std"] = torch.func.jacfwd(unknowns.values)(raw).diagonal().abs() * standard_errors(self.matrix)
        return {f"parameter_{name}": value if first else value[:0] for name, value in values.items()}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        first = batch_idx == 0 and self.trainer.is_global_zero
        return self._evaluate(batch, "test") | self._found(first)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluate(batch, None) | self._found(batch_idx == 0)

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()
        self.val_voltages.reset()

    @override
    def on_test_epoch_start(self) -> None:
        self.test_loss.reset()
        self.test_voltages.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self._log({"val/loss": self.val_loss.compute()}, prog_bar=True)
        self._log({f"val/{name}": value for name, value in self.val_voltages.compute().items()})

    @override
    def on_test_epoch_end(self) -> None:
        self._log({"test/loss": self.test_loss.compute()})
        self._log({f"test/{name}": value for name, value in self.test_voltages.compute().items()})
        values = self._found(True)
        true = values["parameter_true"]
        if bool(true.isfinite().all()):
            for name, key in (("parameter_error", "found"), ("start_error", "start")):
                error = (values[f"parameter_{key}"] - true).abs() / true.abs().clamp(min=1e-300)
                self._log(
                    {
                        f"test/{name}_median": error.quantile(0.5),
                        f"test/{name}_p90": error.quantile(0.9),
                        f"test/{name}_max": error.max(),
                    }
                )
        if self.method == "gauss_newton" and bool(self.cost.isfinite()):
            normal = NormalEquations(self.matrix, self.gradient, self.cost)
            self._log({"test/condition_number": condition_number(normal)})

    def _log(self, values: dict[str, Any], prog_bar: bool = False) -> None:
        """Log values that are already equal on all ranks."""
        for name, value in values.items():
            self.log(name, value, prog_bar=prog_bar, batch_size=1, sync_dist=True, rank_zero_only=True)

"""The paper's method as training: voltages are parameters, every training step is one step of Adam (section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.power_flow.base import HISTORY_COLUMNS, Batch, GridModule, Stage
from physics.power_flow import METHODS, AdamSettings, RMSpropSettings, Scenarios
from physics.power_flow.equations import Batch as Given
from physics.power_flow.equations import State
from physics.power_flow.first_order import (
    SERIES_FIRST,
    SERIES_FOLLOWING,
    DescentState,
    adam_settings,
    descend,
    follow,
    start_descent,
)
from physics.power_flow.solver import starting_state

Settings = AdamSettings | RMSpropSettings


class _Steps(torch.optim.Optimizer):
    """What Lightning counts and calls; the step itself is the closure, and the module keeps its state."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params, {})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


@dataclass
class _Running:
    """The descent of the scenarios that training is at.

    Attributes:
        scenarios: Their numbers, (B,).
        first: Whether it began from scratch, not from the scenarios before.
        settings: Of the optimizer and its schedule.
        given: What the equations are given.
        state: Voltages, in the order of the equations.
        descent: Unknowns, moments, learning rates, stops.
        steps_before: Steps that the descent counts and the scenarios before had taken, (B,).
        best: Unknowns of least loss, and that loss (equation, B) and (B,).
    """

    scenarios: Tensor
    first: bool
    settings: Settings
    given: Given
    state: State
    descent: DescentState
    steps_before: Tensor
    best: tuple[Tensor, Tensor]


class PowerFlowDescent(GridModule):
    """Minimises the mean of ``F^2`` of every scenario with a first-order method: what the paper proposes.

    Every training step is one step of the optimizer on the scenarios of its batch. A scenario has a loss, a learning
    rate with a plateau schedule, and a stop of its own (the paper: one for all). When the next batch of scenarios comes
    it begins from scratch, or, for a series, from the solution of the one before, as section 2.3 has it.

    Steps of validation, test and predict return ``prediction``, complex voltages per unit (B, bus), ``target``, those
    of Newton's method, ``vm_pu``, ``va_degree``, ``loading_percent``, ``scenario``, ``converged``, ``islanding``,
    ``iterations``, ``max_mismatch``, as `PowerFlowSolver` does; the first step of a test has ``history`` of the
    training and of the methods of ``compare``.

    Logged: ``train/loss``, ``train/lr`` (means over scenarios), and what `metrics.power_flow.FlowErrors` computes.
    ``test/<method>_...`` of the compared methods as in `PowerFlowSolver`.

    Args:
        method: ``adam``, the paper's, or ``rmsprop``.
        settings: Of the method, by name (``lr``, ``beta1``, ...); what is not named is the paper's for the grid.
        sequential: Whether batches follow each other in time and begin from the solution of the one before.
        following: Settings of the batches that follow, where ``sequential``; not named: the paper's.
        start: ``flat``, the paper's, ``dc`` or ``case``. Set-points are always the true ones.
        tol: A scenario stops when its largest mismatch is at most this, per unit.
        keep_best: Whether the state of least loss counts instead of the last one.
        dense: Whether to multiply by a dense admittance matrix.
        record_every: Steps between two points of the history.
        compare: Methods to run on the scenarios of the first test batch, for the figure of error against seconds.
        compare_scenarios: How many scenarios.
        compare_iterations: Most iterations of a method, by name.
        optimizer: Unused; accepted so that one optimizer group serves all models of a sweep.
        scheduler: Unused, like ``optimizer``.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        method: Literal["adam", "rmsprop"] = "adam",
        settings: Mapping[str, float] | None = None,
        sequential: bool = False,
        following: Mapping[str, float] | None = None,
        start: Literal["flat", "dc", "case"] = "flat",
        tol: float = 1e-8,
        keep_best: bool = False,
        dense: bool = False,
        record_every: int = 10,
        compare: Sequence[str] = (),
        compare_scenarios: int = 1,
        compare_iterations: dict[str, int] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(dense)
        if method not in ("adam", "rmsprop"):
            raise ValueError(
                f"model.method={method!r}: the paper's descent is adam or rmsprop; for {', '.join(METHODS[:6])} take "
                "model=power_flow"
            )
        if start not in ("flat", "dc", "case"):
            raise ValueError(f"model.start={start!r} is unknown; choose flat, dc, case")
        for one in compare:
            if one not in METHODS:
                raise ValueError(f"model.compare={one!r} is unknown; choose {', '.join(METHODS)}")
        for key, value in (("record_every", record_every), ("compare_scenarios", compare_scenarios)):
            if value < 1:
                raise ValueError(f"model.{key}={value}: must be at least 1")
        kind = AdamSettings if method == "adam" else RMSpropSettings
        for key, given in (("settings", settings), ("following", following)):
            if unknown := sorted(set(given or {}) - set(kind.__dataclass_fields__)):
                raise ValueError(
                    f"model.{key}.{unknown[0]}: {method} has no such setting; it has "
                    f"{', '.join(kind.__dataclass_fields__)}"
                )
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.automatic_optimization = False
        self.method, self.given, self.following = method, dict(settings or {}), dict(following or {})
        self.sequential, self.start, self.tol = sequential, start, tol
        self.keep_best, self.record_every = keep_best, record_every
        self.compared_methods, self.compare_scenarios = list(compare), compare_scenarios
        self.compare_iterations = dict(compare_iterations or {})
        # (scenario, bus); the sizes are known when the data are.
        self.vm, self.va = (nn.Parameter(torch.empty(0, 0, dtype=torch.float64)) for _ in range(2))
        self.register_buffer("steps", torch.empty(0, dtype=torch.int64))
        self.register_buffer("history", torch.empty(0, HISTORY_COLUMNS, dtype=torch.float64))
        self._running: _Running | None = None
        self._restored: dict[str, Any] | None = None
        self._points: list[tuple[float, ...]] = []
        self._seconds = 0.0

    # ---------------------------------------------------------------------------------------------------- parameters

    @override
    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        size = (datamodule.count, datamodule.grid.num_buses)
        if self.vm.shape != size:
            with torch.no_grad():
                self._resize(*size)
                self.vm.fill_(1.0)
                self.va.fill_(float(datamodule.grid.va[datamodule.grid.slack[0]]))

    def _resize(self, count: int, buses: int) -> None:
        for name in ("vm", "va"):
            setattr(self, name, nn.Parameter(self.vm.new_empty(count, buses)))
        self.steps = self.steps.new_zeros(count)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sizes of the checkpoint, which may be loaded without its data."""
        if (saved := state_dict.get(f"{prefix}vm")) is not None and saved.shape != self.vm.shape:
            self._resize(*saved.shape)
        if (saved := state_dict.get(f"{prefix}history")) is not None:
            self.history = self.history.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _Steps([self.vm, self.va])

    def settings_of(self, first: bool) -> Settings:
        """Settings of the first batch, or of those that follow in a series."""
        if self.method == "rmsprop":
            base: Settings = RMSpropSettings()
        elif self.sequential:
            base = SERIES_FIRST if first else SERIES_FOLLOWING
        else:
            base = adam_settings(self.trainer.datamodule.grid_name)
        return replace(base, **(self.given if first or not self.sequential else self.following))

    # ------------------------------------------------------------------------------------------------------ training

    @override
    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        begin = self.clock()
        if self._restored is not None:
            self._restore()
        if self._running is None or not torch.equal(batch["scenario"], self._running.scenarios):
            self._begin(batch)
        running = self._running
        found: list[tuple[Tensor, Tensor]] = []
        self.optimizers().step(lambda: found.append(self._descend(running)))
        loss, mismatch = found[0]
        self._seconds += self.clock() - begin
        step = self.trainer.global_step
        if (step - 1) % self.record_every == 0:
            deviation = 100 * mismatch.abs().sum() / self.equations.targets(running.given).abs().sum()
            values = (mismatch.abs().max(), mismatch.square().mean(), deviation)
            self._points.append((METHODS.index(self.method), step - 1, self._seconds, *map(float, values)))
        if step % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.mean(), prog_bar=True, batch_size=1, rank_zero_only=True)
            self.log("train/lr", running.descent.lr.mean(), batch_size=1, rank_zero_only=True)

    def _descend(self, running: _Running) -> tuple[Tensor, Tensor]:
        """One step of all scenarios; loss (B,) and mismatch (equation, B) before it."""
        loss, gradient, mismatch = self.equations.loss_and_gradient(running.state, running.given)
        descent = running.descent
        if self.keep_best:
            unknowns, least = running.best
            running.best = torch.where(loss < least, descent.u, unknowns), torch.minimum(loss, least)
        frozen = descent.frozen | (mismatch.abs().amax(0) <= self.tol)
        running.descent = descend(descent._replace(frozen=frozen), loss, gradient, running.settings)
        running.state = self.equations.with_unknowns(running.state, running.descent.u)
        return loss, mismatch

    def _begin(self, batch: Batch) -> None:
        """Start with the scenarios of another batch."""
        if bool(batch["islanding"].any()):
            names = [self.trainer.datamodule.scenario_name(i) for i in batch["scenario"][batch["islanding"]].tolist()]
            raise ValueError(
                f"outages that island buses have no power flow: {', '.join(names[:5])}; use model=power_flow_outages"
            )
        self._store()
        before, numbers = self._running, batch["scenario"].clone()
        if self.sequential and before is not None and len(numbers) == len(before.scenarios):
            self._running = self._prepared(batch, self._in_grid_order(before.state), first=False)
            same = self._running.given.changes is None and before.given.changes is None
            if same:  # else the moments are those of another problem
                kept = follow(before.descent, self._running.settings)
                self._running.descent = kept._replace(u=self._running.descent.u)
                self._running.steps_before = kept.steps.clone()
            return
        again = self.trainer.current_epoch > 0  # from where an earlier epoch has left these scenarios
        start = (self.vm[numbers].mT, self.va[numbers].mT) if again else self.start
        self._running = self._prepared(batch, start, first=True)

    def _prepared(self, batch: Batch, start: Any, first: bool) -> _Running:
        """A descent that has not begun yet."""
        eq, scenarios, settings = self.equations, self.scenarios(batch), self.settings_of(first)
        given = eq.batch(scenarios)
        state = starting_state(eq, scenarios, start, given)
        descent = start_descent(eq.unknowns(state), settings)
        best = descent.u.clone(), descent.best.clone()
        before = torch.zeros_like(descent.steps)
        return _Running(batch["scenario"].clone(), first, settings, given, state, descent, before, best)

    def _restore(self) -> None:
        """Take up the descent of a checkpoint."""
        saved, self._restored = self._restored, None
        running = self.trainer.datamodule.batch(saved["scenarios"].cpu().numpy())
        running = {key: value.to(self.device) for key, value in running.items()}
        self._running = self._prepared(running, self.start, bool(saved["first"]))
        tensors = {name: value.to(self.device) for name, value in saved["tensors"].items()}
        best = tensors.pop("best_unknowns"), tensors.pop("best_loss")
        self._running.steps_before = tensors.pop("steps_before")
        self._running.descent, self._running.best = DescentState(**tensors), best
        self._running.state = self.equations.with_unknowns(self._running.state, self._running.descent.u)

    def _in_grid_order(self, state: State) -> tuple[Tensor, Tensor]:
        return self.equations.in_grid_order(state.vm), self.equations.in_grid_order(state.va)

    @torch.no_grad()
    def _store(self) -> None:
        """Write the voltages of the running scenarios into the parameters."""
        running = self._running
        if running is None:
            return
        state = running.state
        if self.keep_best and bool(running.best[1].isfinite().all()):
            state = self.equations.with_unknowns(state, running.best[0])
        vm, va = self._in_grid_order(state)
        self.vm[running.scenarios], self.va[running.scenarios] = vm.mT, va.mT
        self.steps[running.scenarios] = running.descent.steps - running.steps_before
        self.history = self.history.new_tensor(self._points).reshape(-1, HISTORY_COLUMNS)

    @torch.no_grad()
    def _share(self) -> None:
        """Give all ranks the voltages of all scenarios; each has its own, every R-th from its number on."""
        self._store()
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if ranks > 1:
            for tensor in (self.vm.data, self.va.data, self.steps):
                mine = torch.zeros_like(tensor)
                mine[rank::ranks] = tensor[rank::ranks]
                dist.all_reduce(mine)
                tensor.copy_(mine)

    @override
    def on_train_start(self) -> None:
        if self._restored is None:
            self._running, self._points, self._seconds = None, [], 0.0

    @override
    def on_train_end(self) -> None:
        self._share()

    # ---------------------------------------------------------------------------------------------------- checkpoint

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        running = self._running
        if running is not None and self.trainer.world_size == 1:
            tensors = running.descent._asdict() | dict(zip(("best_unknowns", "best_loss"), running.best, strict=True))
            checkpoint["descent"] = {
                "tensors": tensors | {"steps_before": running.steps_before},
                "scenarios": running.scenarios,
                "first": running.first,
                "points": [list(map(float, point)) for point in self._points],
                "seconds": self._seconds,
            }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is None or "descent" not in checkpoint or self.trainer.state.fn != "fit":
            return
        saved = checkpoint["descent"]
        self._restored = {key: saved[key] for key in ("tensors", "scenarios", "first")}
        self._points, self._seconds = [tuple(point) for point in saved["points"]], saved["seconds"]

    # ---------------------------------------------------------------------------------------------------- evaluation

    def _solution(self, batch: Batch, scenarios: Scenarios) -> State:
        """Voltages of a batch as they are now, in the order of the grid, with the set-points of the batch."""
        vm, va = (value.detach()[batch["scenario"]].mT for value in (self.vm, self.va))
        eq = self.equations
        state = starting_state(eq, scenarios, (vm, va), eq.batch(scenarios))
        return State(*self._in_grid_order(state), state.share)

    def _step(self, batch: Batch, stage: Stage | None) -> dict[str, Tensor]:
        scenarios = self.scenarios(batch)
        state = self._solution(batch, scenarios)
        mismatch, target = self.mismatch(state.vm, state.va, scenarios)
        largest = mismatch.abs().amax(0)
        out = {key: batch[key] for key in ("scenario", "islanding")}
        out |= self.flow_outputs(state.vm, state.va, scenarios.status, everything=stage is None)
        out |= {"prediction": torch.polar(state.vm, state.va).mT, "converged": largest <= self.tol}
        out |= {"iterations": self.steps[batch["scenario"]], "max_mismatch": largest}
        if stage is None:
            return out
        reference = self.reference(scenarios)
        getattr(self, f"{stage}_errors").update(
            islanded=batch["islanding"], converged=out["converged"], iterations=out["iterations"], mismatch=mismatch,
            target=target, violations=self.violations(out["loading_percent"].mT / 100, state.vm),
            **self.difference(state.vm, state.va, reference),
        )  # fmt: skip
        return out | {"target": reference.v.mT, "loss": mismatch.square().mean()}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        out = self._step(batch, "test")
        rows: list[Any] = []
        if batch_idx == 0:
            rows = self.history.tolist()
            if self.compared_methods:
                columns = torch.arange(min(self.compare_scenarios, len(batch["scenario"])), device=self.device)
                rows += self.compare(
                    self.scenarios(batch, columns), self.compared_methods, self.tol, self.compare_iterations
                )
        return out | {"history": out["loss"].new_tensor(rows).reshape(-1, HISTORY_COLUMNS)}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, None)

    @override
    def on_validation_epoch_start(self) -> None:
        self._share()
        self.val_errors.reset()

    @override
    def on_test_epoch_start(self) -> None:
        self.test_errors.reset()
        self._compared = {}

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_errors("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.log_errors("test")
        self.log_comparison()

"""The course of a training: loss, metric, bytes and the strategy's own numbers, as a file and as figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from callbacks.figures import exchanges
from callbacks.low_rank import draw
from callbacks.run_record import write_json

LINKS = ("inter_node_bytes", "intra_node_bytes")


class TrainingHistory(pl.Callback):
    """Notes what a training went through, and draws it when the fit ends.

    The history is written to ``path`` after every epoch, as JSON:

    - ``epochs``: a row per epoch. ``epoch`` (from 1) and ``step`` when it ended, ``seconds`` of training so far
      (evaluations and earlier interruptions left out), ``loss`` (mean over batches and ranks), ``metric``, bytes of all
      ranks since the training began (``inter_node_bytes``, ``intra_node_bytes``, where the strategy counts), ``drift``
      (largest of all nodes and exchanges of the epoch, where the strategy measures it), ``metrics`` (those of
      ``more_metrics`` that were logged), and in ``strategy`` the numbers that the strategy reported when the epoch
      began;
    - ``phases``: ``step`` and ``epoch`` at which a phase of the strategy began, its name, and its report at that time;
    - ``curve``: training loss of every batch over optimizer steps, thinned to ``2 * curve_points`` at most by means
      over neighbours;
    - ``metric``: its name; ``sides``: full rank of the weights that the strategy factorises, the first one of those
      that become smaller (Sigma of a low-rank weight).

    Strategies may have ``phase`` and ``phase_begin``, ``drift``, ``ledger``, ``report()`` and ``full_ranks``; all are
    optional, and figures that have nothing to show are left out.

    Args:
        path: The file.
        figures: Functions of `callbacks.figures.exchanges`.
        figures_dir: Their folder; None draws nothing.
        metric: Logged metric that is noted after every epoch.
        curve_points: Points of the loss curve that are kept at least, once there are as many batches.
        more_metrics: Further logged metrics that are noted after every epoch.

    Raises:
        ValueError: For an unknown figure, or fewer than one point.
    """

    def __init__(
        self,
        path: str,
        figures: Sequence[str] = exchanges.FIGURES,
        figures_dir: str | None = None,
        metric: str = "val/accuracy",
        curve_points: int = 500,
        more_metrics: Sequence[str] = (),
    ) -> None:
        if unknown := [name for name in figures if name not in exchanges.FIGURES]:
            raise ValueError(
                f"callbacks.training_history.figures: {unknown[0]!r} is unknown; choose from "
                f"{', '.join(exchanges.FIGURES)}"
            )
        if curve_points < 1:
            raise ValueError(f"callbacks.training_history.curve_points={curve_points}: at least 1")
        self.path, self.figures, self.figures_dir = Path(path), tuple(figures), figures_dir
        self.metric, self.curve_points, self.more_metrics = metric, curve_points, tuple(more_metrics)
        self.history: dict[str, Any] = {
            "metric": metric, "epochs": [], "phases": [], "sides": {},
            "curve": {"width": 1, "filled": 0, "step": [], "loss": []},
        }  # fmt: skip
        self._row: dict[str, Any] | None = None  # of the running epoch
        self._phase: list[Any] = []  # the running one and where it began
        self._pending: list[tuple[int, Tensor]] = []  # losses of this rank that the others have not heard of
        self._drift: Tensor | float | None = None  # largest of this node in the running epoch
        self._seen_drift: Tensor | None = None
        self._base = dict.fromkeys(LINKS, 0.0)  # bytes of earlier ledgers
        self._seconds = 0.0  # up to `_since`
        self._since: float | None = None  # the clock runs; None: it stands
        self._fresh_metric = False
        self._device = torch.device("cpu")

    # ----------------------------------------------------------------------------------------------------- the clock

    def _now(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def _stop_clock(self) -> None:
        self._seconds, self._since = self._now(), None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._note_sides(trainer)
        self._since = time.perf_counter()

    def _note_sides(self, trainer: pl.Trainer) -> None:
        self.history["sides"] = getattr(trainer.strategy, "full_ranks", {}) | self.history["sides"]

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._fresh_metric = True
        if trainer.is_last_batch:  # checkpoints are saved after this hook, before the epoch ends
            self._close_epoch(trainer)
        self._since = time.perf_counter()

    # --------------------------------------------------------------------------------------------------------- steps

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note where epochs and phases begin."""
        report = getattr(trainer.strategy, "report", dict)
        if self._row is None:
            self._row = {"epoch": trainer.current_epoch + 1, "loss": 0.0, "batches": 0, "strategy": report()}
            self._drift = None
        phase = [getattr(trainer.strategy, name, None) for name in ("phase", "phase_begin")]
        if phase[0] is not None and phase != self._phase:
            self._phase = phase
            now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "phase": phase[0], "report": report()}
            self.history["phases"].append(now)
            self._note_sides(trainer)  # a callback may have exchanged weights since

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the batches of a step
            self._pending.append((trainer.global_step, loss.detach().double() * trainer.accumulate_grad_batches))
        drift = getattr(trainer.strategy, "drift", None)
        if isinstance(drift, Tensor) and drift is not self._seen_drift:  # every exchange makes a new one
            self._seen_drift, drift = drift, drift.double()
            self._drift = drift if self._drift is None else torch.maximum(torch.as_tensor(self._drift).to(drift), drift)

    def _flush(self) -> None:
        """Average the losses that are pending over the ranks and add them; called on all ranks together."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        losses = torch.stack([loss.to(self._device) for _, loss in pending])
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        for (step, _), loss in zip(pending, losses.tolist(), strict=True):
            add_to_curve(self.history["curve"], step, loss, 2 * self.curve_points)
            self._row["loss"] += loss
            self._row["batches"] += 1

    def _bytes(self, trainer: pl.Trainer) -> dict[str, float]:
        """Of all ranks since the training began; called on all ranks together."""
        ledger = getattr(trainer.strategy, "ledger", None)
        if ledger is None or not dist.is_initialized():
            return {}
        totals = ledger.totals()
        values = torch.tensor([totals[name] for name in LINKS], dtype=torch.float64, device=self._device)
        dist.all_reduce(values)
        before = next((row for row in reversed(self.history["epochs"]) if LINKS[0] in row), None)
        found = dict(zip(LINKS, values.tolist(), strict=True))
        if before is not None and any(found[name] + self._base[name] < before[name] for name in LINKS):
            self._base = {name: before[name] for name in LINKS}  # the ledger began anew: another number of processes
        return {name: found[name] + self._base[name] for name in LINKS}

    def _largest_drift(self) -> float | None:
        """Of all nodes in the running epoch so far; called on all ranks together."""
        drift = torch.as_tensor(-1.0 if self._drift is None else self._drift, dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(drift, op=dist.ReduceOp.MAX)
        return None if drift < 0 else float(drift)

    def _close_epoch(self, trainer: pl.Trainer) -> None:
        self._flush()
        row, self._row = self._row, None
        assert row is not None
        batches = row.pop("batches")
        row |= {"loss": row["loss"] / batches if batches else None, "step": trainer.global_step, "seconds": self._now()}
        value = trainer.callback_metrics.get(self.metric) if self._fresh_metric else None
        row["metric"] = None if value is None else float(value)
        if self.more_metrics:
            logged = trainer.callback_metrics if self._fresh_metric else {}
            row["metrics"] = {name: float(logged[name]) for name in self.more_metrics if name in logged}
        row |= self._bytes(trainer)
        if (drift := self._largest_drift()) is not None:
            row["drift"] = drift
        self._fresh_metric, self._drift = False, None
        self.history["epochs"].append(row)
        self._write(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._row is not None:
            self._close_epoch(trainer)

    # ----------------------------------------------------------------------------------------------------------- end

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.history)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        if not trainer.is_global_zero or trainer.fast_dev_run or not self.figures_dir:
            return
        plots = {name: lambda name=name: getattr(exchanges, name)(self.history) for name in self.figures}
        draw(trainer, plots, self.figures_dir, "callbacks.training_history.figures")

    # --------------------------------------------------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        # Lightning saves checkpoints on all ranks together.
        self._flush()
        self._drift = self._largest_drift()
        return {
            "history": self.history, "row": self._row, "phase": self._phase, "base": self._base,
            "seconds": self._now(), "drift": self._drift, "fresh_metric": self._fresh_metric,
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._row, self._phase = state_dict["history"], state_dict["row"], state_dict["phase"]
        self._base, self._seconds, self._drift = state_dict["base"], state_dict["seconds"], state_dict["drift"]
        self._fresh_metric = state_dict["fresh_metric"]


def add_to_curve(curve: dict[str, Any], step: int, loss: float, limit: int) -> None:
    """Add the loss of a batch; where that makes more than ``limit`` points, neighbours become one.

    Args:
        curve: ``step`` and ``loss`` of every point, which is the mean over ``width`` batches (the last one: over the
            ``filled`` that it has so far) and stands at the first of them.
        step: Optimizer steps taken when the batch was over.
        loss: Its loss.
        limit: Most points, an even number.
    """
    steps, losses = curve["step"], curve["loss"]
    if steps and curve["filled"] < curve["width"]:
        curve["filled"] += 1
        losses[-1] += (loss - losses[-1]) / curve["filled"]
        return
    if len(steps) == limit:
        steps[:] = steps[::2]
        losses[:] = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
        curve["width"] *= 2
    steps.append(step)
    losses.append(loss)
    curve["filled"] = 1

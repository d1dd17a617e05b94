"""Where the time of training steps goes: loading, transfer, forward, backward, update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.run_record import RunRecord
from parallel.phase_times import PhaseTimes

PHASES = ("loading", "transfer", "forward", "backward", "update")
_SKIPPED = 2  # steps of a training that set something up


class StepPhases(pl.Callback):
    """Mean seconds of the phases of a training step, on the clock of the device.

    - ``loading``: from the end of a step until the next batch is there, work of other callbacks in between included;
    - ``transfer``: to the device;
    - ``forward``: until the loss is known;
    - ``backward``: until gradients are, those of all processes where the strategy averages them meanwhile;
    - ``update``: the optimizer's step, and what a strategy does behind it.

    Evaluations and the first two steps of a training are left out. Logged after every epoch as ``phase/loading_s`` and
    so on; in results.json the means over the run, of the first process, are ``phases``. A module that steps by itself
    several times per batch has the sum of its passes in each phase.
    """

    def __init__(self) -> None:
        self._times: PhaseTimes | None = None
        self._cursor: Any = None  # moment at which the present phase began; None outside of steps
        self._steps = self._seen = 0
        self._sums: dict[str, float] = {}
        self._counted = 0
        self._unwrapped: Callable[..., Any] | None = None

    def _end(self, phase: str) -> None:
        if self._cursor is not None and self._times is not None:
            self._times.add(phase, self._cursor)
            self._cursor = self._times.now()

    def _begin(self) -> None:
        self._cursor = None if self._times is None else self._times.now()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._times, self._steps, self._seen = PhaseTimes(trainer.strategy.root_device), 0, 0
        self._unwrapped = to_device = trainer.strategy.batch_to_device

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not trainer.training:  # an evaluation within the epoch
                return to_device(*args, **kwargs)
            self._end("loading")
            batch = to_device(*args, **kwargs)
            self._end("transfer")
            return batch

        trainer.strategy.batch_to_device = timed  # type: ignore[method-assign]

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._end("loading")

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._end("forward")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end("backward")

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._end("update")
        self._steps, self._seen = self._steps + 1, self._seen + 1
        if self._seen == _SKIPPED and self._times is not None:
            self._times.take()
            self._steps = 0

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cursor = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._cursor = None
        sums, steps = ({} if self._times is None else self._times.take()), self._steps
        self._steps = 0
        if not steps or self._seen <= _SKIPPED:
            return
        for phase, seconds in sums.items():
            self._sums[phase] = self._sums.get(phase, 0.0) + seconds
        self._counted += steps
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                means = {phase: self._sums.get(phase, 0.0) / self._counted for phase in PHASES}
                callback.record["phases"] = means
        found = {f"phase/{phase}_s": sums.get(phase, 0.0) / steps for phase in PHASES}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def _unwrap(self, trainer: pl.Trainer) -> None:
        self._times = self._cursor = None
        if self._unwrapped is not None:
            trainer.strategy.__dict__.pop("batch_to_device", None)
            self._unwrapped = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unwrap(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._unwrap(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counted": self._counted}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums, self._counted = dict(state_dict["sums"]), state_dict["counted"]

"""Progress in a terminal and in a log file."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

log = logging.getLogger(__name__)


class Console(pl.Callback):
    """One line of progress: redrawn in place on a terminal, written every ``every_s`` seconds elsewhere.

    Lightning's bars draw one bar per epoch; runs of hundreds of short epochs and batch logs read better this way.

    Args:
        metrics: Names of ``trainer.callback_metrics`` to show; empty: those that start with ``train/loss`` or ``val/``,
            at most four.
        every_s: Seconds between two lines when the output is not a terminal.
        redraw_s: Seconds between two drawings on a terminal.
    """

    def __init__(self, metrics: list[str] | None = None, every_s: float = 5.0, redraw_s: float = 0.2) -> None:
        self.metrics, self.every_s, self.redraw_s = metrics or [], every_s, redraw_s
        self._next = 0.0
        self._begin = 0.0
        self._terminal = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.monotonic()
        self._terminal = trainer.is_global_zero and sys.stderr.isatty()
        self._next = self._begin + (self.redraw_s if self._terminal else 0.0)

    def _shown(self, trainer: pl.Trainer) -> str:
        values = trainer.callback_metrics
        names = self.metrics or [n for n in values if n.startswith("val/") or n == "train/loss"][:4]
        return "  ".join(f"{name} {float(values[name]):.5g}" for name in names if name in values)

    def _line(self, trainer: pl.Trainer, step: int) -> str:
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        steps = trainer.num_training_batches
        batch = f"{step}/{int(steps)}" if steps != float("inf") else str(step)
        elapsed = time.monotonic() - self._begin
        return f"epoch {trainer.current_epoch + 1}/{total}  step {batch}  {elapsed:.0f} s  {self._shown(trainer)}"

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now < self._next or not trainer.is_global_zero:
            return
        if self._terminal:
            self._next = now + self.redraw_s
            sys.stderr.write("\r\x1b[K" + self._line(trainer, batch_idx + 1))
            sys.stderr.flush()
        else:
            self._next = now + self.every_s
            log.info(self._line(trainer, batch_idx + 1))

    def _clear(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clear()
        if trainer.is_global_zero:
            elapsed = time.monotonic() - self._begin
            log.info(
                "trained %d epochs, %d steps in %.1f s  %s",
                trainer.current_epoch,
                trainer.global_step,
                elapsed,
                self._shown(trainer),
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._clear()

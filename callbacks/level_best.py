"""The best epoch of a level of a lottery-ticket search."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.level_report import measured
from callbacks.rewinding import weights_of

Mode = Literal["min", "max"]


class LevelBest:
    """Keeps the weights of the best epoch of a level by a validation metric.

    Args:
        monitor: Name of the metric; ``auto``, the highest ``val/accuracy`` where there is one, else the lowest
            ``val/loss``; None: nothing is kept.
        mode: Whether ``min`` or ``max`` of a metric that is named is best.

    Attributes:
        value: Of the metric in the best epoch, None so far.
        state: Weights of that epoch.
        metrics: What validation has measured in it.
        paper: The highest accuracy on the test images, which `lightning_modules.lottery` reports as published.

    Raises:
        ValueError: The mode is unknown.
    """

    def __init__(self, monitor: str | None, mode: Mode) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.iterative_pruning.mode={mode!r} is unknown; choose min or max")
        self.monitor, self.mode = monitor, mode
        self._warned = False  # that the metric is not there
        self.begin()

    def begin(self) -> None:
        """Forget the level before."""
        self.value: float | None = None
        self.state: dict[str, Tensor] | None = None
        self.metrics: dict[str, float] = {}
        self.paper: float | None = None

    def update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a validation."""
        name, mode = self.monitor, self.mode
        if name == "auto":
            highest = "val/accuracy" in trainer.callback_metrics
            name, mode = ("val/accuracy", "max") if highest else ("val/loss", "min")
        value = trainer.callback_metrics.get(name) if name else None
        if value is None or not math.isfinite(float(value)):
            if name and value is None and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"callbacks.iterative_pruning.monitor={self.monitor}: validation has not logged {name}, so no best "
                    f"weights are kept; it logs {', '.join(sorted(measured(trainer))) or 'nothing'}"
                )
            return
        value = float(value)
        if self.value is None or (value > self.value if mode == "max" else value < self.value):
            self.value, self.state, self.metrics = value, weights_of(pl_module), measured(trainer)

    def keep_highest(self, trainer: pl.Trainer) -> None:
        """Remember the highest accuracy on the test images."""
        if (accuracy := trainer.callback_metrics.get("paper/accuracy")) is not None:
            self.paper = max(float(accuracy), self.paper or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"value": self.value, "state": self.state, "metrics": self.metrics, "paper": self.paper}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; older ones lack some entries."""
        self.begin()
        for name, value in state.items():
            setattr(self, name, value)

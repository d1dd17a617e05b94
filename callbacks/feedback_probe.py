"""Whether feedback points downhill: angles to the gradient of backpropagation, block by block over the training."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.figures import feedback
from callbacks.low_rank import draw
from callbacks.run_record import RunRecord, write_json


class FeedbackProbe(pl.Callback):
    """Asks a module for the angles of its gradients on the first batch of every ``every``-th epoch, before its step.

    The module has a method ``probe(batch)`` that returns ``cosine``, ``norm`` and maybe ``alignment`` by block, and
    maybe ``staleness`` (`lightning_modules.feedback_training.FeedbackTraining`); others are not asked.

    To the loggers: ``feedback/cosine_<i>`` and ``feedback/grad_norm_<i>`` of block i, ``feedback/alignment_<i>``,
    ``feedback/staleness``, and ``feedback/cosine``, the mean over the hidden blocks. All of it as JSON in ``path``, and
    the last mean in results.json.

    Args:
        path: The file.
        every: Epochs; null: never.
        figures_dir: Folder of the figure; null draws nothing.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, path: str, every: int | None = 1, figures_dir: str | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"callbacks.feedback_probe.every={every}: at least 1, or null for never")
        self.path, self.every, self.figures_dir = Path(path), every, figures_dir
        self.history: list[dict[str, Any]] = []

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        due = self.every is not None and batch_idx == 0 and trainer.current_epoch % self.every == 0
        if not due or not trainer.is_global_zero or not hasattr(pl_module, "probe"):
            return
        found = pl_module.probe(batch)
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        for name in ("cosine", "norm", "alignment"):
            if name in found:
                row[name] = [found[name][i] for i in sorted(found[name])]
        row["blocks"] = sorted(found["cosine"])
        row["staleness"] = found.get("staleness")
        row["hidden_cosine"] = self._mean(row["cosine"][:-1])
        self.history.append(row)
        values = {f"feedback/cosine_{i}": value for i, value in found["cosine"].items()}
        values |= {f"feedback/grad_norm_{i}": value for i, value in found["norm"].items()}
        values |= {f"feedback/alignment_{i}": value for i, value in found.get("alignment", {}).items()}
        values |= {"feedback/staleness": row["staleness"], "feedback/cosine": row["hidden_cosine"]}
        values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    @staticmethod
    def _mean(values: list[float]) -> float | None:
        finite = [value for value in values if math.isfinite(value)]
        return statistics.fmean(finite) if finite else None

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self.history:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["feedback"] = {"cosine": self.history[-1]["hidden_cosine"]}
        if trainer.fast_dev_run:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.history)
        if self.figures_dir:
            plots = {"cosine_by_block": lambda: feedback.cosine_by_block(self.history)}
            draw(trainer, plots, self.figures_dir, "callbacks.feedback_probe")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

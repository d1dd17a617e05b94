"""The step of `ReduceLROnPlateau` that Lightning's checkpoints miss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override


class PlateauStep(pl.Callback):
    """Gives a resumed run the plateau step of the last epoch before its checkpoint.

    Lightning saves after the validation of an epoch and steps plateau schedulers after that, and a resumed run skips
    what is left of the epoch: it would count one epoch too few. The metrics of the checkpoint make up for it.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, torch.Tensor] = {}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        names = {c.monitor for c in trainer.lr_scheduler_configs if c.reduce_on_plateau}
        metrics = trainer.callback_metrics
        checkpoint["plateau_metrics"] = {n: metrics[n].detach().cpu() for n in names if n in metrics}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._metrics = checkpoint.get("plateau_metrics", {})

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau or config.interval != "epoch" or config.monitor not in self._metrics:
                continue
            if config.scheduler.last_epoch < trainer.current_epoch // config.frequency:
                config.scheduler.step(self._metrics[config.monitor])
        self._metrics = {}

"""Trainings one after the other in a single fit: how each of them ends, and how the next one begins."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


def refuse_early_stopping_behind(trainer: pl.Trainer, callback: pl.Callback, key: str) -> None:
    """Raise ValueError where an `EarlyStopping` comes after a callback that must see whether it has stopped."""
    if any(isinstance(c, EarlyStopping) for c in trainer.callbacks[trainer.callbacks.index(callback) :]):
        raise ValueError(f"{key}: must stand behind callbacks.early_stopping, which ends a part of the fit")


def refuse_stopping_after_validation(trainer: pl.Trainer, key: str) -> None:
    """Raise ValueError where `EarlyStopping` decides only when the validation of an epoch is over."""
    if any(c._check_on_train_epoch_end for c in trainer.callbacks if isinstance(c, EarlyStopping)):
        raise ValueError(
            f"callbacks.early_stopping.check_on_train_epoch_end: must be false beside {key}, which ends a part of the "
            "fit in the validation that stops it"
        )


def stopped_early(trainer: pl.Trainer) -> bool:
    """Whether an `EarlyStopping` wants the running part of the fit to end."""
    return trainer.should_stop and any(isinstance(c, EarlyStopping) for c in trainer.callbacks)


def begin_stopping_anew(trainer: pl.Trainer) -> None:
    """Let `EarlyStopping` forget the part before."""
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            callback.wait_count, callback.stopped_epoch = 0, 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def begin_checkpoints_anew(trainer: pl.Trainer) -> None:
    """Let `ModelCheckpoint` forget the best values of the part before, which are not comparable with what comes."""
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.current_score = callback.best_model_score = None
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)


def scale_rates(trainer: pl.Trainer, factor: float) -> None:
    """Begin with another learning rate, and the schedule with it."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in ("lr", "initial_lr"):
                if name in group:
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]

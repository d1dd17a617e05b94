"""Back to an earlier point of a training: weights, optimizers, schedules."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.segments import begin_checkpoints_anew, begin_stopping_anew
from networks.masks import MASK

# Attributes of schedulers that hold how long a training they are made for: cosine, warm-up and cosine, one cycle.
_LENGTHS = ("T_max", "total_steps")


def rewind_point(rewind: str, epochs_per_level: int | None, key: str) -> tuple[int, int]:
    """K of ``epoch_k`` and of ``step_k``, 0 for the others."""
    if rewind in ("init", "lr_only"):
        return 0, 0
    match = re.fullmatch(r"(epoch|step)_(\d+)", str(rewind))
    if match is None or int(match[2]) < 1:
        raise ValueError(
            f"{key}.rewind={rewind!r} is unknown; choose init, lr_only, epoch_k (epoch_1, epoch_2, ...) or step_k"
        )
    if match[1] == "step":
        return 0, int(match[2])
    if epochs_per_level is not None and int(match[2]) >= epochs_per_level:
        raise ValueError(
            f"{key}.rewind={rewind}: level 0 has {epochs_per_level} epochs (epochs_per_level), so the latest is "
            f"epoch_{epochs_per_level - 1}"
        )
    return int(match[2]), 0


def training_point(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Where a training can go back to: copies of weights, optimizers and schedules, epoch and step."""
    return {
        "weights": weights_of(pl_module),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
    }


def restart(trainer: pl.Trainer, point: Mapping[str, Any]) -> None:
    """Give optimizers and schedules their state of a `training_point` and let callbacks forget their best values.

    The weights are not touched (`set_weights`).
    """
    for optimizer, state in zip(trainer.optimizers, point["optimizers"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    for config, state in zip(trainer.lr_scheduler_configs, point["schedulers"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))
    begin_stopping_anew(trainer)
    begin_checkpoints_anew(trainer)
    if forget := getattr(trainer.strategy, "parameters_changed", None):
        forget()


def weights_of(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """Copies of all parameters and buffers but the masks, on the CPU."""
    state = pl_module.state_dict()
    return {name: t.detach().cpu().clone() for name, t in state.items() if name.rpartition(".")[2] != MASK}


def set_weights(pl_module: pl.LightningModule, state: Mapping[str, Tensor]) -> None:
    """Copy parameters and buffers back, in place."""
    own = pl_module.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def check_schedules(trainer: pl.Trainer, epochs: int) -> None:
    """Refuse schedules that are made for a training of another length than a level.

    Args:
        trainer: In a fit.
        epochs: Of a level.

    Raises:
        ValueError: Names the argument of the schedule, and both lengths.
    """
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    steps = max(1, math.ceil(steps)) if math.isfinite(steps) else math.inf
    for config in trainer.lr_scheduler_configs:
        length = epochs * (1 if config.interval == "epoch" else steps)
        for name in _LENGTHS:
            found = getattr(config.scheduler, name, None)
            if found is not None and found != length:
                raise ValueError(
                    f"model.scheduler: {type(config.scheduler).__name__} is made for {found} {config.interval}s "
                    f"({name}), a level of callbacks.iterative_pruning has {length} ({epochs} "
                    f"epochs): set trainer.max_epochs={epochs}, or give the schedule that length"
                )

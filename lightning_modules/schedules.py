"""Learning rates over a training: warm-up, cosine, cool-down, as one schedule that resumes exactly."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, SupportsFloat

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

Unit = Literal["epochs", "steps"]


class WarmupCosine(LRScheduler):
    """Linear warm-up, half a cosine, and a cool-down at its lowest rate.

    With n steps of warm-up, c of cool-down and T in all, step t (from 0) takes

    - t < n: ``warmup_lr + (lr - warmup_lr) t / n``;
    - n <= t < T - c: ``min_lr + (lr - min_lr) (1 + cos(pi (t - n)^k / (T - c - n)^k)) / 2``;
    - T - c <= t: ``min_lr``.

    Steps are whatever the module steps in. Per optimizer step (``scheduler_interval: step``) a module built on
    `lr_scheduler` fills in ``steps_per_epoch`` and, where it is null, ``total_epochs``; per epoch the defaults are
    right with every module.

    Args:
        optimizer: Its groups may have different rates; ``warmup_lr`` and ``min_lr`` are the same for all.
        total_epochs: Length T of the training, in epochs.
        warmup: Length of the warm-up, in ``unit``.
        cooldown: Length of the cool-down, in ``unit``.
        unit: ``epochs``, of which fractions are allowed, or ``steps``.
        warmup_lr: Rate of the first step, if there is a warm-up.
        min_lr: Rate at the end of the cosine.
        k_decay: k: exponent of time; below 1 the rate falls earlier.
        steps_per_epoch: Steps of the schedule in an epoch.
        last_epoch: Step to continue after; -1: the beginning.

    Where warm-up and cool-down leave nothing of a training, a short trial for instance, they are shortened in
    proportion to half of it, with a warning.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_epochs: float | None = None,
        warmup: float = 0,
        cooldown: float = 0,
        unit: Unit = "epochs",
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        k_decay: float = 1.0,
        steps_per_epoch: int = 1,
        last_epoch: int = -1,
    ) -> None:
        if unit not in ("epochs", "steps"):
            raise ValueError(f"model.scheduler.unit={unit!r} is unknown; choose epochs or steps")
        for key, value in {"warmup": warmup, "cooldown": cooldown, "warmup_lr": warmup_lr, "min_lr": min_lr}.items():
            if value < 0:
                raise ValueError(f"model.scheduler.{key}={value}: must not be negative")
        if k_decay <= 0:
            raise ValueError(f"model.scheduler.k_decay={k_decay}: must be above 0")
        if total_epochs is None or total_epochs <= 0:
            raise ValueError(
                f"model.scheduler.total_epochs={total_epochs}: set trainer.max_epochs or trainer.max_steps, or give "
                "the number of epochs"
            )
        length = steps_per_epoch if unit == "epochs" else 1
        self.warmup_steps, self.cooldown_steps = round(warmup * length), round(cooldown * length)
        self.total_steps = round(total_epochs * steps_per_epoch)
        if (around := self.warmup_steps + self.cooldown_steps) >= self.total_steps:
            rank_zero_warn(
                f"model.scheduler: {self.warmup_steps} steps of warm-up and {self.cooldown_steps} of cool-down leave "
                f"nothing of a training of {self.total_steps}; they are shortened to half of it"
            )
            self.warmup_steps, self.cooldown_steps = (
                part * self.total_steps // (2 * around) for part in (self.warmup_steps, self.cooldown_steps)
            )
        self.warmup_lr, self.min_lr, self.k_decay = warmup_lr, min_lr, k_decay
        super().__init__(optimizer, last_epoch)

    @override
    def get_lr(self) -> list[float]:
        """Rates of all groups at the current step, in closed form."""
        return [self._rate(base) for base in self.base_lrs]

    def _rate(self, base: float) -> float:
        step, end = self.last_epoch, self.total_steps - self.cooldown_steps
        if step < self.warmup_steps:
            return self.warmup_lr + (base - self.warmup_lr) * step / self.warmup_steps
        if step >= end:
            return self.min_lr
        done = ((step - self.warmup_steps) / (end - self.warmup_steps)) ** self.k_decay
        return self.min_lr + (base - self.min_lr) * (1 + math.cos(math.pi * done)) / 2


def lr_scheduler(
    make: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    trainer: pl.Trainer,
    interval: Literal["epoch", "step"],
) -> Any:
    """Build a scheduler from its partial, and tell it how long the training is if it asks.

    A scheduler that steps with the optimizer and has an argument ``steps_per_epoch`` gets it from the Trainer
    (accumulated batches count once), and as ``total_epochs`` what the Trainer expects, which knows ``max_steps`` too,
    unless another number than ``trainer.max_epochs`` was given.

    Args:
        make: Partial that takes the optimizer.
        optimizer: The optimizer.
        trainer: Of the running fit.
        interval: When the scheduler steps.
    """
    parameters = inspect.signature(make).parameters
    if interval == "epoch" or "steps_per_epoch" not in parameters:
        return make(optimizer)
    steps = _steps_per_epoch(trainer)
    total = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else steps * trainer.max_epochs
    if trainer.max_steps >= 0:
        total = min(total, trainer.max_steps)
    given = make.keywords if isinstance(make, functools.partial) else {}
    known: dict[str, Any] = {"steps_per_epoch": steps}
    if given.get("total_epochs") in (None, trainer.max_epochs) and math.isfinite(total):
        known["total_epochs"] = total / steps
    return make(optimizer, **known)


def _steps_per_epoch(trainer: pl.Trainer) -> int:
    """Optimizer steps of an epoch.

    Not by ``trainer.estimated_stepping_batches``: that builds the Trainer's own loader before a checkpoint's position
    in it has been read, and the position is lost.
    """
    source = trainer.datamodule if trainer.datamodule is not None else trainer.lightning_module
    batches, limit = len(source.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


class WarmupPlateau(ReduceLROnPlateau):
    """Linear warm-up by epochs, then `ReduceLROnPlateau` (Huber et al., arXiv 2508.07706).

    Epoch e of the first ``warmup`` ones has ``warmup_lr + e / warmup (lr - warmup_lr)``, the one after them ``lr``. For
    small batches, whose rate lies below ``warmup_lr``, the warm-up goes down.

    Args:
        optimizer: Its rates are those after the warm-up.
        warmup: Epochs.
        warmup_lr: Rate of the first epoch.
        **plateau: Of `ReduceLROnPlateau`, which sees the metric from the end of the warm-up on.

    Raises:
        ValueError: If ``warmup`` is negative.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 5, warmup_lr: float = 0.1, **plateau: Any) -> None:
        if warmup < 0:
            raise ValueError(f"model.scheduler.warmup={warmup}: give 0 or more epochs")
        self.warmup, self.warmup_lr = warmup, warmup_lr
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, **plateau)
        self._warm_up(0)

    def _warm_up(self, epoch: int) -> None:
        if epoch > self.warmup:
            return
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            share = epoch / self.warmup if self.warmup else 1.0
            group["lr"] = self.warmup_lr + share * (peak - self.warmup_lr)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @override
    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:
        """At the end of an epoch, with the watched metric."""
        if self.last_epoch < self.warmup:
            self.last_epoch += 1
            self._warm_up(self.last_epoch)
        else:
            super().step(metrics, epoch)

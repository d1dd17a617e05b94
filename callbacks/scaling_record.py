"""ScalingRecord: what a parallel training was, in numbers that runs are compared by."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.run_record import RunRecord

TRAINING = "fit/train"
LOGGED = {
    "devices": "n",
    "local_batch_size": "lbs",
    "global_batch_size": "gbs",
    "updates": "updates",
    "samples": "samples",
    "kappa_kw": "kappa_kw",
}
"""Fields of the record -> names under ``scaling/`` of loggers."""


class ScalingRecord(pl.Callback):
    """Writes the size of a training into results.json (``scaling``) and logs it (``scaling/n``, ``lbs``, ``gbs`` ...).

    ====================== =====================================================================================
    field                  meaning (docs/experiments/energy_scaling.md)
    ====================== =====================================================================================
    devices, nodes         n processes, m machines
    local_batch_size       LBS, samples of an optimizer step on one device
    global_batch_size      GBS, on all of them
    num_samples            N, samples of the training set as the loader has it
    epochs                 passes over it that were made; a fraction where training ended within one
    samples, updates       S that went through training, U optimizer steps; ``device_updates`` n U
    device_hours           H of training alone; ``energy_kwh`` E, ``kappa_kw`` E / H, of all machines
    ====================== =====================================================================================

    The last two rows need the energy callback, and are complete when the run ends.
    """

    def __init__(self) -> None:
        self._record: RunRecord | None = None
        self._loggers: list[Any] = []
        self._step = 0

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record = next((c for c in trainer.callbacks if isinstance(c, RunRecord)), None)
        if self._record is None or not trainer.is_global_zero:
            return
        self._loggers, self._step = trainer.loggers, trainer.global_step
        self._record.record["scaling"] = sizes(trainer)

    def end_run(self, status: str = "completed") -> None:
        """Add energy and time, which the energy callback has reported by now; called by the runner."""
        scaling = self._record.record.get("scaling") if self._record is not None else None
        if not scaling:
            return
        energy = self._record.record.get("energy") or {}  # type: ignore[union-attr]
        if stage := (energy.get("stages") or {}).get(TRAINING):
            scaling |= {"samples": stage["samples"], "updates": stage["updates"]}
            scaling |= {"device_updates": stage["updates"] * scaling["devices"]}
            scaling |= {"device_hours": stage["device_hours"], "energy_kwh": stage["it_kwh"]}
            if stage["device_hours"]:
                scaling["kappa_kw"] = stage["it_kwh"] / stage["device_hours"]
        found = {f"scaling/{name}": float(scaling[key]) for key, name in LOGGED.items() if scaling.get(key) is not None}
        for logger in self._loggers:
            logger.log_metrics(found, step=self._step)


def sizes(trainer: pl.Trainer) -> dict[str, Any]:
    """What is known of a training without its energy; fields that the loader does not tell are left out."""
    devices, steps, loader = trainer.world_size, trainer.global_step, trainer.train_dataloader
    found: dict[str, Any] = {"devices": devices, "nodes": trainer.num_nodes, "updates": steps}
    found["device_updates"] = devices * steps
    layout = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    shares = layout.get("num_replicas", devices)  # ranks with different samples
    if isinstance(size := getattr(loader, "batch_size", None), int):
        total = size * shares * trainer.accumulate_grad_batches
        # Where devices share the work on a sample, one of them has a fraction of it.
        found |= {"global_batch_size": total, "local_batch_size": total // devices or total / devices}
        found["samples"] = total * steps
    data = getattr(loader, "dataset", None)
    if isinstance(data, Sized) and isinstance(loader, Sized) and len(loader):
        found |= {"num_samples": len(data), "epochs": steps * trainer.accumulate_grad_batches / len(loader)}
    return found

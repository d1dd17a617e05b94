"""What every process of a training needs: time and CPU time per epoch, memory at its peak."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from callbacks.gathering import gather_to_rank_zero
from callbacks.run_record import RunRecord


class Footprint(pl.Callback):
    """Notes time and memory of every process of a training, under ``processes`` in results.json.

    A row per rank: ``wall_s`` and ``cpu_s``, a number per epoch of training without its evaluations, and ``items``, how
    many images or windows the process has seen in it; ``before_mib`` and
    ``peak_mib``, memory when training began and at the peak of its steps until the first evaluation: what evaluations,
    checkpoints and figures need, and only some processes make, is left out. CPU time is that of all threads of the
    process, which others on the same cores do not prolong. Memory is what torch has allocated on a CUDA device;
    otherwise what is resident of the process, libraries and data included (Linux; elsewhere it is left out).

    Epochs are those since the run was started or resumed. The first one pays for what is set up once.

    To the loggers after every epoch: ``time/items_per_s`` of all processes together, by the clock of the first, and,
    for modules with ``num_samples``, ``time/samples_per_s``: items times weight samples.
    """

    def __init__(self) -> None:
        self.processes: list[dict[str, Any]] = []
        self._begin: tuple[float, float] | None = None  # the clocks run
        self._row: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------------- clocks

    def _now(self, trainer: pl.Trainer) -> tuple[float, float]:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    def _stop(self, trainer: pl.Trainer) -> None:
        begin, self._begin = self._begin, None
        if begin is not None and self._row["wall_s"]:
            for name, since, now in zip(("wall_s", "cpu_s"), begin, self._now(trainer), strict=True):
                self._row[name][-1] += now - since
            peak = peak_mib(trainer.strategy.root_device)
            if "before_mib" in self._row and peak is not None:
                # Linux counts the pages of the peak and those in use apart, the former a little late.
                self._row.setdefault("peak_mib", max(peak, self._row["before_mib"]))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._row = {"rank": trainer.global_rank, "wall_s": [], "cpu_s": [], "items": []}
        before = start_of_peak(trainer.strategy.root_device)
        self._row |= {} if before is None else {"before_mib": before}

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, zero in (("wall_s", 0.0), ("cpu_s", 0.0), ("items", 0)):
            self._row[name].append(zero)
        self._begin = self._now(trainer)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begin is not None:
            self._stop(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._row.get("wall_s"):
            self._begin = self._now(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._row.get("items"):
            # The least: random views may make several images of one.
            sizes = [len(x) for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.ndim]
            self._row["items"][-1] += min(sizes, default=0)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(trainer)
        if not self._row["wall_s"] or not self._row["wall_s"][-1]:  # resumed at the end of an epoch
            return
        shares = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        found = {"time/items_per_s": shares * self._row["items"][-1] / self._row["wall_s"][-1]}
        if isinstance(samples := getattr(pl_module, "num_samples", None), int):
            found["time/samples_per_s"] = samples * found["time/items_per_s"]
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    # ---------------------------------------------------------------------------------------------------------- end

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = None
        rows = gather_to_rank_zero(self._row)
        if rows is None:
            return
        self.processes = rows
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.record["processes"] = rows

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._begin = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._begin = None


def start_of_peak(device: torch.device) -> float | None:
    """Forget the highest memory so far; what is in use now, MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):  # not everywhere allowed: then the peak is that since the process began
        Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def peak_mib(device: torch.device) -> float | None:
    """Highest memory since `start_of_peak`, MiB."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status_mib("VmHWM")


def _status_mib(field: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None

"""``results.json``: what a run is, how far it came and what came out, on disk at every moment."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "numpy", "wandb", "codecarbon")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that a crash leaves the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            json.dump(content, file, indent=2, allow_nan=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Plain numbers of ``trainer.callback_metrics``."""
    return {name: float(value) for name, value in metrics.items()}


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the program and whether the working tree differs from it; empty outside of git."""
    try:
        run = [
            subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": run[0].stdout.strip(), "dirty": bool(run[1].stdout.strip())}


def hardware() -> dict[str, Any]:
    """Processor, cores and CUDA devices of this machine."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": os.cpu_count(), "cuda": devices, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class RunRecord(pl.Callback):
    """Keeps ``<run_dir>/results.json`` current and puts the configuration into every checkpoint.

    The file is rewritten when a stage starts, after every validation and at the end, so that a killed run leaves its
    last state. A run that ends before its first stage begins (a refused ``resume``) leaves the record as it found it.

    ``status`` is ``running``, ``completed``, ``interrupted`` or ``failed`` (a killed run stays ``running``). Times are
    in seconds; a resumed run keeps the records of its earlier parts under ``earlier``.

    Args:
        run_dir: Folder of the run.
        config: The resolved configuration as plain data; `runner.load` rebuilds module and data from it.
    """

    def __init__(self, run_dir: str, config: dict[str, Any]) -> None:
        self.path = Path(run_dir) / "results.json"
        self.config = config
        self.computing = False  # true once a stage has begun: setup is over, errors are no longer input errors
        self.costs: dict[str, float] = {}  # energy; unlike metrics it differs between equal runs
        self._begin = time.monotonic()
        self._stage_begin = self._begin
        earlier = self._earlier()
        self._found = earlier[-1] if earlier else None  # the record of the run that this one continues
        self.record: dict[str, Any] = {
            "status": "running",
            "name": config.get("name"),
            "run_dir": str(run_dir),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {},
            "epoch": None,
            "global_step": None,
            "metrics": {},
            "best_checkpoint": None,
            "world_size": None,
            "parameters": None,
            "wandb_run_id": earlier[-1].get("wandb_run_id") if earlier else None,
            "git": git_state(Path(__file__).parents[1]),
            "versions": versions(),
            "hardware": hardware(),
            "earlier": [{k: v for k, v in e.items() if k not in ("earlier", "config")} for e in earlier],
            "config": config,
        }

    def _earlier(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):
            last = json.loads(self.path.read_text())
            return [*last.get("earlier", []), last]
        return []

    def withdraw(self) -> bool:
        """Put back the record that this run has found, if it has computed nothing; whether it has."""
        if self.computing or self._found is None:
            return False
        write_json(self.path, self._found)
        return True

    def update(self, **values: Any) -> None:
        """Set fields of the record and write the file."""
        self.record.update(values)
        self.record["seconds"]["total"] = round(time.monotonic() - self._begin, 3)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.record)

    def _progress(self, trainer: pl.Trainer, **values: Any) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.fast_dev_run or trainer.sanity_checking:
            return
        metrics = {k: v for k, v in scalars(trainer.callback_metrics).items() if not math.isinf(v)}
        self.record["metrics"] |= metrics
        if trainer.state.fn == "fit":
            values |= {"epoch": trainer.current_epoch, "global_step": trainer.global_step}
        self.update(world_size=trainer.world_size, **values)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stage_begin = time.monotonic()
        if trainer.is_global_zero:
            self.update(world_size=trainer.world_size)

    def _started(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.computing = True

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _started

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        name = str(getattr(stage, "value", stage))
        self.record["seconds"][name] = round(time.monotonic() - self._stage_begin, 3)
        self._progress(trainer)

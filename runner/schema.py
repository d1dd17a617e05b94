"""The typed top level of a configuration: unknown or ill-typed keys are refused while Hydra composes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import ListConfig, OmegaConf

from runner.stamp import run_stamp
from runner.wandb_key import wandb_offline


class OnFailure(Enum):
    """What a sweep does after a failed job."""

    proceed = "proceed"
    stop = "stop"


@dataclass
class Run:
    """Where the run writes."""

    # The one place that asks Hydra for the folder; everything else says ${run.dir}.
    dir: str = "${hydra:runtime.output_dir}"
    # How W&B groups runs: all jobs of a sweep together (run.py sets it), else by experiment.
    group: str = "${name}"
    job_type: str = "${job_type:${train}}"
    label: str = "${name}-seed${seed}"  # name of the run in dashboards; jobs of a sweep get their number


@dataclass
class Launch:
    """How the supervisor treats the processes of a job (sweeps and several devices)."""

    on_failure: OnFailure = OnFailure.proceed
    timeout_s: float | None = None
    retries: int = 0


@dataclass
class Cluster:
    """Nodes that a strategy sees, and the network between them; simulated ones where that is asked for.

    The defaults stand here and not in conf/config.yaml, which would override what ``trainer=cluster_2x2`` sets.
    """

    local_size: int | None = None  # processes of a node; null: the devices of a machine
    rate_mbit: float | None = None  # emulated bandwidth between nodes, Mbit/s; null: the real network
    latency_ms: float = 0.0  # emulated latency between nodes
    compute_ms: float = 0.0  # sleep in every training step, as if an accelerator computed


@dataclass
class Config:
    """Top-level keys; the groups (data, model, trainer, ...) are checked against signatures by `runner.check`."""

    name: str = "run"
    seed: int = 0
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    train: bool = True
    validate: bool = False
    test: bool = True
    predict: bool = False
    check: bool = False
    ckpt_path: str | None = "auto"
    optimized_metric: str | None = None
    num_threads: int | None = None
    data_dir: str | None = None
    run: Run = field(default_factory=Run)
    launch: Launch = field(default_factory=Launch)
    cluster: Cluster = field(default_factory=Cluster)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


def _number(factor: Any) -> float:
    """A factor of a product; ``trainer.devices`` may be a number, a list of devices, or something that is neither.

    Raises:
        ValueError: Says what is needed instead.
    """
    if isinstance(factor, list | tuple | ListConfig):
        return len(factor)
    listed = [part for part in factor.split(",") if part.strip()] if isinstance(factor, str) else []
    if len(listed) > 1 or (isinstance(factor, str) and factor.endswith(",")):
        return len(listed)  # "0,1": these devices
    if isinstance(factor, str) and factor.isdigit():
        return int(factor)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 0:
        raise ValueError(
            f"{factor} is no number to multiply by; where batches or rates are multiples of the devices, set "
            "trainer.devices to their number (auto and -1 are known too late)"
        )
    return factor


def register() -> None:
    """Make the schema and the resolvers known to Hydra; calling it again changes nothing.

    Resolvers: ``${stamp:}`` (`runner.stamp`), ``${count:${list}}`` (length of a list), ``${wandb_offline:}``,
    ``${days:steps,steps_per_day}`` (rounded up), ``${part:0.5,number}`` (rounded down), ``${product:a,b,...}``,
    ``${job_type:...}`` (``train`` or ``evaluate``).
    """
    ConfigStore.instance().store(name="run_schema", node=Config)
    OmegaConf.register_new_resolver("stamp", run_stamp, replace=True)
    OmegaConf.register_new_resolver("count", len, replace=True)
    OmegaConf.register_new_resolver("days", lambda steps, day: -(-steps // day), replace=True)
    OmegaConf.register_new_resolver("part", lambda part, number: int(part * _number(number)), replace=True)
    OmegaConf.register_new_resolver("product", lambda *factors: math.prod(map(_number, factors)), replace=True)
    OmegaConf.register_new_resolver("job_type", lambda train: "train" if train else "evaluate", replace=True)
    OmegaConf.register_new_resolver("wandb_offline", wandb_offline, replace=True)

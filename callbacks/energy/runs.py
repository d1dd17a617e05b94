"""Finished runs as the energy study sees them: training and inference of each, and the machine they ran on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.energy.node import NodeProfile, profile_of
from callbacks.energy.record import read_file
from callbacks.energy.summary import J_PER_KWH, TRAIN

TRAINING, INFERENCE = "training", "inference"
PHASES = {TRAINING: (TRAIN,), INFERENCE: ("predict", "test")}
"""Stages of each, the best one first: testing computes errors beside its forecasts, prediction does not."""


@dataclass(frozen=True)
class Machine:
    """What a run was computed on.

    Attributes:
        label: For tables.
        device: ``cpu`` or ``gpu``.
        devices: Processes (of a GPU run: GPUs) of the run.
        threads: Busy CPU threads of a CPU run.
        nameplate_w: "TDP" of what computed, if known.
        profile: That the run was configured with.
    """

    label: str
    device: str
    devices: int
    threads: int
    nameplate_w: float | None
    profile: NodeProfile | None


@dataclass(frozen=True)
class Phase:
    """Training or inference of one run.

    Attributes:
        stage: The stage that stands for it, of `PHASES` the first one that the run had.
        seconds: Time in it.
        joules: Energy of all machines.
        estimated_j: The part that no instrument has measured.
        samples: Of all ranks.
        updates: Optimiser steps.
        device_hours: Processes times time.
        idle_gpus_j: Energy of GPUs that did not compute; None if it cannot be told.
        batch_size: Samples of a step over all devices; None if the configuration does not say.
    """

    stage: str
    seconds: float
    joules: float
    estimated_j: float
    samples: int
    updates: int
    device_hours: float
    idle_gpus_j: float | None
    batch_size: int | None


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        name: Its folder, as seen from the folder that was asked for.
        experiment: The experiment that was chosen, with its variant (``energy_measurement/load``), else the ``name`` of
            the configuration; without ``_training`` or ``_inference`` at its end: jobs of their own for the two belong
            together.
        task: Class of the module and number of parameters: runs of one experiment that differ here are kept apart.
        machine: What it was computed on.
        phases: By ``training`` and ``inference``; those that it had.
        notes: What to know about its numbers.
    """

    name: str
    experiment: str
    task: tuple[str, int]
    machine: Machine
    phases: Mapping[str, Phase]
    notes: tuple[str, ...]


def read_runs(folders: Sequence[Path], tdp_w: float | None = None) -> tuple[list[Run], dict[str, str]]:
    """Finished runs below some folders.

    Args:
        folders: Folders of runs or of sweeps.
        tdp_w: See `Assumptions`.

    Returns:
        The runs, in the order of their names, and name -> reason of those that are left out.
    """
    runs, skipped = [], {}
    for name, path in _results(folders):
        try:
            run = _read_run(name, path, tdp_w)
        except (KeyError, TypeError, ValueError) as error:
            skipped[name] = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        else:
            runs.append(run)
    return runs, skipped


def _results(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, ``results.json``), every run once. Names do not depend on where the folders lie."""
    found: dict[Path, str] = {}
    for folder in folders:
        paths = sorted(folder.rglob("results.json"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no results.json in or below it; name folders of runs or of a sweep.")
        root = folder.resolve()
        for path in paths:
            inside = path.resolve().parent.relative_to(root).as_posix()
            found.setdefault(path.resolve(), root.name if inside == "." else f"{root.name}/{inside}")
    return sorted((name, path) for path, name in found.items())


def _read_run(name: str, path: Path, tdp_w: float | None) -> Run:
    result = json.loads(path.read_text())
    if result.get("status") != "completed":
        raise ValueError(f"status {result.get('status')!r}: only completed runs are compared")
    energy, config = result.get("energy"), result.get("config") or {}
    if not energy or not energy.get("stages"):
        raise ValueError("no energy was recorded; callbacks.energy was off")
    machine, gpu_channels = _machine(result, energy, config, tdp_w)
    idle = _IdleGpus(path.parent / "energy", energy, machine, gpu_channels)
    phases = {}
    for phase in PHASES:
        if (stage := _stage_of(phase, energy)) is not None:
            phases[phase] = _phase(stage, energy["stages"][stage], idle, config.get("data") or {})
    if not phases:
        raise ValueError("neither training nor test or predict went through a sample")
    return Run(
        name=name,
        experiment=re.sub(r"_(training|inference)$", "", _experiment(path.parent, config, result)),
        task=(
            str((config.get("model") or {}).get("_target_", "")).rpartition(".")[2],
            int(result.get("parameters") or 0),
        ),
        machine=machine,
        phases=phases,
        notes=tuple(_notes(energy, phases)),
    )


def _experiment(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What was chosen on the command line; all jobs of a sweep have one name, whatever they do."""
    import yaml

    name = str(config.get("name") or result.get("name") or "run")
    try:
        choices = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())["hydra"]["runtime"]["choices"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return name
    chosen = str(choices.get("experiment") or "")
    variant = choices.get(f"experiment/{chosen}")
    return f"{chosen}/{variant}" if chosen and variant else chosen or name


def _stage_of(phase: str, energy: Mapping[str, Any]) -> str | None:
    """The stage of a run that stands for a phase; None if no sample went through one."""
    for label in PHASES[phase]:
        stage = energy["stages"].get(label)
        if stage and stage["samples"] and stage["duration_s"] > 0 and stage["it_j"] > 0:
            return label
    return None


def _phase(label: str, stage: Mapping[str, Any], idle: _IdleGpus, data: Mapping[str, Any]) -> Phase:
    size = data.get("batch_size") if label == TRAIN else data.get("eval_batch_size", data.get("batch_size"))
    return Phase(
        stage=label,
        seconds=stage["duration_s"],
        joules=stage["it_j"],
        estimated_j=stage["it_j"] * stage["estimated_fraction"],
        samples=stage["samples"],
        updates=stage["updates"],
        device_hours=stage["device_hours"],
        idle_gpus_j=idle.joules(label, stage["gpu_kwh"] * J_PER_KWH),
        batch_size=int(size) if isinstance(size, int) else None,
    )


def _machine(
    result: Mapping[str, Any], energy: Mapping[str, Any], config: Mapping[str, Any], tdp_w: float | None
) -> tuple[Machine, int]:
    """The machine of a run, and how many GPUs were read."""
    hardware = result.get("hardware") or {}
    world_size, hosts = int(result.get("world_size") or 1), max(len(energy.get("hosts") or {}), 1)
    accelerator = str((config.get("trainer") or {}).get("accelerator", "auto"))
    names = list(hardware.get("cuda") or [])
    on_gpu = accelerator != "cpu" and (accelerator != "auto" or bool(names))
    channels = energy.get("channels") or {}
    gpus = sum(channel["component"] == "gpu" for channel in channels.values())
    callback = (config.get("callbacks") or {}).get("energy") or {}
    profile = profile_of(callback.get("node"))
    threads = int(hardware.get("threads") or 1) * world_size
    processor = _short(str(hardware.get("cpu") or "unknown processor"))
    if on_gpu:
        label = f"{world_size} x {_short(names[0]) if names else accelerator}"
        label += f", {gpus - world_size} idle" if gpus > world_size else ""
    else:
        label = f"{processor}, {threads} thread{'s' if threads > 1 else ''}"
        label += f", {gpus} GPU{'s' if gpus > 1 else ''} idle" if gpus else ""
    if profile is not None:
        label = f"{profile.name} (here: {label})"
    if hosts > 1:
        label = f"{hosts} nodes, {label}"
    used = math.ceil(world_size / hosts) if on_gpu else 0
    nameplate = tdp_w
    if profile is not None and used <= profile.num_gpus:
        nameplate = hosts * profile.nameplate_w(used)
    return Machine(label, "gpu" if on_gpu else "cpu", world_size, threads, nameplate, profile), gpus


def _short(name: str) -> str:
    """``Intel(R) Xeon(R) Platinum 8368 CPU @ 2.40GHz`` -> ``Intel Xeon Platinum 8368``."""
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", " ", name)
    return " ".join(name.split())


class _IdleGpus:
    """Energy of the GPUs of a run that did not compute.

    Which of several GPUs a run used is not recorded: those that drew most.
    """

    def __init__(self, folder: Path, energy: Mapping[str, Any], machine: Machine, gpus: int) -> None:
        hosts = max(len(energy.get("hosts") or {}), 1)
        self.used = math.ceil(machine.devices / hosts) if machine.device == "gpu" else 0
        self.none = gpus <= self.used * hosts
        self.idle: list[Mapping[str, Any]] | None = None
        if not self.none and self.used:
            self.idle = self._from_records(folder, energy)

    def _from_records(self, folder: Path, energy: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
        """Tallies by label of each idle GPU, as label -> J; None if the files are not those of the summary."""
        try:
            segments = [read_file(path)[-1] for path in sorted(folder.glob("*.jsonl"))]
        except (ValueError, LookupError, OSError):
            return None
        total = math.fsum(tally.total_j for host in segments for tally in host.tallies.values())
        if not math.isclose(total, energy["it_j"], rel_tol=0.01):
            return None
        idle: list[Mapping[str, Any]] = []
        for host in segments:
            gpus = [
                {label: tally.joules.get(channel.name, 0.0) for label, tally in host.tallies.items()}
                for channel in host.channels
                if channel.component == "gpu"
            ]
            idle += sorted(gpus, key=lambda gpu: math.fsum(gpu.values()), reverse=True)[self.used :]
        return idle

    def joules(self, label: str, gpu_j: float) -> float | None:
        """Of a stage; ``gpu_j`` is that of all GPUs in it."""
        if self.none:
            return 0.0
        if not self.used:
            return gpu_j
        if self.idle is None:
            return None
        return math.fsum(gpu.get(label, 0.0) for gpu in self.idle)


def _notes(energy: Mapping[str, Any], phases: Mapping[str, Phase]) -> Iterable[str]:
    period = float(energy.get("period_s") or 0.0)
    for phase, found in phases.items():
        if found.seconds < 2 * period:
            yield f"{phase} took {found.seconds:.3g} s, less than two readings of its meters"
        if (low := energy["stages"][found.stage]["coverage"]) < 0.95:
            yield f"{phase}: only {100 * low:.0f} % of the time has valid readings, the energy is too low"
    if earlier := energy.get("earlier_kwh"):
        yield f"resumed: {earlier * J_PER_KWH:.4g} J of the parts before are not in the numbers"
    if energy.get("counts_exact") is False:
        yield "samples were extrapolated from one rank"


def train_inference_ratio(energy: Mapping[str, Any]) -> float | None:
    """J per sample of training / J per sample of inference, of one run's summary; None if it lacks one of them."""
    stages = [_stage_of(phase, energy) for phase in PHASES]
    if None in stages:
        return None
    train, inference = (energy["stages"][stage]["it_j"] / energy["stages"][stage]["samples"] for stage in stages)
    return train / inference

"""What a kind of machine draws and how fast it is: for the question what a run would cost elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TARGET = "callbacks.energy.node.NodeProfile"


@dataclass(frozen=True)
class NodeProfile:
    """A kind of machine as a model of its power. Everything that comes out of it is an estimate.

    Power = base + memory + sockets x TDP x (idle + (1 - idle) load^3) + GPUs, each GPU between its idle power and its
    limit in proportion to its utilisation. The cubic law of the processors is codecarbon's (``cpu_load`` mode).

    Speeds are throughputs in the unit "one busy CPU thread": a machine of speed 76 does in 1 s what one thread does in
    76 s. They belong to no particular workload; where the same workload was run on a CPU and on a GPU, the study takes
    the ratio between the two from the runs, for training and inference apart.

    Attributes:
        name: For tables and figures.
        sockets: Processors.
        threads: Hardware threads of the machine.
        cpu_tdp_w: Thermal design power of one socket, W.
        cpu_idle_fraction: Power of an idle socket / its TDP.
        dram_w: Memory, W.
        base_w: What is left (fans, boards, losses of the power supply), W.
        num_gpus: GPUs that the machine feeds.
        gpus_used: GPUs that a run computes with. 0 with ``num_gpus > 0``: a run that is forced onto the CPU.
        gpu_idle_w: One GPU without work, W.
        gpu_max_w: One GPU at full utilisation, W.
        cpu_speed: Throughput of all processors together, in CPU threads.
        gpu_speed: Throughput of one GPU, in CPU threads.
    """

    name: str
    sockets: int
    threads: int
    cpu_tdp_w: float
    cpu_idle_fraction: float = 0.1
    dram_w: float = 0.0
    base_w: float = 0.0
    num_gpus: int = 0
    gpus_used: int = 0
    gpu_idle_w: float = 0.0
    gpu_max_w: float = 0.0
    cpu_speed: float = 1.0
    gpu_speed: float = 0.0

    def __post_init__(self) -> None:
        def mistake(field: str, remedy: str) -> ValueError:
            return ValueError(f"callbacks.energy.node.{field}={getattr(self, field)!r} ({self.name}): {remedy}.")

        for field in ("sockets", "threads", "num_gpus", "gpus_used"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < (field in ("sockets", "threads")):
                raise mistake(field, f"use a whole number, at least {int(field in ('sockets', 'threads'))}")
        for field in ("dram_w", "base_w", "gpu_idle_w", "gpu_max_w", "gpu_speed"):
            if not _finite(getattr(self, field)) or getattr(self, field) < 0:
                raise mistake(field, "use a number, at least 0")
        for field in ("cpu_tdp_w", "cpu_speed"):
            if not _finite(getattr(self, field)) or getattr(self, field) <= 0:
                raise mistake(field, "use a number above 0")
        if not 0 <= self.cpu_idle_fraction <= 1:
            raise mistake("cpu_idle_fraction", "idle power is between 0 and 1 of the TDP")
        if self.gpus_used > self.num_gpus:
            raise mistake("gpus_used", f"the machine has num_gpus={self.num_gpus}; use at most that")
        if self.num_gpus and self.gpu_max_w < self.gpu_idle_w:
            raise mistake("gpu_max_w", f"less than gpu_idle_w={self.gpu_idle_w}; use the larger one as the limit")
        if self.gpus_used and not self.gpu_speed:
            raise mistake("gpu_speed", "a GPU that computes has a throughput; use a number above 0, or gpus_used=0")

    def host_w(self, cpu_load: float = 1.0) -> float:
        """Power of everything but the GPUs, W.

        Args:
            cpu_load: Busy share of the hardware threads, 0 to 1.
        """
        _check("cpu_load", cpu_load)
        idle = self.cpu_idle_fraction
        return self.base_w + self.dram_w + self.sockets * self.cpu_tdp_w * (idle + (1 - idle) * cpu_load**3)

    def load_at(self, host_w: float) -> float:
        """Load at which everything but the GPUs draws ``host_w``; the inverse of `host_w`.

        Raises:
            ValueError: If the machine draws so little or so much at no load.
        """
        least, most = self.host_w(0.0), self.host_w(1.0)
        if not least <= host_w <= most or least == most:
            raise ValueError(f"{self.name} without its GPUs draws {least:g} to {most:g} W, never {host_w:g} W.")
        return ((host_w - least) / (most - least)) ** (1 / 3)

    def idle_gpus_w(self, gpus_busy: int | None = None) -> float:
        """Power of the GPUs that do nothing, W; see `power_w`."""
        return (self.num_gpus - self._busy(gpus_busy)) * self.gpu_idle_w

    def power_w(self, cpu_load: float = 1.0, gpus_busy: int | None = None, gpu_utilisation: float = 1.0) -> float:
        """Power of the machine, W.

        Args:
            cpu_load: Busy share of the hardware threads, 0 to 1.
            gpus_busy: GPUs that compute; None: ``gpus_used``. The others idle.
            gpu_utilisation: Of the busy ones: 0 is idle power, 1 the limit.
        """
        _check("gpu_utilisation", gpu_utilisation)
        busy = self._busy(gpus_busy)
        one = self.gpu_idle_w + gpu_utilisation * (self.gpu_max_w - self.gpu_idle_w)
        return self.host_w(cpu_load) + busy * one + self.idle_gpus_w(busy)

    def energy_j(
        self, seconds: float, cpu_load: float = 1.0, gpus_busy: int | None = None, gpu_utilisation: float = 1.0
    ) -> float:
        """Energy of ``seconds`` at constant load, J; see `power_w`."""
        if not _finite(seconds) or seconds < 0:
            raise ValueError(f"seconds={seconds} is no duration; use 0 or more.")
        return seconds * self.power_w(cpu_load, gpus_busy, gpu_utilisation)

    def nameplate_w(self, gpus_busy: int | None = None) -> float:
        """What "TDP x time" counts: the sockets' TDP and the limit of the GPUs that compute, W."""
        return self.sockets * self.cpu_tdp_w + self._busy(gpus_busy) * self.gpu_max_w

    def speed(self, gpus_busy: int | None = None) -> float:
        """Throughput in CPU threads: of the busy GPUs together, else of the processors."""
        busy = self._busy(gpus_busy)
        return busy * self.gpu_speed if busy else self.cpu_speed

    def _busy(self, gpus_busy: int | None) -> int:
        if gpus_busy is None:
            return self.gpus_used
        if isinstance(gpus_busy, bool) or not isinstance(gpus_busy, int) or not 0 <= gpus_busy <= self.num_gpus:
            raise ValueError(f"gpus_busy={gpus_busy!r}: {self.name} has {self.num_gpus} GPUs; use 0 to that number.")
        return gpus_busy


def profile_of(node: Any) -> NodeProfile | None:
    """A profile from its plain description (a mapping with or without ``_target_``); None for null.

    Raises:
        ValueError: If an argument is unknown, missing or impossible.
    """
    if node is None or isinstance(node, NodeProfile):
        return node
    if not isinstance(node, dict):
        raise ValueError(f"callbacks.energy.node={node!r} describes no machine; use the arguments of NodeProfile.")
    if (target := node.get("_target_", TARGET)) != TARGET:
        raise ValueError(f"callbacks.energy.node._target_={target!r} is not {TARGET}.")
    given = {key: value for key, value in node.items() if key != "_target_"}
    known = [field.name for field in fields(NodeProfile)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"callbacks.energy.node takes no {', '.join(unknown)}; it takes {', '.join(known)}.")
    if missing := [name for name in ("name", "sockets", "threads", "cpu_tdp_w") if name not in given]:
        raise ValueError(f"callbacks.energy.node lacks {', '.join(missing)}.")
    return NodeProfile(**given)


def read_profiles(path: Path) -> list[NodeProfile]:
    """Profiles of a folder of YAML files (``conf/node``) or of one file, in the order of their file names.

    Raises:
        ValueError: If a file holds no profile, or two have one name; names the file.
        FileNotFoundError: If there is nothing to read.
    """
    import yaml

    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"--profiles {path}: no YAML files; conf/node of the program has some.")
    profiles: dict[str, NodeProfile] = {}
    for file in files:
        try:
            content = yaml.safe_load(file.read_text())
            if not isinstance(content, dict) or "node" not in content:
                raise ValueError("no key 'node'")
            profile = profile_of(content["node"])
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{file}: {error}") from error
        if profile is None:
            continue
        if profile.name in profiles:
            raise ValueError(f"{file}: another file has the profile {profile.name!r} already; give it its own name.")
        profiles[profile.name] = profile
    return list(profiles.values())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: float) -> None:
    if not _finite(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is no share; use a number from 0 to 1.")

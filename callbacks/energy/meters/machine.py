"""What this machine, or the container in it, has: processors, threads, memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from callbacks.energy.meters.sysfs import text

UNLIMITED = 2**60  # version 1 writes "no limit" as a number near 2**63


@dataclass(frozen=True)
class Processor:
    """What ``/proc/cpuinfo`` says.

    Attributes:
        model: Name, ``AMD EPYC 7543 32-Core Processor``; empty if unknown (ARM).
        sockets: Packages.
        virtual: Whether a hypervisor runs below.
    """

    model: str
    sockets: int
    virtual: bool


def processor(root: Path = Path("/")) -> Processor:
    """The processors of the machine."""
    info = text(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)$", info, re.MULTILINE))
    flags = re.search(r"^flags\s*:(.+)$", info, re.MULTILINE)
    return Processor(
        model=model[1].strip() if model else "",
        sockets=max(len(sockets), 1),
        virtual=flags is not None and "hypervisor" in flags[1].split(),
    )


def threads(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(hardware threads that the job may use, those of the machine).

    The job's are the least of what SLURM gave it on this machine and what the control groups of this process allow.
    Pinning of a single process is no limit of the job.
    """
    total = os.cpu_count() or 1
    limits = [float(total)]
    if (granted := environ.get("SLURM_CPUS_ON_NODE", "")).isdigit():
        limits.append(int(granted))
    else:
        for folder in _groups(root, "cpuset"):
            for name in ("cpuset.cpus.effective", "cpuset.effective_cpus"):
                if count := _length(text(folder / name)):
                    limits.append(count)
    for folder in _groups(root, "cpu"):
        quota = text(folder / "cpu.max").split() or [
            text(folder / "cpu.cfs_quota_us"),
            text(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
            limits.append(int(quota[0]) / int(quota[1]))
    return max(round(min(limits)), 1), total


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """(memory that this process may use, memory of the machine), bytes."""
    if match := re.search(r"^MemTotal:\s*(\d+) kB", text(root / "proc/meminfo"), re.MULTILINE):
        total = int(match[1]) * 1024
    else:
        import psutil

        total = psutil.virtual_memory().total
    limits = [total]
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (value := text(folder / name)).isdigit() and int(value) < UNLIMITED:
                limits.append(int(value))
    return min(limits), total


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the top; versions 1 and 2.

    Inside a container the path may be that of the host: folders that do not exist simply hold no limit.
    """
    base = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            top = base
        elif controller in controllers.split(","):
            top = base / controller
            if not top.is_dir():
                top = base / controllers
        else:
            continue
        folder = top / path.lstrip("/")
        yield folder
        while folder != top and top in folder.parents:
            folder = folder.parent
            yield folder


def _length(ranges: str) -> int:
    """Number of elements of ``0-3,8``; 0 if it is none."""
    count = 0
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            return 0
        count += int(match[2] or match[1]) - int(match[1]) + 1
    return count

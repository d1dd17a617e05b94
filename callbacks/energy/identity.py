"""Which machine this is."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path


def hostname() -> str:
    """Name of this machine."""
    return platform.node() or "localhost"


def host_id() -> str:
    """Eight characters that differ between machines (and boots): containers may share a name, ranks share a machine.

    ``WATTLIGHT_HOST_ID`` overrides it where a machine runs several isolated nodes.
    """
    if given := os.environ.get("WATTLIGHT_HOST_ID"):
        return given
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return hashlib.sha256(f"{hostname()} {boot}".encode()).hexdigest()[:8]


def local_processes(environ: Mapping[str, str] = os.environ) -> int:
    """Processes of the run on this machine, before there is a process group to ask.

    torchrun and run.py say it (``LOCAL_WORLD_SIZE``), Open MPI (``OMPI_COMM_WORLD_LOCAL_SIZE``), and srun for every
    machine of its step (``SLURM_STEP_TASKS_PER_NODE=4(x2),3``) or as it was asked for (``SLURM_NTASKS_PER_NODE``). In a
    batch script without srun there is one, whatever the job has asked for.
    """
    for key in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if environ.get(key, "").isdigit():
            return max(int(environ[key]), 1)
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return 1
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    if node < len(counts):
        return counts[node]
    return int(environ.get("SLURM_NTASKS_PER_NODE", 1))

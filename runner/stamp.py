"""The name of a run's folder: the same on every rank of a run, and the same again when a job is requeued."""

from __future__ import annotations

import os
from datetime import datetime
from functools import cache


@cache
def run_stamp() -> str:
    """Stamp of this run, read once per process.

    The first that exists of: ``RUN_STAMP`` (set by the user), the SLURM job (with its array task and, from the second
    ``srun`` on, its step), the torchrun rendezvous id, the start time of torchrun (which all its ranks share), the
    time. Nothing else in the program may name a folder after the clock: several ranks would disagree.
    """
    env = os.environ
    if stamp := env.get("RUN_STAMP"):
        return stamp
    if job := env.get("SLURM_JOB_ID"):
        parts = [env.get("SLURM_ARRAY_JOB_ID", job)]
        if task := env.get("SLURM_ARRAY_TASK_ID"):
            parts.append(task)
        step = env.get("SLURM_STEP_ID", "0")
        if step.isdigit() and 0 < int(step) < 2**31:  # larger ones are SLURM's own: batch, extern
            parts.append(f"step{step}")
        return "_".join(parts)
    if elastic := env.get("TORCHELASTIC_RUN_ID"):
        if elastic != "none":  # torchrun's word for "no --rdzv-id given"
            return elastic
        import psutil

        return _format(psutil.Process(os.getppid()).create_time())
    return _format(datetime.now().timestamp())


def _format(seconds: float) -> str:
    """To the millisecond: runs that a shell starts in the background at once must not share a folder."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]

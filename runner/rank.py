"""The entry of one rank that `runner.launch` started."""

from __future__ import annotations

import os
from typing import Any

from runner import fork_server


class InputError(Exception):
    """An error of the input: its message says all, the supervisor shows no traceback."""


def run_rank(config: dict[str, Any], processes: int, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the job in this process, one of ``processes`` on this machine.

    Args:
        config: The resolved configuration.
        processes: Ranks on this machine.
        environment: Of the supervisor, where this process was forked from a server that began with an earlier one.

    Raises:
        SystemExit: After an interruption, with 128 + the signal's number. A rank that returned would be kept alive
            until the launcher has collected the results of all, which it does not do while it ends them.
        InputError: For mistakes in values, files and packages found before the first batch.
        Exception: Whatever else went wrong.
    """
    if environment is not None:
        fork_server.adopt(environment)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    from runner import job

    try:
        result = job.run(config, launched=True)
    except Exception as error:
        if job.is_input_error(error):
            raise InputError(str(error)) from error
        raise
    if result["status"] == "interrupted":
        raise SystemExit(128 + int(result["signum"]))
    return result

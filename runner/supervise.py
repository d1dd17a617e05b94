"""Decides where a job runs, repeats it if asked to, and turns its end into output, exit code and objective."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from hydra.errors import CompactHydraException

from runner import report
from runner.launch import JobFailed, JobInterrupted, launch, num_processes, ranks_exist
from runner.lock import FolderInUse, exclusive
from runner.traces import shorten


class RunError(CompactHydraException):
    """A failed run; Hydra prints the message alone and, in a sweep, goes on with the next job."""


def supervise(config: dict[str, Any], sweep: bool) -> float | None:
    """Run the job and return the value of ``optimized_metric``.

    A single run on one device, and ranks that torchrun, srun or mpirun started, run in this process. Several devices,
    and every job of a sweep, run in fresh processes (`runner.launch`).

    Raises:
        RunError: If a job of a sweep failed and the others are to proceed.
        SystemExit: With code 1 after a failure, with 128 + the signal's number after an interruption.
    """
    processes = num_processes(config)
    isolate = (processes > 1 or sweep) and not ranks_exist()
    retries = config["launch"]["retries"]
    for attempt in range(retries + 1):
        try:
            result = _isolated(config, processes) if isolate else _here(config)
        except FolderInUse as error:
            result = {"status": "failed", "error": str(error), "hopeless": True, "run_dir": config["run"]["dir"]}
        if result["status"] != "failed" or result.get("hopeless") or attempt == retries:
            break
        print(f"the job failed ({result['error']}); try {attempt + 2} of {retries + 1}", file=sys.stderr)
        if (Path(config["run"]["dir"]) / "checkpoints" / "last.ckpt").is_file():  # of the failed try: it is ahead
            config = config | {"ckpt_path": "last"}
    if result["status"] == "interrupted":
        print(report.interrupted(result["run_dir"]), file=sys.stderr)
        raise SystemExit(128 + int(result.get("signum", 2)))
    if result["status"] == "failed":
        text = f"error: {result['error']}"
        if trace := result.get("trace"):
            whole = Path(result["run_dir"]) / "error.txt"
            whole.write_text(trace)
            text = f"{shorten(trace)}\n(whole traceback: {whole})\n{text}"
        if sweep and config["launch"]["on_failure"] == "proceed":
            raise RunError(text)
        raise SystemExit(text)  # code 1
    from runner.logs import global_rank

    if global_rank() == 0:
        print(report.summary(result))
    return _objective(config, result["metrics"] | result.get("costs", {}))


def _here(config: dict[str, Any]) -> dict[str, Any]:
    from runner import job
    from runner.logs import global_rank

    # Ranks that somebody else started share the folder: rank 0 holds it for all.
    with exclusive(config["run"]["dir"]) if global_rank() == 0 else contextlib.nullcontext():
        return job.run(config)


def _isolated(config: dict[str, Any], processes: int) -> dict[str, Any]:
    from runner.record import mark, read, restore

    run_dir = Path(config["run"]["dir"])
    found = read(run_dir)
    outcome: dict[str, Any] = {"metrics": {}, "run_dir": str(run_dir)}
    try:
        with exclusive(run_dir):
            return launch(config, processes)
    except JobInterrupted as stop:
        mark(run_dir, "interrupted", str(stop))
        return outcome | {"status": "interrupted", "signum": stop.signum}
    except (JobFailed, TimeoutError) as error:
        if found and getattr(error, "hopeless", False):  # refused before anything was computed
            restore(run_dir, found)
        else:
            mark(run_dir, "failed", str(error))
        details = {name: getattr(error, name, None) for name in ("trace", "hopeless")}
        return outcome | {"status": "failed", "error": str(error), **details}


def _objective(config: dict[str, Any], metrics: dict[str, float]) -> float | None:
    name = config["optimized_metric"]
    if not name:
        return None
    if name not in metrics:
        raise RunError(
            f"optimized_metric={name}: the run logged no such metric; it logged {', '.join(sorted(metrics))}"
        )
    return metrics[name]

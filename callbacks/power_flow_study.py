"""Grids of several sizes side by side: the end of ``experiment=power_flow/scaling``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.comparison import finished_jobs, save_figures
from callbacks.figures.power_flow import LABELS, time_to_tolerance
from physics.power_flow import METHODS

# What is read of a method, and kept under the same name.
_VALUES = ("seconds", "seconds_to_1e-3", "max_mismatch_pu", "iterations")


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The finished jobs of a sweep with compared methods.

    Args:
        folder: Of the sweep, with its ``table.csv``.

    Returns:
        For every job ``buses``, ``peak_mib``, and by the name of each compared method its ``seconds``,
        ``seconds_to_1e-3`` (infinite: not reached), ``max_mismatch_pu`` and ``iterations``; smaller grids first.
    """
    found = []
    for row, _ in finished_jobs(Path(folder)):
        metrics = json.loads((Path(row["run_dir"]) / "results.json").read_text())["metrics"]
        if "test/buses" not in metrics:
            continue
        job: dict[str, Any] = {"buses": int(metrics["test/buses"]), "peak_mib": metrics["test/peak_mib"]}
        for method in METHODS:
            if f"test/{method}_seconds" in metrics:
                job[method] = {name: metrics.get(f"test/{method}_{name}", math.inf) for name in _VALUES}
        found.append(job)
    return sorted(found, key=lambda job: job["buses"])


def table(jobs: Sequence[Mapping[str, Any]]) -> str:
    """A line per grid, as Markdown: seconds of every method to a mismatch below 1e-3, and where it ended instead."""
    methods = [method for method in METHODS if any(method in job for job in jobs)]
    rows = [["buses", *(f"{LABELS[method]}, s to 1e-3" for method in methods), "peak MiB"]]
    rows.append(["---"] * len(rows[0]))
    for job in jobs:
        cells = [str(job["buses"])]
        for method in methods:
            values = job.get(method)
            if values is None:
                cells.append("")
            elif math.isfinite(values["seconds_to_1e-3"]):
                cells.append(f"{values['seconds_to_1e-3']:.3g}")
            else:
                cells.append(f"not reached: {values['max_mismatch_pu']:.1e} after {values['seconds']:.3g} s")
        rows.append([*cells, f"{job['peak_mib']:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_sweep(folder: Path) -> str:
    """Draw the jobs of a sweep into ``<folder>/figures``; what to print below the sweep's table."""
    jobs = read_jobs(Path(folder))
    if not jobs:
        return "no job has compared methods"
    drawn = save_figures({"time_to_tolerance": time_to_tolerance(jobs)}, Path(folder))
    return f"{table(jobs)}\n\n{drawn}"

"""Layouts of processes side by side: the end of sweeps of ``experiment=sampling_parallelism/...``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.comparison import METRIC, finished_jobs, save_figures
from callbacks.figures import layouts

# Columns of the table: of results.json, and how they are called.
_METRICS = {"test/accuracy": "accuracy", "test/nll": "NLL", "test/ece": "ECE", "test/mace": "MACE"}
_METRICS |= {"test/mae_scaled": "MAE, scaled", "test/crps_scaled": "CRPS, scaled"}


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """The finished jobs of a sweep, as `callbacks.figures.layouts` takes them.

    Args:
        folder: Of the sweep, with its ``table.csv``.

    Returns:
        For every job ``label``, ``world_size``, ``samples`` and ``sample_parallel_size`` (None where there are none),
        ``processes`` (`callbacks.footprint`), ``seconds`` and ``cpu_seconds`` (mean over the processes of the median
        over epochs, the first one left out where there are others; None where they were not noted), ``epochs`` with
        ``metric_name`` (`callbacks.training_history`), ``metrics`` and ``bytes`` that all processes sent.
    """
    found = []
    for row, differing in finished_jobs(Path(folder)):
        run = Path(row["run_dir"])
        record, history = json.loads((run / "results.json").read_text()), run / "history.json"
        history = json.loads(history.read_text()) if history.is_file() else {"epochs": [], "metric": METRIC}
        config, world = record["config"], record["world_size"]
        values = [v if len(differing) == 1 else f"{k.rsplit('.', 1)[-1]}={v}" for k, v in differing.items()]
        processes = record.get("processes", [])
        sent = record.get("communication") or {}
        size = config["strategy"].get("sample_parallel_size", 1)
        found.append(
            {
                "label": " ".join(values) or "all",
                "world_size": world,
                "samples": config["model"].get("num_samples"),
                "sample_parallel_size": _local_size(config, world) if size == "auto" else size,
                "processes": processes,
                "seconds": per_epoch(processes, "wall_s"),
                "cpu_seconds": per_epoch(processes, "cpu_s"),
                "epochs": history["epochs"],
                "metric_name": history["metric"],
                "metrics": record["metrics"],
                "bytes": sum(sent.get(f"{link}_node_bytes", 0.0) for link in ("inter", "intra")),
            }
        )
    return found


def _local_size(config: Mapping[str, Any], world: int) -> int:
    """Processes of a node, as `strategies.cluster` counts them."""
    return config["cluster"]["local_size"] or world // config["trainer"]["num_nodes"]


def per_epoch(processes: Iterable[Mapping[str, Any]], clock: str) -> float | None:
    """Mean over processes of the median over epochs; the first epoch pays for what is set up once."""
    times = [row[clock][1:] or row[clock] for row in processes]
    return statistics.fmean(map(statistics.median, times)) if times and all(times) else None


def table(jobs: Sequence[Mapping[str, Any]]) -> str:
    """A line per job, as Markdown: time, memory, traffic, scores, and in curves of `scaling` the efficiency."""
    metrics = [name for name in _METRICS if any(name in job["metrics"] for job in jobs)]
    head = ["job", "processes", "sharing samples", "samples", "s per epoch", "CPU s per epoch and process"]
    head += ["MiB added per process", "MB sent", *(_METRICS[name] for name in metrics)]
    rows = [head, ["---"] * len(head)]
    for job in jobs:
        added = [row["peak_mib"] - row["before_mib"] for row in job["processes"] if "peak_mib" in row]
        cells = [job["label"], str(job["world_size"]), str(job["sample_parallel_size"]), str(job["samples"] or "")]
        cells += ["" if job[key] is None else f"{job[key]:.3g}" for key in ("seconds", "cpu_seconds")]
        cells += [f"{max(added):.3g}" if added else "", f"{job['bytes'] / 1e6:.4g}"]
        cells += [f"{job['metrics'][name]:.4f}" if name in job["metrics"] else "" for name in metrics]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def scaling_table(jobs: Sequence[Mapping[str, Any]]) -> str | None:
    """Speed-up T(1) / T(R) of every curve of `layouts.scaling` with its efficiency, as Markdown.

    A fixed workload is R times as fast at best, so its efficiency is T(1) / (R T(R)); one that grows with the processes
    takes as long at best, T(1) / T(R).
    """
    head = ["samples", "processes", "s per epoch", "speed-up", "efficiency", "by CPU time"]
    rows = [head, ["---"] * len(head)]
    for fixed in (True, False):
        for number, points in layouts.series(jobs, fixed).items():
            for point in points:
                size = point["world_size"]
                cells = [f"{number:g}" if fixed else f"{number:g} per process", str(size), f"{point['seconds']:.3g}"]
                speed_ups = [points[0][key] / point[key] if point[key] else None for key in ("seconds", "cpu_seconds")]
                cells.append(f"{speed_ups[0]:.2f}")
                cells += ["" if s is None else f"{s / size if fixed else s:.2f}" for s in speed_ups]
                rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if len(rows) > 2 else None


def draw_sweep(folder: Path) -> str:
    """Draw the jobs of a sweep into ``<folder>/figures``; what to print below the sweep's table."""
    jobs = read_jobs(Path(folder))
    if not jobs:
        return "no job has ended"
    printed = [table(jobs), *filter(None, [scaling_table(jobs)])]
    printed.append(save_figures({name: getattr(layouts, name)(jobs) for name in layouts.FIGURES}, Path(folder)))
    return "\n\n".join(filter(None, printed))

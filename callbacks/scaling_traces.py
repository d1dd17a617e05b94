"""Power over time of the runs of a sweep, from the records that the energy callback has left."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.energy.record import read_records
from physics.energy_cost import Record

log = logging.getLogger(__name__)

MOST = 300  # points of a trace
SHORTEST_S = 0.05  # over shorter intervals the power of a counter means nothing


def power_traces(folders: Iterable[Path], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One trace for each configuration: that of its first run.

    Args:
        folders: Of sweeps or runs; names of records are relative to one of them.
        records: Of `physics.energy_cost.records.read_runs`.

    Returns:
        ``series``, ``devices``, ``local_batch_size``, ``time_s`` (since the first reading) and ``watts`` of all
        machines of the run, between two readings.
    """
    roots = list(folders)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        key = (record.series, *record.key)
        if key in found or not record.name:
            continue
        for root in roots:
            trace = _of_run(root / record.name / "energy")
            if trace is not None:
                about = {"series": record.series, "devices": record.devices}
                about |= {"local_batch_size": record.local_batch_size}
                found[key] = about | {"time_s": trace[0], "watts": trace[1]}
                break
    return list(found.values())


def _of_run(folder: Path) -> tuple[list[float], list[float]] | None:
    """Sum over the machines, on the readings of the first one."""
    machines = [curve for path in sorted(folder.glob("*.jsonl")) if len(curve := _cumulative(path)) > 1]
    if not machines:
        return None
    time = machines[0][:, 0]
    joules = sum(np.interp(time, curve[:, 0], curve[:, 1]) for curve in machines)
    kept = [0]
    shortest = max(SHORTEST_S, (time[-1] - time[0]) / MOST)
    for place in range(1, len(time)):
        if time[place] - time[kept[-1]] >= shortest:
            kept.append(place)
    if len(kept) < 3:
        return None
    seconds, energy = time[kept], joules[kept]
    middle = (seconds[1:] + seconds[:-1]) / 2 - seconds[0]
    watts = np.diff(energy) / np.diff(seconds)
    return [round(float(t), 3) for t in middle], [round(float(w), 3) for w in watts]


def _cumulative(path: Path) -> np.ndarray:
    """(time, joules since the start) of the last part of a record."""
    rows: list[tuple[float, float]] = []
    try:
        for record in read_records(path):
            if record.get("kind") == "start":
                rows = []
            elif record.get("kind") == "sample":
                rows.append((record["t"], record["total_j"]))
    except (OSError, KeyError) as error:
        log.info("no power of %s: %s", path, error)
    return np.array(rows).reshape(-1, 2)

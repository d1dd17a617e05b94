"""What a run has used, read from the files that it has left: summaries, records, power over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from callbacks.energy.accounting import Tally
from callbacks.energy.meters.base import Channel
from callbacks.energy.record import Counts, read_folder, read_records
from callbacks.energy.summary import Facility, summarize
from callbacks.energy.trace import Point, Trace


def merge(run_dir: Path, facility: Facility | None = None) -> dict[str, Any]:
    """Add up all machines and all parts of a run.

    Without a facility that of the run's last part is taken.

    A machine's file holds the samples of the rank that recorded; all ranks do equal shares of the work.

    Raises:
        FileNotFoundError: If the run has no record.
    """
    hosts = read_folder(record_folder(run_dir))
    if not hosts:
        raise FileNotFoundError(f"{run_dir}: no energy/*.jsonl: no folder of a run with callbacks.energy")
    if facility is None:
        stored = hosts[0].facility
        facility = Facility(stored.get("pue", 1.0), stored.get("intensity", 0.0), stored.get("source", ""))
    counts = Counts()
    for host in hosts:
        counts.add(host.counts, updates=host is hosts[0])
    ranks = max(host.world_size for host in hosts) / len(hosts)
    counts.samples = {label: round(number * ranks) for label, number in counts.samples.items()}
    return summarize(hosts, counts, facility) | {"counts_exact": ranks == 1}


def record_folder(run_dir: Path) -> Path:
    """Where the record files of a run are, given its folder or that one."""
    return run_dir if list(run_dir.glob("*.jsonl")) else run_dir / "energy"


def run_summary(run_dir: Path) -> tuple[dict[str, Any], str]:
    """Summary of a run and where it is from: what the run wrote at its end, else its record files.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If a file cannot be read.
    """
    written = read_json(record_folder(run_dir) / "summary.json") or {}
    stored = (read_json(run_dir / "results.json") or {}).get("energy") or {}
    for summary, source in ((written, "energy/summary.json"), (stored, "results.json")):
        if summary.get("stages") and summary.get("status") in ("completed", "interrupted", "failed"):
            return summary, source
    known = written or stored
    facility = None  # that of the record: a run that was killed before its first report has no other
    if "pue" in known:
        facility = Facility(known["pue"], known["carbon_intensity_g_per_kwh"], known["carbon_intensity_source"])
    merged = merge(run_dir, facility) | {"epochs": known.get("epochs", [])}
    return merged, "the record files: the run did not end in order; samples are those of the recording processes"


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a file; None: there is no such file, or something else is in it.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content if isinstance(content, dict) else None


def trace_points(path: Path) -> tuple[list[Point], int]:
    """Power over time of a record file's last part, as the recorder's trace had it, and the number of parts."""
    channels: list[Channel] = []
    trace, before, parts = Trace(), None, 0
    for record in read_records(path):
        if record.get("kind") == "start":
            channels = [Channel(**channel) for channel in record["channels"]]
            trace, before, parts = Trace(), None, parts + 1
        elif record.get("kind") == "sample":
            if before is not None:
                joules = [new - old for old, new in zip(before["j"], record["j"], strict=True)]
                interval = Tally(
                    seconds=record["t"] - before["t"],
                    joules=dict(zip((channel.name for channel in channels), joules, strict=True)),
                    total_j=record["total_j"] - before["total_j"],
                )
                trace.add(record["t"], interval, record["label"], record.get("step", 0))
            before = record
    return trace.points(), parts

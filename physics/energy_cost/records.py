"""Records from files: the ``results.json`` of runs, and tables of others' measurements."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from physics.energy_cost.configuration import Record, gradient_updates

TRAINING = "fit/train"
REQUIRED = ("series", "gpus", "local_batch_size", "num_samples", "epochs", "energy_kwh", "gpu_hours")


def read_table(path: Path, devices_per_node: int = 4, repetitions: int = 1) -> list[Record]:
    """Records of a CSV file.

    It has the columns `REQUIRED`, and may have ``energy_rms_kwh``, ``gpu_hours_rms``, ``nodes``, ``metric`` and
    ``hardware``. Samples and updates are the nominal ones (`gradient_updates`).

    Args:
        path: The file.
        devices_per_node: Where there is no column ``nodes``.
        repetitions: That each row is the mean of.

    Raises:
        ValueError: If a column is missing or a value is no number; names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in REQUIRED if name not in (reader.fieldnames or [])]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; the table needs {', '.join(REQUIRED)}")
        out = []
        for row in reader:
            try:
                out.append(_table_row(row, devices_per_node, repetitions))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not out:
        raise ValueError(f"{path}: no rows below the header")
    return out


def _table_row(row: Mapping[str, str], devices_per_node: int, repetitions: int) -> Record:
    devices, batch = int(row["gpus"]), int(row["local_batch_size"])
    samples, epochs = int(row["num_samples"]), float(row["epochs"])
    return Record(
        series=row["series"],
        devices=devices,
        nodes=int(row.get("nodes") or math.ceil(devices / devices_per_node)),
        local_batch_size=batch,
        num_samples=samples,
        epochs=epochs,
        samples=samples * epochs,
        updates=gradient_updates(samples, devices, batch, epochs),
        energy_kwh=float(row["energy_kwh"]),
        device_hours=float(row["gpu_hours"]),
        energy_rms_kwh=float(row.get("energy_rms_kwh") or 0),
        device_hours_rms=float(row.get("gpu_hours_rms") or 0),
        repetitions=repetitions,
        metric=float(row["metric"]) if row.get("metric") else None,
        hardware=row.get("hardware") or "",
        name=f"{row['series']}, {devices} devices",
    )


def read_runs(folder: Path, metric: str | None = None) -> tuple[list[Record], dict[str, str]]:
    """Records of the runs in and below a folder, from their ``results.json``.

    Energy and time are those of training alone, of all nodes, without the overhead of the building. The series of a run
    is what is kept constant in it, ``LBS 32`` or ``GBS 64``, whichever more runs of its experiment share.

    Args:
        folder: Of a run or a sweep.
        metric: Name of the metric of quality in ``metrics``, e.g. ``test/accuracy``.

    Returns:
        The records in the order of their paths, and name -> reason of runs that are left out.

    Raises:
        FileNotFoundError: If there is no run.
    """
    paths = sorted(folder.rglob("results.json"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no results.json in or below it; name the folder of a sweep")
    found: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in paths:
        name = path.parent.relative_to(folder).as_posix()
        try:
            found.append(_read_run(name, json.loads(path.read_text()), metric))
        except (KeyError, TypeError, ValueError) as error:
            skipped[name] = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return [Record(**fields) for fields in _with_series(found)], skipped


def _read_run(name: str, result: Mapping[str, Any], metric: str | None) -> dict[str, Any]:
    if result.get("status") != "completed":
        raise ValueError(f"status {result.get('status')!r}: only completed runs are compared")
    stage = ((result.get("energy") or {}).get("stages") or {}).get(TRAINING)
    if not stage:
        raise ValueError("no energy of training was recorded; callbacks.energy was off, or nothing was trained")
    energy = result["energy"]
    if energy.get("earlier_kwh"):
        raise ValueError("the run was resumed: energy and time of its parts are not comparable")
    if energy.get("counts_exact") is False:
        raise ValueError("samples were extrapolated from one rank")
    devices = int(result["world_size"])
    nodes = max(round(stage["node_hours"] / (stage["device_hours"] / devices)), 1)
    samples, updates = stage["samples"], stage["updates"]
    if not updates:
        raise ValueError("no optimizer step was taken")
    hardware = result.get("hardware") or {}
    config = result.get("config") or {}
    # A job sees as many GPUs as it asked for: their kinds count, not how many; a run on the CPU has none.
    gpus = sorted(set(hardware.get("cuda") or []))
    on_cpu = (config.get("trainer") or {}).get("accelerator") == "cpu"
    kinds = str(hardware.get("cpu") or "") if on_cpu or not gpus else ", ".join(gpus)
    sizes = result.get("scaling") or {}  # of `callbacks.scaling_record`; runs without it are nearly as well known
    epochs = sizes.get("epochs") or float(result.get("epoch") or 1)
    return {
        "name": name,
        "experiment": f"{config.get('name') or result.get('name')}",
        "devices": devices,
        "nodes": nodes,
        "local_batch_size": max(round(sizes.get("local_batch_size") or samples / (updates * devices)), 1),
        "num_samples": sizes.get("num_samples") or round(samples / epochs),
        "epochs": float(epochs),
        "samples": float(samples),
        "updates": int(updates),
        "energy_kwh": stage["it_kwh"],
        "device_hours": stage["device_hours"],
        "metric": (result.get("metrics") or {}).get(metric) if metric else None,
        "seed": config.get("seed"),
        "hardware": kinds,
        "estimated": float(stage.get("estimated_fraction") or 0.0),
        "sources": tuple(
            sorted({str(c["source"]) for c in (energy.get("channels") or {}).values() if c.get("source")})
        ),
        "phases": tuple((result.get("phases") or {}).items()),
    }


def _with_series(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name what is constant: of LBS and GBS the one that more configurations of the experiment share."""
    out = []
    for fields in found:
        peers = [other for other in found if other["experiment"] == fields["experiment"]]
        local, total = fields["local_batch_size"], fields["local_batch_size"] * fields["devices"]
        same_local = {o["devices"] for o in peers if o["local_batch_size"] == local}
        same_total = {o["devices"] for o in peers if o["local_batch_size"] * o["devices"] == total}
        series = f"LBS {local}" if len(same_local) >= len(same_total) else f"GBS {total}"
        experiments = {other["experiment"] for other in found}
        experiment = fields["experiment"]
        rest = {key: value for key, value in fields.items() if key != "experiment"}
        out.append(rest | {"series": series if len(experiments) == 1 else f"{experiment}, {series}"})
    return out

"""The page about the energy of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.energy.findings import number
from callbacks.energy.record import read_folder
from callbacks.energy.report.page import Section, page, percent, png
from callbacks.energy.report.run_files import read_json, record_folder, run_summary, trace_points
from callbacks.energy.summary import J_PER_KWH, Facility, summarize

MAX_MACHINES = 8
"""Machines whose power is drawn; more of them make the page slow to open."""


def run_page(run_dir: Path) -> str:
    """One HTML page about the energy of a run."""
    summary, source = run_summary(run_dir)
    result = read_json(run_dir / "results.json") or {}
    name = (result.get("config") or {}).get("name") or result.get("name") or "run"
    sections = [_totals(summary, source), _run_figures(run_dir, summary), _stages(summary), _channels(summary)]
    if len(summary["hosts"]) > 1:
        sections.append(_machines(summary))
    if summary.get("epochs"):
        sections.append(_epochs(summary["epochs"]))
    if codecarbon := summary.get("codecarbon"):
        rows = [(key, _plain(value)) for key, value in sorted(codecarbon.items())]
        sections.append(Section("codecarbon's own totals", [], ("quantity", "value"), rows))
    return page(f"Energy of {name} ({run_dir.resolve().name})", sections)


def _plain(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value, 4)
    return str(value)


def _totals(summary: Mapping[str, Any], source: str) -> Section:
    co2 = f"{number(1000 * summary['co2_kg'])} g"
    origin = f"{summary['carbon_intensity_g_per_kwh']:g} g/kWh, {summary['carbon_intensity_source'] or 'no source'}"
    rows = [
        ("status", str(summary["status"])),
        ("energy of the machines", _energy(summary["it_j"])),
        (f"energy of the facility (PUE {summary['pue']:g})", _energy(summary["facility_kwh"] * J_PER_KWH)),
        (f"CO2 equivalents ({origin})", co2),
        ("measured by an instrument", percent(1 - summary["estimated_fraction"])),
        ("time with valid readings", percent(summary["coverage"])),
        ("duration", f"{number(summary['duration_s'], 4)} s"),
        ("power, mean / largest", f"{number(summary['mean_w'])} W / {number(summary['max_w'])} W"),
        ("device hours / node hours", f"{number(summary['device_hours'])} / {number(summary['node_hours'])}"),
    ]
    if summary.get("earlier_kwh"):
        rows.append(("earlier parts of the run, not included", _energy(summary["earlier_kwh"] * J_PER_KWH)))
    if summary.get("counts_exact") is False:
        rows.append(("samples", "extrapolated from one rank"))
    return Section("Totals", [f"From {source}."], ("", ""), rows)


def _energy(joules: float) -> str:
    return f"{number(joules, 4)} J ({number(joules / J_PER_KWH)} kWh)"


def _run_figures(run_dir: Path, summary: Mapping[str, Any]) -> Section:
    from callbacks.figures import energy as plots

    section = Section("Figures")
    folder = record_folder(run_dir)
    hosts = read_folder(folder)
    facility = Facility(summary["pue"], summary["carbon_intensity_g_per_kwh"], summary["carbon_intensity_source"])
    paths = sorted(folder.glob("*.jsonl"))
    if len(paths) > MAX_MACHINES:
        section.text.append(f"Power of the first {MAX_MACHINES} of {len(paths)} machines.")
    for path in paths[:MAX_MACHINES]:
        points, parts = trace_points(path)
        # A machine among several has a title of its own: its energy, not that of all.
        machine = next((h for h in hosts if path.stem.endswith(h.host_id)), None)
        shown = summary if len(paths) == 1 or machine is None else summarize([machine], machine.counts, facility)
        figure = plots.power_over_time(shown, points)
        if figure is None:
            continue
        if parts > 1:
            section.text.append(f"{path.stem}: the last of {parts} parts is drawn.")
        section.images.append((f"power over time, {path.stem}", png(figure)))
    others = (("energy by stage", plots.energy_by_stage), ("energy against metric", plots.energy_against_metric))
    for caption, plot in others:
        figure = plot(summary, [])
        if figure is not None:
            section.images.append((caption, png(figure)))
    return section


def _stages(summary: Mapping[str, Any]) -> Section:
    keys = ("it_j", "duration_s", "mean_w", "max_w", "samples", "updates", "j_per_sample", "j_per_update")
    columns = ("stage", "energy [J]", "time [s]", "mean [W]", "max [W]", "samples", "updates", "J/sample", "J/update")
    rows = []
    for name, values in summary["stages"].items():
        counts = {key: values[key] or None for key in ("samples", "updates")}
        shown = {**values, **counts}
        cells = [number(shown.get(key), 12 if key in counts else 4) for key in keys]
        rows.append((name, *cells, percent(1 - values["estimated_fraction"])))
    text = ["'fit' is the sum of its parts; all others add up to the total."] if "fit" in summary["stages"] else []
    return Section("Stages", text, (*columns, "measured"), rows)


def _channels(summary: Mapping[str, Any]) -> Section:
    nodes = any(channel["component"] == "node" for channel in summary["channels"].values())
    text = ["The node channel is the total, the others are its breakdown."] if nodes else []
    rows = [
        (
            name,
            channel["component"],
            "measured" if channel["measured"] else "estimated",
            number(channel["j"], 4),
            number(channel["mean_w"], 4),
            channel["source"],
            channel["device"] or "",
        )
        for name, channel in summary["channels"].items()
    ]
    return Section("Channels", text, ("channel", "part", "basis", "energy [J]", "mean [W]", "source", "device"), rows)


def _machines(summary: Mapping[str, Any]) -> Section:
    rows = [
        (name, number(host["it_j"], 4), str(host["segments"]), host["status"])
        for name, host in summary["hosts"].items()
    ]
    return Section("Machines", [], ("machine", "energy [J]", "parts", "status"), rows)


def _epochs(epochs: Sequence[Mapping[str, Any]]) -> Section:
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.get("metrics", {})))
    names = [name for name in names if not name.startswith("energy/")][:4]
    rows = [
        (
            str(epoch["epoch"]),
            *(number(epoch[key] * J_PER_KWH, 4) for key in ("it_kwh", "train_kwh", "val_kwh", "cumulative_kwh")),
            *(number(epoch[key], 4) for key in ("duration_s", "mean_w", "j_per_sample")),
            *(number(epoch["metrics"].get(name), 4) for name in names),
        )
        for epoch in epochs
    ]
    columns = ("epoch", "energy [J]", "training", "validation", "so far", "time [s]", "mean [W]", "J/sample", *names)
    return Section("Epochs", [], columns, rows)

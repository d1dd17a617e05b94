"""Pages about energy that open without a network: of one run, and of a study of several."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.energy.accounting import Tally
from callbacks.energy.findings import HERE, number
from callbacks.energy.meters.base import Channel
from callbacks.energy.record import Counts, read_folder, read_records
from callbacks.energy.runs import PHASES
from callbacks.energy.summary import J_PER_KWH, Facility, summarize
from callbacks.energy.trace import Point, Trace

MAX_MACHINES = 8
"""Machines whose power is drawn; more of them make the page slow to open."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; margin: 2rem auto; max-width: 76rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; font-weight: 600; } td:not(.n), th:not(.n) { text-align: left; }
td.n { white-space: nowrap; } img { max-width: 100%; height: auto; display: block; margin: .8rem 0; }
.tag { display: inline-block; border-radius: .6rem; padding: 0 .5rem; background: #eee; white-space: nowrap; }
.measured, .holds { background: #d5efe3; } .estimated { background: #fbe7c3; } .modelled { background: #e3e1f5; }
.fails { background: #f6d3cc; }
"""
_TAGS = {
    "measured": "measured", "estimated": "estimated", "modelled": "modelled", "holds": "holds",
    "does not hold": "fails", "cannot be told from these runs": "unknown",
}  # fmt: skip


_NUMBER = re.compile(r"-|(?:[≥≤] )?(?:[+-]?\d[\d.,]*(?:e-?\d+)?(?: %)?(?: \([^)]* to [^)]*\))?)?")


@dataclass
class Section:
    """A part of a page, for Markdown and HTML alike.

    Attributes:
        title: Heading.
        text: Paragraphs.
        columns: Names of the columns.
        rows: Cells, as many as columns.
        images: (caption, PNG).
    """

    title: str
    text: list[str] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    images: list[tuple[str, bytes]] = field(default_factory=list)


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Headings, paragraphs and tables; images are left out."""
    lines = [f"# {title}", ""]
    for section in sections:
        if not (section.text or section.rows):
            continue
        lines += [f"## {section.title}", ""]
        for paragraph in section.text:
            lines += [paragraph, ""]
        if section.rows:
            right = _right_aligned(section)
            lines.append("| " + " | ".join(section.columns) + " |")
            lines.append("|" + "|".join("---:" if r else "---" for r in right) + "|")
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            lines.append("")
    return "\n".join(lines)


def page(title: str, sections: Sequence[Section]) -> str:
    """One HTML file with everything in it."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text]
        if section.rows:
            parts.append(_table(section))
        for caption, image in section.images:
            data = base64.b64encode(image).decode("ascii")
            parts.append(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
    return "\n".join([*parts, "</body>\n</html>\n"])


def _table(section: Section) -> str:
    right = _right_aligned(section)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{html.escape(cell)}</{tag}>' if is_number else f"<{tag}>{_cell(cell)}</{tag}>"
            for cell, is_number in zip(row, right, strict=True)
        )

    lines = [f"<tr>{cells('td', row)}</tr>" for row in section.rows]
    head = f"<thead><tr>{cells('th', section.columns)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def _cell(text: str) -> str:
    kind = _TAGS.get(text, "estimated" if text.endswith(("% measured", "partly measured")) else None)
    return html.escape(text) if kind is None else f'<span class="tag {kind}">{html.escape(text)}</span>'


def _right_aligned(section: Section) -> list[bool]:
    """Whether a column holds numbers."""
    columns = zip(*section.rows, strict=True)
    return [all(_NUMBER.fullmatch(cell) for cell in column) and any(column) for column in columns]


def _percent(share: float | None, sign: bool = False) -> str:
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.0f} %"


# ------------------------------------------------------------------------------------------------------------ study

STUDY_TITLE = "Energy study: training and inference by node type"


def study_sections(study: Mapping[str, Any], images: Sequence[tuple[str, bytes]] = ()) -> list[Section]:
    """A study (`callbacks.energy.study.build`) as parts of a page."""
    modelled = [row for row in study["rows"] if row["kind"] != HERE]
    text = [f"{len(study['runs'])} runs. Energy is that of the machines, without PUE."]
    if modelled:
        text.append(
            "Rows marked 'modelled' were not run: they are what the runs would have used on a node profile, under the "
            "assumptions below."
        )
    findings = Section(
        "Findings of the paper",
        text,
        ("", "claim", "workload", "verdict", "basis", "numbers"),
        [
            (f["finding"], f["claim"], f["workload"], f["verdict"], f["basis"], f["text"])
            for f in sorted(study["findings"], key=lambda f: f["finding"])
        ],
    )
    parts = [findings]
    if images:
        parts.append(Section("Figures", images=list(images)))
    for workload in dict.fromkeys(row["workload"] for row in study["rows"]):
        for phase in PHASES:
            rows = [row for row in study["rows"] if (row["workload"], row["phase"]) == (workload, phase)]
            if rows:
                parts.append(_phase_section(f"{workload}: {phase}", rows))
    parts += [_comparison_section(study), _break_even_section(study)]
    if study["batch_sizes"]:
        parts.append(_batch_section(study["batch_sizes"]))
    return parts + _background_sections(study)


def headlines(study: Mapping[str, Any]) -> str:
    """The findings as lines for a terminal."""
    lines = ["Findings of the paper in these runs:"]
    for found in sorted(study["findings"], key=lambda f: f["finding"]):
        about = ", ".join(part for part in (found["workload"], found["basis"]) if part)
        lines.append(f"  {found['finding']:<3} {found['claim']} ({about}): {found['verdict'].upper()}")
        lines.append(f"      {found['text']}")
    return "\n".join(lines)


def _batch_section(sizes: Sequence[Mapping[str, Any]]) -> Section:
    return Section(
        "Batch sizes",
        ["On the front: no other size needs both less energy and less time per sample."],
        ("workload", "phase", "machine", "batch", "J/sample", "s/sample", "on the front"),
        [
            (
                *(size[key] for key in ("workload", "phase", "machine")),
                number(size["batch_size"], 12),
                *(number(size[key], 4) for key in ("j_per_sample", "s_per_sample")),
                "yes" if size["on_front"] else "no",
            )
            for size in sizes
        ],
    )


def _phase_section(title: str, rows: Sequence[Mapping[str, Any]]) -> Section:
    columns = (
        "node", "basis", "runs", "batch", "energy [J]", "time [s]", "E/t [W]", "J/sample", "J/update",
        "samples/device hour", "unused GPUs [J]", "error of TDP x time",
    )  # fmt: skip
    return Section(
        title,
        [],
        columns,
        [
            (
                row["node"],
                row["basis"],
                str(row["runs"]),
                number(row["batch_size"], 12),
                *(_bound(row, number(row[key], 4)) for key in ("energy_j", "time_s")),
                number(row["mean_w"], 4),
                _bound(row, _with_range(row)),
                _bound(row, number(row["j_per_update"], 4)),
                _bound(row, number(row["samples_per_device_hour"], 4), "≤"),
                _bound(row, number(row["idle_gpus_j"], 4)),
                _percent(row["tdp_x_time_error"], sign=True),
            )
            for row in rows
        ],
    )


def _bound(row: Mapping[str, Any], text: str, sign: str = "≥") -> str:
    """Marks the numbers of a modelled row that may be larger (smaller)."""
    return f"{sign} {text}" if row["lower_bound"] and text not in ("-", "0") else text


def _with_range(row: Mapping[str, Any]) -> str:
    low, high = row["j_per_sample_range"]
    shown = number(row["j_per_sample"], 4)
    return shown if row["runs"] == 1 or row["kind"] != HERE else f"{shown} ({number(low)} to {number(high)})"


def _comparison_section(study: Mapping[str, Any]) -> Section:
    return Section(
        "Training against inference",
        ["The last column is how many inferences cost as much as one training of the runs."],
        ("workload", "node", "basis", "J/sample, training", "J/sample, inference", "ratio", "inferences per training"),
        [
            (
                c["workload"],
                c["node"],
                c["basis"],
                number(c["training_j_per_sample"], 4),
                number(c["inference_j_per_sample"], 4),
                number(c["ratio"]),
                number(c["inferences_that_cost_the_training"]),
            )
            for c in study["comparisons"]
        ],
    )


def _break_even_section(study: Mapping[str, Any]) -> Section:
    pairs = [b for b in study["break_even"] if not b["assumed"]]
    assumed = len(study["break_even"]) - len(pairs)
    flips = [b for b in pairs if b["inferences"] is not None]
    text = ["When everything is done on one node: which costs less, and after how many inferences the other one does."]
    if len(flips) < len(pairs):
        text.append(
            f"For {len(pairs) - len(flips)} of {len(pairs)} pairs of nodes one of them is cheaper, however many "
            "inferences follow."
        )
    if assumed:
        text.append(
            f"Left out are {assumed} pairs of profiles: both are modelled from the same runs with one speed for "
            "training and inference, so that the model cannot but prefer one for both. It takes runs on CPU and GPU."
        )
    if not study["break_even"]:
        text.append("There are no two nodes with both training and inference.")
    rows = [
        (
            b["workload"],
            b["basis"],
            number(b["training_samples"], 12),
            b["cheaper_first"],
            number(b["inferences"]),
            b["cheaper_after"],
        )
        for b in flips
    ]
    columns = ("workload", "basis", "training samples", "cheaper up to", "inferences", "cheaper after that")
    return Section("Break-even", text, columns, rows)


def _background_sections(study: Mapping[str, Any]) -> list[Section]:
    given = study["assumptions"]
    text = [f"CPU load {given['cpu_load']:g}, utilisation of the GPUs that compute {given['gpu_utilisation']:g}."]
    profiles = Section(
        "Node profiles and assumptions",
        [*text, *given["notes"]],
        (
            "profile",
            "power [W]",
            "of it unused GPUs [W]",
            "TDP [W]",
            "sockets",
            "GPUs (used)",
            "CPU speed",
            "GPU speed",
        ),
        [
            (
                name,
                *(number(p[key], 4) for key in ("power_w", "idle_gpus_w", "tdp_w")),
                str(p["sockets"]),
                f"{p['num_gpus']} ({p['gpus_used']})",
                number(p["cpu_speed"]),
                number(p["gpu_speed"]),
            )
            for name, p in study["profiles"].items()
        ],
    )
    runs = Section(
        "Runs",
        [],
        ("run", "workload", "node", "notes"),
        [(name, run["workload"], run["node"], "; ".join(run["notes"])) for name, run in study["runs"].items()],
    )
    left_out = Section("Left out", [], ("run", "reason"), [*study["skipped"].items()])
    return [profiles, runs] + ([left_out] if study["skipped"] else [])


def study_figures(study: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by name."""
    from callbacks.figures import energy_study as plots

    return {name: png(getattr(plots, name)(study)) for name in ("node_types", "energy_against_time")}


# ---------------------------------------------------------------------------------------------------------- one run


def merge(run_dir: Path, facility: Facility | None = None) -> dict[str, Any]:
    """Add up all machines and all parts of a run.

    Without a facility that of the run's last part is taken.

    A machine's file holds the samples of the rank that recorded; all ranks do equal shares of the work.

    Raises:
        FileNotFoundError: If the run has no record.
    """
    hosts = read_folder(_record_folder(run_dir))
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


def _record_folder(run_dir: Path) -> Path:
    return run_dir if list(run_dir.glob("*.jsonl")) else run_dir / "energy"


def run_summary(run_dir: Path) -> tuple[dict[str, Any], str]:
    """Summary of a run and where it is from: what the run wrote at its end, else its record files.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If a file cannot be read.
    """
    written = _json(_record_folder(run_dir) / "summary.json") or {}
    stored = (_json(run_dir / "results.json") or {}).get("energy") or {}
    for summary, source in ((written, "energy/summary.json"), (stored, "results.json")):
        if summary.get("stages") and summary.get("status") in ("completed", "interrupted", "failed"):
            return summary, source
    known = written or stored
    facility = None  # that of the record: a run that was killed before its first report has no other
    if "pue" in known:
        facility = Facility(known["pue"], known["carbon_intensity_g_per_kwh"], known["carbon_intensity_source"])
    merged = merge(run_dir, facility) | {"epochs": known.get("epochs", [])}
    return merged, "the record files: the run did not end in order; samples are those of the recording processes"


def _json(path: Path) -> dict[str, Any] | None:
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


def run_page(run_dir: Path) -> str:
    """One HTML page about the energy of a run."""
    summary, source = run_summary(run_dir)
    result = _json(run_dir / "results.json") or {}
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
        ("measured by an instrument", _percent(1 - summary["estimated_fraction"])),
        ("time with valid readings", _percent(summary["coverage"])),
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
    folder = _record_folder(run_dir)
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
        rows.append((name, *cells, _percent(1 - values["estimated_fraction"])))
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

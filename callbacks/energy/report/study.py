"""A study of several runs (`callbacks.energy.study.build`) as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.energy.findings import HERE, number
from callbacks.energy.report.page import Section, percent, png
from callbacks.energy.runs import PHASES

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
                percent(row["tdp_x_time_error"], sign=True),
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

"""Layouts of processes side by side: functions of the finished jobs of a sweep, as `callbacks.layouts.read_jobs` gives.

A job is ``label`` (what distinguishes it), ``world_size``, ``samples`` and ``sample_parallel_size`` (None where there
are none), ``seconds`` and ``cpu_seconds`` per epoch (None where not noted), ``processes`` (rows of
`callbacks.footprint`) and ``epochs`` (rows of `callbacks.training_history`). A job has the same colour in every figure.
A function gives None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, plain_log_ticks, whole_numbers
from callbacks.figures.strategies import styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Job = Mapping[str, Any]

FIGURES = ("metrics_against_time", "memory_per_process", "scaling")
BEFORE, ADDED, IDEAL = "#BDBDBD", "#0072B2", "#8C8C8C"
_SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# What is shown of an epoch if it was noted, and how the axis is called.
_SHOWN = {"val/accuracy": "accuracy", "val/nll": "NLL", "val/ece": "ECE", "val/crps_scaled": "CRPS, scaled"}


def metrics_against_time(jobs: Sequence[Job]) -> Figure | None:
    """Metrics in validation over epochs (left) and over seconds of training, evaluations left out (right)."""
    values = [(job, _noted(job)) for job in jobs]
    names = [name for name in _SHOWN if any(name in row[1] for _, rows in values for row in rows)]
    if not names:
        return None
    looks = styles(jobs)
    figure, panels = make_figure(8.6, 0.9 + 2.5 * len(names), rows=len(names), columns=2)
    for line, name in enumerate(names):
        left, right = panels[2 * line : 2 * line + 2]
        left.sharey(right)
        for job, rows in values:
            found = [(row, metrics[name]) for row, metrics in rows if name in metrics]
            color, marker = looks[job["label"]]
            for axes, key in ((left, "epoch"), (right, "seconds")):
                axes.plot(
                    [row[key] for row, _ in found], [value for _, value in found], color=color, linewidth=1.2,
                    marker=marker, markersize=3.5, markevery=max(len(found) // 10, 1), label=job["label"],
                )  # fmt: skip
        left.set_ylabel(f"{_SHOWN[name]} (validation)")
        right.set_xlim(0, None)
        whole_numbers(left.xaxis)
    panels[-2].set_xlabel("epoch")
    panels[-1].set_xlabel("time of training [s]")
    handles, texts = panels[0].get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    columns = max(1, min(len(unique), 110 // (8 + max(map(len, unique)))))
    figure.legend(unique.values(), unique, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")
    return figure


def memory_per_process(jobs: Sequence[Job]) -> Figure | None:
    """What every process had in use when training began, and what training added at its peak."""
    jobs = [job for job in jobs if any("peak_mib" in row for row in job["processes"])]
    if not jobs:
        return None
    bars = sum(len(job["processes"]) for job in jobs)
    figure, (axes,) = make_figure(min(2.4 + 0.45 * bars, 12.0), 3.6)
    place, middles, tops = 0.0, [], []
    for job in jobs:
        rows = [row for row in job["processes"] if "peak_mib" in row]
        x = place + np.arange(len(rows))
        before = np.array([row["before_mib"] for row in rows])
        added = np.array([row["peak_mib"] for row in rows]) - before
        first = place == 0
        axes.bar(x, before, 0.85, color=BEFORE, label="when training began" if first else None)
        axes.bar(x, added, 0.85, bottom=before, color=ADDED, label="added by training" if first else None)
        for at, top, more in zip(x, before + added, added, strict=True):
            axes.annotate(
                f"+{more:.3g}", (at, top), ha="center", va="bottom", fontsize="x-small",
                rotation=90 if bars > 14 else 0, xytext=(0, 1), textcoords="offset points",
            )  # fmt: skip
        middles.append(x.mean())
        tops.append((before + added).max())
        place = x[-1] + 2
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(jobs) > 4 else {}
    axes.set_xticks(middles, [job["label"] for job in jobs], fontsize="small", **slanted)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, max(tops) * (1.25 if bars > 14 else 1.1))
    axes.set_ylabel("memory of a process [MiB]")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def scaling(jobs: Sequence[Job]) -> Figure | None:
    """Seconds of an epoch and efficiency over processes, for fixed samples (left) and for samples per process (right).

    Filled markers and lines are time, hollow ones and dashes CPU time of a process, which is what remains of it where
    there are more processes than cores. Efficiency: T(1) / (R T(R)) for a fixed workload, T(1) / T(R) for a
    proportional one.
    """
    groups = {"fixed number of samples": series(jobs, fixed=True), "samples per process": series(jobs, fixed=False)}
    groups = {title: found for title, found in groups.items() if found}
    if not groups:
        return None
    figure, panels = make_figure(4.4 * len(groups) + 0.4, 6.2, rows=2, columns=len(groups))
    for column, (title, found) in enumerate(groups.items()):
        above, below = panels[column], panels[column + len(groups)]
        fixed = title.startswith("fixed")
        for i, (number, rows) in enumerate(found.items()):
            color = _SHADES[i % len(_SHADES)]
            ranks = np.array([row["world_size"] for row in rows])
            label = f"S = {number:g}" if fixed else f"S = {number:g} R"
            for key, look in (("seconds", "o-"), ("cpu_seconds", "o--")):
                if any(row[key] is None for row in rows):
                    continue
                times = np.array([row[key] for row in rows])
                face = color if key == "seconds" else "white"
                name = label if key == "seconds" else None
                above.plot(ranks, times, look, color=color, markersize=5, markerfacecolor=face, label=name)
                efficiency = times[0] / times * (ranks[0] / ranks if fixed else 1.0)
                below.plot(ranks, efficiency, look, color=color, markersize=5, markerfacecolor=face)
            ideal = rows[0]["cpu_seconds"] or rows[0]["seconds"]
            above.plot(ranks, ideal * (ranks[0] / ranks if fixed else np.ones(len(ranks))), ":", color=IDEAL, zorder=0)
        below.axhline(1.0, color=IDEAL, linestyle=":", zorder=0)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["world_size"] for rows in found.values() for row in rows}))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        above.set_yscale("log")
        plain_log_ticks(above.yaxis)
        below.set_ylim(0, 1.15)
        above.set_title(title, fontsize="medium")
        below.set_xlabel("processes R")
        above.legend(frameon=False, fontsize="small")
    panels[0].set_ylabel("time of an epoch [s]")
    panels[len(groups)].set_ylabel("efficiency")
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="black", marker="o", label="time"),
        Line2D(
            [], [], color="black", marker="o", markerfacecolor="white", linestyle="--", label="CPU time per process"
        ),
        Line2D([], [], color=IDEAL, linestyle=":", label="ideal"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def series(jobs: Sequence[Job], fixed: bool) -> dict[float, list[dict[str, Any]]]:
    """Jobs of one curve, by samples (``fixed``) or by samples per process, ascending; means over equal ones.

    Curves begin with one process and have two points at least. Jobs count whose processes share samples alone.
    """
    found: dict[float, dict[int, list[Job]]] = {}
    for job in jobs:
        if job["samples"] is None or job["seconds"] is None or job["sample_parallel_size"] != job["world_size"]:
            continue
        number = job["samples"] if fixed else job["samples"] / job["world_size"]
        found.setdefault(number, {}).setdefault(job["world_size"], []).append(job)
    curves = {}
    for number, by_size in sorted(found.items()):
        if 1 in by_size and len(by_size) > 1:
            curves[number] = [
                {"world_size": size, **{key: _mean(equal, key) for key in ("seconds", "cpu_seconds")}}
                for size, equal in sorted(by_size.items())
            ]
    return curves


def _mean(jobs: Sequence[Job], key: str) -> float | None:
    values = [job[key] for job in jobs]
    return None if None in values else float(np.mean(values))


def _noted(job: Job) -> list[tuple[Mapping[str, Any], dict[str, float]]]:
    """Rows of the epochs of a job, and what was measured after each."""
    rows = []
    for row in job["epochs"]:
        metrics = dict(row.get("metrics") or {})
        if row.get("metric") is not None:
            metrics.setdefault(job["metric_name"], row["metric"])
        rows.append((row, metrics))
    return rows

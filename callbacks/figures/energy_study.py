"""Figures of the energy study: functions ``study -> Figure`` of what `callbacks.energy.study.build` returns.

A phase has the same colour in every figure. Filled markers are runs, hollow ones are modelled.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.energy.findings import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = {"training": "#E69F00", "inference": "#0072B2"}
_MARKERS = "osD^vP*Xp"


def node_types(study: Mapping[str, Any]) -> Figure:
    """J per sample of training and inference, a line per node type, a panel per workload."""
    from matplotlib.figure import Figure

    workloads = _workloads(study)
    nodes = {workload: _nodes(study, workload) for workload in workloads}
    heights = [len(found) + 0.9 for found in nodes.values()]
    figure = Figure(figsize=(8.4, 1.1 + 0.46 * sum(heights) + 0.25 * len(workloads)), layout="constrained")
    panels = figure.subplots(len(workloads), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, workload in zip(panels, workloads, strict=True):
        _node_panel(axes, study, workload, nodes[workload])
    panels[-1].set_xlabel("energy per sample [J]")
    figure.legend(handles=_legend(), loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def energy_against_time(study: Mapping[str, Any]) -> Figure:
    """Energy over time, both per sample: were run time energy, all points would lie on one of the dotted lines."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    workloads = _workloads(study)
    columns = min(len(workloads), 2)
    lines = -(-len(workloads) // columns)
    figure = Figure(figsize=(5.4 * columns + (2.6 if columns == 1 else 0.0), 1.2 + 4.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(row["node"] for row in sorted(study["rows"], key=lambda row: row["kind"] != "here")))
    for axes, workload in zip(panels, workloads, strict=False):
        _scatter_panel(axes, [row for row in study["rows"] if row["workload"] == workload], names)
        axes.set_title("\n".join(textwrap.wrap(workload, 48)), fontsize="medium")
    for axes in panels[len(workloads) :]:
        axes.set_visible(False)
    handles = [
        Line2D([], [], color="#555555", marker=_marker(i), linestyle="", label="\n".join(textwrap.wrap(name, 52)))
        for i, name in enumerate(names)
    ]
    power = Line2D([], [], color="#AAAAAA", linewidth=1.0, linestyle=":", label="same power")
    figure.legend(handles=[*_legend(), power], loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _workloads(study: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["workload"] for row in study["rows"]))


def _nodes(study: Mapping[str, Any], workload: str) -> list[tuple[str, str]]:
    """(kind, node) of a workload, runs first."""
    return list(dict.fromkeys((r["kind"], r["node"]) for r in study["rows"] if r["workload"] == workload))


def _marker(i: int) -> str:
    return _MARKERS[i % len(_MARKERS)]


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    phases = [Line2D([], [], color=c, marker="o", linestyle="", label=name) for name, c in PHASES.items()]
    kinds = [
        Line2D([], [], color="#555555", marker="o", linestyle="", label="from runs"),
        Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="", label="modelled, at best"),
    ]
    return phases + kinds


def _styled(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def _node_panel(axes: Axes, study: Mapping[str, Any], workload: str, nodes: Sequence[tuple[str, str]]) -> None:
    _styled(axes)
    axes.set_xscale("log")
    values = []
    for line, (kind, node) in enumerate(nodes):
        found = {
            row["phase"]: row
            for row in study["rows"]
            if (row["workload"], row["kind"], row["node"]) == (workload, kind, node)
        }
        points = {phase: row["j_per_sample"] for phase, row in found.items()}
        values += points.values()
        axes.plot(list(points.values()), [line] * len(points), color="#BBBBBB", linewidth=1.4, zorder=2)
        highest = max(points, key=points.__getitem__)
        for phase, joules in points.items():
            color = PHASES[phase]
            filled = color if kind == "here" else "white"
            axes.plot(joules, line, marker="o", markersize=7, color=color, markerfacecolor=filled, zorder=3)
            right = phase == highest
            axes.annotate(
                number(joules), (joules, line), xytext=(8 if right else -8, 0), textcoords="offset points",
                ha="left" if right else "right", va="center", fontsize="small",
            )  # fmt: skip
    labels = [f"{node}\n({_basis(study, workload, kind, node)})" for kind, node in nodes]
    axes.set_yticks(range(len(nodes)), ["\n".join(_wrapped(label)) for label in labels], fontsize="small")
    axes.set_ylim(len(nodes) - 0.4, -0.6)
    # Room for the numbers, whatever the range.
    span = max(max(values) / min(values), 3.0) ** 0.22
    axes.set_xlim(min(values) / span, max(values) * span)
    _plain_ticks(axes.xaxis)
    axes.set_title(workload, loc="left", fontsize="medium")


def _wrapped(label: str) -> list[str]:
    return [part for line in label.split("\n") for part in textwrap.wrap(line, 38)]


def _basis(study: Mapping[str, Any], workload: str, kind: str, node: str) -> str:
    bases = [
        row["basis"] for row in study["rows"] if (row["workload"], row["kind"], row["node"]) == (workload, kind, node)
    ]
    return " / ".join(dict.fromkeys(bases))


def _scatter_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    _styled(axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in rows:
        color = PHASES[row["phase"]]
        axes.plot(
            row["s_per_sample"], row["j_per_sample"], marker=_marker(names.index(row["node"])), markersize=7,
            color=color, markerfacecolor=color if row["kind"] == "here" else "white", linestyle="", zorder=3,
        )  # fmt: skip
    times = np.array([row["s_per_sample"] for row in rows])
    joules = np.array([row["j_per_sample"] for row in rows])
    x = times.min() / 1.9, times.max() * 1.9
    y = joules.min() / 1.9, joules.max() * 1.9
    powers = 10.0 ** np.arange(np.floor(np.log10(y[0] / x[1])), np.ceil(np.log10(y[1] / x[0])) + 1)
    for watts in powers:
        axes.plot(x, (watts * x[0], watts * x[1]), color="#AAAAAA", linewidth=0.8, linestyle=":", zorder=1)
        # The name of a line stands on it, close to where it leaves the panel.
        inner = x[1] / (x[1] / x[0]) ** 0.04, y[1] / (y[1] / y[0]) ** 0.04
        time = min(inner[0], inner[1] / watts)
        if time > x[0] * (x[1] / x[0]) ** 0.06 and watts * time > y[0] * (y[1] / y[0]) ** 0.04:
            axes.text(
                time, watts * time, f"{number(watts)} W", ha="center", va="center", fontsize="x-small", color="#777777",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0}, zorder=1.5,
            )  # fmt: skip
    axes.set_xlim(x)
    axes.set_ylim(y)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.set_xlabel("time per sample [s]")
    axes.set_ylabel("energy per sample [J]")


def _plain_ticks(axis: Any) -> None:
    """Numbers a person reads, also where the range is less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    wide = high / low > 30
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())

"""Strategies side by side: functions of the finished runs of a sweep, as `callbacks.comparison.read_sweep` gives them.

A strategy has the same colour in both figures; several seeds of one are several lines and points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from callbacks.figures.axes import make_figure, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("loss_against_time", "accuracy_against_bytes")
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#882255")
_MARKERS = "osD^vP*Xp"


def loss_against_time(runs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Training loss over seconds of training, evaluations left out, a line per run."""
    drawn = [(run, [row for row in run["epochs"] if row["loss"] is not None]) for run in runs]
    drawn = [(run, rows) for run, rows in drawn if rows]
    if not drawn:
        return None
    looks = styles(runs)
    figure, (axes,) = make_figure(7.6, 4.2)
    if all(row["loss"] > 0 for _, rows in drawn for row in rows):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    named: set[str] = set()
    for run, rows in drawn:
        label = run["label"]
        color, marker = looks[label]
        name = None if label in named else label
        named.add(label)
        axes.plot(
            [row["seconds"] for row in rows], [row["loss"] for row in rows], color=color, linewidth=1.3,
            marker=marker, markersize=4, markevery=max(len(rows) // 8, 1), label=name,
        )  # fmt: skip
    axes.set_xlim(0, None)
    axes.set_xlabel("time of training [s]")
    axes.set_ylabel("training loss")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def accuracy_against_bytes(runs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Test metric over what all ranks sent between nodes, a point per run."""
    points = [run for run in runs if run["metric"] is not None and run["inter_node_bytes"]]
    if not points:
        return None
    looks = styles(runs)
    figure, (axes,) = make_figure(7.6, 4.2)
    megabytes = [run["inter_node_bytes"] / 1e6 for run in points]
    if max(megabytes) > 5 * min(megabytes):
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    named: set[str] = set()
    for run, x in zip(points, megabytes, strict=True):
        label = run["label"]
        color, marker = looks[label]
        name = None if label in named else label
        named.add(label)
        axes.plot(x, run["metric"], color=color, marker=marker, markersize=8, linestyle="", label=name)
    axes.set_xlabel("sent between nodes in the whole training [MB]")
    axes.set_ylabel(points[0]["metric_name"])
    axes.margins(0.08, 0.12)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def styles(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every label."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    return {
        label: (_COLORS[i % len(_COLORS)], _MARKERS[(i + i // len(_COLORS)) % len(_MARKERS)])
        for i, label in enumerate(labels)
    }

"""Figures of low-rank training: functions of the history that `callbacks.low_rank` and `callbacks.stability` keep.

As in `callbacks.figures.forecast` a role has the same colour in every figure, and pyplot is not used. A function gives
None where there is nothing to show yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import MAX_LABELS, cell_edges, heat_map, make_figure, map_height, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC, TRAINABLE, STORED, MIXING = "#0072B2", "#D55E00", "#8C8C8C", "#CC79A7"
_TITLE = 36  # characters that fit above one of four panels


def stability(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Stability of every layer (rows) over epochs, and below the mean over layers of basis and mixing."""
    if not history:
        return None
    epochs = [row["epoch"] for row in history]
    labels = list(history[-1]["stability"])
    turned, mixed = (
        np.array([[row[kind].get(label, np.nan) for row in history] for label in labels])
        for kind in ("stability", "r_similarity")
    )
    figure, (above, below) = make_figure(
        7.0, 2.6 + map_height(len(labels)), rows=2, heights=(map_height(len(labels)), 2)
    )
    lowest = float(np.nanmin(turned)) if np.isfinite(turned).any() else 0.0
    image = heat_map(above, turned, epochs, labels, vmin=min(lowest, 0.9), vmax=1.0)
    figure.colorbar(image, ax=[above, below], label="stability of the basis", pad=0.01)
    with np.errstate(invalid="ignore"):
        below.plot(epochs, np.nanmean(turned, axis=0), color=METRIC, marker="o", markersize=3, label="basis, mean")
        below.plot(epochs, np.nanmean(mixed, axis=0), color=MIXING, marker="o", markersize=3, label="mixing R, mean")
    _share_epochs(above, below, epochs)
    below.set_xlabel("epoch")
    below.set_ylabel("similarity to earlier")
    below.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def ranks(history: Mapping[str, Any]) -> Figure | None:
    """Rank of every layer as a share of its short side (rows) over epochs; the last rank is written at the right."""
    rows = history["rows"]
    if not rows:
        return None
    labels = list(rows[-1]["ranks"])
    sides = history["sides"]
    shares = np.array([[row["ranks"].get(label, np.nan) / sides[label][1] for row in rows] for label in labels])
    figure, (axes,) = make_figure(7.0, 1.1 + map_height(len(labels)))
    image = heat_map(axes, shares, [row["epoch"] for row in rows], labels, vmin=0.0, vmax=1.0)
    if len(labels) <= MAX_LABELS:
        last = [f"{rows[-1]['ranks'][label]} of {sides[label][1]}" for label in labels]
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(labels)), last, fontsize="small")
        right.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="rank / full rank", pad=0.02)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    return figure


def metric_and_parameters(history: Mapping[str, Any]) -> Figure | None:
    """Validation metric (left axis), trainable and stored parameters in percent of the dense network (right axis)."""
    rows = history["rows"]
    if not rows:
        return None
    epochs = [row["epoch"] for row in rows]
    figure, (left,) = make_figure(7.0, 3.6)
    right = left.twinx()
    right.spines[["top", "left"]].set_visible(False)
    left.grid(visible=False)  # it would lie above the lines of the other axis
    right.grid(color="#E5E5E5", linewidth=0.6)
    right.set_axisbelow(True)
    for name, color in (("trainable", TRAINABLE), ("stored", STORED)):
        right.step(epochs, [100 * row[name] for row in rows], where="mid", color=color, label=f"{name} parameters")
    right.set_ylim(0, None)
    right.set_ylabel("parameters [% of dense]")
    measured = [(row["epoch"], row["metric"]) for row in rows if row["metric"] is not None]
    if measured:
        name = rows[-1]["metric_name"]
        left.plot(*zip(*measured, strict=True), color=METRIC, marker="o", markersize=3, label=name)
        left.set_ylabel(name)
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    whole_numbers(left.xaxis)
    left.set_xlabel("epoch")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def spectra(history: Mapping[str, Any]) -> Figure | None:
    """Singular values of every layer, relative to the largest, at its conversion and after its last update."""
    found = {label: pair for label, pair in history["spectra"].items() if "before" in pair}
    if not found:
        return None
    shown = list(found.items())[:12]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = make_figure(2.6 * columns + 0.6, 2.1 * lines + 0.6, rows=lines, columns=columns)
    for panel, (label, pair) in zip(axes, shown, strict=False):
        for name, color in (("before", STORED), ("after", TRAINABLE)):
            values = np.array(pair.get(name, []))
            if len(values) and values[0] > 0:
                text = {"before": "at conversion", "after": "after the last update"}[name]
                panel.plot(np.arange(1, len(values) + 1), values / values[0], color=color, label=text)
        panel.set_title(in_lines(label), fontsize="small")
        panel.set_ylim(0, 1.05)
    for panel in axes[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("index", fontsize="medium")
    figure.supylabel("singular value / largest", fontsize="medium")
    handles, texts = next(((h, t) for h, t in (a.get_legend_handles_labels() for a in axes) if len(h) > 1), ([], []))
    figure.legend(handles, texts, loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def accuracy_against_stored(
    rows: Sequence[Mapping[str, Any]], metric: str = "test/accuracy", by: str = "callbacks"
) -> Figure | None:
    """A metric over the stored parameters of each method: the table of ``experiment=oialr/compare`` as a picture.

    Args:
        rows: Lines of the sweep's ``table.csv``.
        metric: Name of the metric.
        by: Column that names the method.
    """
    points = [row for row in rows if row.get(metric) not in (None, "") and row.get("test/stored_fraction")]
    if not points:
        return None
    figure, (axes,) = make_figure(5.6, 3.8)
    methods = list(dict.fromkeys(row[by] for row in points))
    colors = (METRIC, TRAINABLE, "#009E73", MIXING, "#E69F00", "#56B4E9", STORED)
    for i, method in enumerate(methods):
        own = [row for row in points if row[by] == method]
        x = [100 * float(row["test/stored_fraction"]) for row in own]
        label = f"{method} (dense)" if set(x) == {100.0} else method
        axes.scatter(x, [float(row[metric]) for row in own], color=colors[i % len(colors)], label=label, s=30)
    axes.set_xlim(0, None)
    axes.set_xlabel("stored parameters [% of dense]")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, fontsize="small")
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _share_epochs(above: Any, below: Any, epochs: Sequence[int]) -> None:
    edges = cell_edges(epochs)
    for axes in (above, below):
        axes.set_xlim(edges[0], edges[-1])
        whole_numbers(axes.xaxis)


def in_lines(name: str, width: int = _TITLE) -> str:
    """The name of a layer, broken behind its dots where a line would have more than ``width`` characters."""
    lines = [""]
    for part in name.replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)

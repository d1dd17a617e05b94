"""Figures of training by feedback: angles of gradients over a training, and methods side by side.

A method has the same colour in every figure; pyplot is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import MAX_LABELS, cell_edges, heat_map, make_figure, map_height, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {
    "bp": "#000000", "f3": "#D55E00", "dfa": "#0072B2", "drtp": "#009E73", "fa": "#CC79A7", "llo": "#8C8C8C",
    "delayed_error": "#D55E00", "delayed_error_one_hot": "#E69F00", "delayed_error_softmax": "#882255",
    "delayed_loss": "#56B4E9", "delayed_loss_one_hot": "#999933", "delayed_loss_softmax": "#44AA99", "zeros": "#BBBBBB",
}  # fmt: skip
_MARKERS = "osD^vP*X<>hp"


def cosine_by_block(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Cosine between the gradient of every block (rows, the first on top) and that of backpropagation over epochs.

    Args:
        history: Rows of `callbacks.feedback_probe` with ``epoch``, ``blocks`` and ``cosine``.
    """
    if not history:
        return None
    blocks = history[-1]["blocks"]
    values = np.array([[row["cosine"][i] for row in history] for i in range(len(blocks))], dtype=float)
    figure, (axes,) = make_figure(7.0, 1.2 + map_height(len(blocks)))
    labels = [f"block {i + 1}" for i in blocks] if len(blocks) <= MAX_LABELS else list(map(str, blocks))
    epochs = [row["epoch"] for row in history]
    image = heat_map(axes, values, epochs, labels, vmin=-1.0, vmax=1.0)
    image.set_cmap("RdBu_r")
    axes.set_xlim(cell_edges(epochs)[[0, -1]])
    whole_numbers(axes.xaxis)
    figure.colorbar(image, ax=axes, label="cosine to bp", pad=0.02)
    axes.set_xlabel("epoch")
    return figure


def error_against_epoch(runs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Error on the validation part over epochs, a line per method, means of its seeds, with their range.

    Args:
        runs: ``label``, ``algorithm``, ``curve`` (a number or None per epoch) and ``curve_name`` of every run.
    """
    drawn = [run for run in runs if len([v for v in run["curve"] if v is not None]) > 1]
    if not drawn:
        return None
    figure, (axes,) = make_figure(7.6, 4.2)
    looks = styles(runs)
    for label in dict.fromkeys(run["label"] for run in drawn):
        curves = [run["curve"] for run in drawn if run["label"] == label]
        length = min(map(len, curves))
        values = np.array([[math.nan if v is None else v for v in curve[:length]] for curve in curves])
        epochs = np.arange(1, length + 1)
        color, marker = looks[label]
        kept = np.isfinite(values).all(0)
        mean = values[:, kept].mean(0)
        axes.plot(
            epochs[kept], mean, color=color, linewidth=1.4, marker=marker, markersize=4,
            markevery=max(kept.sum() // 8, 1), label=label,
        )  # fmt: skip
        if len(curves) > 1:
            axes.fill_between(
                epochs[kept], values[:, kept].min(0), values[:, kept].max(0), color=color, alpha=0.15, linewidth=0
            )
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    whole_numbers(axes.xaxis)
    axes.set_xlim(0, None)
    axes.set_xlabel("epoch")
    axes.set_ylabel(drawn[0]["curve_name"])
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _plain_numbers(axis: Any) -> None:
    from callbacks.figures.axes import plain_log_ticks

    plain_log_ticks(axis)


def error_and_gap(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Error of every method (left), and how much of the gap between drtp and bp it closes (right).

    Args:
        rows: Of `callbacks.feedback_comparison.summarize`.
    """
    if not rows:
        return None
    with_gap = any(row["closed"] is not None for row in rows)
    height = 1.3 + 0.36 * len(rows)
    figure, panels = make_figure(8.2 if with_gap else 5.2, height, columns=2 if with_gap else 1)
    places = np.arange(len(rows))
    colors = [_color(row["algorithm"], i) for i, row in enumerate(rows)]
    left = panels[0]
    left.barh(places, [row["error"] for row in rows], color=colors, height=0.62)
    for place, row in zip(places, rows, strict=True):
        left.plot(row["errors"], [place] * len(row["errors"]), "|", color="#FFFFFF", markersize=7, markeredgewidth=1.2)
        left.annotate(f"{row['error']:.3g}", (row["error"], place), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize="small")  # fmt: skip
    left.set_yticks(places, [row["label"] for row in rows])
    left.invert_yaxis()
    left.margins(x=0.15)
    left.set_xlabel(rows[0]["metric_name"])
    if with_gap:
        right = panels[1]
        for place, row, color in zip(places, rows, colors, strict=True):
            if row["closed"] is None:
                continue
            percent = [None if v is None else 100 * v for v in row["closed"]]
            right.barh(place, percent[0], color=color, height=0.62)
            if percent[1] is not None:
                right.plot(percent[1:], [place, place], color="#444444", linewidth=1.2)
        right.axvline(0, color="#444444", linewidth=0.8)
        right.axvline(100, color="#444444", linewidth=0.8, linestyle=":")
        right.set_yticks(places, [""] * len(rows))
        right.set_ylim(left.get_ylim())
        right.set_xlabel("gap closed, 0: drtp, 100: bp [%]")
    for axes in panels:
        axes.grid(axis="y", visible=False)
    return figure


def cost(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Tensors alive at the peak of a step, and its time, of every method."""
    drawn = [row for row in rows if row["peak_mib"] is not None and row["step_ms"] is not None]
    if not drawn:
        return None
    figure, panels = make_figure(8.2, 1.3 + 0.36 * len(drawn), columns=2)
    places = np.arange(len(drawn))
    for axes, key, name in zip(
        panels, ("peak_mib", "step_ms"), ("tensors at the peak [MiB]", "step [ms]"), strict=True
    ):
        colors = [_color(row["algorithm"], i) for i, row in enumerate(drawn)]
        axes.barh(places, [row[key] for row in drawn], color=colors, height=0.62)
        axes.set_yticks(places, [row["label"] for row in drawn] if axes is panels[0] else [""] * len(drawn))
        axes.invert_yaxis()
        axes.set_xlabel(name)
        axes.grid(axis="y", visible=False)
    return figure


def _color(algorithm: str, place: int) -> str:
    return _COLORS.get(algorithm, list(_COLORS.values())[place % len(_COLORS)])


def styles(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every label."""
    labels = list(dict.fromkeys(run["label"] for run in runs))
    algorithms = {run["label"]: run["algorithm"] for run in runs}
    several = len(set(algorithms.values())) < len(labels)  # conditions differ: a colour for each
    palette = list(_COLORS.values())
    return {
        label: (palette[i % len(palette)] if several else _color(algorithms[label], i), _MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(labels)
    }

"""Figures of pruning studies: functions of the rows of a table (`callbacks.pruning_table`).

A role has the same look in every figure: networks that were not trained since are hollow and dashed, fine-tuned ones
filled and solid, dense networks a band, simple forecasts dotted lines. Rows of several runs are told apart by
``label``. A function gives None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import heat_map, make_figure, map_height, plain_log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
REFERENCE = {"repeat last day": ":", "DLinear": (0, (1, 3))}
STAGES = {"pruned": ("--", "white"), "tuned": ("-", None)}


def _label(row: Mapping[str, Any]) -> str:
    return str(row.get("label") or row["method"])


def _series(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Pruned networks by label, densest first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["stage"] in STAGES:
            found.setdefault(_label(row), []).append(row)
    return {name: sorted(own, key=lambda row: -row["density"]) for name, own in found.items()}


def _models(rows: Rows) -> list[str]:
    return list(dict.fromkeys(str(row.get("model", "")) for row in rows))


def _references(axes: Any, rows: Rows) -> None:
    for name, style in REFERENCE.items():
        values = [row["mse"] for row in rows if row["name"] == name]
        if values:
            axes.axhline(np.mean(values), color="#555555", linestyle=style, linewidth=1.2, label=name)


def _clip(axes: Any, rows: Rows) -> None:
    """Let a diverged network not press all others together."""
    values = [row["mse"] for row in rows if np.isfinite(row["mse"])]
    low, high = min(values), np.quantile(values, 0.9) * 1.25
    if max(values) > 1.6 * high:
        axes.set_ylim(low - 0.08 * (high - low), high)


def error_against_density(rows: Rows) -> Figure | None:
    """Test error over the density of the model, a panel per model: before and after fine-tuning, dense as a band."""
    if not _series(rows):
        return None
    models = _models(rows)
    handles: dict[str, Any] = {}
    figure, panels = make_figure(
        5.6 * min(len(models), 3), 3.9 * -(-len(models) // 3), -(-len(models) // 3), min(len(models), 3)
    )
    for model, axes in zip(models, panels, strict=False):
        own = [row for row in rows if str(row.get("model", "")) == model]
        dense = [row["mse"] for row in own if row["stage"] == "dense"]
        control = [row["mse"] for row in own if row["stage"] == "control"]
        if dense:
            values = [*dense, *control]
            axes.axhspan(min(values), max(values), color="#BBBBBB", alpha=0.45, linewidth=0)
            axes.axhline(np.mean(dense), color="#777777", linewidth=1.2, label="dense")
            if control:
                axes.axhline(
                    np.mean(control), color="#777777", linewidth=1.2, linestyle="-.", label="dense, more epochs"
                )
        for colour, (label, series) in zip(COLOURS, _series(own).items(), strict=False):
            for stage, (style, face) in STAGES.items():
                points = [row for row in series if row["stage"] == stage]
                if points:
                    axes.plot(
                        [row["density_model"] for row in points],
                        [row["mse"] for row in points],
                        color=colour,
                        linestyle=style,
                        marker="o",
                        markersize=5,
                        markerfacecolor=face or colour,
                        label=f"{label}, fine-tuned" if stage == "tuned" else label,
                    )
        _references(axes, own)
        _clip(axes, own)
        axes.set_xscale("log")
        axes.invert_xaxis()
        plain_log_ticks(axes.xaxis)
        axes.set_xlabel("part of all numbers of the model that is left")
        axes.set_ylabel("test MSE, scaled")
        axes.set_title(model)
        for line in axes.get_lines():
            if not line.get_label().startswith("_"):
                handles.setdefault(line.get_label(), line)
    _legend(figure, list(handles.values()))
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    return figure


def error_against_cost(rows: Rows) -> Figure | None:
    """Test error over latency, energy and size on disk: who is on the lower left edge."""
    shown = [row for row in rows if row["stage"] != "reference"]
    if not shown:
        return None
    times = sorted(
        {n for row in shown for n in row if n.startswith("latency_") and "sparse" not in n and row[n] is not None},
        key=lambda name: int(name.split("_")[1]),
    )
    panels = [(times[-1], f"latency, ms (batch {times[-1].split('_')[1]})", 1.0)] if times else []
    if any(row.get("joules") for row in shown):
        panels.append(("joules", "energy of a forecast, mJ", 1e3))
    panels.append(("sparse_bytes", "file without zeros, kB", 1e-3))
    figure, all_axes = make_figure(4.3 * len(panels), 4.0, 1, len(panels))
    look = _Look(shown)
    for axes, (column, title, scale) in zip(all_axes, panels, strict=True):
        named = set()
        for row in shown:
            if not row.get(column):
                continue
            place = (row[column] * scale, row["mse"])
            axes.plot(*place, linestyle="", markersize=6, **look.of(row))
            if look.single and row["stage"] in STAGES and row["density"] not in named:
                named.add(row["density"])
                axes.annotate(
                    f"{row['density']:.2g}", place, xytext=(4, 4), textcoords="offset points", fontsize="x-small"
                )
        _references(axes, rows)
        _clip(axes, shown)
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlabel(title)
        axes.set_ylabel("test MSE, scaled")
    _legend(figure, [*look.handles(), *_reference_handles(rows)])
    return figure


class _Look:
    """Colours of models where there are several, else of methods; markers of methods."""

    markers = ("o", "^", "v", "P", "X", "<", ">")

    def __init__(self, rows: Rows) -> None:
        self.models = _models(rows)
        self.labels = list(_series(rows))
        self.single = len(self.models) == 1 and len(self.labels) == 1

    def of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Marker and colours of a row."""
        stage, several = row["stage"], len(self.models) > 1
        if stage in STAGES:
            number = self.labels.index(_label(row))
            marker = self.markers[number % len(self.markers)]
        else:
            number, marker = -2, "s" if stage == "dense" else "D"
        number = self.models.index(str(row.get("model", ""))) if several else number
        colour = COLOURS[number % len(COLOURS)]
        face = "white" if stage in ("pruned", "control") else colour
        return {"marker": marker, "color": colour, "markerfacecolor": face}

    def handles(self) -> list[Any]:
        """Entries of the legend."""
        from matplotlib.lines import Line2D

        several = len(self.models) > 1
        found = []
        if several:
            found += [
                Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=4, label=model)
                for i, model in enumerate(self.models)
            ]
        for i, label in enumerate(self.labels):
            colour = "#444444" if several else COLOURS[i % len(COLOURS)]
            for name, face in ((label, "white"), (f"{label}, fine-tuned", colour)):
                style = {"marker": self.markers[i % len(self.markers)], "markerfacecolor": face, "linestyle": ""}
                found.append(Line2D([], [], color=colour, label=name, **style))
        colour = "#444444" if several else COLOURS[-2]
        for name, marker, face in (("dense", "s", colour), ("dense, more epochs", "D", "white")):
            found.append(Line2D([], [], color=colour, marker=marker, markerfacecolor=face, linestyle="", label=name))
        return found


def _reference_handles(rows: Rows) -> list[Any]:
    from matplotlib.lines import Line2D

    there = {row["name"] for row in rows}
    return [Line2D([], [], color="#555555", linestyle=s, label=n) for n, s in REFERENCE.items() if n in there]


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    columns = min(len(handles), max(2, int(figure.get_figwidth() // 1.9)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def layer_densities(rows: Rows) -> Figure | None:
    """Which layers lose: part that is left of every tensor (downwards) at every density (to the right)."""
    series = [row for row in rows if row["stage"] == "pruned" and row.get("layers")]
    series = [row for row in series if row.get("model", "") == series[0].get("model", "")]
    series = sorted((r for r in series if _label(r) == _label(series[0])), key=lambda row: -row["density"])
    if len(series) < 2:
        return None
    layers = list(series[0]["layers"])
    values = np.array([[row["layers"][name] for row in series] for name in layers])
    figure, (axes,) = make_figure(7.5, 1.2 + map_height(len(layers)))
    names = [name.removesuffix(".weight").removeprefix("backbone.") for name in layers]
    image = heat_map(axes, values, list(range(len(series))), names, vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(series)), [f"{row['density']:.3g}" for row in series])
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set_xlabel(f"density ({_label(series[0])})")
    figure.colorbar(image, ax=axes, label="part of the layer that is left", pad=0.01)
    return figure


def parameters(rows: Rows) -> Figure | None:
    """Test error over the numbers that are not zero: pruned networks against small dense ones and linear ones."""
    shown = [row for row in rows if row.get("parameters") and row["stage"] != "reference"]
    if not any(row["stage"] in STAGES for row in shown):
        return None
    figure, (axes,) = make_figure(6.4, 5.0)
    look = _Look(shown)
    for model in look.models:
        own = [row for row in shown if str(row.get("model", "")) == model]
        for label in look.labels:
            for stage, (style, _) in STAGES.items():
                points = [row for row in own if row["stage"] == stage and _label(row) == label]
                points.sort(key=lambda row: row["density"])
                if points:
                    places = [row["nnz"] for row in points], [row["mse"] for row in points]
                    axes.plot(*places, linestyle=style, markersize=5, **look.of(points[0]))
        for row in own:
            if row["stage"] not in STAGES:
                axes.plot(row["nnz"], row["mse"], linestyle="", markersize=7, **look.of(row))
    _references(axes, rows)
    _clip(axes, shown)
    axes.set_xscale("log")
    axes.set_xlabel("numbers that are not zero")
    axes.set_ylabel("test MSE, scaled")
    _legend(figure, [*look.handles(), *_reference_handles(rows)])
    return figure

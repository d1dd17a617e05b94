"""Figures of a run's energy: functions ``(summary, points) -> Figure`` that `callbacks.energy.callback` calls.

``summary`` is that of `callbacks.energy.summary.summarize` with ``epochs``, ``points`` are the `Point` of its trace. As
in `callbacks.figures.forecast` a role has the same colour in every figure, and pyplot is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from callbacks.energy.trace import Point

COMPONENTS = {"gpu": "#009E73", "cpu": "#0072B2", "dram": "#56B4E9", "node": "#8C8C8C", "other": "#CC79A7"}
STAGES = {
    "startup": "#BDBDBD", "fit/sanity": "#F6D7A8", "fit/train": "#E69F00", "fit/val": "#F0E442", "fit/other": "#D9D9D9",
    "validate": "#F0E442", "test": "#D55E00", "predict": "#8C564B", "idle": "#F2F2F2",
}  # fmt: skip
"""Beside `COMPONENTS` in one figure: none of them has the colour of one of these."""


def power_over_time(summary: Mapping[str, Any], points: Sequence[Point]) -> Figure | None:
    """Power of every channel, stacked, over time, with the stages shaded; None for runs of less than two readings."""
    if len(points) < 2:
        return None
    figure, axes = _figure(8.0, 3.6)
    time, unit = _time_axis([point.time_s for point in points])
    names = _stacked(summary, points)
    series = [np.nan_to_num([point.watts.get(name, 0.0) for point in points]) for name in names]
    drawn: set[str] = set()
    for begin, end, label in _bands(points, time):
        name = None if label in drawn else label
        drawn.add(label)
        color = STAGES.get(label, "#EEEEEE")
        axes.axvspan(begin, end, color=color, alpha=0.35, linewidth=0, zorder=0)
        axes.axvspan(begin, end, ymin=0.95, color=color, linewidth=0, label=name, zorder=3)
    axes.stackplot(time, series, colors=_shades(summary, names), labels=[_label(summary, name) for name in names])
    axes.set_xlim(time[0], time[-1])
    axes.set_ylim(0, 1.2 * max(np.sum(series, axis=0).max(), 1e-9))
    axes.set_xlabel(f"time since start [{unit}]")
    axes.set_ylabel("power [W]")
    measured = 100 * (1 - summary["estimated_fraction"])
    axes.set_title(f"{_joules(summary['it_j'])}, {summary['mean_w']:.3g} W on average, {measured:.0f} % measured")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def energy_by_stage(summary: Mapping[str, Any], points: Sequence[Point]) -> Figure:
    """Energy of every stage as bars, with time and mean power beside them."""
    stages = [(name, values) for name, values in summary["stages"].items() if name != "fit"]
    figure, axes = _figure(7.0, 0.9 + 0.42 * len(stages))
    rows = np.arange(len(stages))
    left = np.zeros(len(stages))
    for component in ("cpu", "gpu", "dram"):
        width = np.array([values[f"{component}_kwh"] * 3.6e6 for _, values in stages])
        if width.any():
            axes.barh(rows, width, left=left, color=COMPONENTS[component], label=component)
            left += width
    rest = np.array([max(values["it_j"], 0.0) for _, values in stages]) - left
    if (rest > 1e-6 * max(left.max(), rest.max(), 1e-12)).any():
        axes.barh(rows, rest.clip(min=0), left=left, color=COMPONENTS["node"], label="rest of the machine")
        left += rest.clip(min=0)
    for row, (_, values) in enumerate(stages):
        text = f" {_joules(values['it_j'])} in {values['duration_s']:.3g} s"
        axes.annotate(text, (left[row], row), va="center", fontsize="small", annotation_clip=False)
    axes.set_yticks(rows, [name for name, _ in stages])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.45 * max(left.max(), 1e-9))
    axes.set_xlabel("energy [J]")
    figure.legend(loc="outside upper right", ncols=4, frameon=False, fontsize="small")
    return figure


def energy_against_metric(summary: Mapping[str, Any], points: Sequence[Point]) -> Figure | None:
    """Validation metric over the energy spent so far, a point per epoch; None without two epochs that have one."""
    epochs = [epoch for epoch in summary.get("epochs", []) if epoch["metrics"]]
    names = [name for name in (epochs[0]["metrics"] if epochs else {}) if name.startswith("val/")]
    if len(epochs) < 2 or not names:
        return None
    name = "val/loss" if "val/loss" in names else names[0]
    pairs = [(e["cumulative_kwh"] * 3.6e6, e["metrics"][name]) for e in epochs if name in e["metrics"]]
    energy, metric = np.array(pairs).T
    figure, axes = _figure(6.4, 3.6)
    axes.plot(energy, metric, color=COMPONENTS["cpu"], marker="o", markersize=3, linewidth=1.2)
    best = int(np.nanargmin(metric))
    axes.plot(energy[best], metric[best], marker="o", markersize=9, color="#D55E00", fillstyle="none")
    axes.set_title(f"lowest {name}: {metric[best]:.4g} after {_joules(energy[best])}")
    axes.set_xlim(left=0)
    axes.set_xlabel("energy so far [J]")
    axes.set_ylabel(name)
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _stacked(summary: Mapping[str, Any], points: Sequence[Point]) -> list[str]:
    """Channels to stack: the components, or the node alone where nothing else is read."""
    names = list(dict.fromkeys(name for point in points for name in point.watts))
    parts = [name for name in names if _component(summary, name) != "node"]
    return parts or names


def _component(summary: Mapping[str, Any], name: str) -> str:
    channels = summary["channels"]
    found = channels.get(name) or next((c for key, c in channels.items() if key.endswith(f"/{name}")), None)
    return found["component"] if found else "other"


def _label(summary: Mapping[str, Any], name: str) -> str:
    channels = summary["channels"]
    found = channels.get(name) or next((c for key, c in channels.items() if key.endswith(f"/{name}")), None)
    return name if found is None or found["measured"] else f"{name} (estimated)"


def _shades(summary: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    from matplotlib.colors import to_rgb

    seen: dict[str, int] = {}
    colors = []
    for name in names:
        component = _component(summary, name)
        lighter = min(0.16 * seen.get(component, 0), 0.64)
        seen[component] = seen.get(component, 0) + 1
        colors.append(tuple(c + (1 - c) * lighter for c in to_rgb(COMPONENTS[component])))
    return colors


def _time_axis(seconds: Sequence[float]) -> tuple[np.ndarray, str]:
    for factor, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds[-1] > 3 * factor:
            return np.array(seconds) / factor, unit
    return np.array(seconds), "s"


def _bands(points: Sequence[Point], time: np.ndarray) -> list[tuple[float, float, str]]:
    bands: list[tuple[float, float, str]] = []
    edges = [time[0], *((time[1:] + time[:-1]) / 2), time[-1]]
    for i, point in enumerate(points):
        if bands and bands[-1][2] == point.label:
            bands[-1] = (bands[-1][0], edges[i + 1], point.label)
        else:
            bands.append((edges[i], edges[i + 1], point.label))
    return bands


def _joules(value: float) -> str:
    for limit, factor, unit in ((3.6e6, 3.6e6, "kWh"), (1e4, 1e3, "kJ")):
        if value >= limit:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} J" if value < 1000 else f"{value:,.0f} J"

"""Figures of the scaling study: functions ``analysis -> Figure`` of what `physics.energy_cost.analysis` returns.

A series has the same colour and marker in every figure, a cost the same colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, plain_log_ticks
from physics.energy_cost import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = "osD^vPX"
PARTS = {
    "node": ("nodes", "#4D4D4D"),
    "device": ("devices, idle", "#56B4E9"),
    "node+device": ("nodes and idle devices", "#56B4E9"),
    "samples": ("samples", "#E69F00"),
    "samples+updates": ("samples and updates", "#E69F00"),
    "updates": ("updates", "#D55E00"),
}
Analysis = Mapping[str, Any]
FIGURES = (
    "energy_and_hours",
    "energy_against_hours",
    "mean_power",
    "shares",
    "errors",
    "forecast_errors",
    "time_and_energy",
    "metric_against_batch",
    "step_phases",
    "power_traces",
)
"""In the order of a report."""


def energy_and_hours(analysis: Analysis) -> Figure:
    """Energy (left axis, filled) and device hours (right axis, hollow) over devices, a panel per series.

    Both axes of a panel have as many decades, so that curves of proportional quantities are parallel; device hours
    stand above.
    """
    series = _series(analysis)
    figure, panels = make_figure(1.2 + 3.3 * len(series), 3.6, columns=len(series))
    for axes, (i, name, rows) in zip(panels, series, strict=True):
        devices = [row["devices"] for row in rows]
        axes.errorbar(
            devices,
            [row["energy_kwh"] for row in rows],
            [row["energy_rms_kwh"] for row in rows],
            color=_color(i),
            marker="o",
            capsize=2,
            linewidth=1.2,
            label="energy",
        )
        twin = axes.twinx()
        twin.errorbar(
            devices,
            [row["device_hours"] for row in rows],
            [row["device_hours_rms"] for row in rows],
            color="#555555",
            marker="o",
            markerfacecolor="white",
            capsize=2,
            linewidth=1.0,
            linestyle="--",
            label="device hours",
        )
        limits = _apart([row["energy_kwh"] for row in rows], [row["device_hours"] for row in rows])
        for axis, label, ends in zip((axes, twin), ("energy [kWh]", "device hours [h]"), limits, strict=True):
            axis.set_yscale("log")
            axis.set_ylim(ends)
            plain_log_ticks(axis.yaxis)
            if (axis is axes and axes is panels[0]) or (axis is twin and axes is panels[-1]):
                axis.set_ylabel(label)
        twin.spines["top"].set_visible(False)
        _device_axis(axes, devices)
        axes.set_title(name, fontsize="medium")
    handles = [panels[0].get_legend_handles_labels()[0][0], twin.get_legend_handles_labels()[0][0]]
    figure.legend(handles, ["energy", "device hours"], loc="outside upper center", ncols=2, frameon=False)
    return figure


def energy_against_hours(analysis: Analysis) -> Figure:
    """Energy over device hours, logarithmic, with the proportional fit of each series: the paper's claim."""
    figure, (axes,) = make_figure(6.4, 4.6)
    for i, name, rows in _series(analysis):
        hours = np.array([row["device_hours"] for row in rows])
        axes.errorbar(
            hours,
            [row["energy_kwh"] for row in rows],
            [row["energy_rms_kwh"] for row in rows],
            [row["device_hours_rms"] for row in rows],
            color=_color(i),
            marker=MARKERS[i % len(MARKERS)],
            linestyle="",
            markersize=5,
            capsize=2,
        )
        fit = analysis["series"].get(name)
        label = name if fit is None else f"{name}: {fit['kappa_kw']:.4f} kW per device"
        ends = np.array([hours.min() / 1.3, hours.max() * 1.3])
        kappa = fit["kappa_kw"] if fit else np.nan
        axes.plot(
            ends,
            kappa * ends,
            color=_color(i),
            linewidth=1.0,
            marker=MARKERS[i % len(MARKERS)],
            markevery=[],
            label=label,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_log_ticks(axes.xaxis)
    plain_log_ticks(axes.yaxis)
    axes.set_xlabel("device hours [h]")
    axes.set_ylabel("energy [kWh]")
    axes.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def mean_power(analysis: Analysis) -> Figure:
    """Mean power per device over samples and over updates per device hour; numbers are devices."""
    figure, panels = make_figure(9.2, 4.2, columns=2)
    keys = ("samples_per_device_hour", "updates_per_device_hour")
    labels = ("thousand samples per device hour", "thousand device updates per device hour")
    for axes, key, label in zip(panels, keys, labels, strict=True):
        for i, name, rows in _series(analysis):
            x, y = [row[key] / 1000 for row in rows], [row["kappa_kw"] for row in rows]
            axes.plot(x, y, color=_color(i), marker=MARKERS[i % len(MARKERS)], linewidth=0.7, markersize=5, label=name)
        axes.set_xlabel(label)
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    panels[0].set_ylabel("energy per device hour [kW]")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    for axes, key in zip(panels, keys, strict=True):
        ends = [(i, row) for i, _, rows in _series(analysis) for row in rows[:: max(len(rows) - 1, 1)]]
        _label_points(axes, [(str(row["devices"]), row[key] / 1000, row["kappa_kw"], _color(i)) for i, row in ends])
    return figure


def shares(analysis: Analysis) -> Figure:
    """What of each configuration's energy the fitted costs are, in percent."""
    rows = [row for row in analysis["rows"] if row["parts_kwh"]]
    if not rows:
        raise ValueError(_why(analysis))
    figure, (axes,) = make_figure(7.4, 1.4 + 0.26 * len(rows))
    left = np.zeros(len(rows))
    for term in rows[0]["parts_kwh"]:
        width = np.array([100 * row["parts_kwh"][term] / sum(row["parts_kwh"].values()) for row in rows])
        name, color = PARTS[term]
        axes.barh(range(len(rows)), width, left=left, color=color, label=name, height=0.78)
        left += width
    names = [f"{row['series']}, {row['devices']} x {row['local_batch_size']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the energy [%]")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def errors(analysis: Analysis) -> Figure:
    """Relative errors of the models: in the fit, and when a run is predicted by the others."""
    models = analysis["models"]
    if not models:
        raise ValueError(_why(analysis))
    figure, (axes,) = make_figure(7.4, 1.3 + 0.52 * len(models))
    places = np.arange(len(models))
    for offset, key, color, label in (
        (-0.27, "mean_error", "#9ECAE1", "fit, mean"),
        (-0.09, "max_error", "#0072B2", "fit, largest"),
        (0.09, "left_out_mean", "#F4B183", "left out, mean"),
        (0.27, "left_out_max", "#D55E00", "left out, largest"),
    ):
        values = [100 * (model[key] or np.nan) for model in models]
        axes.barh(places + offset, values, height=0.17, color=color, label=label)
    axes.set_yticks(places, [" + ".join(model["terms"]) for model in models], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("relative error of the energy [%]")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def forecast_errors(analysis: Analysis) -> Figure:
    """Each configuration as the others predict it: energy of given hours (filled), device hours (hollow)."""
    cost, time = analysis["cost"], analysis["time"]
    if not cost or not cost["left_out"]:
        raise ValueError(_why(analysis))
    rows = [row for row in analysis["rows"] if row["left_out_error"] is not None]
    unique = list({tuple(key): None for key in cost["configurations"]})
    names = []
    for key in unique:
        row = next(
            r for r in rows if (r["devices"], r["local_batch_size"], r["num_samples"]) == (key[0], key[2], key[3])
        )
        names.append(f"{row['series']}, {row['devices']} x {row['local_batch_size']}")
    figure, (axes,) = make_figure(7.4, 1.4 + 0.26 * len(unique))
    places = np.arange(len(unique))
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.plot(100 * np.array(cost["left_out"]), places, "o", color="#0072B2", label="energy, hours given")
    if time:
        axes.plot(
            100 * np.array(time["left_out"]),
            places,
            "s",
            color="#D55E00",
            markerfacecolor="white",
            label="device hours",
        )
    axes.set_yticks(places, names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("predicted by the others - measured [%]")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def time_and_energy(analysis: Analysis) -> Figure:
    """Energy per epoch and sample over wall time per epoch and sample; the line is what nothing else beats in both."""
    figure, (axes,) = make_figure(6.4, 4.6)
    points: list[tuple[float, float]] = []
    labels = []
    for i, name, rows in _series(analysis):
        seen = [row["num_samples"] * row["epochs"] for row in rows]
        times = [3600e6 * row["hours"] / samples for row, samples in zip(rows, seen, strict=True)]
        energies = [3.6e6 * row["energy_kwh"] / samples for row, samples in zip(rows, seen, strict=True)]
        axes.plot(times, energies, color=_color(i), marker=MARKERS[i % len(MARKERS)], linestyle="", label=name)
        points += zip(times, energies, strict=True)
        labels += [(str(row["devices"]), *points[j - len(rows)], _color(i)) for j, row in enumerate(rows)]
    front = sorted(points[i] for i in pareto_front(points))
    axes.plot(*zip(*front, strict=True), color="#555555", linewidth=1.0, linestyle=":", label="not beaten in both")
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("wall time per sample [µs]")
    axes.set_ylabel("energy per sample [J]")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    _label_points(axes, labels)
    return figure


def metric_against_batch(analysis: Analysis) -> Figure:
    """Quality over the global batch size; the dashed line is the largest batch within the tolerance of the best."""
    quality = analysis["quality"]
    if not quality:
        raise ValueError("no metric over batch sizes: set data.metric and run at two global batch sizes at least")
    figure, (axes,) = make_figure(6.0, 4.0)
    for i, name, rows in _series(analysis):
        known = sorted((row["global_batch_size"], row["metric"]) for row in rows if row["metric"] is not None)
        if known:
            axes.plot(*zip(*known, strict=True), color=_color(i), marker=MARKERS[i % len(MARKERS)], label=name)
    axes.axvline(quality["knee"], color="#555555", linestyle="--", linewidth=1.0, label=f"knee: {quality['knee']}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("global batch size")
    axes.set_ylabel("metric")
    axes.legend(frameon=False, fontsize="small")
    return figure


def step_phases(analysis: Analysis) -> Figure:
    """Milliseconds of a training step by its phases, a bar per configuration."""
    rows = [row for row in analysis["rows"] if row["phases_s"]]
    if not rows:
        raise ValueError("no run has times of its phases: they need callbacks.step_phases")
    figure, (axes,) = make_figure(7.4, 1.4 + 0.26 * len(rows))
    left = np.zeros(len(rows))
    for i, phase in enumerate(dict.fromkeys(name for row in rows for name in row["phases_s"])):
        width = np.array([1e3 * row["phases_s"].get(phase, 0.0) for row in rows])
        axes.barh(range(len(rows)), width, left=left, color=_color(i), label=phase, height=0.78)
        left += width
    names = [f"{row['series']}, {row['devices']} x {row['local_batch_size']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step [ms]")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    return figure


def power_traces(analysis: Analysis) -> Figure:
    """Power of all machines over the time of a run, a panel for each number of devices, a line for each batch."""
    traces = analysis.get("power") or []
    if not traces:
        raise ValueError("no run has left its power over time: the records of callbacks.energy are elsewhere")
    counts = sorted({trace["devices"] for trace in traces})
    names = sorted({trace["local_batch_size"] for trace in traces})
    figure, panels = make_figure(1.4 + 3.0 * len(counts), 3.4, columns=len(counts))
    highest = max(max(trace["watts"]) for trace in traces)
    for axes, devices in zip(panels, counts, strict=True):
        for trace in (trace for trace in traces if trace["devices"] == devices):
            i = names.index(trace["local_batch_size"])
            axes.plot(trace["time_s"], trace["watts"], color=_color(i), linewidth=0.9)
        axes.set_ylim(0, 1.1 * highest)
        axes.set_xlim(left=0)
        axes.set_title(f"{devices} device{'s' if devices > 1 else ''}", fontsize="medium")
        axes.set_xlabel("time since start [s]")
    panels[0].set_ylabel("power [W]")
    for i, size in enumerate(names):
        panels[0].plot([], [], color=_color(i), label=f"{size} samples per device and step")
    figure.legend(loc="outside upper center", ncols=min(len(names), 3), frameon=False, fontsize="small")
    return figure


def _series(analysis: Analysis) -> list[tuple[int, str, Sequence[Mapping[str, Any]]]]:
    """(number, name, rows by devices) of each series."""
    names = dict.fromkeys(row["series"] for row in analysis["rows"])
    return [
        (i, name, sorted((row for row in analysis["rows"] if row["series"] == name), key=lambda row: row["devices"]))
        for i, name in enumerate(names)
    ]


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _device_axis(axes: Axes, devices: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = devices if len(devices) < 7 else devices[:: -(-len(devices) // 6)]
    axes.set_xticks(shown, [str(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("devices")


def _apart(
    below: Sequence[float], above: Sequence[float], gap: float = 0.12, margin: float = 0.06, least: float = 0.75
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of two logarithmic axes of as many decades, on which one curve is above the other everywhere.

    Args:
        below: Values of the lower curve.
        above: Of the upper one, at the same places.
        gap: Least distance of the curves, part of the larger of their ranges.
        margin: At both ends, part of the axis.
        least: Decades; fewer would leave an axis with one number.
    """
    low, high = np.log10(np.asarray(below, dtype=float)), np.log10(np.asarray(above, dtype=float))
    distance = gap * max(np.ptp(low), np.ptp(high), least)
    offset = (high - low).min() - distance  # what the upper axis begins later
    curves = np.concatenate([low, high - offset])
    decades = max(np.ptp(curves) / (1 - 2 * margin), least)
    begin = (curves.min() + curves.max() - decades) / 2
    first, second = (tuple(float(10**end) for end in (b, b + decades)) for b in (begin, begin + offset))
    return first, second  # type: ignore[return-value]


def _label_points(axes: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Text beside points, where no other text, point or line is in its way; the axes must be complete.

    Args:
        axes: With everything else drawn.
        labels: (text, x, y, colour).
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # places are known then
    axes.set_autoscale_on(False)
    point = figure.dpi / 72
    frame = tuple(axes.get_window_extent().extents)
    taken = _drawn(axes, 3 * point)
    for text, x, y, color in labels:
        written = axes.annotate(
            text, (x, y), (0, 0), textcoords="offset points", fontsize="x-small", color=color, ha="center", va="center"
        )
        written.set_in_layout(False)
        extent = written.get_window_extent()
        half_x, half_y = extent.width / 2, extent.height / 2
        at_x, at_y = axes.transData.transform((x, y))
        places = []
        for ring in range(4):
            for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
                move_x = right * ((3.5 + 7 * ring) * point + half_x)
                move_y = up * ((1.5 + 2 * (right == 0) + 7 * ring) * point + half_y)
                box = (at_x + move_x - half_x, at_y + move_y - half_y, at_x + move_x + half_x, at_y + move_y + half_y)
                outside = extent.width * extent.height - _overlap(box, frame)
                cost = outside + sum(_overlap(box, other) for other in taken)
                places.append((round(cost, 3), len(places), (move_x / point, move_y / point), box))
        _, _, place, box = min(places)
        written.set_position(place)
        taken.append(box)


def _drawn(axes: Axes, half: float) -> list[tuple[float, float, float, float]]:
    """Boxes around the points of all lines, and along the lines, in pixels."""
    boxes = []
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        if line.get_marker() not in ("", "None", None):
            boxes += [(x - half, y - half, x + half, y + half) for x, y in corners]
        if line.get_linestyle() != "None":
            for (x, y), (x_end, y_end) in pairwise(corners):
                share = np.linspace(0, 1, 2 + int(np.hypot(x_end - x, y_end - y) / half))
                middles = zip(x + share * (x_end - x), y + share * (y_end - y), strict=True)
                boxes += [(x - half / 3, y - half / 3, x + half / 3, y + half / 3) for x, y in middles]
    return boxes


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Common area of two boxes (left, bottom, right, top)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _why(analysis: Analysis) -> str:
    return "; ".join(analysis["refused"].values()) or "too few configurations for a fit"

"""Figures of power flows: pure functions ``(outputs, datamodule) -> Figure`` for `FiguresCallback`.

``outputs`` are the joined step outputs of the modules of `lightning_modules.power_flow`; ``datamodule`` has ``grid``
and ``scenario_name``. `time_to_tolerance` takes the rows of a sweep. Pyplot is not used, and a method has the same
colour in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from callbacks.figures.axes import cell_edges, make_figure, plain_log_ticks
from physics.power_flow import METHODS
from physics.power_flow.distance import distances

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Outputs = dict[str, Tensor]

COLORS = {
    "newton": "#000000", "chord": "#0072B2", "fdlf_xb": "#56B4E9", "fdlf_bx": "#56B4E9", "lm": "#8C8C8C",
    "homotopy": "#7B4EA3",
    "lbfgs": "#E69F00", "adam": "#D55E00", "rmsprop": "#CC79A7", "dc": "#009E73",
}  # fmt: skip
LABELS = {
    "newton": "Newton", "chord": "chord", "fdlf_xb": "fast decoupled XB", "fdlf_bx": "fast decoupled BX",
    "lm": "Levenberg-Marquardt", "homotopy": "homotopy", "lbfgs": "L-BFGS", "adam": "Adam (paper)",
    "rmsprop": "RMSprop", "dc": "DC",
}  # fmt: skip
GOOD, LIMIT, WORSE, MUTED = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
ISLANDED = "#E69F00"


def error_against_seconds(outputs: Outputs, datamodule: Any) -> Figure:
    """Largest mismatch of all compared scenarios over iterations (left) and over seconds (right), by method.

    DC, which takes no iterations, is the point at its seconds and a line at its mismatch.

    Args:
        outputs: With ``history``, rows of method, iteration, seconds, largest mismatch, and more.
        datamodule: Names the grid.
    """
    history = outputs["history"].numpy()
    if not len(history):
        raise ValueError("no method was compared: name some in model.compare")
    figure, (left, right) = make_figure(9.0, 4.2, columns=2)
    left.sharey(right)
    for number in dict.fromkeys(history[:, 0].astype(int).tolist()):
        method, rows = METHODS[number], history[history[:, 0] == number]
        look = {"color": COLORS[method], "label": LABELS[method], "linewidth": 1.4}
        size = np.maximum(rows[:, 3], 1e-16)
        if len(rows) == 1:
            if method == "dc":
                left.axhline(size[0], linestyle=(0, (4, 2)), **look)
            else:
                left.plot([1], size, marker="D", markersize=5, linestyle="none", **look)
            right.plot(rows[:, 2], size, marker="D", markersize=5, linestyle="none", **look)
            continue
        marker = {"marker": "o", "markersize": 3.5} if len(rows) < 60 else {}
        left.plot(rows[:, 1] + 1, size, **look, **marker)
        right.plot(np.maximum(rows[:, 2], 1e-6), size, **look, **marker)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
    left.set_xlabel("iteration (from 1)")
    right.set_xlabel("seconds for all compared scenarios")
    left.set_ylabel("largest mismatch [p.u.]")
    right.tick_params(labelleft=False)
    handles, texts = right.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    return figure


def voltage_profile(
    outputs: Outputs, datamodule: Any, *, scenario: int | None = None, feeder: str | None = None
) -> Figure:
    """Voltage magnitude over the electrical distance from the slack, each branch in service a line.

    Thin vertical lines are the range of a bus over all scenarios.

    Args:
        outputs: With ``scenario`` and ``vm_pu``.
        datamodule: Its grid.
        scenario: Number of the scenario; None: that with the lowest voltage.
        feeder: Buses whose names begin so, with those next to them; None: all.
    """
    grid = datamodule.grid
    numbers, voltages = outputs["scenario"].numpy(), outputs["vm_pu"].numpy()
    known = np.isfinite(voltages).all(1)
    numbers, voltages = numbers[known], voltages[known]
    lowest = np.where(np.isin(numbers, numbers if scenario is None else scenario), voltages.min(1), np.inf)
    row = int(lowest.argmin())
    vm = voltages[row]
    on = grid.status.numpy() > 0
    f, t = grid.from_bus.numpy()[on], grid.to_bus.numpy()[on]
    z = np.hypot(grid.r.numpy(), grid.x.numpy())[on]
    shown = np.ones(len(vm), dtype=bool)
    if feeder is not None:
        shown = np.array([name.startswith(feeder) for name in grid.bus_names])
        if not shown.any():
            raise ValueError(f"no bus of {grid.name} has a name that begins with {feeder!r}")
        touched = shown[f] | shown[t]
        shown[f[touched]] = shown[t[touched]] = True
    away = distances(grid.num_buses, f, t, z, grid.slack.numpy())
    if feeder is not None:
        away = away - away[shown].min()
    figure, (axes,) = make_figure(7.0, 3.8)
    inside = shown[f] & shown[t]
    ends = np.stack([np.stack([away[f], vm[f]], -1), np.stack([away[t], vm[t]], -1)], 1)[inside]
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(ends, colors=MUTED, linewidths=0.7, alpha=0.6))
    if len(voltages) > 1:
        axes.vlines(
            away[shown], voltages.min(0)[shown], voltages.max(0)[shown], color=GOOD, alpha=0.35, linewidth=2,
            label=f"range over {len(voltages)} scenarios",
        )  # fmt: skip
    kind = grid.bus_type.numpy()
    low, high = grid.vm_min.numpy(), grid.vm_max.numpy()
    outside = (kind == 1) & ((vm < low) | (vm > high))
    for chosen, color, marker, label in (
        (kind == 1, GOOD, "o", "PQ bus"),
        (kind == 2, WORSE, "s", "PV bus"),
        (kind == 3, "black", "D", "slack"),
        (outside, LIMIT, "x", "outside its limits"),
    ):
        chosen = chosen & shown
        if chosen.any():
            axes.scatter(
                away[chosen], vm[chosen], s=16, color=color, marker=marker, label=label, zorder=3, linewidths=1
            )
    place = "the slack" if feeder is None else "the bus that feeds it"
    axes.set_xlabel(f"electrical distance from {place}, sum of |z| [p.u.]")
    axes.set_ylabel("voltage [p.u.]")
    axes.set_title(f"{grid.name}, {datamodule.scenario_name(int(numbers[row]))}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def feeder_profile(outputs: Outputs, datamodule: Any) -> Figure:
    """`voltage_profile` of the first feeder of a joint grid (``data.feeder``), with the bus that feeds it."""
    return voltage_profile(outputs, datamodule, feeder="feeder 1:")


def loading_strip(outputs: Outputs, datamodule: Any, *, num_branches: int = 25, num_columns: int = 480) -> Figure:
    """Loading of the most loaded branches (rows, the heaviest on top) over the scenarios of a series.

    Below the limit of a branch cells are blue, above it red. Of a long series a cell is the largest loading of several
    steps.

    Args:
        outputs: With ``scenario`` and ``loading_percent``.
        datamodule: Names branches and scenarios.
        num_branches: Rows.
        num_columns: Most columns.
    """
    from matplotlib.colors import TwoSlopeNorm

    order = outputs["scenario"].argsort().numpy()
    loading = outputs["loading_percent"].numpy()[order]
    numbers = outputs["scenario"].numpy()[order]
    grid = datamodule.grid
    if not np.isfinite(loading).any():
        raise ValueError(f"no branch of {grid.name} has a limit: set data.limits=base data.limit_factor=1.3")
    loading = np.where(np.isfinite(loading), loading, -1)
    peak = loading.max(0)
    chosen = np.argsort(-peak, kind="stable")[: min(num_branches, int((peak >= 0).sum()))]
    together = -(-len(numbers) // num_columns)
    starts = np.arange(0, len(numbers), together)
    values = np.ma.masked_less(np.maximum.reduceat(loading[:, chosen], starts, axis=0).T, 0)
    figure, (axes,) = make_figure(8.4, 1.4 + 0.2 * len(chosen))
    axes.grid(visible=False)
    image = axes.pcolormesh(
        cell_edges(np.arange(len(starts))), np.arange(len(chosen) + 1) - 0.5, values, cmap="RdBu_r", rasterized=True,
        norm=TwoSlopeNorm(100.0, 0.0, max(150.0, float(values.max()))),
    )  # fmt: skip
    axes.invert_yaxis()
    axes.set_yticks(range(len(chosen)), [grid.branch_names[i] for i in chosen], fontsize="x-small")
    places = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), 8)).round().astype(int))
    names = [datamodule.scenario_name(int(numbers[starts[i]])) for i in places]
    axes.set_xticks(places, [name.removesuffix(":00").replace("T", "\n") for name in names], fontsize="x-small")
    figure.colorbar(image, ax=axes, label="loading [%]", pad=0.02)
    title = f"{grid.name}: the {len(chosen)} most loaded of {grid.num_branches} branches"
    if together > 1:
        title += f", a cell is the largest of {together} steps"
    axes.set_title(title, fontsize="medium")
    return figure


def outage_ranking(outputs: Outputs, datamodule: Any, *, num_outages: int = 25) -> Figure:
    """The worst outages by severity, with the loading of the worst branch; islanding ones are named below.

    Args:
        outputs: With ``scenario``, ``severity``, ``overloads``, ``loading_percent``, ``islanding``, ``converged``, and
            where outages may be only estimated ``estimated``: those count as no failures.
        datamodule: Names outages and branches.
        num_outages: Bars.
    """
    grid = datamodule.grid
    islanding, converged = outputs["islanding"].numpy(), outputs["converged"].numpy()
    numbers, severity = outputs["scenario"].numpy(), outputs["severity"].numpy()
    loading = np.where(np.isfinite(outputs["loading_percent"].numpy()), outputs["loading_percent"].numpy(), -1.0)
    low = outputs["low_voltages"].numpy() + outputs["high_voltages"].numpy()
    solved = np.flatnonzero(converged & ~islanding)
    order = solved[np.lexsort((-loading[solved].max(1), -np.nan_to_num(severity[solved])))][:num_outages]
    figure, (axes,) = make_figure(8.4, 1.5 + 0.22 * max(len(order), 1))
    peak, worst = loading[order].max(1), loading[order].argmax(1)
    axes.barh(np.arange(len(order)), peak, color=np.where(peak > 100, LIMIT, GOOD), height=0.75)
    axes.axvline(100, color="black", linewidth=1)
    for i, at in enumerate(order):
        text = f" {grid.branch_names[worst[i]]}; {int(outputs['overloads'][at])} overloads"
        text += f", {low[at]} voltages outside" if low[at] else ""
        axes.annotate(text, (peak[i], i), va="center", fontsize="x-small")
    axes.set_yticks(range(len(order)), [datamodule.scenario_name(int(numbers[i])) for i in order], fontsize="x-small")
    axes.set_ylim(max(len(order), 1) - 0.4, -0.6)
    axes.set_xlim(0, 1.75 * max(float(peak.max(initial=0)), 100.0))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("loading of the worst branch after the outage [%]")
    estimated = outputs["estimated"].numpy() if "estimated" in outputs else np.zeros_like(converged)
    title = f"{grid.name}: {len(solved)} outages solved, "
    title += f"{int(estimated.sum())} below the flag by estimate, " if estimated.any() else ""
    axes.set_title(f"{title}{int((~converged & ~islanding & ~estimated).sum())} without a solution", fontsize="medium")
    if cut := [datamodule.scenario_name(int(i)) for i in numbers[islanding]]:
        named = ", ".join(cut[:12]) + (", ..." if len(cut) > 12 else "")
        figure.supxlabel(fill(f"{len(cut)} island buses: {named}", 120), fontsize="x-small", x=0.01, ha="left")
    return figure


def true_against_identified(outputs: Outputs, datamodule: Any) -> Figure:
    """Identified over true parameters (left), and their relative errors, sorted, with those of the start (right).

    Args:
        outputs: With ``parameter_found``, ``parameter_start`` and ``parameter_true``, (parameter,) each.
        datamodule: Names the grid.
    """
    true, found, start = (outputs[f"parameter_{name}"].numpy() for name in ("true", "found", "start"))
    figure, (left, right) = make_figure(8.6, 3.9, columns=2)
    size = np.maximum(np.abs(true), 1e-12)
    left.scatter(true, start, s=20, color=MUTED, marker="x", linewidths=1, label="start")
    left.scatter(true, found, s=20, color=GOOD, label="identified", zorder=3)
    span = np.array([min(true.min(), found.min()), max(true.max(), found.max())])
    left.plot(span, span, color="black", linewidth=0.8)
    if (np.concatenate([true, found, start]) > 0).all():
        left.set_xscale("log")
        left.set_yscale("log")
        plain_log_ticks(left.xaxis)
        plain_log_ticks(left.yaxis)
    left.set_xlabel("true parameter")
    left.set_ylabel("parameter")
    for values, color, label in ((start, MUTED, "start"), (found, GOOD, "identified")):
        error = np.sort(np.abs(values - true) / size)
        right.plot(
            np.arange(1, len(error) + 1), np.maximum(error, 1e-12), color=color, marker="o", markersize=3, label=label
        )
    right.set_yscale("log")
    right.set_xlabel("parameter, sorted by error")
    right.set_ylabel("relative error")
    handles, texts = left.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def time_to_tolerance(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Seconds until the largest mismatch is below 1e-3, over the number of buses, by method.

    A method that does not get there is drawn at the seconds it was given, as an open triangle.

    Args:
        rows: Of finished jobs: ``buses``, and for every method a mapping with ``seconds`` and ``seconds_to_1e-3``.
    """
    rows = sorted((row for row in rows if row.get("buses")), key=lambda row: row["buses"])
    methods = [method for method in METHODS if any(method in row for row in rows)]
    if not methods:
        return None
    figure, (axes,) = make_figure(6.4, 4.2)
    for method in methods:
        mine = [row for row in rows if method in row]
        buses = np.array([row["buses"] for row in mine], dtype=float)
        reached = np.array([row[method]["seconds_to_1e-3"] for row in mine], dtype=float)
        given = np.array([row[method]["seconds"] for row in mine], dtype=float)
        there = np.isfinite(reached)
        color = COLORS[method]
        if there.any():
            values = np.where(there, reached, np.nan)
            axes.plot(buses, values, color=color, marker="o", markersize=4, label=LABELS[method])
        if (~there).any():
            axes.plot(
                buses[~there], given[~there], color=color, marker="^", markersize=6, markerfacecolor="none",
                linestyle=(0, (2, 2)), label=f"{LABELS[method]}, not reached",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("buses")
    axes.set_ylabel("seconds to a mismatch below 1e-3 p.u.")
    axes.legend(frameon=False, fontsize="small")
    return figure

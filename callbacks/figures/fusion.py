"""Figures of fused networks: functions of the report that `callbacks.fusion_report` writes. Pyplot is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("accuracy_after_fusion", "accuracy_over_fraction", "accuracy_over_width", "provenance")
# Transplantation first; the controls are grey whatever their place.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B3FA0", "#000000")
CONTROL, ENSEMBLE = "#8C8C8C", "#000000"


def accuracy_after_fusion(report: Mapping[str, Any]) -> Figure | None:
    """Accuracy of every candidate in validation over epochs after the fusion; ensemble and members are lines.

    None where nothing was trained after the fusion.
    """
    rows = [row for row in report["history"] if row["finetune_epoch"] is not None]
    if len(rows) < 2:
        return None
    figure, (axes,) = make_figure(6.8, 4.0)
    x = [row["finetune_epoch"] for row in rows]
    last = rows[-1]["accuracy"]
    for name, color, style in _styles(report["settings"]):
        axes.plot(x, [100 * row["accuracy"][name] for row in rows], style, color=color, markersize=3, label=name)
    members = [100 * value for name, value in last.items() if name.startswith("member_") and name[7:].isdigit()]
    axes.axhline(100 * last["ensemble"], color=ENSEMBLE, linestyle="--", linewidth=1.0, label="ensemble")
    axes.axhspan(min(members), max(members), color=CONTROL, alpha=0.25, linewidth=0, label="members")
    low = min(100 * row["accuracy"][name] for row in rows[1:] for name in report["settings"])
    top = max(100 * value for row in rows for value in row["accuracy"].values())
    below = min(low, min(members))
    start = [100 * rows[0]["accuracy"][name] for name in report["settings"]]
    if min(start) < below - 2 * (top - below):  # what lies far below is told in numbers
        axes.set_ylim(below - 0.6 * (top - below) - 0.2, top + 0.15 * (top - below) + 0.1)
        hidden = [f"{n} {v:.0f}" for n, v in zip(report["settings"], start, strict=True) if v < axes.get_ylim()[0]]
        axes.set_title(f"right after the fusion: {', '.join(hidden)} %", fontsize="small", loc="left")
    axes.set_xlabel("epochs after the fusion")
    axes.set_ylabel("validation accuracy [%]")
    whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _styles(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, colour and line of every candidate: dashed where it is distilled, grey for the controls."""
    colors = iter(SERIES * (len(settings) // len(SERIES) + 1))
    return [
        (name, CONTROL if one["method"] == "best" else next(colors), "o--" if one["objective"] == "distill" else "o-")
        for name, one in settings.items()
    ]


def accuracy_over_fraction(report: Mapping[str, Any]) -> Figure | None:
    """Test accuracy over the part of the channels that comes from the second member, at every epoch reported."""
    return _over(report, "fraction", "part of the second network")


def accuracy_over_width(report: Mapping[str, Any]) -> Figure | None:
    """Test accuracy over the width of the fused network in units of a member's, at every epoch reported."""
    return _over(report, "target_width", "width of the fused network / width of a member", log=True)


def _over(report: Mapping[str, Any], key: str, label: str, log: bool = False) -> Figure | None:
    settings = {name: one for name, one in report["settings"].items() if one.get(key) is not None}
    if len(settings) < 2:
        return None
    figure, (axes,) = make_figure(6.4, 3.8)
    results = [row for row in report["results"] if row["name"] in settings]
    epochs = sorted({row["epoch"] for row in results})
    methods = list(dict.fromkeys(one["method"] for one in settings.values()))
    for method, line in zip(methods, ("o-", "s--", "^:"), strict=False):
        names = [name for name, one in settings.items() if one["method"] == method]
        for i, epoch in enumerate(epochs):
            own = {row["name"]: row for row in results if row["epoch"] == epoch}
            points = sorted((settings[name][key], 100 * own[name]["accuracy"]) for name in names if name in own)
            text = f"{epoch} epochs" if epoch != 1 else "1 epoch"
            text = f"{method}, {text}" if len(methods) > 1 else text
            axes.plot(*zip(*points, strict=True), line, color=SERIES[i % len(SERIES)], markersize=4, label=text)
    for name, color in (("ensemble", ENSEMBLE), ("best member", CONTROL)):
        value = next((row["accuracy"] for row in report["results"] if row["name"] == name), None)
        if value is not None:
            axes.axhline(100 * value, color=color, linestyle="--", linewidth=1.0, label=name)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy [%]")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def provenance(report: Mapping[str, Any]) -> Figure | None:
    """Which member the channels of every group come from, a panel per candidate that has kept channels."""
    shown = {name: one["provenance"] for name, one in report["candidates"].items() if one["provenance"]}
    if not shown:
        return None
    same: dict[str, tuple[list[str], Mapping[str, Sequence[int]]]] = {}
    for name, own in shown.items():  # candidates that have kept the same channels share a panel
        same.setdefault(repr(own), ([], own))[0].append(name)
    panels = list(same.values())[:6]
    groups = list(panels[0][1])
    most = max(max(counts) / sum(counts) for _, own in panels for counts in own.values())
    figure, grid = make_figure(
        min(2.2 + 1.9 * len(panels), 13.0), min(1.4 + 0.32 * len(groups), 8.0), columns=len(panels)
    )
    for axes, (names, own) in zip(grid, panels, strict=True):
        counts = np.array([own[group] for group in groups], dtype=float)
        parts = counts / counts.sum(1, keepdims=True)
        axes.grid(visible=False)
        image = axes.imshow(parts, vmin=0, vmax=most, cmap="viridis", aspect="auto")
        axes.set_xticks(range(parts.shape[1]))
        axes.set_yticks(range(len(groups)), groups if axes is grid[0] else [""] * len(groups), fontsize="small")
        axes.set_xlabel("member")
        axes.set_title("\n".join(names), fontsize="small")
        for (row, column), count in np.ndenumerate(counts):
            if counts.size <= 80:
                color = "white" if parts[row, column] < 0.6 * most else "black"
                axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize="x-small", color=color)
    figure.colorbar(image, ax=grid, label="part", fraction=0.05)
    return figure

"""Figures of lottery tickets: functions of the rows that `callbacks.iterative_pruning` keeps, and of tables of runs.

As in `callbacks.figures.low_rank` a role has the same colour in every figure, and pyplot is not used. A function gives
None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import make_figure, plain_log_ticks

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from torch import Tensor

ACCURACY, NLL, ECE, MACE, FADED = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
# Of scores, controls and directions: the ticket first, then in the order of the first appearance.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
OF_TICKETS = frozenset({"pruning_frontier"})  # functions of files by level
_METRICS = (("accuracy", ACCURACY), ("nll", NLL), ("ece", ECE), ("mace", MACE))


def metrics_against_remaining(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy and calibration in validation over the weights that remain; the dense level is a dashed line.

    Where nothing is classified: the first few metrics of validation. None for a single level.
    """
    found = [(name, color) for name, color in _METRICS if any(f"val/{name}" in row["metrics"] for row in rows)]
    if "accuracy" not in (name for name, _ in found):
        names = dict.fromkeys(name[4:] for row in rows for name in row["metrics"] if name.startswith("val/"))
        found = list(zip(names, SERIES[: len(_METRICS)], strict=False))
    if not found or len(rows) < 2:
        return None
    figure, panels = make_figure(3.4 * len(found), 3.1, columns=len(found))
    for axes, (name, color) in zip(panels, found, strict=True):
        x = [100 * row["remaining"] for row in rows]
        axes.plot(x, [row["metrics"].get(f"val/{name}", np.nan) for row in rows], "o-", color=color, markersize=3)
        if rows[0]["level"] == 0:
            axes.axhline(rows[0]["metrics"].get(f"val/{name}", np.nan), color=FADED, linestyle="--", linewidth=0.9)
        _remaining_axis(axes, x)
        axes.set_title(name.upper() if name in ("nll", "ece", "mace") else name, fontsize="medium")
    return figure


def layer_densities(rows: Sequence[Mapping[str, Any]], levels: Sequence[int] | None = None) -> Figure | None:
    """What remains of every layer, from input to output, at some levels; the dashed lines are the whole network's.

    Args:
        rows: A row per level.
        levels: Which; None: a handful from the first pruning to the last.
    """
    rows = [row for row in rows if row["level"]]
    if not rows:
        return None
    if levels is None:
        levels = sorted({rows[i]["level"] for i in np.linspace(0, len(rows) - 1, min(len(rows), 5)).astype(int)})
    labels = list(rows[0]["densities"])
    figure, (axes,) = make_figure(min(3.6 + 0.3 * len(labels), 9.0), 3.6)
    places = range(len(labels))
    for color, row in zip(_ramp(len(levels)), (row for row in rows if row["level"] in levels), strict=False):
        label = f"level {row['level']} ({100 * row['remaining']:.2g} %)"
        axes.plot(places, [100 * row["densities"][name] for name in labels], "o-", color=color, label=label)
        axes.axhline(100 * row["remaining"], color=color, linestyle="--", linewidth=0.7)
    axes.set_yscale("log")
    axes.set_xticks(places, labels, rotation=90 if len(labels) > 4 else 0, fontsize="small")
    axes.set_ylabel("weights that remain [%]")
    plain_log_ticks(axes.yaxis)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def compared(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] = ("accuracy", "nll"),
    by: str = "series",
    dense: Mapping[str, tuple[float, float]] | None = None,
) -> Figure | None:
    """Metrics over the weights that remain, one line per series (score, control, source), mean and spread over seeds.

    Args:
        rows: ``{by: name, "seed", "level", "remaining", **metrics}``.
        metrics: Which, a panel each.
        by: Key of the name of the series.
        dense: Mean and standard deviation of each metric of the dense network, a band; None: those of level 0.
    """
    if not rows:
        return None
    figure, panels = make_figure(3.9 * len(metrics) + 1.2, 3.5, columns=len(metrics))
    names = list(dict.fromkeys(row[by] for row in rows))
    for axes, metric in zip(panels, metrics, strict=True):
        band = (dense or {}).get(metric)
        if band is None and (first := [row[metric] for row in rows if row["level"] == 0]):
            band = float(np.mean(first)), float(np.std(first))
        if band is not None:
            axes.axhspan(band[0] - band[1], band[0] + band[1], color=FADED, alpha=0.25, linewidth=0)
            axes.axhline(band[0], color=FADED, linestyle="--", linewidth=0.9, label="dense")
        for i, name in enumerate(names):
            own = [row for row in rows if row[by] == name and row.get(metric) is not None]
            levels = sorted({row["level"] for row in own})
            x = [100 * np.mean([row["remaining"] for row in own if row["level"] == level]) for level in levels]
            values = [[row[metric] for row in own if row["level"] == level] for level in levels]
            mean, spread = np.array([np.mean(v) for v in values]), np.array([np.std(v) for v in values])
            color = SERIES[i % len(SERIES)]
            axes.plot(x, mean, "o-", color=color, markersize=3, label=name)
            axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        _remaining_axis(axes, [100 * row["remaining"] for row in rows])
        axes.set_ylabel(metric.upper() if metric != "accuracy" else metric)
    panels[-1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def against_cost(
    rows: Sequence[Mapping[str, Any]], metric: str = "accuracy", cost: str = "seconds", by: str = "series"
) -> Figure | None:
    """A metric over what a ticket of each level has cost, one line per way to it; the levels are written beside.

    Args:
        rows: ``{by: name, "level", cost, metric}``.
        metric: Key of the metric.
        cost: Key of the cost, seconds.
        by: Key of the name of the series.
    """
    if not rows:
        return None
    figure, (axes,) = make_figure(6.4, 3.8)
    for i, name in enumerate(dict.fromkeys(row[by] for row in rows)):
        own = [row for row in rows if row[by] == name]
        levels = sorted({row["level"] for row in own})
        x = [np.mean([row[cost] for row in own if row["level"] == level]) for level in levels]
        y = [np.mean([row[metric] for row in own if row["level"] == level]) for level in levels]
        color = SERIES[i % len(SERIES)]
        axes.plot(x, y, "o-", color=color, markersize=4, label=name)
        for level, a, b in zip(levels, x, y, strict=True):
            axes.annotate(str(level), (a, b), xytext=(0, 5), textcoords="offset points", fontsize=7, color=color)
    axes.set_xlabel("cost of the search and the training [s], levels beside")
    axes.set_ylabel(metric)
    axes.legend(frameon=False, fontsize="small")
    return figure


def mask_overlaps(masks: Mapping[str, Mapping[str, Tensor]], title: str = "") -> Figure | None:
    """Jaccard index of every pair of masks, with the index that two random masks of these densities would have below.

    Args:
        masks: By name of the ticket, masks by name of the weight.
        title: Of the figure.
    """
    from networks.masks import density, jaccard

    if len(masks) < 2:
        return None
    names = list(masks)
    values = np.array([[jaccard(masks[a], masks[b]) for b in names] for a in names])
    p = [density(masks[name]) for name in names]
    chance = np.array([[a * b / (a + b - a * b) if a + b else 1.0 for b in p] for a in p])
    size = 1.8 + 0.75 * len(names)
    figure, (axes,) = make_figure(size + 0.8, size)
    axes.grid(visible=False)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            text = f"{values[i, j]:.2f}" + ("" if i == j else f"\n({chance[i, j]:.2f})")
            color = "black" if values[i, j] > 0.6 else "white"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=axes, label="overlap (by chance)")
    return figure


def frontier(
    mu: Mapping[str, Tensor],
    sigma: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    max_points: int = 4000,
    title: str = "",
) -> Figure | None:
    """Mean and deviation of the weights alive, a panel per layer: what the next pruning keeps and what it removes.

    Deviations are divided by their median in the layer, which stands above the panel: training hardly moves them.

    Args:
        mu: Means by name of the weight.
        sigma: Deviations.
        masks: Weights alive now.
        kept: Weights alive after the next pruning.
        max_points: Points of a panel.
        title: Of the figure.
    """
    shown = [name for name in mu if bool(masks[name].any())][:6]
    if not shown:
        return None
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = make_figure(3.1 * columns + 0.6, 2.7 * lines + 0.6, rows=lines, columns=columns)
    order = np.random.default_rng(0)
    for axes, name in zip(panels, shown, strict=False):
        alive = masks[name].flatten().numpy()
        x, y = (values[name].detach().flatten().double().numpy()[alive] for values in (mu, sigma))
        middle = float(np.median(y))
        y = y / middle
        stays = kept[name].flatten().numpy()[alive]
        points = order.permutation(len(x))[:max_points]
        for here, color, label in ((stays, ACCURACY, "stays"), (~stays, NLL, "is removed")):
            chosen = points[here[points]]
            axes.scatter(np.abs(x[chosen]), y[chosen], s=3, color=color, label=label, linewidths=0, alpha=0.6)
        axes.set_xscale("log")
        if np.abs(x).max() < 30 * np.abs(x).min():
            plain_log_ticks(axes.xaxis)
        if y.max() > 2 * y.min():
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_title(f"{name.removesuffix('.weight').removeprefix('net.')}, median {middle:.2g}", fontsize="small")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("absolute mean", fontsize="medium")
    figure.supylabel("standard deviation / median", fontsize="medium")
    handles, texts = panels[0].get_legend_handles_labels()
    options = {"ncols": 2, "frameon": False, "fontsize": "small", "title": title or None}
    legend = figure.legend(handles, texts, loc="outside upper center", **options)
    for handle in legend.legend_handles:
        handle.set_sizes([20])
    return figure


def pruning_frontier(tickets: Mapping[int, Path], level: int | None = None) -> Figure | None:
    """`frontier` of the pruning after a level of a Bayesian network.

    Args:
        tickets: Files by level.
        level: Which; None: the one in the middle of those that a pruning followed.
    """
    from networks.lottery.tickets import load_ticket

    levels = [n for n in tickets if n + 1 in tickets]
    if not levels:
        return None
    level = levels[len(levels) // 2] if level is None else level
    ticket = load_ticket(tickets[level])
    if not ticket.bayesian:
        return None
    state, masks = ticket.state("trained"), ticket.masks
    mu = {name: state[f"{name}_mu"] for name in masks}
    sigma = {name: state[f"{name}_log_sigma"].exp() for name in masks}
    kept = load_ticket(tickets[level + 1]).masks
    return frontier(mu, sigma, masks, kept, title=f"weights at the end of level {level}")


# ------------------------------------------------------------------------------------------------------------ parts


def _remaining_axis(axes: Any, x: Sequence[float]) -> None:
    """Percent that remain, from dense at the left to sparse at the right, logarithmic."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    low, high = min(x), max(x)
    axes.set_xlim(high * 1.08, low / 1.08 if low < high else low / 1.5)
    if low < high < 5 * low:  # too little for round numbers on a logarithmic axis: the levels themselves
        axes.set_xticks(sorted(set(x)), [f"{value:.3g}" for value in sorted(set(x))])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        plain_log_ticks(axes.xaxis)
    axes.set_xlabel("weights that remain [%]")


def _ramp(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(number - 1, 1)) for i in range(number)]

"""Figures of training on slow networks: functions of the history that `callbacks.training_history` keeps.

A role has the same colour in every figure. A function gives None where there is nothing to show, as of bytes in a run
whose strategy counts none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from callbacks.figures.axes import MAX_LABELS, heat_map, make_figure, map_height, plain_log_ticks, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("loss_and_phases", "exchange_schedule", "bytes_per_epoch", "drift", "factor_ranks", "compression")
LOSS, METRIC, SKIP, WAIT, BETWEEN, WITHIN = "#D55E00", "#0072B2", "#0072B2", "#E69F00", "#D55E00", "#8C8C8C"
PHASES = {"warmup": "#BDBDBD", "cycling": "#009E73", "cooldown": "#CC79A7", "ab": "#E69F00", "full": "#56B4E9"}
_MAX_WRITTEN = 20  # AB phases whose ranks fit into their cells
_NAMES = {"warmup": "warm-up", "cooldown": "cool-down", "ab": "A and B apart", "full": "full rank together"}


def loss_and_phases(history: Mapping[str, Any]) -> Figure | None:
    """Training loss and validation metric over optimizer steps, the phases of the strategy shaded."""
    curve, epochs = history["curve"], history["epochs"]
    if len(curve["step"]) < 2 or not epochs:
        return None
    measured = [(row["step"], row["metric"]) for row in epochs if row["metric"] is not None]
    figure, panels = make_figure(7.4, 5.2 if measured else 3.2, rows=2 if measured else 1)
    above = panels[0]
    _log_if_positive(above, curve["loss"])
    above.plot(curve["step"], curve["loss"], color=LOSS, linewidth=0.7, alpha=0.35)
    above.plot(curve["step"], _smooth(curve["loss"]), color=LOSS, linewidth=1.4)
    above.set_ylabel("training loss")
    if measured:
        panels[1].plot(
            *zip(*measured, strict=True), color=METRIC, marker="o", markersize=3, linewidth=1.2, clip_on=False
        )
        panels[1].set_ylabel(history["metric"])
    end = max(epochs[-1]["step"], curve["step"][-1])
    for axes in panels:
        _shade(axes, history["phases"], end)
        axes.set_xlim(0, end)
    panels[-1].set_xlabel("optimizer step")
    handles, texts = above.get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, loc="outside upper center", ncols=len(texts), frameon=False, fontsize="small")
    return figure


def exchange_schedule(history: Mapping[str, Any]) -> Figure | None:
    """Training loss over epochs, and below what it did to DASO's B and W; in grey epochs that exchange every step."""
    rows = [row for row in history["epochs"] if "daso/skip" in row["strategy"] and row["loss"] is not None]
    if not rows:
        return None
    figure, (above, below) = make_figure(7.0, 4.6, rows=2, heights=(3, 2))
    epochs = np.array([row["epoch"] for row in rows])
    skip, wait = (np.array([row["strategy"][f"daso/{name}"] for row in rows]) for name in ("skip", "wait"))
    losses = [row["loss"] for row in rows]
    _log_if_positive(above, losses)
    above.plot(epochs, losses, color=LOSS, marker="o", markersize=3)
    above.set_ylabel("training loss")
    for values, color, text in ((skip, SKIP, "B, steps between exchanges"), (wait, WAIT, "W, steps until the merge")):
        # An epoch that exchanges after every step and waits is written as 0.
        below.step(epochs, np.where(skip > 0, values, np.nan), where="mid", color=color, linewidth=1.8, label=text)
        # A single epoch would have no length.
        below.plot(epochs, np.where(skip > 0, values, np.nan), color=color, marker="o", markersize=3, linestyle="")
    label: str | None = "exchange after every step"
    for axes in (above, below):
        for epoch in epochs[skip == 0]:
            axes.axvspan(epoch - 0.5, epoch + 0.5, color=PHASES["warmup"], alpha=0.35, linewidth=0, label=label)
            label = None
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    below.set_ylim(0, max(skip.max(), 1) * 1.15)
    for axis in (below.yaxis, below.xaxis, above.xaxis):
        whole_numbers(axis)
    below.set_ylabel("steps")
    below.set_xlabel("epoch")
    pairs = [axes.get_legend_handles_labels() for axes in (above, below)]
    handles, texts = ([x for pair in pairs for x in pair[i]] for i in (0, 1))
    figure.legend(handles, texts, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    return figure


def bytes_per_epoch(history: Mapping[str, Any]) -> Figure | None:
    """Bytes of every epoch over the links between nodes and within them, all ranks together."""
    rows = [row for row in history["epochs"] if "inter_node_bytes" in row]
    if not rows or not (rows[-1]["inter_node_bytes"] or rows[-1]["intra_node_bytes"]):
        return None
    epochs = [row["epoch"] for row in rows]
    figure, (axes,) = make_figure(7.0, 3.2)
    below = np.zeros(len(rows))
    for name, color, text in (
        ("inter_node_bytes", BETWEEN, "between nodes"),
        ("intra_node_bytes", WITHIN, "within nodes"),
    ):
        megabytes = np.diff([0.0, *(row[name] for row in rows)]) / 1e6
        axes.bar(epochs, megabytes, bottom=below, width=0.85, color=color, label=text)
        below += megabytes
    axes.set_xlim(epochs[0] - 0.6, epochs[-1] + 0.6)
    axes.grid(axis="x", visible=False)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("sent in an epoch [MB]")
    total = rows[-1]["inter_node_bytes"] / 1e6
    axes.set_title(f"{total:.4g} MB between nodes in all", fontsize="medium")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def drift(history: Mapping[str, Any]) -> Figure | None:
    """How far nodes had parted when they met: the largest ||x_i - mean|| / ||mean|| of every epoch."""
    rows = [row for row in history["epochs"] if row.get("drift")]
    if not rows:
        return None
    figure, (axes,) = make_figure(7.0, 3.2)
    values = [row["drift"] for row in rows]
    axes.plot([row["epoch"] for row in rows], values, color=METRIC, marker="o", markersize=3)
    if max(values) > 20 * min(values):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, None)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("largest ||x - mean|| / ||mean||")
    return figure


def factor_ranks(history: Mapping[str, Any]) -> Figure | None:
    """Rank of every layer (rows) as a share of its full rank over the AB phases, written into the map where it fits."""
    cycles = _cycles(history)
    if not cycles:
        return None
    labels = list(cycles[-1]["ranks"])
    sides = {label: history["sides"].get(label, max(c["ranks"].get(label, 1) for c in cycles)) for label in labels}
    shares = np.array([[cycle["ranks"].get(label, np.nan) / sides[label] for cycle in cycles] for label in labels])
    figure, (axes,) = make_figure(7.4, 1.1 + map_height(len(labels)))
    numbers = [cycle["number"] for cycle in cycles]
    image = heat_map(axes, shares, numbers, labels, vmin=0.0, vmax=1.0)
    if len(labels) <= MAX_LABELS and len(numbers) <= _MAX_WRITTEN:
        for place, label in enumerate(labels):
            for number, cycle, share in zip(numbers, cycles, shares[place], strict=True):
                if label in cycle["ranks"]:
                    ink = "black" if share > 0.6 else "white"  # on yellow, on blue
                    text = f"{cycle['ranks'][label]:.0f}"
                    axes.text(number, place, text, color=ink, fontsize="x-small", ha="center", va="center")
    if len(labels) <= MAX_LABELS:
        last = [f"{cycles[-1]['ranks'][label]:.0f} of {sides[label]:.0f}" for label in labels]
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(labels)), last, fontsize="small")
        right.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="rank / full rank", pad=0.02)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("AB phase")
    return figure


def compression(history: Mapping[str, Any]) -> Figure | None:
    """How much smaller the factored network is in every AB phase, and below what the two halves have learned in it."""
    cycles = _cycles(history)
    if not cycles:
        return None
    learned = [cycle for cycle in cycles if "cosine" in cycle]
    figure, panels = make_figure(7.0, 4.6 if learned else 3.0, rows=2 if learned else 1)
    numbers = [cycle["number"] for cycle in cycles]
    panels[0].plot(numbers, [cycle["compression"] for cycle in cycles], color=METRIC, marker="o", markersize=4)
    panels[0].axhline(1.0, color=WITHIN, linewidth=0.8, linestyle=":")
    panels[0].set_ylim(0, 1.1 * max(1.0, *(cycle["compression"] for cycle in cycles)))
    panels[0].set_ylabel("times smaller")
    text = f"numbers of the network, with W / with A and B: {cycles[-1]['compression']:.3g} in the last AB phase"
    panels[0].set_title(text, fontsize="medium")
    if learned:
        x = [cycle["number"] for cycle in learned]
        for key, color, text in (
            ("change", LOSS, "change of A B / A B"),
            ("cosine", WAIT, "cosine of the changes of A and of B"),
        ):
            panels[1].plot(x, [cycle[key] for cycle in learned], color=color, marker="o", markersize=3, label=text)
        panels[1].axhline(0.0, color=WITHIN, linewidth=0.8)
        panels[1].set_ylabel("two halves")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    for axes in panels:
        axes.set_xlim(0.5, numbers[-1] + 0.5)
        whole_numbers(axes.xaxis)
    panels[-1].set_xlabel("AB phase")
    return figure


# ------------------------------------------------------------------------------------------------------------ parts


def _cycles(history: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ranks and compression of every AB phase, with what was reported of it once it was over."""
    found: list[dict[str, Any]] = []
    for phase in history["phases"]:
        report = phase["report"]
        ranks = {key.removeprefix("ab/rank/"): rank for key, rank in report.items() if key.startswith("ab/rank/")}
        if found and "ab/cosine_of_halves" in report and found[-1]["number"] == report["ab/cycle"]:
            found[-1] |= {"cosine": report["ab/cosine_of_halves"], "change": report["ab/relative_change"]}
        if phase["phase"] == "ab" and ranks:
            found.append({"number": report["ab/cycle"], "ranks": ranks, "compression": report["ab/compression"]})
    return found


def _shade(axes: Any, phases: Sequence[Mapping[str, Any]], end: float) -> None:
    drawn: set[str] = set()
    ends = [*(phase["step"] for phase in phases), end][1:]
    for phase, until in zip(phases, ends, strict=True):
        name = phase["phase"]
        label = None if name in drawn else _NAMES.get(name, name)
        drawn.add(name)
        axes.axvspan(phase["step"], until, color=PHASES.get(name, "#EEEEEE"), alpha=0.3, linewidth=0, label=label)


def _log_if_positive(axes: Any, values: Sequence[float]) -> None:
    if min(values) > 0:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Means over neighbours, a fiftieth of the curve."""
    width = max(len(values) // 50, 1)
    sums = np.cumsum([0.0, *values])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
